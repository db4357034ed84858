"""Arrays of any library that follows the array API standard, and the questions that are asked of their values.

The algebra computes with the arrays that it is given: those of NumPy, or tensors of torch, on their device and with
their gradients. Its own constants, such as one and zero, are NumPy's, and become what they meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from reparamc.algebra.recorded import Question, Recorded, assume, numpy_namespace

Array: TypeAlias = npt.NDArray[np.float64]
"""An array of float64. For type checkers it is NumPy's; kernels and rules use what all libraries have."""


class Parameter(np.lib.mixins.NDArrayOperatorsMixin):
    """A parameter of a host graph, as an array that is loaded when its values are asked for.

    Attributes:
        names: those that the host graph gives to what it is made of.
        shape: known without loading.
        origin: what the host graph holds, if the adapter needs it.
        look: gives the values in the dtype that they are stored in.
        is_exact: whether ``look`` gives the same numbers as ``load``; a result that ``look`` computes may be rounded.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        shape: tuple[int, ...],
        load: Callable[[], Array],
        origin: Any = None,
        look: Callable[[], npt.NDArray[Any]] | None = None,
    ) -> None:
        self.names, self.shape, self.origin = names, shape, origin
        self.load, self.look, self.is_exact = load, look or load, False
        self._value: Array | None = None
        self._seen: Any = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def is_loaded(self) -> bool:
        return self._value is not None

    @property
    def value(self) -> Array:
        """What it holds: loaded once, and kept until it is released."""
        if self._value is None:
            self._value = self.load()
        return self._value

    def glance(self) -> Any:
        """What it holds, in the dtype that it is stored in unless it is loaded already."""
        held = self._value if self._seen is None else self._seen
        return self.look() if held is None else held

    @property
    def seen(self) -> Any:
        """The same, kept until it is released."""
        self._seen = self.glance()
        return self._seen

    def release(self) -> None:
        """Forget the values; they are loaded again when they are asked for."""
        self._value = self._seen = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(values(self.value), dtype, copy=True) if copy else np.asarray(values(self.value), dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return getattr(ufunc, method)(*map(loaded, inputs), **options)

    def __getitem__(self, at: Any) -> Any:
        return self.value[at]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.value, name)


class Rounded(Parameter):
    """An array that was computed, as it is ``stored``: rounded. In float64 it is computed again when asked for."""

    def __init__(self, stored: npt.NDArray[Any], load: Callable[[], Array]) -> None:
        super().__init__((), stored.shape, load)
        self.stored = stored


def as_stored(array: Array) -> Array:
    """``array`` itself; of one that is `Rounded`, what is stored of it."""
    return array.stored if isinstance(array, Rounded) else array


def loaded(array: Any) -> Any:
    """``array`` itself; what a `Parameter` holds."""
    return array.value if isinstance(array, Parameter) else array


def factor(array: Any) -> Any:
    """As `loaded`, but as it is stored where that gives the same products with arrays of float64, without a copy."""
    is_stored = isinstance(array, Parameter) and array.is_exact and not array.is_loaded
    return array.seen if is_stored and array.seen.dtype == np.float32 else loaded(array)


def derived(array: Array, shape: tuple[int, ...], function: Callable[[Array], Array], *, moves: bool = False) -> Array:
    """``function`` of ``array``, which has that shape; of a `Parameter` it is computed when it is loaded.

    ``moves``: whether it only moves numbers, and so gives the same ones in every dtype.
    """
    if not isinstance(array, Parameter):
        return function(array)
    load, look = array.load, array.look
    made = Parameter(array.names, shape, lambda: function(load()), array.origin, lambda: function(look()))
    made.is_exact = moves and array.is_exact
    return cast(Array, made)


_NUMPY = (np.ndarray, np.generic)


def _is_numpy(array: Any) -> bool:
    return isinstance(array, _NUMPY)


def together(*arrays: Array) -> tuple[Any, ...]:
    """The namespace of ``arrays``, and the arrays in it: those of NumPy become ones of the other library, if any."""
    held: list[Any] = [loaded(a) for a in arrays]
    others = [a for a in held if not isinstance(a, _NUMPY)]
    if not others:
        return (numpy_namespace, *held)
    other = others[0]
    from array_api_compat import array_namespace

    xp: Any = array_namespace(other)
    how = {"dtype": other.dtype, "device": _device(other)}
    return (xp, *(xp.asarray(np.array(a), **how) if _is_numpy(a) else a for a in held))


def _device(array: Any) -> Any:
    from array_api_compat import device  # pyright: ignore[reportUnknownVariableType]

    return device(array)


def zeros_of(like: Array, shape: Sequence[int]) -> Array:
    """Zeros of the library, dtype and device of ``like``."""
    xp, like = together(like)
    where = {} if xp is numpy_namespace else {"device": _device(like)}
    return xp.zeros(tuple(shape), dtype=like.dtype, **where)


def taken(array: Array, index: Sequence[int] | npt.NDArray[np.intp], axis: int = 0) -> Array:
    """``array`` at the positions ``index`` along ``axis``."""
    array = loaded(array)
    if _is_numpy(array):
        return array.take(index, axis)
    xp = together(array)[0]
    return xp.take(array, xp.asarray(np.array(index, np.int64), device=_device(array)), axis=axis)


def concatenated(arrays: Sequence[Array], axis: int = 0) -> Array:
    """``arrays`` one after the other along ``axis``."""
    xp, *alike = together(*arrays)
    return xp.concat(alike, axis=axis)


def added(arrays: Sequence[Array]) -> Array:
    """The sum of one or more arrays."""
    _, first, *others = together(*arrays)
    return array_of(sum(others, first))


def array_of(result: Any) -> Array:
    """``result``, as an array: of arrays without axes NumPy makes numbers."""
    return np.asarray(result) if _is_numpy(result) else result


def values(array: Array) -> Array:
    """What ``array`` holds, as an array of NumPy, without gradients."""
    array = loaded(array)
    if isinstance(array, Recorded):
        return array.value
    if not _is_numpy(array):
        from array_api_compat import is_torch_array

        array = cast(Any, array).detach().cpu() if is_torch_array(array) else array
    return np.asarray(array)


def glanced(array: Array) -> npt.NDArray[Any]:
    """As `values`, for one look: in the dtype that it is stored in, and not kept, unless it is loaded already."""
    return values(array.glance() if isinstance(array, Parameter) else array)


MODERATE = 2.0**42
"""The product of three such numbers is finite in float32."""


def all_moderate(held: npt.NDArray[Any]) -> bool:
    """Whether no element is NaN, infinite, or so large that a product of three overflows float32.

    By such an element an operator may give NaN or infinity for ordinary inputs, where its folded form gives none.
    """
    if held.dtype.char in "fd":  # NumPy warns where that overflows float16
        flat = held.ravel(order="K")  # no copy of what is stored column by column
        if np.vdot(flat, flat) <= MODERATE:
            return True  # mostly, this sum of squares is all there is to compute
    with np.errstate(invalid="ignore"):
        return float(held.max(initial=0)) <= MODERATE and float(held.min(initial=0)) >= -MODERATE


def is_moderate(array: Array) -> bool:
    """Whether the elements of ``array`` are `all_moderate`."""
    return all_moderate(glanced(array))


def fixed(array: Array) -> Array:
    """``array`` without a memory of how it was made."""
    array = loaded(array)
    return array.value if isinstance(array, Recorded) else array


def beside(x: Array, array: Array) -> Array:
    """``array``, with a memory of how it was made only if ``x`` has one."""
    return loaded(array) if isinstance(x, Recorded) else fixed(array)


def same(a: Array, b: Array) -> bool:
    """Whether two arrays are equal and will be."""
    if a is b:
        return True
    if isinstance(a, Rounded) and isinstance(b, Rounded) and not np.array_equal(a.stored, b.stored):
        return False
    a, b = loaded(a), loaded(b)
    if isinstance(a, Recorded) or isinstance(b, Recorded):
        return isinstance(a, Recorded) and isinstance(b, Recorded) and a.at == b.at
    return np.array_equal(a, b)


def count(array: Array) -> int:
    """The number of elements."""
    return prod(array.shape)


def always(question: Question, *arrays: Array) -> bool:
    """Whether ``question`` holds for ``arrays`` and will: one that has gradients may become another."""
    arrays = tuple(map(loaded, arrays))
    if all(map(_is_numpy, arrays)):
        return bool(question(*arrays))
    if any(getattr(a, "requires_grad", False) for a in arrays) or not question(*map(values, arrays)):
        return False
    assume(question, arrays)
    return True


def is_all(array: Array, number: float) -> bool:
    """Whether every element is ``number``, one that no dtype rounds, and will be."""
    if isinstance(array, Rounded) and array.stored.size and array.stored.ravel()[0] != number:
        return False
    array = loaded(array)
    return _equals(number, array) if _is_numpy(array) else always(partial(_equals, number), array)


def _equals(number: float, array: Array) -> bool:
    return not array.size or bool(array.ravel()[0] == number and (array == number).all())


def largest(array: Array) -> float:
    """The largest magnitude, 0 of no elements."""
    return float(np.abs(values(array)).max(initial=0.0))
