"""Example inputs as the arguments of forward, fewer of them, and others of the same kind."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from reparamc.errors import InputError
from reparamc.fx.watch import Call

FEW = 2
"""So many examples of a batch say as much as all of them."""

STRIDE = 32
"""Detectors and segmenters take sizes that are multiples of it."""


def call_of(model: nn.Module, example_inputs: Any) -> Call:
    """``example_inputs`` as arguments of ``model``.

    Raises:
        InputError: its forward does not take them.
    """
    if isinstance(example_inputs, Mapping):
        call: Call = (), dict(example_inputs)
    elif isinstance(example_inputs, tuple | list):
        call = tuple(example_inputs), {}
    else:
        call = (example_inputs,), {}
    try:
        inspect.signature(model.forward).bind(*call[0], **call[1])
    except TypeError as error:
        raise InputError(f"example_inputs do not fit {type(model).__name__}.forward: {error}") from error
    return call


def elements(call: Call) -> int:
    """How many numbers the tensors in ``call`` have."""
    return sum(t.numel() for t in pytree.tree_leaves(call) if isinstance(t, Tensor))


def few(call: Call) -> Call | None:
    """``call`` with the first examples only of what seems to be a batch; None where none does."""
    found = [t for t in pytree.tree_leaves(call) if isinstance(t, Tensor) and t.ndim]
    if any(t.layout != torch.strided for t in found):
        return None
    batches = {t.shape[0] for t in found}
    if len(batches) != 1 or min(batches) <= FEW or all(t.ndim == 1 for t in found):
        return None
    return pytree.tree_map_only(Tensor, lambda t: t[:FEW] if t.ndim else t, call)


def others(call: Call) -> Iterator[Call]:
    """Arguments of other sizes, and then of other values, most of which a model may refuse."""
    from reparamc.fx.end_to_end import resized

    tensors = [t for t in pytree.tree_leaves(call) if isinstance(t, Tensor)]
    if any(t.layout != torch.strided for t in tensors):
        return
    if any(t.ndim > 1 for t in tensors):
        for channels in (2, 1) if any(t.ndim == 3 for t in tensors) else (1,):
            yield resized(call, channels)
    if any(t.ndim == 4 and not t.shape[2] % STRIDE for t in tensors):
        yield resized(call, 1, STRIDE)
    if tensors:
        yield pytree.tree_map_only(Tensor, lambda t: t.flip(tuple(range(t.ndim))) if t.ndim else t, call)


def examples_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor argument, by the name of its placeholder."""
    if not args and not kwargs:
        return {}
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {k: v for k, v in bound.items() if isinstance(v, Tensor)}
