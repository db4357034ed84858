"""Resizing along one axis as a matrix: which positions each result reads, and with which weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reparamc.algebra.arrays import Array

if TYPE_CHECKING:
    from fractions import Fraction

MODES = ("nearest", "linear", "cubic")
PLACES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
OTHER = "other"
"""A mode of which nothing is known but that every row sums to 1; its place tells one such resize from another."""
ROUNDINGS = ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")


def resized_size(size: int, scale: Fraction) -> int:
    return size * scale.numerator // scale.denominator


def resize_matrix(size: int, scale: Fraction, mode: str, place: str, rounding: str, cubic: float) -> Array:
    """[result, position] of a map of ``size``; every row sums to 1. A linear one speaks for `OTHER`."""
    if mode == OTHER:
        mode, place = "linear", "half_pixel"
    out = resized_size(size, scale)
    at = _positions(size, out, scale, place)
    found = np.zeros((out, size))
    rows = np.arange(out)
    if mode == "nearest":
        found[rows, _inside(_rounded(at, rounding), size)] = 1
        return found
    first = np.floor(at).astype(int)
    rest = at - first
    if mode == "linear":
        at = np.minimum(np.maximum(at, 0), size - 1)
        first = np.floor(at).astype(int)
        taps = {0: 1 - (at - first), 1: at - first}
    else:
        taps = {n: _cubic(np.abs(rest - n), cubic) for n in (-1, 0, 1, 2)}
    for n, weight in taps.items():
        np.add.at(found, (rows, _inside(first + n, size)), weight)
    return found


def _inside(at: npt.NDArray[Any], size: int) -> npt.NDArray[np.intp]:
    """Positions beyond a map of ``size`` are those at its border."""
    return np.minimum(np.maximum(at, 0), size - 1).astype(np.intp)


def _positions(size: int, out: int, scale: Fraction, place: str) -> Array:
    """Where each result lies among the positions of the map."""
    at, step = np.arange(out, dtype=np.float64), float(1 / scale)
    match place:
        case "align_corners":
            return at * (size - 1) / (out - 1) if out > 1 else at * 0
        case "asymmetric":
            return at * step
        case "pytorch_half_pixel" if out == 1:
            return at * 0
        case _:
            return (at + 0.5) * step - 0.5


def _rounded(at: Array, rounding: str) -> Array:
    match rounding:
        case "floor":
            found = np.floor(at)
        case "ceil":
            found = np.ceil(at)
        case "round_prefer_floor":
            found = np.ceil(at - 0.5)
        case _:
            found = np.floor(at + 0.5)
    return found.astype(int)


def _cubic(distance: Array, a: float) -> Array:
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
