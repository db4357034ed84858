"""What happens inside a module while it runs: which parts are called, with what, and what others read of them.

Nothing is put on the modules for it. `torch.nn.Module.__call__` and `__getattr__` are replaced meanwhile, and other
threads go past the replacements.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Call = tuple[tuple[Any, ...], dict[str, Any]]
LINEAR = (nn.modules.conv._ConvNd, nn.Linear)

LOCK = threading.RLock()
"""One fusion at a time: tracing replaces methods of `torch.nn.Module` for everybody."""


@dataclass
class Seen:
    """One call of a module, and its result."""

    call: Call
    result: Any = None
    _versions: list[tuple[Tensor, int]] = field(default_factory=list)

    def ended(self, result: Any) -> None:
        self.result = _held(result)
        args, kwargs = self.call
        if type(self.result) is Tensor and not kwargs and all(type(a) is Tensor for a in args):
            tensors = [*args, self.result]
        else:
            tensors = pytree.tree_leaves((self.call, self.result))
        self._versions = [(t, t._version) for t in tensors if isinstance(t, Tensor) and not t.is_inference()]

    def is_kept(self) -> bool:
        """Whether nobody has written into its tensors since."""
        return bool(self._versions) and all(t._version == version for t, version in self._versions)


class Watched:
    """The calls of the parts of ``model``, while it runs within `watching`.

    Attributes:
        calls: the first calls in every run of each part that is no leaf, or a linear one, by the part's id.
        touched: ids of parts that someone reached into from outside while they did not run: read an attribute that is
            a parameter, a buffer or a submodule, or called a submodule.
        cast: ids of parts that were called where the Python around them had turned autocast on.
        raised: the path of the innermost part that raised an error in this run.
    """

    def __init__(self, model: nn.Module, most: int = 2) -> None:
        self.calls: dict[int, list[Seen]] = {}
        self.touched: set[int] = set()
        self.cast: set[int] = set()
        self.raised: str | None = None
        self.most = most
        self._seen = Counter[int]()
        self._running = Counter[int]()
        self._around: dict[int, list[list[int]]] = {}
        paths = dict(model.named_modules(remove_duplicate=False))
        self._paths = {id(module): path for path, module in model.named_modules()}
        for path, module in paths.items():
            around = list[int]()
            while path:
                path = path.rpartition(".")[0]
                around.append(id(paths[path]))
            self._around.setdefault(id(module), []).append(around)

    def started(self, module: nn.Module, call: Call) -> Seen | None:
        self._reached_around(module)
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            self.cast.add(id(module))
        self._running[id(module)] += 1
        if (is_leaf(module) and not isinstance(module, LINEAR)) or self._seen[id(module)] == self.most:
            return None
        self._seen[id(module)] += 1
        seen = Seen(_held(call))
        self.calls.setdefault(id(module), []).append(seen)
        return seen

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

    def failed(self, module: nn.Module) -> None:
        if self.raised is None:
            self.raised = self._paths.get(id(module), "")

    def next_run(self) -> None:
        self._seen.clear()
        self.raised = None

    def forget_run(self) -> None:
        """Drop the calls of the last run, which did not end well."""
        for key, times in self._seen.items():
            del self.calls[key][-times:]
        self._seen.clear()


@contextmanager
def watching(watched: Watched) -> Iterator[None]:
    """Note in ``watched`` what this thread does with modules."""
    thread, call, read = threading.get_ident(), nn.Module.__call__, nn.Module.__getattr__

    def watched_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return call(self, *args, **kwargs)
        seen = watched.started(self, (args, kwargs))
        try:
            result = call(self, *args, **kwargs)
        except Exception:  # whatever the user's forward raises
            watched.failed(self)
            raise
        finally:
            watched.ended(self)
        if seen is not None:
            seen.ended(result)
        return result

    def watched_read(self: nn.Module, name: str) -> Any:
        found = read(self, name)
        if threading.get_ident() == thread:
            watched.read(self)
        return found

    with LOCK, replaced("__call__", watched_call, call), replaced("__getattr__", watched_read, read):
        watched.next_run()
        yield


def _held(value: Any) -> Any:
    """``value`` in containers of its own: others may change those that they are given."""
    kind = type(value)
    if kind is Tensor:  # most are
        return value
    if kind is tuple or kind is list:
        return kind(map(_held, value))
    return value if kind is dict and not value else pytree.tree_map(lambda v: v, value)


def is_leaf(module: nn.Module) -> bool:
    """Whether there is nothing to enter: an operator of torch's own, or a ScriptModule."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    kind = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        kind = kind.__mro__[1]
    containers = nn.Sequential, nn.ModuleList, nn.ModuleDict
    return kind.__module__.startswith("torch.nn.modules") and not issubclass(kind, containers) and kind is not nn.Module


@contextmanager
def replaced(name: str, by: Callable[..., Any], original: Callable[..., Any]) -> Iterator[None]:
    """A method of all modules is another one; for all threads, so that ``by`` has to ask which one calls."""
    setattr(nn.Module, name, by)
    try:
        yield
    finally:
        setattr(nn.Module, name, original)
