"""Inputs to try a model with: sizes, ranges and patterns that bring out what a wrong rewrite does.

A trial is a few numbers and a name, and the arrays are made from them alone. So a failing one can be written
down, drawn at random and shrunk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from math import prod
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reparamc.algebra.dtypes import epsilon_of, kind_of, largest_of
from reparamc.errors import InputError

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Inputs = dict[str, npt.NDArray]


@dataclass(frozen=True)
class Slot:
    """One input that a caller must give: sizes are numbers, or names of what may vary.

    Where even the number of axes is open, ``dims`` is empty and ``ranked`` False.
    Whole numbers are drawn from the first of ``bounds`` to the last; without any, below the limit of a trial, and below
    ``most``. ``values`` are numbers at which a model may branch.
    """

    name: str
    dtype: np.dtype
    dims: tuple[int | str, ...]
    ranked: bool = True
    bounds: tuple[int, int] | None = field(default=None, kw_only=True)
    most: int = field(default=2**62, kw_only=True)
    values: tuple[float, ...] = field(default=(), kw_only=True)

    @property
    def kind(self) -> str:
        """The type of an entry, in words."""
        return kind_of(self.dtype)

    def __str__(self) -> str:
        shape = f"[{', '.join(str(d) for d in self.dims)}]" if self.ranked else "of any number of axes"
        return f"{self.name} {self.kind} {shape}"


@dataclass(frozen=True)
class Trial:
    """One set of inputs.

    Attributes:
        sizes: a number for each size that may vary.
        pattern: key of `PATTERNS`.
        scale: what floating values are multiplied by.
        limit: whole numbers are drawn below it.
        seed: of the random numbers.
        alone: the one input that all this is about, the others being ordinary; empty for all inputs.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    pattern: str = "normal"
    scale: float = 1.0
    limit: int = 2
    seed: int = 0
    alone: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        return tuple(sorted(self.sizes.items())), self.pattern, self.scale, self.limit, self.seed, self.alone

    def of(self, slot: Slot) -> Trial:
        """What it says of one input."""
        return self if self.alone in ("", slot.name) else Trial(self.sizes, seed=self.seed)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray:
    return np.asarray(rng.standard_normal(shape))


