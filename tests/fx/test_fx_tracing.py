"""Ways to write and wrap a module: control flow, arguments, structures, hooks, reparametrizations, names."""

import pytest

pytest.importorskip("torch")

import copy
import math
import pickle
import types
from collections.abc import Callable
from typing import Any, cast

import torch
from fx_checks import CHANNELS, SHAPES, Net, check, conv_bn, counts, images, ready, relative_error, report, run, vector
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from reparamc import fuse_fx
from reparamc.errors import InputError, InputTypeError

# Functions that the tracer keeps whole; only their names are those of torch.


@fx.wrap
def add(a: Tensor, b: Tensor) -> Tensor:
    return a + 2 * b.relu()


@fx.wrap
def mul(a: Tensor, b: int) -> Tensor:
    return a.abs() ** b


@fx.wrap
def neg(a: Tensor) -> Tensor:
    return a.abs()


@fx.wrap
def dropout(a: Tensor, p: float, training: bool) -> Tensor:
    return a.relu()


@fx.wrap
def contiguous(a: Tensor) -> Tensor:
    return a.relu()


@fx.wrap
def transpose(a: Tensor, i: int, j: int) -> Tensor:
    return a.transpose(i, j).flip(1)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a[1](add(m.a[0](x), x)) + add(x, m.a(x)),
        lambda m, x: m.a[1](mul(m.a[0](x), 2)),
        lambda m, x: m.a[1](neg(m.a[0](x))),
        lambda m, x: m.a[1](dropout(m.a[0](x), 0.5, False)),
        lambda m, x: m.a[1](contiguous(m.a[0](x))),
        lambda m, x: transpose(m.a(x), 2, 3),
    ],
)
def test_functions_of_the_user_with_names_of_torch(forward: Any) -> None:
    check(Net(forward, a=conv_bn()))


# Control flow and arguments


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if x.sum() > 0 else -self.block(x)


def test_control_flow_in_a_submodule_stays_live() -> None:
    model = ready(nn.Sequential(conv_bn(), Branching(), conv_bn()))
    x = images((1, CHANNELS, 6, 6), dtype=torch.float32)[0]
    fused = fuse_fx(model, x)
    assert counts(fused) == (3, 0)
    assert type(fused.get_submodule("1")) is Branching
    for inputs in (x, -x):
        assert relative_error(run(fused, inputs), run(model, inputs)) < 1e-5


