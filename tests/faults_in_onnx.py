"""Faults in the readers and the emitter of ONNX, and in what they know of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from fault_models import MATRIX, ROWS, TOKENS, conv, node, norm_of, numbers, onnx_model, square, statistics, with_norm
from onnx import ModelProto, TensorProto, helper
from planting import Edit, fault

READ, EMIT = "reparamc.onnx.operators:_read_", "reparamc.onnx.graph:_Emitter."

ONNX_READERS = [
    fault(
        "padding: end before begin", f"{READ}conv", "pads[:n], pads[n:]", "pads[n:], pads[:n]",
        onnx=lambda: with_norm(conv("x", "c", pads=[0, 2, 2, 0]), square()),
    ),
    fault(
        "padding: pairs per axis", f"{READ}conv", "pads[:n], pads[n:]", "pads[0::2], pads[1::2]",
        onnx=lambda: with_norm(conv("x", "c", pads=[0, 1, 2, 3]), square()),
    ),
    fault(
        "stride ignored", f"{READ}conv", 'attribute(node, "strides", [1] * n)', "[1] * n",
        onnx=lambda: with_norm(conv("x", "c", strides=[2, 1]), square()),
    ),
    fault(
        "dilation ignored", f"{READ}conv", 'attribute(node, "dilations", [1] * n)', "[1] * n",
        onnx=lambda: with_norm(conv("x", "c", dilations=[2, 2], pads=[2] * 4), square()),
    ),
    fault(
        "bias of a convolution forgotten", f"{READ}conv", "graph.array(bias) if bias else None", "None",
        onnx=lambda: with_norm(node("Conv", "x w c0", "c"), {**square(), "c0": numbers(4)}),
    ),
    fault(
        "SAME_LOWER read as SAME_UPPER", "reparamc.onnx.operators:_pads",
        't // 2 if auto == "SAME_UPPER" else t - t // 2', "t // 2",
        onnx=lambda: with_norm(conv("x", "c", auto_pad="SAME_LOWER"), {"w": numbers(4, 4, 2, 2)}),
    ),
    fault(
        "output_padding ignored", f"{READ}conv_transpose", "p - e for p, e", "p for p, e",
        onnx=lambda: with_norm(
            node("ConvTranspose", "x w", "c", strides=[2, 2], pads=[1] * 4, output_padding=[1, 0]), square()
        ),
    ),
    fault(
        "default epsilon", f"{READ}batchnorm", "np.float32(1e-5)", "np.float32(1e-3)",
        onnx=lambda: onnx_model([conv("x", "c"), norm_of("c")], {**square(), **statistics(variance=1e-3)}),
    ),
    fault(
        "epsilon under another name", f"{READ}batchnorm", '"epsilon"', '"eps"',
        onnx=lambda: onnx_model(
            [conv("x", "c"), node("BatchNormalization", "c g b m v", "y", epsilon=0.1)], {**square(), **statistics()}
        ),
    ),
    fault(
        "mean and variance exchanged", f"{READ}batchnorm", "gamma, beta, mean, var =", "gamma, beta, var, mean =",
        onnx=lambda: onnx_model(
            [conv("x", "c"), norm_of("c")], {**square(), **statistics(), "m": np.abs(numbers(4, seed=2))}
        ),
    ),
    fault(
        "c - x read as x - c", "reparamc.algebra.kernels:arithmetic",
        "(sign, c) if constant_first else (ONE, sign * c)", "(ONE, sign * c)",
        onnx=lambda: onnx_model([conv("x", "c"), node("Sub", "s c", "y")], {**square(), "s": numbers(4, 1, 1)}),
    ),
    fault(
        "c / x read as x / c", f"{READ}arithmetic", 'node.op_type == "Div" and side == 0', "False",
        onnx=lambda: onnx_model([conv("x", "c"), node("Div", "s c", "y")], {**square(), "s": numbers(4, 1, 1)}),
    ),
    fault(
        "x / c read as x * c", "reparamc.algebra.kernels:arithmetic", "1 / c, ZERO", "c, ZERO",
        onnx=lambda: onnx_model([conv("x", "c"), node("Div", "c s", "y")], {**square(), "s": numbers(4, 1, 1)}),
    ),
    fault(
        "a constant along W taken for one per channel", "reparamc.onnx.operators:_along_one_axis",
        "return axis_of_constant(dims, lambda axis: shape[axis].known)",
        "return -3 if any(d != 1 for d in dims) else None",
        onnx=lambda: onnx_model(
            [conv("x", "c", pads=[1] * 4), node("Mul", "c s", "y")], {**square(), "s": numbers(4)}, ("N", 4, 5, 4)
        ),
    ),
    fault(
        "a - b read as b - a", f"{READ}sum", "Sum((operands[0], Scale(operands[1], -ONE, ZERO)))",
        "Sum((Scale(operands[0], -ONE, ZERO), operands[1]))",
        onnx=lambda: onnx_model(
            [conv("x", "a"), conv("x", "b", "w2"), node("Sub", "a b", "y")],
            {**square(), "w2": numbers(4, 4, 3, 3, seed=1)}
        ),
    ),
    fault(
        "transB ignored", f"{READ}gemm", "w if transposed else w.T", "w.T",
        onnx=lambda: with_norm(node("Gemm", "x w", "c", transB=1), MATRIX, shape=ROWS),
    ),
    fault(
        "alpha ignored", f"{READ}gemm", "graph.array(weight) * alpha", "graph.array(weight)",
        onnx=lambda: with_norm(node("Gemm", "x w", "c", alpha=0.5), MATRIX, shape=ROWS),
    ),
    fault(
        "beta ignored", f"{READ}gemm", ".reshape(-1) * beta", ".reshape(-1)",
        onnx=lambda: with_norm(node("Gemm", "x w c0", "c", beta=0.5), {**MATRIX, "c0": numbers(4)}, shape=ROWS),
    ),
    fault(
        "matrix not transposed", f"{READ}matmul", "graph.array(weight).T, None", "graph.array(weight), None",
        onnx=lambda: onnx_model([node("MatMul", "x w", "c"), node("Mul", "c s", "y")], {**MATRIX, "s": numbers(4)},
        TOKENS),
    ),
    fault(
        "matrix on the left transposed", f"{READ}matmul",
        "graph.array(weight)[..., None]", "graph.array(weight).T[..., None]",
        onnx=lambda: onnx_model(
            [node("MatMul", "w x", "c"), node("Mul", "c s", "y")], {**MATRIX, "s": numbers(4, 1)}, ("N", 4, "L")
        ),
    ),
    fault(
        "pooling that leaves the padding out", f"{READ}average_pool", "any(pads) and not", "False and not",
        onnx=lambda: pooled(pads=[1] * 4, count_include_pad=0),
    ),
    fault(
        "pooling with ceil_mode", f"{READ}average_pool", 'if cast(int, attribute(node, "ceil_mode", 0)):',
        "if False:",
        onnx=lambda: onnx_model(
            [node("AveragePool", "x", "p", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1), conv("p", "y")],
            {"w": numbers(4, 4, 1, 1)},
        ),
    ),
    fault(
        "divisor of a pooling", f"{READ}average_pool", "1 / prod(kernel)", "1 / sum(kernel)",
        onnx=lambda: pooled(pads=[1] * 4, count_include_pad=1),
    ),
    fault(
        "pads of a Pad as pairs", f"{READ}pad",
        "zip(amounts[:half], amounts[half:], strict=True)", "zip(amounts[0::2], amounts[1::2], strict=True)",
        onnx=lambda: onnx_model(
            [node("Pad", "x p", "q"), conv("q", "y")], {**square(), "p": np.array([0, 0, 0, 0, 0, 0, 2, 2])}
        ),
    ),
    fault(
        "padding with another value than zero", f"{READ}pad", "graph.constants.array(given[1]).item()", "0.0",
        onnx=lambda: onnx_model(
            [node("Pad", "x p one", "q"), conv("q", "y")],
            {**square(), "p": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "one": np.float32(1)},
        ),
    ),
    fault(
        "order of a concatenation", f"{READ}concat",
        "Concat(tuple(operands), sizes, axis)", "Concat(tuple(operands)[::-1], sizes[::-1], axis)",
        onnx=lambda: onnx_model(
            [conv("x", "a"), conv("x", "b", "w2"), node("Concat", "a b", "y", axis=1)],
            {**square(), "w2": numbers(3, 4, 3, 3)},
        ),
    ),
    fault(
        "pieces of a split", f"{READ}split", "at += size", "at += 0",
        onnx=lambda: onnx_model(
            [conv("x", "c"), node("Split", "c k", "a y", axis=1)], {**square(), "k": np.array([2, 2])}
        ),
    ),
    fault(
        "start of a slice", f"{READ}slice", "starts[0] : ends[0] : steps[0]",
        "starts[0] - 1 : ends[0] - 1 : steps[0]",
        onnx=lambda: sliced_channels(),
    ),
    fault(
        "order of a gather", f"{READ}gather", "[i % width for i in", "[i % width for i in sorted(",
        Edit(f"{READ}gather", "array(index).ravel().tolist()]", "array(index).ravel().tolist())]"),
        onnx=lambda: onnx_model(
            [conv("x", "c"), node("Gather", "c i", "y", axis=1)], {**square(), "i": np.array([2, 0, 1])}
        ),
    ),
    fault(
        "a crop that starts at zero", "reparamc.onnx.operators:_crop", "= -start, min(stop, 0), step",
        "= 0, min(stop, 0) - start, step",
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
        "channel shuffle read as nothing", "reparamc.onnx.operators:_shuffle", ".T.ravel()", ".ravel()",
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
        "if t.name not in overridable}", "}",
        onnx=lambda: onnx_model([conv("x", "c"), norm_of("c")], {**square(), **statistics()}, overridable=["w"]),
    ),
    fault(
        "anything taken for linear", "reparamc.onnx.graph:OnnxGraph.moves",
        "node.op_type not in LINEAR_KINDS", 'node.op_type not in {*LINEAR_KINDS, "Relu"}',
        Edit("reparamc.algebra.probe:find_kernel", "if not _follows(", "if False and not _follows("),
        Edit("reparamc.algebra.probe:find_kernel", "if error <= slack else", "if True else"),
        onnx=lambda: onnx_model([conv("x", "a"), node("Relu", "a", "b"), conv("b", "y")], square()),
    ),
    fault(
        "a map that differs from place to place", "reparamc.algebra.probe:find_kernel", "if not _follows(",
        "if False and not _follows(",
        Edit("reparamc.algebra.probe:find_kernel", "if error <= slack else", "if True else"),
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

ONNX_VALUES = [
    fault(
        "an extent that is off by one", f"{VALUES}Types._shape", "Dim(d.dim_value) if d.HasField",
        "Dim(d.dim_value + (d.dim_value == 7)) if d.HasField",
        onnx=lambda: with_norm(conv("x", "c", auto_pad="SAME_UPPER", strides=[2, 2]), square(), shape=("N", 4, 7, 7)),
    ),
    fault(
        "an open extent taken for its factor", f"{VALUES}Types._learn_product",
        "self._products[fresh[0].symbols[0]] = rest", "self._products[fresh[0].symbols[0]] = Dim(rest.factor)",
        onnx=lambda: times_rows(),
    ),
    fault(
        "a symbol taken for a number", f"{VALUES}Types._open", "or Dim.of(symbol)", "or Dim(2)",
        onnx=lambda: times_rows(),
    ),
    fault(
        "attributes in another order", f"{VALUES}attribute", "return helper.get_attribute_value(a)",
        "return helper.get_attribute_value(a)[::-1] if a.ints else helper.get_attribute_value(a)",
        onnx=lambda: with_norm(conv("x", "c", pads=[0, 1, 2, 3]), square()),
    ),
    fault(
        "another constant of the same size", f"{VALUES}Constants.array",
        "numpy_helper.to_array(self.tensors[name])", "abs(numpy_helper.to_array(self.tensors[name]))",
        onnx=lambda: with_norm(conv("x", "c"), square()),
    ),
    fault(
        "a Constant without its sign", f"{VALUES}constant_tensor",
        "numpy_helper.from_array(np.array(helper.get_attribute_value(a), np.float32))",
        "numpy_helper.from_array(abs(np.array(helper.get_attribute_value(a), np.float32)))",
        onnx=lambda: onnx_model(
            [node("Constant", "", "s", value_float=-2.0), conv("x", "c"), node("Mul", "c s", "y")], square()
        ),
    ),
    fault(
        "small constants changed for shape inference", f"{VALUES}skeleton", "light.graph.initializer.append(tensor)",
        "light.graph.initializer.append(\n"
        "                numpy_helper.from_array(np.minimum(numpy_helper.to_array(tensor), 2), tensor.name))",
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


ONNX_WRITERS = [
    fault(
        "a subtraction turned round", f"{EMIT}_sum", "[y, self._value(addend)]",
        '[y, self._value(addend)] if op == "Add" else [self._value(addend), y]',
        onnx=lambda: onnx_model(
            [node("Relu", "x", "u"), conv("x", "c", pads=[1] * 4), norm_of("c", "d"), node("Sub", "d u", "y")],
            {**square(), **statistics()},
        ),
    ),
    fault(
        "padding: end before begin", f"{EMIT}_emit", '"pads": (*begin, *end)', '"pads": (*end, *begin)',
        onnx=lambda: with_norm(conv("x", "c", pads=[0, 2, 2, 0]), square()),
    ),
    fault(
        "dilation not written", f"{EMIT}_emit", '"dilations": e.dilation', '"dilations": (1,) * e.spatial',
        onnx=lambda: with_norm(conv("x", "c", dilations=[2, 2], pads=[2] * 4), square()),
    ),
    fault(
        "stride not written", f"{EMIT}_emit", '"strides": e.stride', '"strides": (1,) * e.spatial',
        onnx=lambda: with_norm(conv("x", "c", strides=[2, 2]), square()),
    ),
    fault(
        "bias not written", f"{EMIT}_emit", "if e.bias is not None else []", "if False else []",
        onnx=lambda: with_norm(conv("x", "c"), square()),
    ),
    fault(
        "output_padding not written", f"{EMIT}_emit", "max(-p, 0)", "0",
        onnx=lambda: with_norm(
            node("ConvTranspose", "x w", "c", strides=[2, 2], pads=[0] * 4, output_padding=[1, 0]), square()
        ),
    ),
    fault(
        "weight of a transposed convolution on the wrong axis", f"{EMIT}_emit",
        "swap_sides(e.weight, e.groups) if e.transposed else e.weight", "e.weight",
        onnx=lambda: with_norm(node("ConvTranspose", "x w", "c", strides=[2, 2]), square()),
    ),
    fault(
        "transB not written", f"{EMIT}_linear", "transB=1", "transB=0",
        onnx=lambda: with_norm(node("Gemm", "x w", "c"), MATRIX, shape=ROWS),
    ),
    fault(
        "matrix written as it is", f"{EMIT}_linear", "weight.T", "weight",
        onnx=lambda: onnx_model([node("MatMul", "x w", "c"), node("Mul", "c s", "y")], {**MATRIX, "s": numbers(4)},
        TOKENS),
    ),
    fault(
        "bias of rows along the columns", f"{EMIT}_rows", "e.bias[:, None]", "e.bias",
        onnx=lambda: onnx_model(
            [node("MatMul", "w x", "c"), node("Mul", "c s", "d"), node("Add", "d t", "y")],
            {**MATRIX, "s": numbers(4, 1), "t": numbers(4, 1, seed=1)}, (2, 3, 4, 4),
        ),
    ),
    fault(
        "a scale along another axis", f"{EMIT}_scale", "(1,) * (-1 - (e.axis or -1))",
        "(1,) * max(-2 - (e.axis or -1), 0)",
        onnx=lambda: onnx_model(
            [node("Mul", "x s", "a"), node("Mul", "a t", "y")], {"s": numbers(4, 1, 1), "t": numbers(4, 1, 1, seed=1)},
            ("N", 4, 4, 4),
        ),
    ),
    fault(
        "rounded twice", f"{EMIT}_parameter", "array, self.splice.dtype",
        "array.astype(np.float16), self.splice.dtype",
        onnx=lambda: with_norm(conv("x", "c", pads=[1] * 4), square()),
    ),
    fault(
        "another dtype", f"{EMIT}_parameter", "self.splice.dtype", "np.dtype(np.float64)",
        onnx=lambda: with_norm(conv("x", "c", pads=[1] * 4), square()),
    ),
    fault(
        "operands exchanged", f"{EMIT}__init__", 'self.note = f"reparamc',
        "two = [e for e in self.names if isinstance(e, Source)][:2]\n"
        "    self.names.update(zip(two, [self.names[e] for e in reversed(two)]))\n"
        '    self.note = f"reparamc',
        onnx=lambda: onnx_model(
            [
                node("Relu", "x", "u"), conv("u", "a"), conv("x", "c", "w2"), norm_of("c", "d"),
                node("Add", "a d", "y"),
            ],
            {**square(), "w2": numbers(4, 4, 3, 3, seed=1), **statistics()},
        ),
    ),
    fault(
        "a copied operator keeps its operand", f"{EMIT}_copy", "copy.input[0] = self._value(x)", "self._value(x)",
        onnx=lambda: onnx_model(
            [conv("x", "c"), node("Transpose", "c", "t", perm=[0, 2, 3, 1]), node("Mul", "t s", "y")],
            {**square(), "s": numbers(4)},
        ),
    ),
    fault(
        "a slice that starts at zero", f"{EMIT}_select", "((first, end, e.width), self.nodes[-1])",
        "((0, end - first, e.width), self.nodes[-1])",
        onnx=lambda: neighbours([1, 2], [2, 4]),
    ),
    fault(
        "a gather in order", f"{EMIT}_select", '.index", e.index)', '.index", sorted(e.index))',
        onnx=lambda: neighbours([2, 4], [0, 2]),
    ),
    fault(
        "the old weight overwritten, which another convolution reads", f"{EMIT}_parameter",
        "return self.graph.add_initializer(",
        "for t in self.graph.model.graph.initializer:\n"
        "        if t.name in self.splice.parameters and tuple(t.dims) == array.shape:\n"
        "            t.CopyFrom(numpy_helper.from_array(array.astype(self.splice.dtype), t.name))\n"
        "            return t.name\n"
        "    return self.graph.add_initializer(",
        onnx=lambda: onnx_model(
            [conv("x", "c"), norm_of("c", "n"), node("Relu", "n", "r"), conv("r", "y")], {**square(), **statistics()}
        ),
    ),
    fault(
        "names of new parameters collide", "reparamc.onnx.values:Names.fresh", "self.taken.add(name)", "pass",
        onnx=lambda: onnx_model(
            [node("Relu", "x", "u"), conv("u", "a"), conv("x", "c", "w2"), node("Add", "a c", "d"), norm_of("d")],
            {**square(), "w2": numbers(4, 4, 3, 3, seed=1), **statistics()},
        ),
    ),
    fault(
        "a value dropped that is still read", "reparamc.onnx.values:_without_dead",
        "any(uses[name] > 0 for name in node.output) or", "",
        onnx=lambda: onnx_model(
            [
                node("Relu", "x", "u"), conv("u", "c", pads=[1] * 4), norm_of("c", "n"), node("Sigmoid", "u", "s"),
                node("Mul", "n s", "y"),
            ],
            {**square(), **statistics()},
        ),
    ),
    fault(
        "results under one another's names", "reparamc.onnx.graph:OnnxGraph.finish",
        "nodes.extend(node for node in self._inserted[root] if node.output)",
        "other = [*self._inserted][::-1][[*self._inserted].index(root)]\n"
        "            made = self._inserted[root]\n"
        "            made[-1].output[0] = other\n"
        "            nodes.extend(made)",
        onnx=lambda: onnx_model(
            [conv("x", "a"), norm_of("a", "y"), conv("x", "c", "w2"), norm_of("c", "z")],
            {**square(), "w2": numbers(4, 4, 3, 3, seed=1), **statistics()}, outputs="y z",
        ),
    ),
    fault(
        "a weight dropped that a body reads", "reparamc.onnx.values:captured", "yield from inner.input",
        "yield from ()",
        onnx=lambda: branching(),
    ),
    fault(
        "folded constants without their sign", "reparamc.onnx.witnesses:computed",
        "found.update(results)", "found.update({name: np.abs(a) for name, a in results.items()})",
        onnx=lambda: onnx_model([node("Neg", "w", "v"), conv("x", "y", "v")], square()),
    ),
]  # fmt: skip


def neighbours(first: Sequence[int], second: Sequence[int]) -> ModelProto:
    """Two slices of channels that stand beside each other, put together again."""
    ends = {"f": first[:1], "t": first[1:], "g": second[:1], "u": second[1:], "axis": [1]}
    nodes = [node("Slice", "x f t axis", "a"), node("Slice", "x g u axis", "b"), node("Concat", "a b", "y", axis=1)]
    return onnx_model(nodes, {"none": numbers(1), **{k: np.array(v) for k, v in ends.items()}})


def branching() -> ModelProto:
    """A convolution and BatchNormalization; a body of an If reads the weight and the statistics, too."""
    result = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    body = helper.make_graph([conv("x", "t"), norm_of("t", "r")], "body", [], [result])
    chosen = helper.make_node("If", ["yes"], ["z"], then_branch=body, else_branch=body)
    parameters = {**square(), **statistics(), "yes": np.array(True)}
    return onnx_model([conv("x", "c"), norm_of("c"), chosen], parameters, outputs="y z")
