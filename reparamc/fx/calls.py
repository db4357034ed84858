"""One form for the many ways to call an operator: modules, functions, methods and ATen overloads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.graph_module import _copy_attr
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from reparamc.algebra.recorded import tape
from reparamc.fx.gathering import applies_weight
from reparamc.fx.operators import ATEN, FUNCTIONS, METHODS, MODULES, OPERATORS, Operator


@dataclass(frozen=True)
class Held:
    """A tensor that a called module holds, and its name."""

    tensor: Tensor
    name: str


@dataclass(frozen=True)
class Call:
    """An operator and its arguments by name: nodes, numbers, and `Held` tensors.

    Attributes:
        op: the name of an `Operator`.
        axes: spatial axes, where the name of the operator tells them (2 for conv2d).
        plain: whether nothing but torch's own forward runs: no hooks, no forward on the instance.
    """

    op: str
    args: Mapping[str, Any]
    axes: int | None = None
    plain: bool = True

    def get(self, name: str, default: Any = None) -> Any:
        value = self.args.get(name)
        return default if value is None else value

    @property
    def input(self) -> fx.Node | None:
        x = self.args.get("input")
        return x if isinstance(x, fx.Node) else None


_OTHER_NAMES = {
    "self": "input", "axis": "dim", "size": "shape", "split_size_or_sections": "split_size", "train": "training",
    "split_sizes": "split_size", "mat1": "input", "mat2": "other", "obj": "input", "upscale_factor": "groups",
    "downscale_factor": "groups",
    "indices_or_sections": "chunks", "dim_": "dim", "epsilon": "eps",
}  # fmt: skip


def lookup(module: nn.Module, target: str) -> Any:
    """The attribute that a dotted ``target`` names."""
    found: Any = module
    for part in target.split("."):
        try:
            inner = found._modules.get(part)  # torch takes longer
        except AttributeError:  # it is no module
            inner = None
        found = getattr(found, part) if inner is None else inner
    return found


def put(home: nn.Module, source: nn.Module, paths: Iterable[str]) -> None:
    """Put what ``source`` has at ``paths`` there in ``home``, as torch.fx does, which takes longer."""
    homes = {"": home}
    for path in dict.fromkeys(paths):
        around, _, name = path.rpartition(".")
        value = lookup(source, path)
        if around in homes and isinstance(value, nn.Module | Tensor):
            kind = "_modules" if isinstance(value, nn.Module) else "_buffers"
            getattr(homes[around], "_parameters" if isinstance(value, nn.Parameter) else kind)[name] = value
        else:
            _copy_attr(source, home, path)
            if around and (inner := lookup(home, around)) is not lookup(source, around):
                homes[around] = inner


GraphT = TypeVar("GraphT", bound=fx.GraphModule)


def over(kind: type[GraphT], root: nn.Module, graph: fx.Graph, name: str) -> GraphT:
    """``graph`` as a module of ``kind``, over what it calls and reads of ``root``."""
    made = kind(nn.Module(), fx.Graph(), name)
    made.training = root.training
    put(made, root, (str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")))
    made.graph = graph
    return made


def with_operands(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """``nodes``, and all that they are computed from."""
    seen = set(nodes)
    stack = list(seen)
    while stack:
        fresh = [n for n in stack.pop().all_input_nodes if n not in seen]
        seen.update(fresh)
        stack += fresh
    return seen


def is_plain(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch's own, or applies its weight as one, and runs nothing but its own forward."""
    hooked = bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)
    hooked = hooked or not all(isinstance(h, tuple(_COMPUTING)) for h in module._forward_pre_hooks.values())
    kind = class_of(module)
    is_own = kind.__module__.startswith("torch.nn.modules") or applies_weight(kind)
    return is_own and not hooked and "forward" not in vars(module)


def by_position(module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any] | None:
    """The arguments of ``module`` by position; None where some can be given by name alone."""
    found, named = [*args], dict(kwargs)
    for node in module.graph.find_nodes(op="placeholder")[len(args) :] if named else ():
        if node.target not in named and not node.args:
            break
        found.append(named.pop(node.target, *node.args))
    return None if named else found


def is_exported(model: nn.Module) -> TypeGuard[fx.GraphModule]:
    """Whether ``model`` is the module of an exported program: its graph has a mode, its flags say nothing of that."""
    return isinstance(model, fx.GraphModule) and "eval" in vars(model)  # replaced by one that refuses


def is_constant(value: Any) -> bool:
    """Whether ``value`` is a number, a string or None, or a tuple of those."""
    return type(value) in CONSTANTS or (type(value) is tuple and CONSTANTS.issuperset(map(type, value)))


