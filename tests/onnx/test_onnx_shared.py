"""A value that several regions read: what acts on each channel by itself goes into all of them, or into none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from expression_models import operators
from onnx import NodeProto
from onnx_models import Extents, assert_left, batchnorm, fuse, model, node, norm, rand

WEIGHTS = {name: rand(4, 6, 1, 1, seed=at) for at, name in enumerate(("wq", "wk", "wv"))}
KERNELS = {name: rand(5, 6, 3, 3, seed=at) for at, name in enumerate(("w3", "w4"))}
VECTOR = {"s": rand(1, 6, 1, 1)}


def pointwise(x: str, *names: str) -> list[NodeProto]:
    return [node("Conv", f"{x} w{name}", name, kernel_shape=[1, 1]) for name in names]


def kernel(x: str, y: str, weight: str, pad: int) -> NodeProto:
    return node("Conv", f"{x} {weight}", y, kernel_shape=[3, 3], pads=[pad] * 4)


def counted(nodes: list[NodeProto], parameters: dict[str, np.ndarray], outputs: str, *shape: Any) -> dict[str, int]:
    """The operators that are left, outputs having been compared."""
    extents: Extents = shape or ("N", 6, "H", "W")
    fused, _ = fuse(model(nodes, parameters, extents, outputs=outputs))
    return dict(operators(fused))


def left(nodes: list[NodeProto], parameters: dict[str, np.ndarray], outputs: str) -> None:
    assert_left(model(nodes, parameters, outputs=outputs))


def test_a_norm_in_front_of_several_projections() -> None:
    nodes = [batchnorm("x", "n", "b"), *pointwise("b", "q", "k", "v")]
    assert counted(nodes, {**norm("n", 6), **WEIGHTS}, "q k v") == {"Conv": 3}


def test_projections_that_meet_in_something_that_is_not_linear() -> None:
    nodes = [
        batchnorm("x", "n", "b"),
        *pointwise("b", "q", "k", "v"),
        node("Mul", "q k", "qk"),
        node("Mul", "qk v", "y"),
    ]
    assert counted(nodes, {**norm("n", 6), **WEIGHTS}, "y") == {"Conv": 3, "Mul": 2}


def test_a_chain_of_scales_is_shared_as_a_whole() -> None:
    nodes = [node("Mul", "x s", "m"), batchnorm("m", "n", "b"), *pointwise("b", "q", "k")]
    assert counted(nodes, {**norm("n", 6), **WEIGHTS, **VECTOR}, "q k") == {"Conv": 2}


def test_linear_layers_of_tokens() -> None:
    """The transposition stays one operator, and is made no second time for the sake of the norm in front of it."""
    nodes = [
        batchnorm("x", "n", "b"),
        node("Transpose", "b", "t", perm=[0, 2, 1]),
        *[node("MatMul", f"t m{name}", name) for name in "qkv"],
    ]
    parameters = {**norm("n", 6), **{f"m{name}": rand(6, 4, seed=at) for at, name in enumerate("qkv")}}
    found = counted(nodes, parameters, "q k v", "N", 6, "L")
    assert found["MatMul"] == 3
    assert found["Transpose"] == 1
    assert set(found) <= {"MatMul", "Transpose", "Add", "BatchNormalization"}


def test_one_padded_reader_keeps_it_for_all() -> None:
    nodes = [batchnorm("x", "n", "b"), kernel("b", "y", "w3", 0), kernel("b", "z", "w4", 1)]
    left(nodes, {**norm("n", 6), **KERNELS}, "y z")


def test_without_a_shift_padding_is_no_matter() -> None:
    nodes = [node("Mul", "x s", "m"), kernel("m", "y", "w3", 0), kernel("m", "z", "w4", 1)]
    assert counted(nodes, {**VECTOR, **KERNELS}, "y z") == {"Conv": 2}


@pytest.mark.parametrize("kind", ["Relu", "Sigmoid", "GlobalMaxPool"])
def test_a_reader_that_is_not_linear_keeps_it(kind: str) -> None:
    nodes = [batchnorm("x", "n", "b"), *pointwise("b", "q"), node(kind, "b", "y")]
    left(nodes, {**norm("n", 6), **WEIGHTS}, "q y")


def test_an_output_keeps_it() -> None:
    nodes = [batchnorm("x", "n", "b"), *pointwise("b", "q", "k")]
    left(nodes, {**norm("n", 6), **WEIGHTS}, "q b k")


def test_a_skip_connection_keeps_it() -> None:
    """The sum reads it beside a ReLU: there it cannot disappear."""
    nodes = [
        batchnorm("x", "n", "b"),
        *pointwise("b", "q"),
        node("Relu", "x", "r"),
        node("Add", "b r", "y"),
    ]
    left(nodes, {**norm("n", 6), **WEIGHTS}, "q y")


def test_a_convolution_is_shared_by_none() -> None:
    nodes = [*pointwise("x", "q"), batchnorm("q", "n", "y"), node("Mul", "q s", "z")]
    left(nodes, {**norm("n", 4), **WEIGHTS, "s": rand(1, 4, 1, 1)}, "y z")


def test_one_shared_value_stays_and_the_other_goes() -> None:
    """The first norm goes into both its readers; the second stays with a padded and an unpadded one."""
    nodes = [
        batchnorm("x", "n", "a"),
        *pointwise("a", "q", "k"),
        node("Relu", "q", "r"),
        batchnorm("r", "o", "b"),
        node("Conv", "b u", "y", kernel_shape=[3, 3]),
        node("Conv", "b u", "z", kernel_shape=[3, 3], pads=[1] * 4),
    ]
    parameters = {**norm("n", 6), **norm("o", 4, seed=1), **WEIGHTS, "u": rand(3, 4, 3, 3)}
    expected = {"Conv": 4, "BatchNormalization": 1, "Relu": 1}
    assert counted(nodes, parameters, "k y z") == expected


@pytest.mark.parametrize("readers", [8, 9, 12])
def test_many_readers(readers: int) -> None:
    """All or none, whatever the limit is; the outputs are compared in any case."""
    nodes = [batchnorm("x", "n", "b")]
    nodes += [node("Conv", f"b w{at}", f"y{at}", kernel_shape=[1, 1]) for at in range(readers)]
    weights = {f"w{at}": WEIGHTS["wq"] * (at + 1) for at in range(readers)}
    found = counted(nodes, {**norm("n", 6), **weights}, " ".join(f"y{at}" for at in range(readers)))
    assert found["Conv"] == readers
    assert found.get("BatchNormalization", 0) == int(readers > 8)


def test_a_crop_behind_a_convolution() -> None:
    """Composed, they would be a kernel with padding below zero, which no runtime takes."""
    parameters = {**WEIGHTS, **{n: np.array(v, np.int64) for n, v in {"a": [1], "e": [-1], "ax": [3]}.items()}}
    nodes = [*pointwise("x", "q"), node("Slice", "q a e ax", "y")]
    assert counted(nodes, parameters, "y")["Conv"] == 1


def test_a_crop_in_front_of_a_convolution() -> None:
    parameters = {**KERNELS, **{n: np.array(v, np.int64) for n, v in {"a": [1], "e": [-1], "ax": [2]}.items()}}
    nodes = [node("Slice", "x a e ax", "c"), kernel("c", "y", "w3", 0)]
    assert counted(nodes, parameters, "y")["Conv"] == 1
