"""Normalizations take scales and shifts of their results into their scale and bias."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, numpy_helper
from onnx_models import batchnorm, fuse, model, node, norm, rand

from reparamc.onnx.taps import NORMS

C = 6
MAP, TOKENS = (2, C, 5, 4), ("N", 5, C)
PARAMETERS: dict[str, np.ndarray] = {
    "g": rand(C) + 1, "h": rand(C), "s": rand(C) + 1, "t": rand(C), "s3": rand(C, 1, 1) + 1, "d": rand(C, 1, 1, 1),
    "w": rand(C, 4), "row": rand(5, 1), "g2": rand(5, C), "k": rand(C, 1, 3, 3), **norm("n", C),
}  # fmt: skip

PARAMETERS |= {
    "b4": rand(4),
    "w2": rand(C, 4, seed=1),
    "c1": rand(3, C, 1, 1),
    "c3": rand(3, C, 3, 3),
    "w6": rand(C, C),
    "b3": rand(3),
}


def made(*nodes: NodeProto, shape: Any = TOKENS, opset: int = 21, outputs: str = "y") -> ModelProto:
    used = {name for n in nodes for name in n.input}
    return model(nodes, {k: v for k, v in PARAMETERS.items() if k in used}, shape, opset=opset, outputs=outputs)


def order(original: ModelProto) -> list[str]:
    """The operators of the result; everything is proven."""
    fused, report = fuse(original)
    assert report.certificate is None or not report.certificate.undecided
    return [n.op_type for n in fused.graph.node]


SCALED = (node("Mul", "v s", "m"), node("Add", "m t", "y"))
ROWS = {
    "layer": made(node("LayerNormalization", "x g h", "v", epsilon=0.1), *SCALED),
    "layer without bias": made(node("LayerNormalization", "x g", "v", axis=2), *SCALED, opset=17),
    "rms": made(node("RMSNormalization", "x g", "v"), *SCALED, opset=23),
    "group": made(node("GroupNormalization", "x g h", "v", num_groups=2), batchnorm("v", "n", "y"), shape=MAP),
    "instance": made(node("InstanceNormalization", "x g h", "v"), batchnorm("v", "n", "y"), shape=MAP),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_scale_after_a_norm(name: str) -> None:
    first = ROWS[name].graph.node[0].op_type
    assert order(ROWS[name]) == [first, *(["Add"] if name == "rms" else [])]  # which has no bias


def test_every_norm_is_tested() -> None:
    assert set(NORMS) == {row.graph.node[0].op_type for row in ROWS.values()}


def test_an_affine_token_mixer_is_its_norm() -> None:
    nodes = [
        node("InstanceNormalization", "x g h", "v"), node("Conv", "v d t", "a", group=C), node("Sub", "a v", "b"),
        node("Mul", "b s3", "c"), node("Add", "x c", "y"),
    ]  # fmt: skip
    assert order(made(*nodes, shape=("N", C, "H", "W"))) == ["InstanceNormalization", "Add"]


LEFT: dict[str, ModelProto] = {
    "a matrix": made(node("LayerNormalization", "x g h", "v"), node("MatMul", "v w", "m"), node("Relu", "m", "y")),
    "another axis": made(node("LayerNormalization", "x g h", "v"), node("Mul", "v row", "y")),
    "weights at each position": made(node("LayerNormalization", "x g2", "v", axis=1), node("Mul", "v s", "y")),
    "a kernel": made(
        node("InstanceNormalization", "x g h", "v"), node("Conv", "v k", "y", group=C, pads=[1] * 4), shape=MAP
    ),
    "another user": made(
        node("LayerNormalization", "x g h", "v"), node("Mul", "v s", "m"), node("Relu", "v", "r"),
        node("Sub", "m r", "y"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    assert order(LEFT[name]) == [n.op_type for n in LEFT[name].graph.node]


READ = (node("MatMul", "v w", "m"), node("Add", "m b4", "y"))
TAKEN = {
    "layer": made(node("LayerNormalization", "x g h", "v"), *READ),
    "two readers": made(
        node("LayerNormalization", "x g h", "v"), *READ[:1], node("Add", "m b4", "q"), node("MatMul", "v w2", "n"),
        node("Add", "n b4", "r"), node("Mul", "q r", "y"),
    ),
    "moved": made(
        node("LayerNormalization", "x g h", "v"), node("Transpose", "v", "a", perm=[0, 2, 1]),
        node("Transpose", "a", "u", perm=[0, 2, 1]), node("MatMul", "u w", "m"), node("Add", "m b4", "y"),
    ),
}  # fmt: skip
KEPT = {
    "no bias": made(node("LayerNormalization", "x g", "v"), *READ),
    "no bias, rms": made(node("RMSNormalization", "x g", "v"), *READ, opset=23),
    "a bias that has to be there": made(
        node("InstanceNormalization", "x g h", "v"), node("Conv", "v c1 b3", "y"), shape=MAP
    ),
    "a reader that is not linear": made(*TAKEN["two readers"].graph.node[:3], node("Relu", "v", "r"), outputs="q r"),
    "an output": made(node("LayerNormalization", "x g h", "v"), *READ, outputs="y v"),
    "a skip connection": made(
        node("LayerNormalization", "x g h", "v"), node("MatMul", "v w6", "m"), node("Relu", "m", "r"),
        node("Add", "r v", "y"),
    ),
    "a bias before padding": made(
        node("InstanceNormalization", "x g h", "v"), node("Conv", "v c3 b3", "y", pads=[1] * 4), shape=MAP
    ),
    "a tied weight": made(
        node("LayerNormalization", "x g h", "v"), *READ[:1], node("Add", "m b4", "q"), node("MatMul", "x w", "e"),
        node("Mul", "q e", "y"),
    ),
}  # fmt: skip


def gain_of(name: str, models: dict[str, ModelProto]) -> tuple[np.ndarray, Any]:
    """The gain of the norm in the result, and the report."""
    fused, report = fuse(models[name], objective="params")
    assert report.certificate is None or not report.certificate.undecided
    (norm,) = (n for n in fused.graph.node if n.op_type in NORMS)
    (gain,) = (numpy_helper.to_array(t) for t in fused.graph.initializer if t.name == norm.input[1])
    assert report.after.parameters <= report.before.parameters
    return gain, report


@pytest.mark.parametrize("name", TAKEN)
def test_the_readers_take_gain_and_bias(name: str) -> None:
    gain, _ = gain_of(name, TAKEN)
    assert (gain == 1).all()
    fused, _ = fuse(TAKEN[name])
    assert "norm-folding" not in str(fused), "it stores less, and is no faster"


@pytest.mark.parametrize("name", KEPT)
def test_gain_and_bias_stay(name: str) -> None:
    gain, report = gain_of(name, KEPT)
    assert np.array_equal(gain, PARAMETERS["g"])
    assert report.kept or name.startswith("no bias")  # a gain of ones would be stored in its place
