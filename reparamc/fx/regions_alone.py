"""Each region of a fused torch module alone, fed with the original's own values.

Both graphs are interpreted node by node. Where a region ends, what it computed is noted and then replaced by the value
that the original computes there. So every region starts from the same numbers in both, and no difference grows
from one to the next, however the model amplifies rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from reparamc.equivalence.end_to_end import Alone, Region
from reparamc.fx.runnable import array, own_randomness, perturbed, plain, unchanged


def run_alone(
    original: fx.GraphModule,
    fused: fx.GraphModule,
    regions: Sequence[Region],
    places: Mapping[str, str],
    args: Sequence[Any],
) -> Alone | None:
    """Every region, and every output, from the values that the original has before it; None if either cannot run.

    Args:
        original: the graph before fusion, its nodes named as then.
        places: the name of the node in ``fused`` that stands for each root.
        args: what the graphs are called with, by position.
    """
    there = {node.name for node in original.graph.nodes}, {node.name for node in fused.graph.nodes}
    roots = [r.root for r in regions if places.get(r.root) in there[1]]  # others have become dead
    if not roots or not there[0].issuperset(roots):
        return None
    operands = dict.fromkeys(v for r in regions for v in r.operands)
    here = {name: [name] for name in (*operands, *roots)}
    at: dict[str, list[str]] = {}
    for root in roots:
        at.setdefault(places[root], []).append(root)
    try:
        result, values = _interpreted(original, here, {}, args)
        expected = plain(result) | _arrays(values)
        result, found = _interpreted(fused, at, {root: values[root] for root in roots}, args)
        actual = plain(result) | _arrays(found)
        noises = []
        for seed in range(2):
            given = perturbed({v: values[v] for v in operands if v in values}, seed)
            result, found = _interpreted(original, here, given, args)
            noises.append(plain(result) | _arrays(found))
    except Exception:  # whatever a graph raises in which values are replaced
        return None
    exact = cache(lambda: _interpreted(original, here, {v: values[v] for v in operands}, args, _InFloat64)[1])
    return Alone(expected, actual, noises, lambda region: array(exact()[region.root]))


def _arrays(values: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: array(value) for name, value in values.items()}


def _interpreted(
    module: fx.GraphModule,
    roots: Mapping[str, Sequence[str]],
    given: Mapping[str, Tensor],
    args: Sequence[Any],
    kind: type[_Interpreter] | None = None,
) -> tuple[Any, dict[str, Tensor]]:
    """The result of ``module``, and what it computes at ``roots`` before that is replaced by what is ``given``."""
    args = pytree.tree_map_only(Tensor, Tensor.clone, list(args))
    with unchanged(module), torch.no_grad(), own_randomness(module):
        run = (kind or _Interpreter)(module, roots, given)
        return run.run(*args), run.found


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, roots: Mapping[str, Sequence[str]], given: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self.roots, self.given = roots, given
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = self.computed(n)
        if not isinstance(result, Tensor):
            return result
        for root in self.roots.get(n.name, ()):
            self.found[root] = result.detach().clone()
        for root in self.roots.get(n.name, ())[:1]:
            value = self.given.get(root)
            if value is not None and value.shape == result.shape:
                try:
                    result.copy_(value)  # what shares its memory is to see it, too
                except RuntimeError:  # its elements share memory among themselves
                    result = value.clone()
        return result

    def computed(self, n: fx.Node) -> Any:
        return super().run_node(n)


class _InFloat64(_Interpreter):
    """The same with all floating values in float64."""

    def computed(self, n: fx.Node) -> Any:
        return _float64(super().computed(n))

    def fetch_attr(self, target: str) -> Any:
        found = super().fetch_attr(target)
        return copy.deepcopy(found).double() if isinstance(found, nn.Module) else _float64(found)


def _float64(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)
