"""`Fuser`: what it returns is what `fuse_fx` returns for the weights of that moment, found without a search."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fx_checks import CHANNELS, Net, conv_bn, ready, vector
from paper_blocks import CASES
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from reparamc import Fuser, InputError, InputTypeError, fuse_fx
from reparamc.fx.copying import copied

X = torch.randn(3, CHANNELS, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def block() -> Any:
    """conv + BatchNorm beside conv + BatchNorm beside BatchNorm, and a layer that stays."""
    run = lambda m, x: m.last(torch.relu(m.a(x) + m.b(x) + m.norm(x)))  # noqa: E731
    return Net(run, a=conv_bn(3), b=conv_bn(1), norm=nn.BatchNorm2d(CHANNELS), last=nn.Conv2d(CHANNELS, 3, 1)).double()


def changed(model: nn.Module, seed: int = 1) -> nn.Module:
    """``model`` with other weights, as after an epoch."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            if t.is_floating_point() and (isinstance(t, nn.Parameter) or "running" in name):
                t.mul_(1 + 0.3 * torch.rand(t.shape, generator=generator, dtype=t.dtype))
    return model


def assert_fuses(fuser: Fuser, model: nn.Module, x: Any = X, tolerance: float = 1e-12) -> None:
    fused, reference = fuser(), copied(model).eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), reference(x), rtol=tolerance, atol=tolerance)


def snapshot(model: nn.Module) -> list[Any]:
    tensors = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    return [tensors, [m.training for m in model.modules()], torch.get_rng_state()]


def test_the_second_fusion_is_that_of_the_new_weights_without_a_search() -> None:
    model = ready(block())
    fuser = Fuser(model, X)
    first = fuser()
    assert {n: t.shape for n, t in first.state_dict().items()} == {
        n: t.shape for n, t in fuse_fx(model, X).state_dict().items()
    }
    changed(model)
    assert fuser() is first
    assert fuser.searches == 1
    expected = fuse_fx(model, X).state_dict()
    for name, t in first.state_dict().items():
        torch.testing.assert_close(t, expected[name], rtol=1e-13, atol=1e-13)


def test_a_model_in_training_stays_as_it_is() -> None:
    model = ready(block()).train()
    model.a[1].eval()  # a frozen BatchNorm
    before = snapshot(model)
    fuser = Fuser(model, X)
    fuser()
    for old, new in zip(before, snapshot(model), strict=True):
        torch.testing.assert_close(old, new)
    assert_fuses(fuser, model)


REPLAYED = [
    *("repvgg, grouped", "acnet", "dbb, plain", "mobileone, depthwise", "repmixer", "sesr", "unireplknet"),
    *("orepa, products", "ghostnetv3, primary, skip", "lora, linear, stack", "lora, matrices", "lora, conv"),
    *("dbb", "dbb, stride 2", "ecb"),
    next(name for name in CASES if CASES[name].operator == "ConvTranspose"),
]


@pytest.mark.parametrize("name", REPLAYED)
def test_blocks_of_papers(name: str) -> None:
    """Fused again for other weights, and with the gradients of the unfused block for every parameter."""
    model, x = CASES[name].module().double(), CASES[name].inputs()[0]
    fuser = Fuser(model, x, verify="region")
    assert_fuses(fuser, changed(model), x)
    assert fuser.searches == 1
    through = Fuser(model, x, verify="region", differentiable=True)()
    assert_same_gradients(through, changed(model, 2), x)


def test_a_measured_kernel_follows_without_an_example() -> None:
    """Nothing compares the fused module with the model then."""
    model, x = CASES["dbb"].module().double(), CASES["dbb"].inputs()[0]
    fuser = Fuser(model, verify="region")
    assert sum(isinstance(m, nn.Conv2d) for m in fuser().modules()) == 1
    assert_fuses(fuser, changed(model), x)
    assert fuser.searches == 1


def assert_same_gradients(through: nn.Module, model: nn.Module, x: Tensor) -> None:
    assert [id(p) for p in through.parameters()] == [id(p) for p in model.parameters()]
    weight = torch.randn(model(x).shape, dtype=x.dtype)
    found, expected = (
        torch.autograd.grad((m(x) * weight).sum(), list(model.parameters()), allow_unused=True)
        for m in (through, model)
    )
    for a, b in zip(found, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=1e-9, atol=1e-9)


