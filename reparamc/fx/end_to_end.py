"""End-to-end verification of torch modules: original and copy on the same inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from reparamc.equivalence.end_to_end import Alone, Region, compare_outputs
from reparamc.errors import VerificationError, one_line
from reparamc.fx.trace import copied
from reparamc.report.data import OutputError

Given = tuple[tuple[Any, ...], dict[str, Any]]


def verify_end_to_end(
    original: nn.Module,
    fused: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    expected: dict[str, np.ndarray] | None = None,
    regions: Sequence[Region] = (),
    alone: Callable[[tuple[Any, ...], dict[str, Any]], Alone | None] = lambda args, kwargs: None,
    *,
    resize: bool = True,
) -> list[OutputError]:
    """Run both modules on the example inputs, in their own dtype, and compare every output tensor.

    With ``resize``, inputs of another batch and other parities are tried, too, where the original takes them. The
    tolerance comes from the original's response to a perturbation of its inputs at rounding level.
    ``expected`` is the result of the original, where it is known already. Where that says too little, or an
    output differs by more, ``regions`` (what was rewritten) are compared one by one; see `compare_outputs`.

    Returns:
        One entry per output, and per region where they were compared, for the inputs that came closest to what is
        allowed.

    Raises:
        VerificationError: the fused model does not run, or an output differs by more than rounding explains; names
            the region that is wrong, or else the output.
    """
    given = args, kwargs
    trials = [(given, run(original, args, kwargs) if expected is None else expected)]
    if resize and (other := _other_sizes(original, given)) is not None:
        trials.append(other)
    worst: dict[tuple[str, bool], OutputError] = {}
    for given, outputs in trials:
        for error in _compared(original, fused, given, outputs, regions, partial(alone, *given)):
            before = worst.setdefault((error.output, error.alone), error)
            if error.closeness > before.closeness:
                worst[error.output, error.alone] = error
    return list(worst.values())


def _compared(
    original: nn.Module,
    fused: nn.Module,
    given: Given,
    expected: dict[str, np.ndarray],
    regions: Sequence[Region],
    alone: Callable[[], Alone | None],
) -> list[OutputError]:
    noises = [run(original, *nudged(given, seed)) for seed in range(3)]
    try:
        actual = run(fused, *given)
    except Exception as error:  # whatever a wrong graph raises
        raise VerificationError(
            f"the fused model does not run: {one_line(error)}. Report this as a bug, with the model",
            where="output",
        ) from error
    epsilon = max((torch.finfo(t.dtype).eps for t in (*model_tensors(original), *_floats(*given))), default=0.0)

    def message(name: str, differs: float, allowed: float) -> str:
        return (
            f"{name} of the fused model differs by {differs:.2g} relative to its largest value, "
            f"{allowed:.1g} is what rounding explains. Report this as a bug, with the model"
        )

    return compare_outputs(expected, actual, noises, lambda _: epsilon, message, regions, alone)


def _other_sizes(original: nn.Module, given: Given) -> tuple[Given, dict[str, np.ndarray]] | None:
    """Arguments of another batch, of which all other open axes have the other parity, and what is made of them.

    None where there are none that ``original`` takes. Of three axes, the middle one or the last are the channels.
    """
    leaves = pytree.tree_leaves(given)
    if not any(isinstance(t, Tensor) and t.ndim > 1 for t in leaves):
        return None
    for channels in (2, 1) if any(isinstance(t, Tensor) and t.ndim == 3 for t in leaves) else (1,):
        generator = torch.Generator().manual_seed(channels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                resized = pytree.tree_map_only(Tensor, lambda t: _resized(t, channels, generator), given)  # noqa: B023
                return resized, run(original, *resized)
            except Exception:  # whatever a module raises that does not know a size
                continue
    return None


SMALL = 64
"""Extents from here on are about halved where another one is tried, so that this costs little."""


def _resized(t: Tensor, channels: int, generator: torch.Generator) -> Tensor:
    if t.ndim < 2:
        return t
    kept = channels if t.ndim == 3 else 1
    shape = [
        n if axis == kept else n + 1 if n < SMALL else n // 2 + (n // 2 - n + 1) % 2 for axis, n in enumerate(t.shape)
    ]
    shape[0] = t.shape[0] + 1
    if t.is_floating_point():
        drawn = torch.randn(shape, generator=generator).to(t.device) * t.double().std(correction=0) + t.double().mean()
        return drawn.to(t.dtype)
    for axis, n in enumerate(shape):  # indices and masks stay what they may be
        t = t.index_select(axis, torch.arange(n, device=t.device) % t.shape[axis])
    return t


def model_tensors(model: nn.Module) -> list[Tensor]:
    return [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]


def _floats(args: Any, kwargs: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]


def run(model: nn.Module, args: Any, kwargs: Any) -> dict[str, np.ndarray]:
    """Every tensor that ``model`` returns, by its place in the result; random operators draw the same numbers."""
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    model = copied(model)  # forward may update buffers
    with torch.no_grad(), own_randomness(model):
        return named(model(*args, **kwargs))


def named(result: Any) -> dict[str, np.ndarray]:
    """Every tensor in ``result`` by its place."""
    leaves, _ = pytree.tree_flatten_with_path(result)
    return {f"output{pytree.keystr(path)}": _array(leaf) for path, leaf in leaves if isinstance(leaf, Tensor)}


@contextmanager
def own_randomness(model: nn.Module) -> Iterator[None]:
    """Random operators draw the same numbers each time, and the caller's generators stay as they are."""
    devices = {t.device.index or 0 for t in model_tensors(model) if t.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        torch.manual_seed(0)
        yield


def _array(leaf: Tensor) -> np.ndarray:
    leaf = leaf.detach()
    leaf = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    return (leaf.double() if leaf.is_floating_point() else leaf).cpu().numpy()


def nudged(given: Any, seed: int) -> Any:
    """``given`` with every floating tensor in it changed at rounding level."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        signs = torch.randint(0, 2, t.shape, generator=generator).to(t.device) * 2.0 - 1
        signs = signs.double()
        return (t.double() * (1 + signs * torch.finfo(t.dtype).eps)).to(t.dtype)

    return pytree.tree_map_only(Tensor, nudge, given)
