"""The certificate: window by window, that an emitted graph equals the original for every input size.

A name that both graphs have is a *cut*. Going through the emitted graph in execution order, each cut is proven
equal to its counterpart, given that all cuts before it are: by congruence, if both are the same operator over cuts that
are equal; else as a *window*, by expanding both backwards to common cuts and comparing their normal forms.
Operators that are not affine are *atoms*, unknown functions: equal if they are the same operator over equal operands.

Nothing here knows how graphs are rewritten, nor shares code with what does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from math import prod
from time import perf_counter
from typing import NamedTuple

import numpy as np

from reparamc.certificate.agreement import Agreement, Precision, agree
from reparamc.certificate.axes import Unrepresentable
from reparamc.certificate.budget import BLOCK, LEAST, PER_PARAMETER, TAP, Exceeded, Meter
from reparamc.certificate.layouts import RESIZED
from reparamc.certificate.narrowing import (
    Narrowing,
    matched,
    narrowed_axis,
    passed,
    put_back,
    shape_of,
)
from reparamc.certificate.normal_form import Array, Value, Vector, promoted, replace, span
from reparamc.certificate.normal_form import leaf as nf_leaf
from reparamc.certificate.ranges import unchanged
from reparamc.certificate.sides import Opened, Side


@dataclass(frozen=True)
class Window:
    """One tensor that was proven, or not.

    Attributes:
        where: its name.
        verdict: "equal", "different" or "undecided".
        units: the largest error of a coefficient, in units of what rounding explains.
        bound: how far the tensor can be off, relative to the sum of the magnitudes of the products it is added up from,
            because parameters were rounded.
        reason: what differs, or why that cannot be said.
        before, after: how many operators it takes in each graph.
        excess: of a difference, how far it is off if all parameters were combined in their own dtype, in roundings.
    """

    where: str
    verdict: str
    units: float = 0.0
    bound: float = 0.0
    reason: str = ""
    before: int = 0
    after: int = 0
    excess: float = 0.0


@dataclass(frozen=True)
class Certificate:
    """What was proven of an emitted graph.

    Attributes:
        windows: all that was rewritten, and whatever could not be proven.
        congruent: tensors that both graphs compute by the same operator from equal operands.
        seconds: wall time of the proof.
    """

    windows: tuple[Window, ...]
    congruent: int
    seconds: float

    def count(self, verdict: str) -> int:
        return sum(w.verdict == verdict for w in self.windows)

    @property
    def equal(self) -> int:
        return self.count("equal")

    @property
    def different(self) -> int:
        return self.count("different")

    @property
    def undecided(self) -> int:
        return self.count("undecided")

    @property
    def holds(self) -> bool:
        """Whether the emitted graph is proven equal to the original, from its inputs to its outputs."""
        return self.equal == len(self.windows)

    @property
    def units(self) -> float:
        return max((w.units for w in self.windows if w.verdict == "equal"), default=0.0)

    @property
    def bound(self) -> float:
        return max((w.bound for w in self.windows if w.verdict == "equal"), default=0.0)


@np.errstate(all="ignore")  # what is not finite is compared as what it is
def certify(
    original: Side,
    emitted: Side,
    outputs: Sequence[tuple[str, str]],
    stands_for: Mapping[str, str],
    precision: Callable[[str], Precision],
    outside: Sequence[Window] = (),
    parameters: int = 0,
) -> Certificate:
    """Prove every tensor of ``emitted`` that is one of ``original``, and every output.

    Args:
        outputs: pairs of names, of the original and of what was emitted.
        stands_for: what a tensor of the emitted graph is said to be in the original, inputs included. It is
            proven, so a wrong hint only makes a window fail.
        precision: of the dtype that parameters are stored in, for a tensor of the emitted graph.
        outside: what was found wrong with the two as seen by a caller.
        parameters: how many the original has; the proof may cost more where there are many.
    """
    start = perf_counter()
    whole = {name for pair in outputs for name in pair}
    proof = _Proof(original, emitted, stands_for, precision, Meter(LEAST + PER_PARAMETER * parameters), whole)
    windows: list[Window] = list(outside)
    for name in sorted(set(stands_for.values())):
        if name.startswith((_own(0, ""), _own(1, ""))):
            windows.append(Window(name, "undecided", reason="the proof itself gives such names"))
    proof.foresee([(stands_for[name], name) for name in emitted.order if name in stands_for])
    congruent = 0
    for name in emitted.order:
        if name not in stands_for:
            continue
        found = proof.compared(stands_for[name], name)
        if found is None:
            congruent += 1
        else:
            windows.append(found)
    for before, after in outputs:
        if stands_for.get(after) != before and not proof.same_constant(before, after):
            windows.append(proof.window(before, after, precision(after)))
    windows += proof.unread()
    return Certificate(tuple(windows), congruent, perf_counter() - start)


WIDE, NARROW, FEW_DIGITS = 2.0**30, 2.0**4, 2.0**-11
"""How far numbers on the way may leave the range of the original's: by a lot, or by little where there are few bits."""

