"""What forward does beside computing: the copy does it too, and the caller's model and generators stay as they are."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fx_checks import CHANNELS, conv_bn, ready, relative_error, report, run
from torch import Tensor, nn

from reparamc import fuse_fx
from reparamc.errors import InputError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    held: Any

    def __init__(self, step: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, self.block(x))


@pytest.mark.parametrize("verify", ["off", "region", "full"])
@pytest.mark.parametrize("factor", [random.random, lambda: float(np.random.rand())], ids=["python", "numpy"])
def test_numbers_that_torch_does_not_draw_stay_live(factor: Callable[[], float], verify: str) -> None:
    fused = fuse_fx(Net(lambda _, y: y * factor()).eval(), X, verify=verify)
    assert not torch.equal(fused(X), fused(X))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())


@pytest.mark.parametrize("verify", ["off", "region", "full"])
def test_a_forward_that_writes_parameters(verify: str) -> None:
    def grow(net: Net, y: Tensor) -> Tensor:
        net.block.get_parameter("0.weight").data.mul_(1.5)
        return y

    model = Net(grow).eval()
    before = model.block.get_parameter("0.weight").detach().clone()
    fused = fuse_fx(model, X, verify=verify)
    assert torch.equal(model.block.get_parameter("0.weight"), before)
    for _ in range(2):
        torch.testing.assert_close(fused(X), model(X))


class Counter:
    """Something plain that a module holds, and that refers to itself."""

    def __init__(self) -> None:
        self.n, self.seen, self.me = 0, list[int](), self

    def step(self) -> float:
        self.n += 1
        self.seen.append(self.n)
        return 1.0


def _counted(a: np.ndarray) -> float:
    a += 1
    return 1.0


HELD: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "an object": (Counter, Counter.step, lambda o: (o.n, o.seen[:], o.me is o)),
    "an object in a list": (lambda: [Counter()], lambda h: h[0].step(), lambda h: (h[0].n, h[0].seen[:])),
    "an array": (lambda: np.array([0.0, np.nan]), _counted, lambda a: a.tolist()[0]),
    "an array in an object": (
        lambda: SimpleNamespace(a=np.zeros(2)), lambda o: _counted(o.a), lambda o: o.a.tolist()
    ),
    "a generator of torch": (
        lambda: torch.Generator().manual_seed(1), lambda g: torch.rand(1, generator=g), lambda g: g.get_state().tolist()
    ),
    "a generator of NumPy": (lambda: np.random.default_rng(1), lambda g: g.random(), lambda g: g.bit_generator.state),
    "an older one of NumPy": (
        lambda: np.random.RandomState(1), lambda g: g.rand(), lambda g: [str(v) for v in g.get_state()]
    ),
    "a generator of Python": (lambda: random.Random(1), lambda g: g.random(), lambda g: g.getstate()),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_what_a_module_holds_is_as_before(name: str) -> None:
    make, step, content = HELD[name]
    model = Net(lambda net, y: y * step(net.held)).eval()
    model.held = make()
    before = content(model.held)
    fused = fuse_fx(model, X)
    assert content(model.held) == before
    assert "forward changes what it holds" in [p.why for p in report(fused).parts]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    model.held, fused.held = make(), make()
    for _ in range(2):
        torch.testing.assert_close(fused(X), model(X))
    assert content(fused.held) == content(model.held) != before


def test_what_is_only_read_is_no_change() -> None:
    model = Net(lambda net, y: y * net.held.n + float(net.held.seen[0])).eval()
    model.held = Counter()
    model.held.step()
    assert not report(fuse_fx(model, X)).parts


def test_generators_are_as_before() -> None:
    model = Net(lambda _, y: nn.functional.dropout(y, 0.5) * random.random() * np.random.rand()).eval()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    fuse_fx(model, X, verify=False)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # type: ignore[union-attr]


class Cached(nn.Module):
    """Keeps what it computes from a parameter, as attention biases are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.bias = conv_bn(), nn.Parameter(torch.randn(CHANNELS, 1, 1))
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias.exp()
        return self.block(x) + self.kept["bias"]


def test_what_a_model_has_cached_is_no_constant() -> None:
    model = ready(nn.Sequential(conv_bn(), nn.ReLU(), Cached()))
    x = torch.randn(2, CHANNELS, 7, 6)
    before = fuse_fx(model, x)
    expected = run(model, x)
    after = fuse_fx(model, x)
    assert list(before.state_dict()) == list(after.state_dict())
    assert report(after).after.batchnorm == 0
    assert any("keeps tensors aside" in part.why for part in report(after).parts)
    assert relative_error(run(after, x), expected) < 1e-5
    with pytest.raises(InputError, match="keeps tensors aside, in 'kept'; with example_inputs"):
        fuse_fx(model)


def hooked(model: Any, kept: dict[str, Tensor], named: bool) -> None:
    def by_position(module: nn.Module, args: Any, result: Tensor, kept: dict[str, Tensor] = kept) -> None:
        kept["y"] = result

    def by_name(module: nn.Module, args: Any, result: Tensor, *, kept: dict[str, Tensor] = kept) -> None:
        kept["y"] = result

    model.first.register_forward_hook(by_name if named else by_position)