class Looping(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return sum(row for row in x)


@pytest.mark.parametrize("model", [Branching(), Looping()], ids=["branching", "looping"])
def test_control_flow_at_the_root_is_refused(model: nn.Module) -> None:
    with pytest.raises(InputError, match=rf"cannot trace {type(model).__name__}: .*fuse_onnx") as raised:
        fuse_fx(model.eval())
    assert "\n" not in str(raised.value)


class Variadic(Branching):
    def forward(self, *images: Tensor, **more: Tensor) -> Tensor:
        return self.block(images[0]) + images[1] * more["factor"]


def test_variadic_arguments() -> None:
    model = ready(Variadic())
    x = torch.ones(1, CHANNELS, 5, 6)
    fused = fuse_fx(model)
    assert counts(fused) == (1, 0)
    with torch.no_grad():
        assert relative_error(fused(x, x, factor=x), model(x, x, factor=x)) < 1e-5


class Optional(Branching):
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        flip: bool = False,
        factor: float = 2.0,
        mode: str = "plain",
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        y = self.block(x) * factor
        y = y if mask is None else y * mask
        y = -y if flip else y
        return y.abs().sum() if mode == "sum" else y.to(dtype)


def test_optional_arguments_take_their_defaults() -> None:
    model = ready(Optional())
    x = torch.ones(1, CHANNELS, 5, 6)
    for example in (None, x, (x,), {"x": x}, (x, None, False)):
        fused = fuse_fx(model, example)
        assert counts(fused) == (1, 0)
        with torch.no_grad():
            assert relative_error(fused(x), model(x)) < 1e-5
            assert relative_error(fused(x=x), model(x=x)) < 1e-5


@pytest.mark.parametrize("other", [{"mask": torch.ones(5, 6)}, {"flip": True}, {"factor": 3.0}, {"mode": "sum"}])
def test_options_stay_open_whether_the_example_gives_them_or_not(other: dict[str, Any]) -> None:
    model, x = ready(Optional()), torch.ones(1, CHANNELS, 5, 6)
    for example in ({"x": x}, {"x": x} | other):
        fused = fuse_fx(model, example)
        assert type(fused) is Optional
        assert counts(fused) == (1, 0)
        for given in ({}, other):
            with torch.no_grad():
                assert relative_error(fused(x, **given), model(x, **given)) < 1e-5


class Containers(Branching):
    def forward(self, x: Tensor, size: tuple[int, int] = (1, 2), extra: list[Tensor] = []) -> Tensor:  # noqa: B006
        return self.block(x) * size[1]


def test_defaults_that_are_containers() -> None:
    model = ready(Containers())
    x = torch.ones(1, CHANNELS, 5, 6)
    fused = fuse_fx(model, x)
    assert counts(fused) == (1, 0)
    assert relative_error(run(fused, x), run(model, x)) < 1e-5


class Reversed(Branching):
    def forward(self, mask: Any = None, x: Any = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.block(x if mask is None else x * mask)


def test_every_argument_is_optional() -> None:
    model, x = ready(Reversed()), torch.ones(1, CHANNELS, 5, 6)
    for example in ({"x": x}, {"x": x, "mask": x}, None):
        fused = fuse_fx(model, example)
        assert counts(fused) == (1, 0)
        with torch.no_grad():
            assert relative_error(fused(x=x), model(x=x)) < 1e-5
            assert relative_error(fused(x, x), model(x, x)) < 1e-5


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(CHANNELS, CHANNELS), nn.BatchNorm1d(CHANNELS)

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(self.linear(input))


def test_rank_of_an_argument_named_like_a_builtin() -> None:
    assert counts(fuse_fx(ready(Named()), torch.ones(3, CHANNELS))) == (1, 0)
    assert counts(fuse_fx(ready(Named()), {"input": torch.ones(3, CHANNELS)})) == (1, 0)


def test_structures() -> None:
    model = ready(
        Net(
            lambda m, batch: {"out": [m.a(batch["image"]), (batch["others"][0] * 2, None)], "n": 3},
            a=conv_bn(),
        )
    )
    x = torch.ones(1, CHANNELS, 5, 6)
    batch = {"image": x, "others": [x, 2]}
    fused = fuse_fx(model, (batch,))
    assert counts(fused) == (1, 0)
    assert {"output['out'][0]", "output['out'][1][0]"} <= {e.output for e in report(fused).end_to_end}
    assert relative_error(run(fused, batch), run(model, batch)) < 1e-5


# Wrong arguments


@pytest.mark.parametrize(
    "example",
    [
        torch.ones(1, CHANNELS + 1, 5, 6),
        torch.ones(CHANNELS),
        torch.tensor(1.0),
        torch.ones(1, 1, CHANNELS, 5, 6),
        torch.ones(1, CHANNELS, 5, 6, dtype=torch.float64),
        (),
        (None,),
        {},
        {"y": torch.ones(1, CHANNELS, 5, 6)},
        (torch.ones(1, CHANNELS, 5, 6),) * 2,
        "image",
        3,
    ],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(x),
        lambda m, x: m.a(x.transpose(2, 3).permute(0, 1, 3, 2)).flatten(2),
        lambda m, x: m.a(x.unsqueeze(0).squeeze(0).flatten(3)),
    ],
)
def test_wrong_examples(forward: Any, example: object) -> None:
    with pytest.raises(InputError, match="example_inputs"):
        fuse_fx(ready(Net(forward, a=conv_bn())), example)


def test_the_part_that_takes_no_example_is_named() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sequential(conv_bn(), nn.Conv2d(CHANNELS + 1, 2, 1))).eval()
    with pytest.raises(InputError, match=r"does not run on example_inputs \('1.1' fails\): "):
        fuse_fx(model, images((1, CHANNELS, 4, 4), dtype=torch.float32))


@pytest.mark.parametrize("wrong", [None, 3, "model.pt", nn.ReLU, lambda x: x, {}])
def test_wrong_types(wrong: Any) -> None:
    with pytest.raises(InputTypeError, match=r"takes a torch\.nn\.Module, not"):
        fuse_fx(wrong)


# Layout operators whose axes are computed


