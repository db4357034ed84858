"""Faults in the readers and the emitter of ONNX, and in what they know of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from fault_makers import (
    UNCHECKED_PROBE,
    geometry,
    node_of_inputs,
    node_with,
    operands_written,
    reading,
    written,
)
from fault_models import MATRIX, ROWS, TOKENS, conv, node, norm_of, numbers, onnx_model, square, statistics, with_norm
from onnx import ModelProto, TensorProto, helper, numpy_helper
from planting import Make, fault, given, instead, result

from reparamc.algebra.expr import Concat, Conv, Layout, Permute, Source, Sum
from reparamc.algebra.shape import Dim
from reparamc.onnx.values import Constant

READ, EMIT = "reparamc.onnx.operators:_read_", "reparamc.onnx.emit:_Emitter."


def pairs_per_axis(e: Conv) -> Conv:
    begin, end = e.padding
    flat = (*begin, *end)
    return geometry(e, begin=flat[0::2], end=flat[1::2])


def turned(e: Any) -> Any:
    """``a - b`` as ``b - a``."""
    if not isinstance(e, Sum):
        return e
    a, b = cast("tuple[Any, Any]", e.terms)
    return Sum((replace(b, x=a), b.x))


def in_other_order(e: Concat) -> Concat:
    return replace(e, terms=e.terms[::-1], sizes=e.sizes[::-1])


def of_everything(original: Any) -> Any:
    """Every initializer is a constant, those that a caller may set included."""

    def init(self: Any, model: ModelProto) -> None:
        original(self, model)
        self.known.update((t.name, Constant.of(t)) for t in model.graph.initializer)

    return init


def also_linear(*ops: str) -> Make:
    """For `OnnxGraph.moves`: operators that are not linear."""

    def make(original: Any) -> Any:
        def moves(self: Any, value: Any) -> Any:
            found = self.producers[str(value)]
            return (found.input[0],) if found.op_type in ops else original(self, value)

        return moves

    return make


ONNX_READERS = [
    fault(
        "padding: end before begin", f"{READ}conv",
        reading(lambda e: geometry(e, begin=e.padding[1], end=e.padding[0])),
        onnx=lambda: with_norm(conv("x", "c", pads=[0, 2, 2, 0]), square()),
    ),
    fault(
        "padding: pairs per axis", f"{READ}conv", reading(pairs_per_axis),
        onnx=lambda: with_norm(conv("x", "c", pads=[0, 1, 2, 3]), square()),
    ),
    fault(
        "stride ignored", f"{READ}conv", node_with(strides=None),
        onnx=lambda: with_norm(conv("x", "c", strides=[2, 1]), square()),
    ),
    fault(
        "dilation ignored", f"{READ}conv", node_with(dilations=None),
        onnx=lambda: with_norm(conv("x", "c", dilations=[2, 2], pads=[2] * 4), square()),
    ),
    fault(
        "bias of a convolution forgotten", f"{READ}conv", reading(lambda e: replace(e, bias=None)),
        onnx=lambda: with_norm(node("Conv", "x w c0", "c"), {**square(), "c0": numbers(4)}),
    ),
    fault(
        "SAME_LOWER read as SAME_UPPER", f"{READ}conv", node_with(auto_pad="SAME_UPPER"),
        onnx=lambda: with_norm(conv("x", "c", auto_pad="SAME_LOWER"), {"w": numbers(4, 4, 2, 2)}),
    ),
    fault(
        "output_padding ignored", f"{READ}conv_transpose", node_with(output_padding=None),
        onnx=lambda: with_norm(
            node("ConvTranspose", "x w", "c", strides=[2, 2], pads=[1] * 4, output_padding=[1, 0]), square()
        ),
    ),
    fault(
        "another default epsilon", f"{READ}batchnorm", reading(lambda e: replace(e, eps=1e-3)),
        onnx=lambda: onnx_model([conv("x", "c"), norm_of("c")], {**square(), **statistics(variance=1e-3)}),
    ),
    fault(
        "epsilon overlooked", f"{READ}batchnorm", node_with(epsilon=None),
        onnx=lambda: onnx_model(
            [conv("x", "c"), node("BatchNormalization", "c g b m v", "y", epsilon=0.1)], {**square(), **statistics()}
        ),
    ),
    fault(
        "mean and variance exchanged", f"{READ}batchnorm", reading(lambda e: replace(e, mean=e.var, var=e.mean)),
        onnx=lambda: onnx_model(
            [conv("x", "c"), norm_of("c")], {**square(), **statistics(), "m": np.abs(numbers(4, seed=2))}
        ),
    ),
    fault(
        "each channel repeated, instead of all of them", f"{READ}repeat",
        reading(lambda e: replace(e, index=tuple(sorted(e.index)))),
        onnx=lambda: onnx_model(
            [conv("x", "c"), node("Tile", "c t", "d"), conv("d", "y", "v")],
            {**square(), "t": np.array([1, 2, 1, 1]), "v": numbers(4, 8, 3, 3)},
        ),
    ),
    fault(
        "c / x read as x / c", f"{READ}arithmetic",
        node_of_inputs(lambda names: names[::-1] if names[0] == "s" else names),
        onnx=lambda: onnx_model([conv("x", "c"), node("Div", "s c", "y")], {**square(), "s": numbers(4, 1, 1)}),
    ),
    fault(
        "a - b read as b - a", f"{READ}sum", reading(turned),
        onnx=lambda: onnx_model(
            [conv("x", "a"), conv("x", "b", "w2"), node("Sub", "a b", "y")],
            {**square(), "w2": numbers(4, 4, 3, 3, seed=1)}
        ),
    ),
    fault(
        "transB ignored", f"{READ}gemm", node_with(transB=None),
        onnx=lambda: with_norm(node("Gemm", "x w", "c", transB=1), MATRIX, shape=ROWS),
    ),
    fault(
        "alpha ignored", f"{READ}gemm", node_with(alpha=None),
        onnx=lambda: with_norm(node("Gemm", "x w", "c", alpha=0.5), MATRIX, shape=ROWS),
    ),
    fault(
        "beta ignored", f"{READ}gemm", node_with(beta=None),
        onnx=lambda: with_norm(node("Gemm", "x w c0", "c", beta=0.5), {**MATRIX, "c0": numbers(4)}, shape=ROWS),
    ),
    fault(
        "matrix not transposed", f"{READ}matmul", reading(lambda e: replace(e, weight=e.weight.swapaxes(0, 1))),
        onnx=lambda: onnx_model(
            [node("MatMul", "x w", "c"), node("Mul", "c s", "y")], {**MATRIX, "s": numbers(4)}, TOKENS
        ),
    ),
    fault(
        "matrix on the left transposed", f"{READ}matmul",
        reading(lambda e: replace(e, weight=e.weight.swapaxes(0, 1))),
        onnx=lambda: onnx_model(
            [node("MatMul", "w x", "c"), node("Mul", "c s", "y")], {**MATRIX, "s": numbers(4, 1)}, ("N", 4, "L")
        ),
    ),
    fault(
        "pooling that leaves the padding out", f"{READ}average_pool", node_with(count_include_pad=1),
        onnx=lambda: pooled(pads=[1] * 4, count_include_pad=0),
    ),
    fault(
        "pooling with ceil_mode", f"{READ}average_pool", node_with(ceil_mode=None),
        onnx=lambda: onnx_model(
            [
                node(
                    "AveragePool", "x", "p", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4, count_include_pad=1,
                    ceil_mode=1,
                ),
                conv("p", "y", group=4),
            ],
            {"w": numbers(4, 1, 1, 1)},
        ),
    ),
    fault(
        "divisor of a pooling", f"{READ}average_pool", reading(lambda e: replace(e, weight=1.5 * e.weight)),
        onnx=lambda: pooled(pads=[1] * 4, count_include_pad=1),
    ),
    fault(
        "pads of a Pad as pairs", f"{READ}pad", reading(pairs_per_axis),
        onnx=lambda: onnx_model(
            [node("Pad", "x p", "q"), conv("q", "y")], {**square(), "p": np.array([0, 0, 0, 0, 0, 0, 2, 2])}
        ),
    ),
    fault(
        "padding with another value than zero", f"{READ}pad", node_of_inputs(lambda names: names[:2]),
        onnx=lambda: onnx_model(
            [node("Pad", "x p one", "q"), conv("q", "y")],
            {**square(), "p": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "one": np.float32(1)},
        ),
    ),
    fault(
        "order of a concatenation", f"{READ}concat", reading(in_other_order),
        onnx=lambda: onnx_model(
            [conv("x", "a"), conv("x", "b", "w2"), node("Concat", "a b", "y", axis=1)],
            {**square(), "w2": numbers(3, 4, 3, 3)},
        ),
    ),
    fault(
        "pieces of a split", f"{READ}split", reading(lambda e: replace(e, index=tuple(range(len(e.index))))),
        onnx=lambda: onnx_model(
            [conv("x", "c"), node("Split", "c k", "a y", axis=1)], {**square(), "k": np.array([2, 2])}
        ),
    ),
    fault(
        "start of a slice", f"{READ}slice", reading(lambda e: replace(e, index=tuple(i - 1 for i in e.index))),
        onnx=lambda: sliced_channels(),
    ),
    fault(
        "order of a gather", f"{READ}gather", reading(lambda e: replace(e, index=tuple(sorted(e.index)))),
        onnx=lambda: onnx_model(
            [conv("x", "c"), node("Gather", "c i", "y", axis=1)], {**square(), "i": np.array([2, 0, 1])}
        ),
    ),
    fault(
        "a crop that starts at zero", f"{READ}slice", reading(lambda e: replace(e, offset=(0, 0))),
        onnx=lambda: onnx_model(
            [
                conv("x", "c", group=4), node("Slice", "x from to axes", "s"), node("Add", "c s", "y"),
            ],
            {
                "w": numbers(4, 1, 3, 3), "from": np.array([1, 1]), "to": np.array([-1, -1]), "axes": np.array([2, 3]),
            },
        ),
    ),
    fault(
        "channel shuffle read as nothing", "reparamc.onnx.operators:_shuffle",
        reading(lambda e: replace(e, index=tuple(sorted(e.index)))),
        onnx=lambda: onnx_model(
            [
                node("Reshape", "x s1", "a"), node("Transpose", "a", "b", perm=[0, 2, 1, 3, 4]),
                node("Reshape", "b s2", "c"), conv("c", "y"),
            ],
            {"w": numbers(4, 6, 3, 3), "s1": np.array([2, 2, 3, 5, 6]), "s2": np.array([2, 6, 5, 6])}, (2, 6, 5, 6),
        ),
    ),
    fault(
        "an input that a caller may set taken for a constant", "reparamc.onnx.values:Constants.__init__",
        of_everything,
        onnx=lambda: onnx_model([conv("x", "c"), norm_of("c")], {**square(), **statistics()}, overridable=["w"]),
    ),
    fault(
        "anything taken for linear", "reparamc.onnx.graph:OnnxGraph.moves", also_linear("Relu"), *UNCHECKED_PROBE,
        onnx=lambda: onnx_model([conv("x", "a"), node("Relu", "a", "b"), conv("b", "y")], square()),
    ),
    fault(
        "a map that differs from place to place", UNCHECKED_PROBE[0].where, UNCHECKED_PROBE[0].make,
        UNCHECKED_PROBE[1],
        onnx=lambda: onnx_model(
            [node("CumSum", "x axis", "a"), conv("a", "y", group=4)], {"w": numbers(4, 1, 3, 3), "axis": np.array(3)}
        ),
    ),
]  # fmt: skip


def pooled(**attributes: Any) -> ModelProto:
    """A pooling beside a convolution with which it merges."""
    pool = node("AveragePool", "x", "p", kernel_shape=[3, 3], **attributes)
    return onnx_model([pool, conv("x", "c", pads=[1] * 4), node("Add", "p c", "y")], square())


def sliced_channels() -> ModelProto:
    bounds = {"from": np.array([1]), "to": np.array([3]), "axis": np.array([1])}
    return onnx_model([conv("x", "c"), node("Slice", "c from to axis", "y")], {**square(), **bounds})


VALUES = "reparamc.onnx.values:"


def factor_only(original: Any) -> Any:
    """What a reshape tells of a size is its known factor, without the symbols."""

    def learn(self: Any, *args: Any) -> None:
        original(self, *args)
        self._products.update((symbol, Dim(dim.factor)) for symbol, dim in self._products.items())

    return learn


def reversed_list(found: Any) -> Any:
    return found[::-1] if isinstance(found, list) else found


def of_small_values(original: Any) -> Any:
    """Shape inference is told that no small constant is larger than 2."""

    def skeleton(model: ModelProto) -> ModelProto:
        light = original(model)
        for t in light.graph.initializer:
            t.CopyFrom(numpy_helper.from_array(np.minimum(numpy_helper.to_array(t), 2), t.name))
        return light

    return skeleton


ONNX_VALUES = [
    fault(
        "a size off by one", f"{VALUES}Types._shape",
        result(lambda shape: shape and tuple(Dim(8) if d == Dim(7) else d for d in shape)),
        onnx=lambda: with_norm(conv("x", "c", auto_pad="SAME_UPPER", strides=[2, 2]), square(), shape=("N", 4, 7, 7)),
    ),
    fault(
        "a dynamic size taken for its factor", f"{VALUES}Types._learn_product", factor_only,
        onnx=lambda: times_rows(),
    ),
    fault(
        "a symbol taken for a number", f"{VALUES}Types._open", result(lambda dim: Dim(2)), onnx=lambda: times_rows(),
    ),
    fault(
        "attributes in another order", f"{VALUES}attribute", result(reversed_list),
        onnx=lambda: with_norm(conv("x", "c", pads=[0, 1, 2, 3]), square()),
    ),
    fault(
        "another constant of the same size", f"{VALUES}Constants.array", result(abs),
        onnx=lambda: with_norm(conv("x", "c"), square()),
    ),
    fault(
        "a Constant without its sign", f"{VALUES}constant_tensor",
        result(lambda t: t and numpy_helper.from_array(np.abs(numpy_helper.to_array(t)))),
        onnx=lambda: onnx_model(
            [node("Constant", "", "s", value_float=-2.0), conv("x", "c"), node("Mul", "c s", "y")], square()
        ),
    ),
    fault(
        "small constants changed for shape inference", f"{VALUES}skeleton", of_small_values,
        onnx=lambda: times_rows((4, -1, 4), 2),
    ),
]  # fmt: skip
"""What the certificate knows by itself as well: it must not take the word of these."""


def times_rows(target: Sequence[int] = (-1, 2), batch: int | str = "N") -> ModelProto:
    """A map times the number of rows that a reshape gives it, and a convolution that folds."""
    nodes = [
        conv("x", "c"), norm_of("c", "n"), node("Reshape", "n to", "r"), node("Shape", "r", "s"),
        node("Gather", "s first", "p"), node("Cast", "p", "f", to=TensorProto.FLOAT), node("Mul", "r f", "y"),
    ]  # fmt: skip
    constants = {"to": np.array(target), "first": np.array(0)}
    return onnx_model(nodes, {**square(), **statistics(), **constants}, (batch, 4, 4, 4))


def written_as(change: Any) -> Make:
    """For `_Emitter._emit`, `_linear` and the like: another expression is written."""
    return given(lambda self, e, *more: (self, change(e), *more))


def parameter(*kinds: str, change: Any) -> Make:
    """For `_Emitter._parameter`: tensors of these ``kinds`` are written otherwise."""
    return given(lambda self, kind, array: (self, kind, change(array) if kind in kinds else array))


def exchanged(original: Any) -> Any:
    """The first two operands of a splice under each other's names."""

    def init(self: Any, *args: Any) -> None:
        original(self, *args)
        two = [e for e in self.values if isinstance(e, Source)][:2]
        self.values.update(zip(two, [self.values[e] for e in reversed(two)], strict=True))

    return init


