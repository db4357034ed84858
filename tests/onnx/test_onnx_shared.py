"""A value that several regions read: what acts on each channel separately goes into all of them, or into none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from expression_models import operators
from onnx import NodeProto
from onnx_models import Sizes, assert_left, batchnorm, fuse, model, node, norm, rand

WEIGHTS = {name: rand(4, 6, 1, 1, seed=at) for at, name in enumerate(("wq", "wk", "wv"))}
KERNELS = {name: rand(5, 6, 3, 3, seed=at) for at, name in enumerate(("w3", "w4"))}
VECTOR = {"s": rand(1, 6, 1, 1)}


def pointwise(x: str, *names: str) -> list[NodeProto]:
    return [node("Conv", f"{x} w{name}", name, kernel_shape=[1, 1]) for name in names]


def kernel(x: str, y: str, weight: str, pad: int) -> NodeProto:
    return node("Conv", f"{x} {weight}", y, kernel_shape=[3, 3], pads=[pad] * 4)


def counted(nodes: list[NodeProto], parameters: dict[str, np.ndarray], outputs: str, *shape: Any) -> dict[str, int]:
    """The operators that are left, outputs having been compared."""
    sizes: Sizes = shape or ("N", 6, "H", "W")
    fused, _ = fuse(model(nodes, parameters, sizes, outputs=outputs))
    return dict(operators(fused))


def left(nodes: list[NodeProto], parameters: dict[str, np.ndarray], outputs: str, *shape: Any) -> None:
    assert_left(model(nodes, parameters, shape or ("N", 6, "H", "W"), outputs=outputs))


def test_a_norm_before_several_projections() -> None:
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
    """The transposition stays one operator, which all three regions share."""
    nodes = [
        batchnorm("x", "n", "b"),
        node("Transpose", "b", "t", perm=[0, 2, 1]),
        *[node("MatMul", f"t m{name}", name) for name in "qkv"],
    ]
    parameters = {**norm("n", 6), **{f"m{name}": rand(6, 4, seed=at) for at, name in enumerate("qkv")}}
    assert counted(nodes, parameters, "q k v", "N", 6, "L") == {"MatMul": 3, "Transpose": 1, "Add": 3}


def pooled_attention(**pool: Any) -> dict[str, int]:
    """A norm before q and of a pooling with a norm of its own, which k and v read (NextViT)."""
    nodes = [
        batchnorm("x", "n", "b"),
        node("Transpose", "b", "t", perm=[0, 2, 1]),
        node("Transpose", "t", "r", perm=[0, 2, 1]),
        node("AveragePool", "r", "p", kernel_shape=[2], strides=[2], **pool),
        batchnorm("p", "m", "c"),
        node("Transpose", "c", "u", perm=[0, 2, 1]),
        node("MatMul", "t mq", "q"),
        node("MatMul", "u mk", "k"),
        node("MatMul", "u mv", "v"),
    ]
    parameters = {**norm("n", 6), **norm("m", 6), **{f"m{name}": rand(6, 40, seed=at) for at, name in enumerate("qkv")}}
    return counted(nodes, parameters, "q k v", "N", 6, "L")


def test_norms_around_a_pooling() -> None:
    assert pooled_attention() == {"MatMul": 3, "Add": 3, "AveragePool": 1, "Transpose": 2}


def test_a_pooling_that_reads_padding_keeps_the_norm_in_front() -> None:
    assert pooled_attention(pads=[1, 1], count_include_pad=1)["BatchNormalization"] == 1


def test_a_pooling_is_not_composed_with_each_of_its_readers() -> None:
    nodes = [node("AveragePool", "x", "p", kernel_shape=[2, 2]), *pointwise("p", "q", "k", "v")]
    assert counted(nodes, WEIGHTS, "q k v") == {"AveragePool": 1, "Conv": 3}
    # Nor with one: ONNX Runtime takes a map that is smaller than the window, a convolution does not.
    assert counted([*nodes[:1], *pointwise("p", "q")], WEIGHTS, "q") == {"AveragePool": 1, "Conv": 1}


def test_layouts_over_different_values_are_no_copies() -> None:
    """One reader takes the norm in, one cannot: the transposition is not made twice."""
    nodes = [
        batchnorm("x", "n", "b"),
        node("Transpose", "b", "t", perm=[0, 2, 1]),
        node("MatMul", "t mq", "q"),
        node("Relu", "t", "k"),
    ]
    left(nodes, {**norm("n", 6), "mq": rand(6, 4)}, "q k", "N", 6, "L")


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


def test_a_crop_after_a_convolution() -> None:
    """Composed, they would be a kernel with padding below zero, which no runtime takes."""
    parameters = {**WEIGHTS, **{n: np.array(v, np.int64) for n, v in {"a": [1], "e": [-1], "ax": [3]}.items()}}
    nodes = [*pointwise("x", "q"), node("Slice", "q a e ax", "y")]
    assert counted(nodes, parameters, "y")["Conv"] == 1


def test_a_crop_before_a_convolution() -> None:
    parameters = {**KERNELS, **{n: np.array(v, np.int64) for n, v in {"a": [1], "e": [-1], "ax": [2]}.items()}}
    nodes = [node("Slice", "x a e ax", "c"), kernel("c", "y", "w3", 0)]
    assert counted(nodes, parameters, "y")["Conv"] == 1


def test_rows_that_two_crops_read_stay_one_crop() -> None:
    """Every other row, and of these every other column and the rest: no crop is replaced by a convolution."""
    ends = np.array([2**31 - 1])
    numbers = {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2]), "three": np.array([3]), "end": ends}
    nodes = [
        node("Slice", "x zero end two two", "a"), node("Slice", "x one end two two", "b"),
        *(node("Slice", f"{rows} {at} end three two", f"{rows}{at}") for rows in "ab" for at in ("zero", "one")),
        node("Concat", "azero aone bzero bone", "f", axis=1), node("Relu", "f", "g"),
        node("Conv", "g w", "c", pads=[1, 1, 1, 1]),
        batchnorm("c", "n", "y"),
    ]  # fmt: skip
    parameters = {"w": rand(5, 24, 3, 3), **norm("n", 5), **numbers}
    assert counted(nodes, parameters, "y", "N", 6, 8, 6) == {"Select": 6, "Concat": 1, "Relu": 1, "Conv": 1}


@pytest.mark.parametrize(
    ("readers", "outputs", "named"),
    [
        ([batchnorm("c", "n", "y"), node("Relu", "c", "z")], "y z", "z"),
        ([node("Relu", "c", "z"), batchnorm("c", "n", "y")], "y z", "z"),
        ([batchnorm("c", "n", "y")], "y c", "the output of the model"),
        ([batchnorm("c", "n", "y"), kernel("c", "z", "w3", 1)], "y z", "z"),
    ],
)
def test_the_reason_names_the_reader_that_is_in_the_way(readers: list[NodeProto], outputs: str, named: str) -> None:
    """Of those that do not fold, or else the second."""
    nodes = [kernel("x", "c", "w", 1), *readers]
    _, report = fuse(model(nodes, {"w": rand(6, 6, 3, 3), "w3": rand(5, 6, 3, 3), **norm("n", 6)}, outputs=outputs))
    assert f"second consumer at {named}" in [kept.reason for kept in report.kept if kept.name == "region"]