AXES = {
    "transpose": lambda y: y.transpose(y.dim() - 1, 1),
    "flatten": lambda y: y.flatten(y.dim() - 2),
    "permute": lambda y: y.permute(0, y.dim() - 1, 1, 2),
    "permute by tuple": lambda y: y.permute((0, y.dim() - 1, 1, 2)),
    "unsqueeze": lambda y: y.unsqueeze(y.dim()),
    "squeeze": lambda y: y.squeeze(y.dim() - 1),
    "unflatten": lambda y: y.unflatten(y.dim() - 3, (2, 2)),
    "chunk": lambda y: y.chunk(2, y.dim() - 3)[0],
    "split": lambda y: y.split(y.size(1) // 2, 1)[0],
    "mean": lambda y: y.mean(y.dim() - 1),
    "detach by keyword": lambda y: torch.detach(input=y),
    "dropout by keyword": lambda y: F.dropout(input=y, p=0.5, training=False),
    "flatten by keyword": lambda y: torch.flatten(input=y, start_dim=1),
    "transpose by keyword": lambda y: y.transpose(dim0=1, dim1=3),
    "star": lambda y: y.reshape(y.shape[:2] + (-1,)),  # noqa: RUF005
}


@pytest.mark.parametrize("name", AXES)
def test_computed_axes(name: str) -> None:
    check(Net(lambda m, x: torch.relu(AXES[name](m.a(x))), a=conv_bn()))


# Wrappers


def test_graph_module() -> None:
    traced = fx.symbolic_trace(ready(conv_bn()))
    code = traced.code
    fused = fuse_fx(traced, torch.ones(1, CHANNELS, 5, 6))
    assert counts(fused) == (1, 0)
    assert traced.code == code


def test_compiled_module_stays_compiled() -> None:
    assert counts(fuse_fx(cast(Any, torch.compile(ready(conv_bn()))), torch.ones(1, CHANNELS, 5, 6))) == (1, 0)


def test_compiled_child_stays_compiled() -> None:
    fused = fuse_fx(ready(nn.Sequential(conv_bn(), cast(Any, torch.compile(conv_bn())))))
    assert counts(fused) == (2, 0)
    assert isinstance(fused.get_submodule("1"), torch._dynamo.OptimizedModule)


def test_modules_that_are_refused() -> None:
    model = ready(conv_bn())
    parallel = fuse_fx(nn.DataParallel(model))
    assert isinstance(parallel, nn.DataParallel)
    assert counts(parallel) == (1, 0)
    for scripted in (torch.jit.script(nn.ReLU()), torch.jit.trace(model, torch.ones(1, CHANNELS, 5, 6))):
        with pytest.raises(InputTypeError, match="ScriptModule"):
            fuse_fx(cast(Any, scripted))


def test_scripted_child_is_called_as_it_is() -> None:
    model = ready(nn.Sequential(conv_bn(), torch.jit.script(ready(conv_bn()))))
    x = torch.ones(1, CHANNELS, 5, 6)
    assert relative_error(run(fuse_fx(model, x), x), run(model, x)) < 1e-5


# Hooks and reparametrizations


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("where", ["0", "0.0", "0.1", "1"])
def test_hooks_are_kept_and_live(kind: str, where: str) -> None:
    model = ready(nn.Sequential(conv_bn(), conv_bn(), nn.ReLU()))

    def double(_: nn.Module, *values: Any) -> Any:
        return values[-1] * 2 if isinstance(values[-1], Tensor) else tuple(v * 2 for v in values[-1])

    getattr(model.get_submodule(where), kind)(double)
    x = torch.ones(1, CHANNELS, 5, 6)
    fused = fuse_fx(model, x)
    assert counts(fused)[1] == (1 if "." in where else 0)
    assert relative_error(run(fused, x), run(model, x)) < 1e-5


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("example", [False, True])
def test_hooks_of_the_root_are_kept(kind: str, example: bool) -> None:
    model, x = ready(conv_bn()), torch.ones(1, CHANNELS, 5, 6)
    calls: list[int] = []
    getattr(model, kind)(lambda *_: calls.append(1))
    fused = fuse_fx(model, x if example else None)
    assert counts(fused) == (1, 0)
    for copied in (fused, copy.deepcopy(fused)):
        calls.clear()
        run(copied, x)
        assert calls == [1]


def test_backward_hooks_are_kept() -> None:
    model = ready(nn.Sequential(conv_bn(), conv_bn()))
    calls: list[int] = []
    model[0][0].register_full_backward_hook(lambda *_: calls.append(1))
    fused = fuse_fx(model)
    fused(torch.ones(1, CHANNELS, 5, 6, requires_grad=True)).sum().backward()
    assert calls == [1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "attach",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda conv: prune.l1_unstructured(conv, "weight", 0.3),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "old spectral_norm", "prune"],
)
def test_weights_that_are_computed(attach: Any) -> None:
    model: Any = nn.Sequential(conv_bn(), conv_bn())
    attach(model[0][0])
    model(torch.ones(2, CHANNELS, 5, 6))
    model = ready(model)
    x = torch.ones(1, CHANNELS, 5, 6)
    fused = fuse_fx(model, x)
    assert counts(fused)[1] <= 1
    assert relative_error(run(fused, x), run(model, x)) < 1e-5


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.ones(CHANNELS, CHANNELS, 3, 3)), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.weight))


