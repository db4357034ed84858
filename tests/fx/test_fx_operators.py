"""Each operator that is read means what its expression says, and what is emitted for it computes the same."""

from typing import Any

import pytest

pytest.importorskip("torch")

from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from fx_checks import CHANNELS, Net, check, counts, images, relative_error, run
from torch import Tensor, fx, nn
from torch.nn import functional as F

from reparamc import fuse_fx
from reparamc.algebra.evaluate import evaluate
from reparamc.algebra.expr import ONE, ZERO, Scale, Source
from reparamc.certificate.fx import certify_fx
from reparamc.certificate.fx_shapes import shapes_of
from reparamc.compiler.graph import Splice
from reparamc.compiler.readings import Reading
from reparamc.fx.editor import Editor
from reparamc.fx.graph import FxGraph
from reparamc.fx.recompose import recompose
from reparamc.fx.trace import trace

C = CHANNELS
MAP = (2, 6, 9, 7)
ROW = (2, 6, 11)
CUBE = (1, 6, 5, 4, 6)
TOKENS = (2, 5, 6)
aten = torch.ops.aten

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(6, 4, 3, 2, 1, groups=2), MAP),
    "conv, even and same": (lambda: nn.Conv2d(6, 4, (2, 3), padding="same", dilation=(2, 2)), MAP),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, 2, 1), ROW),
    "conv3d": (lambda: nn.Conv3d(6, 4, (3, 1, 2), 1, (1, 0, 1)), CUBE),
    "linear": (lambda: nn.Linear(6, 3), TOKENS),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1, 1), MAP),
    "transposed, groups": (lambda: nn.ConvTranspose2d(6, 4, (2, 4), (2, 3), (0, 2), groups=2, bias=False), MAP),
    "transposed, dilated": (lambda: nn.ConvTranspose2d(6, 4, 3, 2, 3, (1, 0), dilation=2), MAP),
    "transposed, output larger than kernel": (lambda: nn.ConvTranspose2d(6, 4, 1, 3, 0, 2), MAP),
    "transposed, stride one": (lambda: nn.ConvTranspose2d(6, 4, (3, 2), 1, 1), MAP),
    "transposed 1": (lambda: nn.ConvTranspose1d(6, 4, 4, 2, 1), ROW),
    "transposed 3": (lambda: nn.ConvTranspose3d(6, 4, 2, (1, 2, 2)), CUBE),
    "pool": (lambda: nn.AvgPool2d(3, 2, 1), MAP),
    "pool, oblong": (lambda: nn.AvgPool2d((2, 3), None, (0, 1)), MAP),
    "pool, no padding counted": (lambda: nn.AvgPool2d(2, count_include_pad=False), MAP),
    "pool 1": (lambda: nn.AvgPool1d(3, 2), ROW),
    "pool 3": (lambda: nn.AvgPool3d(2, 1), CUBE),
    "pad": (lambda: nn.ZeroPad2d((1, 2, 0, 3)), MAP),
    "pad 1": (lambda: nn.ConstantPad1d((2, 1), 0.0), ROW),
    "norm": (lambda: nn.BatchNorm2d(6, affine=False, eps=0.1), MAP),
    "norm of tokens": (lambda: nn.BatchNorm1d(6), (3, 6)),
    "shuffle": (lambda: nn.ChannelShuffle(3), MAP),
    "dropout": (nn.Dropout, MAP),
    "flatten": (lambda: nn.Flatten(2), MAP),
    "unflatten": (lambda: nn.Unflatten(2, (3, 3)), MAP),
    "mean": (lambda: nn.AdaptiveAvgPool2d(1), MAP),
    "resize": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), MAP),
    "positions of channels": (lambda: nn.Sequential(nn.Conv2d(6, 8, 1), nn.PixelShuffle(2)), MAP),
    "channels of positions": (lambda: nn.PixelUnshuffle(2), (2, 6, 8, 6)),
}
FUNCTIONS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "conv": (lambda m, x: F.conv2d(x, m.w, None, 2, (1, 0), groups=2), MAP),
    "transposed": (lambda m, x: F.conv_transpose2d(x, m.w, m.b, 2, 1, 1, 2, 1), MAP),
    "transposed by keyword": (lambda m, x: F.conv_transpose2d(x, weight=m.w, stride=2, dilation=2), MAP),
    "matmul": (lambda m, x: x @ m.matrix, TOKENS),
    "mm": (lambda m, x: torch.mm(x, m.matrix), (3, 6)),
    "matmul from the left": (lambda m, x: m.matrix[:4] @ x, ROW),
    "einsum": (lambda m, x: torch.einsum("bld, de -> ble", x, m.matrix), TOKENS),
    "einsum of all ranks": (lambda m, x: torch.einsum("...d,ed->...e", [x, m.matrix[:4]]), TOKENS),
    "einsum, constant first": (lambda m, x: torch.einsum("oc,bchw->bohw", m.matrix[:4], x), MAP),
    "einsum along rows": (lambda m, x: torch.einsum("bct,co->bot", x, m.matrix), ROW),
    "addmm": (lambda m, x: torch.addmm(m.vector, x, m.matrix), (3, 6)),
    "pool": (lambda m, x: F.avg_pool2d(x, 3, stride=2), MAP),
    "resize": (lambda m, x: F.interpolate(x, scale_factor=(2, 3)), MAP),
    "resize, corners": (lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True), MAP),
    "resize, cubic": (lambda m, x: F.interpolate(x, scale_factor=2, mode="bicubic"), MAP),
    "resize, smaller": (lambda m, x: F.interpolate(x, scale_factor=0.5, mode="linear"), ROW),
    "resize, larger": (lambda m, x: F.interpolate(x, scale_factor=2.0, mode="trilinear"), CUBE),
    "pad": (lambda m, x: F.pad(x, (1, 0, 2, 3)), MAP),
    "pad of one axis": (lambda m, x: F.pad(x, [1, 2]), MAP),
    "cat": (lambda m, x: torch.cat([x, x, x], dim=1), MAP),
    "cat from the right": (lambda m, x: torch.cat((x, x), -3), MAP),
    "slice": (lambda m, x: x[:, 1:5], MAP),
    "slice with steps": (lambda m, x: x[:, 1::2], MAP),
    "slice, ellipsis": (lambda m, x: x[..., 2:, :, :], MAP),
    "narrow": (lambda m, x: x.narrow(1, 2, 3), MAP),
    "chunk": (lambda m, x: x.chunk(4, 1)[1], MAP),
    "split": (lambda m, x: x.split([1, 3, 2], dim=1)[-2], MAP),
    "torch.split": (lambda m, x: torch.split(x, 4, 1)[1], MAP),
    "shuffle of any size": (
        lambda m, x: x.reshape(x.shape[0], 2, 3, x.shape[2], x.shape[3]).permute(0, 2, 1, 3, 4).flatten(1, 2),
        MAP,
    ),
    "constant weight": (lambda m, x: F.conv2d(x, torch.einsum("oikl,o->oikl", m.w, m.b.exp()), groups=2), MAP),
    "standardised weight": (
        lambda m, x: F.conv2d(
            x, F.batch_norm(m.w.reshape(1, 6, -1), None, None, training=True).reshape_as(m.w), groups=2
        ),
        MAP,
    ),
    "neg": (lambda m, x: -x, MAP),
    "sum": (lambda m, x: x + torch.ops.aten.alias.default(x), MAP),
    "sum, weighted": (lambda m, x: torch.sub(x, x, alpha=3), MAP),
    "sum with a constant": (lambda m, x: x.add(m.vector[:, None, None]), MAP),
    "product": (lambda m, x: m.vector.view(1, 6, 1, 1) * x, MAP),
    "quotient": (lambda m, x: x / m.vector[:, None, None], MAP),
    "reshape": (lambda m, x: x.reshape(x.shape[0], 6, -1), MAP),
    "reshape_as": (lambda m, x: x.reshape_as(x.flatten(2)), MAP),
    "permute": (lambda m, x: x.permute(0, 2, 3, 1), MAP),
    "transpose": (lambda m, x: x.transpose(-1, -2), MAP),
    "flatten": (lambda m, x: torch.flatten(x, 2), MAP),
    "unflatten": (lambda m, x: x.unflatten(-1, (1, 7)), MAP),
    "squeeze": (lambda m, x: x.unsqueeze(2).squeeze(2), MAP),
    "unsqueeze": (lambda m, x: x.unsqueeze(1), MAP),
    "expand": (lambda m, x: x[:, 2:3].expand(-1, 3, -1, -1), MAP),
    "expand to what is there": (lambda m, x: x.expand((x.shape[0], 6, -1, -1)), MAP),
    "repeat": (lambda m, x: x.repeat(1, 2, 1, 1), MAP),
    "positions of channels": (lambda m, x: F.pixel_shuffle(x.repeat(1, 3, 1, 1), 3), MAP),
    "channels of positions": (lambda m, x: F.pixel_unshuffle(x, 3), (2, 6, 6, 9)),
    "slice of a map": (lambda m, x: x[:, :, 1::2, 2:-1], MAP),
    "slice of a map, ellipsis": (lambda m, x: x[..., ::3, 1:], MAP),
    "aten resize": (lambda m, x: aten.upsample_bilinear2d.vec(x, None, True, [2.0, 3.0]), MAP),
    "aten resize, nearest": (lambda m, x: aten.upsample_nearest2d.vec(x, None, [2.0, 0.5]), MAP),
    "aten repeat": (lambda m, x: aten.repeat.default(x, [1, 3, 1, 1]), MAP),
    "mean": (lambda m, x: x.mean((2, 3), keepdim=True), MAP),
    "mean of one axis": (lambda m, x: x.mean(-1), MAP),
    "a channel": (lambda m, x: x.select(1, 2), MAP),
    "a channel by its index": (lambda m, x: x[:, -1], MAP),
    "one of all channels": (lambda m, x: x.unbind(1)[1], MAP),
    "norm with statistics": (
        lambda m, x: aten.native_batch_norm.default(x, m.vector, m.vector, m.mean, m.mean, False, 0.1, 1e-3)[0],
        MAP,
    ),
    "aten conv": (lambda m, x: aten.convolution.default(x, m.w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 2), MAP),
    "aten transposed": (
        lambda m, x: aten.convolution.default(x, m.w, m.b, [2, 2], [1, 1], [1, 1], True, [1, 0], 2),
        MAP,
    ),
    "aten linear": (lambda m, x: aten.linear.default(x, m.matrix, m.vector), TOKENS),
    "aten addmm": (lambda m, x: aten.addmm.default(m.vector, x, m.matrix), (3, 6)),
    "aten norm": (
        lambda m, x: aten.batch_norm.default(x, m.vector, m.vector, m.mean, m.mean, False, 0.1, 1e-3, True),
        MAP,
    ),
    "aten slice": (lambda m, x: aten.slice.Tensor(x, 1, 2, 9223372036854775807), MAP),
    "aten slice of a map": (lambda m, x: aten.slice.Tensor(x, 2, 1, 9223372036854775807, 2), MAP),
    "aten split": (lambda m, x: aten.split_with_sizes.default(x, [2, 4], 1)[1], MAP),
    "aten pad": (lambda m, x: aten.constant_pad_nd.default(x, [1, 2, 3, 0], 0.0), MAP),
    "aten rsub": (lambda m, x: aten.rsub.Scalar(x, 3.0), MAP),
    "aten sub": (lambda m, x: aten.sub.Tensor(m.vector[:, None, None], x, alpha=2), MAP),
}


