"""What a comparison needs of a model, whatever it is made of: to run it, what inputs it takes, trees of values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import numpy as np

from reparamc.algebra.dtypes import largest_of
from reparamc.equivalence.difference import Outputs
from reparamc.equivalence.trials import LIMITS, SIZES, Slot, Space, Trial, make_inputs, scales, symbols
from reparamc.errors import InputError

Tree = Any
"""A value, or tuples, lists, mappings and objects of values."""


class NoArrayError(InputError):
    """A tensor has no plain values that could be compared."""


class Runnable(Protocol):
    """A model that runs on arrays, and is afterwards as it was before."""

    @property
    def kind(self) -> str:
        """Its type, for messages."""
        ...

    @property
    def names(self) -> tuple[str, ...] | None:
        """Its inputs by name, None where they have none."""
        ...

    @property
    def flat(self) -> bool:
        """Whether it has a plain list of outputs, so that their nesting says nothing."""
        ...

    @property
    def epsilon(self) -> float:
        """The machine epsilon of its parameters, 0 without any."""
        ...

    def domain(self, example_inputs: Any) -> Domain | None:
        """The inputs that it accepts; None where it cannot tell."""
        ...

    def __call__(self, args: Sequence[Tree], kwargs: Mapping[str, Tree]) -> Outputs: ...


def leaves(tree: Tree, types: bool = False) -> list[tuple[str, Any]]:
    """The values in ``tree``, each with its place, as in ``output[0]['logits']`` or ``output.boxes``.

    Tuples, lists, mappings, dataclasses and other objects that hold something are entered, and with ``types`` the type
    of each is there, too. What holds itself is entered once.
    """
    found: list[tuple[str, Any]] = []
    stack: list[tuple[str, Any, frozenset[int]]] = [("output", tree, frozenset())]
    while stack:
        place, value, inside = stack.pop()
        parts = _parts(value)
        if parts is None:
            found.append((place, value))
        elif id(value) not in inside:
            found += [(place, type(value))] * types
            stack += reversed([(f"{place}{at}", part, inside | {id(value)}) for at, part in parts])
    return found


_VALUES = (np.ndarray, np.generic, bool, int, float, complex, str, bytes, bytearray, AbstractSet, type(None), type)


def _parts(value: Any) -> list[tuple[str, Any]] | None:
    """What ``value`` is made of, each part with its place; None where it is one value."""
    if isinstance(value, _VALUES) or callable(value):
        return None
    if isinstance(value, Mapping):
        return [(f"[{k!r}]", v) for k, v in value.items()]
    if isinstance(value, tuple | MutableSequence):
        return [(f"[{n}]", v) for n, v in enumerate(value)]
    if is_dataclass(value):
        return [(f".{f.name}", getattr(value, f.name)) for f in fields(value) if hasattr(value, f.name)]
    held = getattr(value, "__dict__", None)
    # A tensor is a value, though it may hold something beside it.
    return [(f".{k}", v) for k, v in held.items()] if held and not hasattr(value, "dtype") else None


def mapped(function: Callable[[np.ndarray], Any], tree: Tree) -> Tree:
    """``tree`` with ``function`` of every array in its tuples, lists and mappings."""
    if isinstance(tree, Mapping):
        return {k: mapped(function, v) for k, v in tree.items()}
    if isinstance(tree, tuple | list):
        parts = [mapped(function, v) for v in tree]
        return tuple(parts) if type(tree) is tuple else parts
    return function(tree) if isinstance(tree, np.ndarray) else tree


# Inputs


_BATCHES = (2, 1, 3)
_TELLING = ("border", "impulse", "ones", "zeros")
"""Patterns that bring out borders and shifts, which normal values may hide."""


class Domain:
    """The inputs that a model accepts.

    Attributes:
        slots: the inputs that vary, in the order in which `inputs` asks ``assemble`` for the whole.
        base: the sizes of the example.
        sizes: what each name in their shapes may be; each alone was tried.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        base: Mapping[str, int],
        runs: Callable[[Tree], bool],
        assemble: Callable[[list[np.ndarray]], Tree],
    ) -> None:
        self.slots, self.base = slots, dict(base)
        self._runs, self._assemble = runs, assemble
        self._known: dict[tuple[tuple[str, int], ...], bool] = {}
        self.sizes = {name: self._tried(name, is_batch) for name, is_batch in symbols(slots).items()}

    def _tried(self, name: str, is_batch: bool) -> tuple[int, ...]:
        at = self.base[name]
        wanted = dict.fromkeys(_BATCHES if is_batch else (*SIZES, at, at - 1, at + 1))
        found = [n for n in wanted if n > 0 and (n == at or self.accepts({**self.base, name: n}))]
        # A size of one alone proves nothing: it may have been repeated along a longer one.
        return tuple(found) if set(found) - {1, at} else (at,)

    @property
    def space(self) -> Space:
        """What inputs are drawn from."""
        return Space(self.sizes, ("normal", *_TELLING), scales(self.slots), LIMITS[:1], 2**16)

    def accepts(self, sizes: Mapping[str, int]) -> bool:
        """Whether the model runs on inputs of these sizes."""
        key = tuple(sorted(sizes.items()))
        if key not in self._known:
            self._known[key] = self._runs(self.inputs(Trial(sizes)))
        return self._known[key]

    def inputs(self, trial: Trial) -> Tree:
        """The whole inputs of ``trial``."""
        return self._assemble([*make_inputs(self.slots, trial).values()])

    def example(self) -> Tree:
        """Normal values in the sizes of the example."""
        return self.inputs(Trial(self.base))

    def some(self, count: int, seed: int = 0) -> Iterator[Tree]:
        """``count`` inputs, repeatable: of the sizes given, the smallest, of mixed parities, then of random ones."""
        rng = np.random.default_rng(seed)
        chosen = [self.base, {n: min(e) for n, e in self.sizes.items()}]
        chosen += [{n: e[(at + k) % len(e)] for k, (n, e) in enumerate(self.sizes.items())} for at in (0, 3)]
        kinds = [*((pattern, 1.0) for pattern in _TELLING), *(("normal", scale) for scale in scales(self.slots)[1:])]
        made = 0
        for attempt in range(4 * count):
            drawn = {n: int(rng.choice(e)) for n, e in self.sizes.items()}
            sizes = chosen[attempt] if attempt < len(chosen) else drawn
            if made < count and self.accepts(sizes):
                pattern, scale = ("normal", 1.0) if made < 4 else kinds[(made - 4) % len(kinds)]
                yield self.inputs(Trial(sizes, pattern, scale, seed=seed + made))
                made += 1


def bounds_of(array: np.ndarray) -> tuple[int, int]:
    """The smallest and the largest of whole numbers or truth values; 0 and 1 where there are none."""
    whole = array.size and largest_of(array.dtype) is not None
    return (int(array.min()), int(array.max())) if whole else (0, 1)
