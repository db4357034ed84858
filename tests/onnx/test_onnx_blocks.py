"""Positions as channels before a convolution (Focus, SpaceToDepth, patches), and channels as positions after one."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from expression_models import run
from onnx import ModelProto, NodeProto, numpy_helper
from onnx_models import fuse, model, node, rand, reasons

from reparamc import verify_onnx
from reparamc.onnx.fuse import fuse_model

INTS = {"0": [0], "1": [1], "2": [2], "3": [3], "end": [2**62], "-2": [-2]}
NUMBERS = {name: np.array(values) for name, values in INTS.items()}


def slices(name: str, row: str, column: str, end: str = "end") -> list[NodeProto]:
    """As an exporter writes ``x[..., row::2, column::2]``: one axis after the other."""
    return [node("Slice", f"x {row} {end} 2 2", f"{name}r"), node("Slice", f"{name}r {column} end 3 2", name)]


def focus(kernel: int, pads: int, shape: Any, end: str = "end", **attributes: Any) -> ModelProto:
    parts = [part for i, (c, r) in enumerate(product("01", "01")) for part in slices(f"p{i}", r, c, end)]
    conv = node("Conv", "c w b", "d", pads=[pads] * 4, **attributes)
    nodes = [*parts, node("Concat", "p0 p1 p2 p3", "c", axis=1), conv, node("Relu", "d", "y")]
    return model(nodes, NUMBERS | {"w": rand(8, 12, kernel, kernel), "b": rand(8)}, shape)


def convolved(original: ModelProto, **options: Any) -> NodeProto:
    """The only convolution of the result, which is proven and has nothing but a ReLU beside it."""
    fused, report = fuse(original, **options)
    assert [n.op_type for n in fused.graph.node] == ["Conv", "Relu"], report.kept
    assert report.certificate is not None
    assert (report.certificate.equal, report.certificate.undecided) == (1, ())
    return fused.graph.node[0]


def attributes(conv: NodeProto) -> dict[str, list[int]]:
    return {a.name: list(a.ints) for a in conv.attribute if a.ints}


@pytest.mark.parametrize(("kernel", "pads"), [(1, 0), (2, 1), (3, 1), (3, 0)])
@pytest.mark.parametrize("shape", [(1, 3, 8, 10), (3, 3, 8, 6)])
def test_focus(kernel: int, pads: int, shape: Any) -> None:
    conv = convolved(focus(kernel, pads, shape))
    found = attributes(conv)
    assert found["kernel_shape"] == [2 * kernel] * 2
    assert found["strides"] == [2, 2]
    assert found["pads"] == [2 * pads] * 4


def test_focus_at_every_size_that_it_takes() -> None:
    """The slices of an odd map have two sizes: then neither the original nor what it is a part of runs."""
    original = focus(3, 1, ("N", 3, "H", "W"))
    for n in original.graph.node:
        n.name = n.output[0]
    fused, report = fuse_model(original)
    assert [n.op_type for n in fused.graph.node] == ["Conv", "Relu"]
    assert report.certificate is not None
    assert report.certificate.equal == 1
    for n, h, w in [(1, 2, 2), (3, 4, 10), (1, 12, 2), (0, 4, 4)]:
        x = rand(n, 3, h, w)
        before, after = run(original, {"x": x})[0], run(fused, {"x": x})[0]
        assert before.shape == after.shape
        np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)


def test_slices_that_end_early_meet_no_padding() -> None:
    _, report = fuse(focus(3, 1, (1, 3, 8, 8), end="-2"))
    assert report.passes["space-to-depth"] == 0
    assert any("leaves out values" in reason for reason in reasons(report))


def blocks(outer: bool) -> list[NodeProto]:
    order = [0, 3, 5, 1, 2, 4] if outer else [0, 1, 3, 5, 2, 4]
    return [node("Reshape", "x apart", "a"), node("Transpose", "a", "t", perm=order), node("Reshape", "t joined", "c")]


@pytest.mark.parametrize("kind", ["SpaceToDepth", "outer", "inner"])
@pytest.mark.parametrize("batch", [1, 3])
def test_blocks(kind: str, batch: int) -> None:
    shape = (batch, 3, 8, 12)
    nodes = [node("SpaceToDepth", "x", "c", blocksize=2)] if kind == "SpaceToDepth" else blocks(kind == "outer")
    sizes = {"apart": np.array([batch, 3, 4, 2, 6, 2]), "joined": np.array([batch, 12, 4, 6])}
    used = {name: v for name, v in sizes.items() if kind != "SpaceToDepth"}
    conv = node("Conv", "c w b", "d", pads=[1, 1, 1, 1], strides=[1, 2])
    made = model([*nodes, conv, node("Relu", "d", "y")], used | {"w": rand(8, 12, 3, 3), "b": rand(8)}, shape)
    found = attributes(convolved(made))
    assert (found["kernel_shape"], found["strides"]) == ([6, 6], [2, 4])


def test_space_to_depth_of_open_sizes() -> None:
    nodes = [node("SpaceToDepth", "x", "c", blocksize=3), node("Conv", "c w", "d"), node("Relu", "d", "y")]
    original = model(nodes, {"w": rand(8, 18, 1, 1)}, ("N", 2, "H", "W"))
    fused, report = fuse_model(original)
    assert [n.op_type for n in fused.graph.node] == ["Conv", "Relu"]
    assert report.certificate is not None
    assert report.certificate.equal == 1
    x = rand(2, 2, 9, 12)
    np.testing.assert_allclose(run(original, {"x": x})[0], run(fused, {"x": x})[0], rtol=1e-4, atol=1e-4)


def test_what_else_reads_the_blocks_stays() -> None:
    nodes = [node("SpaceToDepth", "x", "c", blocksize=2), node("Conv", "c w", "d"), node("Relu", "c", "y"),
             node("Relu", "d", "z")]  # fmt: skip
    fused, _ = fuse(model(nodes, {"w": rand(8, 12, 1, 1)}, (1, 3, 8, 8), outputs="y z"))
    assert [n.op_type for n in fused.graph.node].count("SpaceToDepth") == 1


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_a_matrix_after_a_pixel_shuffle(mode: str) -> None:
    nodes = [node("Conv", "x w b", "c", pads=[1] * 4), node("DepthToSpace", "c", "d", blocksize=2, mode=mode),
             node("Conv", "d m n", "e"), node("Relu", "e", "y")]  # fmt: skip
    tensors = {"w": rand(12, 8, 3, 3), "b": rand(12), "m": rand(3, 3, 1, 1), "n": rand(3)}
    fused, report = fuse(model(nodes, tensors, (2, 8, 5, 6)))
    assert [n.op_type for n in fused.graph.node] == ["Conv", "DepthToSpace", "Relu"]
    assert report.certificate is not None
    assert (report.certificate.equal, report.certificate.undecided) == (1, ())


def test_sizes_that_the_standard_refuses_are_no_disagreement() -> None:
    """Of a map of one row, ONNX Runtime leaves out the slice that is empty; the standard refuses to join the others."""
    original = focus(3, 1, ("N", 3, "H", "W"))
    fused, _ = fuse_model(original)
    assert run(original, {"x": rand(1, 3, 1, 1)})[0].shape == (1, 8, 1, 1)
    found = verify_onnx(original, fused, seconds=2)
    assert found.failure is None
    assert found.compared
    (kernel,) = (t for t in fused.graph.initializer if t.name == fused.graph.node[0].input[1])
    kernel.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(kernel), kernel.name))
    assert verify_onnx(original, fused, seconds=2).failure is not None
