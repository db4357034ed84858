"""Verification: region against replacement in float64, and the arithmetic of end-to-end comparison."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from reparamc.compare import Difference, Outputs, difference, differences, tolerance
from reparamc.errors import InputError, VerificationError
from reparamc.evaluate import absolute, evaluate, frames, has_layout, sample_inputs
from reparamc.expr import (
    Array,
    BatchNorm,
    Concat,
    Conv,
    Expr,
    Layout,
    Mean,
    Permute,
    Reshape,
    Scale,
    Select,
    Source,
    Sum,
    Take,
    walk,
)
from reparamc.report import OutputError

LEVELS = ("off", "region", "full")


def level_of(verify: bool | str) -> str:
    """The level that an argument ``verify`` asks for: True stands for "full", and False for "off".

    Raises:
        InputError: there is no such level.
    """
    level = verify if isinstance(verify, str) else "full" if verify else "off"
    if level not in LEVELS:
        raise InputError(f"unknown verification level {level!r}; the levels are {', '.join(LEVELS)}")
    return level


REGION_TOLERANCE = 1e-11
"""Largest error accepted of an element in float64, relative to the magnitudes of the terms that it is the sum of."""


def compare_expressions(before: Expr, after: Expr, seed: int = 0, *, every_size: bool = True) -> float:
    """Largest error of ``after`` over the same sources, each element relative to its own terms; NaN or inf in kind.

    Both are evaluated in float64: on inputs just larger than their kernels, so that every border case occurs, at two
    sizes of different parity, and on results of 1, 2 and 3 elements along each axis, where the region takes such
    maps. The first time on values of ordinary size, on zeros, and on values of all sizes. Without ``every_size`` that
    first size is all.

    Raises:
        ValueError: no input fits all branches, or values overflow.
    """
    worst = 0.0
    terms = absolute(before)
    for inputs, extents in samples([before, after], seed, SIZES if every_size else SIZES[:1]):
        with np.errstate(over="ignore", invalid="ignore"):
            try:
                a, _ = evaluate(before, inputs, extents)
            except (ValueError, IndexError) as error:
                raise ValueError("its shapes do not fit together on sample inputs") from error
            try:
                b, _ = evaluate(after, inputs, extents)
            except (ValueError, IndexError):
                return float("inf")
            scale, _ = evaluate(terms, {e: np.abs(x) for e, x in inputs.items()}, extents)
        if not np.isfinite(scale).all():
            raise ValueError("its values overflow float64")
        worst = max(worst, relative(a, b, scale), key=lambda e: (np.isnan(e), e))
    return worst


SIZES = ((0, None), (1, None), (0, 1), (0, 2), (0, 3))
"""``extra`` and ``small`` of `sample_inputs`; the first is enough where no position meets another."""


def constants_of(e: Expr) -> Array | None:
    """For each channel of ``e``, the magnitudes of all constants that are added up; None where no input fits it."""
    try:
        inputs, extents = sample_inputs([e], np.random.default_rng(0), extra=1)
        y, _ = evaluate(absolute(e), {x: np.zeros_like(a) for x, a in inputs.items()}, extents)
    except (ValueError, IndexError):
        return None
    return _largest_by_channel(y, frames(e)[e])


def _largest_by_channel(magnitudes: npt.NDArray, frame: int | None) -> npt.NDArray:
    """The largest of each channel; of all together where the channel axis is unknown."""
    axis = magnitudes.ndim - 1 - frame if frame is not None and frame < magnitudes.ndim else None
    rows = magnitudes.reshape(1, -1) if axis is None else np.moveaxis(magnitudes, axis, 0)
    return rows.reshape(rows.shape[0], -1).max(axis=1, initial=0.0)


def samples(
    roots: Sequence[Expr], seed: int = 0, sizes: Sequence[tuple[int, int | None]] = SIZES
) -> Iterator[tuple[dict[Source, Array], dict[str, int]]]:
    """Inputs on which expressions over the same sources are compared, and the extents of symbols; see `sample_inputs`.

    Raises:
        ValueError: no input just larger than the kernels fits all branches.
    """
    rng = np.random.default_rng(seed)
    seen: set[tuple[tuple[int, ...], ...]] = set()
    pointwise = all(e.is_pointwise for root in roots for e in walk(root) if isinstance(e, Conv))
    for extra, small in sizes[:1] if pointwise and not has_layout(roots[0]) else sizes:
        try:
            inputs, extents = sample_inputs(roots, rng, extra, small)
        except ValueError:
            if small is None:
                raise
            continue
        shapes = tuple(x.shape for x in inputs.values())
        if shapes in seen:
            continue  # nothing is open
        if not seen and has_layout(roots[0]):
            yield {e: np.zeros_like(x) for e, x in inputs.items()}, extents
        seen.add(shapes)
        yield inputs, extents


def relative(reference: Array, other: Array, terms: Array) -> float:
    """Largest difference of an element relative to its ``terms``; inf where shapes, NaN or infinities differ."""
    if reference.shape != other.shape:
        return float("inf")
    finite = np.isfinite(reference)
    if not np.array_equal(finite, np.isfinite(other)):
        return float("inf")
    if not np.array_equal(reference[~finite], other[~finite], equal_nan=True):
        return float("inf")
    gap, scale = np.abs(reference[finite] - other[finite]), np.broadcast_to(terms, reference.shape)[finite]
    with np.errstate(divide="ignore"):
        return float(np.divide(gap, scale, out=np.zeros_like(gap), where=gap > 0).max(initial=0.0))


def structure(root: Expr) -> Hashable:
    """What operators an expression has, weights and numbers of channels left out."""
    order = {e: n for n, e in enumerate(walk(root))}
    return tuple((*_structure(e), *(order[c] for c in e.children)) for e in order)


def _structure(e: Expr) -> tuple[Hashable, ...]:
    """What an operator is, weights and numbers of channels left out."""
    match e:
        case Source():
            return (Source, e.frame)
        case Conv():
            groups = 1 if e.groups == 1 else "all" if e.groups == e.in_channels else "some"
            grid = (e.kernel, e.stride, e.dilation, e.offset, e.delta, e.transposed)
            return (Conv, *grid, groups, e.bias is None, e.token is None)
        case Scale():
            return (Scale, e.frame, e.scale.ndim, e.shift.ndim)
        case BatchNorm() | Concat() | Select():
            return (type(e), e.frame)
        case Sum():
            return (Sum,)
        case Layout(op=Permute(axes=axes)):
            return (Permute, axes)
        case Layout(op=(Mean() | Take()) as op):
            return (op,)
        case Layout(op=Reshape() as op):
            return (Reshape, len(op.before), len(op.after), e.frame_in, e.frame)
        case _:
            raise AssertionError(f"{type(e).__name__} is no expression")


CHAOS = 0.1
"""Noise of an output beyond which it says nothing about a rewrite: rounding alone makes another result of it."""
WEAK = 1e-2
"""Tolerance of an output beyond which the regions are looked at one by one as well."""


@dataclass(frozen=True)
class Region:
    """What was rewritten, for those who look for a fault in it.

    Attributes:
        root: the value it computes, in the original and in the result.
        operands: the values it is computed from.
        where: what the user calls it.
        before, after: both forms as text.
        frame: axes behind the channel axis of its result; None where that is unknown.
        constants: as in `constants_of`; None where they are unknown.
    """

    root: str
    operands: tuple[str, ...]
    where: str
    before: str
    after: str
    frame: int | None = None
    constants: Array | None = None


@dataclass(frozen=True)
class Alone:
    """What regions and outputs give when each is computed from the original's own values in front of it.

    Attributes:
        expected, actual: values of roots and outputs in the original and in the result.
        noises: those of the original, the operands of each region perturbed at rounding level.
    """

    expected: Outputs
    actual: Outputs
    noises: Sequence[Outputs]


def compare_outputs(
    expected: Outputs,
    actual: Outputs,
    noises: Sequence[Outputs],
    epsilon: Callable[[npt.NDArray], float],
    message: Callable[[str, float, float], str],
    regions: Sequence[Region] = (),
    alone: Callable[[], Alone | None] = lambda: None,
) -> list[OutputError]:
    """Every output of a result against that of the original, held to the original's own noise.

    Where an output differs by more, or its noise is so large that the comparison says little, every region is compared
    by itself, fed with the original's own values. That finds the region that is wrong. Where none is, rounding is all
    there is to the difference: an output whose noise is `CHAOS` or more is then accepted, and so are whole
    numbers (a maximum's place) that come out the same when they are fed with the original's values.

    Args:
        noises: outputs of the original for perturbed inputs. One perturbation may be absorbed by
            rounding or a saturated layer, so give several.
        epsilon: the machine epsilon that an output is judged by.
        message: the error, from the output's name, its relative difference, and what is allowed.
        regions: what was rewritten, in execution order.
        alone: runs both models with each region fed; None where that cannot be done.

    Returns:
        One entry per output, and one per region where they were compared by themselves.

    Raises:
        VerificationError: the structures differ, or an output by more than rounding explains; names the first region
            that is wrong, or the output if none is.
    """
    entries: list[OutputError] = []
    unsure: list[tuple[OutputError, Difference, bool]] = []
    compared = differences(expected, actual)
    if compared is None:
        raise VerificationError("the fused model returns another structure than the original", where="output")
    for name, found in compared.items():
        reference = expected[name]
        noise = max(difference(reference, n[name]).max_rel for n in noises)
        eps = epsilon(reference)
        allowed = tolerance(noise if np.isfinite(noise) else 0.0, eps)
        entry = OutputError(name, found.max_abs, found.max_rel, allowed)
        entries.append(entry)
        shaped = found.same_kind or (found.same_shape and not np.isfinite(noise))
        chaotic = shaped and not noise <= CHAOS and found.rounds
        if chaotic or not found.within(allowed) or allowed > max(WEAK, 16 * eps):
            unsure.append((entry, found, chaotic))
    if not unsure:
        return entries
    seen = alone() if regions else None
    judged = [] if seen is None else compare_regions(seen, regions, epsilon)
    for entry, found, chaotic in unsure:
        if seen is not None and chaotic:
            entries[entries.index(entry)] = replace(entry, tolerance=None)
            continue
        whole = expected[entry.output].dtype.kind in "biu"
        if whole and seen is not None and np.array_equal(seen.expected[entry.output], seen.actual[entry.output]):
            continue
        assert entry.tolerance is not None
        if not found.within(entry.tolerance):
            text = message(entry.output, entry.max_rel, entry.tolerance)
            if judged:
                text += ". No region differs by itself"
            raise VerificationError(text, where=entry.output)
    return entries + judged


def compare_regions(
    seen: Alone, regions: Sequence[Region], epsilon: Callable[[npt.NDArray], float]
) -> list[OutputError]:
    """Every region that was fed with the original's values against the original, channel by channel.

    Raises:
        VerificationError: one differs by more than its own rounding explains. It has both forms as text.
    """
    entries = []
    for region in regions:
        if region.root not in seen.actual:
            continue
        reference, other = seen.expected[region.root], seen.actual[region.root]
        noises = [n[region.root] for n in seen.noises]
        gap, error, allowed = by_channel(reference, other, noises, epsilon(reference), region.frame, region.constants)
        entries.append(OutputError(region.where, gap, error, allowed, alone=True))
        if not error <= allowed:
            raise VerificationError(
                f"region {region.where!r} of the rewritten model gives something else than the original makes of the "
                f"same operands: it differs by {error:.2g} relative to the largest value of a channel, {allowed:.1g} "
                "is what rounding explains; nothing was written. Report this as a bug, with the model",
                where=region.where,
                before=region.before,
                after=region.after,
            )
    return entries


def by_channel(
    reference: npt.NDArray,
    other: npt.NDArray,
    noises: Sequence[npt.NDArray],
    epsilon: float,
    frame: int | None,
    constants: Array | None = None,
) -> tuple[float, float, float]:
    """The channel that comes closest to what rounding explains, or exceeds it most.

    Returns:
        Its largest absolute difference, the same relative to its largest value, and what is allowed of that: the
        response to a perturbation and the machine epsilon, some times over. A kernel of some thousand terms rounds
        often; one of a dtype of 16 bits adds up in a larger one, and rounds a few times. Constants that cancel round
        as well, and no perturbation of the operands shows it.
    """
    kind = difference(reference, other)
    if not kind.same_kind:
        return float("inf"), float("inf"), 0.0

    def largest(a: npt.NDArray) -> npt.NDArray:
        return _largest_by_channel(np.abs(np.nan_to_num(a.astype(np.float64), posinf=0.0, neginf=0.0)), frame)

    with np.errstate(invalid="ignore"):
        gap, size = largest(other.astype(np.float64) - reference), largest(reference)
        noise = np.max([largest(n.astype(np.float64) - reference) for n in noises], axis=0, initial=0.0)
    times = (50, 64) if epsilon < 1e-4 else (8, 8)
    added = np.zeros(()) if constants is None else constants if constants.shape == size.shape else constants.max()
    allowed = times[0] * noise + times[1] * epsilon * (size + added)
    tiny = np.finfo(np.float64).tiny
    worst = int(np.argmax(gap / np.maximum(allowed, tiny))) if gap.size else 0
    if not gap.size or gap[worst] == 0:
        return 0.0, 0.0, float(times[1] * epsilon)
    scale = max(size[worst], tiny)
    return float(gap[worst]), float(gap[worst] / scale), float(allowed[worst] / scale)