def _parts() -> Net:
    generator = torch.Generator().manual_seed(3)
    net = Net(lambda m, x: x)
    for name, shape in {"w": (6, 3, 3, 3), "b": (6,), "matrix": (6, 6), "vector": (6,)}.items():
        setattr(net, name, nn.Parameter(torch.rand(shape, generator=generator) + 0.2))
    net.register_buffer("mean", torch.rand(6, generator=generator) + 0.3)
    return net


def _values(module: fx.GraphModule, x: Tensor) -> dict[fx.Node, Tensor]:
    """What each node computes."""
    found: dict[fx.Node, Tensor] = {}

    class Interpreter(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            found[n] = value = super().run_node(n)
            return value

    with torch.no_grad():
        Interpreter(module).run(x)
    return found


NORMS = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _check(model: Net, shape: tuple[int, ...], *, has_aten: bool = True) -> None:
    """Of a model whose ``run`` ends in one operator, after a BatchNorm that tells the channels of its operand.

    Behind it comes a negation: the result without the value of the operator alone, so that the certificate reads it.
    """
    forward = model.run
    model.first = NORMS[len(shape)](6) if len(shape) > 2 and shape[1] == 6 else nn.Identity()
    model.run = lambda m, x: -forward(m, m.first(x))
    model = model.double().eval()
    for p in model.modules():
        if isinstance(p, nn.modules.batchnorm._BatchNorm):
            assert p.running_mean is not None
            assert p.running_var is not None
            p.running_mean.uniform_(-1, 1)
            p.running_var.uniform_(0.5, 2)
    x = images(shape)[0]
    exported = torch.export.export(model, (x,), strict=False).module()
    assert isinstance(exported, fx.GraphModule)
    recompose(exported)
    forms = ((trace(model), False), (exported, True))
    for traced, is_exported in forms[: 1 + has_aten]:
        graph = FxGraph(traced, {"x": x}, exported=is_exported)
        root = next(n for n in graph.graph.nodes if n.op == "output").all_input_nodes[0]
        (last,) = root.all_input_nodes
        reading = graph.read(last)
        assert isinstance(reading, Reading), reading
        values: dict[Any, Any] = _values(traced, x)
        operands: dict[Any, None] = dict.fromkeys(reading.operands)
        sources = {v: Source(v, shape=graph.facts.shapes[v]) for v in operands}
        expr = reading.over(sources)
        wanted = values[last]
        found, _ = evaluate(expr, {source: values[v].numpy() for v, source in sources.items()})
        assert relative_error(torch.from_numpy(found), wanted) < 1e-12
        if reading.channels is not None and reading.axis is not None:
            assert reading.channels == wanted.shape[reading.axis]
        dtype = graph.dtype([root])
        assert dtype is not None
        assert dtype == np.float64
        native: dict[Any, Any] = {source: v for v, source in sources.items()}
        splice = Splice(root, (last, root), Scale(expr, -ONE, ZERO), native, dtype, Counter(), (), "", "", None)
        emitted = Editor(graph).carry_out([splice]).module
        assert relative_error(run(emitted, x), -wanted) < 1e-12
        windows = certify_fx(traced, emitted, shapes_of(traced, (x,))).windows
        assert [(w.verdict, w.reason) for w in windows] == [("equal", "")]


@pytest.mark.parametrize("name", MODULES)
def test_module(name: str) -> None:
    torch.manual_seed(0)
    make, shape = MODULES[name]
    _check(Net(lambda m, x: m.part(x), part=make()), shape, has_aten="resize" not in name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str) -> None:
    forward, shape = FUNCTIONS[name]
    net = _parts()
    net.run = forward
    _check(net, shape, has_aten="resize" not in name)


LEFT_ALONE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "pool, ceil": lambda m, x: F.avg_pool2d(x, 2, ceil_mode=True),
    "pool, divisor": lambda m, x: F.avg_pool2d(x, 2, divisor_override=3),
    "pool, padding not counted": lambda m, x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "pad, cut": lambda m, x: F.pad(x, (1, -1)),
    "pad, value": lambda m, x: F.pad(x, (1, 1), value=0.5),
    "pad, channels": lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 1)),
    "pad, reflect": lambda m, x: F.pad(x, (1, 1), mode="reflect"),
    "slice of rows": lambda m, x: x[:, :, 1:3],
    "slice of images": lambda m, x: x[1:],
    "one channel": lambda m, x: x[:, 1],
    "detach": lambda m, x: x.detach(),
    "cat of rows": lambda m, x: torch.cat([x, x], 2),
    "einsum, transposed": lambda m, x: torch.einsum("bchw,co->bhwo", x, m.matrix),
    "einsum over another axis": lambda m, x: torch.einsum("bhcw,co->bhow", x.transpose(1, 2), m.matrix),
    "einsum, each channel": lambda m, x: torch.einsum("bchw,co->bchw", x, m.matrix),
    "einsum of a diagonal": lambda m, x: torch.einsum("bccw,co->bow", x[:, :, :6], m.matrix),
    "matmul from the left, a map": lambda m, x: m.matrix[:4] @ x[:, :, :6],
    "addmm, scaled": lambda m, x: torch.addmm(m.vector, x[0, :, :6, :6].flatten(0, 1), m.matrix, beta=2),
    "expand of rows": lambda m, x: x[:, :, :1].expand(-1, -1, 3, -1),
    "expand by an axis": lambda m, x: x.expand(2, -1, -1, -1, -1),
    "repeat of images": lambda m, x: x.repeat(2, 1, 1, 1),
    "repeat by an axis": lambda m, x: x.repeat(2, 1, 1, 1, 1),
    "repeat of channels and rows": lambda m, x: x.repeat(1, 2, 2, 1),
    "half a shuffle": lambda m, x: x.view(2, 2, 3, 9, 7).transpose(1, 2),
    "shuffle of rows": lambda m, x: x.view(2, 6, 3, 3, 7).transpose(2, 3).reshape(2, 6, 9, 7),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name: str) -> None:
    net = _parts().eval()
    net.n = nn.BatchNorm2d(6).eval()
    net.run = lambda m, x: LEFT_ALONE[name](m, m.n(x))
    graph = FxGraph(trace(net), {"x": torch.ones(MAP)})
    root = next(n for n in graph.graph.nodes if n.op == "output").all_input_nodes[0]
    found = graph.read(root)
    assert not isinstance(found, Reading) or found.axis is None


