"""Parameters that several operators hold, under an objective that prices what is stored.

A region is priced as if its parameters were its own. A parameter goes only if everything that holds it goes, so a
rewrite of one of several convolutions with one weight stores another weight. That is settled for the whole plan.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from math import prod

from reparamc.compiler.consider import Setting
from reparamc.compiler.graph import Splice
from reparamc.compiler.readings import Value, is_norm

STORED_TWICE = "its parameters are used elsewhere as well, and would be stored once more"


def unpaid(setting: Setting, splices: Sequence[Splice]) -> set[Value]:
    """The units of ``splices`` that store more than they save, since others hold the parameters that they replace."""
    price = setting.objective.parameter
    if not price:
        return set()
    sizes, holders = _stored(setting)
    gains, members = defaultdict[Value, float](float), defaultdict[Value, set[Value]](set)
    for s in splices:
        if s.original is not None:
            gains[s.unit] += setting.objective.cost(s.original) - setting.objective.cost(s.expr)
        for v in members[s.unit].intersection(s.members):
            if is_norm(setting.readings[v].template):  # what several readers take in goes once
                stored = [sizes[p] for p in setting.readings[v].parameters]
                gains[s.unit] -= price * (sum(stored) - (stored[0] if setting.objective.stores_ones else 0))
        members[s.unit].update(s.members)
    held = {unit: _held(setting, inside) for unit, inside in members.items()}
    for name in {name for names in held.values() for name in names}:
        holders[name].update(setting.graph.holders(name))

    def pays(units: Collection[Value], gone: Collection[Value | None]) -> bool:
        """Whether ``units`` save anything when all of ``gone`` go."""
        times = sum((held[u] for u in units), Counter[str]())
        once = sum(sizes[n] * (k - holders[n].issubset(gone)) for n, k in times.items())
        gain = sum(gains[u] for u in units)
        return gain >= 0 if not once else gain > price * once

    alone = {unit for unit in members if pays([unit], members[unit])}
    certain = {v for unit in alone for v in members[unit]}
    left: set[Value] = set()
    for group in _linked({unit: held[unit] for unit in members if unit not in alone}):
        if not pays(group, certain.union(*(members[u] for u in group))):
            left.update(group)
    return left


def _stored(setting: Setting) -> tuple[dict[str, int], dict[str, set[Value | None]]]:
    """How many numbers each parameter has, and which of the operators that are read hold it."""
    sizes: dict[str, int] = {}
    holders: dict[str, set[Value | None]] = defaultdict(set)
    for value, reading in setting.readings.items():
        for leaf in reading.leaves:
            for name in leaf.names:
                sizes[name] = max(prod(leaf.shape) if len(leaf.names) == 1 else 0, sizes.get(name, 0))
                holders[name].add(value)
    return sizes, holders


def _held(setting: Setting, values: Collection[Value]) -> Counter[str]:
    """How many of ``values`` hold each parameter."""
    return Counter(name for v in values if v in setting.readings for name in setting.readings[v].parameters)


def _linked(held: Mapping[Value, Collection[str]]) -> list[list[Value]]:
    """The units in groups: those of two groups hold nothing in common."""
    units_of: dict[str, list[Value]] = defaultdict(list)
    for unit, names in held.items():
        for name in names:
            units_of[name].append(unit)
    groups: list[list[Value]] = []
    seen: set[Value] = set()
    for start in held:
        group: list[Value] = []
        stack = [start]
        while stack:
            unit = stack.pop()
            if unit not in seen:
                seen.add(unit)
                group.append(unit)
                stack += [other for name in held[unit] for other in units_of.pop(name, ())]
        groups += [group] if group else []
    return groups
