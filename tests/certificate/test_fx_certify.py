"""Certificates of traced modules: what fusion makes is proven, and every fault planted in it is found and named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from paper_blocks import CASES
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.nn import functional as F

from reparamc import fuse_fx
from reparamc.certificate.axes import Dim
from reparamc.certificate.fx import READERS, certify_fx
from reparamc.certificate.fx_memory import Memory
from reparamc.certificate.fx_shapes import shapes_of
from reparamc.certificate.proof import Certificate
from reparamc.compiler.plan import make_plan
from reparamc.fx.editor import Editor
from reparamc.fx.emit import Emitter
from reparamc.fx.export import exported
from reparamc.fx.graph import FxGraph
from reparamc.fx.trace import trace
from reparamc.testing import randomize_batchnorm
from reparamc_passes import PASSES


class Network(nn.Module):
    """Branches and a skip connection, a strided depthwise link, q and k of tokens, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.point = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.Conv2d(6, 6, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.deep = nn.Conv2d(6, 6, 3, stride=2, padding=(2, 1), dilation=(2, 1), groups=6)
        self.qk, self.norm = nn.Linear(6, 12), nn.BatchNorm1d(12)
        self.head = nn.Linear(6, 5)
        self.gain = nn.Parameter(torch.rand(5) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.wide(x)) + self.norms[1](self.point(x))
        y += self.norms[2](x)
        y = F.relu(y)
        y = F.gelu(self.norms[3](self.deep(y)))
        t = y.flatten(2).transpose(1, 2)
        b, n, _ = t.shape
        qk = self.norm(self.qk(t).flatten(0, 1)).reshape(b, n, 2, 6)
        q, k = qk.split(3, dim=-1)
        a = torch.softmax(q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1), -1)
        return self.head((a.mean(1) @ t).mean(1)) * self.gain


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Network().eval()
    x = torch.randn(2, 6, 9, 8)
    return randomize_batchnorm(model, 0, torch.randn(4, 6, 9, 8)), x


def both(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, fx.GraphModule, dict[str, Any]]:
    """A traced module before and after, and the shapes of its nodes."""
    traced = trace(copy.deepcopy(model))
    graph = FxGraph(traced, {"x": x})
    plan = make_plan(graph, PASSES, verify=False)
    return traced, Editor(graph).carry_out([*plan.splices, *plan.folds]).module, shapes_of(traced, [x])


def verdicts(certificate: Certificate) -> list[str]:
    return [w.verdict for w in certificate.windows]


def test_what_fusion_makes_is_proven() -> None:
    model, x = network()
    kept, fused, shapes = both(model, x)
    assert not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for _, m in fused.named_modules() if "." not in _)
    found = certify_fx(kept, fused, shapes)
    assert found.holds, found.windows
    assert found.equal >= 4
    assert found.congruent >= 5
    assert 0 < found.units <= 1
    assert 0 < found.bound <= 2.0**-22


def test_sizes_that_vary_are_symbols() -> None:
    model, x = network()
    shapes = both(model, x)[2]
    batch, channels, *image = shapes["wide"]
    assert channels.known == 6
    assert all(e.known is None for e in (batch, *image))
    assert image[0] != image[1]


def test_sizes_that_may_differ_have_other_symbols() -> None:
    """Strides that agree at even sizes, axes of one length, and a second argument of one size with the first."""

    class Sizes(nn.Module):
        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            even, odd = F.avg_pool2d(x, 2, 2), F.max_pool2d(x, 3, 2, 1)
            return (even.mean((2, 3)) + odd.mean((2, 3)))[:, :, None, None] + (x + z)

    x = torch.randn(2, 3, 8, 8)
    shapes = shapes_of(trace(Sizes()), [x, x])
    even, odd = shapes["avg_pool2d"], shapes["max_pool2d"]
    assert all(m != n for m, n in zip(even[2:], odd[2:], strict=True))
    assert shapes["x"][2] != shapes["x"][3]
    assert all(m != n for m, n in zip(shapes["x"][2:], shapes["z"][2:], strict=True))
    assert shapes["x"][0] != shapes["z"][0]


