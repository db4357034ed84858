"""The programs of `fuzz_graphs` as ONNX models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from fuzz_graphs import OPEN, OPEN_BATCH, STATIC, Program, Step
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper


def to_onnx(p: Program) -> ModelProto:
    """The program as a float32 model; extents that it leaves open are symbols."""
    writer = _Writer(p)
    for at, step in enumerate(p.steps):
        writer.write(step, f"v{at}")
    return writer.model()


def _simple(op: str) -> Any:
    """An operator that reads every input of its step, and nothing else."""
    return lambda self, s, x, out: self.node(op, [self.names[i] for i in s.inputs], out)


class _Writer:
    """Nodes and tensors so far; the method named like an operator writes one, of the step ``s`` on ``x``."""

    def __init__(self, p: Program) -> None:
        self.p = p
        self.nodes: list[NodeProto] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.names = [f"x{n}" for n in range(len(p.inputs))]

    def write(self, s: Step, out: str) -> None:
        getattr(self, s.op)(s, self.names[s.inputs[0]], out)
        self.names.append(out)

    def model(self) -> ModelProto:
        p = self.p
        kind = TensorProto.FLOAT
        inputs = [helper.make_tensor_value_info(f"x{n}", kind, self.dims(shape)) for n, shape in enumerate(p.inputs)]
        outputs = [
            helper.make_tensor_value_info(self.names[v], kind, [None] * len(p.shapes[v]))
            for v in dict.fromkeys(p.outputs)
        ]
        used = {name for n in self.nodes for name in n.input}
        weights = [numpy_helper.from_array(a, name) for name, a in self.tensors.items() if name in used]
        graph = helper.make_graph(self.nodes, "random", inputs, outputs, weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    # Parts

    def dims(self, shape: Sequence[int]) -> list[int | str]:
        symbols = {STATIC: 0, OPEN_BATCH: 1, OPEN: len(shape)}[self.p.openness]
        return [("N", None, "H", "W", "D")[axis] or n if axis < symbols else n for axis, n in enumerate(shape)]

    def parameters(self, s: Step, *roles: str) -> list[str]:
        """The parameters of these roles, but for those that the step does without."""
        keys = [s.params[role] for role in roles if role in s.params]
        names = [key.rstrip("+-") for key in keys]
        self.tensors |= {n: self.p.params[k].astype(np.float32) for n, k in zip(names, keys, strict=True)}
        return names

    def integers(self, *values: int) -> str:
        name = f"i{len(self.tensors)}"
        self.tensors[name] = np.array(values, np.int64)
        return name

    def node(self, op: str, inputs: Sequence[str], output: str, **settings: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], f"{op}_{output}", **settings))
        return output

    # Operators

    relu, sigmoid, tanh, neg = map(_simple, ("Relu", "Sigmoid", "Tanh", "Neg"))
    plus, minus = map(_simple, ("Add", "Sub"))

    def conv(self, s: Step, x: str, out: str) -> None:
        o, (weight, *bias) = s.settings, self.parameters(s, "weight", "bias")
        if o["computed"]:
            weight = self.node("Neg", [self.node("Neg", [weight], f"{out}_n")], f"{out}_w")
        grid = {"strides": o["stride"], "dilations": o["dilation"], "pads": (*o["begin"], *o["end"])}
        self.node("Conv", [x, weight, *bias], out, **grid, group=o["groups"])

    def conv_transpose(self, s: Step, x: str, out: str) -> None:
        o = s.settings
        grid = {"strides": o["stride"], "pads": o["padding"] * 2, "output_padding": o["more"]}
        self.node("ConvTranspose", [x, *self.parameters(s, "weight", "bias")], out, **grid, group=o["groups"])

    def norm(self, s: Step, x: str, out: str) -> None:
        operands = self.parameters(s, "gamma", "beta", "mean", "var")
        self.node("BatchNormalization", [x, *operands], out, epsilon=s.settings["eps"])

    def constant(self, s: Step, x: str, out: str) -> None:
        kind, operands = s.settings["kind"], [x, *self.parameters(s, "value")]
        op = {"add": "Add", "sub": "Sub", "rsub": "Sub", "mul": "Mul", "div": "Div"}[kind]
        self.node(op, operands[::-1] if kind == "rsub" else operands, out)

    def linear(self, s: Step, x: str, out: str) -> None:
        weight, *bias = self.parameters(s, "weight", "bias")
        if len(self.p.shapes[s.inputs[0]]) == 2:
            self.node("Gemm", [x, weight, *bias], out, transB=1)
            return
        turned = f"{weight}_t"
        self.tensors[turned] = np.ascontiguousarray(self.tensors[weight].T)
        y = self.node("MatMul", [x, turned], f"{out}_p" if bias else out)
        if bias:
            self.node("Add", [y, *bias] if s.settings["turned"] else [*bias, y], out)

    def concat(self, s: Step, x: str, out: str) -> None:
        self.node("Concat", [self.names[i] for i in s.inputs], out, axis=1)

    def slice(self, s: Step, x: str, out: str) -> None:
        self.node("Slice", [x, *(self.integers(n) for n in (s.settings["start"], s.settings["stop"], 1))], out)

    def gather(self, s: Step, x: str, out: str) -> None:
        self.node("Gather", [x, self.integers(*s.settings["index"])], out, axis=1)

    def take(self, s: Step, x: str, out: str) -> None:
        at = f"at{s.settings['at']}"
        self.tensors[at] = np.array(s.settings["at"])
        self.node("Gather", [x, at], out, axis=s.settings["axis"])

    def crop(self, s: Step, x: str, out: str) -> None:
        begin, end = s.settings["begin"], s.settings["end"]
        bounds = begin, [-e if e else 2**62 for e in end], range(2, 2 + len(begin))
        self.node("Slice", [x, *(self.integers(*values) for values in bounds)], out)

    def shuffle(self, s: Step, x: str, out: str) -> None:
        groups, (n, width, *rest) = s.settings["groups"], self.p.shapes[s.inputs[0]]
        split = self.node("Reshape", [x, self.integers(n, groups, width // groups, *rest)], f"{out}_s")
        turned = self.node("Transpose", [split], f"{out}_t", perm=[0, 2, 1, *range(3, 3 + len(rest))])
        self.node("Reshape", [turned, self.integers(n, width, *rest)], out)

    def pool(self, s: Step, x: str, out: str) -> None:
        o = s.settings
        grid = {"kernel_shape": o["kernel"], "strides": o["stride"], "pads": o["pads"] * 2}
        self.node("AveragePool", [x], out, **grid, count_include_pad=int(o["counted"]))

    def pad(self, s: Step, x: str, out: str) -> None:
        o = s.settings
        amounts, value = self.integers(0, 0, *o["begin"], 0, 0, *o["end"]), f"pad_value{o['value']}"
        self.tensors[value] = np.asarray(o["value"], np.float32)
        self.node("Pad", [x, amounts, value], out)

    def mean(self, s: Step, x: str, out: str) -> None:
        if s.settings["keep"]:
            self.node("GlobalAveragePool", [x], out)
        else:
            self.node("ReduceMean", [x], out, axes=s.settings["axes"], keepdims=0)

    def permute(self, s: Step, x: str, out: str) -> None:
        self.node("Transpose", [x], out, perm=s.settings["axes"])

    def reshape(self, s: Step, x: str, out: str) -> None:
        self.node("Reshape", [x, self.integers(*s.settings["target"])], out)
