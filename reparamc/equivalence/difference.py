"""Outputs of two models against one another: structure, shapes, dtypes, NaN and infinities, and then values.

Here is what was measured, and how much of it rounding explains. Callers make of it an exception (`end_to_end`), a
verdict (`reparamc.verify`) or an assertion (`reparamc.testing.assertions`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from reparamc.algebra.dtypes import epsilon_of, is_floating, largest_of

Outputs = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Difference:
    """How far a value lies from the one that is expected.

    Attributes:
        max_abs: largest absolute difference of finite entries. Of what does not round (whole numbers, masks,
            indices, strings, anything but arrays) the share of entries that differ.
        max_rel: ``max_abs`` relative to `size`.
        size: largest finite magnitude expected; 0 of what does not round.
        same_kind: shapes agree, and NaN and infinities are in the same places.
        same_shape: shapes agree; also True of equal values that are not arrays.
    """

    expected: Any = field(repr=False)
    actual: Any = field(repr=False)
    max_abs: float
    max_rel: float
    size: float
    same_kind: bool
    same_shape: bool = True

    @property
    def arrays(self) -> bool:
        return isinstance(self.expected, np.ndarray) and isinstance(self.actual, np.ndarray)

    @property
    def same_dtype(self) -> bool:
        """Whether two arrays are of one dtype."""
        return not self.arrays or self.expected.dtype == self.actual.dtype

    @property
    def rounds(self) -> bool:
        """Whether floating or complex numbers are expected and there are numbers, so that they are compared as such."""
        return _rounds(self.expected) and _is_number(self.actual)

    @property
    def equal(self) -> bool:
        """Whether not one entry differs; dtypes may."""
        return self.same_kind and self.max_abs == 0

    def within(self, tolerance: float) -> bool:
        """Whether ``max_rel`` is no larger; False where shapes, NaN or infinities differ."""
        return self.same_kind and self.max_rel <= tolerance

    def close(self, rtol: float, atol: float) -> bool:
        """Whether every entry is as near as ``numpy.allclose`` asks for; equal where it does not round."""
        if not (self.same_kind and self.rounds):
            return self.equal
        a, b = _wide(self.expected, self.actual)
        return bool(np.allclose(b, a, rtol, atol, equal_nan=True))

    def gaps(self) -> npt.NDArray[np.float64]:
        """How far each entry of two arrays of one shape is off: infinitely where NaN or infinities differ."""
        if not self.rounds:
            return np.asarray(self.expected != self.actual, np.float64)
        a, b = _wide(self.expected, self.actual)
        with np.errstate(invalid="ignore"):
            gaps = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        return np.where(np.isfinite(a) & np.isfinite(b) | (gaps == 0), gaps, np.inf)

    @property
    def worst(self) -> tuple[int, ...]:
        """The index of the entry that is farthest off, the first of several, in two arrays of one shape."""
        gaps = self.gaps()
        return tuple(int(n) for n in np.unravel_index(int(np.argmax(gaps)), gaps.shape))

    @property
    def ulps(self) -> int | None:
        """`ulps` of the two, None where they are not arrays."""
        return ulps(self.expected, self.actual) if self.arrays else None


def difference(expected: Any, actual: Any) -> Difference:
    """How far ``actual`` lies from ``expected``; arrays, or values that are equal or not."""
    if not (isinstance(expected, np.ndarray) and isinstance(actual, np.ndarray | np.generic)):
        arrays = isinstance(expected, np.ndarray) or isinstance(actual, np.ndarray)
        same = not arrays and bool(expected is actual or expected == actual)
        return Difference(expected, actual, *((0.0, 0.0) if same else _FAR), 0.0, same, same)
    actual = np.asarray(actual)
    if expected.shape != actual.shape:
        return Difference(expected, actual, *_FAR, _size(expected), same_kind=False, same_shape=False)
    if not (_rounds(expected) and _is_number(actual)):
        unequal = float(np.mean(expected != actual)) if expected.size else 0.0
        return Difference(expected, actual, unequal, unequal, _size(expected), same_kind=True)
    a, b = _wide(expected, actual)
    finite = np.isfinite(a)
    size = float(np.abs(a[finite]).max(initial=0.0))
    if not (np.array_equal(finite, np.isfinite(b)) and np.array_equal(a[~finite], b[~finite], equal_nan=True)):
        return Difference(expected, actual, *_FAR, size, same_kind=False)
    gap = float(np.abs(a[finite] - b[finite]).max(initial=0.0))
    return Difference(expected, actual, gap, 0.0 if gap == 0 else gap / size if size else float("inf"), size, True)


_FAR = (float("inf"), float("inf"))


def differences(
    expected: Mapping[str, Any], actual: Mapping[str, Any], *, by_name: bool = True
) -> dict[str, Difference] | None:
    """Every output against the one of its name, or else of its place; None where the structures are not the same."""
    if len(expected) != len(actual) or (by_name and expected.keys() != actual.keys()):
        return None
    others = (actual[name] for name in expected) if by_name else actual.values()
    return {name: difference(value, other) for (name, value), other in zip(expected.items(), others, strict=True)}


def _rounds(value: Any) -> bool:
    return isinstance(value, np.ndarray) and (value.dtype.kind == "c" or is_floating(value.dtype))


def _is_number(value: Any) -> bool:
    return _rounds(value) or (isinstance(value, np.ndarray) and largest_of(value.dtype) is not None)


def _size(array: npt.NDArray[Any]) -> float:
    """The largest finite magnitude."""
    if not _rounds(array):
        return 0.0
    wide = np.abs(array).astype(np.float64)
    return float(wide[np.isfinite(wide)].max(initial=0.0))


def _wide(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    kind = np.complex128 if "c" in (a.dtype.kind, b.dtype.kind) else np.float64
    return a.astype(kind), b.astype(kind)


def ulps(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> int | None:
    """Largest distance of finite entries in units in the last place; None unless both are of one floating dtype.

    It counts the representable numbers between two entries: floating numbers of one dtype are ordered as
    the whole numbers that their bits spell. Near zero they lie dense, so a large count there may be a small error.
    """
    whole = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}.get(a.dtype.itemsize)
    if a.dtype != b.dtype or a.shape != b.shape or not is_floating(a.dtype) or whole is None:
        return None
    finite = np.isfinite(a.astype(np.float64)) & np.isfinite(b.astype(np.float64))
    if not finite.any():
        return 0

    def ordered(x: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        bits = np.ascontiguousarray(x[finite]).view(whole).astype(np.int64)
        return np.where(bits < 0, np.iinfo(whole).min - bits, bits)

    first, second = ordered(a), ordered(b)
    high, low = np.maximum(first, second), np.minimum(first, second)
    return int((high.view(np.uint64) - low.view(np.uint64)).max())  # modulo 2**64: no distance overflows


# What rounding explains


CEILING = 0.5
"""No tolerance is larger: what responds to rounding by a twentieth of this is too sensitive to be compared."""


def tolerance(noise: float, epsilon: float) -> float:
    """Largest relative difference that rounding explains.

    Args:
        noise: the relative change of the output when the input is perturbed at rounding level.
        epsilon: the machine epsilon of the deployed dtype.

    An input is rounded once and a network rounds at every layer, so the measured response to one
    perturbation is allowed some times over; the floor covers models that barely react to their input, the ceiling those
    that are too sensitive to be compared.
    """
    return min(max(20 * noise, min(500 * epsilon, 1e-4), 16 * epsilon), CEILING)


def noise_of(expected: Any, responses: Iterable[Any]) -> float:
    """The largest relative change of an output among ``responses`` to perturbed inputs, where it is a finite number."""
    changes = (difference(expected, response).max_rel for response in responses)
    return max((change for change in changes if np.isfinite(change)), default=0.0)


def nudged(array: npt.NDArray[Any], rng: np.random.Generator) -> npt.NDArray[Any]:
    """``array`` with every floating entry moved by one rounding, up or down."""
    if not is_floating(array.dtype):
        return array
    signs = rng.choice([-1.0, 1.0], array.shape)
    return np.asarray(array.astype(np.float64) * (1 + signs * epsilon_of(array.dtype)), array.dtype)
