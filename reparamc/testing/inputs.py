"""What inputs a model takes, and arrays for it: small and odd sizes, and values that errors cannot hide behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from reparamc.algebra.dtypes import largest_of
from reparamc.equivalence.trials import LIMITS, Slot, Space, Trial, make_inputs, scales, strategy, symbols
from reparamc.errors import InputError, InputTypeError

if TYPE_CHECKING:
    from hypothesis import strategies as st

_BATCHES = (2, 1, 3)
_EXTENTS = (7, 1, 2, 3, 4, 5, 8, 9, 13, 16)
_TELLING = ("border", "impulse", "ones", "zeros")
"""Patterns that bring out borders and shifts, which normal values may hide."""

Tree = Any
"""A value, or tuples, lists and mappings of values."""


class NoArrayError(InputError):
    """A tensor has no plain values that could be compared."""


class Domain:
    """The inputs that a model accepts.

    Attributes:
        slots: the inputs that vary, in the order in which `inputs` asks ``assemble`` for the whole.
        base: the extents of the example.
        extents: what each name in their shapes may be; each alone was tried.
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
        self.extents = {name: self._tried(name, is_batch) for name, is_batch in symbols(slots).items()}

    def _tried(self, name: str, is_batch: bool) -> tuple[int, ...]:
        at = self.base[name]
        wanted = dict.fromkeys(_BATCHES if is_batch else (*_EXTENTS, at, at - 1, at + 1))
        found = [n for n in wanted if n > 0 and (n == at or self.accepts({**self.base, name: n}))]
        # An extent of one alone proves nothing: it may have been repeated along a longer one.
        return tuple(found) if set(found) - {1, at} else (at,)

    @property
    def space(self) -> Space:
        """What inputs are drawn from."""
        return Space(self.extents, ("normal", *_TELLING), scales(self.slots), LIMITS[:1], 2**16)

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
        chosen = [self.base, {n: min(e) for n, e in self.extents.items()}]
        chosen += [{n: e[(at + k) % len(e)] for k, (n, e) in enumerate(self.extents.items())} for at in (0, 3)]
        kinds = [*((pattern, 1.0) for pattern in _TELLING), *(("normal", scale) for scale in scales(self.slots)[1:])]
        made = 0
        for attempt in range(4 * count):
            drawn = {n: int(rng.choice(e)) for n, e in self.extents.items()}
            sizes = chosen[attempt] if attempt < len(chosen) else drawn
            if made < count and self.accepts(sizes):
                pattern, scale = ("normal", 1.0) if made < 4 else kinds[(made - 4) % len(kinds)]
                yield self.inputs(Trial(sizes, pattern, scale, seed=seed + made))
                made += 1


def bounds_of(array: np.ndarray) -> tuple[int, int]:
    """The smallest and the largest of whole numbers or truth values; 0 and 1 where there are none."""
    whole = array.size and largest_of(array.dtype) is not None
    return (int(array.min()), int(array.max())) if whole else (0, 1)


def inputs_for(model: Any, example_inputs: Any = None) -> st.SearchStrategy[Any]:
    """Inputs for ``model``, as a strategy for hypothesis: sizes, parities, borders, magnitudes.

    Every extent that may vary does: each is tried, from 1 upwards, on the model itself before the first example.
    Values are normal, zero, one, or other than zero at the border or in one place only, and large or small. Whole
    numbers stay between the smallest and the largest of the example, or are 0 and 1.

    Args:
        model: a torch module, an ONNX ModelProto or the path of one.
        example_inputs: one tensor, a tuple of positional arguments, or a mapping of keyword arguments. ONNX models tell
            by themselves. So does a torch module of one argument that starts with a convolution, a linear layer or
            a BatchNorm.

    Returns:
        For torch, tuples of positional arguments (mappings, if the example is one); for ONNX, mappings from names to
        arrays.

    Raises:
        InputError: the model does not run on the example, or does not tell what it takes.
    """
    domain = domain_of(model, example_inputs)
    trials = strategy(domain.space)
    if len(domain.extents) > 1:
        trials = trials.filter(lambda trial: domain.accepts(trial.extents))
    return trials.map(domain.inputs)