def of_old_operand(original: Any) -> Any:
    def reshape(self: Any, x: str, op: Any, output: str | None) -> str:
        return original(self, self.graph.facts.producers[str(op.native)].input[0], op, output)

    return reshape


def turned_back(original: Any) -> Any:
    """A permutation is written as its inverse."""

    def emit(self: Any, e: Any, top: bool) -> str:
        op = e.op if isinstance(e, Layout) else None
        return original(self, replace(e, op=Permute(tuple(np.argsort(op.axes)))) if isinstance(op, Permute) else e, top)

    return emit


def overwritten(original: Any) -> Any:
    """A parameter takes the place of an old one of the same shape."""

    def write(self: Any, kind: str, array: Any) -> str:
        for t in self.graph.model.graph.initializer:
            if t.name in self.splice.parameters and tuple(t.dims) == array.shape:
                t.CopyFrom(numpy_helper.from_array(array.astype(self.splice.dtype), t.name))
                return t.name
        return original(self, kind, array)

    return write


def not_taken(original: Any) -> Any:
    def fresh(self: Any, wanted: str) -> str:
        name = original(self, wanted)
        self.taken.discard(name)
        return name

    return fresh


def under_other_names(original: Any) -> Any:
    def finish(self: Any) -> None:
        roots = [*self._inserted]
        for root, other in zip(roots, reversed(roots), strict=True):
            self._inserted[root][-1].output[0] = other
        original(self)

    return finish


