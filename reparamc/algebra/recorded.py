"""Arrays that remember how they were made, so that the same can be made of other parameters, by any library.

A `Tape` gives recorded arrays for parameters. What is computed with them is noted on it, through the interface of the
array API standard; `Program` carries that out again, with NumPy or with torch, where it keeps gradients. Nothing reads
the values of a recorded array by accident: `arrays.values` asks for them, `arrays.always` for an answer to count on.
"""

# A recorded array stands for those of any library: little can be said of its type.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnknownParameterType=false, reportPrivateUsage=false

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NoReturn

import numpy as np

from reparamc.errors import RecipeError

if np.lib.NumpyVersion(np.__version__) < "2.0.0":
    from array_api_compat import numpy as numpy_namespace
else:  # it follows the standard already; the import would take half of what all others take
    numpy_namespace: Any = np

Question = Callable[..., bool]
"""About arrays of NumPy."""


class At(int):
    """The place on a tape of the step that makes an array."""


class Tape:
    """All steps by which recorded arrays were made.

    Args:
        generic: no answer about values is counted on, so that what is made holds for all parameters.

    Attributes:
        steps: a function of earlier results and of numbers, each; the name of a function of the standard; or a value.
        sources: what was given as a parameter, by place.
        learned: which of them training changes by gradients.
    """

    def __init__(self, generic: bool = False) -> None:
        self.generic = generic
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self.sources: dict[At, Any] = {}
        self.learned: set[At] = set()
        self._places: dict[int, tuple[Any, At]] = {}  # of objects of a host, by id; they are held, so that ids stay
        self._known: dict[Any, At] = {}
        self.namespace = _Namespace(self)

    def source(self, thing: object, name: object, learned: bool = True) -> None:
        """Count ``thing``, an array of a host, as the parameter ``name``; statistics are not ``learned``."""
        at = self._known.get(("source", name))
        if at is None:
            at = self._known["source", name] = self.note(None)
            self.sources[at] = name
            self.learned |= {at} if learned else set()
        self.place(thing, at)

    def place(self, thing: object, at: At) -> None:
        """Say that ``thing``, an array of a host, is what the step ``at`` makes."""
        self._places[id(thing)] = thing, at

    def at(self, thing: object) -> At | None:
        """The step that makes ``thing``, an array of a host."""
        return self._places.get(id(thing), (None, None))[1]

    def follow(self, thing: object, function: Callable[..., Any], *args: object) -> None:
        """Say that ``thing`` is ``function`` of ``args``, values of a host, if one of them is on the tape."""
        places = [self.at(a) for a in args]
        if any(at is not None for at in places):
            self.place(
                thing, self.note(function, *(a if at is None else at for a, at in zip(args, places, strict=True)))
            )

    def array(self, thing: object, value: Any) -> Any:
        """``thing`` as an array of float64, of this ``value``; a recorded one if it is on the tape."""
        at = self.at(thing)
        if at is None:
            return value
        if ("exact", at) not in self._known:
            self._known["exact", at] = self.note(_exact, at)
        return Recorded(self, value, self._known["exact", at])

    def elsewhere(self, arrays: Sequence[Recorded], values: Callable[[Any], Any]) -> list[Any]:
        """What ``arrays`` would hold if all that is learned had other values: a sample of what always holds.

        Statistics stay: tracing makes constants of what a forward computes from them. Questions are left out.

        Args:
            values: makes an array of NumPy of any array.
        """
        if not self.sources:
            return [a.value for a in arrays]
        rng = np.random.default_rng(0)
        held = {self.sources[at]: (at, thing) for thing, at in self._places.values() if at in self.sources}

        def moved(name: Any) -> Any:
            at, thing = held[name]
            return thing * rng.uniform(0.8, 1.2) + rng.uniform(0.1, 0.2) if at in self.learned else thing

        program = Program(self, [a.at for a in arrays])
        return [values(made) for made in program.run(moved, next(iter(held.values()))[1])]

    def note(self, function: Any, *args: Any, **kwargs: Any) -> At:
        """A new step."""
        self.steps.append((function, args, kwargs))
        return At(len(self.steps) - 1)

    def constant(self, value: Any) -> At:
        small = (value.dtype.str, value.shape, value.tobytes()) if value.size <= 16 else None
        if small is None or small not in self._known:
            at = self.note(value)
            if small is None:
                return at
            self._known[small] = at
        return self._known[small]

    def computed(self, function: Any, *args: Any, **kwargs: Any) -> Recorded:
        """``function``, or the one of the standard with that name, of ``args``."""
        call = getattr(numpy_namespace, function) if isinstance(function, str) else function
        value = call(*map(_value, args), **kwargs)
        return Recorded(self, value, self.note(function, *map(self._noted, args), **kwargs))

    def _noted(self, arg: Any) -> Any:
        match arg:
            case Recorded():
                return arg.at
            case np.ndarray() | np.generic():
                return self.constant(np.array(arg))
            case list():
                return [self._noted(a) for a in arg]
            case _:
                return arg


