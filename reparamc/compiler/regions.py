"""Where regions end, and what they compute.

A **region** is a maximal tree of linear operators: every member but the root has exactly one user,
and that is a member too. So all members can go when the root is replaced, and nothing is computed
twice because a value was absorbed that is needed elsewhere as well. Finding them is one sweep from the
outputs to the inputs.

There are two exceptions. What scales or moves each channel separately (a BatchNorm before q, k and
v), after something non-linear, is a member of every region that reads it, if all its users are
linear. And a normalization, whose weight and bias are linear, may have several users in one region; or in several,
where parameters count.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from reparamc.algebra.expr import Expr
from reparamc.compiler.graph import Graph
from reparamc.compiler.readings import Reading, Value, is_norm

LIFT = "lift"
"""Takes the place of the name of a pass in a refusal: an operator is not read as the linear one it looks like."""

MOST_SHARED = 8
"""Regions that one value may be a member of."""


def linear_users(graph: Graph, readings: Mapping[Value, Reading], value: Value) -> list[Value | None]:
    """What reads ``value``; None for a user that is not linear in it."""
    return [user if user in readings and value in readings[user].operands else None for user in graph.users(value)]


def find_regions(
    graph: Graph,
    readings: dict[Value, Reading],
    apart: Container[Value] = (),
    ends: Container[Value] = (),
    most_of_norm: int = 1,
) -> dict[Value, tuple[Value, ...]]:
    """The members of each region by its root, both in execution order; values in ``apart`` are shared by none.

    Each of ``ends`` is the root of a region. A normalization may be a member of ``most_of_norm``.
    """
    folds_down: dict[Value, bool] = {}  # after a linear operator that nothing else reads: it goes there
    for value, reading in readings.items():
        x = reading.operands[0]
        only = x in readings and len(graph.users(x)) == 1
        folds_down[value] = only and (not readings[x].commutes or folds_down[x])
    roots_of: dict[Value, tuple[Value, ...]] = {}
    members: dict[Value, list[Value]] = {}
    for value in reversed(list(readings)):
        users = linear_users(graph, readings, value)
        known = all(user in roots_of for user in users)
        roots = tuple(dict.fromkeys(root for user in users for root in roots_of.get(user, ())))
        alone = len(users) == 1 and len(roots) == 1
        free = readings[value].commutes and value not in apart and not folds_down[value]
        norm = is_norm(readings[value].template)
        most = MOST_SHARED if free else (1 if value in apart else most_of_norm) if norm else 0
        shared = 0 < len(roots) <= most
        roots_of[value] = roots = roots if known and value not in ends and (alone or shared) else (value,)
        for root in roots:
            members.setdefault(root, []).append(value)
    return {root: tuple(reversed(members[root])) for root in readings if root in members}


def lifted(
    graph: Graph, members: Sequence[Value], readings: dict[Value, Reading], exprs: dict[Value, Expr]
) -> dict[Value, Expr]:
    """``exprs``, with the expressions of ``members`` and of their operands, as sources, added to it."""
    for value in members:
        for operand in readings[value].operands:
            if operand not in exprs:
                exprs[operand] = graph.source(operand)
        if value not in exprs:
            exprs[value] = readings[value].over(exprs)
    return exprs
