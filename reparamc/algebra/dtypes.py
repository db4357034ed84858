"""Which dtypes hold floating and whole numbers, and how finely they round: NumPy's and those of ml_dtypes alike."""

from __future__ import annotations

from typing import Any, cast

import ml_dtypes
import numpy as np


def is_floating(dtype: np.dtype) -> bool:
    """Whether entries are real floating numbers; bfloat16 and its like are, integers of 4 bits are not."""
    return dtype.kind != "c" and epsilon_of(dtype) > 0


def epsilon_of(dtype: np.dtype) -> float:
    """The machine epsilon of a floating or complex dtype, 0 of every other."""
    try:
        return float(cast(Any, ml_dtypes.finfo(dtype)).eps)
    except ValueError:
        return 0.0


def largest_of(dtype: np.dtype) -> int | None:
    """The largest whole number of ``dtype``, 1 of truth values; None if it is of neither."""
    if dtype.kind == "b":
        return 1
    try:
        return int(ml_dtypes.iinfo(dtype).max)
    except ValueError:
        return None


def kind_of(dtype: np.dtype) -> str:
    """``dtype`` as users know it: of strings NumPy makes objects."""
    return "string" if dtype.kind in "OUS" else str(dtype)
