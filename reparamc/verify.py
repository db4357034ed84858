"""Verification: region against replacement in float64, and the arithmetic of end-to-end comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reparamc.errors import InputError, VerificationError
from reparamc.evaluate import evaluate, sample_inputs
from reparamc.expr import Expr
from reparamc.report import OutputError

LEVELS = ("off", "region", "full")


def check_level(level: str) -> None:
    """Raise InputError unless ``level`` names how much is verified."""
    if level not in LEVELS:
        raise InputError(f"unknown verification level {level!r}; the levels are {', '.join(LEVELS)}")


REGION_TOLERANCE = 1e-10
"""Largest error accepted of a region in float64, relative to the largest magnitude met in it."""


def compare_expressions(before: Expr, after: Expr, seed: int = 0) -> float:
    """Largest difference of two expressions over the same sources, relative; NaN or inf when they differ in kind.

    Both are evaluated in float64 on random inputs just larger than their kernels, so that every
    border case occurs, at two sizes of different parity.

    Raises:
        ValueError: no input fits all branches, or values overflow.
    """
    rng = np.random.default_rng(seed)
    worst = 0.0
    for extra in (0, 1):
        inputs, extents = sample_inputs([before, after], rng, extra)
        with np.errstate(over="ignore", invalid="ignore"):
            try:
                a, size_a = evaluate(before, inputs, extents)
            except (ValueError, IndexError) as error:
                raise ValueError("its shapes do not fit together on sample inputs") from error
            b, size_b = evaluate(after, inputs, extents)
        if not np.isfinite(size_a):
            raise ValueError("its values overflow float64")
        if a.shape != b.shape:
            return float("inf")
        scale = max(size_a, size_b, np.finfo(np.float64).tiny)
        worst = max(worst, float(np.abs(a - b).max(initial=0.0)) / scale, key=lambda e: (np.isnan(e), e))
    return worst


@dataclass(frozen=True)
class Difference:
    """How far two arrays lie apart.

    Attributes:
        max_abs: largest absolute difference of finite entries.
        max_rel: ``max_abs`` relative to the largest finite magnitude of the reference.
        same_kind: shapes agree, and NaN and infinities stand in the same places.
    """

    max_abs: float
    max_rel: float
    same_kind: bool

    def within(self, tolerance: float) -> bool:
        return self.same_kind and self.max_rel <= tolerance


def difference(reference: npt.NDArray, other: npt.NDArray) -> Difference:
    """Compare two arrays of equal shape: NaN and infinity patterns first, then finite values.

    Of whole numbers and truth values (masks, indices) it is the share of entries that differ.
    """
    if reference.shape != other.shape:
        return Difference(float("inf"), float("inf"), same_kind=False)
    if reference.dtype.kind in "biuUSO":
        unequal = float(np.mean(reference != other)) if reference.size else 0.0
        return Difference(unequal, unequal, same_kind=True)
    a, b = reference.astype(np.float64), other.astype(np.float64)
    finite = np.isfinite(a)
    kind = bool(np.array_equal(finite, np.isfinite(b)) and np.array_equal(a[~finite], b[~finite], equal_nan=True))
    if not kind:
        return Difference(float("inf"), float("inf"), same_kind=False)
    gap = float(np.abs(a[finite] - b[finite]).max(initial=0.0))
    size = float(np.abs(a[finite]).max(initial=0.0))
    return Difference(gap, 0.0 if gap == 0 else gap / size if size else float("inf"), same_kind=True)


def tolerance(noise: float, epsilon: float) -> float:
    """Largest relative difference that rounding explains.

    Args:
        noise: the relative change of the output when the input is perturbed at rounding level.
        epsilon: the machine epsilon of the deployed dtype.

    An input is rounded once and a network rounds at every layer, so the measured response to one
    perturbation is allowed some times over; the floor covers models that barely react to their input, the ceiling those
    that are too sensitive to be compared.
    """
    return min(max(20 * noise, min(500 * epsilon, 1e-4), 16 * epsilon), 0.5)


Outputs = Mapping[str, npt.NDArray]


def compare_outputs(
    expected: Outputs,
    actual: Outputs,
    noises: Sequence[Outputs],
    epsilon: Callable[[npt.NDArray], float],
    message: Callable[[str, float, float], str],
) -> list[OutputError]:
    """Every output of a result against that of the original, held to the original's own noise.

    Args:
        noises: outputs of the original for perturbed inputs. One perturbation may be absorbed by
            rounding or a saturated layer, so give several.
        epsilon: the machine epsilon that an output is judged by.
        message: the error, from the output's name, its relative difference, and what is allowed.

    Raises:
        VerificationError: an output differs by more than rounding explains.
    """
    errors = []
    for name, reference in expected.items():
        found = difference(reference, actual[name])
        noise = max(difference(reference, n[name]).max_rel for n in noises)
        allowed = tolerance(noise if np.isfinite(noise) else 0.0, epsilon(reference))
        if not found.within(allowed):
            raise VerificationError(message(name, found.max_rel, allowed), where=name)
        errors.append(OutputError(name, found.max_abs, found.max_rel, allowed))
    return errors
