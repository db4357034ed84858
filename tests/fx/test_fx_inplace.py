"""Operators that write into memory: a fused graph must neither lose a write nor read too late."""

from typing import Any, NamedTuple, cast

import pytest

pytest.importorskip("torch")

import operator
import pickle
from collections.abc import Callable

import torch
from fx_checks import CHANNELS, SHAPES, Net, check, conv_bn, counts, images, ready, relative_error, run, vector
from torch import Tensor, nn
from torch.nn import functional as F

from reparamc import fuse_fx
from reparamc.errors import InputError


def _between(write: Callable[[Tensor], object]) -> Callable[[Any, Tensor], Tensor]:
    """Two branches of one value that is written to between them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.sigmoid(x) - 0.5
        first = m.a(y)
        write(y)
        return first + m.b(y)

    return forward


WRITES = {
    "relu_": lambda y: y.relu_(),
    "torch.relu_": torch.relu_,
    "add_": lambda y: y.add_(1),
    "F.relu": lambda y: F.relu(y, True),
    "F.relu by keyword": lambda y: F.relu(input=y, inplace=True),
    "F.leaky_relu": lambda y: F.leaky_relu(y, 0.1, True),
    "F.hardtanh": lambda y: F.hardtanh(y, 0.0, 0.1, True),
    "out": lambda y: torch.mul(y, 2, out=y),
    "slice": lambda y: y[:, 1:].mul_(2),
    "chunk": lambda y: y.chunk(2, 1)[0].mul_(2),
    "view": lambda y: y.view(-1).mul_(2),
    "transpose": lambda y: y.transpose(0, 1).mul_(2),
    "select": lambda y: y.select(1, 0).mul_(2),
    "torch.select": lambda y: torch.select(y, 1, 0).mul_(2),
    "swapaxes": lambda y: y.swapaxes(2, 3).mul_(2),
    "diagonal": lambda y: y.diagonal(0, 2, 3).mul_(2),
    "unfold": lambda y: y.unfold(2, 2, 2).mul_(2),
    "view_as": lambda y: y.view_as(y).mul_(2),
    "expand_as": lambda y: y.expand_as(y).mul_(2),
    "ravel": lambda y: y.ravel().mul_(2),
    "tensor_split": lambda y: y.tensor_split(2, 1)[1].mul_(2),
    "torch.unflatten": lambda y: torch.unflatten(y, 1, (2, 2)).mul_(2),
    "mT": lambda y: y.mT.mul_(2),
    "data": lambda y: y.data.mul_(2),
    "cpu": lambda y: y.cpu().mul_(2),
    "type_as": lambda y: y.type_as(y).mul_(2),
    "dead dropout": lambda y: F.dropout2d(y, 0.5, False).mul_(2),
    "aten": lambda y: torch.ops.aten.mul_.Tensor(y, y),
    "setitem": lambda y: y.__setitem__((slice(None), 0), 0.0),
    "zero_": lambda y: y.zero_(),
    "foreach": lambda y: torch._foreach_mul_([y], 2.0),  # pyright: ignore[reportPrivateImportUsage]
    "iadd": lambda y: y.__iadd__(1),
    "isub": lambda y: y.__isub__(y.mean()),
    "imul": lambda y: y.__imul__(2),
    "itruediv": lambda y: y.__itruediv__(2),
    "ifloordiv": lambda y: y.__ifloordiv__(0.25),
    "ipow": lambda y: y.__ipow__(2),
    "imod": lambda y: y.__imod__(0.25),
}


@pytest.mark.parametrize("name", WRITES)
def test_write_between_two_branches(name: str) -> None:
    assert counts(check(Net(_between(WRITES[name]), a=conv_bn(), b=conv_bn())))[0] == 2


WRITTEN = {
    "+=": operator.iadd, "-=": operator.isub, "*=": operator.imul, "/=": operator.itruediv, "%=": operator.imod,
    "[]=": lambda y, n: operator.setitem(y, (slice(None), 0), n),
}  # fmt: skip


class Written(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.a, self.b = name, conv_bn(), conv_bn()

    def forward(self, x: "Tensor") -> Tensor:
        return _between(lambda y: WRITTEN[self.name](y, 0.75))(self, x)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv_bn()

    def forward(self, x: Tensor) -> Tensor:
        n = first = x.shape[0]
        n += 1
        n *= 2
        shape = x.shape
        shape += (1,)
        size = x.size(2)
        size //= 2
        return self.a(x).reshape(shape)[..., 0] * n / first + size


@pytest.mark.parametrize("name", WRITTEN)
def test_write_of_a_copy_that_was_read_from_a_file(name: str) -> None:
    model = ready(Written(name))
    read = pickle.loads(pickle.dumps(fuse_fx(model, skip=["bn-folding"])))
    inputs = images(*SHAPES, dtype=torch.float32)
    for fused in (read, fuse_fx(read), fuse_fx(read, inputs[0])):
        for x in inputs:
            assert relative_error(run(fused, x), run(model, x)) < 1e-5


def test_numbers_that_are_counted_up_are_no_memory() -> None:
    fused = check(Counting())
    read = pickle.loads(pickle.dumps(fused))
    assert counts(fused) == (1, 0)
    for x in images(*SHAPES):
        assert torch.equal(run(read, x), run(fused, x))


def _statement(m: Any, x: Tensor) -> Tensor:
    y = torch.sigmoid(x)
    y.add_(m.a(x))
    return torch.relu(y)


def _slice_statement(m: Any, x: Tensor) -> Tensor:
    y = torch.sigmoid(x)
    y[:, :].add_(m.a(x))
    return torch.relu(y)


def _result_and_operand(m: Any, x: Tensor) -> Tensor:
    y = torch.sigmoid(x)
    z = y.add_(m.a(y))
    return torch.cat([y, z], 1)


def _two_statements(m: Any, x: Tensor) -> Tensor:
    y = torch.sigmoid(x)
    y.sub_(m.a(y))
    y.sub_(m.b(y))
    return y


def _inner_member(m: Any, x: Tensor) -> Tensor:
    y = torch.sigmoid(x)
    return torch.cat([m.a(m.n(x) + y.mul_(m.g)), y], 1)


def _scaled_operand(m: Any, x: Tensor) -> Tensor:
    y = m.n(x)
    z = torch.sigmoid(y)
    return torch.cat([m.c(y.mul_(2.0)), y, z], 1)


def _out_operand(m: Any, x: Tensor) -> Tensor:
    y = torch.sigmoid(x)
    z = torch.add(m.a(y), m.b(y), out=y)
    return z + y


def _unused_write(m: Any, x: Tensor) -> Tensor:
    y = torch.sigmoid(x)
    m.a(y).add_(1)
    return y


def _relu_on_input_of_norm(m: Any, x: Tensor) -> Tensor:
    y = m.a[0](x)
    m.r(y)
    return m.a[1](y)


def _relu_on_result(m: Any, x: Tensor) -> Tensor:
    y = m.a[0](x)
    z = m.a[1](y)
    m.r(y)
    return z


def _relu_on_conv_after_norm(m: Any, x: Tensor) -> Tensor:
    y = m.a[0](x)
    z = m.a[1](y)
    m.r(z)
    return y + z


def _old_name(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = m.r(y)
    return m.b(y) + z


def _shortcut_then_relu(m: Any, x: Tensor) -> Tensor:
    y = torch.sigmoid(x) - 0.5
    shortcut = m.b(y)
    return m.a(m.r(y)) + shortcut


def _relu_then_shortcut(m: Any, x: Tensor) -> Tensor:
    y = torch.sigmoid(x) - 0.5
    z = m.r(y)
    return m.a(z) + m.b(y)


def _chained(m: Any, x: Tensor) -> Tensor:
    return m.a(x).add_(m.b(x)).mul_(2).sub_(x)


def _grown(m: Any, x: Tensor) -> Tensor:
    """Branches added one by one to a value that nothing else reads, as in MobileOne."""
    y = m.n(x)
    y += m.a(x)
    y += m.b(x)
    return torch.relu(y)


class Two(NamedTuple):
    first: Tensor
    second: Tensor


def _named_tuple(m: Any, x: Tensor) -> Two:
    return Two(m.a(x), m.b(x))


STATEMENTS = {f.__name__.strip("_"): f for f in (
    _statement, _slice_statement, _result_and_operand, _two_statements, _inner_member, _scaled_operand, _out_operand,
    _unused_write, _relu_on_input_of_norm, _relu_on_result, _relu_on_conv_after_norm, _old_name, _shortcut_then_relu,
    _relu_then_shortcut, _chained, _grown, _named_tuple,
)}  # fmt: skip


@pytest.mark.parametrize("name", STATEMENTS)
def test_statement(name: str) -> None:
    parts = {"n": nn.BatchNorm2d(CHANNELS), "c": nn.Conv2d(CHANNELS, CHANNELS, 1), "g": vector()}
    check(Net(STATEMENTS[name], a=conv_bn(), b=conv_bn(1), r=nn.ReLU(inplace=True), **parts))


LEFT_ALONE = pytest.mark.xfail(reason="a chain of writes into a value that something else made is left alone")


@pytest.mark.parametrize(
    "name", ["chained", pytest.param("grown", marks=LEFT_ALONE), "relu_then_shortcut", "named_tuple"]
)
def test_harmless_writes_do_not_hinder(name: str) -> None:
    model = Net(STATEMENTS[name], a=conv_bn(), b=conv_bn(1), r=nn.ReLU(inplace=True))
    assert counts(check(model))[1] == 0


@pytest.mark.parametrize("shortcut", ["identity", "conv"])
def test_residual_blocks_with_relu_in_place(shortcut: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.r(m.stem(x))
        return m.r(m.b(m.r(m.a(y))) + m.s(y))

    other = nn.Identity() if shortcut == "identity" else conv_bn(1)
    model = Net(forward, stem=conv_bn(), a=conv_bn(), b=conv_bn(), s=other, r=nn.ReLU(inplace=True))
    assert counts(check(model))[1] == 0


class Opaque(nn.Module):
    """torch.fx cannot look inside, and it writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > 0:
            x[:, :1] = 0
        return x * 2