def test_gradcheck_of_every_parameter() -> None:
    model = ready(block())
    through: Any = Fuser(model, X, differentiable=True)()
    names = [n for n, _ in through.named_parameters()]
    x = X[:1, :, :4, :3]

    def run(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(through, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, tuple(p.detach().clone().requires_grad_() for p in through.parameters()))


def test_what_runs_again_in_the_backward_pass() -> None:
    """Activation checkpointing computes with the kernels of that forward."""
    model = ready(Net(lambda m, x: checkpoint(m.inner, x, use_reentrant=False), inner=block()))
    through = Fuser(model, X, differentiable=True)()
    assert_same_gradients(through, changed(model), X)


def test_checkpoints_that_hide_parameters_are_refused() -> None:
    model = ready(Net(lambda m, x: checkpoint(m.inner, x, use_reentrant=True), inner=block()))
    through = Fuser(model, X, differentiable=True)()
    with pytest.raises(InputError, match="use_reentrant=False"):
        through(X.clone().requires_grad_()).sum().backward()


def test_a_fusion_in_inference_mode_is_renewed_outside() -> None:
    model = ready(block())
    with torch.inference_mode():
        fuser, through = Fuser(model, X), Fuser(model, X, differentiable=True)()
    assert_fuses(fuser, changed(model))
    assert_same_gradients(through, model, X)


def test_a_model_without_parameters() -> None:
    for fuser in (Fuser(nn.ReLU(), X), Fuser(nn.ReLU(), X, differentiable=True)):
        torch.testing.assert_close(fuser()(X), torch.relu(X))


def test_it_trains_through_the_fusion() -> None:
    """Steps of the fused form are those of the unfused form in eval mode."""
    model = ready(block())
    other = copy.deepcopy(model)
    through = Fuser(model, X, differentiable=True)()
    for m, parameters in ((through, through.parameters()), (other, other.parameters())):
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            m(X).square().mean().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_shift_that_was_zero() -> None:
    """A BatchNorm goes into a padded convolution while its shift is zero, and no longer."""
    model = ready(Net(lambda m, x: m.conv(m.norm(torch.relu(x))), norm=nn.BatchNorm2d(CHANNELS), conv=conv_bn(3)[0]))
    model.double()
    with torch.no_grad():
        model.norm.bias.zero_()
        model.norm.running_mean.zero_()
    fuser = Fuser(model, X)
    first = fuser()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in first.modules())
    with torch.no_grad():
        model.norm.bias += 1
    assert_fuses(fuser, model)
    assert fuser() is not first
    assert (fuser.searches, fuser.last) == (2, "a condition on the values of parameters no longer holds")
    through = Fuser(ready(model), X, differentiable=True)()  # this one counts on no value
    assert_same_gradients(through, model, X)


def test_a_depthwise_kernel_that_was_an_average() -> None:
    conv = nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS, bias=False)
    nn.init.constant_(conv.weight, 1 / 9)
    model = ready(Net(lambda m, x: m.point(m.conv(x)), conv=conv, point=nn.Conv2d(CHANNELS, 3, 1))).double()
    fuser = Fuser(model, X)
    assert_fuses(fuser, changed(model))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a layer": lambda m: setattr(m, "last", nn.Conv2d(CHANNELS, 5, 1).double()),
    "a size": lambda m: setattr(m.a[0], "dilation", (2, 2)) or setattr(m.a[0], "padding", (2, 2)),
    "a hook": lambda m: m.last.register_forward_hook(lambda _, __, y: y + 1),
    "an attribute": lambda m: setattr(m, "factor", 3.0),
    "a private attribute": lambda m: setattr(m, "_factor", 3.0),
    "an item": lambda m: m.held["factors"].__setitem__(0, 3.0),
    "a tensor that is no buffer": lambda m: m.plain.mul_(2),
    "a function": lambda m: setattr(m, "act", torch.tanh),
    "what is trained": lambda m: m.a[0].weight.requires_grad_(False),
    "the dtype": lambda m: m.float(),
}


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_another_structure_is_searched_anew(name: str, check: bool) -> None:
    model = ready(block())
    model.factor, model._factor, model.held = 2.0, 2.0, {"factors": [2.0]}
    model.plain, model.act = torch.tensor(2.0, dtype=torch.float64), torch.relu
    inner = model.run
    model.run = lambda m, x: m.act(inner(m, x)) * m.factor * m._factor * m.held["factors"][0] * m.plain.to(x.dtype)
    fuser = Fuser(model, X, check=check, verify=False)
    fuser()
    assert fuser.searches == 1
    CHANGES[name](model)
    single = name == "the dtype"  # the example follows
    assert_fuses(fuser, model, X.float() if single else X, 1e-5 if single else 1e-12)
    assert (fuser.searches, fuser.last[:39]) == (2, "the structure of the model has changed:")


def test_a_change_in_an_object_that_is_not_looked_into() -> None:
    """The check runs a copy of the model of now, with all that it holds."""

    class Settings:
        factor = 2.0

    model = ready(block())
    model.settings = Settings()
    inner = model.run
    model.run = lambda m, x: inner(m, x) * m.settings.factor
    fuser = Fuser(model, X, verify=False)
    model.settings.factor = 3.0
    assert_fuses(fuser, model)
    assert fuser.last.startswith("output differs by")


