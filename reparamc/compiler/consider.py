"""What becomes of one region: lifted into an expression, simplified, priced and checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import count
from math import inf, isclose, sqrt
from typing import TYPE_CHECKING, Any, cast

import ml_dtypes
import numpy as np

from reparamc.algebra.arrays import Parameter, Rounded, is_moderate, values
from reparamc.algebra.cost import Objective
from reparamc.algebra.expr import Array, Conv, Expr, array_fields, arrays, flatten, release, replaced, walk
from reparamc.algebra.infer import misfit
from reparamc.algebra.kernels import OF_THIS_SHAPE
from reparamc.algebra.provenance import names_through
from reparamc.algebra.records import entity, record, replace
from reparamc.algebra.rewrite import Declined, Pass, simplify
from reparamc.algebra.text import show
from reparamc.compiler.graph import Graph, Splice, not_native
from reparamc.compiler.readings import Reading, Value, is_norm, values_in
from reparamc.compiler.regions import LIFT, lifted
from reparamc.compiler.small_maps import REFUSED, refuses_more
from reparamc.report.data import FailedRegion

if TYPE_CHECKING:  # without verification it is not needed
    from reparamc.compiler.reference import Reference


@record
class Setting:
    """What every decision asks for: a graph with its readings, what to do, and by which prices.

    ``reference`` is what the framework's own operators said; None where nothing is to be checked. ``described``: see
    `reparamc.compiler.host.Options`.
    """

    graph: Graph
    readings: dict[Value, Reading]
    passes: Sequence[Pass]
    objective: Objective
    reference: Reference | None
    described: bool = True


@record
class Decision:
    """What becomes of one region: its final form, the splice that makes it so, what was declined, what went wrong.

    ``apart`` are members without which the rest may be rewritten: they take maps that a convolution refuses, or would
    be computed several times.
    """

    expr: Expr
    splice: Splice | None
    refusals: Sequence[Declined]
    members: tuple[Value, ...]
    failed: bool = False
    apart: frozenset[Value] = frozenset()


def consider(
    setting: Setting, parts: Sequence[tuple[Value, ...]], most: float = inf, start: Form | None = None
) -> tuple[Decision, Form]:
    """What becomes of a region, and its form: ``parts`` are its members, and those of the regions joined to it.

    It stays as it is if it cannot be made cheaper than ``most``. ``start`` is the form of the first of ``parts``.
    """
    form = _simplified(setting, parts, start)
    decision = _decided(setting, form, _in_order(parts, setting.readings), most)
    if decision.splice is not None:
        hold_rounded(setting, decision.splice, lambda: _simplified(setting, form.parts, None).after)
    release(form.before)
    return decision, form


def _decided(setting: Setting, found: Form, members: tuple[Value, ...], most: float) -> Decision:
    before, after, refusals = found.before, found.after, found.refusals
    if not found.counts:
        return Decision(before, None, refusals, members)
    cost, price = map(setting.objective.cost, (before, after))
    if isclose(price, cost, rel_tol=1e-12) or not price < most:
        return Decision(before, None, refusals, members)  # it may be another way to say the same
    if sum(map(is_norm, walk(after))) > sum(map(is_norm, walk(before))):  # one for each of several users
        return Decision(before, None, (), members, apart=frozenset(v for v in members[:-1] if is_norm(found.exprs[v])))
    native = {e: v for v, e in found.exprs.items() if v != members[-1]}
    native.update((found.exprs[v], v) for v in found.exprs if v not in members)  # not what hands operands on
    splice: Splice | Declined | FailedRegion = Declined("the rewritten form would cost more than it saves")
    if price < cost or not _is_moderate(before):
        splice = checked(setting, members, before, after, native, found.counts)
    if isinstance(splice, Splice):
        return Decision(after, replace(splice, origins=found.origins), refusals, members)
    reason = splice.reason if isinstance(splice, Declined) else f"it failed its check: {splice.reason}"
    refusals = [*refusals, Declined(reason, by=found.last)]
    convs = [(v, e) for v in members[:-1] if isinstance(e := found.exprs[v], Conv)]
    apart = frozenset(
        v for v, e in convs if (reason == REFUSED and e.is_weightless) or (reason == OF_THIS_SHAPE and e.reads_taps)
    )
    return Decision(before, None, refusals, members, isinstance(splice, FailedRegion), apart)


@entity
class Form:
    """A region as it is and in its final form, what its values compute, and what was done and declined.

    ``last`` is the pass that was applied last. ``origins`` says which parameters the arrays of both are made from, by
    their ids.
    """

    parts: Sequence[tuple[Value, ...]]
    before: Expr
    after: Expr
    exprs: dict[Value, Expr]
    counts: Counter[str]
    last: str
    refusals: Sequence[Declined]
    origins: dict[int, frozenset[str]]


def _simplified(setting: Setting, parts: Sequence[tuple[Value, ...]], start: Form | None) -> Form:
    """Lift and simplify each part while the result of the next one still is an operand."""
    form = start
    for part in parts[0 if start is None else len(start.parts) :]:
        exprs = {} if form is None else dict(form.exprs)
        joint = exprs.pop(part[-1], None)
        lifted(setting.graph, part, setting.readings, exprs)
        before = after = flatten(exprs[part[-1]])
        named: dict[int, frozenset[str]] = {}
        if setting.described:
            named = {id(a): frozenset(a.names if isinstance(a, Parameter) else ()) for a in _held(before)}
        if form is not None and joint is not None:
            moved = replaced((form.before, form.after, *exprs.values()), joint, before)
            before, after = flatten(moved[form.before]), flatten(moved[form.after])
            exprs = {v: moved[e] for v, e in exprs.items()}
            named |= form.origins
        if reason := misfit(after):
            return Form(parts, before, before, exprs, Counter[str](), "", [Declined(reason, by=LIFT)], {})
        with np.errstate(all="ignore"):  # whatever is not finite is refused by the check
            outcome = simplify(after, setting.passes, setting.objective)
        names = names_through(named, outcome.steps) if setting.described else {}
        held = (*_held(before), *_held(outcome.expr)) if setting.described else ()
        counts = Counter[str]() if form is None else Counter(form.counts)
        counts.update(step.name for step in outcome.steps)
        last = outcome.steps[-1].name if outcome.steps else form.last if form is not None else ""
        origins = {id(a): names[id(a)] for a in held if id(a) in names}
        form = Form(parts, before, outcome.expr, exprs, counts, last, outcome.refusals, origins)
    assert form is not None
    return form


def hold_rounded(setting: Setting, splice: Splice, again: Callable[[], Expr]) -> None:
    """Have a replacement hold its large arrays as they are stored, which takes half of the memory or less.

    It stays the same: what asks for them in float64, such as a region that is joined, has them computed ``again``.
    """
    if setting.reference is not None or setting.described or splice.original is None:
        return

    def computed(place: int) -> Array:
        found = again()
        array = values(_held(found)[place])
        release(found)
        return array

    given, place = {id(a) for a in _held(splice.original)}, count()
    for e in walk(splice.expr):
        for name, a in array_fields(e).items():
            at = next(place)
            if type(a) is np.ndarray and a.size > LARGE and id(a) not in given:
                vars(e)[name] = Rounded(a.astype(splice.dtype), partial(computed, at))


LARGE = 2**13
"""Numbers of an array from which on it matters how it is held."""


def _held(root: Expr) -> list[Array]:
    return [a for e in walk(root) for a in arrays(e)]


def _in_order(parts: Sequence[tuple[Value, ...]], readings: dict[Value, Reading]) -> tuple[Value, ...]:
    """The members of all ``parts``, in execution order."""
    if len(parts) == 1:
        return parts[0]
    place = {value: n for n, value in enumerate(readings)}
    return tuple(sorted({v for part in parts for v in part}, key=place.__getitem__))


def checked(
    setting: Setting,
    members: tuple[Value, ...],
    before: Expr,
    after: Expr,
    native: dict[Expr, Value],
    counts: Counter[str],
) -> Splice | Declined | FailedRegion:
    """``after`` in the place of ``members``, whose expression is ``before``, if that can be done and is right.

    Args:
        members: in execution order; the last one is what is computed.
        native: what existing values compute.
        counts: applications of each pass.
    """
    graph, readings, reference = setting.graph, setting.readings, setting.reference
    root = members[-1]
    sources = list(dict.fromkeys(values_in(v for m in members for v in readings[m].operands if v not in members)))
    refuse = _obstacle(graph, root, members, sources, before, after, native)
    if refuse is not None:
        return Declined(refuse)
    error = reference.checked(members, before, after, tuple(counts)) if reference is not None else None
    if isinstance(error, FailedRegion):
        return error
    dtype = graph.dtype(members)
    assert dtype is not None
    parameters = tuple(dict.fromkeys(p for v in members for p in readings[v].parameters))
    text = (show(before), show(after)) if setting.described else ("", "")
    return Splice(root, members, after, native, dtype, counts, parameters, *text, error, original=before)


def _obstacle(
    graph: Graph,
    root: Value,
    members: Sequence[Value],
    sources: Sequence[Value],
    before: Expr,
    after: Expr,
    native: dict[Expr, Value],
) -> str | None:
    if not _is_moderate(before):
        return "a parameter is NaN, infinite, or too large"
    dtype = graph.dtype(members)
    if dtype is None:
        return "its values have different dtypes, or an unknown one"
    made = list(not_native(after, native))
    for e in made:
        if isinstance(e, Conv) and not e.is_weightless and e.skips_border:
            return "the rewritten form would have to leave out values at the border"
        for a in arrays(e):
            if (reason := rounding_obstacle(a, dtype)) is not None:
                return reason
    if refuses_more(before, after, made, graph.pools_clamp):
        return REFUSED
    return graph.obstacle(root, members, sources, made)


def _is_moderate(e: Expr) -> bool:
    return all(map(is_moderate, _held(e)))


def rounding_obstacle(array: Array, dtype: np.dtype) -> str | None:
    """Why ``array`` (float64) must not be stored as ``dtype``; None when it may.

    A value beyond the largest number of the type would become infinite; a row whose every value is
    below the smallest normal number would lose its digits. A vector counts as one row.
    """
    least, most = _ends(dtype)
    array = values(array)
    if array.ndim < 2 and least * array.size < sqrt(np.vdot(array, array)) <= most:
        return None
    by_row = np.reshape(array, (array.shape[0] if array.ndim > 1 else 1, -1))
    norms = np.sqrt(np.einsum("ij,ij->i", by_row, by_row))
    if np.all((norms <= most) & (norms > least * by_row.shape[1])):
        return None  # no row is that small, and no value that large: mostly, this is all there is to read
    rows = np.maximum(by_row.max(axis=1, initial=0.0), -by_row.min(axis=1, initial=0.0))
    if not np.isfinite(rows).all():
        return "a folded parameter is NaN or infinite (a variance of zero without epsilon, or a negative one)"
    if rows.max(initial=0.0) > most:
        return f"a folded parameter exceeds the range of {dtype}"
    if np.any((rows > 0) & (rows < least)):
        return f"a folded parameter falls below the range of {dtype}"
    return None


@cache
def _ends(dtype: np.dtype) -> tuple[float, float]:
    """The smallest normal number and the largest."""
    info: Any = cast(Any, ml_dtypes).finfo(dtype)
    return float(info.smallest_normal), float(info.max)