CONSTANTS = frozenset((bool, int, float, str, type(None)))


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of ``module``; where its parameters are computed from others, that of the module without."""
    computed = "parametrizations" in module._modules and nn.utils.parametrize.is_parametrized(module)
    return type(module).__mro__[1] if computed else type(module)


_COMPUTING: dict[type, Callable[[Any, nn.Module], Tensor]] = {
    WeightNorm: lambda hook, module: hook.compute_weight(module),
    SpectralNorm: lambda hook, module: hook.compute_weight(module, do_power_iteration=False),
    BasePruningMethod: lambda hook, module: hook.apply_mask(module),
}
"""Hooks that compute a parameter from others before a module runs."""


def _computed(module: nn.Module, name: str) -> tuple[Callable[[], Tensor], Iterable[Tensor]] | None:
    """How the parameter ``name`` of ``module`` is computed from others, and these; None where it is not."""
    if nn.utils.parametrize.is_parametrized(module, name):
        return lambda: getattr(module, name), cast("nn.ModuleDict", module.parametrizations)[name].parameters()
    for hook in module._forward_pre_hooks.values():
        for kind, compute in _COMPUTING.items():
            if isinstance(hook, kind) and getattr(hook, "name", getattr(hook, "_tensor_name", None)) == name:
                return partial(compute, hook, module), module.parameters(recurse=False)
    return None


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """The parameter ``name`` of ``module``, computed from others if need be; None where there is none.

    Raises:
        _NotFixed: two computations differ, or it is computed as in training.
    """
    found = _computed(module, name)
    if found is None:
        return getattr(module, name)
    compute, given = found
    with torch.no_grad():
        first, second = compute().detach().clone(), compute().detach()
    if module.training or not torch.equal(first, second):
        raise _NotFixed
    if (on := tape()) is not None:
        held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        on.follow(first, partial(_computed_from, _Computing(module, compute), tuple(held)), *held.values())
    return first.requires_grad_(any(p.requires_grad for p in given))


class _Computing(nn.Module):
    """A parameter of ``inner`` as a module, so that it can be computed from other tensors."""

    def __init__(self, inner: nn.Module, compute: Callable[[], Tensor]) -> None:
        super().__init__()
        self.inner, self.compute = inner, compute

    def forward(self) -> Tensor:
        return self.compute()


def _computed_from(module: _Computing, names: tuple[str, ...], *tensors: Tensor) -> Tensor:
    given = {f"inner.{name}": t for name, t in zip(names, tensors, strict=True)}
    return torch.func.functional_call(module, given, ())


def as_plain(module: nn.Module) -> nn.Module:
    """A copy of ``module``, a plain one, that holds the parameters which ``module`` computes from others."""
    computed = [name for name in ("weight", "bias") if hasattr(module, name) and _computed(module, name) is not None]
    made = copy.deepcopy(module)
    if not computed:
        return made
    found = {name: cast(Tensor, _parameter(module, name)).detach() for name in computed}
    made.__class__ = class_of(module)
    made._forward_pre_hooks.clear()
    for name in computed:
        made.__dict__.pop(name, None)
        made.register_parameter(name, nn.Parameter(found[name]))
    return made


class _NotFixed(Exception):
    """A parameter is another one in each call."""


def first_operand(node: fx.Node) -> fx.Node | None:
    """The first operand of a call, given by position or as ``input``."""
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    return first if isinstance(first, fx.Node) else None


def aten_name(target: Any) -> str:
    """The name of an ATen overload without its overload, such as "add_"; empty for anything else."""
    if isinstance(target, OpOverload) and target.namespace == "aten":
        return target._schema.name.removeprefix("aten::")
    return ""


def spelled(node: fx.Node, module: nn.Module) -> tuple[Operator, int | None] | None:
    """The operator that ``node`` calls, and its spatial axes where the spelling tells; None where it is not known."""
    if node.op == "call_module":
        return _of_class(class_of(lookup(module, str(node.target))))
    if node.op == "call_method":
        return METHODS.get(_pure(str(node.target)))
    if node.op != "call_function":
        return None
    return ATEN.get(_pure(name)) if (name := aten_name(node.target)) else FUNCTIONS.get(node.target)


@cache
def _of_class(kind: type[nn.Module]) -> tuple[Operator, int | None] | None:
    if applies_weight(kind):
        return OPERATORS["gathering"], None
    kinds = (k for k in kind.__mro__ if k is kind or (k in MODULES and not MODULES[k][0].parameters))
    return next((MODULES[k] for k in kinds if k in MODULES), None)


def _pure(name: str) -> str:
    """The name of an operator that writes in place, without the sign of that."""
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def allocates(node: fx.Node, module: nn.Module) -> bool:
    """Whether the result of an operator that writes nothing has memory of its own."""
    found = spelled(node, module)
    if found is None or isinstance(found[0].allocates, bool):
        return found is not None and bool(found[0].allocates)
    name = aten_name(node.target) or getattr(node.target, "__name__", str(node.target))
    return name in found[0].allocates


def operation(node: fx.Node, module: nn.Module) -> Call | None:
    """The operator that ``node`` calls, in its one form; None where nothing is known of its arguments."""
    found = spelled(node, module) if node.op.startswith("call_") else None
    if found is None or not found[0].arguments:
        return None
    if node.op == "call_module":
        try:
            return _module_call(node, lookup(module, str(node.target)), *found)
        except _NotFixed:
            return None
    if isinstance(node.target, OpOverload):
        return _aten_call(node, node.target, *found)
    return _bound(node, *found)


def _bound(node: fx.Node, called: Operator, axes: int | None) -> Call | None:
    given: Any = node.args
    if len(given) > 2 and called.spread:
        given = (given[0], given[1:])
    if len(given) > len(called.arguments):
        return None
    if called.name == "addmm" and set(node.kwargs) - {"alpha", "beta"}:
        return None
    renamed = {_renamed(key, called): value for key, value in node.kwargs.items()}
    return Call(called.name, dict(zip(called.arguments, given, strict=False)) | renamed, axes)


def with_arguments(node: fx.Node, op: str, named: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a called function, with some given others by name; those that are None are left out."""
    names = OPERATORS[op].arguments
    if isinstance(node.target, OpOverload):
        names = tuple(argument.name for argument in node.target._schema.arguments)
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs, **named}
    kwargs = {name: value for name, value in given.items() if value is not None or name in names[: len(node.args)]}
    return tuple(kwargs.pop(name) for name in names[: len(node.args)]), kwargs


