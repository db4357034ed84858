"""Regions fed with the original's values: what rounding explains of them, and what the truth is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from reparamc.equivalence.difference import Outputs
from reparamc.equivalence.end_to_end import Alone, Region, compare_regions
from reparamc.errors import VerificationError

EPSILON = float(np.finfo(np.float32).eps)
BIG = np.float32(1e6)

Values = Callable[[Outputs], np.ndarray]


def cancelling(x: np.ndarray) -> np.ndarray:
    """x + 1e6 - 1e6 in float32, which keeps a tenth of x."""
    return (x + BIG) - BIG


def wide(values: Outputs) -> np.ndarray:
    return values["x"].astype(np.float64)


def judged(
    actual: np.ndarray, x: np.ndarray, exact: Values | None, read: Values | None = wide, terms: float = 2e6
) -> None:
    """Compare x with a region that is x + 1e6 - 1e6: ``exact`` by its operators, ``read`` by us, with such terms."""
    expected = {"r": cancelling(x), "x": x}
    reading = None if read is None else lambda values: (read(values), terms + np.abs(values["x"]), np.abs(values["x"]))
    region = Region("r", ("x",), "region", "before", "after", -2, reading)
    truth = None if exact is None else lambda region: exact(expected)
    compare_regions(Alone(expected, {"r": actual}, [expected], truth), [region], lambda _: EPSILON)


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, 50)).astype(np.float32)


def test_an_original_that_cancels_is_judged_by_the_truth(x: np.ndarray) -> None:
    assert np.abs(cancelling(x) - x).max() > 0.02
    judged(x, x, wide)  # better than the original
    judged(cancelling(x), x, wide)
    for wrong in (x * np.float32(1.1), x + np.float32(0.2), -x, x + np.float32(1e-3)):  # nearer than the original
        with pytest.raises(VerificationError, match="region 'region'"):
            judged(np.asarray(wrong), x, wide)


def test_without_a_truth_the_original_is_the_measure(x: np.ndarray) -> None:
    for unknown in (None, lambda values: values["y"]):
        with pytest.raises(VerificationError):
            judged(x, x, unknown)
    with pytest.raises(VerificationError):
        judged(x, x, wide, None)


def test_a_wrong_reading_is_not_its_own_measure(x: np.ndarray) -> None:
    """Neither alone, nor when the operators are wrong as well: the terms do not explain the original then."""

    def wrong(values: Outputs) -> np.ndarray:
        return 3 * wide(values)

    for exact in (wide, wrong):
        with pytest.raises(VerificationError):
            judged(np.asarray(wrong({"x": x}), np.float32), x, exact, wrong, terms=1.0)
    with pytest.raises(VerificationError):
        judged(np.asarray(wrong({"x": x}), np.float32), x, wide, wrong)


def test_a_truth_that_rounding_does_not_explain_is_none(x: np.ndarray) -> None:
    judged(x, x, wide, terms=2e6)
    with pytest.raises(VerificationError):
        judged(x, x, wide, terms=10.0)


def test_constants_that_cancel_round_where_no_perturbation_shows_it() -> None:
    """A channel after a dead ReLU is a sum of shifts alone: 0.5 - 0.495, and 0 + 2."""
    x = np.zeros((1, 2, 2), np.float32)
    original = np.array([[[0.005, 0.005], [2.0, 5.0]]], np.float32)
    truth = np.array([[[0.00500005, 0.00500005], [2.0, 5.0]]])
    seen = {"r": original, "x": x}
    for factor, right in ((0.0, True), (1.0, True), (0.05 / 5e-8 * 0.005, False)):
        other = original + np.array([[[5e-8, 5e-8], [0, 0]]], np.float32) * np.float32(factor)
        region = Region("r", ("x",), "region", "", "", -2, lambda _: (truth, np.array([[[0.995], [5.0]]]), truth))
        alone = Alone(seen, {"r": other}, [seen], lambda _: truth)
        if right:
            compare_regions(alone, [region], lambda _: EPSILON)
        else:
            with pytest.raises(VerificationError):
                compare_regions(alone, [region], lambda _: EPSILON)
