"""Each fused part of a copy alone, fed with the original's own values.

The copy runs with its parts in place. Where one is called, what the original makes of the same arguments is noted
beside what the fused one makes of them, and the copy goes on with the former. So no difference grows from one part
to the next, and the Python around the parts sees what it sees in the original.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from reparamc.equivalence.difference import Outputs
from reparamc.equivalence.end_to_end import Alone
from reparamc.equivalence.runnable import leaves
from reparamc.fx.outcome import difference, ran
from reparamc.fx.runnable import perturbed, plain
from reparamc.fx.watch import Call, replaced

NOISES = 2
FEW = 8
"""Units of rounding, relative to the largest value, that are explained in any dtype."""


def run_parts_alone(
    copy: nn.Module, parts: Mapping[int, tuple[str, nn.Module]], call: Call, expected: Outputs
) -> Alone | None:
    """Every part, and every output of ``copy``, from the values of the original; None where it does not run.

    Args:
        parts: by the id of a fused part, its name, and the module that it replaces.
        expected: what the original makes of ``call``.
    """
    seen: dict[str, list[list[Any]]] = {}
    thread, plain_call, inside = threading.get_ident(), nn.Module.__call__, [False]

    def apart(module: nn.Module, given: Call) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, given)
        inside[0] = True
        try:
            with torch.random.fork_rng(devices=[]):
                return plain_call(module, *args, **kwargs)
        finally:
            inside[0] = False

    def fed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        where, old = parts.get(id(self), ("", self))
        if where and not inside[0] and threading.get_ident() == thread:
            given = args, kwargs
            found = [apart(old, given), apart(self, given)]
            if difference(found[1], found[0], most=FEW):  # or else no noise has to explain it
                found += [apart(old, perturbed(given, n)) for n in range(NOISES)]
            found += found[:1] * (2 + NOISES - len(found))
            seen.setdefault(where, []).append(pytree.tree_map_only(Tensor, Tensor.clone, found))
        return plain_call(old, *args, **kwargs)

    try:
        with replaced("__call__", fed, plain_call):
            result = plain(ran(copy, call))
    except Exception:  # whatever a wrong part raises
        return None
    columns = [{where: _joined(calls, n) for where, calls in seen.items()} for n in range(2 + NOISES)]
    return Alone({**expected, **columns[0]}, {**result, **columns[1]}, columns[2:])


def _joined(calls: Sequence[Sequence[Any]], column: int) -> npt.NDArray[np.float64]:
    """All numbers in some results one after the other, each relative to the largest that its tensor should have."""
    found = [np.zeros(0)]
    for results in calls:
        expected, actual = dict(leaves(results[0])), dict(leaves(results[column]))
        for place, value in expected.items():
            other = actual.get(place)
            if isinstance(value, Tensor) and isinstance(other, Tensor) and value.numel() and not value.is_complex():
                size = value.detach().double().abs().nan_to_num(posinf=0.0).max().item() or 1.0
                found.append((other.detach().double() / size).cpu().numpy().ravel())
    return np.concatenate(found)
