"""Copies of modules, and the state of a module put back as it was."""

from __future__ import annotations

import copy
import copyreg
import functools
import operator
import random
import sys
import types
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import chain, starmap
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reparamc.errors import InputError, one_line
from reparamc.fx.calls import CONSTANTS, is_constant, is_exported

Memo = dict[int, Any]
"""What replaces an object in a copy, by its id; as `copy.deepcopy` keeps it."""

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_REFERRING = (types.FunctionType, types.MethodType, partial, dict, list)


def submodules(model: nn.Module) -> dict[str, nn.Module]:
    """As `nn.Module.named_modules`, which takes longer the deeper they are nested."""
    found, seen, stack = {"": model}, {id(model)}, [("", iter(model._modules.items()))]
    while stack:
        path, inner = stack[-1]
        for name, module in inner:
            if module is not None and id(module) not in seen:
                seen.add(id(module))
                found[f"{path}{name}"] = module
                if module._modules:
                    stack.append((f"{path}{name}.", iter(module._modules.items())))
                    break
        else:
            stack.pop()
    return found


def named_tensors(model: nn.Module, *kinds: str) -> dict[str, Tensor]:
    """As `nn.Module.named_parameters`, and `nn.Module.named_buffers` after that; or one ("_parameters") alone."""
    found, seen = dict[str, Tensor](), set[int]()
    modules = submodules(model)
    for kind in kinds or ("_parameters", "_buffers"):
        for path, module in modules.items():
            for name, t in getattr(module, kind).items():
                if t is not None and id(t) not in seen:
                    seen.add(id(t))
                    found[f"{path}.{name}" if path else name] = t
    return found


def tensors(model: nn.Module, *kinds: str) -> list[Tensor]:
    """All parameters, and all buffers."""
    return [*named_tensors(model, *kinds).values()]


