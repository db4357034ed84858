"""Impulse response: the kernel of trees of linear operators that the rules left in pieces or cannot read.

Regions are found once more, wider: they also take in operators that are linear by kind and have no
reading. A tree on one operand is then a function, and `probe` says whether it is a convolution.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import cast

import numpy as np

from reparamc.algebra.arrays import values
from reparamc.algebra.cost import positions_after
from reparamc.algebra.evaluate import evaluate
from reparamc.algebra.expr import Array, Conv, Expr, Layout, Resize, Source, arrays, total, walk
from reparamc.algebra.places import result_size
from reparamc.algebra.probe import difference, find_kernel, measured, only_moves, slack_of, tried_sizes
from reparamc.algebra.recorded import Recorded, tape
from reparamc.algebra.records import replace
from reparamc.algebra.rewrite import Declined
from reparamc.algebra.text import show
from reparamc.compiler.consider import Decision, Setting, rounding_obstacle
from reparamc.compiler.graph import Graph, Splice
from reparamc.compiler.plan import Compilation
from reparamc.compiler.readings import Reading, Taps, Value, is_norm
from reparamc.compiler.regions import find_regions, lifted

MOST_AXES = 3
"""Axes of an image: no framework has a convolution over more."""


def take_kernels(compilation: Compilation, name: str) -> None:
    """Trees of linear operators on one operand that the rules left in pieces become the one kernel that they are."""
    setting = compilation.setting
    wrong = {v for d in compilation.failed.values() for v in d.members}
    for splice in list(_find_kernels(setting, compilation.decisions, name)):
        if wrong.isdisjoint(splice.members) and compilation.is_read_right(splice, splice.members):
            for root in splice.members:
                compilation.decisions.pop(root, None)
            compilation.decisions[splice.root] = Decision(splice.expr, splice, [], splice.members)


def _find_kernels(setting: Setting, decisions: Mapping[Value, Decision], name: str) -> Iterator[Splice]:
    graph, readings = setting.graph, setting.readings
    wide: dict[Value, Reading] = {}
    for value in graph.values():
        operands = readings[value].operands if value in readings else graph.moves(value)
        if operands is not None and not _is_no_kernel(readings.get(value)):
            wide[value] = readings.get(value, Reading(total([*map(Source, operands)])))
    if wide.keys() <= readings.keys() and not any(r.at_border for d in decisions.values() for r in d.refusals):
        return  # there is none to look for
    for members in find_regions(graph, wide, apart=wide).values():
        for tree in _trees_on_one_operand(members, wide):
            left = [decisions[v] for v in tree if v in decisions]
            unread = [v for v in tree if v not in readings]
            if (unread and len(tree) > 1) or any(r.at_border for d in left for r in d.refusals):
                splice = _as_kernel(setting, tree, wide, left, len(unread))
                if splice is not None:
                    yield replace(splice, counts=Counter({name: 1}))


def _is_no_kernel(reading: Reading | None) -> bool:
    """Whether an operator does not treat all positions alike (a resize), or its operand (a normalization)."""
    e = reading.template if reading is not None else None
    return e is not None and (is_norm(e) or (isinstance(e, Layout) and isinstance(e.op, Resize)))


def _trees_on_one_operand(members: Sequence[Value], readings: dict[Value, Reading]) -> Iterator[tuple[Value, ...]]:
    """The largest trees inside a region that read one value only; members in execution order, the root last."""
    inside = set(members)
    operand: dict[Value, Value | None] = {}  # None: several
    parent: dict[Value, Value] = {}
    for value in members:
        read = {operand[v] if v in inside else v for v in readings[value].operands}
        operand[value] = read.pop() if len(read) == 1 else None
        parent.update((v, value) for v in readings[value].operands if v in inside)
    for root in members:
        above = parent.get(root)
        if operand[root] is not None and (above is None or operand[above] is None):
            found, stack = {root}, [root]
            while stack:
                inner = [v for v in readings[stack.pop()].operands if v in inside and v not in found]
                found.update(inner)
                stack += inner
            yield tuple(v for v in members if v in found)


def _as_kernel(
    setting: Setting, tree: tuple[Value, ...], wide: dict[Value, Reading], left: Sequence[Decision], unread: int
) -> Splice | None:
    graph, readings, objective = setting.graph, setting.readings, setting.objective
    root, (operand,) = tree[-1], {v for t in tree for v in wide[t].operands} - set(tree)
    if isinstance(operand, Taps):
        return None
    source, dtype = graph.source(operand), graph.dtype([*tree, operand])
    if dtype is None or source.shape is None or not 3 <= len(source.shape) <= MOST_AXES + 2:
        return None
    shape = graph.source(root).shape
    if (channels := source.shape[1].known) is None or (shape is not None and len(shape) != len(source.shape)):
        return None
    reach = _reach(graph, tree, wide, readings)
    sizes, batch = [d.known for d in source.shape[2:]], source.shape[0].known
    if not unread:
        sizes, batch, whole = [None] * len(sizes), None, lifted(graph, tree, readings, {})[root]
        if sum(not isinstance(e, Source) for e in walk(whole)) < 2 or any(isinstance(e, Layout) for e in walk(whole)):
            return None
    function = _function(graph, tree, operand, wide, readings)
    ends = [d.known for d in shape[2:]] if shape is not None else []
    found = find_kernel(function, source, batch if unread else 1, channels, sizes, reach, dtype, ends)
    if isinstance(found, Declined):
        return None
    conv, error = found
    # What reads a part moves no more than this.
    moved = objective.moving(min(conv.in_channels, conv.out_channels), positions_after(conv))
    if (
        not objective.cost(conv) < sum(objective.cost(d.expr) for d in left) + unread * moved
        or conv.skips_border
        or any(rounding_obstacle(a, dtype) for a in arrays(conv))
        or only_moves(conv, sizes)
        or _refuses_more(function, conv, [d.known for d in source.shape[2:]])
    ):
        return None
    if graph.is_written(root) or graph.obstacle(root, tree, [operand], [conv]) is not None:
        return None
    if (conv := _remembered(function, conv, tried_sizes(sizes, reach)[0], batch, dtype)) is None:
        return None
    parameters = tuple(dict.fromkeys(p for v in tree if v in readings for p in readings[v].parameters))
    text = "\n".join(graph.name(v) for v in tree)
    native = {conv.x: operand}
    return Splice(root, tree, conv, native, dtype, Counter(), parameters, text, show(conv), error)


def _remembered(
    f: Callable[[Array], Array], conv: Conv, size: Sequence[int], batch: int | None, dtype: np.dtype
) -> Conv | None:
    """``conv``, the kernel of ``f``, recorded as it is made of parameters, if parameters are recorded.

    It is None where ``f`` is no such kernel for others, or cannot be recorded.
    """
    on = tape()
    if on is None:
        return conv
    try:
        made = measured(f, conv, tuple(size), batch, on.namespace.zeros)
    except NotImplementedError:
        return None
    x = np.random.default_rng(0).standard_normal((batch or 2, conv.in_channels, *size))
    recorded = cast("list[Recorded]", [made.weight, made.bias, f(cast(Array, on.namespace.asarray(x)))])
    weight, bias, expected = on.elsewhere(recorded, values)
    if difference(replace(conv, weight=weight, bias=bias), x, expected) > slack_of(dtype):
        return None
    return made if conv.bias is not None or bias.any() else replace(made, bias=None)


def _refuses_more(f: Callable[[Array], Array], conv: Conv, sizes: Sequence[int | None]) -> bool:
    """Whether ``conv`` refuses a map that ``f`` takes, because it has no element, or makes none of it."""
    whole = tried_sizes(sizes, 0)[0]
    for axis, known in enumerate(sizes):
        for n in range(max(conv.reach[axis], 0) - min(conv.offset[axis], 0) + 1 if known is None else 0):
            size = tuple(n if i == axis else m for i, m in enumerate(whole))
            if n and all(result_size(conv, size)):
                continue
            try:
                f(np.zeros((1, conv.in_channels, *size)))
            except Exception:  # whatever a host's operators raise for a size that does not fit them
                continue
            return True
    return False


def _function(
    graph: Graph, tree: Sequence[Value], operand: Value, wide: dict[Value, Reading], readings: Container[Value]
) -> Callable[[Array], Array]:
    """A tree as a function of its operand: what has a reading by `evaluate`, the rest by the host's operators."""
    sources = {v: graph.source(v) for value in tree for v in wide[value].operands}
    exprs = {v: wide[v].over(sources) for v in tree if v in readings}

    def run(x: Array) -> Array:
        values = {operand: x}
        for value in tree:
            operands = {v: values[v] for v in wide[value].operands}
            if value in exprs:
                values[value], _ = evaluate(exprs[value], {sources[v]: y for v, y in operands.items()})
                if not values[value].size and _has_kernel(exprs[value]):
                    raise ValueError("a convolution refuses a map that it makes nothing of")
            else:
                values[value] = graph.run(value, operands)
        return values[tree[-1]]

    return run


def _has_kernel(e: Expr) -> bool:
    return any(isinstance(part, Conv) and not part.is_weightless for part in walk(e))


def _reach(graph: Graph, tree: Sequence[Value], wide: dict[Value, Reading], readings: Container[Value]) -> int:
    """A bound for how far the operators of a tree reach together, and for the positions that they name."""
    found: dict[Value, tuple[int, int]] = {}  # reach and stride, both in positions of the operand of the tree
    for value in tree:
        below = [found.get(v, (0, 1)) for v in wide[value].operands]
        reach, stride = max(r for r, _ in below), max(s for _, s in below)
        if value not in readings:
            found[value] = reach + stride * graph.reach(value), stride
            continue
        own, step = 0, 1
        for e in walk(wide[value].template):
            if isinstance(e, Conv):
                own += max((abs(n) for ends in (e.offset, e.reach) for n in ends), default=0)
                step *= max(e.stride, default=1)
        found[value] = reach + stride * own, stride * step
    return found[tree[-1]][0]