class Recorded:
    """An array on a `Tape`, with the value that it has now."""

    __array_ufunc__ = None  # so that NumPy leaves operators to this class

    def __init__(self, tape: Tape, value: Any, at: At) -> None:
        self.tape, self.value, self.at = tape, np.asarray(value), at

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def size(self) -> int:
        return self.value.size

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    @property
    def device(self) -> str:
        return "cpu"

    @property
    def requires_grad(self) -> bool:
        """Whether it may become another, so that nothing is to be counted on."""
        return self.tape.generic

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return self.tape.namespace

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("what is made of the values of a recorded array would not be recorded")

    __eq__ = __ne__ = __bool__ = __float__ = __array__  # type: ignore[assignment]
    __hash__ = object.__hash__

    def __abs__(self) -> Any:
        return abs(self.value)

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, key: Any) -> Recorded:
        return self.tape.computed(operator.getitem, self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.value[key] = _value(value)
        self.at = self.tape.note(_assigned, self.at, key, self.tape._noted(value))

    def reshape(self, *shape: Any) -> Recorded:
        return self.tape.computed("reshape", self, shape[0] if isinstance(shape[0], tuple | list) else shape)

    @property
    def T(self) -> Recorded:
        return self.tape.computed("permute_dims", self, (1, 0))

    def __neg__(self) -> Recorded:
        return self.tape.computed(operator.neg, self)


def _operator(function: Callable[[Any, Any], Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return (
        lambda self, other: self.tape.computed(function, self, other),
        lambda self, other: self.tape.computed(function, other, self),
    )


for _name in ("add", "sub", "mul", "truediv"):
    _forward, _backward = _operator(getattr(operator, _name))
    setattr(Recorded, f"__{_name}__", _forward)
    setattr(Recorded, f"__r{_name}__", _backward)


class _Namespace:
    """The functions of the array API standard, of recorded arrays."""

    __name__ = "recorded"

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def asarray(self, value: Any, *, dtype: Any = None, device: Any = None) -> Recorded:
        value = np.array(value, dtype)
        return Recorded(self._tape, value, self._tape.constant(value))

    def zeros(self, shape: Any, *, dtype: Any = None, device: Any = None) -> Recorded:
        return Recorded(self._tape, np.zeros(shape), self._tape.note(_zeros, tuple(shape)))

    def __getattr__(self, name: str) -> Callable[..., Recorded]:
        if name.startswith("__"):
            raise AttributeError(name)
        return partial(self._tape.computed, name)


def _value(arg: Any) -> Any:
    return arg.value if isinstance(arg, Recorded) else [_value(a) for a in arg] if isinstance(arg, list) else arg


# Steps that are no operator and no function of the standard; NAMED_ARGUMENTS say what else they need


def _exact(xp: Any, x: Any) -> Any:
    return xp.astype(x, xp.float64)


def _zeros(xp: Any, shape: tuple[int, ...], like: Any) -> Any:
    return xp.zeros(shape, dtype=xp.float64, device=like)


def _assigned(x: Any, key: Any, value: Any) -> Any:
    x[key] = value  # nothing else reads ``x`` as it was: it is new, and has been handed to no one
    return x


def _assumed(question: Question, values: Callable[[Any], Any], *arrays: Any) -> None:
    if not question(*map(values, arrays)):
        raise RecipeError("a condition on the values of parameters no longer holds")


class Program:
    """What a tape says of some of its arrays, without what they do not need.

    Args:
        wanted: the steps that make the results.
        values: makes an array of NumPy of any array, for questions; without it there are none.
    """

    def __init__(self, tape: Tape, wanted: Sequence[At], values: Callable[[Any], Any] | None = None) -> None:
        self.wanted, self._values = list(wanted), values
        needed = set(self.wanted)
        used: dict[int, At] = {}  # the last step that reads a result
        for at in reversed(range(len(tape.steps))):
            function, args, _ = tape.steps[at]
            if at in needed or (values is not None and function is _assumed):
                read = [a for arg in args for a in (arg if isinstance(arg, list) else [arg]) if isinstance(a, At)]
                needed.update(read)
                needed.add(At(at))
                for a in read:
                    used.setdefault(a, At(at))
        kept = set(self.wanted)
        gone: dict[int, list[At]] = {}
        for a, last in used.items():
            if a not in kept:
                gone.setdefault(last, []).append(At(a))
        self.sources = {at: source for at, source in tape.sources.items() if at in needed}
        self._constants = {
            At(n): s[0] for n, s in enumerate(tape.steps) if n in needed and isinstance(s[0], np.ndarray)
        }
        given = {*self.sources, *self._constants}
        self._steps = [(n, *tape.steps[n], gone.get(n, ())) for n in sorted(needed) if n not in given]
        self._moved: dict[Any, dict[At, Any]] = {}

    def run(self, parameters: Callable[[Any], Any], like: Any) -> list[Any]:
        """The results, made of ``parameters``, a function of the sources.

        Args:
            like: an array of their library and device.

        Raises:
            RecipeError: what was counted on does not hold for these.
        """
        from array_api_compat import array_namespace, device

        xp, where = array_namespace(like), device(like)
        if where not in self._moved:
            self._moved = {where: {at: xp.asarray(c, device=where) for at, c in self._constants.items()}}
        found: dict[int, Any] = {**self._moved[where]}
        found.update((at, parameters(source)) for at, source in self.sources.items())
        for at, function, args, kwargs, gone in self._steps:
            given = [found[a] if type(a) is At else self._list(found, a) if type(a) is list else a for a in args]
            if type(function) is str:
                function = getattr(xp, function)
            elif function is _exact:
                given = [xp, *given]
            elif function is _zeros:
                given = [xp, *given, where]
            elif function is _assumed:
                given.insert(1, self._values)
            found[at] = function(*given, **kwargs)
            for a in gone:
                del found[a]
        return [found[at] for at in self.wanted]

    @staticmethod
    def _list(found: dict[int, Any], args: list[Any]) -> list[Any]:
        return [found[a] if type(a) is At else a for a in args]


def assume(question: Question, arrays: Sequence[Any]) -> None:
    """Note that the answer was yes, and that what is made from now on counts on it."""
    recorded = [a for a in arrays if isinstance(a, Recorded)]
    if recorded:
        tape = recorded[0].tape
        tape.note(_assumed, question, *map(tape._noted, arrays))


_current: ContextVar[Tape | None] = ContextVar("tape", default=None)


@contextmanager
def recording(tape: Tape) -> Generator[Tape, None, None]:
    """Let adapters give recorded arrays for the parameters that they read."""
    token = _current.set(tape)
    try:
        yield tape
    finally:
        _current.reset(token)


def tape() -> Tape | None:
    """The tape that is recorded on, if any."""
    return _current.get()
