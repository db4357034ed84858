"""What is known of each operator of torch, but for what it computes: one record per operator, in one table.

What an operator computes, as a linear one, is said by its reader, in `reparamc.fx.readers`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Operator:
    """One operator, however it is spelled.

    Attributes:
        name: the same for all spellings, and for all numbers of spatial axes.
        arguments: what a function or a method takes, by position; empty where nothing is asked of its arguments.
        names: those of ATen, and of the functions in `torch` and `torch.nn.functional` that take ``arguments``;
            ``conv#d`` means conv1d, conv2d and conv3d. Its own name if none is given.
        aten: names that only ATen has, or that are functions with other arguments.
        methods: names of methods of tensors.
        functions: functions that go by other names, such as `operator.add`.
        modules: classes of modules, and how many spatial axes they have, where the class tells.
        parameters: what a module holds as tensors.
        attributes: what a module holds besides.
        derived: further arguments of a module, computed from it.
        keeps: what its result has in common with its first operand: "shape", "rank", "dtype".
        linear: whether it is affine in its operands, and if so in "each" of them, or in "one", all others constant.
        any_rank: whether it means the same for values of all ranks that it takes, axes counted from the last one.
        allocates: whether its result has memory of its own; or the names for which it has.
        spread: whether its last argument may be several numbers in a row, as in ``x.view(2, 3)``.
        takes_sizes: whether sizes may be given to it, as numbers or as a torch.Size.
    """

    name: str
    arguments: tuple[str, ...] = ()
    names: tuple[str, ...] | None = None
    aten: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    modules: Mapping[type[nn.Module], int | None] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    derived: Callable[[Any], dict[str, Any]] = lambda module: {}
    keeps: tuple[str, ...] = ()
    linear: str | None = None
    any_rank: bool = False
    allocates: bool | tuple[str, ...] = False
    spread: bool = False
    takes_sizes: bool = False


IN_PLACE: Mapping[str, Callable[..., Any]] = {
    f"__{name}__": getattr(operator, name)
    for name in (
        "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "iand", "ior", "ixor", "imatmul",
        "ilshift", "irshift", "setitem",
    )
}  # fmt: skip
"""What Python writes as ``a += b`` and ``a[i] = b``, as methods and as functions."""

ALL = ("shape", "rank", "dtype")
"""What an elementwise operator keeps."""


def _ranked(name: str) -> dict[type[nn.Module], int | None]:
    """The classes of modules ``name`` + 1d, 2d and 3d."""
    return {getattr(nn, f"{name}{n}d"): n for n in (1, 2, 3)}


def _any(*kinds: type[nn.Module]) -> dict[type[nn.Module], int | None]:
    return dict.fromkeys(kinds)


def _pool(name: str, kind: str, *arguments: str, linear: bool = False) -> Operator:
    return Operator(
        name,
        ("input", *arguments),
        (f"{name}#d",),
        aten=(f"_{name}#d",),
        modules=_ranked(kind),
        attributes=arguments,
        keeps=("rank", "dtype"),
        any_rank=linear,
        allocates=True,
        takes_sizes=arguments == ("output_size",),
    )


_WINDOW = ("kernel_size", "stride", "padding")
UPSAMPLED = (
    *(f"upsample_{kind}" for kind in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")),
    *(f"{kind}{n}d" for kind in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3)),
    *(f"_upsample_{kind}2d_aa" for kind in ("bilinear", "bicubic")),
)
_OPAQUE = (
    "exp", "log", "sqrt", "rsqrt", "reciprocal", "amin", "max", "min", "var", "std", "bmm", "index",
)  # fmt: skip


def _activation(
    name: str, module: type[nn.Module] | None, *arguments: str, parameters: tuple[str, ...] = ()
) -> Operator:
    """An operator whose result has the shape and dtype of its input."""
    return Operator(
        name, ("input", *arguments, *parameters), methods=(name,) if hasattr(torch.Tensor, name) else (),
        modules={} if module is None else {module: None}, parameters=parameters,
        attributes=tuple(a for a in arguments if a not in ("inplace", "dtype")), keeps=ALL, allocates=True,
    )  # fmt: skip


def _batch_norm_mode(module: Any) -> dict[str, Any]:
    return {"training": module.training or module.running_mean is None}


def _norm(
    name: str, modules: Mapping[type[nn.Module], int | None], *options: str, bias: tuple[str, ...] = ("bias",)
) -> Operator:
    """A normalization by statistics of its operand, then a factor and a shift for each channel."""
    parameters = ("weight", *bias)
    return Operator(
        name, ("input", *options, *parameters, "eps"), (), (name,), functions=(getattr(F, name),),
        modules=modules, parameters=parameters, attributes=(*options, "eps"), keeps=ALL, any_rank=True, allocates=True,
    )  # fmt: skip


def _arithmetic(name: str, *others: str, linear: str, also: tuple[Callable[..., Any], ...]) -> Operator:
    names = (name, *others)
    return Operator(
        name, ("input", "other"), names, methods=names, functions=also, linear=linear, allocates=True,
        aten=("rsub",) if name == "sub" else (),
    )  # fmt: skip


TABLE: tuple[Operator, ...] = (
    # Kernels and matrices
    Operator(
        "conv", ("input", "weight", "bias", "stride", "padding", "dilation", "groups"), ("conv#d",),
        modules=_ranked("Conv"), parameters=("weight", "bias"),
        attributes=("stride", "padding", "dilation", "groups", "padding_mode"),
        keeps=("rank",), linear="one", any_rank=True, allocates=True,
    ),
    Operator(
        "conv_transpose",
        ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
        ("conv_transpose#d",), modules=_ranked("ConvTranspose"), parameters=("weight", "bias"),
        attributes=("stride", "padding", "dilation", "groups", "padding_mode", "output_padding"),
        keeps=("rank",), any_rank=True, allocates=True,
    ),
    Operator(
        "convolution",
        ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups"),
        (), ("convolution",), allocates=True,
    ),
    Operator(  # a convolution of a class of its own, whose Python decides what it is given
        "gathering", ("input", "weight", "bias", "groups", "module"), (), parameters=("weight", "bias"),
        attributes=("groups",), derived=lambda module: {"module": id(module)}, linear="one", allocates=True,
    ),
    Operator(
        "linear", ("input", "weight", "bias"), modules=_any(nn.Linear), parameters=("weight", "bias"),
        keeps=("rank",), linear="one", any_rank=True, allocates=True,
    ),
    Operator(
        "matmul", ("input", "other"), ("matmul", "mm", "__matmul__"), methods=("matmul", "mm"),
        functions=(operator.matmul, operator.imatmul), linear="one", any_rank=True, allocates=True,
    ),
    Operator("addmm", ("bias", "input", "other"), linear="one", any_rank=True, allocates=True),
    Operator("einsum", ("equation", "tensors"), linear="one", allocates=True, spread=True),
    # Norms and arithmetic
    Operator(
        "batch_norm", ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        (), ("batch_norm",), functions=(F.batch_norm,),
        modules={nn.BatchNorm1d: None, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: None},
        parameters=("weight", "bias", "running_mean", "running_var"), attributes=("eps",), derived=_batch_norm_mode,
        keeps=("shape", "rank"), linear="one", allocates=True,
    ),
    _norm("layer_norm", _any(nn.LayerNorm), "normalized_shape"),
    _norm("rms_norm", _any(nn.RMSNorm), "normalized_shape", bias=()),
    _norm("group_norm", _any(nn.GroupNorm), "num_groups"),
    Operator(
        "instance_norm",
        ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
        (), ("instance_norm",), functions=(F.instance_norm,), modules=_ranked("InstanceNorm"),
        parameters=("weight", "bias", "running_mean", "running_var"),
        attributes=("eps",), keeps=ALL, allocates=True,
    ),
    _arithmetic("add", linear="each", also=(operator.add, operator.iadd)),
    _arithmetic("sub", "subtract", linear="each", also=(operator.sub, operator.isub)),
    _arithmetic("mul", "multiply", linear="one", also=(operator.mul, operator.imul)),
    _arithmetic("div", "divide", linear="one", also=(operator.truediv, operator.itruediv)),
    Operator(
        "neg", ("input",), ("neg", "negative"), methods=("neg",), functions=(operator.neg,), keeps=ALL, linear="each",
        any_rank=True, allocates=True,
    ),
    # Activations
    _activation("relu", nn.ReLU, "inplace"),
    _activation("relu6", nn.ReLU6, "inplace"),
    _activation("gelu", nn.GELU, "approximate"),
    _activation("silu", nn.SiLU, "inplace"),
    _activation("sigmoid", nn.Sigmoid),
    _activation("hardswish", nn.Hardswish, "inplace"),
    _activation("hardsigmoid", nn.Hardsigmoid, "inplace"),
    _activation("leaky_relu", nn.LeakyReLU, "negative_slope", "inplace"),
    _activation("elu", nn.ELU, "alpha", "inplace"),
    _activation("celu", nn.CELU, "alpha", "inplace"),
    _activation("selu", nn.SELU, "inplace"),
    _activation("mish", nn.Mish, "inplace"),
    _activation("tanh", nn.Tanh),
    _activation("softmax", nn.Softmax, "dim", "_stacklevel", "dtype"),
    _activation("hardtanh", nn.Hardtanh, "min_val", "max_val", "inplace"),
    _activation("softplus", nn.Softplus, "beta", "threshold"),
    _activation("prelu", nn.PReLU, parameters=("weight",)),
    _activation("abs", None),
    Operator("clamp", ("input", "min", "max"), ("clamp", "clip"), methods=("clamp", "clip"), allocates=True),
    # Nothing is computed
    Operator(
        "identity", ("input",), ("alias",), modules=_any(nn.Identity), keeps=ALL, linear="each", any_rank=True,
    ),
    Operator("detach", ("input",), ("detach",), methods=("detach",), keeps=ALL, any_rank=True),
    Operator(
        "copy", ("input",), ("contiguous", "clone"), methods=("contiguous", "clone"), keeps=ALL, linear="each",
        any_rank=True, allocates=("clone",),
    ),
    Operator(
        "dropout", ("input", "p", "training", "inplace"), (), ("dropout", "feature_dropout"),
        functions=(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.feature_dropout),
        modules=_any(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), attributes=("training",),
        keeps=ALL, linear="each", any_rank=True,
    ),
    # Layouts
    Operator(
        "reshape", ("input", "shape"), ("reshape", "view", "_unsafe_view"), methods=("reshape", "view"),
        keeps=("dtype",), linear="each", spread=True, takes_sizes=True,
    ),
    Operator(
        "reshape_as", ("input", "other"), ("reshape_as", "view_as"), methods=("reshape_as", "view_as"), keeps=("dtype",)
    ),
    Operator(
        "permute", ("input", "dims"), methods=("permute",), keeps=("rank", "dtype"), linear="each", any_rank=True,
        spread=True,
    ),
    Operator(
        "transpose", ("input", "dim0", "dim1"), ("transpose", "swapaxes"), methods=("transpose", "swapaxes"),
        keeps=("rank", "dtype"), linear="each",
    ),
    Operator("t", ("input",), methods=("t",)),
    Operator(
        "flatten", ("input", "start_dim", "end_dim"), methods=("flatten",), modules=_any(nn.Flatten),
        attributes=("start_dim", "end_dim"), keeps=("dtype",), linear="each",
    ),
    Operator(
        "unflatten", ("input", "dim", "sizes"), methods=("unflatten",), modules=_any(nn.Unflatten),
        attributes=("dim",), derived=lambda module: {"sizes": module.unflattened_size}, keeps=("dtype",), linear="each",
        takes_sizes=True,
    ),
    Operator("squeeze", ("input", "dim"), methods=("squeeze",), keeps=("dtype",), linear="each"),
    Operator("unsqueeze", ("input", "dim"), methods=("unsqueeze",), keeps=("dtype",), linear="each"),
    Operator(
        "expand", ("input", "shape"), methods=("expand",), keeps=("dtype",), linear="each", spread=True,
        takes_sizes=True,
    ),
    Operator(
        "repeat", ("input", "repeats"), methods=("repeat",), keeps=("dtype",), linear="each", allocates=True,
        spread=True,
    ),
    Operator("new_tensor", methods=("new_tensor",), allocates=True),
    Operator("roll", methods=("roll",), linear="each"),
    Operator("flip", methods=("flip",), linear="each"),
    Operator("unfold", functions=(F.unfold,), linear="each"),
    Operator("fold", linear="each"),
    Operator(
        "pixel_shuffle", ("input", "groups"), modules=_any(nn.PixelShuffle),
        derived=lambda module: {"groups": module.upscale_factor}, keeps=("rank", "dtype"), linear="each", any_rank=True,
        allocates=True,
    ),
    Operator(
        "pixel_unshuffle", ("input", "groups"), modules=_any(nn.PixelUnshuffle),
        derived=lambda module: {"groups": module.downscale_factor}, keeps=("rank", "dtype"), linear="each",
        any_rank=True, allocates=True,
    ),
    # Poolings and paddings
    _pool("avg_pool", "AvgPool", *_WINDOW, "ceil_mode", "count_include_pad", "divisor_override", linear=True),
    _pool("max_pool", "MaxPool", *_WINDOW, "dilation", "ceil_mode", "return_indices"),
    _pool("adaptive_avg_pool", "AdaptiveAvgPool", "output_size"),
    _pool("adaptive_max_pool", "AdaptiveMaxPool", "output_size"),
    Operator(
        "interpolate",
        ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"), (),
        aten=UPSAMPLED, functions=(F.interpolate,), modules=_any(nn.Upsample),
        attributes=("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor"),
        keeps=("rank", "dtype"), allocates=True, takes_sizes=True,
    ),
    Operator(
        "pad", ("input", "pad", "mode", "value"), (), ("pad", "constant_pad_nd"), functions=(F.pad,),
        modules={**_ranked("ZeroPad"), **_ranked("ConstantPad")},
        attributes=("value",), derived=lambda module: {"pad": module.padding, "mode": "constant"},
        keeps=("rank", "dtype"), linear="each", any_rank=True, allocates=True,
    ),
    Operator("mean", ("input", "dim", "keepdim"), methods=("mean",), keeps=("dtype",), linear="each", allocates=True),
    Operator("amax", ("input", "dim", "keepdim"), methods=("amax",), keeps=("dtype",), allocates=True),
    Operator("sum", methods=("sum",), linear="each", allocates=True),
    Operator("cumsum", methods=("cumsum",), linear="each"),
    # Channels and positions
    Operator("cat", ("tensors", "dim"), ("cat", "concat", "concatenate"), linear="each", allocates=True),
    Operator("stack", linear="each", allocates=True),
    Operator(
        "split", ("input", "split_size", "dim"), (), ("split", "split_with_sizes"), ("split",), (torch.split,),
        keeps=("dtype",), linear="each",
    ),
    Operator("chunk", ("input", "chunks", "dim"), methods=("chunk",), keeps=("dtype",), linear="each"),
    Operator("unbind", ("input", "dim"), methods=("unbind",), keeps=("dtype",), linear="each"),
    Operator("getitem", ("input", "index"), functions=(operator.getitem,), keeps=("dtype",), linear="each"),
    Operator("slice", ("input", "dim", "start", "end", "step"), keeps=("dtype",), linear="each"),
    Operator(
        "narrow", ("input", "dim", "start", "length"), methods=("narrow",), keeps=("dtype",), linear="each"
    ),
    Operator("select", ("input", "dim", "index"), methods=("select",), keeps=("dtype",), linear="each"),
    Operator("index_select", methods=("index_select",), linear="each"),
    Operator(
        "channel_shuffle", ("input", "groups"), modules=_any(nn.ChannelShuffle), attributes=("groups",),
        keeps=("shape", "dtype"), linear="each", allocates=True,
    ),
    # Others
    Operator("scaled_dot_product_attention", ("input", "key", "value"), allocates=True),
    *(Operator(name, methods=(name,), allocates=True) for name in _OPAQUE),
    Operator("pow", methods=("pow",), functions=(operator.pow,), allocates=True),
    Operator(
        "number", names=(), methods=("size", "dim", "ndimension", "numel"),
        functions=(
            operator.floordiv, operator.mod, operator.eq, operator.ne, operator.lt, operator.le, operator.gt,
            operator.ge, torch._assert,
        ), allocates=True,
    ),
)  # fmt: skip
"""All operators of which something is known. A "copy" is looked through by no one: a view after it may need its layout
in memory."""

OPERATORS: Mapping[str, Operator] = {o.name: o for o in TABLE}
"""The records by name."""

Spelled = Mapping[Any, tuple[Operator, int | None]]
"""Operator and spatial axes, where the spelling tells these."""


def _spelled(names: tuple[str, ...]) -> list[tuple[str, int | None]]:
    """Names with the number of spatial axes written out."""
    ranked = [(name.replace("#", str(n)), n) for name in names if "#" in name for n in (1, 2, 3)]
    return [*ranked, *((name, None) for name in names if "#" not in name)]


def _of_aten() -> Spelled:
    return {
        name: (o, axes)
        for o in TABLE
        for name, axes in _spelled((*((o.name,) if o.names is None else o.names), *o.aten))
    }


def _functions() -> Spelled:
    """By identity: a user's function may have any name."""
    found: dict[Any, tuple[Operator, int | None]] = {}
    for o in TABLE:
        for name, axes in _spelled((o.name,) if o.names is None else o.names):
            found.update({f: (o, axes) for home in (torch, F) if callable(f := getattr(home, name, None))})
        found.update(dict.fromkeys(o.functions, (o, None)))
    return found


ATEN, FUNCTIONS = _of_aten(), _functions()
METHODS: Spelled = {name: (o, None) for o in TABLE for name in o.methods}
MODULES: Spelled = {kind: (o, axes) for o in TABLE for kind, axes in o.modules.items()}
