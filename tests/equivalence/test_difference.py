"""Outputs against one another, and which dtypes round."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from reparamc.algebra.dtypes import epsilon_of, is_floating, largest_of
from reparamc.equivalence.difference import difference, differences, noise_of, nudged
from reparamc.errors import one_line


@pytest.mark.parametrize("kind", [np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_floating_numbers_round(kind: type) -> None:
    dtype = np.dtype(kind)
    assert is_floating(dtype)
    assert np.ones((), dtype) + np.asarray(epsilon_of(dtype), dtype) > 1
    assert largest_of(dtype) is None


@pytest.mark.parametrize(("kind", "largest"), [(bool, 1), (np.uint8, 255), (np.int64, 2**63 - 1), (ml_dtypes.int4, 7)])
def test_whole_numbers_do_not(kind: type, largest: int) -> None:
    dtype = np.dtype(kind)
    assert (is_floating(dtype), epsilon_of(dtype), largest_of(dtype)) == (False, 0, largest)


@pytest.mark.parametrize("kind", [object, "U3", "V4", "M8[s]"])
def test_all_else_is_neither(kind: object) -> None:
    dtype = np.dtype(kind)  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert (is_floating(dtype), epsilon_of(dtype), largest_of(dtype)) == (False, 0, None)


def test_the_message_of_an_error_takes_one_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("long " * 1000))) == 300


# Arrays

X = np.array([[1.0, -2.0], [0.5, 4.0]], np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.complex64])
def test_equal_and_unequal_values(dtype: type) -> None:
    a = X.astype(dtype)
    assert difference(a, a.copy()).equal
    b = a.copy()
    b[1, 0] += np.asarray(1, dtype)
    found = difference(a, b)
    assert (found.max_abs, found.max_rel, found.size, found.worst) == (1, 0.25, 4, (1, 0))
    assert found.same_kind
    assert not found.equal
    assert found.within(0.25)
    assert not found.within(0.2)
    assert found.gaps().tolist() == [[0, 0], [1, 0]]


def test_the_imaginary_part_counts() -> None:
    found = difference(np.array([1 + 1j, 2]), np.array([1 + 2j, 2]))
    assert (found.max_abs, found.ulps, found.worst) == (1, None, (0,))


@pytest.mark.parametrize(
    ("a", "b"),
    [(np.nan, 1.0), (1.0, np.nan), (np.inf, 1.0), (np.inf, -np.inf), (np.nan, np.inf)],
)
def test_nan_and_infinities_have_their_places(a: float, b: float) -> None:
    found = difference(np.array([0.0, a]), np.array([5.0, b]))
    assert (found.same_kind, found.same_shape, found.max_rel) == (False, True, np.inf)
    assert found.worst == (1,)
    assert not found.within(np.inf)
    assert not found.close(np.inf, np.inf)
    assert difference(np.array([0.0, a]), np.array([0.0, a])).equal


@pytest.mark.parametrize("dtype", [np.int64, bool, ml_dtypes.int4, object])
def test_what_does_not_round_is_equal_or_not(dtype: type) -> None:
    found = difference(np.array([0, 1, 1, 1], dtype), np.array([0, 1, 0, 0], dtype))
    assert (found.max_rel, found.rounds, found.size, found.worst, found.ulps) == (0.5, False, 0, (2,), None)
    assert not found.close(10, 10)


def test_whole_numbers_in_place_of_floating_ones_are_compared_as_numbers() -> None:
    found = difference(np.array([1.0, 2.0, 4.0]), np.array([1, 2, 6]))
    assert (found.max_rel, found.rounds, found.same_dtype) == (0.5, True, False)
    assert difference(np.array([1.0, 2.0]), np.array(["1", "2"], object)).max_rel == 1


def test_shapes_and_dtypes() -> None:
    found = difference(X, X[:1])
    assert (found.same_shape, found.same_kind, found.max_rel, found.size) == (False, False, np.inf, 4)
    found = difference(X, X.astype(np.float64))
    assert found.equal
    assert not found.same_dtype


@pytest.mark.parametrize(("a", "b", "same"), [(None, None, True), (1, 2, False), ("a", "a", True), (X, None, False)])
def test_values_that_are_no_arrays(a: Any, b: Any, same: bool) -> None:
    found = difference(a, b)
    assert (found.equal, found.same_shape, found.same_dtype, found.ulps) == (same, same, True, None)


def test_structures() -> None:
    a, b = {"y": X, "z": X[:1]}, {"z": X[:1], "y": X}
    assert all(d.equal for d in (differences(a, b) or {}).values())
    by_place = differences(a, b, by_name=False)
    assert by_place is not None
    assert [d.same_shape for d in by_place.values()] == [False, False]
    assert differences(a, {"y": X}) is None
    assert differences(a, {"y": X, "other": X}) is None


def test_noise_is_the_largest_that_is_a_number() -> None:
    assert noise_of(X, []) == 0
    assert noise_of(X, [X, X * np.float32(1.5), X * np.nan]) == 0.5


def test_a_nudge_is_one_rounding() -> None:
    rng = np.random.default_rng(0)
    moved = nudged(X, rng)
    assert moved.dtype == X.dtype
    assert 0 < difference(X, moved).max_rel <= np.finfo(np.float32).eps
    assert nudged(X.astype(int), rng).tolist() == X.astype(int).tolist()