def copied(model: nn.Module, shared: list[str] | None = None) -> nn.Module:
    """A copy that shares no storage with ``model``, tensors that were computed and kept as attributes included.

    Functions that it holds (hooks, a replaced forward) refer to the copy where those of ``model`` refer to ``model``
    or to what it holds. What cannot be copied (a lock, a generator) is the same object in both; ``shared`` is given
    the names of those.

    Raises:
        InputError: a parameter or buffer cannot be copied.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about its own exported programs
        memo = _begun(model)
        try:
            made = _deep(model, memo)
        except Exception:  # whatever the attributes of the user's module raise
            memo = _begun(model)
            for name, value in _uncopyable(model):
                memo[id(value)] = value
                if shared is not None:
                    shared.append(name)
            try:
                made = _deep(model, memo)
            except Exception as error:
                inner = next((p for p, m in reversed(submodules(model).items()) if _failing(m, memo)), "")
                kind = type(model.get_submodule(inner)).__name__
                raise InputError(
                    f"{f'{inner!r}, a {kind},' if inner else kind} cannot be copied: {one_line(error)}; "
                    "fuse_fx makes a fused copy: let copy.deepcopy take it"
                ) from error
    for module in submodules(made).values():
        held = [(n, v) for n, v in vars(module).items() if type(v) not in CONSTANTS and n not in _REGISTRIES]
        for name, value in [(n, v) for n, v in held if isinstance(v, _REFERRING) and v]:
            if (moved := _moved(value, memo)) is not value:
                vars(module)[name] = moved
    modes = {path: module.training and not is_exported(model) for path, module in submodules(model).items()}
    for path, module in submodules(made).items():
        if module.training != modes.get(path, module.training):
            _set_mode(module, modes[path])
    return made


def _deep(model: nn.Module, memo: Memo) -> nn.Module:
    """As `copy.deepcopy`, in less time where all modules are copied attribute by attribute."""
    modules = list(model.modules())
    if all(map(_has_plain_copies, {type(m) for m in modules})):
        memo |= {id(m): type(m).__new__(type(m)) for m in modules}
        for m in reversed(modules):
            memo[id(m)].__setstate__({name: _copy(v, memo) for name, v in vars(m).items()})
    return copy.deepcopy(model, memo)


def _copy(value: Any, memo: Memo) -> Any:
    """As `copy.deepcopy`, which takes longer to find what needs no copy, or is copied already."""
    kind = type(value)
    if kind in CONSTANTS:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if is_constant(value):
        return value
    if kind is dict and all(type(key) is str for key in value):
        memo[id(value)] = made = dict[str, Any]()
        made.update((key, _copy(held, memo)) for key, held in value.items())
        return made
    return copy.deepcopy(value, memo)


def _has_plain_copies(kind: type[nn.Module]) -> bool:
    """Whether `copy.deepcopy` of such modules is a new one with copies of all attributes."""
    same = ("__new__", "__reduce__", "__reduce_ex__", "__getstate__")
    others = ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__")
    return (
        all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in same)
        and not any(hasattr(kind, name) for name in others)
        and kind not in copyreg.dispatch_table
        and not any(vars(base).get("__slots__") for base in kind.__mro__)
    )


def _set_mode(module: nn.Module, training: bool) -> None:
    """Set the mode that a copy lost: a feature extractor of torchvision chooses its graph by it."""
    if is_exported(module):
        module.training = training
    else:
        module.train(training)


def _begun(model: nn.Module) -> Memo:
    """Copies of what `copy.deepcopy` refuses (tensors that were computed), or is slow at (registries, buffers)."""
    memo: Memo = {}
    held: dict[int, Tensor] = {}
    for module in submodules(model).values():
        for name, value in vars(module).items():
            kind = type(value)
            if kind in _EMPTIED and not value:
                memo[id(value)] = kind()
            elif kind not in CONSTANTS and name != "_modules" and isinstance(value, _HOLDING):
                inner = value.values() if name in _REGISTRIES and isinstance(value, dict) else _inside(value)
                held.update((id(t), t) for t in inner if isinstance(t, Tensor))
    memo |= {key: t.detach().clone() for key, t in held.items() if not t.is_leaf}
    plain = {
        key: t
        for key, t in held.items()
        if type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and t.device.type in ("cpu", "cuda")
    }
    uses = Counter(t.untyped_storage()._cdata for t in plain.values())
    for key, t in plain.items():
        storage = t.untyped_storage()
        alone = storage.nbytes() == t.nbytes and uses[storage._cdata] == 1
        if alone and type(t) is Tensor and not (t.requires_grad or t.is_quantized or vars(t)):
            memo[key] = t.clone()
    return memo


_MAPPINGS = frozenset((OrderedDict, dict))
_EMPTIED = _MAPPINGS | {list, set}


def kept_aside(module: nn.Module) -> str:
    """The name of a mapping in which ``module`` keeps tensors, such as a cache; empty where there is none."""
    held = [(name, v) for name, v in vars(module).items() if type(v) in _MAPPINGS and v and name not in _REGISTRIES]
    return next((name for name, v in held if any(isinstance(t, Tensor) for t in v.values())), "")


def _inside(value: Any, depth: int = 3) -> list[Any]:
    """``value``, and what the containers and plain objects in it hold; a plain object is given by its ``__dict__``."""
    found, seen, stack = list[Any](), set[int](), [(value, depth)]
    while stack:
        one, left = stack.pop()
        one = object.__getattribute__(one, "__dict__") if _is_plain_class(type(one)) else one
        if id(one) in seen:
            continue
        seen.add(id(one))
        found.append(one)
        if left and isinstance(one, _CONTAINERS):
            held = one.values() if isinstance(one, dict) else one
            stack += [(v, left - 1) for v in held if type(v) not in CONSTANTS]
    return found


_CONTAINERS = (dict, list, tuple, set, deque)
_HOLDING = (*_CONTAINERS, Tensor)


@functools.cache
def _is_plain_class(kind: type) -> bool:
    """Whether objects of a class are nothing but what their ``__dict__`` holds: those of a user or of a library."""
    if issubclass(kind, (*_HOLDING, *_STATES, nn.Module, type)) or not kind.__dictoffset__:
        return False
    return kind is types.SimpleNamespace or kind.__module__.partition(".")[0] not in _WITHOUT_STATE


_WITHOUT_STATE = {*sys.stdlib_module_names, "torch", "numpy"} - {"__main__"}
_STATES: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    np.ndarray: (np.copy, lambda a, content: a.__setitem__(..., content)),
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    np.random.Generator: (lambda g: g.bit_generator.state, lambda g, s: setattr(g.bit_generator, "state", s)),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    random.Random: (random.Random.getstate, random.Random.setstate),
}
"""How the content of objects without a ``__dict__`` is read and put back."""
_WITH_STATES = tuple(_STATES)
_WITHOUT_STATES = _EMPTIED | {Tensor, nn.Parameter}


def _states(held: list[Any]) -> list[tuple[Any, type, Any]]:
    """What is in ``held`` that has such a content, how it is read, and what it is."""
    found: list[tuple[Any, type, Any]] = []
    for value in held:
        if isinstance(value, _WITH_STATES):
            kind = next(k for k in _STATES if isinstance(value, k))
            with suppress(Exception):  # an object that cannot be copied may raise anything
                found.append((value, kind, _STATES[kind][0](value)))
    return found


def _has_content(value: Any, kind: type, content: Any) -> bool:
    return _alike(_STATES[kind][0](value), content)


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return same_values(a, b)
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return all(_alike(v, b[k]) for k, v in a.items())
    return all(map(_alike, a, b)) if isinstance(a, tuple) else a == b


def _uncopyable(model: nn.Module) -> list[tuple[str, Any]]:
    """The attributes of all modules that cannot be copied, by name.

    Raises:
        InputError: one is a parameter or buffer.
    """
    found: list[tuple[str, Any]] = []
    known = _begun(model) | {id(m): m for m in model.modules()}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            named = value.items() if key in _REGISTRIES else [(key, value)]
            for name, held in named:
                where = f"{path}.{name}".strip(".")
                found += [(where, v) for v in _failing(held, known)]
                if key != "_modules" and isinstance(held, Tensor) and found and found[-1][1] is held:
                    way_out = "run the model once first" if nn.parameter.is_lazy(held) else "take it out first"
                    raise InputError(f"{where!r} cannot be copied: it is a {type(held).__name__}; {way_out}")
    return found


def _failing(value: Any, known: Memo) -> list[Any]:
    try:
        copy.deepcopy(value, dict(known))
    except Exception:  # whatever it raises
        if isinstance(value, dict | list | tuple):
            inner = [v for x in (value.values() if isinstance(value, dict) else value) for v in _failing(x, known)]
            return inner or [value]
        return [value]
    return []


def _moved(value: Any, memo: Memo) -> Any:
    """``value``, or a function that refers to copies where it refers to originals."""
    match value:
        case types.FunctionType() if value.__closure__ or value.__defaults__ or value.__kwdefaults__:
            return _function(value, memo)
        case types.MethodType():
            owner, function = memo.get(id(value.__self__), value.__self__), _moved(value.__func__, memo)
            same = owner is value.__self__ and function is value.__func__
            return value if same else types.MethodType(function, owner)
        case partial():
            function, *args = (_reference(v, memo) for v in (value.func, *value.args))
            given = {k: _reference(v, memo) for k, v in value.keywords.items()}
            same = function is value.func and all(map(lambda a, b: a is b, args, value.args))
            same = same and all(given[k] is v for k, v in value.keywords.items())
            return value if same else partial(function, *args, **given)
        case dict():
            for key, inner in list(value.items()):
                if (moved := _moved(inner, memo)) is not inner:
                    value[key] = moved
        case list():
            value[:] = [_moved(inner, memo) for inner in value]
        case _:
            pass
    return value


def _reference(value: Any, memo: Memo) -> Any:
    return memo[id(value)] if id(value) in memo else _moved(value, memo) if callable(value) else value


def _function(function: types.FunctionType, memo: Memo) -> Any:
    """``function`` over cells and defaults that hold copies; itself where all of them stay as they are."""
    if id(function) in memo:
        return memo[id(function)]
    memo[id(function)] = function  # where it refers to itself
    defaults = tuple(_reference(v, memo) for v in function.__defaults__ or ())
    named = {k: _reference(v, memo) for k, v in (function.__kwdefaults__ or {}).items()}
    given = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    same = all(map(operator.is_, (*defaults, *named.values()), given))
    cells: list[Any] = []
    for cell in function.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # it is empty
            cells.append(cell)
            continue
        moved = _reference(held, memo)
        cells.append(cell if moved is held else types.CellType(moved))
    if same and all(map(operator.is_, cells, function.__closure__ or ())):
        return function
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, defaults or None, tuple(cells) or None
    )
    made.__kwdefaults__, made.__qualname__ = named or None, function.__qualname__
    vars(made).update(vars(function))
    memo[id(function)] = made
    return made


class State:
    """All that a module holds, as it is now: to tell what forward changes, and to put it back.

    Args:
        model: the module.
        backup: a copy of it, which has the values of its parameters; without one they are not looked at.
        only: the parts that are looked at, by path, where the others do not change.

    Attributes:
        has_written_parameters: whether a parameter had another value when it was put back.
    """

    def __init__(
        self, model: nn.Module, backup: nn.Module | None = None, only: dict[str, nn.Module] | None = None
    ) -> None:
        copies = {} if backup is None else submodules(backup)
        objects: dict[int, list[Any]] = {}
        parts = submodules(model) if only is None else only
        self._snapshots = {path: _Snapshot(m, copies.get(path), objects) for path, m in parts.items()}
        self._whole = _Whole([*self._snapshots.values()])
        self.has_written_parameters = False

    def restore(self) -> list[str]:
        """Put everything back; the paths of all modules that held something else."""
        changed = self.changed()
        for path in changed:
            self.has_written_parameters |= self._snapshots[path].restore()
        return changed

    def changed(self) -> list[str]:
        """The paths of all modules that hold something else than before."""
        if self._whole.is_same():  # most often
            return []
        return [path for path, snapshot in self._snapshots.items() if snapshot.is_changed()]

    def first_change(self) -> str:
        """The first attribute that holds something else than before, by its path."""
        return next((f"{path}.{self._snapshots[path].first_change()}".strip(".") for path in self.changed()), "")


class _Whole:
    """All snapshots of a module, compared at once. It may say that something has changed where nothing has."""

    def __init__(self, snapshots: list[_Snapshot]) -> None:
        contents = [both for s in snapshots for both in s.contents]
        self._modules, self._dicts = [s.module for s in snapshots], [v for v, _ in contents if isinstance(v, dict)]
        self._others = [both for both in contents if not isinstance(both[0], dict)]
        before = [s.attributes for s in snapshots] + [content for v, content in contents if isinstance(v, dict)]
        self._lengths = [*map(len, before)]
        self._keys, self._values = [*chain.from_iterable(before)], [*chain.from_iterable(d.values() for d in before)]
        self._empty = [value for s in snapshots for value in s.empty]
        self._states = [state for s in snapshots for state in s.states]
        tensors = [both for s in snapshots for both in s.tensors]
        plain = [both for both in tensors if all(map(_is_small, both))]
        self._packs = [_Pack([both for both in plain if both[0].dtype == kind]) for kind in {t.dtype for t, _ in plain}]
        known = {id(t) for t, _ in plain}
        self._tensors = [both for both in tensors if id(both[0]) not in known]

    def is_same(self) -> bool:
        dicts = [*map(vars, self._modules), *self._dicts]
        return (
            [*map(len, dicts)] == self._lengths
            and all(map(operator.is_, chain.from_iterable(dicts), self._keys))
            and all(map(operator.is_, chain.from_iterable(d.values() for d in dicts), self._values))
            and not any(self._empty)
            and all(starmap(_same_items, self._others))
            and all(pack.is_same() for pack in self._packs)
            and all(starmap(same_values, self._tensors))
            and all(starmap(_has_content, self._states))
        )


def _is_small(t: Tensor) -> bool:
    is_dense = type(t) is Tensor and t.layout is torch.strided and t.device.type == "cpu" and not t.is_quantized
    return is_dense and t.numel() <= 1 << 12


class _Pack:
    """Small tensors of one dtype, compared as one: to ask about each takes longer than to read it."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self._tensors, before = [t for t, _ in pairs], [value for _, value in pairs]
        self._shapes, self._before = [t.shape for t in before], _in_a_row(before)

    def is_same(self) -> bool:
        kind, now = self._before.dtype, self._tensors
        same = [t.shape for t in now] == self._shapes and all(_is_small(t) and t.dtype == kind for t in now)
        return same and torch.equal(_in_a_row(now), self._before)


