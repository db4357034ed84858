"""Regions fed with the original's values: what rounding explains of them, and what the truth is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from reparamc.equivalence.end_to_end import Alone, Region, compare_regions
from reparamc.errors import VerificationError

EPSILON = float(np.finfo(np.float32).eps)
BIG = np.float32(1e6)


def cancelling(x: np.ndarray) -> np.ndarray:
    """x + 1e6 - 1e6 in float32, which keeps a tenth of x."""
    return (x + BIG) - BIG


def judged(actual: np.ndarray, x: np.ndarray, exactly: Any) -> None:
    region = Region("r", ("x",), "region", "before", "after", -2, exactly)
    expected = {"r": cancelling(x), "x": x}
    compare_regions(Alone(expected, {"r": actual}, [expected]), [region], lambda _: EPSILON)


def test_an_original_that_cancels_is_judged_by_the_truth() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 50)).astype(np.float32)
    exactly = lambda values: values["x"].astype(np.float64)  # noqa: E731
    assert np.abs(cancelling(x) - x).max() > 0.02
    judged(x, x, exactly)  # better than the original
    judged(cancelling(x), x, exactly)
    judged(np.asarray(x + np.float32(0.02) * np.sign(x)), x, exactly)  # as far off as the original
    for wrong in (x * np.float32(1.1), x + np.float32(0.2), -x):
        with pytest.raises(VerificationError, match="region 'region'"):
            judged(np.asarray(wrong), x, exactly)


def test_without_a_truth_the_original_is_the_measure() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 50)).astype(np.float32)
    for unknown in (None, lambda values: values["y"]):
        with pytest.raises(VerificationError):
            judged(x, x, unknown)


def test_constants_that_cancel_round_where_no_perturbation_shows_it() -> None:
    """A channel after a dead ReLU is a sum of shifts alone: 0.5 - 0.495, and 0 + 2."""
    x = np.zeros((1, 2, 2), np.float32)
    original = np.array([[[0.005, 0.005], [2.0, 5.0]]], np.float32)
    seen = {"r": original, "x": x}
    exactly = lambda values: np.array([[[0.00500005, 0.00500005], [2.0, 5.0]]])  # noqa: E731
    for factor, right in ((0.0, True), (1.0, True), (0.05 / 5e-8 * 0.005, False)):
        other = original + np.array([[[5e-8, 5e-8], [0, 0]]], np.float32) * np.float32(factor)
        region = Region("r", ("x",), "region", "before", "after", -2, exactly)
        if right:
            compare_regions(Alone(seen, {"r": other}, [seen]), [region], lambda _: EPSILON)
        else:
            with pytest.raises(VerificationError):
                compare_regions(Alone(seen, {"r": other}, [seen]), [region], lambda _: EPSILON)
