"""A `Structure` as an ONNX model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from reparamc.testing.structure import Step, Structure, Value

OPSETS = (17, 13, 18, 21)
"""Axes of ReduceMean are an attribute before 18; 13 is the first at which those of Squeeze and Split are inputs."""

_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}
_ACTIVATIONS = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}


def build_onnx(
    structure: Structure,
    dtype: str = "float32",
    opset: int = 17,
    symbolic: bool = False,
    constants: bool = False,
) -> ModelProto:
    """The model of ``structure``, with input ``x`` and outputs ``y`` and, where there are two, ``z``.

    Args:
        dtype: "float32", "float16" or "float64".
        symbolic: whether the batch and the sizes of the input are names instead of numbers.
        constants: whether some constants are nodes instead of initializers.
    """
    return _Builder(structure, dtype, opset, symbolic, constants).model()


class _Builder:
    def __init__(self, structure: Structure, dtype: str, opset: int, symbolic: bool, constants: bool) -> None:
        self.structure, self.opset, self.symbolic, self.constants = structure, opset, symbolic, constants
        self.type, self.dtype = _TYPES[dtype], np.dtype(dtype)
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        self.stored: set[str] = set()
        last, *extra = structure.outputs
        self.names = {0: "x", last: "y", **dict.fromkeys(extra, "z")}
        for number, step in enumerate(structure.steps, 1):
            self.names.setdefault(number, f"v{number}")
            operands = [self.names[n] for n in step.inputs]
            self._step(number, step, operands, structure.values[step.inputs[0]], self.names[number])

    def model(self) -> ModelProto:
        shape: list[Any] = list(self.structure.shape())
        if self.symbolic:
            channel = self.structure.values[0].axis
            shape = [n if at == channel else "NHWD"[at - (at > channel)] for at, n in enumerate(shape)]
        x = helper.make_tensor_value_info("x", self.type, shape)
        outputs = []
        for number in self.structure.outputs:
            value = self.structure.values[number]
            dims = [value.channels if at == value.axis else None for at in range(value.rank)]
            outputs.append(helper.make_tensor_value_info(self.names[number], self.type, dims))
        graph = helper.make_graph(self.nodes, "structure", [x], outputs, self.tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def _node(self, op: str, inputs: Sequence[str], output: str | Sequence[str], **attributes: Any) -> None:
        outputs = [output] if isinstance(output, str) else list(output)
        self.nodes.append(helper.make_node(op, list(inputs), outputs, f"{op}_{outputs[0]}", **attributes))

    def _tensor(self, name: str, array: np.ndarray) -> str:
        """The name of a constant, which is stored under it once."""
        if name in self.stored:
            return name
        self.stored.add(name)
        tensor = numpy_helper.from_array(np.ascontiguousarray(array).reshape(np.shape(array)), name)
        if self.constants and len(self.stored) % 3 == 1:
            self._node("Constant", [], name, value=tensor)
        else:
            self.tensors.append(tensor)
        return name

    def _floats(self, name: str, array: np.ndarray) -> str:
        return self._tensor(name, np.asarray(array).astype(self.dtype))

    def _integers(self, name: str, *values: int) -> str:
        return self._tensor(name, np.array(values, np.int64))

    def _parameter(self, number: int, kind: str, transform: Any = lambda array: array) -> str:
        """A parameter of a step, or of the step that it shares them with."""
        owner = self.structure.owner(number)
        return self._floats(f"{kind}{owner}", transform(self.structure.parameters[owner][kind]))

    def _step(self, number: int, step: Step, operands: list[str], value: Value, out: str) -> None:
        x = operands[0]
        match step.op:
            case "conv" | "transposed":
                self._convolution(number, step, x, out)
            case "linear":
                self._linear(number, step, x, value, out)
            case "batchnorm":
                names = [self._parameter(number, k) for k in ("weight", "bias", "running_mean", "running_var")]
                self._node("BatchNormalization", [x, *names], out, epsilon=step["eps"])
            case "scale" if step.variant(3) == 1:
                inverse = self._parameter(number, "scale", lambda a: value.column(1 / a))
                self._node("Div", [x, inverse], out)
            case "scale":
                factor = self._parameter(number, "scale", value.column)
                self._node("Mul", [factor, x] if step.variant(3) else [x, factor], out)
            case "shift" if step.variant(2):
                self._node("Sub", [x, self._parameter(number, "shift", lambda a: value.column(-a))], out)
            case "shift":
                self._node("Add", [x, self._parameter(number, "shift", value.column)], out)
            case "number":
                self._node("Mul", [x, self._parameter(number, "number")], out)
            case "negate" if step.variant(2):
                self._node("Mul", [x, self._floats(f"minus{number}", -np.ones(()))], out)
            case "negate":
                self._node("Neg", [x], out)
            case "add" if len(operands) > 2 or step.variant(2):
                self._node("Sum", operands, out)
            case "add":
                self._node("Add", operands, out)
            case "subtract":
                self._node("Sub", operands, out)
            case "complement":
                self._node("Sub", [self._parameter(number, "complement", value.column), x], out)
            case "concat":
                self._node("Concat", operands, out, axis=value.axis - value.rank if step.variant(2) else value.axis)
            case "part" | "select":
                self._selection(number, step, x, value, out)
            case "pool":
                self._node(
                    "AveragePool", [x], out, kernel_shape=step["kernel"], strides=step["stride"],
                    pads=[*step["pad"], *step["pad"]], count_include_pad=int(step["counted"]),
                )  # fmt: skip
            case "pad":
                self._pad(number, step, x, out, step["value"])
            case "crop":
                ends = [-n or 2**62 for n in step["end"]]
                bounds = {"starts": step["begin"], "ends": ends, "axes": range(2, value.rank)}
                self._node("Slice", [x, *(self._integers(f"{k}{number}", *v) for k, v in bounds.items())], out)
            case "shuffle":
                self._shuffle(number, step, x, value, out)
            case "mean":
                self._mean(number, step, x, value, out)
            case "tokens":
                self._node("Reshape", [x, self._integers(f"rows{number}", 0, value.channels, -1)], f"{out}_rows")
                self._node("Transpose", [f"{out}_rows"], out, perm=[0, 2, 1])
            case "heads":
                self._heads(number, step, x, value, out)
            case "merge":
                self._node("Transpose", [x], f"{out}_rows", perm=[0, 2, 1, 3])
                target = self._integers(f"merged{number}", 0, 0, step["heads"] * value.channels)
                self._node("Reshape", [f"{out}_rows", target], out)
            case "to_last":
                self._node("Transpose", [x], out, perm=[0, *range(2, value.rank), 1])
            case "to_first":
                self._node("Transpose", [x], out, perm=[0, value.rank - 1, *range(1, value.rank - 1)])
            case "identity":
                self._node("Dropout" if step.variant(2) else "Identity", [x], out)
            case "activation":
                self._node(_ACTIVATIONS[step["kind"]], [x], out)
            case _:
                raise AssertionError(step.op)

    def _convolution(self, number: int, step: Step, x: str, out: str) -> None:
        at = step.at
        names = [self._parameter(number, "weight")] + ([self._parameter(number, "bias")] if at["bias"] else [])
        if at.get("computed"):
            self._node("Neg", names[:1], f"{out}_negated")
            self._node("Neg", [f"{out}_negated"], f"{out}_weight")
            names[0] = f"{out}_weight"
        common = {"strides": at["stride"], "dilations": at["dilation"], "group": at["groups"]}
        if step.variant(2) == 0:
            common["kernel_shape"] = at["kernel"]  # it may be left out
        if step.op == "transposed":
            pads = [*at["pad"], *at["pad"]]
            self._node("ConvTranspose", [x, *names], out, pads=pads, output_padding=at["extra"], **common)
        elif step.variant(3) == 1 and any(at["begin"] + at["end"]):
            self._pad(number, step, x, f"{out}_padded")
            self._node("Conv", [f"{out}_padded", *names], out, **common)
        elif step.variant(3) == 2 and step.padded_same and set(at["dilation"]) == {1}:  # all that ONNX Runtime knows
            self._node("Conv", [x, *names], out, auto_pad="SAME_UPPER", **common)
        else:
            self._node("Conv", [x, *names], out, pads=[*at["begin"], *at["end"]], **common)

    def _pad(self, number: int, step: Step, x: str, out: str, value: float = 0.0) -> None:
        pads = self._integers(f"pads{number}", 0, 0, *step["begin"], 0, 0, *step["end"])
        given = [self._floats(f"border{number}", np.array(value))] if value or step.variant(2) else []
        self._node("Pad", [x, pads, *given], out)

    def _shuffle(self, number: int, step: Step, x: str, value: Value, out: str) -> None:
        groups, width = step["groups"], value.channels
        if self.symbolic and value.frame:  # a reshape would need the sizes
            index = np.arange(width).reshape(groups, -1).T.ravel()
            self._node("Gather", [x, self._integers(f"index{number}", *index.tolist())], out, axis=1)
            return
        batch, _, *given = self.structure.shape()
        size = self.structure.sizes(given)[step.inputs[0]] or ()
        first = 0 if self.symbolic else batch
        rows = self._integers(f"rows{number}", first, groups, width // groups, *size)
        self._node("Reshape", [x, rows], f"{out}_rows")
        self._node("Transpose", [f"{out}_rows"], f"{out}_turned", perm=[0, 2, 1, *range(3, 3 + len(size))])
        self._node("Reshape", [f"{out}_turned", self._integers(f"back{number}", first, width, *size)], out)

    def _heads(self, number: int, step: Step, x: str, value: Value, out: str) -> None:
        heads, parts = step["heads"], step["parts"]
        every = f"{x}_heads{heads}_{parts}"
        if every not in self.stored:
            self.stored.add(every)
            each = value.channels // (heads * parts)
            rows = self._integers(f"{every}_target", 0, 0, parts, heads, each)
            self._node("Reshape", [x, rows], f"{every}_rows")
            self._node("Transpose", [f"{every}_rows"], every, perm=[2, 0, 3, 1, 4])
        which = self._tensor(f"which{step['which']}", np.array(step["which"]))
        self._node("Gather", [every, which], out, axis=0)

    def _linear(self, number: int, step: Step, x: str, value: Value, out: str) -> None:
        scaled = value.rank == 2 and step.variant(4) == 2  # by alpha and beta of Gemm
        bias = self._parameter(number, "bias", lambda a: a.reshape(1, -1) * 4 if scaled else a) if step["bias"] else ""
        if value.rank > 2 or step.variant(4) == 3:
            weight = self._parameter(number, "weight", np.transpose)
            self._node("MatMul", [x, weight], f"{out}_product" if bias else out)
            if bias:
                self._node("Add", [bias, f"{out}_product"] if step.variant(2) else [f"{out}_product", bias], out)
            return
        rest = [bias] if bias else []
        match step.variant(4):
            case 0:
                self._node("Gemm", [x, self._parameter(number, "weight"), *rest], out, transB=1)
            case 1:
                self._node("Gemm", [x, self._parameter(number, "weight", np.transpose), *rest], out)
            case _:
                half = self._parameter(number, "weight", lambda a: a / 2)
                self._node("Gemm", [x, half, *rest], out, transB=1, alpha=2.0, beta=0.25)

    def _selection(self, number: int, step: Step, x: str, value: Value, out: str) -> None:
        if step.op == "part" and not step.variant(2):
            self._split(number, step, x, value)
            return
        if step.op == "part":
            start = sum(step["sizes"][: step["which"]])
            index = tuple(range(start, start + step["sizes"][step["which"]]))
        else:
            index = step["index"]
        if index == tuple(range(index[0], index[-1] + 1)) and step.variant(3) < 2:
            bounds = (index[0], index[-1] + 1, value.axis)
            names = [
                self._integers(f"{kind}{number}", n) for kind, n in zip(("start", "stop", "axis"), bounds, strict=True)
            ]
            self._node("Slice", [x, *names], out)
        else:
            self._node("Gather", [x, self._integers(f"index{number}", *index)], out, axis=value.axis)

    def _split(self, number: int, step: Step, x: str, value: Value) -> None:
        """One Split for all parts that are written so, in the place of the first."""
        steps = enumerate(self.structure.steps, 1)
        parts = {s["which"]: n for n, s in steps if s.op == "part" and s.inputs == step.inputs and not s.variant(2)}
        if number != min(parts.values()):
            return
        names = [
            self.names.setdefault(parts[which], f"v{parts[which]}") if which in parts else f"unread{number}"
            for which in range(len(step["sizes"]))
        ]
        self._node("Split", [x, self._integers(f"sizes{number}", *step["sizes"])], names, axis=value.axis)

    def _mean(self, number: int, step: Step, x: str, value: Value, out: str) -> None:
        positions = list(range(2, value.rank))
        if step.variant(2):
            pooled = out if step["keep"] else f"{out}_pooled"
            self._node("GlobalAveragePool", [x], pooled)
            if not step["keep"]:
                self._node("Flatten", [pooled], out, axis=1)
        elif self.opset < 18:
            self._node("ReduceMean", [x], out, axes=positions, keepdims=int(step["keep"]))
        else:
            axes = self._integers(f"positions{number}", *positions)
            self._node("ReduceMean", [x, axes], out, keepdims=int(step["keep"]))
