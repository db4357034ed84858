"""Trees of operators that no reader knows: those that are convolutions become one, the others stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from expression_models import assert_close, operators, run
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx_models import assert_left, batchnorm, fuse, model, node, norm, rand

from reparamc.onnx.fuse import fuse_model


def kernel(x: str, y: str, name: str = "w", **attributes: Any) -> NodeProto:
    given: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], **attributes}
    return node("Conv", f"{x} {name}", y, **given)


WEIGHTS = {"w": rand(4, 4, 3, 3), "w2": rand(4, 4, 3, 3, seed=2)}


def integers(**values: Sequence[int]) -> dict[str, np.ndarray]:
    return {name: np.array(v, np.int64) for name, v in values.items()}


def shifted_by_slices(relu: bool = False, shape: Sequence[int | str] = ("N", 4, "H", "W")) -> ModelProto:
    """What a map is less than its neighbour two rows below and two columns to the right, and a matrix of channels."""
    nodes = [
        node("Slice", "x a1 e1 ax", "left"),
        node("Slice", "x a2 e2 ax", "right"),
        node("Sub", "left right", "edges"),
        *([node("Relu", "edges", "clipped")] if relu else []),
        node("Conv", f"{'clipped' if relu else 'edges'} w1", "y", kernel_shape=[1, 1]),
    ]
    parameters = {
        "w1": rand(3, 4, 1, 1),
        **integers(a1=[0, 0], e1=[-2, -2], a2=[2, 2], e2=[2**40, 2**40], ax=[2, 3]),
    }
    return model(nodes, parameters, shape)


def rolled(pad: bool = False) -> ModelProto:
    """The last column put before, which no convolution does; with ``pad`` it is a column of zeros."""
    last = [node("Slice", "x a e ax", "last"), node("Mul", "last zero", "edge")]
    nodes = [
        *(last if pad else [node("Slice", "x a e ax", "edge")]),
        node("Slice", "x b f ax", "rest"),
        node("Concat", "edge rest", "moved", axis=3),
        node("Conv", "moved w1", "y", kernel_shape=[1, 1]),
    ]
    parameters = {"w1": rand(3, 4, 1, 1), "zero": np.zeros((1, 4, 1, 1), np.float32)}
    return model(nodes, {**parameters, **integers(a=[-1], e=[2**40], b=[0], f=[-1], ax=[3])}, ("N", 4, 8, 6))


def einsum(spatial: bool = False) -> ModelProto:
    """A matrix of channels by Einsum after a kernel; or a matrix of rows, which is another one in every place."""
    equation, matrix = ("nchw,hk->nckw", rand(8, 8)) if spatial else ("nchw,oc->nohw", rand(5, 4))
    nodes = [kernel("x", "a", pads=[0, 0, 0, 0]), node("Einsum", "a m", "y", equation=equation)]
    return model(nodes, {**WEIGHTS, "m": matrix}, (2, 4, 10, 7))


def transposed_twice(flip: bool = False) -> ModelProto:
    """channels last, a matrix of channels, a reshape, channels first; or H and W exchanged for good."""
    nodes = [
        node("Transpose", "x", "last", perm=[0, 3, 2, 1] if flip else [0, 2, 3, 1]),
        node("Reshape", "last flat", "rows"),
        node("MatMul", "rows m", "product"),
        node("Reshape", "product map", "again"),
        node("Transpose", "again", "first", perm=[0, 3, 1, 2]),
        kernel("first", "y"),
    ]
    parameters = {**WEIGHTS, "m": rand(4, 4), **integers(flat=[2, 49, 4], map=[2, 7, 7, 4])}
    return model(nodes, parameters, (2, 4, 7, 7))


def depth_to_space(back: bool = True) -> ModelProto:
    """Four times the channels, spread over the map and collected again; or left spread, with a kernel across."""
    nodes = [
        node("Conv", "x w4", "wide", kernel_shape=[1, 1]),
        node("DepthToSpace", "wide", "large", blocksize=2),
        *([node("SpaceToDepth", "large", "y", blocksize=2)] if back else [kernel("large", "y")]),
    ]
    return model(nodes, {**WEIGHTS, "w4": rand(16, 4, 1, 1)}, (1, 4, 6, 5))


def scattered(value: float = 0.0) -> ModelProto:
    """The border of a padded map overwritten by a constant, before a kernel without padding."""
    rows = np.stack([np.zeros(8), np.arange(8)], axis=1).astype(np.int64)  # row 0, every column
    nodes = [
        node("Pad", "x pads", "padded"),
        node("Transpose", "padded", "front", perm=[2, 3, 0, 1]),
        node("ScatterND", "front rows values", "written"),
        node("Transpose", "written", "map", perm=[2, 3, 0, 1]),
        kernel("map", "y", pads=[0, 0, 0, 0]),
    ]
    values = np.full((8, 1, 4), value, np.float32)
    parameters = {**WEIGHTS, "rows": rows, "values": values, **integers(pads=[0, 0, 1, 1, 0, 0, 1, 1])}
    return model(nodes, parameters, (1, 4, 7, 6))


ARE = {
    "slices": shifted_by_slices,
    "slices at one size": lambda: shifted_by_slices(shape=(2, 4, 7, 6)),
    "einsum": einsum,
    "reshape and matmul": transposed_twice,
    "to space and back": depth_to_space,
    "border of zeros": scattered,
}
ARE_NOT = {
    "relu between slices": lambda: shifted_by_slices(relu=True),
    "roll": rolled,
    "einsum along rows": lambda: einsum(spatial=True),
    "axes exchanged": lambda: transposed_twice(flip=True),
    "kernel across pixels": lambda: depth_to_space(back=False),
    "border of ones": lambda: scattered(1.0),
}


@pytest.mark.parametrize("name", ARE)
def test_trees_that_are_convolutions_become_one(name: str) -> None:
    original = ARE[name]()
    fused, report = fuse(original)
    assert operators(fused) == {"Conv": 1}, (operators(fused), report.kept)


@pytest.mark.parametrize("name", ARE_NOT)
def test_trees_that_are_none_keep_their_operators(name: str) -> None:
    original = ARE_NOT[name]()
    fused, _ = fuse(original)
    assert sum(operators(fused).values()) > 1
    if "relu" in name:
        assert operators(fused)["Relu"] == 1


def padded_windows() -> ModelProto:
    """The same difference of two windows into a padded map, which both of them read."""
    nodes = [
        node("Pad", "x pads", "padded"),
        node("Slice", "padded a1 e1 ax", "left"),
        node("Slice", "padded a2 e2 ax", "right"),
        node("Sub", "left right", "edges"),
        kernel("edges", "y", pads=[0, 0, 0, 0]),
    ]
    given = integers(pads=[0, 0, 1, 1, 0, 0, 1, 1], a1=[0, 0], e1=[-2, -2], a2=[2, 1], e2=[2**40, -1], ax=[2, 3])
    return model(nodes, {**WEIGHTS, **given}, ("N", 4, "H", "W"))


def shift(row: int) -> ModelProto:
    """Zeros before, as much less after: the whole map moved down, before a kernel."""
    nodes = [
        node("Pad", "x pads", "padded"),
        node("Slice", "padded a e ax", "moved"),
        kernel("moved", "y", pads=[0, 0, 0, 0]),
    ]
    return model(
        nodes, {**WEIGHTS, **integers(pads=[0, 0, row, 0, 0, 0, 0, 0], a=[0], e=[-row], ax=[2])}, ("N", 4, "H", "W")
    )


MAY_BE = {
    "rolled in zeros": lambda: rolled(pad=True),
    "windows into a padded map": padded_windows,
    "shift by one": lambda: shift(1),
    "shift by two": lambda: shift(2),
}


@pytest.mark.parametrize("name", MAY_BE)
def test_what_needs_a_kernel_that_crops_is_right_either_way(name: str) -> None:
    """Alone some of these operators are kernels with padding below zero, which no runtime takes."""
    fused, _ = fuse(MAY_BE[name]())
    assert operators(fused)["Conv"] == 1


def mixing_samples(kind: str) -> ModelProto:
    """What is a convolution of one sample alone: with one, its mean over the batch is the sample itself."""
    nodes = {
        "mean": [node("ReduceMean", "x", "m", axes=[0]), node("Sub", "x m", "c")],
        "running sum": [node("CumSum", "x axis", "c")],
        "first": [node("Slice", "x zero one zero", "m"), node("Add", "x m", "c")],
    }[kind]
    parameters = {**WEIGHTS, "axis": np.array(0, np.int64), **integers(zero=[0], one=[1])}
    return model([*nodes, kernel("c", "y")], parameters, ("N", 4, 7, 6))


@pytest.mark.parametrize("kind", ["mean", "running sum", "first"])
def test_samples_of_a_batch_stay_apart(kind: str) -> None:
    original = mixing_samples(kind)
    fused, _ = fuse_model(original, verify="off")
    x = rand(3, 4, 7, 6)
    assert_close(run(original, {"x": x})[0], run(fused, {"x": x})[0], 1e-5)


@pytest.mark.parametrize("fold", [False, True])
def test_a_shift_that_the_border_already_has(fold: bool) -> None:
    """A BatchNorm after a 1x1, its map padded with what the norm makes of zeros: exact as a whole, and only so."""
    parameters = {**norm("n", 4), **WEIGHTS, "w1": rand(4, 4, 1, 1), **integers(pads=[0, 0, 1, 1, 0, 0, 1, 1])}
    first = ("Pad", "Conv") if fold else ("Conv", "Pad")
    nodes = (
        [node("Pad", "x pads", "p"), node("Conv", "p w1", "a", kernel_shape=[1, 1]), batchnorm("a", "n", "b")]
        if first[0] == "Pad"
        else [node("Conv", "x w1", "a", kernel_shape=[1, 1]), batchnorm("a", "n", "p"), node("Pad", "p pads", "b")]
    )
    original = model([*nodes, kernel("b", "y", pads=[0, 0, 0, 0])], parameters, ("N", 4, "H", "W"))
    fused, _ = fuse(original)
    assert (operators(fused)["Conv"] == 1) == fold


def test_more_axes_than_a_convolution_has() -> None:
    """As a window of a windowed image is cut."""
    nodes = [node("Slice", "x a e ax", "c"), node("MatMul", "c w", "d"), node("Relu", "d", "y")]
    parameters = {"w": rand(5, 4), **integers(a=[1], e=[2**40], ax=[4])}
    assert_left(model(nodes, parameters, ("N", 4, 2, 2, 3, 5)))


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.DOUBLE])
def test_no_convolution_of_doubles(dtype: int) -> None:
    """ONNX Runtime has none, so that a model of doubles would not run any more."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    nodes = [node("MatMul", "x w", "m"), node("ReduceMean", "m", "r", axes=[2]), node("Relu", "r", "y")]
    original = model(nodes, {"w": rand(4, 12).astype(kind)}, (2, 5, 4), dtype=dtype)
    fused, report = fuse_model(original)
    assert operators(fused)["Conv"] == (dtype == TensorProto.FLOAT)
    assert report.passes["impulse-response"] == (dtype == TensorProto.FLOAT)
    x = rand(2, 5, 4).astype(kind)
    assert_close(run(original, {"x": x})[0], run(fused, {"x": x})[0], 1e-5)


@pytest.mark.parametrize(("height", "folds"), [(5, 1), ("H", 0)])
def test_an_empty_map_that_no_convolution_takes(height: int | str, folds: int) -> None:
    """Twice its operand beside it, which is a 1x1 convolution, but for maps without an element."""
    nodes = [node("Concat", "x x", "c", axis=1), node("Add", "c x", "y")]
    original = model(nodes, {}, ("N", 1, height, 4))
    fused, report = fuse(original)
    assert (operators(fused)["Conv"], report.passes["impulse-response"]) == (folds, folds)
    x = rand(2, 1, 5 if folds else 0, 4)
    assert run(fused, {"x": x})[0].shape == run(original, {"x": x})[0].shape
