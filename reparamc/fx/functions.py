"""Functions that torch.fx cannot follow, and that a graph calls as they are."""

from __future__ import annotations

import functools
import inspect
import types
from contextlib import AbstractContextManager
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from reparamc.fx.questions import is_of_torch, replaced_globals


class Functions:
    """Functions that torch.fx cannot follow: it records the calls of those, where they are found by name."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, str], tuple[dict[str, Any], Any]] = {}

    def found(self, error: BaseException) -> bool:
        """Whether a function that is not yet among these raised ``error``, having been called by its name."""
        frames: list[types.FrameType] = []
        at = error.__traceback__
        while at is not None:
            frames.append(at.tb_frame)
            at = at.tb_next
        while frames and is_of_torch(frames[-1]):
            frames.pop()
        while len(frames) > 1 and not _is_method(frames[-1]):
            frame, caller = frames.pop(), frames[-1]
            for name, value in caller.f_globals.items():
                place = id(caller.f_globals), name
                plain = inspect.unwrap(value) if isinstance(value, types.FunctionType) else None
                if plain is not None and plain.__code__ is frame.f_code and place not in self._places:
                    self._places[place] = caller.f_globals, value
                    return True
        return False

    def wrapped(self, tracer: fx.Tracer) -> AbstractContextManager[None]:
        """While ``tracer`` records the calls of these."""
        return replaced_globals([(home, name, _called(f, tracer)) for (_, name), (home, f) in self._places.items()])


def _called(function: Any, tracer: fx.Tracer) -> Any:
    """``function``, a call of which is recorded where a proxy is among its arguments."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(a, fx.Proxy) for a in pytree.tree_leaves((args, kwargs))):
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", function, args, kwargs)

    return call


def _is_method(frame: types.FrameType) -> bool:
    names = frame.f_code.co_varnames[:1]
    return bool(names) and isinstance(frame.f_locals.get(names[0]), nn.Module)