def _renamed(key: str, called: Operator) -> str:
    return key if key in called.arguments else _OTHER_NAMES.get(key, key)


def _aten_call(node: fx.Node, target: OpOverload, called: Operator, axes: int | None) -> Call | None:
    name, op = _pure(aten_name(target)), called.name
    if (name, target._overloadname) in _STRANGE:
        return None
    schema = [argument.name for argument in target._schema.arguments]
    given = dict(zip(schema, node.args, strict=False)) | node.kwargs
    args = {_OTHER_NAMES.get(key, key): value for key, value in given.items()}
    if op == "addmm":  # its first operand is the bias
        args = {"bias": given["self"], "input": given["mat1"], "other": given["mat2"]} | {
            key: given[key] for key in ("alpha", "beta") if key in given
        }
    if name == "rsub":
        args["input"], args["other"] = args["other"], args["input"]
    if name == "constant_pad_nd":
        args["mode"] = "constant"
    if op == "convolution":
        transposed = args.pop("transposed", False)
        op = "conv_transpose" if transposed else "conv"
        if not transposed:
            args.pop("output_padding", None)
    return Call(op, _upsampled(name, args) if op == "interpolate" else args, axes)


def _upsampled(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ATen's ``name``, as `torch.nn.functional.interpolate` takes them."""
    kind = name.removeprefix("_").removeprefix("upsample_").replace("_exact", "-exact")
    scaled = any(
        value is not None for key, value in args.items() if key in ("scales", "scales_d", "scales_h", "scales_w")
    )
    return {
        "input": args["input"], "size": args.get("output_size"), "scale_factor": args.get("scale_factors"),
        "mode": kind.removesuffix("_aa")[:-2], "align_corners": args.get("align_corners"),
        "recompute_scale_factor": scaled or None, "antialias": kind.endswith("_aa"),
    }  # fmt: skip


_STRANGE = {("transpose", "Dimname"), ("flatten", "named_out_dim"), ("mean", "default"), ("squeeze", "default")}


def _module_call(node: fx.Node, module: nn.Module, called: Operator, axes: int | None) -> Call | None:
    x = first_operand(node)
    if x is None:
        return None
    args: dict[str, Any] = {"input": x}
    for key in called.parameters:
        tensor = _parameter(module, key)
        args[key] = None if tensor is None else Held(tensor, f"{node.target}.{key}")
    args |= {key: getattr(module, key) for key in called.attributes if hasattr(module, key)}
    return Call(called.name, args | called.derived(module), axes, is_plain(module))


def takes_all(slice_: Call) -> bool:
    """Whether a slice takes everything; its end is then the largest number, as torch.export writes it."""
    end = slice_.get("end", _END)
    return slice_.get("start", 0) == 0 and end == _END and slice_.get("step", 1) == 1


_END = 2**63 - 1


def integers(value: Any, n: int) -> tuple[int, ...] | None:
    """``value`` as one whole number per axis; None when it is computed at run time."""
    if isinstance(value, int):
        return (value,) * n
    if isinstance(value, tuple | list) and all(isinstance(v, int) for v in value):
        return tuple(cast("tuple[int, ...]", value)) * n if len(value) == 1 else tuple(value)
    return None
