"""1/sqrt(d) after channels that have been split into heads: into the projection that computes the queries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from expression_models import operators
from onnx import ModelProto, NodeProto
from onnx_models import Sizes, assert_left, fuse, model, node, rand, reasons

from reparamc.certificate.onnx import certify_onnx
from reparamc.onnx.fuse import fuse_model

WIDTH, HEADS, EACH = 6, 2, 4
PARAMETERS = {
    "wq": rand(WIDTH, 8),
    "wk": rand(WIDTH, 8, seed=1),
    "w": rand(WIDTH, 24),
    "b": rand(24),
    "half": np.array(0.5, np.float32),
    "some": np.array([0.25], np.float32),
    "heads": np.array([0, 0, HEADS, EACH]),
    "apart": np.array([0, 0, 3, HEADS, EACH]),
    "inner": np.array([0, 0, HEADS, 3, EACH]),
    "first": np.array([0]),
    **{str(n): np.array(n) for n in range(3)},
}
PROJECTION = [node("MatMul", "x w", "m"), node("Add", "m b", "c")]
IN_HEADS = [*PROJECTION, node("Reshape", "c apart", "r"), node("Transpose", "r", "t", perm=[2, 0, 3, 1, 4])]
SCORES = [node("Transpose", "k", "kt", perm=[0, 1, 3, 2]), node("MatMul", "s kt", "y"), node("Relu", "v", "z")]
TAKEN = [node("Gather", f"t {n}", name, axis=0) for n, name in enumerate("qkv")]
SPLIT = [
    node("Split", "t", "qs ks vs", axis=0, num_outputs=3),
    *(node("Squeeze", f"{name}s first", name) for name in "qkv"),
]


def made(
    *nodes: NodeProto, shape: Sizes = ("N", "L", WIDTH), outputs: str = "y z", **parameters: np.ndarray
) -> ModelProto:
    given = {**PARAMETERS, **parameters}
    used = {name for n in nodes for name in n.input}
    return model(nodes, {n: a for n, a in given.items() if n in used}, shape, outputs=outputs, opset=18)


def folded(*nodes: NodeProto, **more: Any) -> dict[str, int]:
    original = made(*nodes, **more)
    fused, report = fuse(original)
    assert report.certificate is not None
    assert report.certificate.equal
    assert not report.certificate.undecided
    return dict(operators(fused))


@pytest.mark.parametrize("shape", [("N", "L", WIDTH), (2, 5, WIDTH)])
def test_queries_of_their_own(shape: Sizes) -> None:
    nodes = [node("MatMul", f"x w{name}", name) for name in "qk"]
    nodes += [node("Reshape", f"{name} heads", f"{name}r") for name in "qk"]
    nodes += [node("Transpose", "qr", "qt", perm=[0, 2, 1, 3]), node("Transpose", "kr", "kt", perm=[0, 2, 3, 1])]
    nodes += [node("Mul", "qt half", "s"), node("MatMul", "s kt", "y")]
    assert "Mul" not in folded(*nodes, shape=shape, outputs="y")


@pytest.mark.parametrize("pieces", [TAKEN, SPLIT], ids=["gather", "split"])
@pytest.mark.parametrize("shape", [("N", "L", WIDTH), (2, 5, WIDTH)])
def test_queries_of_one_projection(pieces: list[NodeProto], shape: Sizes) -> None:
    found = folded(*IN_HEADS, *pieces, node("Mul", "q half", "s"), *SCORES, shape=shape)
    assert "Mul" not in found
    assert (found["MatMul"], found["Transpose"], found["Select"]) == (2, 2, 1 if pieces is SPLIT else 3)


def test_queries_and_keys() -> None:
    """As exporters write it that give each the square root."""
    more = [node("Mul", "q some", "s"), node("Transpose", "k", "ku", perm=[0, 1, 3, 2]), node("Mul", "ku some", "kt")]
    assert "Mul" not in folded(*IN_HEADS, *TAKEN, *more, node("MatMul", "s kt", "y"), node("Relu", "v", "z"))


def test_a_quotient_and_a_sum() -> None:
    more = [node("Div", "q half", "d"), node("Add", "d some", "s")]
    assert folded(*IN_HEADS, *TAKEN, *more, *SCORES)["Add"] == 1


def test_q_k_and_v_in_each_head() -> None:
    nodes = [*PROJECTION, node("Reshape", "c inner", "r")]
    for n, name in enumerate("qkv"):
        nodes += [node("Gather", f"r {n}", f"{name}g", axis=3), node("Transpose", f"{name}g", name, perm=[0, 2, 1, 3])]
    assert "Mul" not in folded(*nodes, node("Mul", "q half", "s"), *SCORES)


def test_a_factor_for_every_head() -> None:
    factor = np.array([0.5, -2.0], np.float32).reshape(1, 2, 1, 1)
    assert "Mul" not in folded(*IN_HEADS, *TAKEN, node("Mul", "q f", "s"), *SCORES, f=factor)


def test_a_factor_for_every_channel_of_a_head() -> None:
    assert "Mul" not in folded(*IN_HEADS, *TAKEN, node("Mul", "q f", "s"), *SCORES, f=rand(EACH))


def test_cut_before_it_is_split_into_heads() -> None:
    bounds = {f"b{n}": np.array([8 * n]) for n in range(4)}
    nodes = [*PROJECTION]
    for n, name in enumerate("qkv"):
        nodes += [node("Slice", f"c b{n} b{n + 1} axis", f"{name}c"), node("Reshape", f"{name}c heads", f"{name}r")]
        nodes += [node("Transpose", f"{name}r", name, perm=[0, 2, 1, 3])]
    found = folded(*nodes, node("Mul", "q half", "s"), *SCORES, axis=np.array([2]), **bounds)
    assert "Mul" not in found


def test_a_factor_before_patches() -> None:
    nodes = [node("Div", "x bytes", "i"), node("Reshape", "i six", "r")]
    nodes += [node("Transpose", "r", "t", perm=[0, 2, 4, 1, 3, 5]), node("Reshape", "t flat", "p")]
    nodes += [node("MatMul", "p e", "y")]
    parameters = {"bytes": np.array(255, np.float32), "six": np.array([2, 3, 2, 4, 2, 4])}
    parameters |= {"flat": np.array([2, 4, 48]), "e": rand(48, 5)}
    assert "Div" not in folded(*nodes, shape=(2, 3, 8, 8), outputs="y", **parameters)


def test_positions_along_which_something_varies() -> None:
    """A factor for every token is none of the projection."""
    assert_left(made(*IN_HEADS, *TAKEN, node("Mul", "q f", "s"), *SCORES, shape=(2, 5, WIDTH), f=rand(5, 1)))


def test_queries_that_are_read_unscaled_as_well() -> None:
    assert_left(made(*IN_HEADS, *TAKEN, node("Mul", "q half", "s"), *SCORES, node("Relu", "q", "u"), outputs="y z u"))


def test_a_projection_that_is_read_whole() -> None:
    assert_left(made(*IN_HEADS, *TAKEN, node("Mul", "q half", "s"), *SCORES, node("Relu", "c", "u"), outputs="y z u"))


def test_after_something_that_is_not_linear() -> None:
    nodes = [node("Relu", "x", "c"), node("Reshape", "c heads", "r"), node("Mul", "r half", "y")]
    report = assert_left(made(*nodes, shape=("N", "L", 8), outputs="y"))
    assert "may belong to an activation" in "".join(reasons(report))


def test_heads_without_a_scale_stay() -> None:
    report = assert_left(made(*IN_HEADS, *TAKEN, node("MatMul", "q k", "y"), node("Relu", "v", "z"), shape=(2, 4, 6)))
    assert reasons(report) == ["second consumer at k"]


def test_what_the_certificate_says_of_the_wrong_rows() -> None:
    original = made(*IN_HEADS, *TAKEN, node("Mul", "q half", "s"), *SCORES)
    right, _ = fuse(original)
    for rows in (slice(0, 8), slice(8, 16), slice(0, 4), slice(0, 9), slice(1, 9)):
        wrong = np.array(PARAMETERS["w"])
        wrong[:, rows] *= 0.5
        bias = np.array(PARAMETERS["b"])
        bias[rows] *= 0.5
        other = ModelProto()
        other.CopyFrom(right)
        for tensor in other.graph.initializer:
            if len(tensor.dims) == 2:
                tensor.raw_data = wrong.tobytes()
            elif tuple(tensor.dims) == (24,):
                tensor.raw_data = bias.tobytes()
        found = certify_onnx(original, other)
        assert {w.verdict for w in found.windows} == ({"equal"} if rows == slice(0, 8) else {"equal", "different"})


def test_a_position_along_an_axis_without_any() -> None:
    """No runtime computes that, and it is for the runtime to say."""
    made = model([node("Gather", "x 0", "y", axis=1)], {"0": np.array(0)}, ("N", 0, 6), opset=18)
    fused, report = fuse_model(made, verify="region")
    assert fused.SerializeToString() == made.SerializeToString()
    assert not report.changed
