"""Piece folding: a scale of some channels of a convolution goes into the rows that compute them.

    s (W*x + b)[i] + t  =  ((s'W)*x + (s'b + t'))[i]        s', t' = s, t at i, and 1, 0 elsewhere

The convolution ends a region of its own, because several regions select channels of it (q, k and v of one fused
projection). It can be changed for all of them only, and only if no other selection reads the channels i. So all
regions that read it get a replacement over one and the same new convolution, which is emitted with the first of
them. Each replacement is right by itself; all are made or none, because otherwise both convolutions would be computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from reparamc.cost import cost
from reparamc.expr import BatchNorm, Conv, Expr, Scale, Select, Source, flatten, rebuild, walk
from reparamc.graph import Graph, Reading, Value
from reparamc.host import Host
from reparamc.kernel import coefficients
from reparamc.lift import lifted
from reparamc.region import Decision, checked
from reparamc.report import FailedRegion
from reparamc.rewrite import Declined, Pass, Refusal, simplify

PIECES = "piece-folding"

MOST_REGIONS = 16
"""Regions that may read one convolution: work stays in proportion to the graph."""


def fold_pieces(
    graph: Graph,
    readings: dict[Value, Reading],
    decisions: dict[Value, Decision],
    passes: Sequence[Pass],
    host: Host | None,
) -> dict[Value, Decision]:
    """``decisions``, with scales of selected channels in the convolution that these are selected from, where it pays.

    It goes in front of the selection, where ``passes`` have to take it in.
    """
    decisions = dict(decisions)
    place = {value: n for n, value in enumerate(graph.values())}
    readers: dict[Value, list[Value]] = {}  # the regions that read a value
    wanting: dict[Value, list[Value]] = {}  # those that scale what they select
    for root in sorted(decisions, key=place.__getitem__):
        for value, cuts in _cuts(decisions[root].expr).items():
            readers.setdefault(value, []).append(root)
            if any(cut.scales for cut in cuts):
                wanting.setdefault(value, []).append(root)
    folder = _Folder(graph, readings, passes, host, place)
    for value, roots in wanting.items():
        whole, regions = decisions.get(value), [decisions[r] for r in readers[value] if r in decisions]
        if whole is None or not any(isinstance(e, Conv) for e in walk(whole.expr)):
            continue
        found = folder.fold(value, whole, regions)
        if isinstance(found, Declined):
            refusal = Refusal(PIECES, whole.expr, found.reason)
            for root in roots:
                decisions[root] = replace(decisions[root], refusals=[*decisions[root].refusals, refusal])
        elif found:
            del decisions[value]
            decisions.update((d.members[-1], d) for d in found)
    return decisions


@dataclass(frozen=True)
class _Cut:
    """A reader of a value: the selection that it is (None: it is none), and the scales in a row behind it alone."""

    select: Select | None
    scales: tuple[Scale | BatchNorm, ...] = ()


def _cuts(expr: Expr) -> dict[Value, list[_Cut]]:
    """What reads each of the values that ``expr`` starts from."""
    nodes = list(walk(expr))
    readers: dict[Expr, list[Expr]] = {}
    for e in nodes:
        for x in e.children:
            readers.setdefault(x, []).append(e)
    found: dict[Value, list[_Cut]] = {}
    for x in nodes:
        if isinstance(x, Source):
            cuts = [_Cut(None)] if x is expr else [_cut(e, readers) for e in readers[x]]
            found.setdefault(x.key, []).extend(cuts)
    return found


def _cut(select: Expr, readers: Mapping[Expr, Sequence[Expr]]) -> _Cut:
    if not isinstance(select, Select):
        return _Cut(None)
    scales: list[Scale | BatchNorm] = []
    e: Expr = select
    while len(above := readers.get(e, ())) == 1:
        e = above[0]
        if not isinstance(e, Scale | BatchNorm) or e.frame not in (None, select.frame):
            break
        if any(v.ndim and v.size != len(select.index) for v in coefficients(e)):
            break
        scales.append(e)
    return _Cut(select, tuple(scales))


@dataclass(frozen=True)
class _Form:
    """A region in its final form: its expression, and what existing values compute of it."""

    expr: Expr
    native: Mapping[Expr, Value]


OTHERS = "the convolution that it scales a piece of is read by something else than selections of channels"


@dataclass(frozen=True)
class _Folder:
    graph: Graph
    readings: dict[Value, Reading]
    passes: Sequence[Pass]
    host: Host | None
    place: Mapping[Value, int]

    def fold(self, value: Value, whole: Decision, regions: Sequence[Decision]) -> list[Decision] | Declined | None:
        """What becomes of the ``regions`` that read ``value``, the result of ``whole``; None: nothing to say."""
        everything = (whole, *regions)
        if any(v not in self.readings for d in everything for v in d.members) or len(regions) > MOST_REGIONS:
            return None
        if any(d.splice is not None and d.splice.shared is not None for d in everything):
            return None  # it belongs to another convolution in pieces
        forms = [self._form(d) for d in regions]
        cuts = [cut for form in forms for cut in _cuts(form.expr).get(value, ())]
        selects = [cut.select for cut in cuts if cut.select is not None]
        readers = self.graph.readers(value)
        if len(selects) < len(cuts) or not {v for d in regions for v in d.members}.issuperset(readers):
            return Declined(OTHERS)
        if len({e.frame for e in selects}) > 1:
            return Declined(OTHERS)
        if any(self.graph.is_written(v) for v in (value, *readers)):
            return Declined("something writes into the convolution that it scales a piece of")
        times = Counter(i for e in selects for i in e.index)
        chosen = [c for c in cuts if c.scales and c.select is not None and all(times[i] == 1 for i in c.select.index)]
        if not chosen:
            return Declined("another selection reads the channels that it scales")

        form, scaled = self._form(whole), {e for cut in chosen for e in cut.scales}
        with np.errstate(all="ignore"):  # whatever is not finite is refused below
            new = simplify(_in_front(flatten(form.expr), chosen), self.passes).expr
        saved = sum(cost(f.expr) - cost(_over(f, {}, scaled).expr) for f in forms)
        if not cost(new) - cost(form.expr) < saved:
            return None
        kept = set(walk(new))
        moved = _Form(new, {e: v for e, v in form.native.items() if e in kept})
        return self._spliced(value, whole, moved, [*zip(regions, forms, strict=True)], scaled)

    def _form(self, decision: Decision) -> _Form:
        if decision.splice is not None:
            return _Form(decision.splice.expr, decision.splice.native)
        exprs = lifted(self.graph, decision.members, self.readings, {})
        root = decision.members[-1]
        return _Form(exprs[root], {e: v for v, e in exprs.items() if v != root})

    def _spliced(
        self,
        value: Value,
        whole: Decision,
        moved: _Form,
        regions: Sequence[tuple[Decision, _Form]],
        scaled: Collection[Expr],
    ) -> list[Decision] | Declined:
        """``regions`` over ``moved`` in the place of ``value``, the result of ``whole``, without what is ``scaled``."""
        sources: dict[Value, Expr] = {e.key: e for e in walk(moved.expr) if isinstance(e, Source)}
        found: list[Decision] = []
        for decision, form in regions:
            new = _over(form, stands := {**sources, value: moved.expr}, scaled)
            del stands[value]
            members = tuple(sorted({*whole.members, *decision.members}, key=self.place.__getitem__))
            before = flatten(lifted(self.graph, members, self.readings, stands)[members[-1]])
            counts = Counter({PIECES: sum(e in scaled for e in walk(form.expr))})
            for d in (decision,) if found else (decision, whole):
                counts.update(d.splice.counts if d.splice is not None else {})
            native = {**moved.native, **new.native}
            splice = checked(self.graph, members, self.readings, before, new.expr, native, counts, self.host)
            if isinstance(splice, Declined):
                return splice
            if isinstance(splice, FailedRegion):
                return Declined(f"it failed its check: {splice.reason}")
            refusals = decision.refusals if found else [*decision.refusals, *whole.refusals]
            found.append(Decision(new.expr, replace(splice, shared=value), refusals, members))
        return found


def _in_front(e: Expr, cuts: Sequence[_Cut]) -> Expr:
    """``e`` with the channels of each of ``cuts`` scaled."""
    selects = [cut.select for cut in cuts if cut.select is not None]
    scale, shift = np.ones(selects[0].width), np.zeros(selects[0].width)
    for cut, select in zip(cuts, selects, strict=True):
        at = list(select.index)
        for s, t in map(coefficients, cut.scales):
            scale[at], shift[at] = s * scale[at], s * shift[at] + t
    return Scale(e, scale, shift, selects[0].frame)


def _over(form: _Form, stands: dict[Value, Expr], without: Collection[Expr]) -> _Form:
    """``form`` with its operands as ``stands`` has them, and the scales ``without`` left out.

    What ``stands`` lacks is added to it. Nothing is native any more that has changed in meaning.
    """
    done: dict[Expr, Expr] = {}
    changed: set[Expr] = set()
    for e in walk(form.expr):
        if isinstance(e, Source):
            done[e] = stands.setdefault(e.key, e)
        elif e in without:
            done[e] = done[e.children[0]]
        else:
            done[e] = rebuild(e, [done[c] for c in e.children])
        moved = isinstance(e, Source) and not isinstance(done[e], Source)
        if moved or e in without or not changed.isdisjoint(e.children):
            changed.add(e)
    native = {done[e]: v for e, v in form.native.items() if e in done and e not in changed}
    return _Form(done[form.expr], native)
