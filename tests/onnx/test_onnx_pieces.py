"""A convolution that is cut into pieces, some of them scaled: into the rows of these pieces, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from expression_models import operators
from onnx import ModelProto, NodeProto
from onnx_models import Sizes, assert_left, batchnorm, fuse, model, node, norm, rand, reasons

from reparamc.algebra.expr import Scale
from reparamc.compiler import pieces
from reparamc.onnx import fuse as onnx_fuse
from reparamc.report.data import Report

PARAMETERS = {
    "w": rand(12, 6, 3, 3),
    "b": rand(12),
    "sizes": np.array([3, 4, 5]),
    "half": np.array([0.5], np.float32),
    "matrix": rand(6, 12),
    "row": rand(4),
    **norm("q", 3),
    **norm("k", 4, seed=1),
    **norm("v", 5, seed=2),
}
CONV = node("Conv", "x w b", "c", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
SPLIT = node("Split", "c sizes", "q k v", axis=1)
ALONE: dict[str, Any] = {"skip": ["lossless-shrink"]}
"""Channels that no piece takes leave first otherwise."""


def made(*nodes: NodeProto, outputs: str = "y z k", shape: Sizes = ("N", 6, "H", "W"), **more: Any) -> ModelProto:
    used = {name for n in nodes for name in n.input}
    parameters = {name: a for name, a in {**PARAMETERS, **more.pop("parameters", {})}.items() if name in used}
    return model(nodes, parameters, shape, outputs=outputs, **more)


def left(*nodes: NodeProto, outputs: str, reason: str | None, **more: Any) -> None:
    report = assert_left(made(*nodes, outputs=outputs, **more), **ALONE)
    declined = [kept.reason for kept in report.kept if kept.name == "piece-folding"]
    assert declined == ([] if reason is None else [reason])


def folded(*nodes: NodeProto, pieces: int = 1, outputs: str, **more: Any) -> tuple[ModelProto, dict[str, int]]:
    fused, report = fuse(made(*nodes, outputs=outputs, **more), **ALONE)
    assert report.passes["piece-folding"] == pieces, report.kept
    return fused, dict(operators(fused))


def only(fused: ModelProto, op: str) -> NodeProto:
    (found,) = [n for n in fused.graph.node if n.op_type == op]
    return found


def test_a_norm_after_one_piece() -> None:
    fused, found = folded(CONV, SPLIT, batchnorm("q", "q", "y"), node("Relu", "v", "z"), outputs="y z k")
    assert found == {"Conv": 1, "Select": 1, "Relu": 1}
    assert list(only(fused, "Split").output) == ["y", "k", "v"]


def test_what_changes_in_meaning_changes_its_name() -> None:
    fused, _ = folded(CONV, SPLIT, batchnorm("q", "q", "y"), node("Relu", "v", "z"), outputs="y z k")
    assert not {"c", "q"} & {name for n in fused.graph.node for name in n.output}


def test_norms_after_several_pieces() -> None:
    nodes = [CONV, SPLIT, batchnorm("q", "q", "a"), batchnorm("v", "v", "d")]
    nodes += [node("Relu", "a", "y"), node("Transpose", "d", "z", perm=[0, 2, 3, 1])]
    _, found = folded(*nodes, pieces=2, outputs="y z k")
    assert found == {"Conv": 1, "Select": 1, "Relu": 1, "Transpose": 1}


def test_a_norm_and_a_scale_in_a_row() -> None:
    nodes = [CONV, SPLIT, batchnorm("q", "q", "a"), node("Mul", "a s", "y"), node("Relu", "v", "z")]
    _, found = folded(*nodes, pieces=2, outputs="y z k", parameters={"s": rand(1, 3, 1, 1)})
    assert found == {"Conv": 1, "Select": 1, "Relu": 1}


def test_after_a_norm_of_all_pieces() -> None:
    """The first norm goes into the convolution by itself, the second into what becomes of it."""
    every = batchnorm("c", "n", "e")
    nodes = [CONV, every, node("Split", "e sizes", "q k v", axis=1), batchnorm("k", "k", "y"), node("Relu", "q", "z")]
    _, found = folded(*nodes, outputs="y z v", parameters=norm("n", 12))
    assert found == {"Conv": 1, "Select": 1, "Relu": 1}


def test_a_linear_layer() -> None:
    nodes = [node("MatMul", "x matrix", "m"), node("Add", "m b", "c"), node("Split", "c sizes", "q k v", axis=2)]
    nodes += [node("Mul", "k row", "y"), node("Relu", "q", "z")]
    _, found = folded(*nodes, outputs="y z v", shape=("N", "L", 6))
    assert found == {"MatMul": 1, "Add": 1, "Select": 1, "Relu": 1}


def test_a_grouped_convolution() -> None:
    conv = node("Conv", "x u", "c", kernel_shape=[1, 1], group=3)
    nodes = [conv, SPLIT, batchnorm("k", "k", "y"), node("Relu", "q", "z")]
    _, found = folded(*nodes, outputs="y z v", parameters={"u": rand(12, 2, 1, 1)})
    assert found == {"Conv": 1, "Select": 1, "Relu": 1}


def test_several_convolutions_added() -> None:
    """Two that cannot be merged: the scale goes into the rows of both."""
    other = node("ConvTranspose", "x t", "d", kernel_shape=[1, 1])
    nodes = [
        CONV,
        other,
        node("Relu", "d", "r"),
        node("Conv", "r o", "f", kernel_shape=[1, 1]),
        node("Add", "c f", "e"),
    ]
    nodes += [node("Split", "e sizes", "q k v", axis=1), batchnorm("k", "k", "y"), node("Relu", "q", "z")]
    _, found = folded(*nodes, outputs="y z v", parameters={"t": rand(6, 3, 1, 1), "o": rand(12, 3, 1, 1)})
    assert found == {"Conv": 2, "ConvTranspose": 1, "Add": 1, "Select": 1, "Relu": 2}


@pytest.mark.parametrize("opset", [9, 11, 13, 18])
def test_a_split_of_every_opset(opset: int) -> None:
    split = node("Split", "c", "q k v", axis=1, split=[3, 4, 5]) if opset < 13 else SPLIT
    _, found = folded(CONV, split, batchnorm("q", "q", "y"), node("Relu", "v", "z"), outputs="y z k", opset=opset)
    assert found == {"Conv": 1, "Select": 1 if opset > 9 else 3, "Relu": 1}


def cut(*parts: tuple[int, int]) -> tuple[list[NodeProto], dict[str, np.ndarray]]:
    bounds = {f"{side}{at}": np.array([n]) for at, part in enumerate(parts) for side, n in zip("fe", part, strict=True)}
    nodes = [node("Slice", f"c f{at} e{at} one", f"s{at}") for at in range(len(parts))]
    return nodes, {**bounds, "one": np.array([1])}


def test_slices() -> None:
    """They cut it into all its parts, which one Split does."""
    slices, bounds = cut((0, 5), (5, 8), (8, 12))
    nodes = [CONV, *slices, batchnorm("s1", "q", "y"), node("Relu", "s0", "z")]
    fused, found = folded(*nodes, outputs="y z s2", parameters=bounds)
    assert found == {"Conv": 1, "Select": 1, "Relu": 1}
    assert list(only(fused, "Split").output) == ["s0", "y", "s2"]


def test_slices_that_leave_channels_out() -> None:
    slices, bounds = cut((0, 5), (6, 9))
    nodes = [CONV, *slices, batchnorm("s1", "q", "y"), node("Relu", "s0", "z")]
    assert folded(*nodes, outputs="y z", parameters=bounds)[1] == {"Conv": 1, "Select": 2, "Relu": 1}


def test_others_may_overlap() -> None:
    slices, bounds = cut((0, 5), (3, 9), (9, 12))
    nodes = [CONV, *slices, batchnorm("s2", "q", "y"), node("Relu", "s0", "z")]
    assert folded(*nodes, outputs="y z s1", parameters=bounds)[1] == {"Conv": 1, "Select": 3, "Relu": 1}


def test_channels_in_any_order() -> None:
    nodes = [CONV, node("Gather", "c i", "s", axis=1), node("Gather", "c j", "t", axis=1)]
    nodes += [batchnorm("s", "q", "y"), node("Relu", "t", "z")]
    index = {"i": np.array([11, 2, 7]), "j": np.array([0, 1, 0, 5])}
    assert folded(*nodes, outputs="y z", parameters=index)[1] == {"Conv": 1, "Select": 2, "Relu": 1}


SHARED = "another selection reads the channels that it scales"
OTHERS = "the convolution that it scales a piece of is read by something else than selections of channels"


@pytest.mark.parametrize("other", [(2, 5), (0, 1), (0, 11)])
def test_channels_that_another_selection_reads(other: tuple[int, int]) -> None:
    slices, bounds = cut((0, 3), other)
    nodes = [CONV, *slices, batchnorm("s0", "q", "y"), node("Relu", "s1", "z")]
    left(*nodes, outputs="y z", parameters=bounds, reason=SHARED)


def test_a_channel_selected_twice() -> None:
    """Its two copies have scales of their own."""
    nodes = [CONV, node("Gather", "c i", "s", axis=1), node("Gather", "c j", "t", axis=1)]
    nodes += [batchnorm("s", "q", "y"), node("Relu", "t", "z")]
    left(*nodes, outputs="y z", parameters={"i": np.array([4, 5, 4]), "j": np.array([0, 1])}, reason=SHARED)


def test_a_piece_that_something_else_reads() -> None:
    left(CONV, SPLIT, batchnorm("q", "q", "y"), node("Relu", "q", "z"), outputs="y z k v", reason=None)


def test_a_piece_that_is_an_output() -> None:
    left(CONV, SPLIT, batchnorm("q", "q", "y"), node("Relu", "k", "z"), outputs="y z q v", reason=None)


def test_a_convolution_that_something_else_reads() -> None:
    left(CONV, SPLIT, batchnorm("q", "q", "y"), node("Relu", "c", "z"), outputs="y z k v", reason=OTHERS)


def test_a_convolution_whose_sizes_something_reads() -> None:
    """They are asked of others."""
    _, found = folded(CONV, SPLIT, batchnorm("q", "q", "y"), node("Shape", "c", "z"), outputs="y z k v")
    assert found["Conv"] == 1
    assert "BatchNormalization" not in found


def test_a_convolution_that_is_an_output() -> None:
    left(CONV, SPLIT, batchnorm("q", "q", "y"), node("Relu", "k", "z"), outputs="y z c v", reason=OTHERS)


def test_a_selection_of_positions() -> None:
    split = node("Split", "c", "q k", axis=2, num_outputs=2)
    nodes = [CONV, split, batchnorm("q", "n", "y"), node("Relu", "k", "z")]
    left(*nodes, outputs="y z", shape=("N", 6, 8, "W"), opset=18, parameters=norm("n", 12), reason=None)


def test_a_selection_of_positions_beside_that_of_channels() -> None:
    """It reads some positions of every channel."""
    nodes = [CONV, SPLIT, batchnorm("q", "q", "y"), node("Gather", "c i", "s", axis=2), node("Relu", "s", "z")]
    left(*nodes, outputs="y z k", shape=("N", 6, 8, "W"), parameters={"i": np.array([1, 5])}, reason=OTHERS)


def test_a_scale_along_another_axis() -> None:
    nodes = [CONV, SPLIT, node("Mul", "q s", "y"), node("Relu", "k", "z")]
    left(*nodes, outputs="y z v", shape=("N", 6, "H", 8), parameters={"s": rand(8)}, reason=None)


def test_nothing_linear_is_cut() -> None:
    nodes = [node("Relu", "x", "c"), node("Split", "c", "q k", axis=1, num_outputs=2), batchnorm("q", "q", "y")]
    left(*nodes, outputs="y k", opset=18, reason=None)


def test_more_pieces_than_are_considered() -> None:
    count = pieces.MOST_REGIONS + 1
    names = [f"p{at}" for at in range(count)]
    nodes = [node("Conv", "x u", "c", kernel_shape=[1, 1]), node("Split", "c n", " ".join(names), axis=1)]
    nodes += [batchnorm("p0", "q", "y"), *[node("Relu", name, f"r{name}") for name in names[1:]]]
    parameters = {"u": rand(3 * count, 6, 1, 1), "n": np.array([3] * count)}
    left(*nodes, outputs="y " + " ".join(f"r{name}" for name in names[1:]), parameters=parameters, reason=None)


def test_a_factor_beyond_the_range_of_the_type() -> None:
    huge = {"q.v": np.array([1e-40, 1, 1], np.float32), "q.g": np.array([3e30, 1, 1], np.float32)}
    nodes = [CONV, SPLIT, batchnorm("q", "q", "y", epsilon=0.0), node("Relu", "k", "z")]
    _, report = onnx_fuse.fuse_model(made(*nodes, outputs="y z v", parameters=huge), verify="region")
    assert not report.changed
    assert "a folded parameter exceeds the range of float32" in reasons(report)


def test_the_price_decides() -> None:
    """A bias of twelve numbers for six of the scale: fewer operators, more parameters."""
    nodes = [node("Conv", "x w", "c", kernel_shape=[3, 3], pads=[1] * 4), SPLIT, node("Add", "q s", "y")]
    original = made(*nodes, node("Relu", "k", "z"), outputs="y z v", parameters={"s": rand(3, 1, 1)})
    assert fuse(original)[1].passes["piece-folding"] == 1
    assert_left(original, objective="params")


def test_it_is_a_matter_of_the_passes_chosen() -> None:
    original = made(CONV, SPLIT, batchnorm("q", "q", "y"), node("Relu", "v", "z"))
    assert_left(original, skip=["piece-folding"])
    assert_left(original, skip=["scale-folding"])


def test_a_wrong_row_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """All regions stay then, and the rest of the model is rewritten."""
    front = pieces._in_front

    def shifted(*args: Any) -> Any:
        e = front(*args)
        assert isinstance(e, Scale)
        return replace(e, scale=np.roll(e.scale, 1))

    monkeypatch.setattr(pieces, "_in_front", shifted)
    nodes = [CONV, SPLIT, batchnorm("q", "q", "y"), node("Relu", "v", "r"), batchnorm("r", "v", "a")]
    nodes += [node("Conv", "a l", "z", kernel_shape=[1, 1])]
    fused, report = onnx_fuse.fuse_model(made(*nodes, parameters={"l": rand(2, 5, 1, 1)}))
    assert [(f.check, "piece-folding" in f.passes) for f in report.failed] == [("rewrite", True)]
    assert operators(fused) == {"Conv": 2, "Select": 1, "BatchNormalization": 1, "Relu": 1}


def harm(report: Report) -> set[str]:
    return {kept.where for kept in report.kept if kept.reason.startswith("it would hide")}


@pytest.mark.parametrize("hiding", [True, False])
def test_undone_together(monkeypatch: pytest.MonkeyPatch, hiding: bool) -> None:
    """What ONNX Runtime would lose with one of the regions undoes all of them, and no other."""

    def kernels(made: ModelProto) -> dict[str, str]:
        scaled = any(n.op_type == "BatchNormalization" and n.output[0] == "y" for n in made.graph.node)
        return {"z": "Attention"} if scaled or not hiding else {}

    monkeypatch.setattr("reparamc.onnx.runtime_fusions.fused_by_runtime", kernels)
    nodes = [CONV, SPLIT, batchnorm("q", "q", "y"), node("Relu", "v", "r"), batchnorm("r", "v", "a")]
    nodes += [node("Conv", "a l", "z", kernel_shape=[1, 1])]
    fused, report = fuse(made(*nodes, parameters={"l": rand(2, 5, 1, 1)}))
    assert operators(fused)["BatchNormalization"] == int(hiding)
    assert report.passes["bn-folding"] == 1
    assert report.passes["piece-folding"] == int(not hiding)
    assert len(harm(report)) == (3 if hiding else 0)


def test_one_region_reads_two_pieces() -> None:
    nodes = [CONV, node("Split", "c even", "q k v", axis=1), batchnorm("q", "k", "a"), node("Relu", "v", "z")]
    nodes += [node("Add", "a k", "y")]
    fused, report = fuse(made(*nodes, outputs="y z", parameters={"even": np.array([4, 4, 4])}))
    assert operators(fused)["BatchNormalization"] == 0
    assert report.passes["piece-folding"] == 1


def sequence(levels: Sequence[str]) -> list[NodeProto]:
    """Convolutions in pieces, one after the other: each is cut, and its first piece is scaled and goes on."""
    nodes, x = [], "x"
    for at, level in enumerate(levels):
        nodes += [node("Conv", f"{x} u{at}", f"c{level}", kernel_shape=[1, 1])]
        nodes += [node("Split", f"c{level} even", f"q{level} k{level}", axis=1)]
        nodes += [batchnorm(f"q{level}", f"n{at}", f"s{level}"), node("Relu", f"k{level}", f"o{level}")]
        x = f"s{level}" if at % 2 else f"r{level}"
        nodes += [] if at % 2 else [node("Sigmoid", f"s{level}", x)]
    return nodes


def test_pieces_of_pieces() -> None:
    levels = "abc"
    parameters = {f"u{at}": rand(8, 6 if not at else 4, 1, 1, seed=at) for at in range(3)}
    parameters |= {name: a for at in range(3) for name, a in norm(f"n{at}", 4, seed=at).items()}
    outputs = "rc " + " ".join(f"o{level}" for level in levels)
    original = made(*sequence(levels), outputs=outputs, parameters={**parameters, "even": np.array([4, 4])})
    fused, _ = fuse(original)
    assert operators(fused) == {"Conv": 3, "Select": 3, "Relu": 3, "Sigmoid": 2}
