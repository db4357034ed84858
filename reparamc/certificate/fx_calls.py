"""The calls of a traced module in one form: which operator it is, however it is spelled, and its arguments by name."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.nn import functional as F
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from reparamc.certificate.fx_sources import applied_by


def attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        try:
            inner = module._modules.get(part)  # torch takes longer
        except AttributeError:  # it is no module
            inner = None
        module = getattr(module, part) if inner is None else inner
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
    "addmm": ("bias", "input", "other"),
    "einsum": ("equation", "operands"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "instance_norm": ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div"), ("input", "other")),
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
    "expand": ("input", "shape"),
    "repeat": ("input", "repeats"),
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
    "pixel_shuffle": ("input", "upscale_factor"),
    "pixel_unshuffle": ("input", "downscale_factor"),
    "interpolate": ("input", "shape", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"),
}  # fmt: skip

_SPELLINGS = {
    **{name: (name, None) for name in SIGNATURES if name not in ("conv", "conv_transpose", "avg_pool")},
    **{f"conv{n}d": ("conv", n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": ("conv_transpose", n) for n in (1, 2, 3)},
    **{f"avg_pool{n}d": ("avg_pool", n) for n in (1, 2, 3)},
    **{f"{start}adaptive_avg_pool{n}d": ("adaptive_avg_pool", n) for n in (1, 2, 3) for start in ("", "_")},
    "truediv": ("div", None), "iadd": ("add", None), "isub": ("sub", None), "imul": ("mul", None),
    "itruediv": ("div", None), "view": ("reshape", None), "_unsafe_view": ("reshape", None), "concat": ("cat", None),
    "contiguous": ("identity", None), "clone": ("identity", None), "detach": ("identity", None),
    "alias": ("identity", None), "mm": ("matmul", None), "split_with_sizes": ("split", None),
    "constant_pad_nd": ("pad", None), "swapaxes": ("transpose", None),
    **{f"upsample_{kind}": ("interpolate", None) for kind in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")},
    **{f"upsample_nearest{n}d": ("interpolate", None) for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": ("interpolate", None) for n in (1, 2, 3)},
    **{f"_upsample_{kind}2d_aa": ("interpolate", None) for kind in ("bilinear", "bicubic")},
}  # fmt: skip
_RENAMED = {
    "self": "input", "axis": "dim", "size": "shape", "split_size_or_sections": "sizes", "split_size": "sizes",
    "split_sizes": "sizes", "train": "training", "mat2": "other", "dim_": "dim",
    "epsilon": "eps",
}  # fmt: skip
_OF_TORCH = {
    f: name
    for home in (torch, F, operator)
    for name in _SPELLINGS
    if callable(f := getattr(home, name, None))
    and not (
        home is torch
        and name
        in (
            "batch_norm",
            "group_norm",
            "instance_norm",
            "layer_norm",
            "rms_norm",
            "pad",
            "dropout",
            "convolution",
            "constant_pad_nd",
        )
    )
}


def described(node: fx.Node, module: fx.GraphModule) -> Described | None:
    """What a node calls, in one form; None where that is none of the operators known here."""
    if node.op == "call_module":
        return _of_module(node, attribute(module, str(node.target)))
    if node.op == "call_method":
        name = str(node.target)
        name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        name = name[2:-2] if name.startswith("__i") else name  # ``a.__iadd__(b)`` is ``a += b``
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
        renamed = {"self": "bias", "mat1": "input", "mat2": "other"} if op == "addmm" else _RENAMED
        args = {renamed.get(k, k): v for k, v in given.items()}
        if name == "constant_pad_nd":
            args["mode"] = "constant"
        return Described(op, _upsampled(name, args) if op == "interpolate" else args, axes)
    name = _OF_TORCH.get(node.target) if callable(node.target) else None
    return None if name is None else _bound(node, *_SPELLINGS[name])


def _upsampled(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an ATen operator as those of `torch.nn.functional.interpolate`."""
    kind = name.partition("upsample_")[2].partition("_aa")[0]
    scaled = any(args.get(key) is not None for key in ("scales", "scales_d", "scales_h", "scales_w"))
    return {
        "input": args["input"],
        "shape": args.get("output_size"),
        "scale_factor": args.get("scale_factors"),
        "mode": kind[:-2].replace("_", "-"),
        "align_corners": args.get("align_corners"),
        "recompute_scale_factor": scaled,
        "antialias": "_aa" in name,
    }


def _bound(node: fx.Node, op: str, axes: int | None) -> Described | None:
    names, given = SIGNATURES.get(op, ()), node.args
    if op in ("reshape", "permute", "expand", "repeat", "einsum") and len(given) > 2:
        given = (given[0], given[1:])
    if len(given) > len(names):
        return None
    named = {_RENAMED.get(k, k): v for k, v in node.kwargs.items()}
    return Described(op, {**dict(zip(names, given, strict=False)), **named}, axes)


def _by_axes(kind: str, op: str, *names: str) -> dict[type, tuple[str, int | None, tuple[str, ...]]]:
    return {getattr(nn, f"{kind}{n}d"): (op, n, names) for n in (1, 2, 3)}


