"""Dtypes: which of them hold floating numbers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from reparamc.dtypes import epsilon_of, is_floating, largest_of
from reparamc.errors import one_line


@pytest.mark.parametrize("kind", [np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_floating_numbers_round(kind: type) -> None:
    dtype = np.dtype(kind)
    assert is_floating(dtype)
    assert np.ones((), dtype) + np.asarray(epsilon_of(dtype), dtype) > 1
    assert largest_of(dtype) is None


@pytest.mark.parametrize(("kind", "largest"), [(np.uint8, 255), (np.int64, 2**63 - 1), (ml_dtypes.int4, 7)])
def test_whole_numbers_do_not(kind: type, largest: int) -> None:
    dtype = np.dtype(kind)
    assert (is_floating(dtype), epsilon_of(dtype), largest_of(dtype)) == (False, 0, largest)


@pytest.mark.parametrize("kind", [bool, object, "U3", "V4", "M8[s]"])
def test_all_else_is_neither(kind: object) -> None:
    dtype = np.dtype(kind)  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert (is_floating(dtype), epsilon_of(dtype), largest_of(dtype)) == (False, 0, None)


def test_the_message_of_an_error_takes_one_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("long " * 1000))) == 300
