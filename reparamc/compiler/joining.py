"""Joining: a value that a region uses several times, with the region that computes it.

Such a value ends a region of its own at first. Then the two are joined and considered as one, the outer first:
where its branches merge, the value is used once, and the sequence becomes one operator, rounded once. They stay
joined if that is cheaper.
"""

from __future__ import annotations

from reparamc.algebra.expr import Expr, Source, replaced, walk
from reparamc.compiler.consider import Decision, Setting, consider
from reparamc.compiler.readings import Value
from reparamc.compiler.regions import linear_users

MOST_JOINED = 16
"""Regions that are considered as one: work stays in proportion to the graph."""


def joined(setting: Setting, decisions: dict[Value, Decision]) -> dict[Value, Decision]:
    """``decisions``, with regions joined where one alone reads the result of another, several times, if that pays."""
    cost = setting.objective.cost
    home: dict[Value, set[Value]] = {}  # the roots of the regions that a value is a member of
    for root, decision in decisions.items():
        for value in decision.members:
            home.setdefault(value, set()).add(root)
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


def _composed(root: Value, inner: Expr, outer: Expr) -> Expr:
    """``outer`` with ``inner`` for its operand ``root``, to be priced over the maps that ``inner`` leaves."""
    for e in [e for e in walk(outer) if isinstance(e, Source) and e.key == root]:
        outer = replaced((outer,), e, inner)[outer]
    return outer