ADDED = 2.0**8
"""And how much larger may be what is added, which takes as many digits from all the rest."""

MOST_TRIES, FEW_TRIES, SPARE_TRIES = 16, 4, 48
"""How often the leaves of a window are expanded further until both graphs have the same; and how often if others have
taken what may be spared: most windows take one or two tries, or are in vain."""


MOST_BESIDE = 1 << 16
"""Parameters of windows that are proven side by side: few enough for a processor's cache."""


class _Case(NamedTuple):
    """A window between the nearest cuts.

    Attributes:
        made: the tensors that each graph computes in it, operands first.
        leaves: the cuts that it reads, by their names in the original.
        parameters: how many it has.
    """

    before: str
    after: str
    made: tuple[list[str], list[str]]
    leaves: Collection[str]
    parameters: int


@dataclass(frozen=True, eq=False)
class _Atom:
    name: str
    kind: Hashable
    operands: tuple[Value | Array, ...]
    leaf: Value


def _stopped(where: str, error: Exception) -> Window:
    """A graph holds what no reader has thought of: that is no proof, and no reason to stop either."""
    return Window(where, "undecided", reason=f"the proof stopped at {type(error).__name__}: {error}")


def _own(which: int, name: str) -> str:
    """What a leaf is called that only one of the two graphs is known to have."""
    return f"{('original', 'emitted')[which]} {name}"


class _NoJoint(Exception):
    """What links two kernels of the emitted graph is nothing that links two of the original."""


class _Joints:
    """What one kernel makes and another reads, in the original, with the leaf in its place.

    A joint is taken up to what is added to each channel everywhere: that goes on after it.
    """

    def __init__(self) -> None:
        self.values: list[tuple[Value, Value]] = []
        self.found: list[Agreement] = []
        self.next = 0

    def enter(self, value: Value, leaf: Value) -> Value:
        """A joint of the original: ``value`` over ``leaf``."""
        bare, shift = _bare(value)
        self.values.append((bare, leaf))
        return _shifted(leaf, value, shift)

    def enter_as(self, value: Value, other: Value) -> None:
        """What is made of a joint alone is one, too: ``value``, which is ``other`` over the leaf of the joint."""
        bare, shift = _bare(value)
        if shift is not None:
            other, shift = _bare(other)
        if (shift is None) == (bare is value):  # what is added was taken from both, or from none
            self.values.append((bare, other))

    def find(self, value: Value, precision: Precision) -> Value | None:
        """The joint of the original that ``value`` equals."""
        bare, shift = _bare(value)
        for at in sorted(range(len(self.values)), key=lambda i: (i < self.next, i)):  # both graphs have one order
            known, leaf = self.values[at]
            found = agree(known, bare, precision)
            if found.verdict == "equal":
                self.found.append(found)
                self.next = at + 1
                return _shifted(leaf, value, shift)
        return None


def _bare(value: Value) -> tuple[Value, Vector | None]:
    """A value without what is added everywhere, and that."""
    if None not in value.vectors or value.channel is None or not value.is_plain:
        return value, None
    return replace(value, vectors={w: v for w, v in value.vectors.items() if w is not None}), value.vectors[None]


def _shifted(leaf: Value, value: Value, shift: Vector | None) -> Value:
    if shift is None or value.channel is None:
        return leaf
    return replace(promoted(leaf, value.channel), vectors={None: shift})


def _is_dense(value: Value) -> bool:
    return any(b.weight.shape[1:] != (1, 1) for b in value.blocks)


