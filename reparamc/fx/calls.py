"""One form for the many ways to call an operator: modules, functions, methods and ATen overloads."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.nn import functional as F
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


@dataclass(frozen=True)
class Held:
    """A tensor that a called module holds, and its name."""

    tensor: Tensor
    name: str


@dataclass(frozen=True)
class Call:
    """An operator and its arguments by name: nodes, numbers, and `Held` tensors.

    Attributes:
        op: one of the names in `ARGUMENTS`; for every rank of an operator the same.
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


ARGUMENTS: dict[str, tuple[str, ...]] = {
    "conv": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "convolution": (
        "input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups",
    ),
    "conv_transpose": ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    "linear": ("input", "weight", "bias"),
    "matmul": ("input", "other"),
    "addmm": ("bias", "input", "other"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "native_batch_norm": ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
    **dict.fromkeys(("add", "sub", "mul", "div"), ("input", "other")),
    "neg": ("input",),
    "identity": ("input",),
    "copy": ("input",),
    "dropout": ("input", "p", "training", "inplace"),
    "reshape": ("input", "shape"),
    "reshape_as": ("input", "other"),
    "permute": ("input", "dims"),
    "transpose": ("input", "dim0", "dim1"),
    "t": ("input",),
    "flatten": ("input", "start_dim", "end_dim"),
    "unflatten": ("input", "dim", "sizes"),
    "squeeze": ("input", "dim"),
    "unsqueeze": ("input", "dim"),
    "avg_pool": ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    "max_pool": ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    **dict.fromkeys(("adaptive_avg_pool", "adaptive_max_pool"), ("input", "output_size")),
    "interpolate": ("input", "size", "scale_factor"),
    "pad": ("input", "pad", "mode", "value"),
    "cat": ("tensors", "dim"),
    "split": ("input", "split_size", "dim"),
    "chunk": ("input", "chunks", "dim"),
    "getitem": ("input", "index"),
    "slice": ("input", "dim", "start", "end", "step"),
    "narrow": ("input", "dim", "start", "length"),
    "select": ("input", "dim", "index"),
    "unbind": ("input", "dim"),
    "channel_shuffle": ("input", "groups"),
    "mean": ("input", "dim", "keepdim"),
    "amax": ("input", "dim", "keepdim"),
    "scaled_dot_product_attention": ("input", "key", "value"),
    "same": ("input",),
}  # fmt: skip
"""Arguments by position. "same" is any operator whose result has the shape and dtype of its input; a "copy" is
looked through by no one, for a view behind it may need its layout in memory."""

_OTHER_NAMES = {
    "self": "input", "axis": "dim", "size": "shape", "split_size_or_sections": "split_size", "train": "training",
    "split_sizes": "split_size", "mat1": "input", "mat2": "other", "obj": "input", "upscale_factor": "groups",
    "indices_or_sections": "chunks", "dim_": "dim", "epsilon": "eps",
}  # fmt: skip

_RANKED = {"conv": "conv", "conv_transpose": "conv_transpose", "avg_pool": "avg_pool", "max_pool": "max_pool",
           "adaptive_avg_pool": "adaptive_avg_pool", "adaptive_max_pool": "adaptive_max_pool"}  # fmt: skip
_SAME = (
    "relu", "relu6", "gelu", "silu", "sigmoid", "hardswish", "hardsigmoid", "leaky_relu", "elu", "mish", "tanh",
    "softmax", "layer_norm", "group_norm", "hardtanh", "softplus", "prelu", "celu", "selu", "abs",
)  # fmt: skip

_NAMES: dict[str, tuple[str, int | None]] = {
    **{name: (name, None) for name in ARGUMENTS if name != "interpolate"},
    **{f"{name}{n}d": (op, n) for name, op in _RANKED.items() for n in (1, 2, 3)},
    **dict.fromkeys(_SAME, ("same", None)),
    **dict.fromkeys(("view", "_unsafe_view"), ("reshape", None)),
    **dict.fromkeys(("view_as",), ("reshape_as", None)),
    **dict.fromkeys(("detach", "alias"), ("identity", None)),
    **dict.fromkeys(("contiguous", "clone"), ("copy", None)),
    **dict.fromkeys(("mm", "__matmul__"), ("matmul", None)),
    **dict.fromkeys(("concat", "concatenate"), ("cat", None)),
    "subtract": ("sub", None),
    "rsub": ("sub", None),
    "multiply": ("mul", None),
    "divide": ("div", None),
    "negative": ("neg", None),
    "swapaxes": ("transpose", None),
    "constant_pad_nd": ("pad", None),
    "split_with_sizes": ("split", None),
    "feature_dropout": ("dropout", None),
    **dict.fromkeys(
        ("_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "_batch_norm_no_update"),
        ("native_batch_norm", None),
    ),
    **dict.fromkeys(("cudnn_batch_norm", "miopen_batch_norm"), ("native_batch_norm", None)),
}
"""Operator and spatial axes by the name that ATen and the methods of tensors give it."""
del _NAMES["same"], _NAMES["identity"], _NAMES["copy"]

METHODS = (
    *("add", "sub", "mul", "div", "neg", "subtract", "multiply", "divide", "matmul", "mm", "t"),
    *("reshape", "view", "reshape_as", "view_as", "flatten", "transpose", "swapaxes", "permute", "squeeze"),
    *("unsqueeze", "unflatten", "mean", "amax", "split", "chunk", "narrow", "select", "unbind", "detach"),
    *("contiguous", "clone", "relu", "sigmoid", "tanh", "softmax", "abs"),
)  # fmt: skip


_OTHER_SIGNATURES = (
    *("batch_norm", "dropout", "split", "pad", "convolution", "rsub", "constant_pad_nd"),
    *("split_with_sizes", "native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit"),
    *("_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm"),
)
"""Names that stand for other arguments in `torch` than in `torch.nn.functional` or here."""


def _functions() -> dict[Any, tuple[str, int | None]]:
    """What a called function is, by identity: a user's function may bear any name."""
    found: dict[Any, tuple[str, int | None]] = {}
    for name, what in _NAMES.items():
        if name not in _OTHER_SIGNATURES:
            found.update({f: what for home in (torch, F) if callable(f := getattr(home, name, None))})
    for name in ("add", "sub", "mul", "matmul", "neg"):
        found[getattr(operator, name)] = _NAMES[name]
        if name != "neg":
            found[getattr(operator, f"i{name}")] = _NAMES[name]
    found[operator.truediv] = found[operator.itruediv] = ("div", None)
    found[operator.getitem] = ("getitem", None)
    found[torch.split] = ("split", None)
    found.update({F.batch_norm: ("batch_norm", None), F.pad: ("pad", None), F.interpolate: ("interpolate", None)})
    found.update(dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), ("dropout", None)))
    return found


