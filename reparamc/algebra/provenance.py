"""Which parameters the arrays of a rewritten expression are made from, told from the steps that led to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reparamc.algebra.expr import ONE, ZERO, Expr, arrays, walk
from reparamc.algebra.rewrite import Step

Names = frozenset[str]


def names_through(named: Mapping[int, Names], steps: Sequence[Step]) -> dict[int, Names]:
    """The parameters that each array is made from, by its id: ``named``, and those of the arrays that ``steps`` made.

    A new array is made from those of all operators that its step took away: from no others, but where one step makes
    several operators, perhaps not from all.
    """
    found = dict(named)
    known: set[Expr] = set()
    for step in steps:
        known.update(walk(step.before, stop=known.__contains__))
        made = list(walk(step.after, stop=known.__contains__))
        kept = known.intersection(made)
        gone = [e for e in walk(step.before, stop=kept.__contains__) if e not in kept]
        names = Names().union(*(found.get(id(a), Names()) for e in gone for a in arrays(e)))
        for e in made:
            for a in arrays(e):
                if a is not ONE and a is not ZERO:
                    found.setdefault(id(a), names)
        known.update(made)
    return found