class _Proof:
    def __init__(
        self,
        original: Side,
        emitted: Side,
        stands_for: Mapping[str, str],
        precision: Callable[[str], Precision],
        meter: Meter,
        whole: Collection[str],
    ) -> None:
        self.sides, self.precision, self.meter = (original, emitted), precision, meter
        self.whole = whole
        """The tensors that callers see, which may lose no channel."""
        counterparts = Counter(stands_for.values())
        # Tensors that replace the same one are proven apart, and read as themselves.
        self.cuts: tuple[Mapping[str, str], Mapping[str, str]] = (
            {name: name for name in counterparts},
            dict(stands_for),
        )
        self.position = {name: at for at, name in enumerate(original.order)}
        self.last: list[list[Value]] = [[], []]
        """What the latest expansion of each graph went through, the result at the end."""
        self.equal: list[dict[str, str] | None] = [None, None]
        """See `_unchanged`; found when an operator has no reading."""
        self.narrowings: dict[str, Narrowing] = {}
        """The tensors of the original that have fewer channels in the emitted graph."""
        self.tries = 0
        """Of windows, beyond a few for each."""
        self.met: set[str] = set()
        """The tensors of the emitted graph that some proof is about."""
        self.foreseen: dict[str, tuple[Window, Collection[str]]] = {}
        """What is proven of tensors of the emitted graph, if the cuts that they read have all their channels."""

    def unread(self) -> list[Window]:
        """Operators of the emitted graph that no proof is about: nothing depends on them, but they may not run."""
        left = self.sides[1].unread(self.met)
        return [Window(name, "undecided", reason="nothing depends on it, but it may not run") for name in left]

    def same_constant(self, before: str, after: str) -> bool:
        try:
            a, b = self.sides[0].constant(before), self.sides[1].constant(after)
        except Unrepresentable:
            return False
        return a is not None and b is not None and same_bytes(a, b)

    def is_congruent(self, before: str, after: str) -> bool:
        mine, other = self.sides[0].operands(before), self.sides[1].operands(after)
        if len(mine) != len(other) or self.sides[0].kind(before) != self.sides[1].kind(after):
            return False
        if not self.narrowings.keys().isdisjoint(mine):
            return False
        return all(self.cuts[1].get(b) == a or self.same_constant(a, b) for a, b in zip(mine, other, strict=True))

    def compared(self, before: str, after: str) -> Window | None:
        """What is found of two tensors; None where they are congruent."""
        try:
            if self.is_congruent(before, after):
                self.met.add(after)
                return None
            mine, other = self.sides[0].sizes_told(before), self.sides[1].sizes_told(after)
            if mine is not None and mine == other:
                self.met.update(self._reached(1, after, set()))
                return None
            if self._passes_on(before, after):
                self.met.add(after)
                return None
        except Exception as error:
            return _stopped(before, error)
        return self.window(before, after, self.precision(after))

    def window(self, before: str, after: str, precision: Precision) -> Window:
        """Compare two tensors: joint by joint if that succeeds, else as functions of cuts alone."""
        self.met.update(self._reached(1, after, set()))
        found, leaves = self.foreseen.get(after, (None, ()))
        if found is not None and found.where == before and self.narrowings.keys().isdisjoint(leaves):
            return found
        try:
            self.meter.start()
            return self._jointed(before, after, precision) or self._whole(before, after, precision)
        except Exceeded as error:
            return Window(before, "undecided", reason=str(error))
        except Exception as error:
            return _stopped(before, error)

    def foresee(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Prove windows that differ in names and parameters alone side by side, as one of many channels.

        The whole is equal exactly if each window is. If that is not proven, each window is compared alone.
        """
        alike: dict[Hashable, list[_Case]] = {}
        for before, after in pairs:
            try:
                form, case = self._form(before, after)
            except Exception:  # as in `window`
                continue
            alike.setdefault(form, []).append(case)
        for cases in alike.values():
            for together in _batches(cases):
                try:
                    found = self._beside(together)
                except Exception:  # as in `window`
                    continue
                if found is not None:
                    self.foreseen |= {c.after: (replace(found, where=c.before), c.leaves) for c in together}

    def _form(self, before: str, after: str) -> tuple[Hashable, _Case]:
        """All that decides whether a window is equal, but for the numbers of its parameters.

        Raises:
            Unrepresentable: it cannot be put beside others, or needs no proof.
        """
        leaves: dict[str, int] = {}
        found: list[Hashable] = []
        parameters = 0
        made = list[str](), list[str]()
        for which, root in ((1, after), (0, before)):
            side, cuts, numbers = self.sides[which], self.cuts[which], dict[str, int]()
            for name in self._reached(which, root, set()):
                known_as, numbers[name] = cuts.get(name), len(numbers)
                if name != root and (known_as is not None or side.is_input(name)):
                    if known_as is None:
                        raise Unrepresentable("a leaf that one graph alone has")
                    found.append(leaves.setdefault(known_as, len(leaves)))
                    continue
                form = side.form(name)
                if form is None:
                    raise Unrepresentable("an operator that cannot be put beside others")
                made[which].append(name)
                parameters += sum(map(prod, form.shapes))
                found.append((form, tuple(map(numbers.get, side.operands(name)))))
        if parameters > MOST_BESIDE // 2 or self.is_congruent(before, after):
            raise Unrepresentable("it is proven alone")
        shapes = tuple(self.sides[0].leaf(name, name).shape for name in leaves)
        return (*found, *map(len, made), shapes), _Case(before, after, made, leaves, parameters)

    def _beside(self, cases: Sequence[_Case]) -> Window | None:
        """What is proven of all of ``cases``, which have one form; None if nothing is."""
        first, both = cases[0], copy(self)
        original, emitted = ([dict(zip(first.made[n], c.made[n], strict=True)) for c in cases] for n in (0, 1))
        both.sides = self.sides[0].beside(original), self.sides[1].beside(emitted)
        both.last, both.whole = [[], []], {first.before}
        both.equal = [{}, {}]
        precision = self.precision(first.after)
        self.meter.start()
        found = both._jointed(first.before, first.after, precision) or both._whole(first.before, first.after, precision)
        return found if found.verdict == "equal" and all(span(v).is_ordinary for v in both.last[1][:-1]) else None

    def _passes_on(self, before: str, after: str) -> bool:
        """Whether two tensors are made by one operator, channel by channel, of operands that lost the same channels."""
        mine, other = self.sides[0].operands(before), self.sides[1].operands(after)
        if len(mine) != len(other) or self.narrowings.keys().isdisjoint(mine) or before in self.whole:
            return False
        separate = self.sides[0].separate(before)
        if separate is None or self.sides[0].kind(before) != self.sides[1].kind(after):
            return False
        lost = {a: self.narrowings[a] for a in mine if a in self.narrowings}
        axis = next(iter(lost.values())).axis
        for a, b in zip(mine, other, strict=True):
            if self.cuts[1].get(b) != a and not self.same_constant(a, b):
                return False
            if a not in lost and not (self._is_single(a, axis) if separate.computed else a in self.sides[0].constants):
                return False
        found = passed(lost, separate)
        if found is not None:
            self._enter(before, after, found)
        return found is not None

    def _enter(self, before: str, after: str, narrowing: Narrowing) -> None:
        self.narrowings[before] = narrowing
        self.sides[1].narrowed(after)

    def _is_single(self, name: str, axis: int) -> bool:
        """Whether an operand is the same for all channels, which lie along ``axis``."""
        constant = self.sides[0].constant(name)
        if constant is not None:
            return constant.size == 1
        shape = self.sides[0].leaf(name, name).shape
        return axis < len(shape) and shape[axis].known == 1

    def _narrowed(
        self, before: str, after: str, mine: Value, other: Value, axis: int, precision: Precision
    ) -> Agreement:
        """Compare two tensors of which the emitted one has fewer channels along ``axis``, and note what they are."""
        match = matched(mine, other, axis)
        if match is None:
            reason = "a channel of the result is none of the original"
            return Agreement("different", np.inf, np.inf, reason, np.inf)
        narrowing, kept = match
        found = agree(kept, other, precision)
        if found.verdict == "equal":
            self._enter(before, after, narrowing)
        return found

    def _leaf(self, which: int, name: str) -> Value:
        """A cut, by its name in the original, as a source of both graphs: as the emitted one has it."""
        leaf = self.sides[0].leaf(name, name)
        narrowing = self.narrowings.get(name)
        if narrowing is None:
            return replace(leaf, meter=self.meter)
        whole, left = leaf.shape, len(narrowing.gone)
        leaf = nf_leaf(name, shape_of(whole, narrowing, narrowing.width), self.meter)
        if which == 1:
            return put_back(leaf, None, narrowing.emitted)
        rest = nf_leaf(_own(0, f"{name}, what is left of it"), shape_of(whole, narrowing, left), self.meter)
        return put_back(leaf, rest if left else None, narrowing)

    def _jointed(self, before: str, after: str, precision: Precision) -> Window | None:
        """Compare two tensors link by link, so that kernels are not multiplied out; None unless all agree."""
        joints, atoms = _Joints(), list[_Atom]()
        try:
            mine, m = self._expand(0, before, set(), atoms, None, joints)
            other, n = self._expand(1, after, set(), atoms, precision, joints if joints.values else None)
            found = [*joints.found, agree(mine, other, precision)]
        except (Unrepresentable, _NoJoint):
            return None
        if any(f.verdict != "equal" for f in found) or self._doubt(atoms, precision):
            return None
        return Window(before, "equal", max(f.units for f in found), sum(f.bound for f in found), "", m, n)

    def _whole(self, before: str, after: str, precision: Precision) -> Window:
        """Compare two tensors as functions of cuts. Where these differ, the latest is expanded, and so on."""
        through, fixed = set[str](), set[str]()  # the second are constant
        different: Window | None = None
        last = Window(before, "undecided", reason="the two depend on different tensors, however far they are followed")
        for trial in range(MOST_TRIES):
            self.tries += trial >= FEW_TRIES
            if trial >= FEW_TRIES and self.tries > SPARE_TRIES:
                break
            atoms: list[_Atom] = []
            try:
                mine, m = self._expand(0, before, through | fixed, atoms, None)
                other, n = self._expand(1, after, through | fixed, atoms, precision)
                axis = None if through or before in self.whole else narrowed_axis(mine, other)
                read = set[str]() if axis is None else {s.leaf for s in mine.grids} - fixed
                if known := {leaf for leaf in read & self.position.keys() if self._is_constant(leaf)}:
                    fixed |= known
                    continue
                if axis is None:
                    found = agree(mine, other, precision)
                else:
                    found = self._narrowed(before, after, mine, other, axis, precision)
            except Unrepresentable as error:
                last = Window(before, "undecided", reason=str(error))
                break
            seen = Window(before, found.verdict, found.units, found.bound, found.reason, m, n, found.excess)
            if found.verdict == "equal":
                reason = self._doubt(atoms, precision)
                return replace(seen, verdict="undecided", reason=reason) if reason else seen
            apart = {s.leaf for s in mine.grids} ^ {s.leaf for s in other.grids}
            first, second = (_cuts_under(value, apart, atoms) for value in (mine, other))
            leaves, union = first ^ second, first | second
            if not apart:
                different = different or (seen if found.verdict == "different" else None)
                last = seen
            # What only one side reads may lie under something that both read, and leaves may depend on one another:
            # so the latest goes first.
            start = min((self.position.get(leaf, -1) for leaf in leaves), default=0)
            further = [leaf for leaf in union if self.position.get(leaf, -2) >= max(start, 0)]
            if not further or (not apart and len(union) == 1):
                if any(leaf.startswith(RESIZED) for leaf in apart):
                    last = replace(seen, verdict="undecided", reason="the two resize different tensors, or otherwise")
                elif apart and atoms:
                    last = replace(seen, verdict="undecided", reason=_unmatched(apart, atoms))
                elif apart:
                    different = different or seen  # only inputs of the graph are left, and they are independent
                break
            through.add(max(further, key=self.position.__getitem__))
        return different or last

    def _is_constant(self, name: str) -> bool:
        """Whether a tensor of the original is the same for every input, as far as its operators alone tell."""
        try:
            value, _ = self._expand(0, name, set(), [], None)
        except Exception:  # as in `window`: it is only not known to be constant
            return False
        return not any((b.left[:, None, None] * b.weight).any() for b in value.blocks)

    def _expand(
        self,
        which: int,
        root: str,
        through: set[str],
        atoms: list[_Atom],
        precision: Precision | None,
        joints: _Joints | None = None,
    ) -> tuple[Value, int]:
        """``root`` as a function of cuts, and how many operators that takes.

        Operators that are not affine are entered into ``atoms``; those of the emitted graph (``precision`` given) are
        looked for among those of the original first. With ``joints``, what one kernel makes and another reads is a
        leaf, too: those of the original are entered, those of the emitted graph looked for.

        Raises:
            _NoJoint: a joint of the emitted graph is none of the original.
        """
        side, cuts = self.sides[which], self.cuts[which]
        values: dict[str, Value] = {}
        order: list[str] = []
        reached = self._reached(which, root, through)
        if which == 1:
            self.met.update(reached)
        for name in reached:
            known_as = cuts.get(name)
            if not side.is_input(name) and (known_as is None or name == root or known_as in through):
                order.append(name)
            else:
                # One shape for both graphs: sizes that are unknown may be named otherwise in each.
                leaf = self._leaf(which, known_as) if known_as else side.leaf(name, _own(which, name))
                values[name] = replace(leaf, meter=self.meter)
        ends = self._ends(which, order) if joints else {}
        whole: dict[str, Value] = {}  # what a joint of the original is, and what is made of it alone
        for name in order:
            self.meter.spend(TAP)
            try:
                value = side.value(name, values.__getitem__)
            except Unrepresentable:
                same = self._unchanged(which).get(name)
                value = values[same] if same else self._atom(which, name, values, atoms, precision)
            if joints and name in ends and _is_dense(value):
                if precision is None:
                    whole[name] = value
                    value = joints.enter(value, replace(side.leaf(name, _own(which, name)), meter=self.meter))
                elif (found := joints.find(value, precision)) is not None:
                    value = found
                elif ends[name]:
                    raise _NoJoint
            elif joints and name in ends and not whole.keys().isdisjoint(side.operands(name)):
                whole[name] = side.value(name, lambda operand: whole[operand] if operand in whole else values[operand])
                if ends[name]:
                    joints.enter_as(whole[name], value)
            self.meter.spend(BLOCK * (len(value.blocks) + len(value.vectors)))
            values[name] = value
        self.last[which] = [values[name] for name in order]
        return values[root], len(order)

    def _unchanged(self, which: int) -> dict[str, str]:
        """The activations of a graph that give their operand as it is, with that."""
        if (found := self.equal[which]) is None:
            side = self.sides[which]
            found = self.equal[which] = unchanged(side.order, side.bound, side.operands)
        return found

    def _doubt(self, atoms: Sequence[_Atom], precision: Precision) -> str:
        """Why two that are one function may differ when they run: empty where they do not."""
        if any(atom.name.startswith(_own(1, "")) for atom in atoms):
            return "the result runs an operator that cancels, and that the original does not run"
        return "numbers on the way are larger or smaller than before" if self._leaves_range(precision) else ""

    def _leaves_range(self, precision: Precision) -> bool:
        """Whether the emitted graph goes through numbers out of the range of those that the original goes through."""
        after = [span(v) for v in self.last[1][:-1]]
        if all(s.is_ordinary for s in after):
            return False
        before = [span(v) for v in self.last[0]]
        few = precision.unit >= FEW_DIGITS  # so are exponents
        largest = max(1.0, *(s.largest for s in before))
        least = min(1.0, *(s.least for s in before))
        return any(
            s.largest > largest * (NARROW if few else WIDE)
            or s.least < least / (NARROW if few else WIDE)
            or s.added > ADDED * max(1.0, *(b.added for b in before), *(b.largest for b in before))
            for s in after
        )

    def _ends(self, which: int, order: Sequence[str]) -> dict[str, bool]:
        """Where joints may be: what kernels read (True), and what that is made of without another operand (False)."""
        side, inside = self.sides[which], set(order)
        found: dict[str, bool] = {}
        for kernel in order:
            if side.mixes(kernel):
                for name in inside.intersection(side.operands(kernel)):
                    found[name] = True
                    while not side.mixes(name):
                        given = [o for o in side.operands(name) if o not in side.constants]
                        if len(given) != 1 or given[0] not in inside:
                            break
                        (name,) = given
                        found.setdefault(name, False)
        return found

    def _reached(self, which: int, root: str, through: set[str]) -> list[str]:
        """The tensors from which ``root`` is computed, back to cuts, operands first."""
        side, cuts = self.sides[which], self.cuts[which]
        done: dict[str, None] = {}
        stack = [root]
        while stack:
            name = stack[-1]
            known_as = cuts.get(name)
            waiting: list[str] = []
            if name not in done and (known_as is None or name == root or known_as in through):
                waiting = [o for o in side.operands(name) if o not in done and o not in side.constants]
            if waiting:
                stack.extend(reversed(waiting))
            else:
                done[stack.pop()] = None
        return list(done)

    def _atom(
        self, which: int, name: str, values: Mapping[str, Value], atoms: list[_Atom], precision: Precision | None
    ) -> Value:
        side = self.sides[which]
        opened = side.opened(name)
        if opened is None:
            opened = Opened(side.kind(name), side.operands(name), lambda known_as: side.leaf(name, known_as), _as_it_is)
        kind, operands, _, _ = opened
        given: list[Value | Array] = []
        for operand in operands:
            constant = side.constant(operand)
            given.append(values[operand] if constant is None else constant)
        for atom in atoms:
            if atom.kind == kind and (
                _are_one(atom.operands, given)
                if precision is None
                else _all_agree(atom.operands, given, [self.precision(o) for o in operands])
            ):
                return opened.finish(atom.leaf)
        leaf = replace(opened.leaf(_own(which, name)), meter=self.meter)
        atom = _Atom(_own(which, name), kind, tuple(given), leaf)
        atoms.append(atom)
        return opened.finish(atom.leaf)


def _batches(cases: Sequence[_Case]) -> Iterator[Sequence[_Case]]:
    """``cases``, at least two at a time, and as many as are quick to compare together."""
    count = max(2, MOST_BESIDE // max(cases[0].parameters, 1))
    yield from (cases[at : at + count] for at in range(0, len(cases) - 1, count))


def _as_it_is(value: Value) -> Value:
    return value


def _are_one(mine: Sequence[Value | Array], other: Sequence[Value | Array]) -> bool:
    """Whether two operators of one graph read the same tensors."""
    return len(mine) == len(other) and all(a is b for a, b in zip(mine, other, strict=True))


def _all_agree(mine: Sequence[Value | Array], other: Sequence[Value | Array], precisions: Sequence[Precision]) -> bool:
    """Whether operands are equal, each held to its own dtype: that of the result may be coarser."""
    if len(mine) != len(other):
        return False
    for a, b, precision in zip(mine, other, precisions, strict=True):
        if isinstance(a, Value) and isinstance(b, Value):
            if agree(a, b, precision).verdict != "equal":
                return False
        elif isinstance(a, Value) or isinstance(b, Value) or not same_bytes(a, b):
            return False
    return True


def same_bytes(a: Array, b: Array) -> bool:
    """Whether two arrays hold the same bits: NaN is itself, and zero is not negative zero."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind == "O" or a.dtype.itemsize not in (1, 2, 4, 8):
        return a.tobytes() == b.tobytes()
    m, n = (np.ascontiguousarray(v).reshape(-1).view(f"u{a.dtype.itemsize}") for v in (a, b))
    return bool(np.array_equal(m[:64], n[:64]) and np.array_equal(m, n))  # most that differ do so from the start


def _cuts_under(value: Value, apart: set[str], atoms: Sequence[_Atom]) -> set[str]:
    """The leaves of a value; for atoms that only one side has (``apart``), those of their operands."""
    by_name = {atom.name: atom for atom in atoms}
    found: set[str] = set()
    stack = [s.leaf for s in value.grids]
    seen = set(stack)
    while stack:
        name = stack.pop()
        if name not in apart or name not in by_name:
            found.add(name)
            continue
        for operand in by_name[name].operands:
            inner = {s.leaf for s in operand.grids} - seen if isinstance(operand, Value) else set[str]()
            stack += inner
            seen |= inner
            apart = apart | inner
    return found


def _unmatched(leaves: set[str], atoms: Sequence[_Atom]) -> str:
    """Why two windows have different leaves to the end."""
    names = [atom.name.split(" ", 1)[1] for atom in atoms if atom.name in leaves]
    if not names:
        return f"one of the two alone depends on {min(leaves)!r}, which operators that are not affine read as well"
    return f"no operator of the other graph is known to be equal to {names[0]!r}"