ONNX_WRITERS = [
    fault(
        "a subtraction turned round", f"{EMIT}_node", operands_written("Sub", change=lambda names: names[::-1]),
        onnx=lambda: onnx_model(
            [node("Relu", "x", "u"), conv("x", "c", pads=[1] * 4), norm_of("c", "d"), node("Sub", "d u", "y")],
            {**square(), **statistics()},
        ),
    ),
    fault(
        "padding: end before begin", f"{EMIT}_node", written("Conv", pads=lambda pads: (*pads[2:], *pads[:2])),
        onnx=lambda: with_norm(conv("x", "c", pads=[0, 2, 2, 0]), square()),
    ),
    fault(
        "dilation not written", f"{EMIT}_node", written("Conv", dilations=lambda _: None),
        onnx=lambda: with_norm(conv("x", "c", dilations=[2, 2], pads=[2] * 4), square()),
    ),
    fault(
        "stride not written", f"{EMIT}_node", written("Conv", strides=lambda _: None),
        onnx=lambda: with_norm(conv("x", "c", strides=[2, 2]), square()),
    ),
    fault(
        "bias not written", f"{EMIT}_node", operands_written("Conv", change=lambda names: names[:2]),
        onnx=lambda: with_norm(conv("x", "c"), square()),
    ),
    fault(
        "output_padding not written", f"{EMIT}_node", written("ConvTranspose", output_padding=lambda _: None),
        onnx=lambda: with_norm(
            node("ConvTranspose", "x w", "c", strides=[2, 2], pads=[0] * 4, output_padding=[1, 0]), square()
        ),
    ),
    fault(
        "weight of a transposed convolution on the wrong axis", f"{EMIT}_emit",
        written_as(lambda e: replace(e, weight=e.weight.swapaxes(0, 1)) if getattr(e, "transposed", False) else e),
        onnx=lambda: with_norm(node("ConvTranspose", "x w", "c", strides=[2, 2]), square()),
    ),
    fault(
        "transB not written", f"{EMIT}_node", written("Gemm", transB=lambda _: None),
        onnx=lambda: with_norm(node("Gemm", "x w", "c"), MATRIX, shape=ROWS),
    ),
    fault(
        "matrix written as it is", f"{EMIT}_linear", written_as(lambda e: replace(e, weight=e.weight.T)),
        onnx=lambda: onnx_model(
            [node("MatMul", "x w", "c"), node("Mul", "c s", "y")], {**MATRIX, "s": numbers(4)}, TOKENS
        ),
    ),
    fault(
        "bias of rows along the columns", f"{EMIT}_parameter", parameter("bias", change=np.ravel),
        onnx=lambda: onnx_model(
            [node("MatMul", "w x", "c"), node("Mul", "c s", "d"), node("Add", "d t", "y")],
            {**MATRIX, "s": numbers(4, 1), "t": numbers(4, 1, seed=1)}, (2, 3, 4, 4),
        ),
    ),
    fault(
        "a scale along another axis", f"{EMIT}_parameter",
        parameter("scale", "shift", change=lambda a: a.reshape(a.shape[:-1])),
        onnx=lambda: onnx_model(
            [node("Mul", "x s", "a"), node("Mul", "a t", "y")], {"s": numbers(4, 1, 1), "t": numbers(4, 1, 1, seed=1)},
            ("N", 4, 4, 4),
        ),
    ),
    fault(
        "rounded twice", f"{EMIT}_parameter", given(lambda self, kind, array: (self, kind, array.astype(np.float16))),
        onnx=lambda: with_norm(conv("x", "c", pads=[1] * 4), square()),
    ),
    fault(
        "another dtype", "reparamc.onnx.emit:OnnxEdit.add_initializer",
        given(lambda self, wanted, array, dtype: (self, wanted, array, np.dtype(np.float64))),
        onnx=lambda: with_norm(conv("x", "c", pads=[1] * 4), square()),
    ),
    fault(
        "operands exchanged", f"{EMIT}__init__", exchanged,
        onnx=lambda: onnx_model(
            [
                node("Relu", "x", "u"), conv("u", "a"), conv("x", "c", "w2"), norm_of("c", "d"),
                node("Add", "a d", "y"),
            ],
            {**square(), "w2": numbers(4, 4, 3, 3, seed=1), **statistics()},
        ),
    ),
    fault(
        "a reshape of the old operand", f"{EMIT}_reshape", of_old_operand,
        onnx=lambda: onnx_model(
            [conv("x", "c"), node("Reshape", "c shape", "f"), node("Mul", "f s", "y")],
            {**square(), "s": numbers(4, 1), "shape": np.array([0, 4, -1])},
        ),
    ),
    fault(
        "a permutation written as its inverse", f"{EMIT}_emit", turned_back,
        onnx=lambda: onnx_model(
            [conv("x", "c"), node("Transpose", "c", "t", perm=[0, 2, 3, 1]), node("Mul", "t s", "y")],
            {**square(), "s": numbers(4)},
        ),
    ),
    fault(
        "a slice that starts at zero", f"{EMIT}_select",
        written_as(lambda e: replace(e, index=tuple(range(len(e.index))))), onnx=lambda: neighbours([1, 2], [2, 4]),
    ),
    fault(
        "a gather in order", f"{EMIT}_select", written_as(lambda e: replace(e, index=tuple(sorted(e.index)))),
        onnx=lambda: neighbours([2, 4], [0, 2]),
    ),
    fault(
        "the old weight overwritten, which another convolution reads", f"{EMIT}_parameter", overwritten,
        onnx=lambda: onnx_model(
            [conv("x", "c"), norm_of("c", "n"), node("Relu", "n", "r"), conv("r", "y")], {**square(), **statistics()}
        ),
    ),
    fault(
        "names of new parameters collide", "reparamc.onnx.values:Names.fresh", not_taken,
        onnx=lambda: onnx_model(
            [node("Relu", "x", "u"), conv("u", "a"), conv("x", "c", "w2"), node("Add", "a c", "d"), norm_of("d")],
            {**square(), "w2": numbers(4, 4, 3, 3, seed=1), **statistics()},
        ),
    ),
    fault(
        "a value dropped that is still read", "reparamc.onnx.values:_without_dead",
        instead(lambda nodes, suspects, outputs: ([n for n in nodes if suspects.isdisjoint(n.output)], set())),
        onnx=lambda: onnx_model(
            [
                node("Relu", "x", "u"), conv("u", "c", pads=[1] * 4), norm_of("c", "n"), node("Sigmoid", "u", "s"),
                node("Mul", "n s", "y"),
            ],
            {**square(), **statistics()},
        ),
    ),
    fault(
        "results under one another's names", "reparamc.onnx.emit:OnnxEdit._finish", under_other_names,
        onnx=lambda: onnx_model(
            [conv("x", "a"), norm_of("a", "y"), conv("x", "c", "w2"), norm_of("c", "z")],
            {**square(), "w2": numbers(4, 4, 3, 3, seed=1), **statistics()}, outputs="y z",
        ),
    ),
    fault(
        "a weight dropped that a body reads", "reparamc.onnx.values:captured", instead(lambda node: iter(())),
        onnx=lambda: branching(),
    ),
    fault(
        "folded constants without their sign", "reparamc.onnx.witnesses:computed",
        result(lambda values: {name: np.abs(a) for name, a in values.items()}),
        onnx=lambda: onnx_model([node("Neg", "w", "v"), conv("x", "y", "v")], square()),
    ),
]  # fmt: skip


def neighbours(first: Sequence[int], second: Sequence[int]) -> ModelProto:
    """Two slices of channels that are beside each other, put together again."""
    ends = {"f": first[:1], "t": first[1:], "g": second[:1], "u": second[1:], "axis": [1]}
    nodes = [node("Slice", "x f t axis", "a"), node("Slice", "x g u axis", "b"), node("Concat", "a b", "y", axis=1)]
    return onnx_model(nodes, {"none": numbers(1), **{k: np.array(v) for k, v in ends.items()}})


def branching() -> ModelProto:
    """A convolution and BatchNormalization; a body of an If, in which nothing folds, reads the weight, too."""
    result = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    body = helper.make_graph([conv("x", "t"), node("Relu", "t", "r")], "body", [], [result])
    chosen = helper.make_node("If", ["yes"], ["z"], then_branch=body, else_branch=body)
    parameters = {**square(), **statistics(), "yes": np.array(True)}
    return onnx_model([conv("x", "c"), norm_of("c"), chosen], parameters, outputs="y z", overridable=["yes"])