class Remembering(nn.Module):
    def __init__(self, named: bool) -> None:
        super().__init__()
        self.first, self.second, self.kept = conv_bn(), conv_bn(), dict[str, Tensor]()
        hooked(self, self.kept, named)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()) + self.kept["y"].mean()


@pytest.mark.parametrize("named", [False, True])
def test_defaults_of_hooks_refer_to_the_copy(named: bool) -> None:
    model, x = ready(Remembering(named)), torch.randn(2, CHANNELS, 7, 6)
    fused, expected = fuse_fx(model, x), run(model, x)
    model.kept.clear()
    assert relative_error(run(fused, x), expected) < 1e-5
    assert not model.kept


def _dropout(net: Net, y: Tensor) -> Tensor:
    net.held.train()
    y = net.held(y)
    net.held.eval()
    return y


def _slope(net: Net, y: Tensor) -> Tensor:
    net.held.negative_slope = 0.9
    y = net.held(y)
    net.held.negative_slope = 0.1
    return y


def _stride(net: Net, y: Tensor) -> Tensor:
    net.held.stride, kept = (2, 2), net.held.stride
    y = net.held(y)
    net.held.stride = kept
    return y


def _other_parameters(net: Net, y: Tensor) -> Tensor:
    return torch.func.functional_call(net.held, {n: p + 0.5 for n, p in net.held.named_parameters()}, (y,))


SET_BACK: dict[str, tuple[Callable[[Net, Tensor], Tensor], Callable[[], nn.Module]]] = {
    "a mode": (_dropout, nn.Dropout),
    "a setting": (_slope, lambda: nn.LeakyReLU(0.1)),
    "a stride": (_stride, lambda: nn.Conv2d(4, 4, 3)),
    "parameters": (_other_parameters, lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))),
    "parameters of a layer": (_other_parameters, lambda: nn.Conv2d(4, 4, 1)),
}


@pytest.mark.parametrize("name", SET_BACK)
def test_what_forward_sets_and_sets_back(name: str) -> None:
    step, make = SET_BACK[name]
    model = Net(step)
    model.held = make()
    model = ready(model.eval()).float()
    with pytest.raises(InputError, match="with example_inputs its parts are fused"):
        fuse_fx(model, verify="off")
    fused = fuse_fx(model, X)
    for x in (X, X[:1, :, 1:]):
        expected = seeded(model, x)
        torch.testing.assert_close(seeded(fused, x), expected, rtol=1e-4, atol=1e-4)


def seeded(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return run(model, x)


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def test_gradients_of_its_own_are_kept() -> None:
    model = ready(Net(lambda _, y: Rounded.apply(y * 8))).float()
    fused = fuse_fx(model, X)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    grads = []
    for one in (model, fused):
        x = X.clone().requires_grad_()
        one(x).sum().backward()
        grads.append(x.grad)
    assert relative_error(*grads) < 1e-4
    assert grads[0].abs().max() > 0.1
    with pytest.raises(InputError, match="whose gradients no graph would keep"):
        fuse_fx(model)


class Times(Net):
    def __call__(self, x: Tensor, factor: float = 2.0) -> Tensor:
        return super().__call__(x) * factor


@pytest.mark.parametrize("examples", [False, True])
def test_a_call_of_its_own_is_kept(examples: bool) -> None:
    model = ready(Times(lambda _, y: y.relu())).float()
    fused = fuse_fx(model, X if examples else None)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    for factor in (2.0, 3.0):
        torch.testing.assert_close(fused(X, factor), model(X, factor), rtol=1e-4, atol=1e-4)


def test_a_forward_that_asks_for_gradients() -> None:
    class Field(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            return torch.autograd.grad(self.block(x).square().sum(), x)[0]

    model = ready(Field(lambda _, y: y)).float()
    fused = fuse_fx(model, X)
    torch.testing.assert_close(fused(X.clone()), model(X.clone()), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_examples() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)

        def forward(self, near: Tensor, x: Tensor) -> Tensor:
            return torch.sparse.mm(near, self.norm(self.linear(x)).relu())

    model, x = ready(Graph()).float(), torch.randn(6, 4)
    dense = (torch.rand(6, 6) > 0.5).float()
    for near in (dense.to_sparse(), dense.to_sparse_csr()):
        fused = fuse_fx(model, (near, x))
        assert report(fused).after.batchnorm == 0
        torch.testing.assert_close(run(fused, near, x), run(model, near, x), rtol=1e-4, atol=1e-4)


def test_parts_that_are_run_inside_vmap() -> None:
    def slopes(net: Net, y: Tensor) -> Tensor:
        return torch.vmap(torch.func.jacrev(net.held))(y.mean((2, 3)))

    model = Net(slopes)
    model.held = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    model = ready(model).float()
    fused = fuse_fx(model, X)
    torch.testing.assert_close(run(fused, X), run(model, X), rtol=1e-4, atol=1e-4)