@pytest.mark.parametrize("inside", [False, True])
def test_parametrized_module_with_a_functional_call(inside: bool) -> None:
    module = parametrizations.weight_norm(ready(Functional()))
    model = nn.Sequential(module, nn.ReLU()).eval() if inside else module
    x = torch.ones(1, CHANNELS, 5, 6)
    fused = fuse_fx(model, x)
    assert relative_error(run(fused, x), run(model, x)) < 1e-5
    copy.deepcopy(fused)


def test_forward_of_the_root_replaced() -> None:
    model = ready(conv_bn())
    model.forward = types.MethodType(lambda self, x: self[1](self[0](x)) * 3, model)
    x = torch.ones(1, CHANNELS, 5, 6)
    try:
        fused = fuse_fx(model)
    except InputError:
        return
    assert relative_error(run(fused, x), run(model, x)) < 1e-5


# Names and nesting


class Container(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._modules[name] = conv_bn()
        self._modules[f"{name}_2"] = conv_bn(1)

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = self._modules
        return parts[self.name](x) + parts[f"{self.name}_2"](x)


@pytest.mark.parametrize("name", ["0", "1a", "fused", "self", "x", "torch", "forward_", "with space", "émis"])
def test_names_of_children(name: str) -> None:
    model = ready(nn.Sequential(Container(name), Container(name)))
    x = torch.ones(1, CHANNELS, 5, 6)
    fused = fuse_fx(model, x)
    assert counts(fused) == (2, 0)
    assert relative_error(run(fused, x), run(model, x)) < 1e-5


RESERVED = ["graph", "code", "meta", "_graph", "recompile", "print_readable", "shape_env", "_tracer_cls", "to_folder"]


@pytest.mark.parametrize("name", RESERVED)
def test_names_that_a_graph_module_needs(name: str) -> None:
    model, x = ready(Container(name)), torch.ones(1, CHANNELS, 5, 6)
    with pytest.raises(InputError, match=rf"Container has a part called '{name}', .*; rename it, or fuse") as raised:
        fuse_fx(model)
    assert "\n" not in str(raised.value)
    fused = fuse_fx(model, x)
    assert (type(fused), counts(fused)) == (Container, (2, 0))
    assert relative_error(run(fused, x), run(model, x)) < 1e-5
    inside = nn.Sequential(model).eval()  # as the message says
    fused = fuse_fx(inside, x)
    assert counts(fused) == (1, 0)
    assert relative_error(run(fused, x), run(model, x)) < 1e-5


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_values_of_a_name_that_a_graph_module_needs(kind: str) -> None:
    model = Net(lambda m, x: m.a(x) * m.graph, a=conv_bn())
    model.graph = vector() if kind == "parameter" else nn.Buffer(vector().detach())
    with pytest.raises(InputError, match="Net has a part called 'graph'"):
        fuse_fx(ready(model))


def test_a_name_that_only_the_model_itself_reads() -> None:
    model: Any = Net(lambda m, x: m.a(x) * len(m.graph), a=conv_bn())
    model.graph = "ab"
    assert counts(check(model)) == (1, 0)


@pytest.mark.parametrize("inside", [False, True])
def test_a_child_that_is_called_by_a_keyword(inside: bool) -> None:
    model = ready(nn.Sequential(Container("class")) if inside else Container("class"))
    with pytest.raises(InputError, match=r"a part called '(0\.)?class(\.0)?', and a keyword of Python .*; rename it"):
        fuse_fx(model)
    x = torch.ones(1, CHANNELS, 5, 6)
    fused = fuse_fx(model, x)
    assert counts(fused) == (2, 0)
    assert relative_error(run(fused, x), run(model, x)) < 1e-5


def test_deep_nesting_and_a_long_chain() -> None:
    model: nn.Module = conv_bn(1)
    for _ in range(60):
        model = nn.Sequential(model)
    chain = nn.Sequential(model, *(nn.BatchNorm2d(CHANNELS) for _ in range(400)))
    x = torch.ones(1, CHANNELS, 3, 3, dtype=torch.float64)
    original = ready(chain).double()
    fused = fuse_fx(original)
    assert counts(fused) == (1, 0)
    assert math.isclose(run(fused, x).sum(), run(original, x).sum(), rel_tol=1e-9)


def test_pickle_with_fixed_arguments() -> None:
    fused = fuse_fx(ready(Optional()))
    x = torch.ones(1, CHANNELS, 5, 6)
    for again in (pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused)):
        assert relative_error(run(again, x), run(fused, x)) == 0


