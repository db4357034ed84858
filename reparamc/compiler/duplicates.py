"""Duplicate removal: regions that compute what an earlier one computes take its result.

It concerns several regions, so it has no rules: the final forms of all are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import fields

from reparamc.algebra.arrays import same
from reparamc.algebra.expr import Conv, Expr, Source, array_fields, arrays, walk
from reparamc.algebra.text import show
from reparamc.compiler.consider import Decision
from reparamc.compiler.graph import Graph, Splice
from reparamc.compiler.plan import Compilation
from reparamc.compiler.readings import Value, values_in


def remove_duplicates(compilation: Compilation, name: str) -> None:
    """Regions that compute what an earlier one computes from the same values take its result."""
    decisions = compilation.decisions
    ordered = {root: decisions[root] for root in sorted(decisions, key=compilation.place)}
    for root, first, splice in _find_duplicates(compilation.graph, ordered, name):
        if compilation.is_read_right(splice, (*ordered[first].members, *splice.members)):
            decisions[root] = Decision(splice.expr, splice, [], splice.members)


def _find_duplicates(
    graph: Graph, decisions: Mapping[Value, Decision], name: str
) -> Iterator[tuple[Value, Value, Splice]]:
    """The root of each such region, that of the earlier one, and what to put in its place."""
    alike: dict[Hashable, list[Value]] = {}
    for root, decision in decisions.items():
        nodes = list(walk(decision.expr))
        values = [root, *(e.key for e in nodes if isinstance(e, Source))]
        if any(isinstance(e, Conv) for e in nodes) and not any(map(graph.is_written, values_in(values))):
            alike.setdefault(_form(nodes), []).append(root)
    for roots in alike.values():
        firsts: list[Value] = []
        for root in roots:
            old = decisions[root]
            first = next((f for f in firsts if _equal(decisions[f].expr, old.expr)), None)
            dtype = None if first is None else graph.dtype([root, first])
            if first is None or dtype is None:
                firsts.append(root)
                continue
            same = Source(first)
            text, count = show(old.expr), Counter({name: 1})
            yield root, first, Splice(root, old.members, same, {same: first}, dtype, count, (), text, show(same), 0.0)


def _form(nodes: Sequence[Expr]) -> Hashable:
    """The kinds of the nodes of an expression, what they read, and the shapes of the parameters that they hold."""
    place = {e: at for at, e in enumerate(nodes)}

    def told(e: Expr) -> Hashable:
        return type(e), tuple(place[x] for x in e.children), tuple(a.shape for a in arrays(e))

    return tuple(str(e.key) if isinstance(e, Source) else told(e) for e in nodes)


def _equal(a: Expr, b: Expr) -> bool:
    """Whether two expressions of one form hold the same numbers, over the same values."""
    for x, y in zip(walk(a), walk(b), strict=True):
        held = array_fields(x)
        beside = [f.name for f in fields(x) if f.name not in ("x", "terms", *held)]
        if any(getattr(x, name) != getattr(y, name) for name in beside):
            return False
        if not all(same(a, b) for a, b in zip(held.values(), arrays(y), strict=True)):
            return False
    return True
