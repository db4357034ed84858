"""Who is asked for sizes: no value of an ONNX graph stays for its shape alone.

A Shape or Size reads no numbers of its operand. If a rewrite takes that operand away, another value that stays and has
the same shape is asked, or several that have a part of it each. `Sizes` says which values can go, and `told` moves the
reads once they are gone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, cast

from onnx import NodeProto, helper

from reparamc.algebra.records import record
from reparamc.algebra.shape import Dim, Shape
from reparamc.onnx.facts import Facts
from reparamc.onnx.values import Names, attribute, captured, is_placed, is_standard

MOST_FOLLOWED = 256
"""Operators that are looked at to find out whether one depends on another."""


def reads_size_only(node: NodeProto | None) -> bool:
    return node is not None and node.op_type in ("Shape", "Size") and is_standard(node) and not is_placed(node)


@record
class Told:
    """What tells a read of sizes: a value of that shape; or, for each size, a number, or a value and its axis."""

    asked: str | None = None
    parts: tuple[int | tuple[str, int], ...] = ()


class Sizes:
    """The reads of sizes that others can answer; the graph is not changed.

    Attributes:
        freed: for each value that may go, what tells its reads, by their results. All of them can be told, or none.

    Args:
        goes: whether the operator of a value may become part of another one.
    """

    def __init__(self, facts: Facts, goes: Callable[[str], bool]) -> None:
        self.facts, self.goes = facts, goes
        self.freed: dict[str, dict[str, Told]] = {}
        wanted = list(dict.fromkeys(node.input[0] for node in facts.nodes if reads_size_only(node)))
        wanted = [name for name in wanted if name not in facts.constants and not self._stays(name)]
        if not wanted:
            return
        self._position = {name: at for at, node in enumerate(facts.nodes) for name in node.output[:] if name}
        self._alike: dict[Shape, list[str]] = {}
        self._homes: dict[Dim, tuple[str, int]] = {}
        for name in (*(v.name for v in facts.model.graph.input), *self._position):
            shape = facts.types.shape(name)
            if shape is not None and name not in facts.constants and self._stays(name):
                self._alike.setdefault(shape, []).append(name)
                for axis, dim in enumerate(shape):
                    self._homes.setdefault(dim, (name, axis))
        self._asked: dict[str, str] = {}  # reads that wait for a value that is computed after them
        self._start, self._end = 0, -1  # where the latest of these, and all that overlap it, begin and end
        for name in wanted:
            self._free(name)

    def _stays(self, name: str) -> bool:
        """Whether ``name`` is computed whatever is rewritten."""
        if name not in self.facts.producers or not self.goes(name):
            return True
        users = [u for u in self.facts.uses.get(name, []) if not reads_size_only(u)]
        return not users or not all(u is not None and any(self.goes(o) for o in u.output if o) for u in users)

    def _free(self, name: str) -> None:
        reads = [u for u in self.facts.uses[name] if u is not None and reads_size_only(u)]
        asked = dict(self._asked), self._start, self._end
        told: dict[str, Told] = {}
        for read in reads:
            found = self._told(name, read)
            if found is None:
                self._asked, self._start, self._end = asked
                return
            told[read.output[0]] = found
        self.freed[name] = told

    def _told(self, name: str, read: NodeProto) -> Told | None:
        shape, place = self.facts.types.shape(name), self._at(read.output[0])
        if shape is None:
            return None
        alike = self._alike.get(shape, [])
        after = bisect_left(alike, place, key=self._at)
        if after:
            return Told(alike[after - 1])
        if alike[after:] and self._can_wait(read.output[0], alike[after]):
            return Told(alike[after])
        parts = self._parts(read, shape, place)
        return None if parts is None else Told(parts=parts)

    def _at(self, name: str) -> int:
        return self._position.get(name, -1)

    def _parts(self, read: NodeProto, shape: Shape, place: int) -> tuple[int | tuple[str, int], ...] | None:
        """What tells each size that ``read`` gives, and is there before it."""
        if read.op_type == "Size":
            return None
        first, last = cast(int, attribute(read, "start", 0)), cast("int | None", attribute(read, "end"))
        parts = [dim.known if dim.known is not None else self._homes.get(dim) for dim in shape[first:last]]
        found = tuple(p for p in parts if isinstance(p, int) or (p is not None and self._at(p[0]) < place))
        return found if len(found) == len(parts) else None

    def _can_wait(self, read: str, asked: str) -> bool:
        """Whether ``asked``, which is computed after ``read``, does without it; it is then waited for."""
        place, end = self._at(read), self._at(asked)
        start = self._start if place <= self._end else place
        stack, seen = [asked], {asked}
        while stack:
            name = stack.pop()
            if name == read or len(seen) > MOST_FOLLOWED:
                return False
            node = self.facts.producers.get(name)
            given = [] if node is None or self._at(name) < start else [*node.input[:], *captured(node)]
            given += [self._asked[name]] if name in self._asked else []
            fresh = set(filter(None, given)) - seen
            seen |= fresh
            stack += fresh
        self._start, self._end = start, max(end, self._end) if place <= self._end else end
        self._asked[read] = asked
        return True


def answered(
    sizes: Sizes,
    gone: Collection[str],
    nodes: Sequence[NodeProto],
    names: Names,
    store: Callable[[str, list[int]], str],
) -> tuple[list[NodeProto], set[str]]:
    """``nodes``, in which others tell sizes of the values that are ``gone``, in order; and the results of these reads.

    Args:
        store: keeps whole numbers under a name of that kind; gives the name.
    """
    answers = {read: how for name in gone for read, how in sizes.freed.get(name, {}).items()}
    if not answers:
        return list(nodes), set()
    found: list[NodeProto] = []
    for node in nodes:
        how = answers.get(node.output[0]) if node.output else None
        if how is None:
            found.append(node)
        elif how.asked is not None:
            node.input[0] = how.asked
            found.append(node)
        else:
            found += _assembled(node, how.parts, names, store)
    return in_order(found), set(answers)


def _assembled(
    read: NodeProto, parts: Sequence[int | tuple[str, int]], names: Names, store: Callable[[str, list[int]], str]
) -> list[NodeProto]:
    """What gives the result of ``read`` out of its ``parts``."""
    result = read.output[0]
    made: list[NodeProto] = []
    given: list[str] = []
    numbers: list[int] = []

    def node(op: str, inputs: list[str], output: str | None, **attributes: Any) -> str:
        output = output or names.fresh(f"{result}_{op.lower()}")
        name = names.fresh(f"{read.name or result}/{op}")
        made.append(helper.make_node(op, inputs, [output], name, **attributes))
        made[-1].metadata_props.extend(read.metadata_props)
        return output

    def keep_numbers() -> None:
        if numbers:
            given.append(store(f"{result}.sizes", numbers))
            numbers.clear()

    for part in parts:
        if isinstance(part, int):
            numbers.append(part)
            continue
        keep_numbers()
        x, axis = part
        shape = node("Shape", [x], None)
        given.append(node("Gather", [shape, store(f"{result}.axis", [axis])], None, axis=0))
    keep_numbers()
    if len(given) == 1:
        node("Identity", given, result)
    else:
        node("Concat", given, result, axis=0)
    return made


def in_order(nodes: Iterable[NodeProto]) -> list[NodeProto]:
    """``nodes`` in their order, but each after what it reads.

    Raises:
        ValueError: some of them wait for one another.
    """
    nodes = list(nodes)
    makes = {name: at for at, node in enumerate(nodes) for name in node.output[:] if name}
    done, waiting = [False] * len(nodes), [False] * len(nodes)
    found: list[NodeProto] = []
    for start in range(len(nodes)):
        stack = [start]
        while stack:
            at = stack[-1]
            if done[at]:
                stack.pop()
                continue
            given = (*nodes[at].input, *captured(nodes[at]))
            before = [makes[name] for name in given if name in makes and not done[makes[name]]]
            if not before:
                done[at] = True
                found.append(nodes[stack.pop()])
            elif waiting[at]:
                raise ValueError(
                    f"the operators of {nodes[at].output[0]!r} and {nodes[before[0]].output[0]!r} form a circle"
                )
            else:
                waiting[at] = True
                stack += reversed(before)
    return found
