"""Rules, passes, and the fixed point.

A **rule** maps an expression to an equal one. It answers None where it does not apply, `Declined`
where it recognises its pattern and an exactness condition fails, and never mutates or logs.
A **pass** is a named tuple of rules: the unit that users select and that reports count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias, cast, get_args, get_type_hints

from reparamc.algebra.cost import LATENCY, Objective
from reparamc.algebra.expr import Expr, Sum, rebuild, walk
from reparamc.algebra.records import entity, record, replace
from reparamc.errors import InputError, RewriteLimitError


@record
class Declined:
    """A refusal worth telling the user: which condition fails, in one clause.

    ``at_border``: it fails where the map ends, so that a larger part of the graph may satisfy it.
    ``by``: the pass that says so; rules leave it open.
    """

    reason: str
    at_border: bool = False
    by: str = ""


Rule = Callable[[Any], "Expr | Declined | None"]
"""It is asked about the kinds of expression that its first parameter is annotated with."""
PricedRule = Callable[[Any, Objective], "Expr | Declined | None"]


@entity
class Pass:
    """A named rewrite. Those that rules do not make up are the kinds of it in `reparamc.compiler.plan`.

    Attributes:
        name: what users type, such as ``bn-folding``.
        equation: the identity, in one line.
        exact_when: the condition under which it holds.
        rules: tried in order at every node.
        priced: rules that ask for prices; tried after the others.
        refusals: the reasons that it may give, with ``...`` for what depends on the model.
    """

    name: str
    equation: str
    exact_when: str
    rules: tuple[Rule, ...] = ()
    priced: tuple[PricedRule, ...] = ()
    refusals: tuple[str, ...] = ()


@record
class Step:
    """One application of ``rule``, which belongs to the pass ``name``."""

    name: str
    rule: Rule | PricedRule
    before: Expr
    after: Expr


@record
class Outcome:
    """The fixed point, the steps that led to it, and what was declined and is still there."""

    expr: Expr
    steps: tuple[Step, ...]
    refusals: tuple[Declined, ...]


def simplify(root: Expr, passes: Sequence[Pass], objective: Objective = LATENCY) -> Outcome:
    """Apply the rules of ``passes`` until none changes ``root`` or anything below it.

    Every node is tried before its operands (so that a rule which knows a whole block sees it whole)
    and again after them. The result is the same object when nothing applied.

    Raises:
        RewriteLimitError: the rules undo one another.
    """
    return _Simplifier(passes, objective).run(root)


def applies(root: Expr, passes: Sequence[Pass], objective: Objective = LATENCY) -> bool:
    """Whether a rule of ``passes`` changes ``root`` or anything below it."""
    simplifier = _Simplifier(passes, objective)
    return any(simplifier.apply(e) is not e for e in walk(root))


_Rules: TypeAlias = "dict[type, list[tuple[str, Any, bool]]]"


@lru_cache(maxsize=64)
def _by_kind(passes: tuple[Pass, ...]) -> _Rules:
    """The rules for each kind of expression, in order, with the names of their passes, and whether they are priced."""
    found: _Rules = {kind: [] for kind in get_args(Expr)}
    for p in passes:
        for rules, is_priced in ((p.rules, False), (p.priced, True)):
            for rule in rules:
                taken: Any = next(iter(get_type_hints(rule).values()), Any)
                kinds: Iterable[type] = found if taken is Any else get_args(taken) or (taken,)
                for kind in kinds:
                    found[kind].append((p.name, rule, is_priced))
    return found


class _Simplifier:
    def __init__(self, passes: Sequence[Pass], objective: Objective) -> None:
        self.rules, self.objective = _by_kind(tuple(passes)), objective
        self.steps: list[Step] = []
        self.refusals: dict[Expr, list[Declined]] = {}

    def run(self, root: Expr) -> Outcome:
        done: dict[Expr, Expr] = {}  # node -> its fixed point
        becomes: dict[Expr, Expr] = {}  # node -> the node whose fixed point is also its own
        limit = 50 * (len(list(walk(root))) + 20)
        stack = [root]
        while stack:
            e = stack[-1]
            if e in done:
                stack.pop()
                continue
            if e not in becomes:
                becomes[e] = self.apply(e)
            e2 = becomes[e]
            if e2 is not e:
                if e2 in done:
                    done[e] = done[e2]
                else:
                    stack.append(e2)
                if len(self.steps) > limit:
                    raise RewriteLimitError(f"the rules do not terminate; the last was {self.steps[-1].name}")
                continue
            pending = [c for c in e.children if c not in done]
            if pending:
                stack.extend(reversed(pending))
                continue
            rebuilt = rebuild(e, [done[c] for c in e.children])
            if isinstance(rebuilt, Sum) and rebuilt is not e:  # of a sum that a rule has made
                rebuilt = Sum(tuple(t for c, x in zip(e.children, rebuilt.terms, strict=True) for t in _terms(c, x)))
            if rebuilt is e:
                done[e] = e
            else:
                becomes[e] = rebuilt
        final = done[root]
        return Outcome(final, tuple(self.steps), tuple(self._standing(final)))

    def apply(self, e: Expr) -> Expr:
        refusals: list[Declined] = []
        for name, rule, is_priced in self.rules[type(e)]:
            result = rule(e, self.objective) if is_priced else rule(e)
            if isinstance(result, Declined):
                refusals.append(replace(result, by=name))
            elif result is not None and result is not e:
                self.steps.append(Step(name, rule, e, result))
                return result
        if refusals:
            self.refusals[e] = refusals
        return e

    def _standing(self, final: Expr) -> Iterable[Declined]:
        return [r for e in walk(final) for r in self.refusals.get(e, [])]


def _terms(before: Expr, after: Expr) -> tuple[Expr, ...]:
    return after.terms if isinstance(after, Sum) and after is not before else (after,)


def select(passes: Sequence[Pass], only: Iterable[str] | None = None, skip: Iterable[str] = ()) -> tuple[Pass, ...]:
    """The passes named in ``only`` (all, when None) but for those in ``skip``, in their own order.

    Raises:
        InputError: a name that no pass has or that is in both, or something else than names.
    """
    known = [p.name for p in passes]
    wanted = known if only is None else _names("passes", only)
    skipped = _names("skip", skip)
    for name in [*wanted, *skipped]:
        if name not in known:
            raise InputError(f"unknown pass {name!r}; the passes are {', '.join(known)}")
    if only is not None and (both := set(wanted).intersection(skipped)):
        raise InputError(f"the pass {min(both)!r} is both to be applied and to be left out; name it once")
    return tuple(p for p in passes if p.name in wanted and p.name not in skipped)


def _names(argument: str, value: Any) -> list[str]:
    is_list = isinstance(value, Iterable) and not isinstance(value, str | bytes)
    given: list[Any] = list(cast(Any, value)) if is_list else [None]
    names = [name for name in given if isinstance(name, str)]
    if names != given:
        raise InputError(f"{argument} takes the names of passes, as a list, not {value!r}")
    return names