FUNCTIONS = _functions()


def lookup(module: nn.Module, target: str) -> Any:
    """The attribute that a dotted ``target`` names."""
    for part in target.split("."):
        module = getattr(module, part)
    return module


def is_plain(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch's own and runs nothing but its own forward."""
    hooked = any(getattr(module, name, None) for name in ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks"))
    hooked = hooked or not all(isinstance(h, tuple(_COMPUTING)) for h in module._forward_pre_hooks.values())
    return class_of(module).__module__.startswith("torch.nn.modules") and not hooked and "forward" not in vars(module)


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of ``module``; where its parameters are computed from others, that of the module without."""
    return type(module).__mro__[1] if nn.utils.parametrize.is_parametrized(module) else type(module)


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
    return first.requires_grad_(any(p.requires_grad for p in given))


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


def operation(node: fx.Node, module: nn.Module) -> Call | None:
    """The operator that ``node`` calls, in its one form; None where it is none known here."""
    if node.op == "call_module":
        called = lookup(module, str(node.target))
        try:
            return _module_call(node, called) if isinstance(called, nn.Module) else None
        except _NotFixed:
            return None
    if node.op == "call_function":
        if isinstance(node.target, OpOverload):
            return _aten_call(node, node.target)
        found = FUNCTIONS.get(node.target)
        return None if found is None else _bound(node, *found)
    if node.op == "call_method":
        name = str(node.target)
        name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        return _bound(node, *_NAMES[name]) if name in METHODS else None
    return None


def _bound(node: fx.Node, op: str, axes: int | None) -> Call | None:
    names = ARGUMENTS[op]
    given: Any = node.args
    if len(given) > 2 and op in ("reshape", "permute"):
        given = (given[0], given[1:])
    if op != "same" and len(given) > len(names):
        return None
    if op == "addmm" and set(node.kwargs) - {"alpha", "beta"}:
        return None
    renamed = {_renamed(key, op): value for key, value in node.kwargs.items()}
    return Call(op, dict(zip(names, given, strict=False)) | renamed, axes)


def with_arguments(node: fx.Node, op: str, named: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a called function, with some given others by name; those that are None are left out."""
    names = ARGUMENTS[op]
    if isinstance(node.target, OpOverload):
        names = tuple(argument.name for argument in node.target._schema.arguments)
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs, **named}
    kwargs = {name: value for name, value in given.items() if value is not None or name in names[: len(node.args)]}
    return tuple(kwargs.pop(name) for name in names[: len(node.args)]), kwargs


def _renamed(key: str, op: str) -> str:
    return key if key == "size" and op == "interpolate" else _OTHER_NAMES.get(key, key)


def _aten_call(node: fx.Node, target: OpOverload) -> Call | None:
    name = aten_name(target)
    name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    if name not in _NAMES or (name, target._overloadname) in _STRANGE:
        return None
    op, axes = _NAMES[name]
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
    return Call(op, args, axes)


_STRANGE = {("transpose", "Dimname"), ("flatten", "named_out_dim"), ("mean", "default"), ("squeeze", "default")}


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
_POOLS = {
    **{getattr(nn, f"AvgPool{n}d"): ("avg_pool", n) for n in (1, 2, 3)},
    **{getattr(nn, f"MaxPool{n}d"): ("max_pool", n) for n in (1, 2, 3)},
    **{
        getattr(nn, f"Adaptive{kind}Pool{n}d"): (f"adaptive_{kind.lower()}_pool", n)
        for n in (1, 2, 3)
        for kind in ("Avg", "Max")
    },
}
_SAME_MODULES = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.ELU, nn.Mish,
    nn.Tanh, nn.Softmax, nn.LayerNorm, nn.PReLU, nn.GroupNorm, nn.Hardtanh, nn.Softplus, nn.SELU, nn.CELU,
)  # fmt: skip