def test_what_is_returned_may_be_moved() -> None:
    """To another dtype, with the buffers of a BatchNorm that stays."""
    model = ready(Net(lambda m, x: torch.relu(m.norm(torch.relu(m.a(x)))), a=conv_bn(3), norm=nn.BatchNorm2d(CHANNELS)))
    fuser = Fuser(model.double(), X, check=False)
    through = Fuser(model, X, differentiable=True)().float()
    model.double()
    fuser().float()
    fused = fuser() if changed(model) else None
    assert fused is not None
    with torch.no_grad():
        torch.testing.assert_close(fused(X.float()), copied(model)(X).float(), rtol=1e-4, atol=1e-4)
        model.float()
        torch.testing.assert_close(through(X.float()), model(X.float()), rtol=1e-4, atol=1e-4)


def _standardised(m: Any, x: Tensor) -> Tensor:
    w = m.conv.weight
    return m.norm(F.conv2d(x, (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)))


COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "in forward": lambda: Net(_standardised, conv=conv_bn(3)[0], norm=nn.BatchNorm2d(CHANNELS)),
    "by a parametrization": lambda: _normed(nn.utils.parametrizations.weight_norm),
    "by a hook": lambda: _normed(nn.utils.weight_norm),
    "of parameters alone": lambda: Net(
        lambda m, x: torch.relu(x) * (m.a * m.b).sum(0), a=vector(1, 4, 1, 1), b=vector()
    ),
    "a scalar": lambda: Net(
        lambda m, x: torch.relu(m.conv(x)) * m.s, conv=conv_bn(3), s=nn.Parameter(torch.tensor(2.0))
    ),
}


def _normed(how: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return Net(lambda m, x: m.norm(m.conv(x)), conv=how(conv_bn(3)[0]), norm=nn.BatchNorm2d(CHANNELS))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPUTED)
def test_weights_that_are_computed(name: str) -> None:
    model = ready(COMPUTED[name]()).double()
    fuser = Fuser(model, X)
    assert_fuses(fuser, changed(model))
    assert fuser.searches == 1, fuser.last
    through = Fuser(model, X, differentiable=True)()
    assert_same_gradients(through, changed(model, 2), X)


class Mixed(nn.Module):
    """A forward that torch.fx cannot follow, around parts that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([conv_bn(3), conv_bn(1)])
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        for part in self.parts:
            x = part(x)
            if x.sum() > 1e9 or twice:
                x = x * 2
        return self.norm(x)


def test_a_model_fused_part_by_part() -> None:
    model = ready(Mixed()).double()
    fuser = Fuser(model, X)
    fused = fuser()
    assert isinstance(fused, Mixed)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.parts.modules())
    assert_fuses(fuser, changed(model))
    assert fuser.searches == 1
    through = Fuser(model, X, differentiable=True)()
    assert_same_gradients(through, model, X)
    torch.testing.assert_close(through(X, twice=True), model(X, twice=True))


def test_a_buffer_that_tracing_made_a_constant_of() -> None:
    model: Any = ready(Net(lambda m, x: m.conv(x) * (m.table * 2), conv=conv_bn(3))).double()
    model.register_buffer("table", torch.tensor(2.0, dtype=torch.float64))
    fuser = Fuser(model, X, check=False)
    with torch.no_grad():
        model.conv[1].weight *= 2
        assert_fuses(fuser, model)
        assert fuser.searches == 1
        model.table *= 2
    assert_fuses(fuser, model)
    assert (fuser.searches, fuser.last) == (2, "'table' has changed, of which tracing made a constant")


def test_wrappers_are_taken_off() -> None:
    model = ready(block())
    fuser = Fuser(nn.DataParallel(model), X)
    assert_fuses(fuser, changed(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_and_memory_format_carry_over(dtype: torch.dtype) -> None:
    model = ready(block()).to(dtype).to(memory_format=torch.channels_last)
    fuser = Fuser(model, X.to(dtype))
    fused = fuser()
    assert fused is fuser()
    assert {t.dtype for t in fused.parameters()} == {dtype}
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in fused.parameters() if t.ndim == 4)


def test_what_is_no_module() -> None:
    with pytest.raises(InputTypeError, match=r"Fuser takes a torch.nn.Module, not type"):
        Fuser(nn.Linear)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_no_reason_to_lose_the_structure() -> None:
    model = ready(block())
    fuser = Fuser(model, X)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.a[0].weight[0, 0, 0, 0] = float("nan")
    assert not fuser()(X).isfinite().all()
    model.load_state_dict(state)
    assert_fuses(fuser, model)