def _impulse(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray:
    x = np.zeros(shape)
    if x.size:
        x.reshape(-1)[rng.integers(x.size)] = 1
    return x


def _border(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray:
    """Zeros but for the ends of the axes after the channels, where one has an interior."""
    x = _normal(rng, shape)
    if any(n > 2 for n in shape[2:]):
        x[tuple(slice(1, -1) if n > 2 and axis > 1 else slice(None) for axis, n in enumerate(shape))] = 0
    return x


def _checkerboard(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray:
    return 1.0 - 2.0 * (np.indices(shape).sum(0) % 2) if shape else np.ones(())


def _channels(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray:
    """Every channel around a level of its own: means are then far from zero, and borders show."""
    x = _normal(rng, shape)
    if len(shape) < 2:
        return x + 3
    return x + 3 * rng.standard_normal((1, shape[1], *[1] * (len(shape) - 2)))


PATTERNS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], npt.NDArray]] = {
    "ones": lambda rng, shape: np.ones(shape),
    "zeros": lambda rng, shape: np.zeros(shape),
    "normal": _normal,
    "negative": lambda rng, shape: -np.abs(_normal(rng, shape)),
    "positive": lambda rng, shape: np.abs(_normal(rng, shape)),
    "uniform": lambda rng, shape: np.asarray(rng.uniform(0, 1, shape)),
    "impulse": _impulse,
    "border": _border,
    "checkerboard": _checkerboard,
    "channels": _channels,
    "halves": lambda rng, shape: rng.integers(-9, 10, shape) / 2,  # ties, where operators round or compare
    "decades": lambda rng, shape: _normal(rng, shape) * 10.0 ** rng.integers(-6, 4, shape),  # every magnitude at once
}
"""What floating values look like, the simplest first."""

THRESHOLDS, BELOW_ZERO = "thresholds", "below zero"
"""The values of a slot, their neighbours, and the ends of whole numbers; whole numbers that count rows from the end."""

NON_FINITE = ("nan", "inf", "-inf")
"""Patterns of normal values with one entry that is NaN or infinite; only where asked for."""

ORDER = (*PATTERNS, THRESHOLDS, BELOW_ZERO, *NON_FINITE)
"""All patterns, the simplest first."""
SCALES = (1.0, 0.1, 10.0, 1e-3, 1e3, 1e-6)
LIMITS = (2, 16, 256, 4096, 65536)
"""Whole numbers below 2 fit every table and every axis; the original says how far it goes."""
SHORT_LIMIT = 16
"""For whole numbers without axes or with one: they may be sizes."""

MOST_ALONE = 8
"""So many inputs are each changed while the others are ordinary."""

GUESSES = (32, 64, 224, 256, 128, 16, 8, 4, 3, 2, 1, 14, 7, 28, 112, 384, 512, 640)
"""Sizes tried for what may vary, until the original takes one."""
SMALL = (1, 2, 3, 5, 7)
SIZES = (7, 1, 2, 3, 4, 5, 8, 9, 13, 16)
"""Of one axis, beside that of an example: odd first, and then all that is small."""
HALVED = 64
"""Sizes from here on are about halved where another one is tried, so that this costs little."""

QUARTERED = 256
"""Sizes from here on are about a quarter then."""


class TooLarge(InputError):
    """Arrays of these sizes do not fit into memory."""


PEAK = 24
"""Bytes that an element takes at least while it is compared: it is drawn, perturbed and judged in double precision."""


def check_size(shapes: Mapping[str, Sequence[int]]) -> None:
    """See that inputs of these shapes fit into the memory of this machine, before any is made.

    Raises:
        TooLarge: they do not; names the largest.
    """
    # NumPy refuses large sizes beside one of 0, too.
    need = sum(PEAK * prod(max(d, 1) for d in shape) for shape in shapes.values())
    if need > _memory():
        raise _too_large(shapes, f"takes {_bytes(need)} while it is compared, and this machine has {_bytes(_memory())}")


def _too_large(shapes: Mapping[str, Sequence[int]], why: str) -> TooLarge:
    name = max(shapes, key=lambda name: prod(shapes[name]))
    sizes = ", ".join(map(str, shapes[name]))
    return TooLarge(f"input {name!r} of the sizes [{sizes}] does not fit into memory: it {why}")


def _memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return 2**62


def _bytes(n: int) -> str:
    for power, unit in ((20, "MiB"), (30, "GiB"), (40, "TiB")):
        if n < 2 ** (power + 10):
            return f"{n / 2**power:.1f} {unit}"
    return "more than 1,024 TiB"


def make_inputs(slots: Sequence[Slot], trial: Trial) -> Inputs:
    """The arrays of ``trial``.

    Raises:
        InputError: an input holds strings, or its number of axes is open.
        TooLarge: they do not fit into memory.
    """
    if open_rank := next((s.name for s in slots if not s.ranked), None):
        raise InputError(
            f"input {open_rank!r} declares no number of axes, so no values can be made up; "
            "declare its shape, or give values with --inputs"
        )
    shapes = {s.name: tuple(d if isinstance(d, int) else trial.sizes[d] for d in s.dims) for s in slots}
    check_size(shapes)
    try:
        return _made(slots, trial)
    except MemoryError as error:
        raise _too_large(shapes, "could not be made") from error


def _made(slots: Sequence[Slot], trial: Trial) -> Inputs:
    inputs = {}
    for index, slot in enumerate(slots):
        rng = np.random.default_rng([trial.seed, index])
        shape = tuple(d if isinstance(d, int) else trial.sizes[d] for d in slot.dims)
        if slot.dtype.kind == "O":
            raise InputError(f"input {slot.name!r} holds strings, which cannot be made up; give values with --inputs")
        own = trial.of(slot)
        if (largest := largest_of(slot.dtype)) is not None:
            inputs[slot.name] = _whole(rng, shape, slot, largest, own)
            continue
        special = own.pattern in NON_FINITE
        if own.pattern == THRESHOLDS and slot.values:
            eps = epsilon_of(slot.dtype)
            x = rng.choice(slot.values, shape) * (1 + eps * rng.integers(-1, 2, shape))
        else:
            x = PATTERNS.get(own.pattern, _normal)(rng, shape) * own.scale
        if special and x.size:
            x.reshape(-1)[rng.integers(x.size)] = float(own.pattern)
        inputs[slot.name] = x.astype(slot.dtype)
    return inputs


def _whole(rng: np.random.Generator, shape: tuple[int, ...], slot: Slot, largest: int, trial: Trial) -> npt.NDArray:
    if slot.bounds is not None:
        return np.asarray(rng.integers(*slot.bounds, shape, endpoint=True)).astype(slot.dtype)
    if trial.pattern in ("ones", "zeros", "impulse"):
        return PATTERNS[trial.pattern](rng, shape).astype(slot.dtype)
    limit = min(trial.limit, largest + 1, slot.most, SHORT_LIMIT if len(shape) < 2 else trial.limit)
    if trial.pattern == BELOW_ZERO and slot.dtype.kind == "i":
        return np.asarray(rng.integers(-limit, 0, shape)).astype(slot.dtype)
    if trial.pattern == THRESHOLDS:
        ends = {0, 1, limit - 2, limit - 1, *(int(v) for v in slot.values if v == int(v))}
        return np.asarray(rng.choice(sorted(n for n in ends if 0 <= n < limit), shape)).astype(slot.dtype)
    return np.asarray(rng.integers(0, limit, shape)).astype(slot.dtype)


def symbols(slots: Sequence[Slot]) -> dict[str, bool]:
    """The names of the sizes that may vary, and whether each is the first of its input: a batch."""
    found: dict[str, bool] = {}
    for slot in slots:
        for axis, d in enumerate(slot.dims):
            if isinstance(d, str):
                found[d] = found.get(d, True) and axis == 0
    return found


def scales(slots: Sequence[Slot]) -> tuple[float, ...]:
    """The members of `SCALES` that leave all digits to the inputs: dtypes of 16 bits and less have few beside 1."""
    return SCALES[:3] if any(epsilon_of(s.dtype) > 1e-4 for s in slots) else SCALES


def first_trials(slots: Sequence[Slot]) -> Iterator[Trial]:
    """Ordinary inputs of ordinary sizes; the first that the original takes is the basis of the others."""
    names = symbols(slots)
    if not names:
        yield Trial()
        return
    for batch in (2, 1):
        for guess in GUESSES:
            yield Trial({name: batch if is_batch else guess for name, is_batch in names.items()})
    for guess in GUESSES:  # a first axis need not be a batch
        yield Trial(dict.fromkeys(names, guess))


def limits(accepts: Callable[[int], bool]) -> tuple[int, ...]:
    """The members of `LIMITS` that the original ``accepts``, and the largest one below the first that it does not."""
    found = [LIMITS[0]]
    for high in LIMITS[1:]:
        if not accepts(high):
            low = found[-1]
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if accepts(middle) else (low, middle)
            return tuple(dict.fromkeys([*found, low]))
        found.append(high)
    return tuple(found)


def further_trials(
    slots: Sequence[Slot],
    base: Trial,
    non_finite: bool,
    limits: Sequence[int],
    factors: Sequence[float] = (),
    named: Sequence[int] = (),
) -> Iterator[Trial]:
    """Other sizes and other values than ``base``, in turns, the most telling first.

    Args:
        factors: scales at which the model is known to branch.
        named: sizes from which it may do so.
    """
    names = symbols(slots)
    floating = any(epsilon_of(s.dtype) for s in slots)
    whole = any(s.dtype.kind in "iu" for s in slots)
    limit = max(limits)
    branches = [replace(base, pattern=THRESHOLDS, limit=limit)] * (whole or any(s.values for s in slots))
    branches += [replace(base, scale=f) for f in factors]
    branches += [replace(base, pattern="negative", scale=f) for f in factors]
    patterns = ("channels", "negative", "halves", "border", "decades", "impulse", "uniform", "checkerboard")
    values = [replace(base, pattern=p) for p in (*patterns, "zeros", "ones", "positive") if floating]
    values += [replace(base, pattern=p) for p in ("zeros", "ones", "impulse") if not floating]
    values += [replace(base, pattern=p) for p in NON_FINITE * non_finite]
    values += [replace(base, seed=base.seed + n) for n in (1, 2, 3)]
    scaled = [replace(base, scale=s) for s in (scales(slots)[1:] if floating else ())]
    scaled += [replace(base, limit=n) for n in limits[1:]]
    alone: list[Trial] = []
    for slot in slots[:MOST_ALONE] if len(slots) > 1 else ():
        if epsilon_of(slot.dtype):
            alone += [replace(base, alone=slot.name, scale=s) for s in (*factors, scales(slots)[-2], 1e-3)]
        alone.append(replace(base, alone=slot.name, pattern="zeros"))
    alone += [replace(base, alone=s.name, pattern=BELOW_ZERO, limit=limit) for s in slots if s.dtype.kind == "i"]
    other = list(_sizes(names, base.sizes, named)) if names else []
    sized = [replace(base, sizes=sizes, seed=base.seed + at) for at, sizes in enumerate(other)]
    for several in zip_longest(branches, sized, values, scaled, alone):
        yield from (trial for trial in several if trial is not None)


def _sizes(names: Mapping[str, bool], base: Mapping[str, int], named: Sequence[int]) -> Iterator[dict[str, int]]:
    """Odd, unequal, larger and small sizes, and those from which a model may branch."""

    def of(batch: int, other: Callable[[str, int], int]) -> dict[str, int]:
        return {name: batch if is_batch else other(name, at) for at, (name, is_batch) in enumerate(names.items())}

    yield of(1, lambda name, at: base[name] + 1)
    yield of(3, lambda name, at: base[name] + at)
    for size in named:
        yield of(1, lambda name, at, size=size: size + 1)
        yield of(1, lambda name, at, size=size: size)
    for small in SMALL:
        yield of(1, lambda name, at, small=small: small)
    yield of(2, lambda name, at: SMALL[at % len(SMALL)])
    yield of(5, lambda name, at: 2 * base[name] + 1)


def another_shape(shape: Sequence[int], channels: int, step: int = 1) -> tuple[int, ...]:
    """A larger batch, and other axes but that of the ``channels`` shorter if they are long, so that it costs little.

    They are of the other parity; or, where that is given, multiples of ``step``, each another one.
    """

    def other(axis: int, n: int) -> int:
        less = n // (4 if n >= QUARTERED else 2) if n >= HALVED else n
        if step > 1:
            return n if n % step else step * (-(-less // step) + axis - 2)
        return less + (less - n + 1) % 2

    return tuple(n + 1 if axis == 0 else n if axis == channels else other(axis, n) for axis, n in enumerate(shape))


class NoHypothesis(ImportError):
    """The package hypothesis is not installed."""


@dataclass(frozen=True)
class Space:
    """What trials are drawn from.

    Attributes:
        sizes: what each of those that vary may be, the simplest first.
        patterns, scales, limits, alone: what one is drawn from, the simplest first.
        seeds: the seed is drawn from 0 to this.
    """

    sizes: Mapping[str, Sequence[int]]
    patterns: Sequence[str]
    scales: Sequence[float]
    limits: Sequence[int]
    seeds: int
    alone: Sequence[str] = ("",)

    @classmethod
    def below(cls, trial: Trial) -> Space:
        """All that is no larger and no less simple than ``trial``."""
        patterns = dict.fromkeys([*list(PATTERNS)[:3], trial.pattern])
        scales, limits = dict.fromkeys([1.0, trial.scale]), dict.fromkeys([2, trial.limit])
        sizes = {name: range(1, most + 1) for name, most in trial.sizes.items()}
        alone = dict.fromkeys(["", trial.alone])
        return cls(sizes, tuple(patterns), tuple(scales), tuple(limits), trial.seed, tuple(alone))


def strategy(space: Space) -> SearchStrategy[Trial]:
    """Trials of ``space`` for hypothesis, which shrinks towards the simplest.

    Raises:
        NoHypothesis: it is not installed.
    """
    try:
        from hypothesis import strategies as st
    except ImportError as error:
        raise NoHypothesis("hypothesis is not installed; install it with: pip install 'reparamc[testing]'") from error
    return st.builds(
        Trial,
        sizes=st.fixed_dictionaries({name: st.sampled_from(e) for name, e in sorted(space.sizes.items())}),
        pattern=st.sampled_from(space.patterns),
        scale=st.sampled_from(space.scales),
        limit=st.sampled_from(space.limits),
        seed=st.integers(0, space.seeds),
        alone=st.sampled_from(space.alone),
    )


def search(fails: Callable[[Trial], bool], space: Space, examples: int, seed: int) -> None:
    """Let hypothesis look for a trial that ``fails``, and shrink what it finds; ``fails`` keeps the results.

    Raises:
        NoHypothesis: it is not installed.
    """
    trials = strategy(space)
    from hypothesis import HealthCheck, Phase, find, settings
    from hypothesis.errors import HypothesisException, NoSuchExample

    slow = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
    phases = (Phase.generate, Phase.shrink)  # explaining what was found takes as long, and nobody reads it
    how = settings(
        max_examples=max(examples, 1), database=None, deadline=None, suppress_health_check=slow, phases=phases
    )
    try:
        find(trials, fails, settings=how, random=Random(seed))
    except (NoSuchExample, HypothesisException):
        return