def _module_call(node: fx.Node, called: nn.Module) -> Call | None:
    kind = class_of(called)
    module: Any = called
    args: dict[str, Any] = {}
    axes: int | None = None

    def held(*keys: str) -> None:
        for key in keys:
            tensor = _parameter(module, key)
            args[key] = None if tensor is None else Held(tensor, f"{node.target}.{key}")

    def plain(*keys: str) -> None:
        args.update({key: getattr(module, key) for key in keys if hasattr(module, key)})

    if kind in _CONVS or kind in _TRANSPOSED:
        op, axes = ("conv", len(module.kernel_size)) if kind in _CONVS else ("conv_transpose", len(module.kernel_size))
        held("weight", "bias")
        plain("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")
        if op == "conv":
            del args["output_padding"]
    elif kind is nn.Linear:
        op = "linear"
        held("weight", "bias")
    elif kind in _NORMS:
        op, axes = "batch_norm", {nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}.get(kind)
        held("weight", "bias", "running_mean", "running_var")
        args.update(training=module.training or module.running_mean is None, eps=module.eps)
    elif kind is nn.Identity:
        op = "identity"
    elif kind in _DROPOUTS:
        op = "dropout"
        plain("training")
    elif kind is nn.Flatten:
        op = "flatten"
        plain("start_dim", "end_dim")
    elif kind in _PADS:
        op, axes = "pad", len(module.padding) // 2
        args.update(pad=module.padding, mode="constant", value=module.value)
    elif kind is nn.ChannelShuffle:
        op = "channel_shuffle"
        plain("groups")
    elif kind in _POOLS:
        op, axes = _POOLS[kind]
        plain(*ARGUMENTS[op][1:])
    elif isinstance(called, _SAME_MODULES):
        op = "same"
    elif isinstance(called, nn.Upsample):
        op = "interpolate"
    else:
        return None
    x = first_operand(node)
    if x is None:
        return None
    return Call(op, {"input": x} | args, axes, is_plain(called))


def integers(value: Any, n: int) -> tuple[int, ...] | None:
    """``value`` as one whole number per axis; None when it is computed at run time."""
    if isinstance(value, int):
        return (value,) * n
    if isinstance(value, tuple | list) and all(isinstance(v, int) for v in value):
        return tuple(cast("tuple[int, ...]", value)) * n if len(value) == 1 else tuple(value)
    return None
