"""The torch.fx adapter: linear operators of a traced module as expressions.

Nodes that no rewrite touches stay the same objects with the same metadata. Parameters are read by
value, so that modules called twice and tied weights get private copies where they are folded.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from reparamc.algebra.expr import Array, Conv, Expr, Source
from reparamc.algebra.kernels import OF_THIS_SHAPE, ONE_EACH
from reparamc.algebra.rewrite import Declined
from reparamc.compiler.graph import Bounded, Fold, Separate
from reparamc.compiler.readings import Reading, Taps, Value, is_norm, values_in
from reparamc.fx.bounds import bounded
from reparamc.fx.calls import Held, lookup, with_operands
from reparamc.fx.copying import tensors
from reparamc.fx.memory import only_asserted, reads_size_only
from reparamc.fx.readers import READERS
from reparamc.fx.readings import Readings
from reparamc.fx.runner import run
from reparamc.fx.separate import may_narrow, separate


class FxGraph(Readings):
    """`reparamc.compiler.graph.Graph` over a traced module. Values are nodes.

    Args:
        examples, seen, exported: as for `Readings`.
    """

    pools_clamp = False
    stores_ones = False

    def __init__(
        self,
        module: fx.GraphModule,
        examples: Mapping[str, Tensor],
        seen: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
        *,
        exported: bool = False,
    ) -> None:
        super().__init__(module, READERS, examples, seen, exported=exported)
        self._asked: dict[fx.Node, list[fx.Node]] = {}  # who may come to ask a value for its shape
        for freed in self.sizes.freed.values():
            if freed.asked is not None:
                self._asked.setdefault(freed.asked, []).extend(freed.reads)

    def values(self) -> Sequence[fx.Node]:
        return [
            n
            for n in self.graph.nodes
            if n.op in ("call_module", "call_function", "call_method") and n not in self.facts.known
        ]

    def name(self, value: Value) -> str:
        node = cast(fx.Node, value)
        return str(node.target) if node.op == "call_module" else node.name

    def holders(self, parameter: str) -> Sequence[Value | None]:
        return ()

    def users(self, value: Value) -> Sequence[Value | None]:
        node = cast(fx.Node, value)
        found: list[Value | None] = []
        freed = self.sizes.freed.get(node)
        skipped = {*self.written.get(node, ()), *(freed.reads if freed is not None else ())}
        for user in (*node.users, *self._asked.get(node, ())):
            if user in skipped:
                continue
            if user.op == "output":
                found.append(None)
            elif not (reads_size_only(user) and only_asserted(user)):
                found += self.through.get(user) or [user] * max(_mentions(user, value), 1)
        return found

    def obstacle(
        self, root: Value, members: Sequence[Value], sources: Sequence[Value], made: Collection[Expr]
    ) -> str | None:
        """Devices and dtypes must agree, and nothing that is written in place may look different to any reader."""
        nodes = cast(Sequence[fx.Node], members)
        if any(is_norm(e) and not cast(Conv, e).is_per_channel for e in made):
            return ONE_EACH
        if any(self._has_another_weight(e) for e in made):
            return OF_THIS_SHAPE
        if len({t.device for t in self.tensors(nodes)}) > 1:
            return "its parameters are on different devices"
        recorded = [n.meta.get("val") for n in (*nodes, *cast(Sequence[fx.Node], sources)) if self.exported]
        if len({v.dtype for v in recorded if isinstance(v, Tensor)}) > 1:
            return "its values are of different dtypes"
        last = self.order[cast(fx.Node, root)]
        is_fresh = self.memory.is_fresh(cast(fx.Node, root))
        shared = set[fx.Node]() if is_fresh else set(self.memory.aliases(cast(fx.Node, root)))
        for value in (*cast(Sequence[fx.Node], sources), *nodes[:-1]):
            reads = [self.order[u] for u in cast("list[fx.Node]", self.users(value)) if u in nodes]
            writers = self.memory.writers(value)
            view = value in shared and value in sources and not any(w in nodes for w in writers)
            for writer in writers:
                if writer in nodes:
                    visible = not self.is_private(value, writer)
                elif value in nodes:  # it would be computed afresh, without what was written
                    foreign = writer not in self.written.get(value, ())
                    visible = foreign and self.order[value] < self.order[writer] < last
                elif view:
                    visible = self.order[writer] > min(reads, default=last)  # it may go through a view of the result
                else:
                    visible = bool(reads) and min(reads) < self.order[writer] < last
                if visible:
                    return f"{writer.name!r} changes an operand in place"
        return None

    def _has_another_weight(self, e: Expr) -> bool:
        """Whether ``e`` is a convolution of a class of its own with a weight of another shape."""
        if not (isinstance(e, Conv) and isinstance(e.x, Source) and isinstance(e.x.key, Taps)):
            return False
        call = self.facts.calls[cast(fx.Node, e.x.key.of)]
        held = self.facts.held(call.args["weight"]) if call is not None and call.op == "gathering" else None
        return held is not None and (e.out_channels, e.groups) != (len(held[0]), call and call.args["groups"])

    def is_written(self, value: Value, but: Value | None = None) -> bool:
        node = cast(fx.Node, value)
        return any(w is not but and self.order[w] > self.order[node] for w in self.memory.writers(node))

    def moves(self, value: Value) -> tuple[Value, ...] | None:
        node = cast(fx.Node, value)
        if node in self.facts.known or node in self.facts.dims or isinstance(self.read(node), Declined):
            return None
        called = self._called(node)
        operands = tuple(n for n in node.all_input_nodes if n not in self.facts.known)
        if called is None or called.linear is None or (called.linear == "one" and len(operands) > 1):
            return None
        if any(n in self.facts.dims or n in self.facts.sizes for n in operands):
            return None  # indices that are computed at run time
        return operands or None

    def reads(self, value: Value) -> Sequence[Value]:
        node = cast(fx.Node, value)
        if node in self.through or node in self.inner:
            return []  # its users read in its place
        if isinstance(reading := self.read(node), Reading):
            return [*values_in(reading.operands)]
        return [n for n in node.all_input_nodes if n not in self.facts.known]

    def separate(self, value: Value) -> Separate | None:
        return separate(self, cast(fx.Node, value))

    def bounded(self, value: Value) -> Bounded | None:
        return bounded(self, cast(fx.Node, value))

    def may_narrow(self, value: Value) -> bool:
        return may_narrow(self, cast(fx.Node, value))

    def reach(self, value: Value) -> int:
        node = cast(fx.Node, value)
        found = [1]

        def see(given: Any) -> None:
            if isinstance(given, slice):
                given = (given.start, given.stop, given.step)
            if isinstance(given, int) and abs(given) < 2**30:
                found.append(abs(given))
            elif isinstance(given, tuple | list):
                for inner in given:
                    see(inner)
            elif isinstance(given, fx.Node) and isinstance(known := self.facts.known.get(given), Tensor):
                whole = known.dtype in (torch.int32, torch.int64)
                found.extend(known.abs().flatten().tolist() if whole else known.shape[2:])

        call = self.facts.calls.get(node)
        for arg in (*node.args, *node.kwargs.values(), *(call.args.values() if call is not None else ())):
            see(arg.tensor.shape[2:] if isinstance(arg, Held) else arg)
        for write in self.written.get(node, ()):
            see(write.args)
        return max(found)

    def run(self, value: Value, operands: Mapping[Value, Array], sizes: Mapping[str, int] = {}) -> Array:
        return run(self, value, operands, sizes)

    def kind(self, value: Value) -> Hashable:
        node = cast(fx.Node, value)
        call = self.facts.calls.get(node)

        def plain(given: Any) -> Hashable:
            if isinstance(given, fx.Node) and node is not given:
                given = self.facts.known.get(given, "value")
            if isinstance(given, Held | Tensor):
                shape = (given.tensor if isinstance(given, Held) else given).shape
                return (*(n == 1 for n in shape[:2]), *shape[2:])
            if isinstance(given, Mapping):
                return tuple((name, plain(inner)) for name, inner in given.items() if name != "groups")
            if isinstance(given, slice):
                return (slice, plain(given.start), plain(given.stop), plain(given.step))
            if isinstance(given, tuple | list):
                return tuple(plain(inner) for inner in given)
            return given if isinstance(given, bool | int | float | str | None) else str(given)

        if call is None or node in self.shuffles:
            return node.op, str(node.target), plain(node.args), plain(node.kwargs)
        return node.op, call.op, call.axes, plain(call.args)

    def folded(self, small: int) -> tuple[FxGraph, list[Fold]]:
        """As `Graph.folded`. A result that takes more room than those of its operands that go is left."""
        found: list[Fold] = []
        stays: set[int] | None = None
        for node in self.graph.nodes:
            value = self.facts.known.get(node)
            users = [u for u in node.users if u not in self.facts.known]
            if not isinstance(value, Tensor) or not node.op.startswith("call") or not users:
                continue
            stays = self._kept_constants() if stays is None else stays
            given = {at: n for at, n in self._made_of(node).items() if at not in stays}
            if value.numel() <= max(sum(given.values()), small, 1):
                found.append(Fold(node, node))
                stays.update(given)
        return self, found

    def _made_of(self, node: fx.Node) -> dict[int, int]:
        """The tensors that a constant is computed from, by identity, and how many numbers they have."""
        made = [n for n in with_operands([node]) if n.op == "get_attr" or n.target == "new_tensor"]
        held = [self.facts.known.get(n) for n in made]
        return {id(t): t.numel() for t in held if isinstance(t, Tensor)}

    def _kept_constants(self) -> set[int]:
        """The tensors, by identity, that something else reads as they are."""
        known = self.facts.known
        modules = [lookup(self.module, str(n.target)) for n in self.graph.nodes if n.op == "call_module"]
        held = {id(t) for m in modules for t in tensors(m)}
        own = [n for n in self.graph.nodes if n.op == "get_attr" and isinstance(known.get(n), Tensor)]
        return held | {id(known[n]) for n in own if any(u not in known for u in n.users)}


def _mentions(user: fx.Node, value: Value) -> int:
    count = 0

    def see(n: fx.Node) -> fx.Node:
        nonlocal count
        count += n is value
        return n

    map_arg((user.args, user.kwargs), see)
    return count
