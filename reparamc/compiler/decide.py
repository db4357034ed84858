"""What becomes of all regions, and of the values that they share.

A value that several regions share must disappear from all of them if it scales; if it moves, it may stay in all of
them over one and the same operand, in which case it is computed once. Or else it is made an operand of all, and
regions are found again.

Copying such a value into every region and merging equal operators at the end would not do: a BatchNorm before a
transposition that one region takes in and another does not leaves two transpositions, of different values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Hashable, Mapping
from dataclasses import dataclass, field

from reparamc.algebra.arrays import is_all
from reparamc.algebra.expr import Conv, Expr, Layout, Source, rebuild, walk
from reparamc.algebra.records import replace
from reparamc.compiler.consider import Decision, Form, Setting, consider
from reparamc.compiler.graph import Splice
from reparamc.compiler.joining import joined
from reparamc.compiler.readings import Reading, Taps, Value, is_norm
from reparamc.compiler.regions import MOST_SHARED, find_regions


def decide(setting: Setting, progress: Callable[[int, int], None]) -> dict[Value, Decision]:
    """What becomes of every region.

    Shared members that some region still reads, or that several repeat over different operands, are operands in
    a second try.
    """
    results: dict[tuple[Value, tuple[Value, ...]], tuple[Decision, Form]] = {}
    stuck, ends = set[Value](), set[Value]()
    most = MOST_SHARED if setting.objective.stores else 1
    while True:
        regions = find_regions(setting.graph, setting.readings, stuck, ends, most)
        for done, (root, members) in enumerate(regions.items()):
            if (root, members) not in results:
                results[root, members] = consider(setting, (members,))
                progress(done + 1, len(regions))
        decisions = {root: results[root, members][0] for root, members in regions.items()}
        times = Counter(v for members in regions.values() for v in members)
        shared = {v: n for v, n in times.items() if n > 1}
        still = _still_there(setting.readings, decisions, shared)
        alone = {v for decision in decisions.values() for v in decision.apart}
        if not still and not alone:
            forms = {root: results[root, members][1] for root, members in regions.items()}
            return _copied_once(setting.readings, joined(setting, decisions, forms), shared)
        stuck |= still
        ends |= alone


@dataclass
class _Uses:
    """What the final forms make of shared values.

    Attributes:
        reads: those that some region still reads.
        copies: for each that moves, what its copies compute.
        repeats: how many copies there are.
    """

    reads: set[Value] = field(default_factory=set[Value])
    copies: dict[Value, set[Hashable]] = field(default_factory=dict[Value, set[Hashable]])
    repeats: Counter[Value] = field(default_factory=Counter[Value])


def _still_there(
    readings: Mapping[Value, Reading], decisions: Mapping[Value, Decision], shared: Mapping[Value, int]
) -> set[Value]:
    """The ``shared`` values, given with the number of regions that share each, that should rather be operands."""
    uses = _uses(readings, decisions, shared)
    still = {v for v in shared if v in uses.reads or len(uses.copies.get(v, ())) > 1}
    return still | {v for v, n in shared.items() if uses.repeats[v] < n and _is_pooling(readings[v])}


def _uses(readings: Mapping[Value, Reading], decisions: Mapping[Value, Decision], shared: Container[Value]) -> _Uses:
    found = _Uses()
    origin = {_original(r.template): v for v, r in readings.items() if v in shared and not r.scales}
    known: dict[tuple[Hashable, Hashable], object] = {}
    for decision in decisions.values():
        if decision.splice is None:
            found.reads.update(decision.members)
        elif any(v in shared for v in decision.members):
            for e, key in _keys(decision.splice, known).items():
                if e in decision.splice.native:
                    found.reads.add(decision.splice.native[e])
                elif (v := origin.get(_original(e))) is not None:
                    found.copies.setdefault(v, set()).add(key)
                    found.repeats[v] += 1
    return found


def _is_pooling(reading: Reading) -> bool:
    """Whether it computes: such an operator is shared if it stays in all regions, and not composed with each user."""
    return isinstance(reading.template, Conv)


def _original(e: Expr) -> Hashable:
    """What tells one operator that moves its operand from all others: rewrites keep its op, or its kernel."""
    match e:
        case Layout():
            return id(e.op)
        case Conv() if e.is_weightless:
            return id(e.weight)
        case Conv(x=Source(key=Taps(norm=True) as taps)):
            return taps
        case _:
            return None


def _moved(e: Expr) -> Hashable:
    """What operators that move their operand alike have in common."""
    if is_norm(e) and isinstance(e, Conv):  # alike if it has no weight and bias
        return _original(e) if e.bias is None and is_all(e.weight, 1) else None
    return e.op if isinstance(e, Layout) else _original(e)


def _keys(splice: Splice, known: dict[tuple[Hashable, Hashable], object]) -> dict[Expr, Hashable]:
    """What the nodes of a replacement compute: equal for operators that move one value alike, in any region.

    ``known`` holds the keys of copies met before, by operator and key of the operand.
    """
    keys: dict[Expr, Hashable] = {}
    for e in walk(splice.expr, stop=splice.native.__contains__):
        if e in splice.native:
            keys[e] = splice.native[e]
        elif e is not splice.expr and isinstance(e, Layout | Conv) and (moved := _moved(e)) is not None:
            keys[e] = known.setdefault((moved, keys[e.x]), object())
        else:
            keys[e] = e
    return keys


def _copied_once(
    readings: Mapping[Value, Reading], decisions: dict[Value, Decision], shared: Container[Value]
) -> dict[Value, Decision]:
    """``decisions``, with one node for equal copies of shared members, so that a host graph computes it once."""
    first: dict[Hashable, Expr] = {}
    known: dict[tuple[Hashable, Hashable], object] = {}
    for root, decision in decisions.items():
        splice = decision.splice
        if splice is None or not any(v in shared for v in decision.members):
            continue
        native, done = dict(splice.native), dict[Expr, Expr]()
        for e, key in _keys(splice, known).items():
            one = e if e in splice.native else rebuild(e, [done[c] for c in e.children])
            done[e] = one if key is e else first.setdefault(key, one)
            if e in splice.native:
                native[done[e]] = splice.native[e]
        norm = next((v for v in decision.members if v in shared and is_norm(readings[v].template)), splice.shared)
        splice = replace(splice, expr=done[splice.expr], native=native, shared=norm)
        decisions[root] = replace(decision, expr=splice.expr, splice=splice)
    return decisions
