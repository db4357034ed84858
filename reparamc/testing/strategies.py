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
from reparamc.testing.sketch import AXES, SEEDS, Choice, sketched, sketched_branches
from reparamc.testing.structure import BATCHNORM_KINDS, Arrays, Structure, batchnorm_state

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor, nn


@st.composite
def structures(draw: st.DrawFn, *, axes: Sequence[int] = AXES, activations: bool = False, blocks: int = 4) -> Structure:
    """What the models of this module are made from; see `reparamc.testing.structure.Structure`.

    Args:
        axes: spatial axes of the input, of which one is drawn: 1, 2, 3; 0 for [N, C], and -1 for tokens [N, L, C].
        activations: whether there are non-linear operators between blocks.
        blocks: at most so many, each a single operator or a group of them. A head over tokens may follow.
    """
    return sketched(_by(draw), tuple(axes), activations, blocks)


@st.composite
def branch_structures(draw: st.DrawFn, channels: int, out: int, stride: int, count: int, axes: int) -> Structure:
    """Parallel branches of one input that are added up, and nothing else; see `branches`."""
    return sketched_branches(_by(draw), channels, out, stride, count, axes)


def _by(draw: st.DrawFn) -> Choice:
    return lambda low, high: draw(st.integers(low, high))


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
    axes: Sequence[int] = AXES,
    activations: bool = False,
    blocks: int = 4,
    dtype: str = "float32",
) -> st.SearchStrategy[tuple[nn.Module, tuple[Tensor, ...]]]:
    """Random torch modules in eval mode, each with matching example inputs: pairs ``(module, inputs)``.

    ``inputs`` is a tuple of one tensor; its sizes have both parities and reach the borders of all kernels.
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
    axes: Sequence[int] = AXES,
    activations: bool = False,
    blocks: int = 4,
    dtypes: Sequence[str] = ("float32",),
) -> st.SearchStrategy[ModelProto]:
    """Random ONNX models that pass the checker and run in ONNX Runtime on the CPU.

    Opset, fixed or symbolic sizes, initializers or Constant nodes, and the spelling of every operator (Gemm or
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
    return st.builds(random_state, st.just(channels), st.sampled_from(BATCHNORM_KINDS), st.integers(0, SEEDS))


def random_state(channels: int, kind: str, seed: int) -> Arrays:
    """As `batchnorm_state`, from a seed."""
    return batchnorm_state(channels, kind, np.random.default_rng(seed))
