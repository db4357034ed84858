"""Records: dataclasses that nothing changes once they are made.

A frozen dataclass compiles up to seven functions when it is defined, which makes up most of the time of importing a
file of them, and sets each attribute through one more call. Here only ``__init__`` is compiled; that nothing assigns to
an attribute is for the type checker to see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:  # from Python 3.11 on, it is in typing

    def dataclass_transform(**_: Any) -> Any:
        return lambda decorator: decorator


T = TypeVar("T")


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(field,))
def entity(cls: type[T]) -> type[T]:
    """A record that is equal to itself alone."""
    made: Any = dataclass(repr=False, eq=False)(cls)
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


def _shown(self: Any) -> str:
    shown = (f.name for f in self.__dataclass_fields__.values() if f.repr)
    return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"