_OF_CONV = ("weight", "bias", "stride", "padding", "dilation", "groups", "padding_mode")
_OF_NORM = ("weight", "bias", "running_mean", "running_var", "training", "eps")
_MODULES: dict[type, tuple[str, int | None, tuple[str, ...]]] = {
    **_by_axes("Conv", "conv", *_OF_CONV),
    **_by_axes("ConvTranspose", "conv_transpose", *_OF_CONV, "output_padding"),
    nn.Linear: ("linear", None, ("weight", "bias")),
    **_by_axes("BatchNorm", "batch_norm", *_OF_NORM),
    nn.BatchNorm1d: ("batch_norm", None, _OF_NORM),
    nn.SyncBatchNorm: ("batch_norm", None, _OF_NORM),
    nn.LayerNorm: ("layer_norm", None, ("normalized_shape", "weight", "bias", "eps")),
    nn.RMSNorm: ("rms_norm", None, ("normalized_shape", "weight", "eps")),
    nn.GroupNorm: ("group_norm", None, ("num_groups", "weight", "bias", "eps")),
    **_by_axes("InstanceNorm", "instance_norm", *_OF_NORM, "track_running_stats"),
    **_by_axes("AvgPool", "avg_pool", *SIGNATURES["avg_pool"][1:]),
    **_by_axes("AdaptiveAvgPool", "adaptive_avg_pool", "output_size"),
    **_by_axes("Dropout", "dropout", "training"),
    nn.Dropout: ("dropout", None, ("training",)),
    nn.Flatten: ("flatten", None, ("start_dim", "end_dim")),
    nn.Unflatten: ("unflatten", None, ("dim", "unflattened_size")),
    nn.ChannelShuffle: ("channel_shuffle", None, ("groups",)),
    nn.PixelShuffle: ("pixel_shuffle", None, ("upscale_factor",)),
    nn.PixelUnshuffle: ("pixel_unshuffle", None, ("downscale_factor",)),
    **_by_axes("ZeroPad", "pad", "padding", "value"),
    **_by_axes("ConstantPad", "pad", "padding", "value"),
    nn.Identity: ("identity", None, ()),
    **dict.fromkeys(
        (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
        ("interpolate", None, ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")),
    ),
}
"""The operator that a module is, over how many axes, and the attributes that are its arguments."""
_ARGUMENTS = {("pad", "padding"): "pad", ("interpolate", "size"): "shape", ("unflatten", "unflattened_size"): "sizes"}


def _hook_value(hook: Any, module: Any) -> tuple[str, Tensor] | None:
    """The parameter that a hook computes before ``module`` runs, and its value; None for any other hook."""
    match hook:
        case WeightNorm():
            return hook.name, hook.compute_weight(module)
        case SpectralNorm():
            return hook.name, hook.compute_weight(module, do_power_iteration=False)
        case BasePruningMethod():
            return hook._tensor_name, hook.apply_mask(module)
    return None


def _computed(module: Any) -> tuple[bool, dict[str, Tensor]]:
    """Whether nothing but torch's own forward runs, and the parameters that hooks compute before it does."""
    with torch.no_grad():
        found = [_hook_value(hook, module) for hook in module._forward_pre_hooks.values()]
    hooks = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    plain = not any(getattr(module, hook, None) for hook in hooks) and "forward" not in vars(module)
    varies = module.training and (found or nn.utils.parametrize.is_parametrized(module))
    return plain and None not in found and not varies, dict(value for value in found if value is not None)


def _gathering(node: fx.Node, module: Any) -> Described | None:
    """A convolution of a class of its own over what its Python makes of its operand: told by all that it holds."""
    plain, values = _computed(module)
    held = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    parameters = {*module._parameters, *values}
    if module._modules or module._buffers or parameters != {"weight", "bias"} or not node.args:
        return None
    if not all(isinstance(v, int | float | str | tuple | list | None) for v in held.values()):
        return None
    weight, bias = (values[key] if key in values else module._parameters[key] for key in ("weight", "bias"))
    state = {"module": (id(type(module)), tuple(weight.shape), repr(held)), "more": (node.args[1:], node.kwargs)}
    args = {"input": node.args[0], "weight": weight, "bias": bias, "groups": module.groups}
    return Described("gathering", args | state, None, plain)


def _of_module(node: fx.Node, module: Any) -> Described | None:
    parametrized = nn.utils.parametrize.is_parametrized(module)
    kind = type(module).__mro__[1] if parametrized else type(module)
    if kind not in _MODULES and applied_by(kind) is not None:
        return _gathering(node, module)
    op, axes, names = _MODULES.get(kind, ("", None, ()))
    sized = op == "conv_transpose" and len(node.args) + len(node.kwargs) == 2
    if not op or len(node.args) + len(node.kwargs) != 1 + sized or not node.args:
        return None
    plain, values = _computed(module)
    args: dict[str, Any] = {"input": node.args[0]}
    if sized:
        args["output_size"] = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
    with torch.no_grad():
        for name in names:
            value = values[name] if name in values else getattr(module, name, None)
            args[_ARGUMENTS.get((op, name), name)] = value
    return Described(op, args, axes, plain)
