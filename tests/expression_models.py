"""What tests build from an expression: its value, an ONNX model, a torch module.

None of it uses the evaluator, the verifier or an adapter of the library: these are what is tested.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from reparamc.algebra.expr import (
    BatchNorm,
    Concat,
    Conv,
    Expr,
    Layout,
    Mean,
    Permute,
    Reshape,
    Resize,
    Scale,
    Select,
    Source,
    Spread,
    Sum,
    Take,
    ranks,
    walk,
)
from reparamc.algebra.infer import channel_axes, channels
from reparamc.algebra.kernels import regroup

Shapes = dict[Source, tuple[int, ...]]
EXTENTS = ((7, 6, 5), (8, 9, 6))
"""Two sizes of different parity, unequal along every axis."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fail instead of hanging: a set of rules that does not terminate must not take the suite with it."""

    def expire(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no result after {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def sources(e: Expr) -> list[Source]:
    return [s for s in walk(e) if isinstance(s, Source)]


def source_shapes(e: Expr, sizes: Sequence[int] = EXTENTS[0], batch: int = 2) -> Shapes:
    """A shape for every source: its own with ``sizes`` for its symbols, or [batch, channels, *sizes]."""
    count, axis = channels(e), channel_axes(e)
    symbols: dict[str, int] = {"N": batch}
    shapes: Shapes = {}
    for s in sources(e):
        if s.shape is not None:
            for symbol in (n for dim in s.shape for n in dim.symbols if n not in symbols):
                symbols[symbol] = sizes[(len(symbols) - 1) % len(sizes)]
            shapes[s] = tuple(dim.at(symbols) for dim in s.shape)
        else:
            shapes[s] = (batch, count[s] or 3, *sizes[: -1 - (axis[s] or -1)])
    return shapes


def axes(root: Expr) -> dict[Expr, int]:
    """The number of axes of every node."""
    found: dict[Expr, int] = {s: len(shape) for s, shape in source_shapes(root).items()}
    for e in walk(root):
        if isinstance(e, Layout):
            found[e] = ranks(e.op)[1]
        elif e not in found:
            found[e] = found[e.children[0]]
    return found


def draw(shapes: Shapes, seed: int = 0) -> dict[Source, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {s: rng.standard_normal(shape) for s, shape in shapes.items()}


def assert_close(reference: np.ndarray, other: np.ndarray, tolerance: float) -> None:
    """Raise unless shapes, NaN and infinities agree, and the rest up to ``tolerance`` times the largest value."""
    assert reference.shape == other.shape, f"shapes {reference.shape} and {other.shape}"
    a, b = reference.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(a)
    assert np.array_equal(finite, np.isfinite(b)), "NaN or infinity in other places"
    assert np.array_equal(a[~finite], b[~finite], equal_nan=True), "other NaN or infinity"
    gap, size = np.abs(a[finite] - b[finite]).max(initial=0.0), np.abs(a[finite]).max(initial=0.0)
    assert gap <= tolerance * size, f"largest difference {gap:.3g} where the largest value is {size:.3g}"


# The value


def cut_by(e: Conv) -> list[slice] | None:
    """The slice along each axis, if ``e`` takes every n-th position of its operand and nothing else."""
    sides = list(zip(*e.padding, strict=True))
    if not e.is_weightless or any(k > 1 for k in e.kernel) or any(p > 0 for side in sides for p in side):
        return None
    return [slice(-a or None, b or None, s) for (a, b), s in zip(sides, e.stride, strict=True)]


def _shuffled(x: Any, op: Spread) -> Any:
    """What torch makes of a pixel shuffle or its inverse, with the channels of a position side by side or apart."""
    torch, count = _torch(), op.block**2
    order = torch.arange(x.shape[-3] * (count if op.back else 1)).reshape((-1, count) if op.back else (count, -1))
    order = order.T.ravel()
    if op.back:
        x = torch.pixel_unshuffle(x, op.block)
        return x.index_select(-3, order) if op.outer else x
    return torch.pixel_shuffle(x.index_select(-3, order) if op.outer else x, op.block)


def _interpolated(x: Any, op: Resize) -> Any:
    """What torch makes of a resize, nearest or linear."""
    mode = op.mode if op.mode == "nearest" else ("linear", "bilinear", "trilinear")[len(op.scales) - 1]
    corners = {} if op.mode == "nearest" else {"align_corners": op.place == "align_corners"}
    scale = tuple(map(float, op.scales))
    return _torch().nn.functional.interpolate(x, scale_factor=scale, mode=mode, **corners)


def reference(root: Expr, inputs: Mapping[Source, np.ndarray]) -> np.ndarray:
    """The value of ``root`` in float64, by PyTorch's operators where it has them."""
    values: dict[Expr, np.ndarray] = {}
    for e in walk(root):
        match e:
            case Source():
                y = inputs[e]
            case Conv():
                y = _convolve(e, values[e.x])
            case Scale():
                y = values[e.x] * _column(e.scale, e.axis) + _column(e.shift, e.axis)
            case BatchNorm():
                gamma, beta, mean, var = (_column(v, e.axis) for v in (e.gamma, e.beta, e.mean, e.var))
                y = (values[e.x] - mean) / np.sqrt(var + e.eps) * gamma + beta
            case Sum():
                y = sum((values[t] for t in e.terms[1:]), values[e.terms[0]])
            case Concat():
                y = _torch().cat([_torch().from_numpy(values[t]) for t in e.terms], e.axis).numpy()
            case Select():
                channels_first = np.moveaxis(values[e.x], e.axis, 0)
                y = np.moveaxis(np.stack([channels_first[i] for i in e.index]), 0, e.axis)
            case Layout() if isinstance(e.op, Permute):
                y = np.transpose(values[e.x], e.op.axes)
            case Layout() if isinstance(e.op, Mean):
                y = _torch().from_numpy(values[e.x]).mean(e.op.axes, e.op.keep).numpy()
            case Layout() if isinstance(e.op, Resize):
                y = _interpolated(_torch().from_numpy(values[e.x]), e.op).numpy()
            case Layout() if isinstance(e.op, Spread):
                y = _shuffled(_torch().from_numpy(values[e.x]), e.op).numpy()
            case Layout() if isinstance(e.op, Take):
                y = _torch().from_numpy(values[e.x]).select(e.op.axis, e.op.at).numpy()
            case Layout():
                y = values[e.x].reshape(_target(e, values[e.x].shape))
        values[e] = y
    return values[root]


def _column(v: np.ndarray, axis: int | None) -> np.ndarray:
    return v.reshape(v.size, *[1] * (-1 - (axis or -1))) if v.ndim else v


def _convolve(e: Conv, x: np.ndarray) -> np.ndarray:
    if e.spatial == 0:
        parts = zip(np.split(x, e.groups, axis=-1), np.split(e.weight, e.groups), strict=True)
        y = np.concatenate([part @ rows.T for part, rows in parts], axis=-1)
        return y if e.bias is None else y + e.bias
    torch = _torch()
    begin, end = e.padding
    if e.transposed:
        return _convolve_transposed(e, x)
    pads = [n for pair in zip(reversed(begin), reversed(end), strict=True) for n in pair]
    batch = x.shape[: x.ndim - e.spatial - 1]
    padded = torch.nn.functional.pad(torch.from_numpy(x.reshape(-1, *x.shape[len(batch) :])), pads)
    convolve = getattr(torch.nn.functional, f"conv{e.spatial}d")
    bias = None if e.bias is None else torch.from_numpy(e.bias)
    weight = torch.from_numpy(np.ascontiguousarray(e.weight))
    y = convolve(padded, weight, bias, stride=e.stride, dilation=e.dilation, groups=e.groups).numpy()
    return y.reshape(*batch, *y.shape[1:])


def _convolve_transposed(e: Conv, x: np.ndarray) -> np.ndarray:
    """The whole result of PyTorch's operator, of which padding drops some and negative padding adds zeros."""
    torch = _torch()
    begin, end = e.padding
    batch = x.shape[: x.ndim - e.spatial - 1]
    convolve = getattr(torch.nn.functional, f"conv_transpose{e.spatial}d")
    images = torch.from_numpy(x.reshape(-1, *x.shape[len(batch) :]))
    weight = torch.from_numpy(_in_out(e))
    whole = convolve(images, weight, None, stride=e.stride, dilation=e.dilation, groups=e.groups)
    pads = [-n for pair in zip(reversed(begin), reversed(end), strict=True) for n in pair]
    y = torch.nn.functional.pad(whole, pads).numpy() + _column(e.bias_or_zero, e.axis)
    return y.reshape(*batch, *y.shape[1:])


def _in_out(e: Conv) -> np.ndarray:
    """The weight of a transposed convolution as ONNX and PyTorch keep it: (in, out / groups, *kernel)."""
    return np.concatenate([part.swapaxes(0, 1) for part in np.split(e.weight, e.groups)])


def _output_padding(e: Conv) -> tuple[int, ...]:
    """Results that a transposed convolution drops before and not after."""
    begin, end = e.padding
    assert all(b >= n and b >= 0 for b, n in zip(begin, end, strict=True)), "no host graph can drop more after"
    return tuple(b - n for b, n in zip(begin, end, strict=True))


def _target(e: Layout, shape: Sequence[int]) -> list[int]:
    """The target of a reshape: numbers, sizes that keep their place, and one -1 at most."""
    assert isinstance(e.op, Reshape)
    kept = [at < len(e.op.before) and dim == e.op.before[at] for at, dim in enumerate(e.op.after)]
    rests = [dim.known is None and not kept[at] for at, dim in enumerate(e.op.after)]
    assert sum(rests) <= 1, "a reshape with two unknown sizes"
    return [-1 if rests[at] else shape[at] if dim.known is None else dim.known for at, dim in enumerate(e.op.after)]


def _torch() -> Any:
    import torch

    torch.set_num_threads(1)  # the arrays are small: threads would only wait for one another
    return torch


# ONNX


def value_infos(shapes: Mapping[str, Sequence[int | str]], dtype: int = TensorProto.FLOAT) -> list[Any]:
    return [helper.make_tensor_value_info(name, dtype, shape) for name, shape in shapes.items()]


def to_onnx(root: Expr, sizes: Sequence[int] | None = None) -> ModelProto:
    """``root`` as a float32 model; the sizes of its inputs stay symbols where none are given.

    Its output is ``y``, or ``y_`` if a source has that name.
    """
    builder = _OnnxBuilder(root)
    declared = {}
    for s, shape in source_shapes(root, sizes or EXTENTS[0]).items():
        unsaid = ["N", shape[1], *(f"{axis}_{s.key}" for axis in "HWD")]
        symbols = [str(d) if d.known is None else d.factor for d in s.shape] if s.shape else unsaid
        declared[str(s.key)] = list(shape) if sizes else symbols[: len(shape)]
    graph = helper.make_graph(
        builder.nodes,
        "expression",
        value_infos(declared),
        [helper.make_empty_tensor_value_info(builder.output)],
        builder.tensors,
    )
    graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    for _ in range(builder.ranks[root]):
        graph.output[0].type.tensor_type.shape.dim.add()
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class _OnnxBuilder:
    def __init__(self, root: Expr) -> None:
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        self.names: dict[Expr, str] = {}
        self.ranks = axes(root)
        order = list(walk(root))
        self.output = "y_" if any(isinstance(e, Source) and e.key == "y" for e in order) else "y"
        absorbed = _subtracted(order)
        for e in order:
            x = self.names.get(e.children[0]) if e.children else None
            if isinstance(e, Source):
                self.names[e] = str(e.key)
            elif e in absorbed:
                self.names[e] = self.names[e.children[0]]  # the sum subtracts
            else:
                self._emit(e, x or "", absorbed, self.output if e is root else f"v{len(self.names)}")

    def _emit(self, e: Expr, x: str, absorbed: set[Expr], out: str) -> None:
        self.names[e] = out
        match e:
            case Conv(transposed=True):
                inputs = [x, self._tensor(_in_out(e))] + ([self._tensor(e.bias)] if e.bias is not None else [])
                extra = _output_padding(e)
                self._node(
                    "ConvTranspose", inputs, out, kernel_shape=e.kernel, strides=e.stride, dilations=e.dilation,
                    pads=e.padding[0] * 2, output_padding=extra, group=e.groups,
                )  # fmt: skip
            case Conv() if (cut := cut_by(e)) is not None:
                ends = [2**40 if s.stop is None else s.stop for s in cut]
                bounds = ([s.start or 0 for s in cut], ends, range(2, 2 + len(cut)), e.stride)
                self._node("Slice", [x, *(self._integers(*b) for b in bounds)], out)
            case Conv() if e.spatial:
                begin, end = e.padding
                inputs = [x, self._tensor(e.weight)] + ([self._tensor(e.bias)] if e.bias is not None else [])
                self._node(
                    "Conv", inputs, out, kernel_shape=e.kernel, strides=e.stride, dilations=e.dilation,
                    pads=(*begin, *end), group=e.groups,
                )  # fmt: skip
            case Conv() if self.ranks[e] == 2:
                weight = self._tensor(regroup(e, 1))
                inputs = [x, weight] + ([self._tensor(e.bias)] if e.bias is not None else [])
                self._node("Gemm", inputs, out, transB=1)
            case Conv():
                self._node("MatMul", [x, self._tensor(regroup(e, 1).T)], out if e.bias is None else f"{out}_product")
                if e.bias is not None:
                    self._node("Add", [f"{out}_product", self._tensor(e.bias)], out)
            case Scale() if _is_negation(e):
                self._node("Neg", [x], out)
            case Scale():
                shifted, scaled = bool(np.any(e.shift)), bool(np.any(e.scale != 1))
                if scaled or not shifted:
                    y = f"{out}_product" if shifted else out
                    self._node("Mul", [x, self._tensor(_column(e.scale, e.axis))], y)
                    x = y
                if shifted:
                    self._node("Add", [x, self._tensor(_column(e.shift, e.axis))], out)
            case BatchNorm():
                assert e.axis == -1 - max(self.ranks[e] - 2, 0), "ONNX normalises axis 1 only"
                tensors = [self._tensor(v) for v in (e.gamma, e.beta, e.mean, e.var)]
                self._node("BatchNormalization", [x, *tensors], out, epsilon=e.eps)
            case Sum():
                y = self.names[e.terms[0]]
                for n, t in enumerate(e.terms[1:], 2):
                    after = out if n == len(e.terms) else f"{out}_{n}"
                    self._node("Sub" if t in absorbed else "Add", [y, self.names[t]], after)
                    y = after
            case Concat():
                self._node("Concat", [self.names[t] for t in e.terms], out, axis=self.ranks[e] + e.axis)
            case Select():
                self._select(e, x, out)
            case Layout() if isinstance(e.op, Permute):
                self._node("Transpose", [x], out, perm=e.op.axes)
            case Layout(op=Mean(rank=rank, axes=over, keep=True)) if over == tuple(range(2, rank)):
                self._node("GlobalAveragePool", [x], out)
            case Layout() if isinstance(e.op, Mean):
                self._node("ReduceMean", [x], out, axes=e.op.axes, keepdims=int(e.op.keep))
            case Layout() if isinstance(e.op, Resize):
                scales = np.array([1, 1, *map(float, e.op.scales)], np.float32)
                self.tensors.append(numpy_helper.from_array(scales, f"{out}_scales"))
                options = {
                    "mode": e.op.mode,
                    "coordinate_transformation_mode": e.op.place,
                    "nearest_mode": e.op.rounding,
                }
                self._node("Resize", [x, "", f"{out}_scales"], out, **options)
            case Layout() if isinstance(e.op, Spread):
                order = {} if e.op.back else {"mode": "DCR" if e.op.outer else "CRD"}
                kind = "SpaceToDepth" if e.op.back else "DepthToSpace"
                self._node(kind, [x], out, blocksize=e.op.block, **order)
            case Layout() if isinstance(e.op, Take):
                self.tensors.append(numpy_helper.from_array(np.array(e.op.at, np.int64), f"{out}_at"))
                self._node("Gather", [x, f"{out}_at"], out, axis=e.op.axis)
            case Layout():
                assert isinstance(e.op, Reshape)
                target = _target(e, [0] * len(e.op.before))
                self.tensors.append(numpy_helper.from_array(np.array(target, np.int64), f"{out}_shape"))
                self._node("Reshape", [x, f"{out}_shape"], out)

    def _select(self, e: Select, x: str, out: str) -> None:
        axis = self.ranks[e] + e.axis
        if e.index == tuple(range(e.index[0], e.index[-1] + 1)):
            bounds = [self._integers(n) for n in (e.index[0], e.index[-1] + 1, axis)]
            self._node("Slice", [x, *bounds], out)
        else:
            self._node("Gather", [x, self._integers(*e.index)], out, axis=axis)

    def _integers(self, *values: int) -> str:
        name = f"p{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def _node(self, op: str, inputs: list[str], out: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, inputs, [out], f"{op}_{out}", **attributes))

    def _tensor(self, array: np.ndarray) -> str:
        name = f"p{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(array, np.float32, order="C"), name))
        return name


def _is_negation(e: Expr) -> bool:
    return isinstance(e, Scale) and not e.scale.ndim and e.scale == -1 and not np.any(e.shift)


def _subtracted(order: Sequence[Expr]) -> set[Expr]:
    """The negations that a sum carries out: they come after its first term, and only there."""
    readers = Counter(c for e in order for c in e.children)
    return {t for e in order if isinstance(e, Sum) for t in e.terms[1:] if _is_negation(t) and readers[t] == 1}


def run(model: ModelProto, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of ``model`` in ONNX Runtime, which is kept from changing it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(y) for y in session.run(None, dict(inputs))]


def operators(model: ModelProto) -> Counter[str]:
    """How many operators of each kind; operators that say the same in several ways count as one kind."""
    kinds = {"Sub": "Add", "Sum": "Add", "Slice": "Select", "Gather": "Select", "Split": "Select"}
    return Counter(
        kinds.get(n.op_type, n.op_type) for n in model.graph.node if n.op_type not in ("Constant", "Identity")
    )


# torch


def to_module(root: Expr) -> Any:
    """``root`` as a float64 module in eval mode, one argument per source."""
    torch = _torch()

    class Expression(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleDict()
            for at, e in enumerate(order):
                if isinstance(e, Conv | BatchNorm):
                    self.layers[str(at)] = _layer(e)
                elif isinstance(e, Scale):
                    for kind, v in (("scale", e.scale), ("shift", e.shift)):
                        self.register_buffer(f"{kind}{at}", torch.from_numpy(np.array(_column(v, e.axis))))
                elif isinstance(e, Select):
                    self.register_buffer(f"index{at}", torch.tensor(e.index))

        def step(self, at: int, values: dict[Expr, Any]) -> Any:
            e = order[at]
            match e:
                case Conv() if (cut := cut_by(e)) is not None:
                    return values[e.x][(..., *cut)]
                case Conv() | BatchNorm():
                    return self.layers[str(at)](values[e.x])
                case Scale() if _is_negation(e):
                    return -values[e.x]
                case Scale():
                    y = values[e.x]
                    if np.any(e.scale != 1):
                        y = y * getattr(self, f"scale{at}")
                    return y + getattr(self, f"shift{at}") if np.any(e.shift) else y
                case Sum():
                    y = values[e.terms[0]]
                    for t in e.terms[1:]:
                        y = y - values[t.children[0]] if t in absorbed else y + values[t]
                    return y
                case Concat():
                    return torch.cat([values[t] for t in e.terms], e.axis)
                case Select():
                    whole, axis = values[e.x], e.axis
                    if e.index == tuple(range(e.index[0], e.index[-1] + 1)):
                        return whole.narrow(axis, e.index[0], len(e.index))
                    return whole.index_select(axis, getattr(self, f"index{at}"))
                case Layout() if isinstance(e.op, Permute):
                    return values[e.x].permute(e.op.axes)
                case Layout() if isinstance(e.op, Mean):
                    return values[e.x].mean(e.op.axes, e.op.keep)
                case Layout() if isinstance(e.op, Resize):
                    return _interpolated(values[e.x], e.op)
                case Layout() if isinstance(e.op, Spread):
                    return _shuffled(values[e.x], e.op)
                case Layout() if isinstance(e.op, Take):
                    return values[e.x].select(e.op.axis, e.op.at)
                case Layout():
                    return values[e.x].reshape(_target(e, values[e.x].shape))

        def evaluate(self, *operands: Any) -> Any:
            values: dict[Expr, Any] = dict(zip(sources(root), operands, strict=True))
            for at, e in enumerate(order):
                if e not in values and e not in absorbed:
                    values[e] = self.step(at, values)
            return values[root]

    order = list(walk(root))
    absorbed = _subtracted(order)
    # Tracing wants named arguments.
    names = ", ".join(f"a{n}" for n in range(len(sources(root))))
    scope: dict[str, Any] = {}
    exec(f"def forward(self, {names}): return self.evaluate({names})", scope)
    Expression.forward = scope["forward"]
    return Expression().double().eval()


def _layer(e: Conv | BatchNorm) -> Any:
    torch = _torch()
    nn = torch.nn
    with torch.no_grad():
        if isinstance(e, BatchNorm):
            layer = getattr(nn, f"BatchNorm{max(-1 - e.axis, 1)}d")(e.gamma.size, eps=e.eps).double()
            for mine, given in zip(
                (layer.weight, layer.bias, layer.running_mean, layer.running_var),
                (e.gamma, e.beta, e.mean, e.var),
                strict=True,
            ):
                mine.copy_(torch.from_numpy(given))
            return layer
        begin, end = e.padding
        if e.spatial == 0:
            layer = nn.Linear(e.in_channels, e.out_channels, bias=e.bias is not None).double()
        elif e.transposed:
            layer = getattr(nn, f"ConvTranspose{e.spatial}d")(
                e.in_channels, e.out_channels, e.kernel, e.stride, e.padding[0], _output_padding(e), e.groups,
                bias=e.bias is not None, dilation=e.dilation,
            ).double()  # fmt: skip
        else:
            layer = getattr(nn, f"Conv{e.spatial}d")(
                e.in_channels, e.out_channels, e.kernel, e.stride, begin if begin == end else 0, e.dilation, e.groups,
                bias=e.bias is not None,
            ).double()  # fmt: skip
        weight = _in_out(e) if e.transposed else np.ascontiguousarray(e.weight)
        layer.weight.copy_(torch.from_numpy(weight))
        if e.bias is not None:
            layer.bias.copy_(torch.from_numpy(e.bias))
        if e.spatial and not e.transposed and begin != end:
            pads = [n for pair in zip(reversed(begin), reversed(end), strict=True) for n in pair]
            pad = getattr(nn, f"ConstantPad{e.spatial}d")(pads, 0.0)
            return nn.Sequential(pad, layer)
        return layer
