"""What happens inside a module while it runs: which parts are called, with what, and what others read of them.

Nothing is put on the modules for it. `torch.nn.Module.__call__` and `__getattr__` are replaced meanwhile, and other
threads go past the replacements.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

Call = tuple[tuple[Any, ...], dict[str, Any]]

LOCK = threading.RLock()
"""One fusion at a time: tracing replaces methods of `torch.nn.Module` for everybody."""


class Watched:
    """The calls of the parts of ``model``, while it runs within `watching`.

    Attributes:
        calls: the first calls of each part in every run, by the part's id.
        touched: ids of parts that someone reached into from outside while they did not run: read an attribute that is
            a parameter, a buffer or a submodule, or called a submodule.
    """

    def __init__(self, model: nn.Module, most: int = 2) -> None:
        self.calls: dict[int, list[Call]] = {}
        self.touched: set[int] = set()
        self.most = most
        self._seen = Counter[int]()
        self._running = Counter[int]()
        self._around: dict[int, list[list[int]]] = {}
        paths = dict(model.named_modules(remove_duplicate=False))
        for path, module in paths.items():
            around = list[int]()
            while path:
                path = path.rpartition(".")[0]
                around.append(id(paths[path]))
            self._around.setdefault(id(module), []).append(around)

    def started(self, module: nn.Module, call: Call) -> None:
        self._reached_around(module)
        self._running[id(module)] += 1
        self._seen[id(module)] += 1
        if self._seen[id(module)] <= self.most:
            self.calls.setdefault(id(module), []).append(call)

    def ended(self, module: nn.Module) -> None:
        self._running[id(module)] -= 1

    def read(self, module: nn.Module) -> None:
        if not self._running[id(module)]:
            self.touched.add(id(module))
            self._reached_around(module)

    def _reached_around(self, module: nn.Module) -> None:
        """What is around ``module`` and does not run; where it has several places, in that where it was called."""
        places = self._around.get(id(module), [[]])
        steps = [next((n for n, i in enumerate(around) if self._running[i]), len(around)) for around in places]
        for around, n in zip(places, steps, strict=True):
            if n == min(steps):
                self.touched.update(i for i in around if not self._running[i])

    def next_run(self) -> None:
        self._seen.clear()


@contextmanager
def watching(watched: Watched) -> Iterator[None]:
    """Note in ``watched`` what this thread does with modules."""
    thread, call, read = threading.get_ident(), nn.Module.__call__, nn.Module.__getattr__

    def watched_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return call(self, *args, **kwargs)
        watched.started(self, _held((args, kwargs)))
        try:
            return call(self, *args, **kwargs)
        finally:
            watched.ended(self)

    def watched_read(self: nn.Module, name: str) -> Any:
        found = read(self, name)
        if threading.get_ident() == thread:
            watched.read(self)
        return found

    with LOCK, _replaced("__call__", watched_call, call), _replaced("__getattr__", watched_read, read):
        watched.next_run()
        yield


def _held(call: Call) -> Call:
    """``call`` in containers of its own: the callee may change those that it is given."""
    return pytree.tree_map(lambda v: v, call)


@contextmanager
def _replaced(name: str, by: Callable[..., Any], original: Callable[..., Any]) -> Iterator[None]:
    setattr(nn.Module, name, by)
    try:
        yield
    finally:
        setattr(nn.Module, name, original)
