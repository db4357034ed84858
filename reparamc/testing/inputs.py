"""What inputs a model takes, and arrays for it: small and odd sizes, and values that errors cannot hide behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from reparamc.errors import InputError, InputTypeError

if TYPE_CHECKING:
    from hypothesis import strategies as st

PATTERNS = ("normal", "border", "spike", "ones", "zeros", "large", "small")
"""Normal values; the same at the ends of each axis only; one element that is not zero; and so on."""

_BATCHES = (2, 1, 3)
_EXTENTS = (7, 1, 2, 3, 4, 5, 8, 9, 13, 16)

Tree = Any
"""A value, or tuples, lists and mappings of values."""


@dataclass(frozen=True)
class Argument:
    """One input: its extents are numbers or names; of whole numbers ``bounds`` are the smallest and the largest."""

    name: str
    shape: tuple[int | str, ...]
    dtype: np.dtype
    bounds: tuple[int, int] = (0, 1)


class Space:
    """The inputs that a model accepts.

    Attributes:
        arguments: the inputs that vary, in the order in which `inputs` asks ``assemble`` for the whole.
        extents: what each name in their shapes may be; each alone was tried.
    """

    def __init__(
        self,
        arguments: Sequence[Argument],
        base: Mapping[str, int],
        runs: Callable[[Tree], bool],
        assemble: Callable[[list[np.ndarray]], Tree],
    ) -> None:
        self.arguments, self.base = arguments, dict(base)
        self._runs, self._assemble = runs, assemble
        self._known: dict[tuple[int, ...], bool] = {}
        self.extents = {name: self._tried(name) for name in base}

    def _tried(self, name: str) -> tuple[int, ...]:
        at = self.base[name]
        batch = all(name not in a.shape or a.shape[0] == name for a in self.arguments)
        wanted = dict.fromkeys(_BATCHES if batch else (*_EXTENTS, at, at - 1, at + 1))
        found = [n for n in wanted if n > 0 and (n == at or self.accepts({**self.base, name: n}))]
        # An extent of one alone proves nothing: it may have been repeated along a longer one.
        return tuple(found) if set(found) - {1, at} else (at,)

    def accepts(self, sizes: Mapping[str, int]) -> bool:
        """Whether the model runs on inputs of these sizes."""
        key = tuple(sizes.values())
        if key not in self._known:
            self._known[key] = self._runs(self.inputs(sizes, "normal", 0))
        return self._known[key]

    def inputs(self, sizes: Mapping[str, int], pattern: str, seed: int) -> Tree:
        """Inputs of these sizes, with values of one of `PATTERNS`."""
        rng = np.random.default_rng(seed)
        arrays = []
        for a in self.arguments:
            shape = [sizes[n] if isinstance(n, str) else n for n in a.shape]
            if a.dtype.kind in "iub":
                low, high = a.bounds
                arrays.append(rng.integers(low, high, shape, endpoint=True).astype(a.dtype))
            else:
                arrays.append(values(pattern, shape, rng, a.dtype))
        return self._assemble(arrays)

    def some(self, count: int, seed: int = 0) -> Iterator[Tree]:
        """``count`` inputs, repeatable: of the sizes given, the smallest, of mixed parities, then of random ones."""
        rng = np.random.default_rng(seed)
        chosen = [self.base, {n: min(e) for n, e in self.extents.items()}]
        chosen += [{n: e[(at + k) % len(e)] for k, (n, e) in enumerate(self.extents.items())} for at in (0, 3)]
        made = 0
        for attempt in range(4 * count):
            drawn = {n: int(rng.choice(e)) for n, e in self.extents.items()}
            sizes = chosen[attempt] if attempt < len(chosen) else drawn
            if made < count and self.accepts(sizes):
                yield self.inputs(sizes, "normal" if made < 4 else PATTERNS[(made - 3) % len(PATTERNS)], seed + made)
                made += 1


def values(pattern: str, shape: Sequence[int], rng: np.random.Generator, dtype: np.dtype) -> np.ndarray:
    """An array of one of `PATTERNS`."""
    drawn = np.asarray(rng.standard_normal(shape))
    narrow = dtype.itemsize < 4
    match pattern:
        case "zeros":
            drawn = np.zeros(shape)
        case "ones":
            drawn = np.ones(shape)
        case "spike":
            place = int(rng.integers(max(drawn.size, 1)))
            drawn = np.where(np.arange(drawn.size) == place, 1.0, 0.0).reshape(shape)
        case "border":
            drawn[tuple(slice(1, -1) if n > 2 and axis > 1 else slice(None) for axis, n in enumerate(shape))] *= (
                0.0 if any(n > 2 for n in shape[2:]) else 1.0
            )
        case "large":
            drawn = drawn * (30 if narrow else 1000)
        case "small":
            drawn = drawn * (0.03 if narrow else 1e-3)
    return drawn.astype(dtype)


def inputs_for(model: Any, example_inputs: Any = None) -> st.SearchStrategy[Any]:
    """Inputs for ``model``, as a strategy for hypothesis: sizes, parities, borders, magnitudes.

    Every extent that may vary does: each is tried, from 1 upwards, on the model itself before the first example.
    Values are normal, zero, one, large, small, or other than zero at the border or in one place only. Whole numbers
    stay between the smallest and the largest of the example, or are 0 and 1.

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
    from hypothesis import strategies as st

    space = space_of(model, example_inputs)
    sizes = st.fixed_dictionaries({name: st.sampled_from(e) for name, e in space.extents.items()})
    if len(space.extents) > 1:
        sizes = sizes.filter(space.accepts)
    return st.builds(space.inputs, sizes, st.sampled_from(PATTERNS), st.integers(0, 2**16))


def space_of(model: Any, example_inputs: Any = None) -> Space:
    """The inputs that ``model`` accepts; see `inputs_for`."""
    space = host_of(model).space(example_inputs)
    if space is None:
        raise InputError("a function does not tell what inputs it takes; give them")
    return space


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

    def space(self, example_inputs: Any) -> Space | None: ...

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

    def space(self, example_inputs: Any) -> Space | None:
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
