"""Records: dataclasses that nothing changes once they are made.

A frozen dataclass compiles up to seven functions when it is defined, which makes up most of the time of importing a
file of them, and sets each attribute through one more call. Here only ``__init__`` is compiled, when the first record
of its class is made; that nothing assigns to an attribute is for the type checker to see.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from functools import cached_property as lazy  # pyright: ignore[reportUnusedImport]

    from typing_extensions import dataclass_transform
else:

    class lazy:
        """A `cached_property` without the lock that it takes before Python 3.12."""

        def __init__(self, function: Any) -> None:
            self.function, self.__doc__ = function, function.__doc__

        def __set_name__(self, owner: Any, name: str) -> None:
            self.name = name

        def __get__(self, held: Any, owner: Any = None) -> Any:
            if held is None:
                return self
            made = vars(held)[self.name] = self.function(held)
            return made

    # from Python 3.11 on, it is in typing
    def dataclass_transform(**_: Any) -> Any:
        return lambda decorator: decorator


T = TypeVar("T")


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(field,))
def entity(cls: type[T]) -> type[T]:
    """A record that is equal to itself alone."""
    made: Any = dataclass(init=False, repr=False, eq=False)(cls)

    def first(self: Any, *args: Any, **kwargs: Any) -> None:
        made.__init__ = _init(made)
        made.__init__(self, *args, **kwargs)

    made.__init__ = first
    if "__repr__" not in vars(cls):
        made.__repr__ = _shown
    return made


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(cls: type[T]) -> type[T]:
    """A record that is equal to one of its class with equal fields."""
    made: Any = entity(cls)
    key = attrgetter(*(f.name for f in made.__dataclass_fields__.values() if f.compare))

    def equals(self: Any, other: Any) -> bool:
        return key(self) == key(other) if type(other) is type(self) else NotImplemented

    def digest(self: Any) -> int:
        return hash(key(self))

    made.__eq__, made.__hash__ = equals, digest
    return made


def replace(held: T, **changes: Any) -> T:
    """A record like ``held``, with other values in some fields."""
    names: dict[str, Any] = vars(type(held))["__dataclass_fields__"]
    if not changes.keys() <= names.keys():
        raise TypeError(f"{type(held).__name__} has no field {min(changes.keys() - names.keys())!r}")
    made, values = object.__new__(type(held)), vars(held)
    vars(made).update(zip(names, map(values.__getitem__, names), strict=True), **changes)
    return made


def _init(cls: Any) -> Any:
    """What a dataclass would have for its ``__init__``."""
    known: dict[str, Any] = {"MISSING": MISSING}
    plain, named, body = ["self"], ["*"], list[str]()
    for name, f in cls.__dataclass_fields__.items():
        known[f"default_{name}"] = made = f.default if f.default_factory is MISSING else f.default_factory
        start = "" if made is MISSING else f"=default_{name}" if f.default_factory is MISSING else "=MISSING"
        (named if f.kw_only else plain).append(name + start)
        value = f"default_{name}() if {name} is MISSING else {name}" if start == "=MISSING" else name
        body.append(f" self.{name} = {value}\n")
    given = ", ".join([*plain, *(named if len(named) > 1 else ())])
    exec(f"def __init__({given}):\n{''.join(body)}", known)
    return known["__init__"]


def _shown(self: Any) -> str:
    shown = (f.name for f in self.__dataclass_fields__.values() if f.repr)
    return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"