def _in_a_row(tensors: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([t.reshape(-1) for t in tensors])


class _Snapshot:
    """What one module holds, its submodules left out."""

    __slots__ = ("attributes", "contents", "empty", "module", "states", "tensors")

    def __init__(self, module: nn.Module, copy: nn.Module | None, objects: dict[int, list[Any]]) -> None:
        self.module, self.attributes = module, dict(vars(module))
        again = _computed_again(module)
        held: list[Any] = []
        self.empty: list[Any] = []
        for name, value in self.attributes.items():
            kind = type(value)
            if kind in CONSTANTS:  # as most are
                continue
            if kind in _EMPTIED and not value:  # as most others are
                self.empty.append(value)
            elif is_constant(value):
                continue
            elif name in _REGISTRIES:
                held += (value, *(value.values() if name != "_modules" else ()))
            elif isinstance(value, _HOLDING) and name not in again:
                held += _inside(value)
            elif isinstance(value, _WITH_STATES):
                held.append(value)
            elif _is_plain_class(type(value)):
                if id(value) not in objects:  # modules often share one, such as a configuration
                    objects[id(value)] = _inside(value)
                held += objects[id(value)]
        self.states = _states([v for v in held if type(v) not in _WITHOUT_STATES])
        self.contents = [(v, _shallow(v)) for v in held if isinstance(v, dict | list | set | deque)]
        names = {id(p): name for name, p in module._parameters.items()}
        self.tensors: list[tuple[Tensor, Any]] = []
        for t in {id(v): v for v in held if isinstance(v, Tensor)}.values():
            if id(t) not in names:
                self.tensors.append((t, _values(t)))
            elif copy is not None:
                self.tensors.append((t, copy._parameters[names[id(t)]]))

    def is_changed(self) -> bool:
        before, now = self.attributes, vars(self.module)
        if before.keys() != now.keys() or any(self.empty):
            return True
        if not all(map(operator.is_, before.values(), now.values())):
            again = _computed_again(self.module)
            if any(now[k] is not v and k not in again for k, v in before.items()):
                return True
        return not (
            all(starmap(_same_items, self.contents))
            and all(starmap(same_values, self.tensors))
            and all(starmap(_has_content, self.states))
        )

    def first_change(self) -> str:
        moved = {id(t) for t, value in self.tensors if not same_values(t, value)}
        moved |= {id(c) for c, content in self.contents if not _same_items(c, content)}
        moved |= {id(state[0]) for state in self.states if not _has_content(*state)}
        held = {**self.module._parameters, **self.module._buffers, **vars(self.module)}
        for name, value in held.items():
            if name in vars(self.module) and self.attributes.get(name) is not value:
                return name
            if name not in _REGISTRIES and any(id(v) in moved for v in _inside(value)):
                return name
        return ""

    def restore(self) -> bool:
        """Put everything back; whether that was a parameter, too."""
        vars(self.module).clear()
        vars(self.module).update(self.attributes)
        for container in self.empty:
            container.clear()
        for container, content in self.contents:
            if not _same_items(container, content):
                container.clear()
                container.extend(content) if isinstance(container, list | deque) else container.update(content)
        for value, kind, content in self.states:
            if not _has_content(value, kind, content):
                _STATES[kind][1](value, content)
        moved = [(t, value) for t, value in self.tensors if not same_values(t, value)]
        for tensor, value in moved:
            _put_back(tensor, value)
        return any(isinstance(t, nn.Parameter) for t, _ in moved)


def _computed_again(module: nn.Module) -> set[str]:
    """The tensors that hooks of torch's own (weight_norm, spectral_norm, pruning) compute before each call."""
    if not module._forward_pre_hooks:
        return set()
    hooks = [h for h in module._forward_pre_hooks.values() if type(h).__module__.startswith("torch.nn.utils")]
    return {str(getattr(h, "name", getattr(h, "_tensor_name", ""))) for h in hooks}


def _put_back(tensor: Tensor, value: Tensor) -> None:
    if tensor.shape == value.shape and tensor.dtype == value.dtype:
        tensor.detach().copy_(value.detach())
    else:
        tensor.data = value.detach().clone()


def _values(t: Tensor) -> Tensor:
    try:
        return t.detach().clone()
    except Exception:  # a subclass that does not say how
        return t


def _shallow(value: dict[Any, Any] | list[Any] | set[Any] | deque[Any]) -> Any:
    return dict(value) if isinstance(value, dict) else set(value) if isinstance(value, set) else list(value)


def _same_items(a: Any, b: Any) -> bool:
    if not a and not b:
        return True
    if isinstance(a, set):
        return a == b
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[k] is v for k, v in b.items())
    return len(a) == len(b) and all(map(lambda x, y: x is y, a, b))


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN included; true where they cannot say."""
    try:
        if a is b or torch.equal(a, b):  # which refuses other types and devices
            return True
    except Exception:
        pass
    try:
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return False
        return a.is_meta or bool(((a == b) | ((a != a) & (b != b))).all())
    except Exception:  # a subclass that has no comparison
        return True
