"""Joining: regions with the region that computes what they read.

A value that one region uses several times, and a convolution of which each region takes other channels.

Such a value ends a region of its own at first. Then the two are joined and considered as one, the outer first:
where its branches merge, the value is used once, and the sequence becomes one operator, rounded once. They stay
joined if that is cheaper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from reparamc.algebra.cost import multiply_adds
from reparamc.algebra.expr import Conv, Expr, Select, Source, replaced, walk
from reparamc.compiler.consider import Decision, Setting, consider
from reparamc.compiler.readings import Value
from reparamc.compiler.regions import linear_users

MOST_JOINED = 16
"""Regions that are considered as one: work stays in proportion to the graph."""


MOST_PARTS = 4
"""Regions that may take channels of one convolution."""

FEWER = 0.99
"""Of the multiply-adds: to compute a convolution in parts pays if a part becomes one with what follows it."""


def joined(setting: Setting, decisions: dict[Value, Decision]) -> dict[Value, Decision]:
    """``decisions``, with regions joined where one alone reads the result of another, several times, if that pays."""
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
        if len(chain) > MOST_JOINED:
            continue
        whole = consider(setting, chain)
        if whole.splice is not None and cost(whole.expr) < cost(_composed(root, first.expr, second.expr)):
            del decisions[root]
            decisions[outer], parts[outer] = whole, chain
            home.update((v, {outer}) for v in first.members)
    return decisions


def parted(setting: Setting, decisions: dict[Value, Decision]) -> dict[Value, Decision]:
    """``decisions``, with a convolution in as many parts as there are regions that take channels of it, if that pays.

    All regions get their parts, or none.
    """
    home = _homes(decisions)
    for root in list(decisions):
        users = linear_users(setting.graph, setting.readings, root)
        outers = {outer for user in users for outer in home.get(user, (None,))} - {root}
        first = decisions[root]
        if None in outers or not 1 < len(outers) <= MOST_PARTS or any(home[v] != {root} for v in first.members):
            continue
        if not all(map(setting.graph.users, outers)):
            continue  # nothing reads a part
        if not all(isinstance(setting.readings[u].template, Select) for u in users if u is not None):
            continue
        found = {o: consider(setting, (decisions[o].members, first.members)) for o in outers if o is not None}
        before = [first.expr, *(decisions[o].expr for o in found)]
        cheaper = all(
            sum(map(cost, (d.expr for d in found.values()))) < share * sum(map(cost, before))
            for cost, share in ((setting.objective.cost, 1.0), (_in_kernels, FEWER))
        )
        if cheaper and all(d.splice is not None for d in found.values()):
            del decisions[root]
            for outer, d in found.items():
                decisions[outer] = replace(d, splice=d.splice and replace(d.splice, shared=root))
                for v in d.members:
                    home[v].add(outer)
    return decisions


def _in_kernels(expr: Expr) -> float:
    """The multiply-adds of kernels and matrices."""
    return sum(multiply_adds(e) for e in walk(expr) if isinstance(e, Conv) and not e.is_weightless)


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
