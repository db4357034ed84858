"""The calls of a traced module in one form: which operator it is, however it is spelled, and its arguments by name."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.nn import functional as F


def attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def name_of(node: fx.Node) -> str:
    """The name of a function, a method or an ATen operator, without its overload; the path of a module."""
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.partition("::")[2]
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", "")


class Described:
    """An operator and its arguments by name. ``plain``: nothing but torch's own forward runs."""

    def __init__(self, op: str, args: dict[str, Any], axes: int | None = None, plain: bool = True) -> None:
        self.op, self.args, self.axes, self.plain = op, args, axes, plain


SIGNATURES: dict[str, tuple[str, ...]] = {
    "conv": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose": ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    "convolution": (
        "input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups",
    ),
    "linear": ("input", "weight", "bias"),
    "matmul": ("input", "other"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    **dict.fromkeys(("add", "sub", "mul", "div"), ("input", "other")),
    "neg": ("input",),
    "identity": ("input",),
    "dropout": ("input", "p", "training", "inplace"),
    "reshape": ("input", "shape"),
    "reshape_as": ("input", "other"),
    "view_as": ("input", "other"),
    "permute": ("input", "dims"),
    "transpose": ("input", "dim0", "dim1"),
    "flatten": ("input", "start_dim", "end_dim"),
    "squeeze": ("input", "dim"),
    "unsqueeze": ("input", "dim"),
    "unflatten": ("input", "dim", "sizes"),
    "mean": ("input", "dim", "keepdim"),
    "avg_pool": ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    "adaptive_avg_pool": ("input", "output_size"),
    "pad": ("input", "pad", "mode", "value"),
    "cat": ("tensors", "dim"),
    "narrow": ("input", "dim", "start", "length"),
    "index_select": ("input", "dim", "index"),
    "slice": ("input", "dim", "start", "end", "step"),
    "getitem": ("input", "index"),
    "setitem": ("input", "index", "value"),
    "split": ("input", "sizes", "dim"),
    "chunk": ("input", "chunks", "dim"),
    "unbind": ("input", "dim"),
    "select": ("input", "dim", "index"),
    "channel_shuffle": ("input", "groups"),
}  # fmt: skip

_SPELLINGS = {
    **{name: (name, None) for name in SIGNATURES if name not in ("conv", "conv_transpose", "avg_pool")},
    **{f"conv{n}d": ("conv", n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": ("conv_transpose", n) for n in (1, 2, 3)},
    **{f"avg_pool{n}d": ("avg_pool", n) for n in (1, 2, 3)},
    **{f"adaptive_avg_pool{n}d": ("adaptive_avg_pool", n) for n in (1, 2, 3)},
    "truediv": ("div", None), "iadd": ("add", None), "isub": ("sub", None), "imul": ("mul", None),
    "itruediv": ("div", None), "view": ("reshape", None), "_unsafe_view": ("reshape", None), "concat": ("cat", None),
    "contiguous": ("identity", None), "clone": ("identity", None), "detach": ("identity", None),
    "alias": ("identity", None), "mm": ("matmul", None), "split_with_sizes": ("split", None),
    "constant_pad_nd": ("pad", None), "swapaxes": ("transpose", None),
    "_native_batch_norm_legit_no_training": ("batch_norm", None),
}  # fmt: skip
_RENAMED = {
    "self": "input", "axis": "dim", "size": "shape", "split_size_or_sections": "sizes", "split_size": "sizes",
    "split_sizes": "sizes", "train": "training", "mat2": "other", "dim_": "dim",
}  # fmt: skip
_OF_TORCH = {
    f: name
    for home in (torch, F, operator)
    for name in _SPELLINGS
    if callable(f := getattr(home, name, None))
    and not (home is torch and name in ("batch_norm", "pad", "dropout", "convolution", "constant_pad_nd"))
}


def described(node: fx.Node, module: fx.GraphModule) -> Described | None:
    """What a node calls, in one form; None where that is none of the operators known here."""
    if node.op == "call_module":
        return _of_module(node, attribute(module, str(node.target)))
    if node.op == "call_method":
        name = str(node.target)
        name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        plain = _SPELLINGS.get(name)
        return None if plain is None else _bound(node, *plain)
    if node.op != "call_function":
        return None
    if isinstance(node.target, OpOverload):
        name = name_of(node)
        name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        if node.target.namespace != "aten" or name not in _SPELLINGS:
            return None
        op, axes = _SPELLINGS[name]
        names = [a.name for a in node.target._schema.arguments]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        args = {_RENAMED.get(k, k): v for k, v in given.items()}
        if name == "constant_pad_nd":
            args["mode"] = "constant"
        return Described(op, args, axes)
    name = _OF_TORCH.get(node.target) if callable(node.target) else None
    return None if name is None else _bound(node, *_SPELLINGS[name])


def _bound(node: fx.Node, op: str, axes: int | None) -> Described | None:
    names, given = SIGNATURES[op], node.args
    if op in ("reshape", "permute") and len(given) > 2:
        given = (given[0], given[1:])
    if len(given) > len(names):
        return None
    named = {_RENAMED.get(k, k): v for k, v in node.kwargs.items()}
    return Described(op, {**dict(zip(names, given, strict=False)), **named}, axes)


_POOLS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
_ADAPTIVE = {nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3}
_CONVS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_TRANSPOSED = {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
_NORMS = {nn.BatchNorm1d: None, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: None}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)


def _of_module(node: fx.Node, module: Any) -> Described | None:
    kind = type(module)
    if len(node.args) != 1 or node.kwargs:
        return None
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    plain = not any(getattr(module, hook, None) for hook in hooks) and "forward" not in vars(module)
    args: dict[str, Any] = {"input": node.args[0]}

    def take(*names: str) -> None:
        args.update({name: getattr(module, name) for name in names})

    if kind in _CONVS:
        take("weight", "bias", "stride", "padding", "dilation", "groups", "padding_mode")
        return Described("conv", args, _CONVS[kind], plain)
    if kind in _TRANSPOSED:
        take("weight", "bias", "stride", "padding", "output_padding", "dilation", "groups", "padding_mode")
        return Described("conv_transpose", args, _TRANSPOSED[kind], plain)
    if kind is nn.Linear:
        take("weight", "bias")
        return Described("linear", args, None, plain)
    if kind in _NORMS:
        take("weight", "bias", "running_mean", "running_var", "training", "eps")
        return Described("batch_norm", args, _NORMS[kind], plain)
    if kind in _POOLS:
        take(*SIGNATURES["avg_pool"][1:5], "count_include_pad")
        args["divisor_override"] = getattr(module, "divisor_override", None)
        return Described("avg_pool", args, _POOLS[kind], plain)
    if kind in _ADAPTIVE:
        take("output_size")
        return Described("adaptive_avg_pool", args, _ADAPTIVE[kind], plain)
    if kind in _DROPOUTS:
        take("training")
        return Described("dropout", args, None, plain)
    if kind is nn.Identity:
        return Described("identity", args, None, plain)
    if kind is nn.Flatten:
        take("start_dim", "end_dim")
        return Described("flatten", args, None, plain)
    if kind is nn.ChannelShuffle:
        take("groups")
        return Described("channel_shuffle", args, None, plain)
    if kind in _PADS:
        return Described("pad", {**args, "pad": module.padding, "value": module.value}, None, plain)
    return None
