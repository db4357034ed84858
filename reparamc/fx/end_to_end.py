"""End-to-end verification of torch modules: original and copy on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from reparamc.equivalence.difference import Outputs
from reparamc.equivalence.end_to_end import Alone, Region, compare_models
from reparamc.equivalence.pair import Pair
from reparamc.equivalence.trials import another_shape
from reparamc.fx.runnable import floats, perturbed, run
from reparamc.report.data import OutputError

Given = tuple[tuple[Any, ...], dict[str, Any]]


def verify_end_to_end(
    original: nn.Module,
    fused: nn.Module,
    trials: Sequence[tuple[Given, Outputs]],
    regions: Sequence[Region] = (),
    alone: Callable[[Given], Alone | None] = lambda given: None,
) -> list[OutputError]:
    """Run ``fused`` on arguments, and compare every output tensor with what ``original`` makes of them.

    What is allowed, returned and raised, and when ``regions`` (what was rewritten) are compared one by one:
    `compare_models`.
    """
    pair = Pair(lambda given: run(original, *given), lambda given: run(fused, *given), perturb=perturbed)
    coarsest = max((epsilon_of(original, given) for given, _ in trials), default=0.0)
    return compare_models(pair, trials, lambda *_: coarsest, regions, alone)


def epsilon_of(model: nn.Module, given: Given) -> float:
    """The machine epsilon to judge results by: the coarsest of the parameters' and the inputs'."""
    return max((torch.finfo(t.dtype).eps for t in (*floats(model), *_floats(given))), default=0.0)


def _floats(given: Given) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(given) if isinstance(t, Tensor) and t.is_floating_point()]


def resized(given: Given, channels: int, step: int = 1) -> Given:
    """Arguments of another batch, all other axes of `another_shape` but for axis ``channels`` of those with three."""
    generator = torch.Generator().manual_seed(channels)
    return pytree.tree_map_only(Tensor, lambda t: _resized(t, channels, step, generator), given)


def _resized(t: Tensor, channels: int, step: int, generator: torch.Generator) -> Tensor:
    if t.ndim < 2 or not t.numel():
        return t
    shape = another_shape(t.shape, channels if t.ndim == 3 else 1, step)
    if t.is_floating_point():
        drawn = torch.randn(shape, generator=generator).to(t.device) * t.double().std(correction=0) + t.double().mean()
        return drawn.to(t.dtype)
    for axis, n in enumerate(shape):  # indices and masks stay what they may be
        t = t.index_select(axis, torch.arange(n, device=t.device) % t.shape[axis])
    return t
