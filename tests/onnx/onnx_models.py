"""Models by hand, and the two ends a test can have: folded or left, with equal outputs either way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from expression_models import assert_close, operators, run
from onnx import ModelProto, NodeProto, TensorProto, checker, helper, numpy_helper, shape_inference

from reparamc.onnx.fuse import fuse_model
from reparamc.onnx.session import random_inputs
from reparamc.report.data import Report

Sizes = Sequence[int | str]
SIZES = (7, 8)


def rand(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    """A node, its operands and results separated by blanks; ``-`` is an absent operand."""
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(op, names, outputs.split(), **attributes)


def model(
    nodes: Sequence[NodeProto],
    parameters: Mapping[str, Any],
    shape: Sequence[int | str | None] = ("N", 6, "H", "W"),
    *,
    outputs: str = "y",
    opset: int = 17,
    ir_version: int = 8,
    dtype: int = TensorProto.FLOAT,
    inputs: Mapping[str, Sizes] | None = None,
    domains: Sequence[str] = (),
    **rest: Any,
) -> ModelProto:
    """A model with input ``x`` of ``shape`` (and ``inputs``) whose outputs are of unknown sizes."""
    infos = [helper.make_tensor_value_info(n, dtype, s) for n, s in {"x": shape, **(inputs or {})}.items()]
    results = [helper.make_empty_tensor_value_info(name) for name in outputs.split()]
    tensors = [numpy_helper.from_array(np.asarray(a, order="C"), n) for n, a in parameters.items()]
    graph = helper.make_graph(list(nodes), "hand-made", infos, results, tensors)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    made = helper.make_model(graph, opset_imports=imports, ir_version=ir_version, **rest)
    inferred = shape_inference.infer_shapes(made).graph
    types = {v.name: v.type.tensor_type for v in (*inferred.input, *inferred.value_info, *inferred.output)}
    for info in made.graph.output:  # the checker asks for a rank, sizes stay unknown
        info.type.tensor_type.elem_type = types[info.name].elem_type or dtype
        info.type.tensor_type.shape.SetInParent()
        for _ in types[info.name].shape.dim if types[info.name].HasField("shape") else shape:
            info.type.tensor_type.shape.dim.add()
    return made


def norm(name: str, channels: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random parameters of a BatchNormalization, one gamma of them negative."""
    rng = np.random.default_rng([seed, channels])
    gamma = rng.uniform(0.5, 1.5, channels)
    gamma[0] *= -1
    drawn = {
        "g": gamma,
        "b": rng.standard_normal(channels),
        "m": rng.standard_normal(channels),
        "v": rng.uniform(0.5, 2, channels),
    }
    return {f"{name}.{kind}": v.astype(np.float32) for kind, v in drawn.items()}


def batchnorm(x: str, prefix: str, y: str, **attributes: Any) -> NodeProto:
    return node("BatchNormalization", f"{x} {prefix}.g {prefix}.b {prefix}.m {prefix}.v", y, **attributes)


W3, W1 = rand(6, 6, 3, 3), rand(6, 6, 1, 1)
N = norm("n", 6)
PAD: dict[str, Any] = {"pads": [1, 1, 1, 1]}
CONV = node("Conv", "x w", "c", name="conv", **PAD)
BN = batchnorm("c", "n", "y", name="bn")


def conv_bn(parameters: Mapping[str, np.ndarray] = N, weight: np.ndarray = W3, **rest: Any) -> ModelProto:
    """A convolution and a BatchNorm on its output; see `model`."""
    return model([CONV, BN], {"w": weight, **parameters}, **rest)


def fuse(original: ModelProto, tolerance: float = 1e-5, **options: Any) -> tuple[ModelProto, Report]:
    """Fuse, and hold the result to the original at odd and even sizes."""
    before = original.SerializeToString()
    fused, report = fuse_model(original, **options)
    assert not report.failed
    assert original.SerializeToString() == before, "the argument was changed"
    checker.check_model(fused, full_check=True)
    assert_equal_outputs(original, fused, tolerance)
    return fused, report


def assert_equal_outputs(original: ModelProto, fused: ModelProto, tolerance: float = 1e-5) -> None:
    assert [o.SerializeToString() for o in original.graph.output] == [o.SerializeToString() for o in fused.graph.output]
    for seed, size in enumerate(SIZES):
        feeds = random_inputs(original, seed, size)
        for a, b in zip(run(original, feeds), run(fused, feeds), strict=True):
            assert_close(a, b, tolerance)


def assert_left(original: ModelProto, **options: Any) -> Report:
    """Nothing may be done to ``original``: not a byte of it."""
    fused, report = fuse(original, **options)
    assert fused.SerializeToString() == original.SerializeToString(), operators(fused)
    assert not report.changed
    return report


def assert_folds(original: ModelProto, tolerance: float = 1e-5, **expected: int) -> ModelProto:
    """``original`` must end with exactly the operators ``expected``."""
    fused, report = fuse(original, tolerance)
    assert operators(fused) == Counter(expected), report.kept
    return fused


def reasons(report: Report) -> list[str]:
    return [kept.reason for kept in report.kept]
