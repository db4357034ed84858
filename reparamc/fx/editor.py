"""The torch.fx adapter, editing: splices carried out on a copy of a traced graph."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from reparamc.algebra.expr import Layout, Select
from reparamc.algebra.recorded import tape
from reparamc.compiler.graph import Fold, Splice
from reparamc.compiler.readings import Value
from reparamc.fx.calls import over, with_operands
from reparamc.fx.emit import Emitter, Target
from reparamc.fx.memory import only_asserted, reads_size_only
from reparamc.fx.operators import OPERATORS
from reparamc.fx.readings import Readings
from reparamc.fx.result import FusedModule
from reparamc.fx.sizes import Mover


@dataclass(frozen=True)
class Edited:
    """A module with splices carried out; ``places``: the node that computes what each of their roots computed."""

    module: fx.GraphModule
    places: dict[Value, str]

    @cached_property
    def names(self) -> set[str]:
        """What it computes under the name of the original, or in the place of that."""
        nodes = self.module.graph.nodes
        return {str(n.meta.get("stands_for", n.name)) for n in nodes} | {n.name for n in nodes}


class Editor:
    """A copy of a traced module in which splices are carried out. The graph that it is made of stays as it is.

    Attributes:
        source: the graph as it was read; all values in splices are its nodes.
        copies: the node of the copy for each of its nodes.
        module, graph: what is new, and the copy.
    """

    def __init__(self, source: Readings) -> None:
        self.source, self.facts, self.target = source, source.facts, Target(source.module)
        self.graph, self.module, self.copies = self.target.graph, self.target.module, self.target.copies
        self._mover = Mover(source.sizes, self.graph, self.copies)
        self._known = {self.copies[n] for n in self.facts.known}
        self._suspects: list[fx.Node] = []
        self._ranked: list[fx.Node] = []
        self._rewritten: list[fx.Node] = []

    def carry_out(self, edits: Sequence[Splice | Fold]) -> Edited:
        """The copy with ``edits`` in it, and without what is dead then."""
        splices = [edit for edit in edits if isinstance(edit, Splice)]
        self._mover.free(dict.fromkeys(cast(fx.Node, m) for s in splices for m in s.members if m != s.root))
        for splice in splices:
            self._splice(splice)
        for edit in edits:
            if isinstance(edit, Fold):
                self._fold(cast(fx.Node, edit.root))
        places = {s.root: self.target.current(s.root).name for s in splices}
        return Edited(self._finished(), places)

    def _splice(self, splice: Splice) -> None:
        root = cast(fx.Node, splice.root)
        old = self.copies[root]
        emitter = Emitter(self.source, self.target, splice, root)
        with self.graph.inserting_before(old):
            result = emitter.computed()
            if self._would_share(splice, root):
                result = self.graph.call_function(torch.clone, (result,))
        old.replace_all_uses_with(result, propagate_meta=False)
        if not result.meta:
            result.meta.update({k: v for k, v in root.meta.items() if k in ("tensor_meta", "val")})
        result.meta["reparamc"] = dict(splice.counts)
        if splice.expr not in splice.native:
            result.meta.setdefault("stands_for", root.name)
        self.target.spliced[old] = result
        members = cast(Sequence[fx.Node], splice.members)
        for member in members:
            self._suspects += [self.copies[m] for m in (member, *self.source.written.get(member, ()))]
        self._rewritten += members
        self._ranked += [m for m in members if self.source.exported or self._depends_on_rank(m)]

    def _fold(self, node: fx.Node) -> None:
        """Keep what forward computes from parameters alone, instead of computing it."""
        value = self.facts.known[node]
        assert isinstance(value, Tensor)
        given = [v for n in node.all_input_nodes if isinstance(v := self.facts.known.get(n), Tensor)]
        holder = nn.Module()
        is_trained = value.is_floating_point() and any(t.requires_grad for t in given)
        holder.value = nn.Parameter(value.detach().clone(), requires_grad=is_trained)
        if (on := tape()) is not None and (at := on.at(value)) is not None:
            on.place(holder.value, at)
        path = self.target.fresh_path("folded")
        self.module.add_submodule(path, holder)
        old = self.copies[node]
        with self.graph.inserting_before(old):
            kept = self.graph.get_attr(f"{path}.value")
        for user in [u for u in old.users if u not in self._known]:
            user.replace_input_with(old, kept)
        self._suspects.append(old)

    def _finished(self) -> fx.GraphModule:
        """The module without what is dead, and what only that used."""
        self._assert_ranks()
        self._assert_batches()
        source = self.source
        quiet = {self.copies[n] for n in (*source.through, *source.inner)}.union(self._known, self._suspects)
        suspects = list(self._suspects)
        while suspects:
            node = suspects.pop()
            if node.graph is not self.graph or getattr(node, "_erased", False):
                continue
            for user in list(node.users):
                if (reads_size_only(user) and only_asserted(user)) or _is_unread(user):
                    _erase_tree(self.graph, user)
            if not node.users and node.op not in ("placeholder", "output"):
                given = [n for n in node.all_input_nodes if n.op != "placeholder"]
                suspects += [n for n in given if n in quiet or n.op == "get_attr" or reads_size_only(n)]
                self.graph.erase_node(node)
        self._mover.drop_unused()
        fused = over(FusedModule, self.target.holder(), self.graph, type(self.source.module).__name__)
        fused.training = False
        for module in fused.modules():
            if type(module) is nn.Module:  # a container that tracing made; the modules in it keep their modes
                module.training = False
        return fused

    def _would_share(self, splice: Splice, root: fx.Node) -> bool:
        """Whether the replacement is a view of a value of which ``root`` was none, and someone writes into either."""
        e = splice.expr
        while e not in splice.native and isinstance(e, Layout | Select):
            e = e.x
        if e not in splice.native:
            return False
        base = cast(fx.Node, splice.native[e])
        memory, order = self.source.memory, self.source.order
        late = any(order[w] > order[root] for w in (*memory.writers(base), *memory.writers(root)))
        return late and base not in memory.aliases(root)

    # Ranks

    def _given_rank(self, x: fx.Node) -> int | None:
        """The rank that the argument ``x`` has in the example."""
        value = x.meta.get("val") if self.source.exported else self.source.examples.get(str(x.target))
        return value.ndim if isinstance(value, Tensor) else None

    def _depends_on_rank(self, node: fx.Node) -> bool:
        """Whether ``node`` may do something else to a value of another rank that it takes as well."""
        call = self.facts.calls[node]
        if call is None:
            return True
        if call.op == "batch_norm":
            return not call.axes
        if call.op == "cat":
            return call.get("dim", 0) >= 0
        if call.op in ("add", "sub", "mul", "div"):
            held = [v for name in ("input", "other") if isinstance(v := self._constant(call.args.get(name)), Tensor)]
            axis = self.source.axis(node)
            return any(t.ndim > (0 if axis is None else -axis) for t in held)
        return not OPERATORS[call.op].any_rank

    def _constant(self, arg: Any) -> Any:
        return self.facts.known.get(arg) if isinstance(arg, fx.Node) else arg

    def _assert_ranks(self) -> None:
        """Refuse inputs of another rank than the examples', where something that was rewritten depends on it."""
        source = self.source
        seen = {*self._ranked, *self._mover.ranked}
        if not source.exported and seen:
            alone = source.facts.without_examples()

            def is_open(n: fx.Node) -> bool:
                return n not in alone.known and n not in alone.pieces and alone.rank(n) is None

            seen = {n for n in seen if is_open(n) or any(map(is_open, n.all_input_nodes))}
        seen = with_operands(seen)
        placeholders = source.graph.find_nodes(op="placeholder")
        asked = [(placeholders[-1], x, rank) for x in placeholders if x in seen and (rank := self._given_rank(x))]
        asked += [
            (placeholders[-1] if x in placeholders else x, x, rank)
            for x, rank in self.facts.assumed.items()
            if x in seen and not self._given_rank(x)
        ]
        asked += [(x, x, rank) for x in source.elements if x in seen and (rank := source.ranks.get(x)) is not None]
        for node in seen:  # how many axes of size one there are, other inputs may tell otherwise
            call, rank = self.facts.calls.get(node), self.facts.rank(node)
            if call is not None and call.op == "squeeze" and call.args.get("dim") is None and rank is not None:
                asked.append((node, node, rank))
        for place, x, rank in asked:
            with self.graph.inserting_after(self.copies[place]):
                read = self.graph.call_method("dim", (self.copies[x],))
            why = "as it was fused for, without example_inputs" if x in self.facts.assumed else _AS_THE_EXAMPLE
            name = x.target if x.op == "placeholder" else x.name
            self._assert_equal(read, rank, f"{name} must have {rank} axes, {why}")

    def _assert_batches(self) -> None:
        """Refuse lists of tensors that are not all as many examples, where something was rewritten that reads two."""
        seen = with_operands(self._rewritten)
        others = {x.args: x for x in self.source.elements if x in seen}  # it may be taken out of the list again
        for x in others.values():
            first = self.source.elements[x]
            if first in seen and x.args != first.args:
                with self.graph.inserting_after(self.copies[x]):
                    sizes = [self.graph.call_method("size", (self.copies[one], 0)) for one in (first, x)]
                self._assert_equal(max(sizes), min(sizes), f"all of {x.args[0]} must be as many, {_AS_THE_EXAMPLE}")

    def _assert_equal(self, read: fx.Node, other: fx.Node | int, message: str) -> None:
        with self.graph.inserting_after(read):
            equal = self.graph.call_function(operator.eq, (read, other))
        with self.graph.inserting_after(equal):
            self.graph.call_function(torch._assert, (equal, message))


_AS_THE_EXAMPLE = "as the example had with which this was fused"


def _is_unread(node: fx.Node) -> bool:
    """Whether ``node`` is one of several results, and nothing reads it."""
    return node.target is operator.getitem and not node.users


def _erase_tree(graph: fx.Graph, node: fx.Node) -> None:
    order: list[fx.Node] = []
    stack = [node]
    while stack:
        n = stack.pop()
        if n not in order:
            order.append(n)
            stack.extend(n.users)
    for n in sorted(order, reverse=True):
        graph.erase_node(n)