GREY: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "repeat": lambda m, x: m.c(x.repeat(1, 3, 1, 1)),
    "cat": lambda m, x: m.c(torch.cat([x, x, x], 1)),
}


@pytest.mark.parametrize("name", GREY)
def test_a_grey_image_before_a_stem_for_colours(name: str) -> None:
    model = Net(GREY[name], c=nn.Conv2d(3, 4, 3, padding=1)).eval()
    x = images((2, 1, 9, 7))[0].float()
    fused = fuse_fx(model, x)
    assert [c.in_channels for c in fused.modules() if isinstance(c, nn.Conv2d)] == [1]
    assert relative_error(run(fused, x), run(model, x)) < 1e-5


def test_norm_after_a_transposed_convolution() -> None:
    strided: dict[str, Any] = {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}
    geometries: tuple[dict[str, Any], ...] = ({}, {"stride": 2}, strided)
    for options in geometries:
        model = nn.Sequential(nn.ConvTranspose2d(C, 6, 3, **options), nn.BatchNorm2d(6), nn.ReLU())
        fused = check(model)
        assert counts(fused)[1] == 0


def test_writes_into_pieces_and_joined_maps() -> None:
    """A piece shares memory with what it was cut from, a joined map with nothing."""

    def pieces(m: Any, x: Tensor) -> Tensor:
        y = m.n(torch.sigmoid(x))
        a, b = y.chunk(2, 1)
        z = m.c(a)
        b.mul_(2)
        a.add_(1)
        return torch.cat([z, m.c(a), y[:, 1:3]], 1)

    def joined(m: Any, x: Tensor) -> Tensor:
        y = torch.sigmoid(x)
        z = torch.cat([y, m.n(y)], 1)[:, :C]
        z.mul_(2)
        return z + y

    for forward in (pieces, joined):
        check(Net(forward, n=nn.BatchNorm2d(C), c=nn.Conv2d(C // 2, C, 1)))


def test_constants_that_are_none() -> None:
    """Random numbers, and a buffer that forward itself writes into."""

    def drawn(m: Any, x: Tensor) -> Tensor:
        return m.n(F.conv2d(x, m.c.weight * torch.rand_like(m.c.weight)))

    def updated(m: Any, x: Tensor) -> Tensor:
        weight = m.c.weight * 1
        weight.mul_(2)
        return m.n(F.conv2d(x, weight))

    x = images((2, C, 5, 6))[0]
    for forward in (drawn, updated):
        model = Net(forward, n=nn.BatchNorm2d(C), c=nn.Conv2d(C, C, 3)).double().eval()
        fused = fuse_fx(model, x)
        assert counts(fused)[1] == 1
        if forward is updated:
            assert relative_error(run(fused, x), run(model, x)) < 1e-12
