"""Piece folding: a scale of some channels of a convolution goes into the rows that compute them.

    s P(W*x + b)[i] + t  =  P((s'W)*x + (s'b + t'))[i]        s', t' = s, t at i, and 1, 0 elsewhere

The convolution ends a region of its own, because several regions take channels of it (q, k and v of one fused
projection), perhaps after its channels have been split into heads and moved by P. It can be changed for all of them
only, and only if nothing else takes the channels i. So all regions that read it get a replacement over one and the
same new convolution, which is emitted with the first of them. Each replacement is right by itself; all are made or
none, because otherwise both convolutions would be computed. Where a region takes the channels i into a kernel of its
own, the convolution is parted: see `joining`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import numpy as np

from reparamc.algebra.arrays import together, zeros_of
from reparamc.algebra.channel_map import ChannelMap
from reparamc.algebra.expr import (
    Array,
    BatchNorm,
    Conv,
    Expr,
    Layout,
    Scale,
    Select,
    Source,
    Take,
    flatten,
    ranks,
    rebuild,
    release,
    replaced,
    walk,
)
from reparamc.algebra.infer import channel_axes, channels
from reparamc.algebra.kernels import coefficients, scaled_again
from reparamc.algebra.records import record, replace
from reparamc.algebra.rewrite import Declined, simplify
from reparamc.algebra.shape import Shape
from reparamc.compiler.consider import Decision, Setting, checked, hold_rounded
from reparamc.compiler.joining import parted
from reparamc.compiler.plan import Compilation
from reparamc.compiler.readings import Value
from reparamc.compiler.regions import lifted, linear_users
from reparamc.report.data import FailedRegion

MOST_REGIONS = 16
"""Regions that may read one convolution: work stays in proportion to the graph."""


def fold_pieces(compilation: Compilation, name: str) -> None:
    """Scales of selected channels go into the convolution that these are selected from, where it pays.

    They go before the selection, where the other passes have to take them in.
    """
    setting, decisions = compilation.setting, compilation.decisions
    users: dict[Value, list[Value]] = {}  # the regions that read a value
    wanting: dict[Value, list[Value]] = {}  # those that scale what they take
    for root in sorted(decisions, key=compilation.place):
        for value, branches in _branches(decisions[root].expr).items():
            users.setdefault(value, []).append(root)
            if any(branch.scales and branch.takes for branch in branches):
                wanting.setdefault(value, []).append(root)
    folder = _Folder(setting, name, compilation.place)
    for value, roots in wanting.items():
        whole, regions = decisions.get(value), [decisions[r] for r in users[value] if r in decisions]
        if whole is None or not any(isinstance(e, Conv) for e in walk(whole.expr)):
            continue
        found = folder.fold(value, whole, regions)
        if isinstance(found, Declined):
            declined = replace(found, by=name)
            for root in roots:
                decisions[root] = replace(decisions[root], refusals=[*decisions[root].refusals, declined])
        elif found:
            _hold_rounded(folder, value, whole, regions, found)
            del decisions[value]
            decisions.update((d.members[-1], d) for d in found)
    parted(setting, decisions)


@record
class _Branch:
    """What one user after the other does to a value: moves and selections of channels, then scales in a row."""

    moves: tuple[Layout | Select, ...]
    scales: tuple[Scale | BatchNorm, ...] = ()

    @property
    def takes(self) -> bool:
        """Whether it reads only some of the channels, as far as can be seen from here."""
        return any(isinstance(e, Select) or isinstance(e.op, Take) for e in self.moves)


def _branches(expr: Expr) -> dict[Value, list[_Branch]]:
    """What reads each of the values that ``expr`` starts from."""
    nodes = list(walk(expr))
    users: dict[Expr, list[Expr]] = {}
    for e in nodes:
        for x in e.children:
            users.setdefault(x, []).append(e)
    found: dict[Value, list[_Branch]] = {}
    for x in nodes:
        if isinstance(x, Source):
            found.setdefault(x.key, []).extend(_after(x, users))
    return found


def _after(source: Source, users: Mapping[Expr, Sequence[Expr]]) -> list[_Branch]:
    """What reads ``source``, where ``users`` says what reads each node."""
    found: list[_Branch] = []
    stack: list[tuple[Expr, tuple[Layout | Select, ...]]] = [(source, ())]
    while stack:
        e, moves = stack.pop()
        above = users.get(e, ())
        moving = [r for r in above if isinstance(r, Layout | Select)]
        stack += [(r, (*moves, r)) for r in moving]
        if above and len(moving) == len(above):
            continue
        scales: list[Scale | BatchNorm] = []
        while len(above) == 1 and isinstance(above[0], Scale | BatchNorm):
            scales.append(above[0])
            above = users.get(above[0], ())
        found.append(_Branch(moves, tuple(scales)))
    return found


def _core(e: Expr) -> tuple[Expr, list[Layout]]:
    """What ``e`` is before it is moved, and the moves, first to last."""
    moves: list[Layout] = []
    while isinstance(e, Layout):
        moves.append(e)
        e = e.x
    return e, moves[::-1]


@record
class _Form:
    """A region in its final form: its expression, and what existing values compute of it."""

    expr: Expr
    native: Mapping[Expr, Value]


OTHERS = "the convolution that it scales a piece of is read by something else than selections of channels"
WRITTEN = "something writes into the convolution that it scales a piece of"
READ_TWICE = "another selection reads the channels that it scales"


@record
class _Folder:
    """Folds into one convolution after the other, for the pass ``name``."""

    setting: Setting
    name: str
    place: Callable[[Value], int]

    def fold(self, value: Value, whole: Decision, regions: Sequence[Decision]) -> list[Decision] | Declined | None:
        """What becomes of the ``regions`` that read ``value``, the result of ``whole``; None: nothing to say."""
        everything = (whole, *regions)
        if any(v not in self.setting.readings for d in everything for v in d.members) or len(regions) > MOST_REGIONS:
            return None
        if any(d.splice is not None and d.splice.shared is not None for d in everything):
            return None  # it belongs to another convolution in pieces
        forms = [self._form(d) for d in regions]
        branches = [branch for form in forms for branch in _branches(form.expr).get(value, ())]
        users = linear_users(self.setting.graph, self.setting.readings, value)
        if not {v for d in regions for v in d.members}.issuperset(users):
            return Declined(OTHERS)
        if any(self.setting.graph.is_written(v) for v in (value, *users)):
            return Declined(WRITTEN)
        form = self._form(whole)
        expr = flatten(form.expr)
        start = _start(expr, self.setting.graph.source(value).shape)
        if start is None:
            return None
        pieces = [_piece(branch, start) for branch in branches]
        times = Counter(c for piece in pieces for c in piece.channels)
        cut = [piece for piece in pieces if len(set(piece.channels)) < start.channels.size]
        if not any(piece.scales for piece in cut):
            return None  # nothing is cut, or it is cut along another axis
        chosen = [piece for piece in pieces if piece.scales and all(times[c] == 1 for c in piece.channels)]
        if not chosen:
            return Declined(OTHERS if len(cut) < len(pieces) else READ_TWICE)

        scaled = {e for piece in chosen for e in piece.scales}
        with np.errstate(all="ignore"):  # whatever is not finite is refused below
            new = simplify(_in_front(expr, chosen), self.setting.passes, self.setting.objective).expr
        cost = self.setting.objective.cost
        saved = sum(cost(f.expr) - cost(_over(f, {}, scaled).expr) for f in forms)
        if not cost(new) - cost(form.expr) < saved:
            return None
        kept = set(walk(new))
        anew = _Form(new, {e: v for e, v in form.native.items() if e in kept})
        return self._spliced(value, whole, anew, [*zip(regions, forms, strict=True)], scaled)

    def _form(self, decision: Decision) -> _Form:
        if decision.splice is not None:
            return _Form(decision.splice.expr, decision.splice.native)
        exprs = lifted(self.setting.graph, decision.members, self.setting.readings, {})
        root = decision.members[-1]
        return _Form(exprs[root], {e: v for v, e in exprs.items() if v != root})

    def _spliced(
        self,
        value: Value,
        whole: Decision,
        anew: _Form,
        regions: Sequence[tuple[Decision, _Form]],
        scaled: Collection[Expr],
    ) -> list[Decision] | Declined:
        """``regions`` over ``anew`` in the place of ``value``, the result of ``whole``, without what is ``scaled``.

        Declined with the reason of the first that cannot be, because all are made or none.
        """
        sources: dict[Value, Expr] = {e.key: e for e in walk(anew.expr) if isinstance(e, Source)}
        found: list[Decision] = []
        for decision, form in regions:
            new = _over(form, stands := {**sources, value: anew.expr}, scaled)
            del stands[value]
            members = tuple(sorted({*whole.members, *decision.members}, key=self.place))
            before = flatten(lifted(self.setting.graph, members, self.setting.readings, stands)[members[-1]])
            counts = Counter({self.name: sum(e in scaled for e in walk(form.expr))})
            for d in (decision,) if found else (decision, whole):
                counts.update(d.splice.counts if d.splice is not None else {})
            native = {**anew.native, **new.native}
            splice = checked(self.setting, members, before, new.expr, native, counts)
            if isinstance(splice, Declined):
                return splice
            if isinstance(splice, FailedRegion):
                return Declined(f"it failed its check: {splice.reason}")
            refusals = decision.refusals if found else [*decision.refusals, *whole.refusals]
            found.append(Decision(new.expr, replace(splice, shared=value), refusals, members))
        return found


def _hold_rounded(
    folder: _Folder, value: Value, whole: Decision, regions: Sequence[Decision], found: Sequence[Decision]
) -> None:
    """Have what was ``found`` hold less; see `hold_rounded`."""

    def again(place: int) -> Expr:
        anew = folder.fold(value, whole, regions)
        assert isinstance(anew, list)
        return anew[place].expr

    for place, d in enumerate(found):
        if d.splice is not None:
            hold_rounded(folder.setting, d.splice, partial(again, place))
            release(d.splice.original or d.expr)
    for d in (whole, *regions, *found):
        release(d.expr)


@record
class _Piece:
    """The channels of the convolution that a branch reads, and for each scale a factor and a shift of each of them."""

    channels: list[int]
    scales: dict[Scale | BatchNorm, tuple[Array, Array]]


def _start(expr: Expr, shape: Shape | None) -> ChannelMap | None:
    """Where the channels of ``expr``, a value of ``shape``, are; None if it is unknown what is moved."""
    core, moves = _core(expr)
    axis, width = channel_axes(expr)[core], channels(expr)[core]
    if axis is None or width is None:
        return None
    if moves:
        rank, _ = ranks(moves[0].op)
    else:
        rank = -axis if shape is None else len(shape)
    where: ChannelMap | None = ChannelMap.of(rank, axis, width)
    for e in moves:
        where = where.through(e) if where is not None else None
    return where


def _piece(branch: _Branch, where: ChannelMap) -> _Piece:
    """What ``branch`` does to the channels; one that cannot be followed to its end reads more, and scales nothing."""
    for e in branch.moves:
        after = where.through(e)
        if after is None:
            return _Piece(where.channels.ravel().tolist(), {})
        where = after
    scales: dict[Scale | BatchNorm, tuple[Array, Array]] = {}
    for e in branch.scales:
        scale, shift = (where.along(v, e.axis) for v in coefficients(e))
        if scale is None or shift is None:
            break
        xp, scale, shift = together(scale, shift)
        scales[e] = xp.reshape(scale, (-1,)), xp.reshape(shift, (-1,))
    return _Piece(where.channels.ravel().tolist(), scales)


def _in_front(e: Expr, pieces: Sequence[_Piece]) -> Expr:
    """``e`` with the channels of each of ``pieces`` scaled, before they are moved."""
    core, _ = _core(e)
    width = channels(e)[core] or 0
    scale, shift = np.ones(width), np.zeros(width)
    for piece in pieces:
        others = np.ones(width)
        others[piece.channels] = 0
        for s, t in piece.scales.values():
            factor, more = others + _spread(s, piece.channels, width), _spread(t, piece.channels, width)
            scale, shift = scaled_again(factor, more, (scale, shift))
    return replaced((e,), core, Scale(core, scale, shift, channel_axes(e)[core]))[e]


def _spread(v: Array, at: Sequence[int], width: int) -> Array:
    """``v`` at these places of ``width``, and zeros elsewhere."""
    wide = zeros_of(v, (width,))
    wide[at] = v
    return wide


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
        computed = isinstance(e, Source) and not isinstance(done[e], Source)
        if computed or e in without or not changed.isdisjoint(e.children):
            changed.add(e)
    native = {done[e]: v for e, v in form.native.items() if e in done and e not in changed}
    return _Form(done[form.expr], native)