def _hooked() -> nn.Module:
    block = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(CHANNELS, CHANNELS, 1))
    block.register_forward_hook(lambda *_: None)
    return block


@pytest.mark.parametrize("make", [Opaque, _hooked])
def test_module_that_is_called_as_it_is_may_write(make: Callable[[], nn.Module]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = x * torch.sigmoid(x)
        shortcut = m.a(y)
        return m.opaque(y) + shortcut

    check(Net(forward, a=conv_bn(), opaque=make()))


def test_module_that_is_given_a_result_and_another_element_of_a_list() -> None:
    def forward(m: Any, maps: list[Tensor]) -> Any:
        y = m.a(maps[0]) + maps[0]
        return y, m.opaque(torch.cat([y, maps[1]], 1)), m.other(y, maps[1])

    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return Opaque.forward(cast(Any, self), y) + x

    model, maps = (
        ready(Net(forward, a=conv_bn(), opaque=Opaque(), other=Sum())),
        images(*SHAPES[:1] * 2, dtype=torch.float32),
    )
    fused = fuse_fx(model, (list(maps),))
    assert counts(fused) == (1, 0)


def test_slice_of_a_list_is_a_list_of_its_own() -> None:
    def forward(m: Any, maps: list[Tensor]) -> Any:
        some = maps[1:]
        for i in range(2):
            some[i] = m.norm(some[i].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        others = some[:-1][::-1]
        return m.a(some[-1]) + m.b(others[0]), maps[1:3]

    model, maps = (
        ready(Net(forward, a=conv_bn(), b=conv_bn(), norm=nn.LayerNorm(CHANNELS))),
        images(*SHAPES[:1] * 3, dtype=torch.float32),
    )
    fused = fuse_fx(model, (list(maps),), verify="region")
    assert counts(fused)[1] == 0
    assert relative_error(run(fused, list(maps)), run(model, list(maps))) < 2e-5


def test_state_that_every_call_updates_is_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.factor.mul_(2)
        return m.a(x) * m.factor

    model = ready(Net(forward, a=conv_bn()))
    model.register_buffer("factor", torch.ones(()))
    with pytest.raises(InputError, match="factor"):
        fuse_fx(model)


def test_verification_leaves_buffers_of_the_original_alone() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls.add_(1)
        return m.a(x)

    model = ready(Net(forward, a=conv_bn()))
    model.register_buffer("calls", torch.zeros(()))
    fuse_fx(model, torch.ones(1, CHANNELS, 5, 6))
    assert model.calls == 0


# Random programs


class Program(nn.Module):
    """A random straight-line program over values of one shape, half of whose operators write in place."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([conv_bn(k) for k in (1, 3)] + [nn.BatchNorm2d(CHANNELS)])
        self.g = vector()
        generator = torch.Generator().manual_seed(seed)
        self.steps = torch.randint(0, 1000, (9, 3), generator=generator).tolist()

    def forward(self, x: Tensor) -> Tensor:
        values = [torch.tanh(x)]
        for kind, i, j in self.steps:
            a, b = values[-1 - i % min(2, len(values))], values[-1 - j % min(3, len(values))]
            operators = (
                lambda a, b: self.blocks[0](a),
                lambda a, b: self.blocks[1](a),
                lambda a, b: self.blocks[2](a),
                lambda a, b: a + b,
                lambda a, b: a - b,
                lambda a, b: self.g * a,
                lambda a, b: a.add_(b.clone()),
                lambda a, b: a.sub_(self.blocks[0](b)),
                lambda a, b: torch.tanh_(a),
                lambda a, b: F.relu(a, inplace=True),
                lambda a, b: a.transpose(2, 3).mul_(0.5).transpose(2, 3),
                lambda a, b: a.clone(),
            )
            values.append(operators[kind % len(operators)](a, b))
        return torch.stack(values)


@pytest.mark.parametrize("seed", range(40))
def test_random_program(seed: int) -> None:
    model = ready(Program(seed), seed).double()
    x = torch.randn(2, CHANNELS, 5, 6, dtype=torch.float64)
    fused = fuse_fx(model)
    assert relative_error(run(fused, x), run(model, x)) < 1e-12


class Rewrites(nn.Module):
    """A buffer that forward writes before it reads it again; what it holds at first is not used."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.conv, self.norm = nn.Conv2d(CHANNELS, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)
        self.register_buffer("shift", torch.zeros(CHANNELS, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = self.get_buffer(self.name)
        held.copy_(x.mean((0, 2, 3)).reshape(held.shape))
        return self.norm(self.conv(x)) + self.shift


@pytest.mark.parametrize("name", ["shift", "norm.running_mean"])
@pytest.mark.parametrize("examples", [False, True])
def test_a_buffer_that_is_written_is_no_constant(name: str, examples: bool) -> None:
    model = ready(Rewrites(name)).double()
    first, second = images((2, CHANNELS, 6, 7), (1, CHANNELS, 5, 5))
    fused = fuse_fx(model, first if examples else None)
    for x in (first, second):
        assert relative_error(run(fused, x), run(model, x)) < 1e-5
