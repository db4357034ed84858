"""A result runs wherever its original ran: also on maps smaller than a kernel, and gives the same there."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from expression_models import operators
from onnx import NodeProto
from onnx_models import PAD, batchnorm, model, node, norm, rand

from reparamc.onnx.fuse import fuse_model
from reparamc.onnx.session import session

SIZES = (0, 1, 2, 3, 4, 7)
WEIGHTS = {
    "w": rand(6, 6, 3, 3),
    "w1": rand(6, 6, 1, 1),
    "wide": rand(6, 6, 5, 5),
    "apart": rand(6, 1, 3, 3),
    "up": rand(6, 6, 2, 2),
    "one": np.array([1, 1]),
    "last": np.array([-1, -1]),
    "axes": np.array([2, 3]),
    "around": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "nothing": np.float32(0),
    **norm("n", 6),
}
TWO = {"strides": [2, 2]}


def crop(x: str, y: str) -> NodeProto:
    return node("Slice", f"{x} one last axes", y)


def pool(x: str, y: str, kernel: int, pad: int = 0) -> NodeProto:
    return node("AveragePool", x, y, kernel_shape=[kernel] * 2, pads=[pad] * 4, count_include_pad=1, **TWO)


CASES: dict[str, list[NodeProto]] = {
    "crop after": [node("Conv", "x w", "a", **PAD), crop("a", "b"), batchnorm("b", "n", "y")],
    "crop before": [crop("x", "a"), node("Conv", "a w", "b", **PAD), batchnorm("b", "n", "y")],
    "crop between": [node("Conv", "x w1", "a"), crop("a", "b"), node("Conv", "b w1", "c"), batchnorm("c", "n", "y")],
    "crop and pad": [
        crop("x", "a"),
        node("Pad", "a around nothing", "b"),
        node("Conv", "b w", "c"),
        batchnorm("c", "n", "y"),
    ],
    "pad and crop": [
        node("Pad", "x around nothing", "a"),
        crop("a", "b"),
        node("Conv", "b w", "c", **PAD),
        batchnorm("c", "n", "y"),
    ],
    "pad after": [
        node("Conv", "x w", "a"),
        node("Pad", "a around nothing", "b"),
        node("Conv", "b w1", "c"),
        batchnorm("c", "n", "y"),
    ],
    "pooling before": [pool("x", "a", 2), node("Conv", "a w1", "b"), batchnorm("b", "n", "y")],
    "wide pooling": [pool("x", "a", 3), node("Conv", "a w1", "b"), batchnorm("b", "n", "y")],
    "padded pooling": [pool("x", "a", 3, 1), node("Conv", "a w1", "b"), batchnorm("b", "n", "y")],
    "pooling after": [node("Conv", "x w1", "a"), batchnorm("a", "n", "b"), pool("b", "y", 2)],
    "pooling beside": [
        pool("x", "a", 2),
        node("Conv", "x up", "b", **TWO),
        node("Add", "a b", "c"),
        batchnorm("c", "n", "y"),
    ],
    "crop beside": [crop("x", "a"), node("Conv", "x w", "b"), node("Add", "a b", "c"), batchnorm("c", "n", "y")],
    "two depthwise": [
        node("Conv", "x apart", "a", group=6, **PAD),
        node("Conv", "a apart", "b", group=6),
        batchnorm("b", "n", "y"),
    ],
    "branches": [
        node("Conv", "x wide", "a", pads=[2] * 4),
        node("Conv", "x w", "b", **PAD),
        node("Sum", "a b x", "c"),
        batchnorm("c", "n", "y"),
    ],
    "strided branches": [
        node("Conv", "x w", "a", **PAD, **TWO),
        node("Conv", "x w1", "b", **TWO),
        node("Add", "a b", "c"),
        batchnorm("c", "n", "y"),
    ],
    "transposed": [node("ConvTranspose", "x up", "a", **TWO), crop("a", "b"), batchnorm("b", "n", "y")],
}


@pytest.mark.parametrize("name", CASES)
def test_every_size_that_the_original_takes(name: str) -> None:
    nodes = CASES[name]
    used = {operand for n in nodes for operand in n.input}
    made = model(nodes, {k: v for k, v in WEIGHTS.items() if k in used}, ("N", 6, "H", "W"))
    fused, _ = fuse_model(made, verify="off")
    taken = 0
    with session(made, "the model") as original, session(fused, "the result") as result:
        for batch, height, width in product((1, 3), SIZES, SIZES):
            x = np.random.default_rng(0).standard_normal((batch, 6, height, width)).astype(np.float32)
            try:
                expected = original({"x": x})["y"]
            except Exception:  # ONNX Runtime's exceptions share no base class
                continue
            taken += 1
            found = result({"x": x})["y"]
            assert found.shape == expected.shape
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert taken >= 8


@pytest.mark.parametrize("name", ["pooling before", "wide pooling", "crop between"])
def test_the_rest_of_a_region_is_folded_all_the_same(name: str) -> None:
    nodes = CASES[name]
    used = {operand for n in nodes for operand in n.input}
    made = model(nodes, {k: v for k, v in WEIGHTS.items() if k in used}, ("N", 6, "H", "W"))
    assert operators(fuse_model(made)[0])["BatchNormalization"] == 0


def test_a_map_that_is_large_enough_takes_the_pooling_in() -> None:
    nodes = CASES["pooling before"]
    used = {operand for n in nodes for operand in n.input}
    made = model(nodes, {k: v for k, v in WEIGHTS.items() if k in used}, (1, 6, 8, 8))
    assert operators(fuse_model(made)[0]) == {"Conv": 1}
