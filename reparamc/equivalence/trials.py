"""Inputs to try a model with: sizes, ranges and patterns that bring out what a wrong rewrite does.

A trial is a few numbers and a name, and the arrays are made from them alone. So a failing one can be written
down, drawn at random and shrunk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    """One input that a caller must give: extents are numbers, or names of what may vary.

    Where even the number of axes is open, ``dims`` is empty and ``ranked`` False.
    Whole numbers are drawn from the first of ``bounds`` to the last; without any, below the limit of a trial.
    """

    name: str
    dtype: np.dtype
    dims: tuple[int | str, ...]
    ranked: bool = True
    bounds: tuple[int, int] | None = field(default=None, kw_only=True)

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
        extents: a number for each extent that may vary.
        pattern: key of `PATTERNS`.
        scale: what floating values are multiplied by.
        limit: whole numbers are drawn below it.
        seed: of the random numbers.
    """

    extents: Mapping[str, int] = field(default_factory=dict)
    pattern: str = "normal"
    scale: float = 1.0
    limit: int = 2
    seed: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        return tuple(sorted(self.extents.items())), self.pattern, self.scale, self.limit, self.seed


def _ones(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray:
    return np.ones(shape)


def _zeros(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray:
    return np.zeros(shape)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray:
    return np.asarray(rng.standard_normal(shape))


def _positive(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray:
    return np.abs(_normal(rng, shape))


def _negative(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray:
    return -_positive(rng, shape)


def _uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray:
    return np.asarray(rng.uniform(0, 1, shape))


def _impulse(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray:
    x = np.zeros(shape)
    if x.size:
        x.reshape(-1)[rng.integers(x.size)] = 1
    return x


def _border(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray:
    """Zeros but for the ends of the axes behind the channels, where one has an interior."""
    x = _normal(rng, shape)
    if any(n > 2 for n in shape[2:]):
        x[tuple(slice(1, -1) if n > 2 and axis > 1 else slice(None) for axis, n in enumerate(shape))] = 0
    return x


def _checkerboard(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray:
    return 1.0 - 2.0 * (np.indices(shape).sum(0) % 2) if shape else np.ones(())


def _channels(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray:
    """Every channel around a level of its own: means are then far from zero, and borders stand out."""
    x = _normal(rng, shape)
    if len(shape) < 2:
        return x + 3
    return x + 3 * rng.standard_normal((1, shape[1], *[1] * (len(shape) - 2)))


PATTERNS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], npt.NDArray]] = {
    "ones": _ones,
    "zeros": _zeros,
    "normal": _normal,
    "negative": _negative,
    "positive": _positive,
    "uniform": _uniform,
    "impulse": _impulse,
    "border": _border,
    "checkerboard": _checkerboard,
    "channels": _channels,
}
"""What floating values look like, the simplest first."""

NON_FINITE = ("nan", "inf", "-inf")
"""Patterns of normal values with one entry that is no number; only where asked for."""

SCALES = (1.0, 0.1, 10.0, 1e-3, 1e3, 1e-6)
LIMITS = (2, 16, 256, 4096, 65536)
"""Whole numbers below 2 fit every table and every axis; the original says how far it goes."""
SHORT_LIMIT = 16
"""For whole numbers without axes or with one: they may be extents."""

GUESSES = (32, 64, 224, 256, 128, 16, 8, 4, 3, 2, 1)
"""Extents tried for what may vary, until the original takes one."""
SMALL = (1, 2, 3, 5, 7)
SIZES = (7, 1, 2, 3, 4, 5, 8, 9, 13, 16)
"""Of one axis, beside that of an example: odd first, and then all that is small."""
HALVED = 64
"""Sizes from here on are about halved where another one is tried, so that this costs little."""


class TooLarge(InputError):
    """Arrays of these extents do not fit into memory."""


PEAK = 24
"""Bytes that an element takes at least while it is compared: it is drawn, perturbed and judged in double precision."""


def check_size(shapes: Mapping[str, Sequence[int]]) -> None:
    """See that inputs of these shapes fit into the memory of this machine, before any is made.

    Raises:
        TooLarge: they do not; names the largest.
    """
    # NumPy refuses large extents beside one of 0, too.
    need = sum(PEAK * prod(max(d, 1) for d in shape) for shape in shapes.values())
    if need > _memory():
        raise _too_large(shapes, f"takes {_bytes(need)} while it is compared, and this machine has {_bytes(_memory())}")


def _too_large(shapes: Mapping[str, Sequence[int]], why: str) -> TooLarge:
    name = max(shapes, key=lambda name: prod(shapes[name]))
    extents = ", ".join(map(str, shapes[name]))
    return TooLarge(f"input {name!r} of the extents [{extents}] does not fit into memory: it {why}")


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
    shapes = {s.name: tuple(d if isinstance(d, int) else trial.extents[d] for d in s.dims) for s in slots}
    check_size(shapes)
    try:
        return _made(slots, trial)
    except MemoryError as error:
        raise _too_large(shapes, "could not be made") from error


def _made(slots: Sequence[Slot], trial: Trial) -> Inputs:
    inputs = {}
    for index, slot in enumerate(slots):
        rng = np.random.default_rng([trial.seed, index])
        shape = tuple(d if isinstance(d, int) else trial.extents[d] for d in slot.dims)
        if slot.dtype.kind == "O":
            raise InputError(f"input {slot.name!r} holds strings, which cannot be made up; give values with --inputs")
        if (largest := largest_of(slot.dtype)) is not None:
            inputs[slot.name] = _whole(rng, shape, slot, largest, trial)
            continue
        special = trial.pattern in NON_FINITE
        x = PATTERNS["normal" if special else trial.pattern](rng, shape) * trial.scale
        if special and x.size:
            x.reshape(-1)[rng.integers(x.size)] = float(trial.pattern)
        inputs[slot.name] = x.astype(slot.dtype)
    return inputs


def _whole(rng: np.random.Generator, shape: tuple[int, ...], slot: Slot, largest: int, trial: Trial) -> npt.NDArray:
    if slot.bounds is not None:
        return np.asarray(rng.integers(*slot.bounds, shape, endpoint=True)).astype(slot.dtype)
    if trial.pattern in ("ones", "zeros", "impulse"):
        return PATTERNS[trial.pattern](rng, shape).astype(slot.dtype)
    limit = min(trial.limit, largest + 1, SHORT_LIMIT if len(shape) < 2 else trial.limit)
    return np.asarray(rng.integers(0, limit, shape)).astype(slot.dtype)


def symbols(slots: Sequence[Slot]) -> dict[str, bool]:
    """The names of the extents that may vary, and whether each is the first of its input: a batch."""
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
    slots: Sequence[Slot], base: Trial, seed: int, non_finite: bool, limits: Sequence[int]
) -> Iterator[Trial]:
    """Other sizes and other values than ``base``, in turns, the most telling first."""
    names = symbols(slots)
    sizes = list(_sizes(names, base.extents)) if names else []
    floating = any(epsilon_of(s.dtype) for s in slots)
    whole = any(s.dtype.kind in "iu" for s in slots)
    values: list[Trial] = []
    if floating:
        patterns = ("channels", "negative", "border", "impulse", "uniform", "checkerboard", "zeros", "ones", "positive")
        values += [replace(base, pattern=p) for p in patterns]
        values += [replace(base, scale=s) for s in scales(slots)[1:]]
        values += [replace(base, pattern=p) for p in NON_FINITE * non_finite]
    if whole:
        values += [replace(base, limit=limit) for limit in limits[1:]]
    if not floating:
        values += [replace(base, pattern=p) for p in ("zeros", "ones", "impulse")]
    values += [replace(base, seed=seed + n) for n in (1, 2, 3)]
    for at in range(max(len(sizes), len(values))):
        if at < len(sizes):
            yield replace(base, extents=sizes[at], seed=seed + at)
        if at < len(values):
            yield values[at]


def _sizes(names: Mapping[str, bool], base: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Odd, unequal and small extents."""
    yield {name: 1 if is_batch else base[name] + 1 for name, is_batch in names.items()}
    yield {name: 3 if is_batch else base[name] + at for at, (name, is_batch) in enumerate(names.items())}
    for small in SMALL:
        yield {name: 1 if is_batch else small for name, is_batch in names.items()}
    yield {name: 2 if is_batch else SMALL[at % len(SMALL)] for at, (name, is_batch) in enumerate(names.items())}


def another_shape(shape: Sequence[int], channels: int) -> tuple[int, ...]:
    """A larger batch, and all axes of the other parity but for the first and that of the ``channels``."""
    return tuple(
        n + 1 if axis == 0 else n if axis == channels else n + 1 if n < HALVED else n // 2 + (n // 2 - n + 1) % 2
        for axis, n in enumerate(shape)
    )


class NoHypothesis(ImportError):
    """The package hypothesis is not installed."""


@dataclass(frozen=True)
class Space:
    """What trials are drawn from.

    Attributes:
        extents: what each of those that vary may be, the simplest first.
        patterns, scales, limits: of which one is drawn, the simplest first.
        seeds: the seed is drawn from 0 to this.
    """

    extents: Mapping[str, Sequence[int]]
    patterns: Sequence[str]
    scales: Sequence[float]
    limits: Sequence[int]
    seeds: int

    @classmethod
    def below(cls, trial: Trial) -> Space:
        """All that is no larger and no less simple than ``trial``."""
        patterns = dict.fromkeys([*list(PATTERNS)[:3], trial.pattern])
        scales, limits = dict.fromkeys([1.0, trial.scale]), dict.fromkeys([2, trial.limit])
        extents = {name: range(1, most + 1) for name, most in trial.extents.items()}
        return cls(extents, tuple(patterns), tuple(scales), tuple(limits), trial.seed)


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
        extents=st.fixed_dictionaries({name: st.sampled_from(e) for name, e in sorted(space.extents.items())}),
        pattern=st.sampled_from(space.patterns),
        scale=st.sampled_from(space.scales),
        limit=st.sampled_from(space.limits),
        seed=st.integers(0, space.seeds),
    )


def search(fails: Callable[[Trial], bool], space: Space, examples: int, seed: int) -> None:
    """Let hypothesis look for a trial that ``fails``, and shrink what it finds; ``fails`` keeps the results.

    Raises:
        NoHypothesis: it is not installed.
    """
    trials = strategy(space)
    from hypothesis import HealthCheck, find, settings
    from hypothesis.errors import HypothesisException, NoSuchExample

    slow = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
    how = settings(max_examples=max(examples, 1), database=None, deadline=None, suppress_health_check=slow)
    try:
        find(trials, fails, settings=how, random=Random(seed))
    except (NoSuchExample, HypothesisException):
        return
