"""Strategies for hypothesis: models of linear structure, the states of a BatchNorm, and inputs for a model.

What is drawn is a `Structure`, and it is drawn so that the simplest example is the smallest graph: the first of all
choices is always the plainest, numbers of things come before the things, and weights are a seed. A test that
fails is therefore reported with a graph of a few operators, printed as the call that makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st

from reparamc.errors import InputError
from reparamc.testing.structure import (
    ACTIVATIONS,
    BATCHNORM_KINDS,
    Arrays,
    Ints,
    Step,
    Structure,
    Value,
    batchnorm_state,
    result_of,
    same_padding,
)

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor, nn

WIDTHS = (2, 4, 6, 1)
_EPSILONS = (2.0**-17, 2.0**-10)
"""About 1e-5 and 1e-3, and exact in float32, which is how ONNX keeps them."""

SEEDS = st.integers(0, 2**16)


class _Sketch:
    """A structure under construction."""

    def __init__(self, draw: st.DrawFn, channels: int, axes: int) -> None:
        self.draw, self.channels, self.axes = draw, channels, axes
        self.steps: list[Step] = []
        self.values = list(Structure(channels, axes, ()).values)

    def add(self, op: str, *inputs: int, **at: Any) -> int:
        if spelling := self.draw(st.integers(0, 5)):
            at["spelling"] = spelling
        step = Step(op, inputs, **at)
        self.values.append(result_of(step, [self.values[n] for n in inputs]))
        self.steps.append(step)
        return len(self.steps)

    def one_in(self, count: int) -> bool:
        """A choice that is usually, and in the simplest example always, no."""
        return self.draw(st.integers(0, count - 1)) == count - 1

    def choose(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(options))

    def ints(self, count: int, low: int, high: int) -> Ints:
        return tuple(self.draw(st.integers(low, high)) for _ in range(count))

    def groups(self, inputs: int, outputs: int) -> int:
        return self.choose([g for g in (1, 2, 3, 4, 6) if inputs % g == 0 and outputs % g == 0])

    def finish(self, **rest: Any) -> Structure:
        return Structure(self.channels, self.axes, tuple(self.steps), **rest)


# One operator


def _conv(s: _Sketch, x: int, out: int, stride: Ints, grid: bool) -> int:
    """A convolution; on the ``grid`` it keeps extents up to its stride, and may have the weights of an earlier one."""
    axes, inputs = s.values[x].frame, s.values[x].channels
    twins = [
        n
        for n, step in enumerate(s.steps, 1)
        if step.op == "conv"
        and (step["out"], step["stride"]) == (out, stride)
        and tuple(map(sum, zip(step["begin"], step["end"], strict=True)))
        == same_padding(step["kernel"], step["dilation"])
        and s.values[step.inputs[0]] == s.values[x]
        and "like" not in step.at
    ]
    if grid and twins and s.one_in(3):
        twin = s.choose(twins)
        shared = {k: v for k, v in s.steps[twin - 1].at.items() if k != "spelling"}
        return s.add("conv", x, **shared, like=twin)
    kernel = s.ints(axes, 1, 3)
    dilation = s.ints(axes, 1, 2) if s.one_in(4) else (1,) * axes
    reach = same_padding(kernel, dilation)
    begin = tuple(s.choose([r // 2, 0, r]) for r in reach)
    end = tuple(r - b for r, b in zip(reach, begin, strict=True))
    match "same" if grid else s.choose(["same", "none", "any"]):
        case "none":
            begin = end = (0,) * axes
        case "any":
            end = s.ints(axes, 0, 1)
    return s.add(
        "conv", x, out=out, kernel=kernel, stride=stride, dilation=dilation, begin=begin, end=end,
        groups=s.groups(inputs, out), bias=not s.one_in(3),
    )  # fmt: skip


def _transposed(s: _Sketch, x: int, out: int) -> int:
    axes, inputs = s.values[x].frame, s.values[x].channels
    kernel, stride = s.ints(axes, 1, 3), s.ints(axes, 1, 2)
    pad = tuple(s.choose([0, 1]) if k > 2 else 0 for k in kernel)
    extra = tuple(s.choose([0, 1]) if n > 1 else 0 for n in stride)
    return s.add(
        "transposed", x, out=out, kernel=kernel, stride=stride, dilation=(1,) * axes, pad=pad, extra=extra,
        groups=s.groups(inputs, out), bias=not s.one_in(3),
    )  # fmt: skip


def _linear(s: _Sketch, x: int, out: int) -> int:
    return s.add("linear", x, out=out, bias=not s.one_in(3))


def _matrix(s: _Sketch, x: int, out: int) -> int:
    """What mixes channels and nothing else."""
    axes = s.values[x].frame
    if not axes:
        return _linear(s, x, out)
    ones, zeros = (1,) * axes, (0,) * axes
    return s.add(
        "conv", x, out=out, kernel=ones, stride=ones, dilation=ones, begin=zeros, end=zeros, groups=1,
        bias=not s.one_in(3),
    )  # fmt: skip


def _batchnorm(s: _Sketch, x: int) -> int:
    return s.add("batchnorm", x, state=s.choose(BATCHNORM_KINDS), eps=s.choose(_EPSILONS))


def _affine(s: _Sketch, x: int) -> int:
    """What treats each channel by itself."""
    kinds = ["batchnorm"] if _takes_batchnorm(s.values[x]) else []
    kind = s.choose([*kinds, "scale", "shift", "number", "negate", "identity"])
    return _batchnorm(s, x) if kind == "batchnorm" else s.add(kind, x)


def _takes_batchnorm(value: Value) -> bool:
    """Both frameworks normalise axis 1 only."""
    return value.axis == 1


# Several operators


@st.composite
def _branch(draw: st.DrawFn, s: _Sketch, x: int, out: int, stride: Ints, depth: int) -> int:
    """A branch from ``x`` to ``out`` channels on the grid of ``stride``, a few operators long."""
    value = s.values[x]
    keeps = out == value.channels
    still = keeps and all(n == 1 for n in stride)
    kinds = ["grid"] + ["skip"] * still + ["pool"] * (keeps and value.frame > 0) + ["sum"] * (depth > 0)
    if not still and s.one_in(5) and _takes_batchnorm(value):
        x = _batchnorm(s, x)  # in front
    match s.choose(kinds):
        case "skip":
            y = x
        case "pool":
            pad = s.ints(value.frame, 0, 1)
            y = s.add("pool", x, kernel=tuple(2 * p + 1 for p in pad), stride=stride, pad=pad)
        case "sum":
            y = draw(_sum(s, x, out, stride, depth - 1))
        case _:
            y = _conv(s, x, out, stride, grid=True) if value.frame else _linear(s, x, out)
    if s.one_in(2):
        y = _affine(s, y)
    if s.one_in(5):
        y = _matrix(s, y, out)
    return y


@st.composite
def _sum(draw: st.DrawFn, s: _Sketch, x: int, out: int, stride: Ints, depth: int) -> int:
    """Two branches or more, added one by one, all at once, or subtracted."""
    terms = [draw(_branch(s, x, out, stride, depth)) for _ in range(2)]
    while len(terms) < 4 and s.one_in(3):
        terms.append(s.choose(terms) if s.one_in(3) else draw(_branch(s, x, out, stride, depth)))
    return _total(s, terms)


def _total(s: _Sketch, terms: list[int]) -> int:
    if len(terms) == 2:
        return s.add(s.choose(["add", "subtract"]), *terms)
    if s.one_in(2):
        return s.add("add", *terms)
    y = terms[0]
    for term in terms[1:]:
        y = s.add("add", y, term)
    return y


@st.composite
def _block(draw: st.DrawFn, s: _Sketch, x: int, activations: bool) -> int:
    """One operator, or a group of operators around which a network is built."""
    value, width = s.values[x], s.values[x].channels
    images = ["pool", "pad", "transposed", "to_last"] if value.frame else []
    affine = ["batchnorm"] if _takes_batchnorm(value) else []
    kinds = ["linear", "linear", *affine, "scale", "sum", "sum", "sum", "concat", "split", "select", *images]
    match s.choose(kinds + ["activation"] * 2 * activations):
        case "linear" if value.frame:
            y = _conv(s, x, s.choose(WIDTHS), s.ints(value.frame, 1, 2), grid=False)
        case "linear":
            y = _linear(s, x, s.choose(WIDTHS))
        case "batchnorm":
            y = _batchnorm(s, x)
        case "scale":
            y = _affine(s, x)
        case "sum":
            out = s.choose([width, *WIDTHS])
            y = draw(_sum(s, x, out, _strides(s, value.frame), 1))
        case "concat":
            stride = _strides(s, value.frame)
            y = s.add("concat", *(draw(_branch(s, x, s.choose(WIDTHS), stride, 0)) for _ in range(s.choose([2, 3]))))
        case "split" if width > 1:
            first = s.draw(st.integers(1, width - 1))
            sizes = (first, width - first)
            parts = [s.add("part", x, sizes=sizes, which=n) for n in (0, 1)]
            stride = _strides(s, value.frame)
            y = s.add("concat", *(draw(_branch(s, p, s.values[p].channels, stride, 0)) for p in parts))
        case "select" | "split":
            every = range(width)
            index = s.choose([every[: (width + 1) // 2], every[width // 2 :], every[::-1], [*every[1:], 0]])
            y = s.add("select", x, index=tuple(index))
        case "pool":
            kernel = s.ints(value.frame, 1, 3)
            pad = tuple(s.choose([0, 1]) if k > 1 else 0 for k in kernel)
            y = s.add("pool", x, kernel=kernel, stride=s.ints(value.frame, 1, 2), pad=pad)
        case "pad":
            y = s.add("pad", x, begin=s.ints(value.frame, 0, 2), end=s.ints(value.frame, 0, 2))
        case "transposed":
            y = _transposed(s, x, s.choose(WIDTHS))
        case "to_last":
            y = s.add("to_last", x)
            y = _linear(s, y, s.choose(WIDTHS))
            if s.one_in(2):
                y = s.add("scale", y)
            y = s.add("to_first", y)
        case _:
            y = s.add("activation", x, kind=s.choose(ACTIVATIONS))
    return y


def _strides(s: _Sketch, axes: int) -> Ints:
    return s.ints(axes, 1, 2) if s.one_in(3) else (1,) * axes


@st.composite
def _head(draw: st.DrawFn, s: _Sketch, x: int) -> int:
    """A classifier, or the way into tokens."""
    kind = s.choose(["mean", "tokens", "pooled map"])
    x = s.add("tokens", x) if kind == "tokens" else s.add("mean", x, keep=kind == "pooled map")
    if _takes_batchnorm(s.values[x]) and s.one_in(2):
        x = _batchnorm(s, x)
    if kind == "tokens" and s.one_in(2):
        return draw(_sum(s, x, s.choose(WIDTHS), (), 1))
    return _matrix(s, x, s.choose(WIDTHS))


@st.composite
def structures(
    draw: st.DrawFn, *, axes: Sequence[int] = (2, 1, 3, 0, -1), activations: bool = False, blocks: int = 4
) -> Structure:
    """What the models of this module are made from; see `reparamc.testing.structure.Structure`.

    Args:
        axes: spatial axes of the input, one of which is drawn: 1, 2, 3; 0 for [N, C], and -1 for tokens [N, L, C].
        activations: whether non-linear operators stand between blocks.
        blocks: at most so many, each a single operator or a group of them. A head over tokens may follow.
    """
    s = _Sketch(draw, draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(tuple(axes))))
    x = draw(_block(s, 0, activations))
    for _ in range(blocks - 1):
        if draw(st.integers(0, 3)) == 0:
            break
        x = draw(_block(s, x, activations))
    if s.values[x].frame and s.one_in(3):
        x = draw(_head(s, x))
    extra = draw(st.integers(1, len(s.steps) - 1)) if len(s.steps) > 1 and s.one_in(6) else None
    return s.finish(seed=draw(SEEDS), extra=extra)


@st.composite
def branch_structures(draw: st.DrawFn, channels: int, out: int, stride: int, count: int, axes: int) -> Structure:
    """Parallel branches of one input that are added up, and nothing else; see `branches`."""
    s = _Sketch(draw, channels, axes)
    steps = (stride,) * axes
    terms = [draw(_branch(s, 0, out, steps, 0)) for _ in range(count)]
    _total(s, terms)
    return s.finish(seed=draw(SEEDS))


def _torch_builder(asked: str) -> Callable[..., Any]:
    """`build_module`, or an ImportError that says who asked."""
    try:
        from reparamc.testing.fx_models import build_module
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"reparamc.testing.{asked} needs torch; install it with: pip install 'reparamc[torch]'"
        ) from error
    return build_module


# What users draw


def linear_modules(
    *,
    axes: Sequence[int] = (2, 1, 3, 0, -1),
    activations: bool = False,
    blocks: int = 4,
    dtype: str = "float32",
) -> st.SearchStrategy[tuple[nn.Module, tuple[Tensor, ...]]]:
    """Random torch modules in eval mode, each with matching example inputs: pairs ``(module, inputs)``.

    ``inputs`` is a tuple of one tensor; its extents have both parities and reach the borders of all kernels.
    Modules and functions, methods and operators are used alike, some modules are called twice, and one
    result in six is a pair. ``axes``, ``activations`` and ``blocks`` are those of `structures`.

    Args:
        dtype: of parameters and inputs: "float32", "float64", "float16" or "bfloat16"; the last two without models
            of three axes, which torch cannot pool in 16 bits on the CPU.
    """
    build_module = _torch_builder("linear_modules")
    if dtype in ("float16", "bfloat16"):
        axes = [n for n in axes if n != 3]
    drawn = structures(axes=axes, activations=activations, blocks=blocks)
    return st.builds(build_module, drawn, dtype=st.just(dtype))


def linear_onnx(
    *,
    axes: Sequence[int] = (2, 1, 3, 0, -1),
    activations: bool = False,
    blocks: int = 4,
    dtypes: Sequence[str] = ("float32",),
) -> st.SearchStrategy[ModelProto]:
    """Random ONNX models that pass the checker and run in ONNX Runtime on the CPU.

    Opset, fixed or symbolic extents, initializers or Constant nodes, and the spelling of every operator (Gemm or
    MatMul and Add, pads or a Pad node, Split or Slice, ...) are drawn as well. ``axes``, ``activations`` and ``blocks``
    are those of `structures`.

    Args:
        dtypes: of parameters and inputs, one of which is drawn: "float32", "float16" or "float64". ONNX Runtime has no
            convolution and no pooling in float64: such models run in ONNX's reference evaluator only,
            unless ``axes`` are 0 and -1.
    """
    from reparamc.testing.onnx_models import OPSETS, build_onnx

    return st.builds(
        build_onnx,
        structures(axes=axes, activations=activations, blocks=blocks),
        dtype=st.sampled_from(tuple(dtypes)),
        opset=st.sampled_from(OPSETS),
        symbolic=st.booleans(),
        constants=st.booleans(),
    )


def branches(
    channels: int = 4, *, out: int | None = None, stride: int = 1, count: int = 3, axes: int = 2, host: str = "torch"
) -> st.SearchStrategy[Any]:
    """``count`` parallel branches of one input that are added up: convolutions, poolings and skips, and what follows.

    Args:
        channels, out: of the input and of the sum (default: the same).
        stride: of every branch, along every axis.
        axes: spatial axes; 0 and -1 are those of `structures`.
        host: "torch" for pairs as of `linear_modules`, "onnx" for models as of `linear_onnx`.
    """
    drawn = branch_structures(channels, out or channels, stride, count, axes)
    if host == "torch":
        return st.builds(_torch_builder("branches"), drawn)
    if host != "onnx":
        raise InputError(f"host is 'torch' or 'onnx', not {host!r}")
    from reparamc.testing.onnx_models import build_onnx

    return st.builds(build_onnx, drawn, symbolic=st.booleans())


def batchnorm_states(channels: int) -> st.SearchStrategy[Arrays]:
    """Parameters and statistics of a BatchNorm: float64 arrays weight, bias, running_mean and running_var.

    All have weights of both signs and means away from zero; some have weights of zero, small variances or large
    means. For torch, make tensors of them and load these by ``norm.load_state_dict(tensors, strict=False)``.
    """
    return st.builds(random_state, st.just(channels), st.sampled_from(BATCHNORM_KINDS), SEEDS)


def random_state(channels: int, kind: str, seed: int) -> Arrays:
    """As `batchnorm_state`, from a seed."""
    return batchnorm_state(channels, kind, np.random.default_rng(seed))
