"""Joining: regions with the region that computes what they read.

A value that one region uses several times, and a convolution of which each region takes other channels.

Such a value ends a region of its own at first. Then the two are joined and considered as one, the outer first:
where its branches merge, the value is used once, and the sequence becomes one operator, rounded once. They stay
joined if that is cheaper.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from reparamc.algebra.cost import multiply_adds
from reparamc.algebra.expr import Conv, Expr, Select, Source, Sum, flatten, release, replaced, walk
from reparamc.algebra.records import replace
from reparamc.algebra.rewrite import applies
from reparamc.compiler.consider import Decision, Form, Setting, consider
from reparamc.compiler.readings import Value
from reparamc.compiler.regions import linear_users

MOST_JOINED = 16
"""Regions that are considered as one: work stays in proportion to the graph."""


MOST_PARTS = 4
"""Regions that may take channels of one convolution."""

FEWER = 0.99
"""Of the multiply-adds: to compute a convolution in parts pays if a part becomes one with what follows it."""


def joined(setting: Setting, decisions: dict[Value, Decision], forms: dict[Value, Form]) -> dict[Value, Decision]:
    """``decisions``, made of ``forms``, with regions joined where one alone reads another several times, if it pays."""
    cost = setting.objective.cost
    home = _homes(decisions)
    parts: dict[Value, tuple[tuple[Value, ...], ...]] = {}
    for root in list(decisions):
        users = linear_users(setting.graph, setting.readings, root)
        roots = {outer for user in users for outer in home.get(user, (None,))}
        outer = roots.pop() if len(roots) == 1 and len(users) > 1 else None
        if outer is None or any(home[v] != {root} for v in decisions[root].members):
            continue
        first, second = decisions[root], decisions[outer]
        chain = (*parts.get(outer, (second.members,)), *parts.get(root, (first.members,)))
        apart = _composed(root, first.expr, second.expr)
        if len(chain) > MOST_JOINED or (isinstance(first.expr, Sum) and not _goes_on(setting, apart)):
            continue
        whole, form = consider(setting, chain, cost(apart), forms[outer])
        release(apart)
        if whole.splice is not None:
            del decisions[root]
            decisions[outer], forms[outer], parts[outer] = whole, form, chain
            home.update((v, {outer}) for v in first.members)
    return decisions


def parted(setting: Setting, decisions: dict[Value, Decision]) -> None:
    """A convolution in as many parts as there are regions that take channels of it, where one takes in its part.

    All regions get their parts, or none.
    """
    home = _homes(decisions)
    for root in list(decisions):
        first = decisions[root]
        users = linear_users(setting.graph, setting.readings, root)
        chosen = [setting.readings[u].template for u in users if u is not None]
        outers = {outer for user in users for outer in home.get(user, (None,))} - {root}
        if None in outers or not 1 < len(outers) <= MOST_PARTS or not all(isinstance(e, Select) for e in chosen):
            continue
        second = {o: decisions[o] for o in outers if o is not None}
        if any(home[v] != {root} for v in first.members) or not all(map(setting.graph.users, second)):
            continue
        if not all(_may_be_parted(setting, d) for d in (first, *second.values())):
            continue
        found = {o: consider(setting, (d.members, first.members))[0] for o, d in second.items()}
        rows = sum(len(set(e.index)) / e.width for e in chosen if isinstance(e, Select))
        kernels = rows * _in_kernels([first]) + _in_kernels(second.values())
        if not _in_kernels(found.values()) < FEWER * kernels or not any(_in_kernels([d]) for d in second.values()):
            continue
        if not _price(setting, found.values()) < _price(setting, (first, *second.values())):
            continue
        if all(d.splice is not None for d in found.values()):
            del decisions[root]
            for outer, d in found.items():
                decisions[outer] = replace(d, splice=d.splice and replace(d.splice, shared=root))
                for v in d.members:
                    home[v].add(outer)


def _goes_on(setting: Setting, e: Expr) -> bool:
    """Whether a rule applies to two final forms put together. If none does, a sum (of a residual block) stays apart."""
    with np.errstate(all="ignore"):
        found = applies(flatten(e), setting.passes, setting.objective)
    release(e)
    return found


def _may_be_parted(setting: Setting, decision: Decision) -> bool:
    """Whether a region can be lifted anew, and belongs to no unit of several."""
    alone = decision.splice is None or decision.splice.shared is None
    return alone and all(v in setting.readings for v in decision.members)


def _price(setting: Setting, decisions: Iterable[Decision]) -> float:
    return sum(setting.objective.cost(d.expr) for d in decisions)


def _in_kernels(decisions: Iterable[Decision]) -> float:
    """The multiply-adds of kernels and matrices."""
    kernels = (e for d in decisions for e in walk(d.expr) if isinstance(e, Conv) and not e.is_weightless)
    return sum(map(multiply_adds, kernels))


def _homes(decisions: Mapping[Value, Decision]) -> dict[Value, set[Value]]:
    """The roots of the regions that each value is a member of."""
    home: dict[Value, set[Value]] = {}
    for root, decision in decisions.items():
        for value in decision.members:
            home.setdefault(value, set()).add(root)
    return home


def _composed(root: Value, inner: Expr, outer: Expr) -> Expr:
    """``outer`` with ``inner`` for its operand ``root``, to be priced over the maps that ``inner`` leaves."""
    for e in [e for e in walk(outer) if isinstance(e, Source) and e.key == root]:
        outer = replaced((outer,), e, inner)[outer]
    return outer