def test_a_term_that_may_be_repeated_is_no_proof() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)

    class Split(nn.Module):
        def __init__(self, split: bool) -> None:
            super().__init__()
            self.conv, self.split = conv, split

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return F.relu(self.conv(x) + self.conv(z) if self.split else self.conv(x + z))

    at_once, apart = fx.symbolic_trace(Split(False)), fx.symbolic_trace(Split(True))
    x = torch.randn(1, 3, 5, 5)
    for n in apart.graph.nodes:  # not the same as in the other
        if n.name.startswith(("conv", "add")):
            n.name = f"apart_{n.name}"
    shapes = shapes_of(at_once, [x, x])
    assert verdicts(certify_fx(at_once, apart, shapes)) == ["undecided"]
    assert verdicts(certify_fx(at_once, apart, {**shapes, "z": shapes["x"]})) == ["equal"]


def emitted(fused: fx.GraphModule, kind: type[nn.Module]) -> list[Any]:
    return [m for name, m in fused.named_modules() if type(m) is kind and "fused" in name]


def first_conv(fused: fx.GraphModule) -> Any:
    return next(m for m in emitted(fused, nn.Conv2d) if m.kernel_size == (3, 3) and m.groups == 1)


def deep_conv(fused: fx.GraphModule) -> Any:
    return next(m for m in emitted(fused, nn.Conv2d) if m.groups == 6)


def scaled(tensor: Tensor, at: tuple[int, ...], by: float) -> None:
    with torch.no_grad():
        tensor[at] *= by


