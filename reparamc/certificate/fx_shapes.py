"""The shapes of the nodes of a traced module, told from runs of several sizes."""

from __future__ import annotations

import builtins
import dis
import logging
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import prod
from types import FunctionType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from reparamc.certificate.axes import Dim
from reparamc.certificate.fx_calls import attribute

Change = Callable[[int, int], int]
"""The size that an axis gets instead of that of the example."""


def _small(axis: int, n: int) -> int:
    """One that leaves the same remainder, another for each axis: a run costs less then, and no axis is another."""
    return (n if n < 96 else 64 + n % 32) + 32 * (axis - 1)


_SIZES: tuple[Change, ...] = (
    lambda axis, n: _small(axis, n) + (-1) ** axis,
    _small,
    lambda axis, n: n + 32 * (axis - 1),
    lambda axis, n: n + 32,
    lambda axis, n: n,
)


def shapes_of(
    module: fx.GraphModule, args: Sequence[Any], first: dict[str, tuple[int, ...]] | None = None
) -> dict[str, tuple[Dim, ...]]:
    """The shapes of all nodes of a traced module, from runs on ``args`` and on others of other sizes.

    An size that is the same in all is known, what varies is a symbol: one for all that vary alike, or as a multiple
    of a batch. So there are sizes below and above powers of two, at which strides with and without padding differ at
    each level, and, of several arguments, some with one element along their axes, which would be repeated. All are
    known if no other size is taken.
    ``first`` is what `sizes_of` found on ``args``, where that was asked before.
    """
    try:
        runs = [sizes_of(module, args) if first is None else first]
    except Exception:  # the operators alone tell ranks then
        return {}

    def attempt(channels: str, change: Change, batch: int, single: int | None = None, along: str = "") -> bool:
        shapes = [_resized(a, change, batch, channels) for a in args]
        if single is not None and (shape := shapes[single]) is not None:
            whole = {_channel_axis(args[single], channels)} | ({0} if along == "positions" else {*range(1, len(shape))})
            shapes[single] = [n if i in whole else min(n, 1) for i, n in enumerate(shape)]
        try:
            found = sizes_of(module, args, shapes)
        except Exception:  # whatever a module raises that does not know a size
            return False
        if found.keys() != runs[0].keys() or any(len(found[n]) != len(runs[0][n]) for n in found):
            return False
        runs.append(found)
        return True

    tensors = {i: a for i, a in enumerate(args) if isinstance(a, Tensor) and a.ndim > 1}
    distinct = {tuple(_channel_axis(a, channels) for a in tensors.values()): channels for channels in _CHANNELS}
    ways = [*product(distinct.values(), _SIZES[:-1]), (_CHANNELS[0], _SIZES[-1])]
    way = next((way for way in ways if attempt(*way, 1)), None)
    if way is not None:
        channels, change = way
        if change is _SIZES[0]:
            attempt(channels, lambda axis, n: _small(axis, n) - (-1) ** axis, 0)
        for i in tensors if len(tensors) > 1 else ():
            attempt(channels, change, 1, i, "positions")
            attempt(channels, change, 1, i, "batch")
    batches = {name for n in module.graph.find_nodes(op="placeholder") if runs[0].get(name := n.name)}

    def alike() -> dict[str, list[tuple[int, ...]]]:
        return {name: list(zip(*(run[name] for run in runs), strict=True)) for name in runs[0]}

    def multiples(varying: dict[str, list[tuple[int, ...]]]) -> dict[tuple[int, ...], tuple[int, tuple[int, ...]]]:
        """What varies as some images for each one of the batch: how many, and how that varies."""
        firsts = {ns for name in batches if len(set(ns := varying[name][0])) > 1}
        others = {ns for shape in varying.values() for ns in shape}
        found = ((ns, ns[0] // one[0], one) for ns in others for one in firsts if one[0])
        return {ns: (k, one) for ns, k, one in found if k > 1 and ns == tuple(k * n for n in one)}

    varying, repeated = alike(), dict[tuple[int, ...], tuple[int, tuple[int, ...]]]()
    # The side of an image may be such by chance: so once more, with the batch alone another one.
    if way is not None and multiples(varying) and attempt(*way, 3):
        repeated = multiples(varying := alike())
    # Rows of an image, one after the other: a reshape has to know what they are made of.
    areas = {
        tuple(h * w for h, w in zip(*shape[2:], strict=True)): (shape[2], shape[3])
        for shape in varying.values()
        if len(shape) == 4 and not any(len(set(ns)) == 1 for ns in shape[2:])
    }

    @cache
    def dim(ns: tuple[int, ...]) -> Dim:
        if ns in areas:
            return dim(areas[ns][0]).times(dim(areas[ns][1]))
        times, one = repeated.get(ns, (1, ns))
        return Dim(times).times(_dim(one))

    return {name: tuple(dim(ns) for ns in shape) for name, shape in varying.items()}


def _dim(sizes: tuple[int, ...]) -> Dim:
    """An size that has these sizes in several runs."""
    return Dim(sizes[0]) if len(set(sizes)) == 1 else Dim(1, ("|".join(map(str, sizes)),))


_CHANNELS = ("last of three", "second", "last", "first")
"""Where the channels of arguments may be: of tokens, of images, of images that end with them, of one image alone."""


def _channel_axis(value: Tensor, channels: str) -> int:
    if channels == "first":
        return 0
    is_last = channels == "last" or (channels == "last of three" and value.ndim == 3)
    return value.ndim - 1 if is_last else 1


def _resized(value: Any, change: Change, batch: int, channels: str) -> list[int] | None:
    """Another shape for ``value``, which keeps its channels; None where it is to be left as it is."""
    if not isinstance(value, Tensor) or value.ndim < 2:
        return None
    kept = _channel_axis(value, channels)
    shape = [n if i == kept else change(i if kept == 1 else i + 1, n) for i, n in enumerate(value.shape)]
    if value.ndim > 4:  # what a volume grows by is multiplied once more: half as much is enough
        shape = [n + (m - n) // 2 for n, m in zip(value.shape, shape, strict=True)]
    if kept:
        shape[0] = value.shape[0] + batch
    return shape


MOST_ELEMENTS = 1 << 15
"""Where an argument has more elements, tensors have shapes alone, and little is computed."""
MOST_COMPUTED = 1 << 18, 1 << 21
"""Elements of operands up to which one call is; and up to which before anything imports what fake tensors need."""


def sizes_of(
    module: fx.GraphModule, args: Sequence[Any], shapes: Sequence[list[int] | None] | None = None
) -> dict[str, tuple[int, ...]]:
    """The sizes of all nodes of a traced module that are tensors, in a run on ``args``, or on others of ``shapes``."""
    pairs = list(zip(args, [None] * len(args) if shapes is None else shapes, strict=True))
    is_large = any(prod(a.shape if s is None else s) > MOST_ELEMENTS for a, s in pairs if isinstance(a, Tensor))
    if is_large and _is_of_torch(module):
        try:
            with _silence():
                return _recorded(module, [_Sized.like(a, s) if isinstance(a, Tensor) else a for a, s in pairs])
        except Exception:  # it asks for values
            pass
    return _recorded(module, [a.clone() if isinstance(a, Tensor) and s is None else _like(a, s) for a, s in pairs])


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing logged by torch of sizes that a module does not take."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _recorded(module: fx.GraphModule, args: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return run_recorded(module, args)[1]


def run_recorded(module: fx.GraphModule, args: Sequence[Any]) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """What ``module`` makes of ``args``, and the sizes of all nodes that are tensors."""
    reads = {node: node.all_input_nodes for node in module.graph.nodes}
    last = {read: node for node, given in reads.items() for read in given}
    given = iter(module.graph.process_inputs(*args))
    env: dict[fx.Node, Any] = {}
    found: dict[str, tuple[int, ...]] = {}
    result: Any = None
    fake = cache(lambda: FakeTensorMode(allow_non_fake_inputs=True))  # it takes a while to make one
    for node, inputs in reads.items():
        if node.op == "placeholder":
            value = [*given] if str(node.target).startswith("*") else next(given, *node.args)
        elif node.op == "get_attr":
            value = attribute(module, str(node.target))
        elif node.op == "output":
            result = value = map_arg(node.args[0], env.__getitem__)
        else:
            value = _result(module, node, inputs, env, fake)
        env[node] = value
        if isinstance(value, Tensor | _Sized):
            found[node.name] = tuple(value.shape)
        for read in inputs:
            if last[read] is node:
                del env[read]
    return as_written(module.graph.process_outputs(result)), found


def _result(
    module: fx.GraphModule,
    node: fx.Node,
    inputs: list[fx.Node],
    env: dict[fx.Node, Any],
    fake: Callable[[], FakeTensorMode],
) -> Any:
    """What a call makes of its ``inputs`` in ``env``; ``fake`` gives a mode in which tensors have no values."""
    called = attribute(module, str(node.target)) if node.op == "call_module" else node.target
    sized = [n for n in inputs if _is_sized(env[n])]
    args, kwargs = cast("tuple[Any, dict[str, Any]]", map_arg((node.args, node.kwargs), env.__getitem__))
    if not sized:
        return _called(called, args, kwargs)
    if (told := _computed(called, args, kwargs)) is not None:
        return told
    held = [env[n] for n in sized]
    is_fake = _is_much(sum(prod(t.shape) for t in pytree.tree_leaves(held) if isinstance(t, _Sized)))
    with fake() if is_fake else nullcontext():
        made = [_each(_Sized, lambda t: t.made(not is_fake), one) for one in held]
        env.update(zip(sized, made, strict=True))
        args, kwargs = cast("tuple[Any, dict[str, Any]]", map_arg((node.args, node.kwargs), env.__getitem__))
        value = _called(called, args, kwargs)
    made = [_each(Tensor, _Sized.like, one) for one in made]  # they may have another shape now
    env.update(zip(sized, made, strict=True))
    return _each(Tensor, _Sized.like, value)


def _each(kind: type, change: Callable[[Any], Any], value: Any) -> Any:
    """As `pytree.tree_map_only`, which takes long for what is no tree."""
    return change(value) if isinstance(value, kind) else pytree.tree_map_only(kind, change, value)


def _is_sized(value: Any) -> bool:
    return isinstance(value, _Sized) or (type(value) in (list, tuple) and any(isinstance(v, _Sized) for v in value))


def _called(called: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return getattr(args[0], called)(*args[1:], **kwargs) if isinstance(called, str) else called(*args, **kwargs)


def _is_much(elements: int) -> bool:
    """Whether it takes longer to compute with so many than with tensors that have no values."""
    is_imported = "torch.fx.experimental.symbolic_shapes" in sys.modules  # which takes seconds
    return elements > MOST_COMPUTED[not is_imported]


def as_written(result: Any) -> Any:
    """A result with lists and dicts of their own class, which torch.fx replaces in a graph."""
    if isinstance(result, immutable_dict):
        return {key: as_written(value) for key, value in result.items()}
    if isinstance(result, immutable_list):
        return [*map(as_written, result)]
    if type(result) is tuple:
        return tuple(map(as_written, cast("tuple[Any, ...]", result)))
    return type(result)(*map(as_written, result)) if hasattr(result, "_fields") else result


def _is_of_torch(module: fx.GraphModule) -> bool:
    """Whether nothing is called but what torch defines, or keeps nothing: a tensor without values might be kept."""
    values = [attribute(module, str(n.target)) for n in module.graph.nodes if n.op in ("call_module", "get_attr")]
    called = [value for value in values if isinstance(value, nn.Module)]
    hooked = any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in called)
    functions = (n.target for n in module.graph.nodes if n.op == "call_function")
    return not hooked and all(_home(type(m)) in _HOMES for m in called) and all(map(_keeps_nothing, functions))


_HOMES = ("torch", "torchvision", "_operator", "builtins", "collections", "math")
_WRITING = {
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "put", "remove", "send",
    "setdefault", "update", "write",
    "setattr", "delattr", "vars", "locals", "globals", "eval", "exec", "__import__", "__dict__", "__setattr__", "open",
}  # fmt: skip
"""Names of what writes into something that may stay."""


def _home(value: Any) -> str:
    return str(getattr(value, "__module__", "torch") or "torch").partition(".")[0]


@cache
def _keeps_nothing(function: Any, depth: int = 3) -> bool:
    """Whether a function is torch's own, or one that sets local variables alone, and calls nothing but such."""
    if _home(function) in _HOMES or not (isinstance(function, FunctionType) and depth):
        return _home(function) in _HOMES
    if function.__closure__ or hasattr(function, "__wrapped__") or not _WRITING.isdisjoint(function.__code__.co_names):
        return False
    known = vars(builtins) | function.__globals__
    for step in dis.get_instructions(function.__code__):
        kind, _, where = step.opname.partition("_")
        if kind in ("STORE", "DELETE", "IMPORT", "MAKE") and where != "FAST":
            return False
        if step.opname == "LOAD_GLOBAL" and not _is_pure(known.get(step.argval), depth - 1):
            return False
    return True


def _is_pure(value: Any, depth: int) -> bool:
    """Whether a global that a function reads is a module of torch, a constant, or a function that keeps nothing."""
    if isinstance(value, ModuleType):
        return value.__name__.partition(".")[0] in _HOMES
    return value is None or isinstance(value, int | float | str) or (callable(value) and _keeps_nothing(value, depth))


def _like(value: Any, shape: list[int] | None) -> Any:
    if shape is None:
        return value
    return torch.randn(shape).to(value) if value.is_floating_point() else value.new_ones(shape)


@dataclass(frozen=True)
class _Sized:
    """What is known of a tensor that has no values; a fake one is made of it where torch has to tell the sizes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def like(cls, value: Tensor, shape: Sequence[int] | None = None) -> _Sized:
        return cls(tuple(value.shape if shape is None else shape), value.dtype, value.device)

    def made(self, with_values: bool) -> Tensor:
        empty = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return _like(empty, [*self.shape]) if with_values else empty


_KEEPING = (
    *(nn.modules.batchnorm._BatchNorm, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid),
    *(nn.LeakyReLU, nn.Mish, nn.Tanh, nn.ELU, nn.Dropout, nn.LayerNorm, nn.Identity),
)
_KEEPING_CALLS = (F.batch_norm, F.relu, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.sigmoid, F.leaky_relu)
_KEEPING_CALLS += (torch.sigmoid, "sigmoid", torch.relu, "relu", "contiguous")
"""Modules, functions and methods whose results have the sizes of their operands: these need not run."""


_ARITHMETIC = (operator.add, operator.mul, operator.sub, operator.truediv, torch.add, torch.mul)
_IN_PLACE = (operator.iadd, operator.imul)


def _computed(called: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result, where it follows from the sizes of ``args``; None where ``called`` has to run."""
    if called in (*_ARITHMETIC, *_IN_PLACE) and len(args) == 2 and not kwargs:
        return _broadcast(*args, in_place=called in _IN_PLACE)
    if called is torch.cat:
        return _joined(*args, **kwargs)
    x = args[0] if args else None
    if not isinstance(x, _Sized):
        return None
    if isinstance(called, nn.Module):
        return _of_module(called, x)
    if called is torch.flatten or called == "flatten":
        return _flattened(x, *args[1:], **kwargs)
    if called is getattr and args[1] in ("shape", "ndim", "dtype", "device"):
        return torch.Size(x.shape) if args[1] == "shape" else len(x.shape) if args[1] == "ndim" else getattr(x, args[1])
    return x if called in _KEEPING_CALLS else None


def _broadcast(a: Any, b: Any, in_place: bool) -> _Sized | None:
    sized = [t for t in (a, b) if isinstance(t, _Sized | Tensor)]
    x = sized[0]
    plain = all(isinstance(t, _Sized | Tensor | int | float) for t in (a, b)) and x.dtype.is_floating_point
    if not plain or len({(t.dtype, t.device) for t in sized}) > 1:
        return None
    shape = tuple(torch.broadcast_shapes(*(t.shape for t in sized)))
    return None if in_place and shape != a.shape else _Sized(shape, x.dtype, x.device)


def _joined(tensors: Sequence[Any], dim: int = 0) -> _Sized | None:
    x = tensors[0]
    if not all(isinstance(t, _Sized) and (t.dtype, t.device) == (x.dtype, x.device) for t in tensors):
        return None
    axis = dim % len(x.shape)
    apart = {(*t.shape[:axis], *t.shape[axis + 1 :]) for t in tensors}
    size = sum(t.shape[axis] for t in tensors)
    return replace(x, shape=(*x.shape[:axis], size, *x.shape[axis + 1 :])) if len(apart) == 1 else None


def _flattened(x: _Sized, start_dim: int = 0, end_dim: int = -1) -> _Sized | None:
    start, end = start_dim % len(x.shape), end_dim % len(x.shape)
    return replace(x, shape=(*x.shape[:start], prod(x.shape[start : end + 1]), *x.shape[end + 1 :]))


def _of_module(module: Any, x: _Sized) -> _Sized | None:
    kind = type(module)
    if kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return _convolved(module, x)
    if kind is nn.Linear and (x.shape[-1], x.dtype) == (module.in_features, module.weight.dtype):
        return replace(x, shape=(*x.shape[:-1], module.out_features))
    if kind is nn.Flatten:
        return _flattened(x, module.start_dim, module.end_dim)
    if kind is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1)) and len(x.shape) in (3, 4):
        return replace(x, shape=(*x.shape[:-2], 1, 1))
    return x if isinstance(module, _KEEPING) else None


def _convolved(conv: Any, x: _Sized) -> _Sized | None:
    known = conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and len(x.shape) == conv.weight.ndim
    if not known or x.shape[1] != conv.in_channels or x.dtype != conv.weight.dtype:
        return None
    windows: Any = zip(x.shape[2:], conv.padding, conv.kernel_size, conv.dilation, conv.stride, strict=True)
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, k, d, s in windows]
    return replace(x, shape=(x.shape[0], conv.out_channels, *sizes)) if min(sizes) > 0 else None
