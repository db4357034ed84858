"""Pairs of models that differ on few inputs only: where a model branches, at the ends of a table, at other sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from reparamc import verify_onnx
from reparamc.equivalence import trials

verify = partial(verify_onnx, seconds=60)

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
IMAGE = {"x": ("N", 3, "H", "W")}
TOKENS = {"ids": ("N", "L")}
RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((300, 4)).astype(np.float32)


def changed(table: np.ndarray, row: int) -> np.ndarray:
    table = table.copy()
    table[row] += 1
    return table


def model(
    text: str, inputs: Mapping[str, Sequence[int | str]] = IMAGE, result: int = FLOAT, **constants: object
) -> ModelProto:
    """A model from lines like ``y = Clip(x, lo, hi)``, with attributes after a bar; whole constants are int64."""
    nodes = list[NodeProto]()
    for line in text.strip().splitlines():
        output, _, call = line.strip().partition(" = ")
        call, _, attributes = call.partition(" | ")
        op, _, operands = call.rstrip(")").partition("(")
        given: dict[str, Any] = eval(f"dict({attributes})")
        nodes.append(helper.make_node(op, operands.split(", "), [output], **given))
    arrays = {n: np.asarray(c) for n, c in constants.items()}
    arrays = {n: a.astype(np.float32) if a.dtype == np.float64 else a for n, a in arrays.items()}
    kinds = {n: INT if n.startswith("ids") else FLOAT for n in inputs}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(n, kinds[n], list(shape)) for n, shape in inputs.items()],
        [helper.make_tensor_value_info("y", result, None)], [numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


TWO = {"x": ("N", 3), "z": ("N", 3)}
PLACED = TOKENS | {"ids2": ("N", "L")}
SMALL = np.full((3, 3, 1, 1), 1e-3)
LOOKUP = "y = Gather(e, ids)"
BOTH = "a = Gather(e, ids)\nb = Gather(p, ids2)\ny = Add(a, b)"
CLIP, CLIPPED_CONV = "y = Clip(x, lo, hi)", "c = Conv(x, w)\ny = Clip(c, lo, hi)"
MEAN = "y = ReduceMean(s, a) | keepdims=0"
LARGEST = "y = ArgMax(x) | axis=3, select_last_index="
BESIDE_SMALL = "b = Greater(z, t)\nc = Less(x, s)\nd = And(b, c)\na = Add(x, z)\ny = Where(d, z, a)"
ONE_ROW = "a = Gather(e, ids)\nb = Equal(ids, t)\nu = Unsqueeze(b, k)\nz = Sub(a, a)\ny = Where(u, z, a)"
FIRST_IMAGE = "f = Slice(x, b, e, b)\nz = Sub(x, f)\ns = Add(x, z)\ny = Relu(s)"

PAIRS: dict[str, tuple[ModelProto, ModelProto]] = {
    "above a constant": (model("y = Relu(x)"), model("r = Relu(x)\nb = Greater(x, t)\ny = Where(b, t, r)", t=37.0)),
    "a clip that is lower": (model(CLIP, lo=0.0, hi=6.5), model(CLIP, lo=0.0, hi=6.0)),
    "a clip far away": (model(CLIP, lo=-2e4, hi=2e4), model(CLIP, lo=-2e4, hi=3e4)),
    "a clip after small weights": (
        model(CLIPPED_CONV, w=SMALL, lo=-300.0, hi=300.0),
        model(CLIPPED_CONV, w=SMALL, lo=-300.0, hi=310.0),
    ),
    "at one number": (model("y = Neg(x)"), model("n = Neg(x)\nb = Equal(x, t)\ny = Where(b, t, n)", t=0.375)),
    "near zero": (model("y = Sign(x)"), model("s = Shrink(x) | lambd=1e-5\ny = Sign(s)")),
    "whole numbers": (model("y = Ceil(x)"), model("f = Floor(x)\ny = Add(f, t)", t=1.0)),
    "two largest": (model(LARGEST + "0", result=INT), model(LARGEST + "1", result=INT)),
    "the second input is large": (
        model("y = Add(x, z)", TWO),
        model("c = Clip(z, lo, hi)\ny = Add(x, c)", TWO, lo=-90.0, hi=90.0),
    ),
    "the second input alone is large": (model("y = Add(x, z)", TWO), model(BESIDE_SMALL, TWO, t=90.0, s=5.0)),
    "the first row": (model(LOOKUP, TOKENS, e=TABLE), model(LOOKUP, TOKENS, e=changed(TABLE, 0))),
    "the last row": (model(LOOKUP, TOKENS, e=TABLE), model(LOOKUP, TOKENS, e=changed(TABLE, 299))),
    "the last row beside a short table": (
        model(BOTH, PLACED, e=TABLE, p=TABLE[:4]),
        model(BOTH, PLACED, e=changed(TABLE, 299), p=TABLE[:4]),
    ),
    "one row of many": (model(LOOKUP, TOKENS, e=TABLE), model(ONE_ROW, TOKENS, e=TABLE, t=102, k=[2])),
    "rows from the end": (
        model(LOOKUP, TOKENS, e=TABLE),
        model("m = Max(ids, t)\ny = Gather(e, m)", TOKENS, e=TABLE, t=0),
    ),
    "more than one image": (model("y = Relu(x)"), model(FIRST_IMAGE, b=[0], e=[1])),
    "larger than 100": (
        model("s = Identity(x)\n" + MEAN, a=[2, 3]),
        model("s = Slice(x, b, e, k)\n" + MEAN, a=[2, 3], b=[0], e=[100], k=[2]),
    ),
}


@pytest.fixture(autouse=True)
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn at random, and what is found is not shrunk."""
    monkeypatch.setattr(trials, "search", lambda *_: None)


def test_ties_of_rounding_are_a_doubt() -> None:
    found = verify(model("y = Round(x)"), model("h = Add(x, t)\ny = Floor(h)", t=0.5))
    assert (found.failure, found.equal) == (None, False)
    assert found.doubt.startswith("ties are decided otherwise, at input x [2, 3, 32, 32] (halves")


@pytest.mark.parametrize("name", PAIRS)
def test_a_difference_on_few_inputs_is_found(name: str) -> None:
    original, fused = PAIRS[name]
    found = verify(original, fused)
    assert not found.equal
    assert verify(original, original).equal