def swapped(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor[[0, 1]] = tensor[[1, 0]].clone()


FAULTS: dict[str, Callable[[fx.GraphModule], None]] = {
    "one weight by a thousandth": lambda m: scaled(first_conv(m).weight, (2, 3, 0, 1), 1.001),
    "one sign": lambda m: scaled(deep_conv(m).weight, (4, 0, 1, 1), -1),
    "two channels": lambda m: swapped(emitted(m, nn.Linear)[-1].weight),
    "one bias": lambda m: scaled(first_conv(m).bias, (1,), 1.001),
    "bias dropped": lambda m: setattr(deep_conv(m), "bias", None),
    "pads": lambda m: setattr(deep_conv(m), "padding", (1, 2)),
    "dilation": lambda m: setattr(deep_conv(m), "dilation", (1, 2)),
    "stride": lambda m: setattr(deep_conv(m), "stride", (2, 1)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    model, x = network()
    kept, fused, shapes = both(model, x)
    FAULTS[name](fused)
    found = certify_fx(kept, fused, shapes)
    assert [v for v in verdicts(found) if v != "equal"] == ["different"], found.windows
    wrong = next(w for w in found.windows if w.verdict == "different")
    assert wrong.reason
    assert wrong.units > 1


def test_ranks_are_told_by_operators_where_there_are_no_examples() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )
    fused = fuse_fx(randomize_batchnorm(model.eval()))
    certificate = fused.meta["reparamc"].certificate
    assert (certificate.equal, certificate.undecided) == (2, ())


def test_tokens_become_an_image_again() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.scale = nn.Linear(4, 4), nn.Parameter(torch.rand(4, 1, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            tokens = F.softmax(x.flatten(2).transpose(1, 2), 1)
            return x + self.scale * self.proj(tokens).transpose(1, 2).unflatten(2, x.shape[2:])

    fused = fuse_fx(Tokens().eval(), torch.randn(2, 4, 6, 6))
    certificate = fused.meta["reparamc"].certificate
    assert (certificate.equal, certificate.undecided) == (1, ())


def test_what_is_no_tensor_is_an_attribute_of_what_reads_it() -> None:
    class Numbers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            h, w = x.shape[2:]
            heads = torch.softmax(x.flatten(2), 2).unflatten(2, (h, w))
            return self.norm(self.conv(heads) + self.conv(heads)) + torch.zeros(h, w, dtype=torch.float32)

    model = randomize_batchnorm(Numbers().eval(), 0, torch.randn(2, 4, 6, 6))
    fused = fuse_fx(model, torch.randn(2, 4, 6, 6))
    certificate = fused.meta["reparamc"].certificate
    assert (certificate.equal, certificate.undecided) == (1, ())


def test_sizes_and_structures_that_are_returned_are_compared() -> None:
    class Returned(nn.Module):
        def __init__(self, axis: int) -> None:
            super().__init__()
            self.axis = axis

        def forward(self, x: Tensor) -> Any:
            y = x * 2
            return {"y": [y, None]}, y.shape[self.axis], y.shape

    x = torch.randn(1, 2, 3)
    mine, other, same = (fx.symbolic_trace(Returned(axis)) for axis in (1, 2, 1))
    assert certify_fx(mine, same, shapes_of(mine, [x])).holds
    assert not certify_fx(mine, other, shapes_of(mine, [x])).holds


def test_what_no_reader_has_thought_of_is_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(call: Any) -> Any:
        raise IndexError("an argument is missing")

    monkeypatch.setitem(READERS, "batch_norm", fail)
    model, x = network()
    report = fuse_fx(model, x).meta["reparamc"]
    assert report.certificate.undecided
    assert "the proof stopped at IndexError: an argument is missing" in report.certificate.undecided[0].reason
    assert "undecided" in report.table()


def test_layouts_under_an_unknown_function_are_compared() -> None:
    """One graph has a cut there that the other has not."""

    class Under(nn.Module):
        def __init__(self, rows: bool) -> None:
            super().__init__()
            self.rows = rows

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(x)
            if self.rows:
                y = y.reshape(-1, 3, 4).reshape(-1, 12)
            return torch.softmax(y, 1)

    x = torch.randn(2, 12)
    rows, plain = fx.symbolic_trace(Under(True)), fx.symbolic_trace(Under(False))
    assert certify_fx(rows, plain, shapes_of(rows, [x])).holds
    assert certify_fx(plain, rows, shapes_of(plain, [x])).holds


# Writes in place


class Written(nn.Module):
    """A convolution is read before and after it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = self.norm(self.conv(y))
        y.relu_()
        return z + F.silu(y)


def node_of(module: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in module.graph.nodes if n.name == name)


def certified(original: nn.Module, change: Callable[[fx.GraphModule], object], x: Tensor) -> Certificate:
    """Of a traced module and a changed copy of it."""
    traced = trace(original)
    changed = fx.GraphModule(traced, copy.deepcopy(traced.graph))
    change(changed)
    changed.graph.lint()
    return certify_fx(traced, changed, shapes_of(traced, [x]))


def test_a_state_of_what_is_written_is_one_value() -> None:
    model = randomize_batchnorm(Written().eval(), example_inputs=torch.randn(2, 3, 4, 4))
    kept, fused, shapes = both(model, torch.randn(2, 3, 5, 6))
    assert certify_fx(kept, fused, shapes).holds  # nothing was rewritten
    fused.conv = copy.deepcopy(fused.conv)
    assert verdicts(certify_fx(kept, fused, shapes)) == ["equal"]


def test_a_write_that_is_moved_or_lost_is_seen() -> None:
    x = torch.randn(2, 3, 5, 6)
    moved = certified(Written().eval(), lambda m: node_of(m, "mul").append(node_of(m, "relu_")), x)
    assert not moved.holds
    lost = certified(Written().eval(), lambda m: m.graph.erase_node(node_of(m, "relu_")), x)
    assert not lost.holds
    assert certified(Written().eval(), lambda m: None, x).holds


def test_a_view_that_is_read_later_is_no_proof() -> None:
    class Viewed(Written):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            rows = y.flatten(2)
            y.relu_()
            return rows + self.norm(y).flatten(2)

    def replaced(module: fx.GraphModule) -> None:
        module.norm = copy.deepcopy(module.norm)

    x = torch.randn(2, 3, 5, 6)
    assert certified(Viewed().eval(), lambda m: None, x).holds
    assert verdicts(found := certified(Viewed().eval(), replaced, x)) == ["undecided"]
    assert "written in place" in found.windows[0].reason
    assert not certified(Viewed().eval(), lambda m: m.graph.erase_node(node_of(m, "relu_")), x).holds
    assert not certified(Viewed().eval(), lambda m: node_of(m, "norm").append(node_of(m, "relu_")), x).holds


def test_a_write_into_an_argument_is_seen_from_outside() -> None:
    class Argument(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            x.relu_()
            return y

    x = torch.randn(2, 3)
    assert certified(Argument(), lambda m: None, x).holds
    assert not certified(Argument(), lambda m: m.graph.erase_node(node_of(m, "relu_")), x).holds


class Bordered(nn.Module):
    """A border of the value that a BatchNorm gives to zero, under a kernel; ``side`` is written otherwise."""

    def __init__(self, side: tuple[Any, ...] = (), off: float = 1.0) -> None:
        super().__init__()
        self.norm, self.conv, self.side, self.off = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), side, off
        self.sides = [np.s_[:, :, :1], np.s_[:, :, -1:], np.s_[..., :1], np.s_[..., -1:]]

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self.norm
        border = norm.bias - norm.running_mean * norm.weight / torch.sqrt(norm.running_var + norm.eps)
        y = F.pad(norm(x), [1] * 4)
        for side in self.sides:
            y[side] = border.view(1, -1, 1, 1)
        if self.side:
            y[self.side] = (border * self.off).view(1, -1, 1, 1)
        return self.conv(y)


def bordered(**options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize_batchnorm(Bordered(**options), 0, torch.randn(2, 3, 5, 6)).eval().double()


def test_a_border_that_is_written_is_read() -> None:
    model, x = bordered(), torch.randn(2, 3, 5, 6).double()
    fused = fuse_fx(model, x)
    assert fused.meta["reparamc"].certificate.equal == 1
    assert fused.meta["reparamc"].certificate.undecided == ()
    assert [n.op for n in fused.graph.nodes].count("call_module") == 1
    for options in (
        {"side": np.s_[:, :, :1], "off": 1 + 1e-9},
        {"side": np.s_[:, :, :2]},
        {"side": np.s_[:, :, 1:2]},
        {"side": np.s_[:1, :, :1], "off": 2.0},
        {"side": np.s_[:, :, ::2]},
    ):
        other = trace(bordered(**options))
        assert not certify_fx(other, fused, shapes_of(other, [x])).holds, options


@pytest.mark.parametrize("name", ["dbb", "dbb, stride 2", "ecb, wider"])
@pytest.mark.parametrize("exported", [False, True])
def test_borders_of_blocks_of_papers_are_read(name: str, exported: bool) -> None:
    class OfRank(nn.Module):
        """What torch.fx cannot follow, and torch.export can."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if x.dim() == 4 else x

    block = CASES[name].module()
    fused = fuse_fx(OfRank(block).eval() if exported else block, CASES[name].inputs()[0].float())
    certificate = fused.meta["reparamc"].certificate
    assert certificate.equal or exported
    assert certificate.undecided == ()


# What is not in place


def test_the_last_elements_are_not_none() -> None:
    """`narrow` counts from the end, and has its own end there."""

    def narrowed(start: int, length: int) -> fx.GraphModule:
        graph = fx.Graph()
        graph.output(graph.call_method("narrow", (graph.placeholder("x"), 1, start, length)))
        return fx.GraphModule(nn.Module(), graph)

    last, none, also = narrowed(-2, 2), narrowed(2, 0), narrowed(2, 2)
    shapes = shapes_of(last, [torch.randn(1, 4, 2, 2)])
    assert certify_fx(last, also, shapes).holds
    assert not certify_fx(last, none, shapes).holds


@pytest.mark.parametrize("name", ["orepa", "orepa, products", "orepa, products, stride 2", "lora, merged"])
def test_what_the_module_computes_of_parameters_may_be_rounded_otherwise(name: str) -> None:
    """It is added up in float32, in an order that depends on how tensors lie in memory; a fault is still one."""
    block = CASES[name].module()
    fused = fuse_fx(block, CASES[name].inputs()[0].float())
    assert fused.meta["reparamc"].certificate.undecided == ()
    kept = trace(copy.deepcopy(block))
    shapes = shapes_of(kept, [CASES[name].inputs()[0].float()])
    assert certify_fx(kept, fused, shapes).holds
    (weight,) = (p for p in fused.parameters() if p.ndim > 1)
    scaled(weight, (0, 1), 1 + 1e-4)
    assert verdicts(certify_fx(kept, fused, shapes)) == ["different"]


def test_a_wrong_rewrite_is_undone_and_the_rest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    fill = Emitter._fill

    def wrong(self: Emitter, module: Any, weight: Any, bias: Any) -> None:
        fill(self, module, weight * 1.01 if getattr(module, "groups", 1) == 6 else weight, bias)

    monkeypatch.setattr(Emitter, "_fill", wrong)
    model, x = network()
    with pytest.warns(RuntimeWarning, match="proven to differ"):
        fused = fuse_fx(model, x)
    report = fused.meta["reparamc"]
    assert report.certificate.rolled_back == 1
    assert report.certificate.equal >= 3
    (kept,) = (k for k in report.kept if k.name == "certificate")
    assert "with weight" in kept.reason
    norms = [m for n in fused.graph.nodes if n.op == "call_module" for m in [fused.get_submodule(str(n.target))]]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in norms) == 1
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_without_verification_nothing_is_proven() -> None:
    model, x = network()
    assert fuse_fx(model, x, verify=False).meta["reparamc"].certificate is None
    assert fuse_fx(model, x, verify="region").meta["reparamc"].certificate is not None


def test_other_arguments_or_results_are_seen_from_outside() -> None:
    model, x = network()
    kept, fused, shapes = both(model, x)
    (output,) = fused.graph.find_nodes(op="output")
    output.args = ((output.args[0],),)
    assert certify_fx(kept, fused, shapes).different


def test_sizes_of_tokens_are_symbols_too() -> None:
    """Images have their channels along axis 1, tokens along the last."""
    tokens = trace(nn.Sequential(nn.Linear(4, 6), nn.ReLU()))
    images = trace(nn.Sequential(nn.Conv1d(4, 6, 1), nn.ReLU()))
    assert [e.known for e in shapes_of(tokens, [torch.randn(2, 5, 4)])["_1"]] == [None, None, 6]
    assert [e.known for e in shapes_of(images, [torch.randn(2, 4, 5)])["_1"]] == [None, 6, None]


@pytest.mark.parametrize("sizes", [(3, 6, 6, 4), (2, 3, 6, 6, 4), (4, 6, 6)], ids=["last", "video", "one image"])
def test_channels_of_other_layouts(sizes: tuple[int, ...]) -> None:
    """Height and width, which are exchanged here, are not one and the same because they are in the example."""

    class Exchanged(nn.Module):
        def __init__(self, order: list[int]) -> None:
            super().__init__()
            self.order, alone = order, sizes[0] == 4
            self.mix = nn.Conv2d(4, 4, 1) if alone else nn.Linear(4, 4)
            nn.init.constant_(self.mix.weight, 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(x).reshape([x.shape[axis] for axis in self.order]).relu()

    high = len(sizes) - 2 - (sizes[0] != 4)
    kept = [*range(len(sizes))]
    turned = [*kept[:high], high + 1, high, *kept[high + 2 :]]
    plain, other = trace(Exchanged(kept)), trace(Exchanged(turned))
    for name in ("weight", "bias"):
        setattr(other.mix, name, getattr(plain.mix, name))
    shapes = shapes_of(plain, [torch.randn(sizes)])
    assert len({e for e in shapes["mix"] if e.known is None}) == len(sizes) - 1
    assert certify_fx(plain, copy.deepcopy(plain), shapes).holds
    assert not certify_fx(plain, other, shapes).holds


def test_two_arguments_have_their_own_numbers_of_tokens() -> None:
    class Cross(nn.Module):
        def __init__(self, own: bool) -> None:
            super().__init__()
            self.own = own

        def forward(self, x: Tensor, context: Tensor) -> Any:
            return x * 2, context * 2, (x if self.own else context).shape[1]

    x = torch.randn(2, 5, 4)
    mine, other = trace(Cross(True)), trace(Cross(False))
    shapes = shapes_of(mine, [x, x])
    assert shapes["mul"][1] != shapes["mul_1"][1]
    assert not certify_fx(mine, other, shapes).holds


class Windows(nn.Module):
    """Four windows of each image, whose halves go apart."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side, self.conv, self.norm = side, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(x.shape[0] * 4, 4, self.side, self.side).relu()
        y = self.norm(self.conv(y)).view(x.shape[0] * 4, -1, self.side, self.side)
        first, second = y.split([2, 2], 1)
        return torch.softmax(first.flatten(2), -1) + torch.softmax(second.flatten(2), 1)


def test_a_multiple_of_the_batch_is_one() -> None:
    x = torch.randn(1, 4, 8, 8)
    report = fuse_fx(randomize_batchnorm(Windows(4).eval(), 0), x).meta["reparamc"]
    assert report.after.batchnorm == 0
    assert report.certificate.undecided == ()


def test_what_is_a_multiple_of_the_batch_by_chance_is_none() -> None:
    """The side is doubled with the batch, for the module takes no odd one."""

    class Even(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x.reshape(x.shape[0], 4, 8, -1, 2).flatten(3))

    x = torch.randn(1, 4, 8, 32)
    batch, _, _, side = shapes_of(trace(Even()), [x])["relu"]
    assert batch.known is None
    assert side not in (batch, batch.times(Dim(32)))


class Region(nn.Module):
    """Attention that is computed without autocast, which is a graph of its own in what is exported."""

    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.what = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), what

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.norm(self.conv(x)))
        with torch.autocast("cpu", enabled=False):
            z = self.what(y)
        return torch.stack([*(z + y).unbind(1)], 1)


QUIET = {
    "tanh": (torch.tanh, True),
    "a write": (Tensor.relu_, False),
    "a view": (lambda y: y.transpose(2, 3).transpose(2, 3), False),
    "a write into a result": (lambda y: torch.tanh(y).relu_(), False),
}


@pytest.mark.parametrize("name", QUIET)
def test_a_graph_that_an_operator_calls(name: str) -> None:
    """If it shares no memory with what it is given, it is an operator like any other."""
    what, quiet = QUIET[name]
    model, x = randomize_batchnorm(Region(what).eval(), 0), torch.randn(2, 4, 5, 5)
    report = fuse_fx(model, x).meta["reparamc"]
    assert report.after.batchnorm == 0
    assert report.certificate.undecided == ()
    module = exported(model, ((x,), {}))
    assert [n for n in module.graph.nodes if isinstance(n.target, HigherOrderOperator)]
    assert (not Memory(module).writes) == quiet


class Table(nn.Module):
    """A reshape to the size of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm1d(4)
        self.table = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2)
        z = self.norm(y.reshape(x.shape[0], self.table.shape[0], -1))
        return torch.einsum("bcn,cd->bnd", torch.tanh(z), self.table)


def test_the_size_of_a_parameter() -> None:
    model, x = randomize_batchnorm(Table().eval(), 0), torch.randn(2, 4, 5, 5)
    report = fuse_fx(model, x).meta["reparamc"]
    assert report.passes["bn-folding"] == 1
    assert report.certificate.undecided == ()


SIZES: dict[str, Callable[[Tensor], Any]] = {
    "of some": lambda y: y.shape[1:3],
    "of the last": lambda y: (y.shape[-3:][0], y.shape[-3:][1]),
    "from after": lambda y: (y.shape[1], y.shape[1:][-2]),
    "by name": lambda y: (y.size(1), y.size(2)),
}


class Sized(nn.Module):
    """Tokens of an image, whose sizes are read from a slice of its shape."""

    def __init__(self, sizes: Callable[[Tensor], Any], turned: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 4)
        self.sizes, self.turned = sizes, turned

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.conv(x))).permute(0, 2, 3, 1)
        sizes = self.sizes(y)
        h, w = (sizes[1], sizes[0]) if self.turned else (sizes[0], sizes[1])
        z = self.linear(y.flatten(1, 2)).reshape(y.shape[0], h, w, -1).permute(0, 3, 1, 2)
        return torch.sigmoid(z * 2)


@pytest.mark.parametrize("name", SIZES)
def test_a_size_of_some(name: str) -> None:
    right, turned = (randomize_batchnorm(Sized(SIZES[name], t).eval(), 0) for t in (False, True))
    turned.load_state_dict(right.state_dict())
    x = torch.randn(2, 4, 5, 5)
    fused = fuse_fx(right, x)
    report = fused.meta["reparamc"]
    assert report.passes["scale-folding"] == 1
    assert report.certificate.undecided == ()
    kept = exported(turned, ((x,), {}))
    assert not certify_fx(kept, fused, shapes_of(kept, [x])).holds


def test_channels_are_counted_through_functional_norms_and_dropout() -> None:
    """Without example inputs: what reads a scale per channel is known to have channels."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
            self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout(0.1)
            self.gamma = nn.Parameter(torch.rand(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            n = self.norm
            x = F.batch_norm(self.first(x), n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps)
            return x + self.second(self.drop(F.gelu(x))) * self.gamma

    made = Net().eval()
    randomize_batchnorm(made)
    certificate = fuse_fx(made).meta["reparamc"].certificate
    assert certificate.equal
    assert not certificate.undecided
