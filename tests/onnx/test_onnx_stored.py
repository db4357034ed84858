"""The objective "params" counts what the whole file stores: a weight that others hold stays in it."""

from __future__ import annotations

import numpy as np
import pytest
from expression_models import operators
from onnx import ModelProto, NodeProto
from onnx_models import W3, batchnorm, fuse, model, node, norm, rand

from reparamc.onnx.fuse import count


def heads(weights: str, *more: NodeProto) -> ModelProto:
    """A map for each weight: a convolution, and a BatchNormalization of its own."""
    nodes, norms = list[NodeProto](), dict[str, np.ndarray]()
    for i, w in enumerate(weights):
        nodes += [node("Conv", f"x {w}", f"c{i}", pads=[1] * 4), batchnorm(f"c{i}", f"n{i}", f"b{i}")]
        nodes.append(node("Tanh", f"b{i}", f"y{i}"))
        norms |= norm(f"n{i}", 6, seed=i)
    results = " ".join([*(f"y{i}" for i in range(len(weights))), *(n.output[0] for n in more)])
    stored = {"w": W3, "u": rand(6, 6, 3, 3, seed=1)}
    return model([*nodes, *more], {k: a for k, a in stored.items() if k in weights} | norms, outputs=results)


SUM = node("ReduceSum", "w", "s", keepdims=0)


@pytest.mark.parametrize(
    ("weights", "more", "left"),
    [
        ("w", (), 0), ("wu", (), 0), ("ww", (), 2), ("www", (), 3), ("wuw", (), 2), ("wu", (SUM,), 1),
    ],
)  # fmt: skip
def test_shared_weights(weights: str, more: tuple[NodeProto, ...], left: int) -> None:
    made = heads(weights, *more)
    fused, report = fuse(made, objective="params", skip=["constant-folding"])
    assert operators(fused)["BatchNormalization"] == left
    assert count(fused).parameters <= count(made).parameters
    assert sum("stored once more" in kept.reason for kept in report.kept) == left
    assert operators(fuse(made)[0])["BatchNormalization"] == 0


def test_a_small_weight_pays_all_the_same() -> None:
    """Four numbers per channel of a BatchNormalization are more than a depthwise weight of one tap and a bias."""
    nodes = [
        n
        for i in range(2)
        for n in (
            node("Conv", "x d", f"c{i}", group=6),
            batchnorm(f"c{i}", f"n{i}", f"b{i}"),
            node("Tanh", f"b{i}", f"y{i}"),
        )
    ]
    made = model(nodes, {"d": rand(6, 1, 1, 1), **norm("n0", 6), **norm("n1", 6, seed=1)}, outputs="y0 y1")
    fused, _ = fuse(made, objective="params")
    assert operators(fused)["BatchNormalization"] == 0
    assert count(fused).parameters < count(made).parameters


@pytest.mark.parametrize("wide", [9, 90])
def test_a_matrix_that_is_read_turned_as_well_is_stored_once(wide: int) -> None:
    """As a tied embedding: neither a factor nor the transposed matrix is stored beside it."""
    nodes = [node("Transpose", "w", "t", perm=[1, 0]), node("MatMul", "x w", "a"), node("Mul", "a s", "b"),
             node("Relu", "b", "c"), node("MatMul", "c t", "y")]  # fmt: skip
    made = model(nodes, {"w": rand(wide, 7), "s": rand(7)}, (2, wide))
    fused, report = fuse(made, objective="params")
    assert count(fused).parameters == count(made).parameters
    assert any("stored once more" in kept.reason for kept in report.kept)