def domain_of(model: Any, example_inputs: Any = None) -> Domain:
    """The inputs that ``model`` accepts; see `inputs_for`."""
    domain = host_of(model).domain(example_inputs)
    if domain is None:
        raise InputError("a function does not tell what inputs it takes; give them")
    return domain


# Hosts


class Host(Protocol):
    """What a comparison needs of a model, whatever it is made of."""

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

    def domain(self, example_inputs: Any) -> Domain | None: ...

    def __call__(self, args: Sequence[Tree], kwargs: Mapping[str, Tree]) -> list[tuple[str, Any]]: ...


def host_of(model: Any, tensors: bool = False) -> Host:
    """``model`` as something that runs; ``tensors`` says whether a function is to be called with tensors.

    Raises:
        InputTypeError: it is no model.
        InputError: it cannot be read.
    """
    onnx, torch = sys.modules.get("onnx"), sys.modules.get("torch")
    if isinstance(model, str | os.PathLike) or (onnx is not None and isinstance(model, onnx.ModelProto)):
        from reparamc.testing.onnx_host import OnnxHost

        return OnnxHost(model)
    if torch is not None and isinstance(model, torch.nn.Module):
        from reparamc.testing.fx_host import TorchHost

        return TorchHost(model)
    if callable(model):
        return FunctionHost(model, tensors)
    raise InputTypeError(f"a torch module, an ONNX model, its path or a function is wanted, not {type(model).__name__}")


class FunctionHost:
    """A function of arrays or tensors."""

    names = None
    flat = False
    epsilon = 0.0

    def __init__(self, function: Callable[..., Any], tensors: bool) -> None:
        self.kind = f"function {getattr(function, '__name__', type(function).__name__)}"
        self.function, self.tensors = function, tensors

    def domain(self, example_inputs: Any) -> Domain | None:
        return None

    def __call__(self, args: Sequence[Tree], kwargs: Mapping[str, Tree]) -> list[tuple[str, Any]]:
        call = [mapped(np.copy, a) for a in args], {k: mapped(np.copy, v) for k, v in kwargs.items()}
        if self.tensors:
            from reparamc.testing.fx_host import called

            result = called(self.function, *call)
        else:
            result = self.function(*call[0], **call[1])
        return leaves(arrays_of(result))


# Trees of arrays


def leaves(tree: Tree, path: str = "") -> list[tuple[str, Any]]:
    """The values in ``tree``, each with its place, as in ``output[0]['logits']``."""
    found: list[tuple[str, Any]] = []
    stack = [(f"output{path}", tree)]
    while stack:
        place, value = stack.pop()
        if isinstance(value, Mapping):
            stack += reversed([(f"{place}[{k!r}]", v) for k, v in value.items()])
        elif isinstance(value, tuple | list):
            stack += reversed([(f"{place}[{n}]", v) for n, v in enumerate(value)])
        else:
            found.append((place, value))
    return found


def mapped(function: Callable[[np.ndarray], Any], tree: Tree) -> Tree:
    """``tree`` with ``function`` of every array in it."""
    if isinstance(tree, Mapping):
        return {k: mapped(function, v) for k, v in tree.items()}
    if isinstance(tree, tuple | list):
        return (
            type(tree)([mapped(function, v) for v in tree])
            if type(tree) in (tuple, list)
            else [mapped(function, v) for v in tree]
        )
    return function(tree) if isinstance(tree, np.ndarray) else tree


def arrays_of(tree: Tree) -> Tree:
    """``tree`` with tensors as arrays."""
    torch = sys.modules.get("torch")
    if torch is None:
        return tree
    from reparamc.testing.fx_host import arrays

    return arrays(tree)