class InLowPrecision(nn.Module):
    """A layer that computes in bfloat16, and a scale after another one."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.gain = nn.Parameter(torch.rand(CHANNELS) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.low(x)
        return self.high(y.float()) * self.gain


class Synced(nn.BatchNorm2d):
    """As libraries write it for several processes."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x) if not self.training else x * 1


class Checked(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._check_input_dim(x)
        return nn.BatchNorm1d.forward(self, x)


@pytest.mark.parametrize(("norm", "layer"), [(Synced(4), nn.Conv2d(3, 4, 3)), (Checked(4), nn.Linear(3, 4))])
def test_batchnorm_of_a_class_of_its_own(norm: nn.Module, layer: nn.Module) -> None:
    shape = (2, 3, 5, 5) if isinstance(layer, nn.Conv2d) else (2, 3)
    assert counts(check(ready(nn.Sequential(layer, norm, nn.ReLU())), shape))[1] == 0
    with pytest.raises(ValueError, match="expected"):
        norm(torch.zeros(1, 4, 1, 1, 1))  # the check itself is in place


def test_autocast_within_forward_is_not_lost() -> None:
    """torch.fx runs it while it traces, and records nothing."""
    torch.manual_seed(0)
    model, x = InLowPrecision().eval(), torch.randn(3, CHANNELS)
    fused = fuse_fx(model, (x,), verify="off")
    assert "autocast" in report(fused).parts[0].why
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) < 1e-5
    with pytest.raises(InputError, match="autocast"):
        fuse_fx(model)


