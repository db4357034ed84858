"""Expressions as ONNX nodes: splices are carried out in a copy of a model."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from itertools import zip_longest
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from reparamc.algebra.arrays import Parameter, as_stored
from reparamc.algebra.expr import (
    ONE,
    Array,
    BatchNorm,
    Concat,
    Conv,
    Expr,
    Ints,
    Layout,
    LayoutOp,
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
    is_negation,
    ranks,
)
from reparamc.algebra.kernels import regroup, swap_sides
from reparamc.algebra.shape import sizes_after
from reparamc.compiler.emit import Emission
from reparamc.compiler.graph import Splice
from reparamc.onnx import taps
from reparamc.onnx.facts import Facts, results_of
from reparamc.onnx.sizes import Sizes, answered
from reparamc.onnx.values import Names, commit, defined_names
from reparamc.onnx.weights import tensor


class OnnxEdit:
    """A copy of a model in which splices are carried out. The graph that it is made of stays as it is.

    Attributes:
        names: all that are taken.
        emitted: what has been emitted so far, for other splices that share it.
        slices: those that were emitted, by operand and axis: bounds, and the node that lacks them.
    """

    def __init__(self, graph: Facts, sizes: Sizes) -> None:
        self.model = ModelProto()
        self.model.CopyFrom(graph.model)
        self.facts, self.sizes = graph, sizes
        self.names = Names(defined_names(self.model.graph))
        self.emitted: MutableMapping[Expr, str] = WeakKeyDictionary()
        self.slices: dict[tuple[str, int], list[tuple[Ints, NodeProto]]] = {}
        self._inserted: dict[str, list[NodeProto]] = {}
        self._initializers: list[TensorProto] = []
        self._replaced: set[str] = set()
        self._suspects: set[str] = set()
        self._narrowed: set[str] = set()

    def carry_out(self, splices: Iterable[Splice]) -> ModelProto:
        """The copy with ``splices`` in it, in one edit, and without what is dead then."""
        for splice in splices:
            self._splice(splice)
        self._finish()
        return self.model

    def _splice(self, splice: Splice) -> None:
        root = str(splice.root)
        self._inserted[root] = _Emitter(self, splice, root).run()
        self._replaced.add(root)
        self._suspects.update(str(v) for v in splice.members)
        self._narrowed.update(map(str, splice.narrows))

    def add_initializer(self, wanted: str, array: Array, dtype: np.dtype) -> str:
        name = self.names.fresh(wanted)
        self._initializers.append(tensor(np.asarray(array, dtype), name))
        return name

    def add_copies(self, wanted: str, name: str, times: int) -> str:
        """Store a vector of that many copies of the number that is the constant ``name``, in its type."""
        array = np.repeat(self.facts.constants.array(name).ravel(), times)
        self._initializers.append(tensor(array, fresh := self.names.fresh(wanted)))
        return fresh

    def add_integers(self, wanted: str, values: Sequence[int]) -> str:
        return self.add_initializer(wanted, np.array(values), np.dtype(np.int64))

    def _finish(self) -> None:
        if not self._replaced:
            return
        self._complete_slices()
        nodes: list[NodeProto] = []
        for node in self.model.graph.node:
            roots = [name for name in node.output[:] if name in self._replaced]
            if not roots or any(name not in self._replaced for name in results_of(node)):
                nodes.append(self._without(node, roots))
            else:
                self._suspects.update(name for name in node.input[:] if name)
            for root in roots:
                nodes.extend(node for node in self._inserted[root] if node.output)
        used = {name for made in self._inserted.values() for node in made for name in node.input[:]}
        gone = self._suspects - self._replaced - used
        nodes, asked = answered(self.sizes, gone, nodes, self.names, self.add_integers)
        commit(self.model, nodes, self._initializers, self._suspects | asked, self._narrowed)

    def _complete_slices(self) -> None:
        """Give slices their bounds; those that cut a value into all its parts become one Split, the first of them."""
        for (x, axis), slices in self.slices.items():
            parts = sorted(slices, key=lambda part: part[0])
            starts, ends, widths = zip(*(bounds for bounds, _ in parts), strict=True)
            if len(parts) == 1 or (*starts, widths[0]) != (0, *ends):
                for (start, end, _), node in slices:
                    bounds = {"start": start, "end": end, "axis": axis}
                    node.input.extend(self.add_integers(f"{x}.{key}", [n]) for key, n in bounds.items())
                continue
            outputs, sizes = [node.output[0] for _, node in parts], [b - a for a, b in zip(starts, ends, strict=True)]
            for _, node in slices:
                del node.output[:]
            split = slices[0][1]
            split.op_type, split.name = "Split", self.names.fresh(f"{x}/fused_Split")
            split.output.extend(outputs)
            split.attribute.append(helper.make_attribute("axis", axis))
            if self.facts.opset < 13:
                split.attribute.append(helper.make_attribute("split", sizes))
            else:
                split.input.append(self.add_integers(f"{x}.split", sizes))

    def _without(self, node: NodeProto, roots: list[str]) -> NodeProto:
        """``node``, with outputs that something else computes now under names that nothing reads."""
        for i, name in enumerate(node.output):
            if name in roots:
                node.output[i] = self.names.fresh(f"{name}_unused")
        return node


def is_rows(e: Conv) -> bool:
    """Whether ``e`` is a product with a matrix from the left."""
    return e.spatial == 1 and e.is_pointwise


class _Emitter(Emission[str]):
    """The nodes that compute one splice."""

    def __init__(self, graph: OnnxEdit, splice: Splice, root: str) -> None:
        super().__init__(splice, {e: str(v) for e, v in splice.native.items()}, graph.emitted)
        self.graph, self.root, self.base = graph, root, str(splice.unit)
        self.nodes: list[NodeProto] = []
        self.note = f"reparamc: {', '.join(splice.counts)}"

    def run(self) -> list[NodeProto]:
        name = self.computed()
        if self.splice.expr in self.splice.native:
            self._node("Identity", [name], self.root)
        return self.nodes

    def _emit(self, e: Expr, top: bool) -> str:
        return self._emit_as(e, self.root if top else None)

    def _emit_as(self, e: Expr, output: str | None) -> str:
        match e:
            case Conv() if e.reads_taps:
                return taps.with_weight(self.graph.facts, e, self._parameter, self.graph.add_copies, self._node, output)
            case Conv() if e.is_weightless and (name := self._weightless(e, output)) is not None:
                return name
            case Conv() if is_rows(e) and (self._rank(e.x) != 3 or self.splice.dtype == np.float64):
                return self._rows(e, output)
            case Conv() if e.spatial:
                begin, end = e.padding
                weight = swap_sides(e.weight, e.groups) if e.transposed else e.weight
                inputs = [self.value(e.x), self._parameter("weight", weight)]
                inputs += [self._parameter("bias", e.bias)] if e.bias is not None else []
                attributes: dict[str, Any] = {
                    "kernel_shape": e.kernel, "strides": e.stride, "dilations": e.dilation,
                    "pads": (*begin, *end), "group": e.groups,
                }  # fmt: skip
                if e.transposed:
                    attributes["output_padding"] = tuple(max(-p, 0) for p in end)
                    attributes["pads"] = (*begin, *(max(p, 0) for p in end))
                return self._node("ConvTranspose" if e.transposed else "Conv", inputs, output, **attributes)
            case Conv():
                return self._linear(e, output)
            case Scale():
                return self._scale(e, output)
            case BatchNorm():
                arrays = {"scale": e.gamma, "bias": e.beta, "mean": e.mean, "var": e.var}
                inputs = [self.value(e.x), *(self._parameter(kind, a) for kind, a in arrays.items())]
                return self._node("BatchNormalization", inputs, output, epsilon=e.eps)
            case Sum():
                return self._sum(e, output)
            case Concat():
                return self._node("Concat", [self.value(t) for t in e.terms], output, axis=self._axis(e))
            case Select():
                return self._select(e, output)
            case Layout(op=Spread(back=True) as op):
                return self._space_to_depth(e.x, op, output)
            case Layout():
                return self._layout(self.value(e.x), e.op, output)
            case _:
                raise AssertionError(f"{type(e).__name__} is never emitted")

    def _layout(self, x: str, op: LayoutOp, output: str | None) -> str:
        match op:
            case Permute(axes=axes):
                return self._node("Transpose", [x], output, perm=axes)
            case Take(axis=axis, at=at):
                index = self.graph.add_initializer(f"{self.base}.index", np.array(at), np.dtype(np.int64))
                return self._node("Gather", [x, index], output, axis=axis)
            case Mean():
                return self._mean(x, op, output)
            case Resize():
                return self._resize(x, op, output)
            case Spread(block=block):
                order = {"mode": "DCR" if op.outer else "CRD"} if self.graph.facts.opset >= 11 else {}
                return self._node("DepthToSpace", [x], output, blocksize=block, **order)
            case Reshape():
                return self._reshape(x, op, output)

    def _space_to_depth(self, x: Expr, op: Spread, output: str | None) -> str:
        """ONNX puts the channels of one position apart; a selection puts them side by side."""
        apart = self._node("SpaceToDepth", [self.value(x)], output if op.outer else None, blocksize=op.block)
        if op.outer:
            return apart
        made = self.graph.facts.types.shape(str(op.native))
        assert made is not None, "it is read where its shape is known"
        order = np.arange(made[1].factor).reshape(op.block**2, -1).T.ravel()
        index = self.graph.add_integers(f"{self.base}.index", order.tolist())
        return self._node("Gather", [apart, index], output, axis=1)

    def _weightless(self, e: Conv, output: str | None) -> str | None:
        """A padding and a slice, or a pooling; None where this opset, or ONNX Runtime, has none like it."""
        begin, end = e.padding
        x, opset = self.value(e.x), self.graph.facts.opset
        if any(k != 1 for k in e.kernel):
            too_wide = any(p >= k for p, k in zip((*begin, *end), (*e.kernel, *e.kernel), strict=True))
            padded, spread = any((*begin, *end)), any(d != 1 for d in e.dilation)
            if e.skips_border or too_wide or (padded and opset < 7) or (spread and opset < 19):
                return None
            attributes: dict[str, Any] = {"kernel_shape": e.kernel, "strides": e.stride}
            attributes |= {"pads": (*begin, *end), "count_include_pad": 1} if padded else {}
            attributes |= {"dilations": e.dilation} if spread else {}
            return self._node("AveragePool", [x], output, **attributes)
        cut = [max(0, -p) for p in begin], [max(0, -p) for p in end]
        slices = any(cut[0]) or any(cut[1]) or any(s != 1 for s in e.stride)
        if slices and opset < 10:
            return None
        if any(p > 0 for p in (*begin, *end)):
            x = self._pad(x, begin, end, None if slices else output)
        return self._slice(x, *cut, e.stride, output) if slices else x

    def _pad(self, x: str, begin: Ints, end: Ints, output: str | None) -> str:
        pads = [0, 0, *(max(p, 0) for p in begin), 0, 0, *(max(p, 0) for p in end)]
        if self.graph.facts.opset < 11:
            return self._node("Pad", [x], output, pads=pads)
        return self._node("Pad", [x, self.graph.add_integers(f"{self.base}.pads", pads)], output)

    def _slice(self, x: str, begin: Sequence[int], end: Sequence[int], steps: Ints, output: str | None) -> str:
        bounds = {
            "starts": begin,
            "ends": [-n or np.iinfo(np.int64).max for n in end],
            "axes": range(2, 2 + len(steps)),
            "steps": steps,
        }
        names = [self.graph.add_integers(f"{self.base}.{key}", [*values]) for key, values in bounds.items()]
        return self._node("Slice", [x, *names], output)

    def _mean(self, x: str, op: Mean, output: str | None) -> str:
        if op.keep and op.rank > 2 and op.axes == tuple(range(2, op.rank)) and self.splice.dtype != np.float64:
            return self._node("GlobalAveragePool", [x], output)
        if self.graph.facts.opset < 18:
            return self._node("ReduceMean", [x], output, axes=op.axes, keepdims=int(op.keep))
        axes = self.graph.add_integers(f"{self.base}.axes", op.axes)
        return self._node("ReduceMean", [x, axes], output, keepdims=int(op.keep))

    def _resize(self, x: str, op: Resize, output: str | None) -> str:
        scales = np.array([1, 1, *map(float, op.scales)])
        names = [self.graph.add_initializer(f"{self.base}.scales", scales, np.dtype(np.float32))]
        if self.graph.facts.opset < 11:
            kind = "Resize" if self.graph.facts.opset == 10 else "Upsample"
            return self._node(kind, [x, *names], output, mode=op.mode)
        attributes: dict[str, Any] = {"mode": op.mode, "coordinate_transformation_mode": op.place}
        attributes |= {"nearest_mode": op.rounding} if op.mode == "nearest" else {}
        attributes |= {"cubic_coeff_a": op.cubic} if op.mode == "cubic" else {}
        if self.graph.facts.opset < 13:  # then a region of interest has to be there, if empty
            names = [self.graph.add_initializer(f"{self.base}.roi", np.zeros(0), np.dtype(np.float32)), *names]
        else:
            names = ["", *names]
        return self._node("Resize", [x, *names], output, **attributes)

    def _reshape(self, x: str, op: Reshape, output: str | None) -> str:
        node = self.graph.facts.producers.get(str(op.native))
        if node is not None and self.graph.facts.reshapes(node) == op:
            copy = NodeProto.FromString(node.SerializeToString())
            copy.name = self.graph.names.fresh(f"{node.name}/fused") if node.name else ""
            copy.input[0] = x
            copy.output[0] = output or self.graph.names.fresh(f"{op.native}_fused")
            self.nodes.append(copy)
            return copy.output[0]
        sizes = sizes_after(op.before, op.after)
        assert sizes is not None, f"the sizes of {op} are not told by its operand"
        if self.graph.facts.opset < 5:
            return self._node("Reshape", [x], output, shape=sizes)
        return self._node("Reshape", [x, self.graph.add_integers(f"{self.base}.shape", sizes)], output)

    def _axis(self, e: Concat | Select) -> int:
        """The channel axis, from the left: early opsets know no other."""
        return (self._rank(e) or 0) + e.axis

    def _select(self, e: Select, output: str | None) -> str:
        x, axis, first, end = self.value(e.x), self._axis(e), e.index[0], e.index[-1] + 1
        if e.index != tuple(range(first, end)) or self.graph.facts.opset < 10:
            index = self.graph.add_integers(f"{self.base}.index", e.index)
            return self._node("Gather", [x, index], output, axis=axis)
        name = self._node("Slice", [x], output)  # its bounds follow when all slices are known
        self.graph.slices.setdefault((x, axis), []).append(((first, end, e.width), self.nodes[-1]))
        return name

    def _rows(self, e: Conv, output: str | None) -> str:
        inputs = [self._parameter("weight", regroup(e, 1)[..., 0]), self.value(e.x)]
        if e.bias is None:
            return self._node("MatMul", inputs, output)
        return self._node("Add", [self._node("MatMul", inputs, None), self._parameter("bias", e.bias[:, None])], output)

    def _linear(self, e: Conv, output: str | None) -> str:
        x = self.value(e.x)
        weight = regroup(e, 1)
        if self._rank(e.x) == 2 and (e.bias is not None or self.graph.facts.opset >= 11):
            inputs = [x, self._parameter("weight", weight)]
            inputs += [self._parameter("bias", e.bias)] if e.bias is not None else []
            return self._node("Gemm", inputs, output, transB=1)
        inputs = [x, self._parameter("weight", as_stored(weight).T)]
        if e.bias is None:
            return self._node("MatMul", inputs, output)
        return self._node("Add", [self._node("MatMul", inputs, None), self._parameter("bias", e.bias)], output)

    def _scale(self, e: Scale, output: str | None) -> str:
        if is_negation(e):
            return self._node("Neg", [self.value(e.x)], output)
        ones = (1,) * (-1 - (e.axis or -1))
        factor = (
            self._parameter("scale", e.scale.reshape(-1, *ones) if e.scale.ndim else e.scale)
            if np.any(e.scale != 1)
            else None
        )
        term = (
            self._parameter("shift", e.shift.reshape(-1, *ones) if e.shift.ndim else e.shift)
            if np.any(e.shift)
            else None
        )
        y = self.value(e.x)
        if factor or not term:
            y = self._node("Mul", [y, factor or self._parameter("scale", ONE)], None if term else output)
        return self._node("Add", [y, term], output) if term else y

    def _sum(self, e: Sum, output: str | None) -> str:
        (first, _), *others = self.addends(e)
        y = self.value(first)
        for (t, subtracted), after in zip_longest(others, others[1:]):
            y = self._node("Sub" if subtracted else "Add", [y, self.value(t)], None if after else output)
        return y

    def _rank(self, e: Expr) -> int | None:
        while True:
            match e:
                case Source():
                    return self.graph.facts.types.rank(str(e.key))
                case Layout(op=op):
                    return ranks(op)[1]
                case _:
                    e = e.children[0]

    def _parameter(self, kind: str, array: Array) -> str:
        if isinstance(array, Parameter) and array.names and self.graph.facts.is_stored(array, self.splice.dtype):
            return array.names[0]
        name = self.graph.add_initializer(f"{self.base}.{kind}", as_stored(array), self.splice.dtype)
        self.record(name)
        return name

    def _node(self, op: str, inputs: list[str], output: str | None, **attributes: Any) -> str:
        output = output or self.graph.names.fresh(f"{self.base}_{op.lower()}")
        name = self.graph.names.fresh(f"{self.base}/fused_{op}")
        attributes = {key: value for key, value in attributes.items() if value not in ((), [])}  # axes of a number
        node = helper.make_node(op, inputs, [output], name, doc_string=self.note, **attributes)
        if (origin := self._origin(op)) is not None:
            node.metadata_props.extend(origin.metadata_props)
            node.doc_string = "\n".join(filter(None, (self.note, origin.doc_string)))
        self.nodes.append(node)
        return output

    def _origin(self, op: str) -> NodeProto | None:
        """The node that a new one says it is from: the last of the same operator in the region, or its root."""
        members = [self.graph.facts.producers[str(v)] for v in self.splice.members]
        return next((node for node in reversed(members) if node.op_type == op), members[-1] if members else None)
