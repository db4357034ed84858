"""What a module makes of its arguments, compared: tensors, and all that holds them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from reparamc.equivalence.runnable import leaves
from reparamc.fx.runnable import same_random_numbers, without_gradients
from reparamc.fx.watch import Call

ROUNDING = 100
"""Units of rounding, relative to the largest value, by which a traced graph may differ without a second look."""


def ran(module: Callable[..., Any], call: Call) -> Any:
    """What ``module`` makes of copies of the arguments; random operators draw the same numbers each time.

    It runs without gradients, unless it asks for some itself.

    Raises:
        Exception: whatever it raises.
    """

    def once() -> Any:
        devices = [t.device for t in pytree.tree_leaves(call) if isinstance(t, Tensor)]
        with same_random_numbers(devices), warnings.catch_warnings():
            args, kwargs = pytree.tree_map_only(Tensor, _copied, call)
            warnings.simplefilter("ignore")
            return module(*args, **kwargs)

    return without_gradients(once)


def _copied(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_(t.requires_grad)


def difference(actual: Any, expected: Any, wavering: Callable[[], Any] | None = None, *, most: float = ROUNDING) -> str:
    """How two results differ in more than rounding, by ``most`` units; empty where they do not.

    ``wavering`` gives what becomes of ``expected`` where inputs change at rounding level; it is asked when values
    differ by more than a few units of rounding.
    """
    found, wanted = leaves(actual, types=True), leaves(expected, types=True)
    if [p for p, _ in found] != [p for p, _ in wanted]:
        return "it returns another structure"
    noise: dict[str, Any] | None = None
    for (path, a), (_, e) in zip(found, wanted, strict=True):
        if not isinstance(e, Tensor) or not isinstance(a, Tensor):
            if not _equal(a, e):
                return f"{path} is {_shown(a)} instead of {_shown(e)}"
            continue
        a, e = _dense(a), _dense(e)
        if (a.shape, a.dtype) != (e.shape, e.dtype):
            return f"{path} is of another shape or dtype"
        error, epsilon = _error(a, e)
        if error > most * epsilon and wavering is not None:
            noise = dict(leaves(wavering())) if noise is None else noise
            other = noise.get(path)
            if isinstance(other, Tensor) and other.shape == e.shape:
                epsilon = max(epsilon, _error(other, e)[0] / 10)
        if error > most * epsilon:
            return f"{path} differs by {error:.1e} of its largest value"
    return ""


def another_structure(literal: Any, expected: Any) -> str:
    """How the containers in ``literal`` are others than in ``expected``, where nodes of a graph stand for anything."""
    wanted = dict(leaves(expected, types=True))
    literal = pytree.tree_map_only(fx.Node, lambda n: 0, literal)
    for path, kind in leaves(literal, types=True):
        if isinstance(kind, type) and wanted.get(path) is not kind:
            other = wanted.get(path)
            return f"{path} is {_shown(kind)} instead of {_shown(other if isinstance(other, type) else type(other))}"
    return ""


def _dense(t: Tensor) -> Tensor:
    """``t`` as an ordinary tensor that holds the same numbers."""
    if t.is_nested:
        return torch.cat([inner.reshape(-1) for inner in t.unbind()])
    if t.is_quantized:
        return t.dequantize()
    return t if t.layout == torch.strided else t.to_dense()


def _equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, int | float | str | bytes | complex | type(None) | type):
        return a == b or a != a
    return True


def _shown(value: Any) -> str:
    return (
        value.__name__
        if isinstance(value, type)
        else type(value).__name__
        if isinstance(value, Tensor)
        else repr(value)[:40]
    )


def _error(a: Tensor, e: Tensor) -> tuple[float, float]:
    """The largest difference relative to the largest value, and the unit of rounding."""
    if not e.is_floating_point() and not e.is_complex():
        return (0.0 if torch.equal(a, e) else float("inf")), 0.0
    if torch.equal(a, e) or not e.numel():
        return 0.0, 0.0
    epsilon = torch.finfo(e.dtype).eps
    a, e = (t.detach().to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, e))
    both = (a == e) | ((a != a) & (e != e))
    off = torch.where(both, torch.zeros_like(e.abs()), (a - e).abs())
    size = e.abs()[e.abs().isfinite()]
    largest = size.max().item() if size.numel() else 0.0
    worst = off.max().item()
    return (worst / largest if largest else float("inf") if worst else 0.0) if worst == worst else float("inf"), epsilon