class InFullPrecision(InLowPrecision):
    """A layer that computes in float32, also where autocast is on around it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.high(self.low(x).float()) * self.gain


class Decorated(InLowPrecision):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x: Tensor) -> Tensor:
        return self.high(self.low(x)) * self.gain


@pytest.mark.parametrize("kind", [InFullPrecision, Decorated])
@pytest.mark.parametrize("verify", ["off", "full"])
def test_autocast_switched_off_within_forward_is_not_lost(kind: type[nn.Module], verify: str) -> None:
    """It changes nothing while the model is fused, but autocast may be on later."""
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(3, CHANNELS)
    fused = fuse_fx(model, (x,), verify=verify)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = model(x), fused(x)
    assert actual.dtype == expected.dtype == torch.float32
    assert relative_error(actual, expected) < 1e-5


def _doubled_if(asked: Callable[[Tensor], bool], of: type = Tensor) -> Callable[[Any, Tensor], Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.n(m.c(x))
        return y * 2 if isinstance(y, of) and asked(y) else y

    return forward


@pytest.mark.parametrize("of", [Tensor, object])  # the first way is followed by torch.export alone
@pytest.mark.parametrize(
    "asked",
    [
        lambda y: torch.is_grad_enabled(),
        lambda y: torch.is_autocast_enabled("cpu"),
        lambda y: y.requires_grad,
        lambda y: y.requires_grad or not y.requires_grad,
    ],
)
def test_a_mode_that_forward_asks_for_is_asked_for_in_each_call(asked: Callable[[Tensor], bool], of: type) -> None:
    model = ready(Net(_doubled_if(asked, of), c=nn.Conv2d(CHANNELS, CHANNELS, 1), n=nn.BatchNorm2d(CHANNELS)))
    (x,) = images((2, CHANNELS, 4, 6), dtype=torch.float32)
    with torch.no_grad():
        fused = fuse_fx(model, x, verify="off")
        assert relative_error(fused(x), model(x)) < 1e-5
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert relative_error(fused(x), model(x)) < 0.1
    assert relative_error(fused(x), model(x)) < 1e-5


def test_a_branch_for_gradients_that_computes_the_same_is_followed() -> None:
    """As frozen BatchNorms are written."""

    def frozen(m: Any, x: Tensor) -> Tensor:
        y = m.c(x)
        if not y.requires_grad:
            return F.batch_norm(y, m.mean, m.var)
        scale = m.var.add(1e-5).rsqrt()
        return y * scale.view(1, -1, 1, 1) - (m.mean * scale).view(1, -1, 1, 1)

    parts = {"mean": nn.Buffer(torch.rand(CHANNELS)), "var": nn.Buffer(torch.rand(CHANNELS) + 0.5)}
    fused = check(Net(frozen, c=nn.Conv2d(CHANNELS, CHANNELS, 1), **parts), examples=True)
    assert report(fused).passes["scale-folding"] == 2


def test_values_are_instances_of_what_they_are() -> None:
    def run(m: Any, given: dict[str, Any]) -> Any:
        (a, b), n = given["maps"], given["n"]
        assert (isinstance(given, dict), isinstance(given["maps"], list)) == (True, True)
        assert (isinstance(n, int), isinstance(a, Tensor), isinstance(a.shape, Tensor)) == (True, True, False)
        y = m.part(a) + b * n if isinstance(a, Tensor) and torch.is_tensor(b) else a
        return {"y": y} if isinstance(y, Tensor) and not isinstance(y, nn.Parameter | tuple) else y

    model, maps = ready(Net(run, part=conv_bn())), images(*SHAPES[:1] * 2, dtype=torch.float32)
    fused = fuse_fx(model, ({"maps": maps, "n": 3},))
    assert counts(fused) == (1, 0)
    assert not report(fused).parts  # nothing is left in Python


@pytest.mark.parametrize(
    "function",
    [
        lambda y: torch.pow(y, 3.0),
        lambda y: torch.where(y > 0, y, 0.0),
        lambda y: torch.clamp(y, y.mean(), 2.0),
        lambda y: torch.full((2,), y.mean()) + y.mean(),
        lambda y: 0.5 * y * (1.0 + torch.tanh(0.8 * (y + 0.04 * torch.pow(y, 3.0)))),
    ],
)
def test_functions_that_take_a_tensor_or_a_number(function: Any) -> None:
    check(Net(lambda m, x: function(m.part(x)), part=conv_bn()), examples=True)


def test_values_match_a_pattern_of_what_they_are() -> None:
    def forward(m: Any, x: Any) -> Any:
        match x:
            case Tensor():
                return m.part(x)
            case _:
                return x

    assert counts(check(Net(forward, part=conv_bn()))) == (1, 0)


@torch.jit.script
def doubled(x: Tensor) -> Tensor:
    return x * 2 if x.size(0) > 1 else x + x


@pytest.mark.parametrize("call", [doubled, lambda x: torch.from_dlpack(cast(Any, torch.utils).dlpack.to_dlpack(x))])
def test_compiled_code_takes_no_proxy_for_a_tensor(call: Any) -> None:
    """It would look for a tensor in its memory."""
    model, x = ready(Net(lambda m, x: m.part(call(x)), part=conv_bn())), torch.randn(2, CHANNELS, 5, 6)
    fused = fuse_fx(model, x)
    assert counts(fused) == (1, 0)
    assert relative_error(run(fused, x), run(model, x)) < 1e-5


class Asking(nn.Conv2d):
    """Asks for the size of its operand, and runs a norm of its own."""

    def __init__(self, ask: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(CHANNELS, CHANNELS, 3, padding=1)
        self.norm, self.ask, self.empty = nn.BatchNorm2d(CHANNELS), ask, 0

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = self.ask(self, x)
        return self.norm(super().forward(x if y is None else y))


def asserts(m: Any, x: Tensor) -> None:
    if x.numel() == 0 and m.training:
        raise AssertionError("no example")


def asks_for_a_factor(m: Any, x: Tensor) -> Tensor:
    n = 2 if x.shape[-1] > 3 else 2.0
    return x * torch.tensor(float(n))


def counts_the_empty(m: Any, x: Tensor) -> None:
    if x.numel() == 0:
        m.empty += 1


def asks_twice(m: Any, x: Tensor) -> Tensor | None:
    return x * 2 if (x.shape[-1] > 5) is not (x.shape[-2] > 5) else None


def differs(m: Any, x: Tensor) -> Tensor:
    return x * 2 if x.shape[-1] > 5 else x + 1


def goes_on(m: Any, x: Tensor) -> Tensor:
    while x.shape[-1] > 5:
        x = x[..., ::2]
    return x


@pytest.mark.parametrize("ask", [asserts, asks_for_a_factor, counts_the_empty, asks_twice, differs, goes_on])
@pytest.mark.parametrize("inside", [False, True])
def test_a_question_is_none_if_its_answer_changes_nothing(ask: Any, inside: bool) -> None:
    asking, x = ready(Asking(ask)), images((2, CHANNELS, 7, 6), dtype=torch.float32)[0]
    model = nn.Sequential(nn.ReLU(), asking).eval() if inside else asking
    fused = fuse_fx(model, x)
    if ask in (asserts, asks_for_a_factor):
        assert counts(fused) == counts(fuse_fx(model)) == (1, 0)
    for given in (x, x[:1, :, :4, :3]) if ask in (asserts, asks_for_a_factor) else (x, x[:1]):
        assert relative_error(run(fused, given), run(model, given)) < 1e-5


def test_autocast_within_a_part_keeps_the_part() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), InLowPrecision()).eval(), torch.randn(3, CHANNELS)
    fused = fuse_fx(model)
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) < 1e-5


def test_a_shape_is_read_where_it_stands() -> None:
    def run(m: Any, x: Any) -> Any:
        y = m.c(x)
        before = y.shape
        y.transpose_(2, 3)
        return m.n(y).reshape(before[0], before[2], -1), y.shape[2]

    check(Net(run, c=nn.Conv2d(CHANNELS, CHANNELS, 1), n=nn.BatchNorm2d(CHANNELS)), (2, CHANNELS, 4, 6))


KEYS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "dict": lambda m, x, y: y * {11: 3}.get(x.shape[2], 1),
    "set": lambda m, x, y: y * (3 if x.shape[2] in {11, 12} else 1),
    "tuple": lambda m, x, y: y * (3 if tuple(x.shape[2:]) in {(11, 6): 1} else 1),
    "text": lambda m, x, y: y * (3 if f"{x.shape[2]}" == "11" else 1),
    "name": lambda m, x, y: getattr(m, f"head_{x.shape[2]}", m.head)(y),
    "type of a number": lambda m, x, y: (y, torch.full((1,), 1 if x.shape[2] > 9 else 1.0)),
}


def swallowed(m: Any, x: Tensor, y: Tensor) -> Tensor:
    try:
        return y * (1 + int(x.shape[2] > 9))
    except Exception:
        return y


def swallowed_before_a_call(m: Any, x: Tensor, y: Tensor) -> Tensor:
    try:
        y = y * len(range(x.shape[2]))
    except Exception:
        y = torch.reshape(y, x.shape)
    return torch.reshape(y, x.shape)


def noted(m: Any, x: Tensor, y: Tensor) -> Tensor:
    y = m.noting(y, skips := [])
    return sum(skips, y)


class Noting(nn.Module):
    """Writes into its argument if that is large."""

    def __init__(self) -> None:
        super().__init__()
        self.part = conv_bn()

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        x = self.part(x)
        if x.shape[2] > 9:
            skips.append(x)
        return x


OTHERS = swallowed, swallowed_before_a_call, noted


@pytest.mark.parametrize("way", [*KEYS.values(), *OTHERS], ids=[*KEYS, *(f.__name__ for f in OTHERS)])
def test_a_forward_that_asks_for_a_size_keeps_asking(way: Any) -> None:
    parts = {"part": conv_bn(), "head": conv_bn(), "head_11": conv_bn(), "noting": Noting()}
    model = ready(Net(lambda m, x: way(m, x, m.part(x)), **parts))
    fused = fuse_fx(model, images((2, CHANNELS, 5, 6))[0].float())
    for x in images((2, CHANNELS, 5, 6), (1, CHANNELS, 11, 6), dtype=torch.float32):
        assert relative_error(run(fused, x), run(model, x)) < 1e-4
    with pytest.raises(InputError, match="with example_inputs its parts are fused"):
        fuse_fx(model)


def test_functions_of_torch_may_ask_whether_a_value_is_a_number() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.reshape(x, (x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]))
        return m.part(torch.reshape(y, x.shape))

    check(Net(forward, part=conv_bn()))
