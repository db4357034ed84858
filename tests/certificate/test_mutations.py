"""What the certificate calls equal is equal: pairs of small models, one of them mutated, run in ONNX Runtime."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto
from onnx_models import model, node, rand

from reparamc.certificate.onnx import certify_onnx

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from mutate import difference, pairs

IMAGE = ("N", 4, "H", "W")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_mutated_pair_is_proven_that_differs() -> None:
    verdicts: Counter[str] = Counter()
    assert [found.why for found in pairs(400, 0, verdicts)] == []
    assert verdicts["equal"] > 100
    assert verdicts["different"] > 40


def whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def scaled(*steps: tuple[str, float]) -> ModelProto:
    """A map through steps with a number each."""
    names = ["x", *(f"t{len(steps)}_{n}" for n in range(1, len(steps))), "y"]
    nodes = [node(op, f"{names[n]} s{n}", names[n + 1]) for n, (op, _) in enumerate(steps)]
    return model(nodes, {f"s{n}": np.array(value, np.float32) for n, (_, value) in enumerate(steps)}, IMAGE)


def through(*nodes: object, **parameters: np.ndarray) -> ModelProto:
    return model(list(nodes), parameters, IMAGE)  # pyright: ignore


WEIGHT = rand(4, 2, 3, 3)
LIES: dict[str, tuple[ModelProto, ModelProto]] = {
    "a gather of what is not there": (
        through(node("Gather", "x i", "y", axis=1), i=whole(0, 1, 2, 3)),
        through(node("Gather", "x i", "y", axis=1), i=whole(0, 1, 2, 7)),
    ),
    "keepdims of -1": (
        through(node("ReduceMean", "x", "y", axes=[2], keepdims=1)),
        through(node("ReduceMean", "x", "y", axes=[2], keepdims=-1)),
    ),
    "pads beside auto_pad": (
        through(node("Conv", "x w", "y", group=2, auto_pad="VALID"), w=WEIGHT),
        through(node("Conv", "x w", "y", group=2, auto_pad="VALID", pads=[0] * 4), w=WEIGHT),
    ),
    "groups that do not fit": (
        through(node("Conv", "x w", "y", group=2), w=WEIGHT),
        through(node("Conv", "x w", "y", group=3), w=WEIGHT),
    ),
    "an attribute that the operator does not have": (
        through(node("Conv", "x w", "y", group=2), w=WEIGHT),
        through(node("Conv", "x w", "y", group=2, ceil_mode=1), w=WEIGHT),
    ),
    "an overflow on the way": (scaled(("Mul", 1.0)), scaled(("Mul", 2.0**110), ("Mul", 2.0**-110))),
    "an underflow on the way": (scaled(("Mul", 1.0)), scaled(*[("Mul", 2.0**n) for n in (-120, -25, 127, 18)])),
    "digits that are lost on the way": (scaled(("Mul", 1.0)), scaled(("Add", 2.0**30), ("Sub", 2.0**30))),
    "a batch of 0": (
        through(node("Identity", "x", "y")), through(node("Reshape", "x s", "y"), s=whole(0, 4, 0, -1)),
    ),
    "a border that is cropped first": (
        through(node("Relu", "x", "y")),
        through(
            node("Pad", "x p", "a"), node("Pad", "a q", "b"), node("Relu", "b", "y"),
            p=whole(0, 0, 0, 0, 0, 0, 3, 0), q=whole(0, 0, 0, 0, 0, 0, -3, 0),
        ),
    ),
    "what nothing reads and does not run": (
        through(node("Relu", "x", "y")),
        through(node("Conv", "x w", "dead", group=3), node("Relu", "x", "y"), w=WEIGHT),
    ),
    "what cancels and does not run": (
        through(node("Relu", "x", "y")),
        through(node("Conv", "x w", "a", group=3), node("Sub", "a a", "b"), node("Relu", "x", "r"),
                node("Add", "r b", "y"), w=WEIGHT),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_what_does_not_run_alike_is_not_proven(name: str) -> None:
    """ONNX Runtime is the witness, but for a crop, which it takes at all sizes."""
    original, result = LIES[name]
    if name != "a border that is cropped first":
        assert difference(original, result, np.random.default_rng(0))
        assert not certify_onnx(original, result).holds
    assert certify_onnx(original, original).holds


def test_an_overflow_that_the_original_has_as_well_is_no_reason() -> None:
    assert certify_onnx(scaled(("Mul", 2.0**60), ("Mul", 2.0**-60)), scaled(("Mul", 1.0))).holds
    steps = [("Mul", 2.0**60), ("Mul", 2.0**-60), ("Mul", 1.0)]
    assert certify_onnx(scaled(*steps), scaled(("Mul", 2.0**60), ("Mul", 2.0**-60))).holds
