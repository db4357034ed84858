"""The kernel of an operator without a reader, from its impulse response.

An affine map that is the same everywhere is a convolution, whatever it is made of. So a function of
which nothing is known is asked: what it makes of zero is the bias, what it makes of a one in one place
is the kernel, seen from there. Whether it *is* such a map is then tested, not assumed: the convolution
found must give what the function gives, on random inputs of several sizes, up to the borders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import gcd, prod
from typing import Any

import numpy as np

from reparamc.algebra.dtypes import epsilon_of
from reparamc.algebra.evaluate import evaluate
from reparamc.algebra.expr import Array, Conv, Ints, Source
from reparamc.algebra.records import replace
from reparamc.algebra.rewrite import Declined

LARGEST = 2**26
"""Elements of all responses together, beyond which a function is not probed."""
WINDOW = 24
"""How far from an impulse its response is looked for; what lies farther shows as a difference in the end."""
SMALL = 2**12
"""Elements of an input up to which every impulse is tried without knowing whether it leads anywhere."""
NOISE = 2.0**-43
"""What rounding of float64 may leave of a zero, relative to the largest number of a channel."""
CANCELLED = 2.0**10
STRIDES = (1, 2, 3, 4)
FARTHEST = 64
"""How far operators may reach together where sizes are open; beyond it the sizes to try would be too large."""
NOT_EVEN = "what it adds differs from place to place, so it is no convolution"
OTHER_SIZES = "its result has other sizes than that of a convolution"
NOT_AFFINE = "it is not the same affine map everywhere, so it is no convolution"

Function = Callable[[Array], Array]


def find_kernel(
    f: Function,
    x: Source,
    batch: int | None,
    channels: int,
    sizes: Sequence[int | None],
    reach: int,
    dtype: np.dtype,
    ends: Sequence[int | None] = (),
) -> tuple[Conv, float] | Declined:
    """``f`` as a convolution of ``x``, and how far the two lie apart, relative to the values met.

    Args:
        f: from [batch, channels, *sizes] to [batch, any, *sizes], in float64. It may raise for sizes that
            do not fit it.
        batch, sizes: what f accepts; None where it accepts any.
        reach: a bound for how far any value reaches, and for any position that f singles out: maps tried
            are larger, so that what holds in them holds in every larger one.
        dtype: what parameters are stored in. Constants that agree to their last digits in it (in
            float32, where it is coarser) count as equal: a border that was computed beforehand and a
            bias that is computed now.
        ends: the sizes of its results for ``sizes``, where they are known.
    """
    slack = slack_of(dtype)
    spatial = len(sizes)
    if (why := _hopeless(channels, sizes, ends, reach)) is not None:
        return Declined(why)
    tried = tried_sizes(sizes, reach)
    trials = [(batch or 2 + n, size) for n, size in enumerate(tried)]
    if batch is None:
        trials.append((reach + 2, tried[0]))  # no position along the batch may be singled out, either
    batch = trials[0][0]
    if max(batch * channels, trials[-1][0]) * channels * prod(tried[0]) > LARGEST:
        return Declined("it is too large to be probed")
    rng = np.random.default_rng(0)
    try:
        random = rng.standard_normal((batch, channels, *tried[0]))
        at_zero, at_random = f(np.zeros_like(random)), f(random)
    except Exception:  # whatever a host's operators raise for a size that does not fit them
        return Declined("it does not run on random inputs")
    if not at_zero.size:
        return Declined("its result is empty")
    if at_zero.ndim != spatial + 2 or np.iscomplexobj(at_zero) or not np.isfinite(at_random).all():
        return Declined(NOT_AFFINE)
    flat: Array = np.reshape(np.moveaxis(at_zero, 1, 0), (at_zero.shape[1], -1))
    bias = np.partition(flat, flat.shape[1] // 2, axis=1)[:, flat.shape[1] // 2]  # a border may have others
    # Per channel, so that a large one hides no small one.
    scale = np.maximum(_largest(at_random), _largest(at_zero))
    tolerance = slack * scale
    if np.any(np.abs(flat - bias[:, None]).max(axis=1, initial=0.0) > _uneven(slack, scale, _largest(at_zero))):
        return Declined(NOT_EVEN)
    grid = _grid(f, (batch, channels), {tried[0]: at_zero.shape[2:]}, tried[0], sizes)
    if grid is None:
        return Declined(OTHER_SIZES)
    if not _follows(f, (batch, channels), tried[0], grid[0], at_zero[:1], tolerance, rng):
        return Declined(NOT_AFFINE)
    conv = _from_impulses(f, x, (batch, channels), tried[0], at_zero[:1], bias, grid, NOISE * scale)
    error = _difference(f, conv, channels, trials, rng)
    return (conv, error) if error <= slack else Declined(NOT_AFFINE)


def _hopeless(channels: int, sizes: Sequence[int | None], ends: Sequence[int | None], reach: int) -> str | None:
    """What can be said against a kernel before anything is run."""
    if None in sizes and reach > FARTHEST:
        return "it reaches too far to be probed"
    known = [(n, end) for n, end in zip(sizes, ends, strict=False) if n is not None and end is not None]
    if len(known) == len(sizes) and not _shows(channels, *zip(*known, strict=True)):
        return NOT_AFFINE
    return None if all(_strides_and_deltas([pair]) for pair in known) else OTHER_SIZES


def slack_of(dtype: np.dtype) -> float:
    """The relative difference up to which a function and a kernel count as equal."""
    return max(32 * min(epsilon_of(dtype), 2.0**-23), 1e-11)


def measured(f: Function, conv: Conv, size: Ints, batch: int | None, zeros: Callable[[Ints], Any]) -> Conv:
    """``conv``, the kernel of ``f``, as ``f`` gives it for arrays of ``size`` that ``zeros`` makes.

    Where these remember how they were made, so does the kernel.
    """
    per_group = conv.weight.shape[1]
    lead = batch or per_group
    at_zero = f(zeros((lead, conv.in_channels, *size)))
    ends = at_zero.shape[2:]
    weight = zeros(conv.weight.shape)
    responses: dict[tuple[Ints, int], Array] = {}
    taps = list(product(*map(range, conv.weight.shape[2:])))
    for tap, first in product(taps, range(0, per_group, lead)):
        offset = tuple(o + d * k for o, d, k in zip(conv.offset, conv.dilation, tap, strict=True))
        centre = tuple(n // 2 // s * s + t % s for n, s, t in zip(size, conv.stride, offset, strict=True))
        place = tuple((c - t) // s for c, s, t in zip(centre, conv.stride, offset, strict=True))
        if not _inside(centre, size) or not _inside(place, ends):
            continue
        if (centre, first) not in responses:
            ones = zeros((lead, conv.in_channels, *size))
            for n in range(min(lead, per_group - first)):
                ones[(n, slice(first + n, None, per_group), *centre)] = np.ones(conv.groups)
            responses[centre, first] = f(ones) - at_zero
        columns: Any = responses[centre, first][(slice(0, per_group - first), slice(None), *place)]
        weight[(slice(None), slice(first, first + lead), *tap)] = columns.T
    bias = at_zero[(0, slice(None), *(n // 2 for n in ends))]
    return replace(conv, weight=weight, bias=bias)


def only_moves(conv: Conv, sizes: Sequence[int | None]) -> bool:
    """Whether every result is zero or one element of the operand: no runtime gets that faster from a convolution."""
    size = 2 + max((max(r, 0) - min(a, 0) for a, r in zip(conv.offset, conv.reach, strict=True)), default=0)
    shape = (1, conv.in_channels, *(size if e is None else min(e, size) for e in sizes))
    x = np.random.default_rng(0).standard_normal(shape)
    y, _ = evaluate(replace(conv, x=(source := Source("x"))), {source: x})
    return bool(np.isin(y, np.append(x, 0)).all())


def _uneven(slack: float, scale: Array, added: Array) -> Array:
    """By how much what a function adds may differ from place to place, in each channel.

    ``added`` is the largest of it in each channel: however large the rest is, a small one must be as even. Where terms
    cancel, it may be up to ``CANCELLED`` times less even.
    """
    return np.maximum(slack * np.minimum(scale, np.minimum(added.max(initial=0.0), CANCELLED * added)), NOISE * scale)


def _largest(y: Array) -> Array:
    """The largest magnitude in each channel."""
    return np.abs(y).max(axis=(0, *range(2, y.ndim)), initial=0.0)


def tried_sizes(sizes: Sequence[int | None], reach: int) -> list[Ints]:
    """Sizes to try, the first of them for impulses: beyond the reach, odd and even, unequal; and small ones."""
    least = max(13, reach + 5)
    starts = (least, least + 1, 8, 5, 3, 2, 1) if None in sizes else (0,)
    return [tuple(n + (0, 2, 1)[axis] if e is None else e for axis, e in enumerate(sizes)) for n in starts]


def _inside(place: Ints, sizes: Sequence[int]) -> bool:
    return all(0 <= p < n for p, n in zip(place, sizes, strict=True))


def _grid(
    f: Function, lead: Ints, seen: dict[Ints, Ints], first: Ints, sizes: Sequence[int | None]
) -> tuple[Ints, Ints] | None:
    """(stride, delta), so that every size of the result is floor((size - 1 - delta) / stride) + 1."""
    strides: list[int] = []
    deltas: list[int] = []
    for axis, fixed in enumerate(sizes):
        points: list[tuple[int, int]] = []
        for step in range(1 if fixed is not None else 6):
            size = tuple(n + step * (i == axis) for i, n in enumerate(first))
            if size not in seen:
                try:
                    seen[size] = f(np.zeros((*lead, *size))).shape[2:]
                except Exception:  # as above
                    return None
            points.append((size[axis], seen[size][axis]))
        fits = _strides_and_deltas(points)
        if fixed is not None:  # one size tells little: the stride that comes closest to the ratio
            fits.sort(key=lambda fit: (abs(points[0][0] / points[0][1] - fit[0]), abs(fit[1])))
        if not fits:
            return None
        strides.append(fits[0][0])
        deltas.append(fits[0][1])
    return tuple(strides), tuple(deltas)


def _strides_and_deltas(points: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """All (stride, delta) by which each of the sizes in ``points`` becomes the other."""
    candidates = product(STRIDES, range(-WINDOW, WINDOW + 1))
    return [(s, d) for s, d in candidates if all((n - 1 - d) // s + 1 == out for n, out in points)]


def _from_impulses(
    f: Function,
    x: Source,
    lead: Ints,
    size: Ints,
    at_zero: Array,
    bias: Array,
    grid: tuple[Ints, Ints],
    noise: Array,
) -> Conv:
    (stride, delta), channels = grid, lead[1]
    taps: dict[Ints, Array] = {}  # offset -> [out, in]
    for phase in product(*map(range, stride)):
        centre = tuple(min(n - 1, (n // 2) // s * s + p) for n, s, p in zip(size, stride, phase, strict=True))
        low = tuple(max(0, (c - WINDOW) // s) for c, s in zip(centre, stride, strict=True))
        near = tuple(slice(a, (c + WINDOW) // s + 1) for a, c, s in zip(low, centre, stride, strict=True))
        window = (slice(None), slice(None), *near)
        ones = np.eye(channels)
        response = np.concatenate([(_impulse(f, lead, one, centre, size) - at_zero)[window] for one in ones])
        strong = np.abs(response).max(axis=0) > np.reshape(noise, (-1, *[1] * len(size)))
        for place in np.argwhere(strong.any(axis=0)):
            offset = tuple(int(c - s * (a + p)) for c, s, a, p in zip(centre, stride, low, place, strict=True))
            taps[offset] = np.transpose(response[(slice(None), slice(None), *place)])
    if not taps:
        taps[(0,) * len(size)] = np.zeros((len(bias), channels))
    spread = [sorted({t[axis] for t in taps}) for axis in range(len(size))]
    dilation = tuple(gcd(*(t - axis[0] for t in axis)) or 1 for axis in spread)
    kernel = tuple((axis[-1] - axis[0]) // d + 1 for axis, d in zip(spread, dilation, strict=True))
    weight = np.zeros((len(bias), channels, *kernel))
    for offset, matrix in taps.items():
        at = tuple((t - axis[0]) // d for t, axis, d in zip(offset, spread, dilation, strict=True))
        weight[(slice(None), slice(None), *at)] = matrix
    groups = _groups(weight, noise)
    rows, columns = weight.shape[0] // groups, channels // groups
    own = [weight[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(groups)]
    first = tuple(axis[0] for axis in spread)
    kept = bias if np.any(np.abs(bias) > noise) else None
    return Conv(x, np.concatenate(own), kept, stride, dilation, first, delta, groups)


def _impulse(f: Function, lead: Ints, values: Array, place: Ints, size: Ints) -> Array:
    """What ``f`` makes of ``values``, one per channel, at ``place`` and zero everywhere else."""
    x = np.zeros((*lead, *size))
    x[(0, slice(None), *place)] = values
    return f(x)[:1]


def _follows(
    f: Function, lead: Ints, size: Ints, stride: Ints, at_zero: Array, tolerance: Array, rng: np.random.Generator
) -> bool:
    """Whether the response to an impulse moves with it, up to the borders: few runs that spare one per channel."""
    values = rng.standard_normal(lead[1])
    centre = tuple(n // 2 // s * s for n, s in zip(size, stride, strict=True))
    here = _impulse(f, lead, values, centre, size) - at_zero
    for steps in ([1] * len(size), [c // s - 1 for c, s in zip(centre, stride, strict=True)]):
        for back in (tuple(steps), tuple(-k for k in steps)):
            place = tuple(c - s * k for c, s, k in zip(centre, stride, back, strict=True))
            if not _inside(place, size):
                continue
            there = _impulse(f, lead, values, place, size) - at_zero
            rest = (slice(None), slice(None))
            one = tuple(slice(max(k, 0), n + min(k, 0)) for k, n in zip(back, here.shape[2:], strict=True))
            other = tuple(slice(max(-k, 0), n + min(-k, 0)) for k, n in zip(back, here.shape[2:], strict=True))
            if np.any(_largest(here[(*rest, *one)] - there[(*rest, *other)]) > tolerance):
                return False
    return _shows(lead[1], size, here.shape[2:])


def _shows(channels: int, size: Sequence[int], ends: Sequence[int]) -> bool:
    """Whether a result of sizes ``ends`` is large enough to tell that it follows a map of ``size``, or all is tried."""
    return min(ends) > 4 or channels * prod(size) <= SMALL


def _groups(weight: Array, threshold: Array) -> int:
    """The largest number of groups so that ``weight`` is zero outside them."""
    out, channels = weight.shape[:2]
    strong = np.reshape(np.abs(weight), (out, channels, -1)).max(axis=2) > threshold[:, None]
    common = gcd(out, channels)
    for groups in sorted((g for g in range(2, common + 1) if common % g == 0), reverse=True):
        blocks = strong.reshape(groups, out // groups, groups, channels // groups).any(axis=(1, 3))
        if not np.any(blocks[~np.eye(groups, dtype=bool)]):
            return groups
    return 1


def _difference(
    f: Function, conv: Conv, channels: int, sizes: list[tuple[int, Ints]], rng: np.random.Generator
) -> float:
    """Largest difference of ``f`` and ``conv`` on random inputs, relative; infinite when they differ in kind."""
    errors: list[float] = []
    for (batch, size), scale in product(sizes, (1.0, 1e3)):
        x = scale * rng.standard_normal((batch, channels, *size))
        try:
            expected = f(x)
        except Exception:  # a size too small for its operators
            continue
        errors.append(difference(conv, x, expected))
    return max(errors) if len(errors) >= min(2 * len(sizes), 4) else float("inf")


def difference(conv: Conv, x: Array, expected: Array) -> float:
    """How far ``conv`` of ``x`` lies from ``expected``, relative; infinite when they differ in kind."""
    found, magnitude = evaluate(conv, {e: x for e in conv.children if isinstance(e, Source)})
    if expected.shape != found.shape or not np.isfinite(expected).all():
        return float("inf")
    scales = np.maximum(_largest(expected), 2.0**-50 * magnitude)
    return float(np.max(_largest(expected - found) / np.maximum(scales, np.finfo(np.float64).tiny)))
