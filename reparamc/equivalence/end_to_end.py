"""Two whole models on the same inputs: is a difference more than rounding explains, and which region made it?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from reparamc.algebra.equal import REGION_TOLERANCE, largest_by_channel, relative
from reparamc.algebra.expr import Array
from reparamc.equivalence.difference import Difference, Outputs, difference, tolerance
from reparamc.equivalence.pair import PERTURBATIONS, BrokenError, Comparison, Pair
from reparamc.errors import VerificationError, one_line
from reparamc.report.data import OutputError

CHAOS = 0.1
"""Noise of an output beyond which it says nothing about a rewrite: rounding alone makes another result of it."""
WEAK = 1e-3
"""Tolerance of an output beyond which the regions are looked at one by one as well."""


@dataclass(frozen=True)
class Region:
    """What was rewritten, for those who look for a fault in it.

    Attributes:
        root: the value it computes, in the original and in the result.
        operands: the values it is computed from.
        where: what the user calls it.
        before, after: both forms as text.
        axis: the channel axis of its result; None where that is unknown.
        reading: from values by name, what its expression is in float64, and the magnitudes of the terms that it is the
            sum of, and those of its replacement. May raise anything.
    """

    root: str
    operands: tuple[str, ...]
    where: str
    before: str
    after: str
    axis: int | None = None
    reading: Callable[[Outputs], tuple[Array, Array, Array]] | None = None


@dataclass(frozen=True)
class Alone:
    """What regions and outputs give when each is computed from the original's own values before it.

    Attributes:
        expected, actual: values of roots and outputs in the original and in the result.
        noises: those of the original, the operands of each region perturbed at rounding level.
        exact: what the framework's own operators make of a region in float64, from the values of the original. May
            raise anything.
    """

    expected: Outputs
    actual: Outputs
    noises: Sequence[Outputs]
    exact: Callable[[Region], Array] | None = None


def compare_models(
    pair: Pair,
    trials: Iterable[tuple[Any, Outputs]],
    epsilon: Callable[[npt.NDArray[Any], Any], float],
    regions: Sequence[Region] = (),
    alone: Callable[[Any], Alone | None] = lambda inputs: None,
) -> list[OutputError]:
    """A result against its original on inputs and what the original makes of them; see `compare_outputs`.

    Returns:
        One entry per output, and per region where they were compared, for the inputs that came closest to what is
        allowed.

    Raises:
        VerificationError: the result does not run, or differs; names the region that is wrong, or else the output.
    """
    worst: dict[tuple[str, bool], OutputError] = {}
    for inputs, expected in trials:
        try:
            compared = pair.compare(inputs, expected)
        except BrokenError as error:
            why = one_line(error.__cause__ or error)
            raise VerificationError(
                f"the fused model does not run: {why}; nothing was written. {REPORT}", where="output"
            ) from error.__cause__
        judge = partial(_judged, epsilon, inputs)
        for entry in compare_outputs(compared, judge, regions, partial(alone, inputs)):
            before = worst.setdefault((entry.output, entry.alone), entry)
            if entry.closeness > before.closeness:
                worst[entry.output, entry.alone] = entry
    return list(worst.values())


def _judged(epsilon: Callable[[npt.NDArray[Any], Any], float], inputs: Any, output: npt.NDArray[Any]) -> float:
    return epsilon(output, inputs)


REPORT = "Report this as a bug, with the model"


def compare_outputs(
    compared: Comparison,
    epsilon: Callable[[npt.NDArray[Any]], float],
    regions: Sequence[Region] = (),
    alone: Callable[[], Alone | None] = lambda: None,
) -> list[OutputError]:
    """Every output of a result against that of the original, held to the original's own noise.

    Where an output differs by more, or its noise is so large that the comparison says little, every region is compared
    alone, fed with the original's own values. That finds the region that is wrong. Where none is, and the outputs
    are the same when they are fed with the original's values, rounding is all there is to the difference: some step
    between makes another discrete choice (a quantizer, a rounding, a comparison, a maximum's place), or amplifies it.

    Args:
        epsilon: the machine epsilon that an output is judged by.
        regions: what was rewritten, in execution order.
        alone: runs both models with each region fed; None where that cannot be done.

    Returns:
        One entry per output, and one per region where they were compared by themselves.

    Raises:
        VerificationError: the structures differ, or an output by more than rounding explains; names the first region
            that is wrong, or the output if none is.
    """
    if compared.found is None:
        raise VerificationError("the fused model returns another structure than the original", where="output")
    entries: list[OutputError] = []
    unsure: list[tuple[OutputError, Difference]] = []
    for name, found in compared.found.items():
        entry, sure = _entry(compared, name, found, epsilon)
        entries.append(entry)
        if not sure:
            unsure.append((entry, found))
    if not unsure:
        return entries
    seen = alone() if regions else None
    judged = [] if seen is None else compare_regions(seen, regions, epsilon)
    for entry, found in unsure:
        assert entry.tolerance is not None
        if seen is not None and found.same_dtype and _same_when_fed(seen, regions, entry, epsilon):
            entries[entries.index(entry)] = replace(entry, tolerance=None)
        elif not (found.within(entry.tolerance) and found.same_dtype):
            text = f"output {entry.output!r} of the fused model {_what(found, entry.tolerance)}; nothing was written"
            raise VerificationError(
                f"{text}{'. No region alone differs' if judged else ''}. {REPORT}", where=entry.output
            )
    return entries + judged


def _entry(
    compared: Comparison, name: str, found: Difference, epsilon: Callable[[npt.NDArray[Any]], float]
) -> tuple[OutputError, bool]:
    """How far an output differs and what is allowed, and whether that settles it."""
    if not found.arrays:
        return OutputError(name, found.max_abs, found.max_rel, 0.0), found.equal
    reference, eps = found.expected, epsilon(found.expected)
    if found.equal and found.same_dtype:
        return OutputError(name, found.max_abs, found.max_rel, tolerance(0.0, eps)), True
    entry = OutputError(name, found.max_abs, found.max_rel, 0.0)
    for times in range(PERTURBATIONS + 1):  # each costs a run; what differs by rounding alone needs none
        responses = (r.get(name) for r in compared.responses(times))
        noise = max((difference(reference, response).max_rel for response in responses), default=0.0)
        allowed = tolerance(noise if np.isfinite(noise) else 0.0, eps)
        entry = replace(entry, tolerance=allowed)
        if found.rounds and not noise <= CHAOS:
            return entry, False
        if found.within(allowed) and found.same_dtype:  # more noise would only allow more
            return entry, allowed <= max(WEAK, 16 * eps)
    return entry, False


def _same_when_fed(
    seen: Alone, regions: Sequence[Region], entry: OutputError, epsilon: Callable[[npt.NDArray[Any]], float]
) -> bool:
    """Whether an output is the same when what is before it has the original's values; a region's own was compared.

    What regions give may be of a coarser type than the output, which is made of it.
    """
    if any(entry.output == region.root for region in regions):
        return True
    if entry.output not in seen.actual:
        return False
    roots = (seen.actual[region.root] for region in regions if region.root in seen.actual)
    allowed = max([entry.tolerance or 0.0, *(tolerance(0.0, epsilon(root)) for root in roots)])
    return difference(seen.expected[entry.output], seen.actual[entry.output]).within(allowed)


def _what(found: Difference, allowed: float) -> str:
    if not found.same_shape:
        return "has another shape or value than that of the original"
    if not found.same_dtype:
        return f"is of {found.actual.dtype}, that of the original of {found.expected.dtype}"
    of = "relative to its largest value" if found.rounds else "of its entries"
    return f"differs by {found.max_rel:.2g} {of}, {allowed:.1g} is what rounding explains"


def compare_regions(
    seen: Alone, regions: Sequence[Region], epsilon: Callable[[npt.NDArray[Any]], float]
) -> list[OutputError]:
    """Every region that was fed with the original's values against the original, channel by channel.

    Raises:
        VerificationError: one differs by more than its own rounding explains. It has both forms as text.
    """
    entries = []
    for region in regions:
        if region.root not in seen.actual:
            continue
        gap, error, allowed = region_error(seen, region, epsilon)
        entries.append(OutputError(region.where, gap, error, allowed, alone=True))
        if not error <= allowed:
            raise VerificationError(
                f"region {region.where!r} of the fused model gives something else than the original makes of the "
                f"same operands: it differs by {error:.2g} relative to the largest value of a channel, {allowed:.1g} "
                f"is what rounding explains; nothing was written. {REPORT}",
                where=region.where,
                before=region.before,
                after=region.after,
            )
    return entries


def region_error(
    seen: Alone, region: Region, epsilon: Callable[[npt.NDArray[Any]], float]
) -> tuple[float, float, float]:
    """How far a region that was run is from the original, as `by_channel` says it.

    An original may round where large constants cancel, and the result may not. So what differs by more than a few
    roundings is compared with the truth in float64, if that is known, up to the rounding of the terms of the result.
    """
    reference, other = seen.expected[region.root], seen.actual[region.root]
    noises = [n[region.root] for n in seen.noises]
    eps = epsilon(reference)
    found = by_channel(reference, other, noises, eps, region.axis)
    if not found[1] <= _few(eps) * eps and (known := _truth(seen, region, eps)) is not None:
        truth, terms = known
        return by_channel(truth, other, (), eps, region.axis, terms)
    return found


def _few(epsilon: float) -> int:
    """A kernel of some thousand terms rounds so often; one of 16 bits adds up in a larger dtype, and rounds less."""
    return 64 if epsilon < 1e-4 else 8


def _truth(seen: Alone, region: Region, epsilon: float) -> tuple[Array, Array] | None:
    """What the original computes of a region in float64, and the terms of its replacement; None where that is unknown.

    The truth comes from the operators of the original, so that no wrong reading of them is its own measure. It counts
    where the rounding of the terms explains how far the original lies from it; the reading that tells the terms has to
    give the same.
    """
    if region.reading is None or seen.exact is None:
        return None
    try:
        truth = seen.exact(region)
        value, terms, others = region.reading(seen.expected)
        others = np.broadcast_to(others, truth.shape)  # a wrong replacement has any shape
    except Exception:  # whatever the operators of a framework raise
        return None
    original = seen.expected[region.root].astype(np.float64)
    rounding = _few(epsilon) * epsilon
    explained = relative(truth, value, terms) <= REGION_TOLERANCE and relative(truth, original, terms) <= rounding
    return (truth, others) if explained else None


def by_channel(
    reference: npt.NDArray[Any],
    other: npt.NDArray[Any],
    noises: Sequence[npt.NDArray[Any]],
    epsilon: float,
    axis: int | None,
    terms: Array | None = None,
) -> tuple[float, float, float]:
    """The channel that comes closest to what rounding explains, or exceeds it most.

    Args:
        noises: what rounding makes of the reference.
        terms: the magnitudes of what is rounded; by default those of the reference.

    Returns:
        Its largest absolute difference, the same relative to its largest value, and what is allowed of that: the
        difference of ``noises`` and the machine epsilon, some times over.
    """
    kind = difference(reference, other)
    if not kind.same_kind:
        return float("inf"), float("inf"), 0.0

    def largest(a: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return largest_by_channel(np.abs(np.nan_to_num(a.astype(np.float64), posinf=0.0, neginf=0.0)), axis)

    with np.errstate(invalid="ignore"):
        gap, size = largest(other.astype(np.float64) - reference), largest(reference)
        noise = np.max([size * 0, *(largest(n.astype(np.float64) - reference) for n in noises)], axis=0)
    few = _few(epsilon)
    allowed = min(50, few) * noise + few * epsilon * (size if terms is None else largest(terms))
    tiny = np.finfo(np.float64).tiny
    worst = int(np.argmax(gap / np.maximum(allowed, tiny))) if gap.size else 0
    if not gap.size or gap[worst] == 0:
        return 0.0, 0.0, few * epsilon
    scale = max(size[worst], tiny)
    return float(gap[worst]), float(gap[worst] / scale), float(allowed[worst] / scale)
