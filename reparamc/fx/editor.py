"""The edits of a traced module: splices, folded constants, assertions, and what is dead after them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from reparamc.algebra.expr import Layout, Select
from reparamc.compiler.graph import Splice
from reparamc.fx.emit import Emitter, Target
from reparamc.fx.memory import Memory, only_asserted, reads_size_only
from reparamc.fx.operators import OPERATORS
from reparamc.fx.readings import Readings
from reparamc.fx.shapes import Values


class Editor:
    """Carries out splices on the module that was read."""

    def __init__(self, readings: Readings) -> None:
        self.readings, self.target = readings, Target(readings.module)
        self.suspects: list[fx.Node] = []
        self._ranked = list(readings.ranked)

    def splice(self, splice: Splice) -> None:
        """Compute ``splice.expr`` in place of ``splice.root``."""
        root = cast(fx.Node, splice.root)
        emitter = Emitter(self.readings, self.target, splice, root)
        with self.target.graph.inserting_before(root):
            result = emitter.run()
            if self._would_share(splice, root):
                result = self.target.graph.call_function(torch.clone, (result,))
        root.replace_all_uses_with(result, propagate_meta=False)
        if not result.meta:
            result.meta.update({k: v for k, v in root.meta.items() if k in ("tensor_meta", "val")})
        result.meta["reparamc"] = dict(splice.counts)
        if splice.expr not in splice.native:
            result.meta.setdefault("stands_for", root.name)
        self.target.spliced[root] = result
        for member in cast(Sequence[fx.Node], splice.members):
            self.suspects += [member, *self.readings.written.get(member, ())]
        members = cast(Sequence[fx.Node], splice.members)
        self._ranked += [m for m in members if self.readings.exported or self._depends_on_rank(m)]

    def _depends_on_rank(self, node: fx.Node) -> bool:
        """Whether ``node`` may do something else to a value of another rank that it takes as well."""
        call = self.readings.facts.calls[node]
        if call is None:
            return True
        if call.op == "batch_norm":
            return not call.axes
        if call.op == "cat":
            return call.get("dim", 0) >= 0
        if call.op in ("add", "sub", "mul", "div"):
            held = [v for name in ("input", "other") if isinstance(v := self._constant(call.args.get(name)), Tensor)]
            axis = self.readings.axis(node)
            return any(t.ndim > (0 if axis is None else -axis) for t in held)
        return not OPERATORS[call.op].any_rank

    def _constant(self, arg: Any) -> Any:
        return self.readings.facts.known.get(arg) if isinstance(arg, fx.Node) else arg

    def _assert_ranks(self) -> None:
        """Refuse inputs of another rank than the examples', where something that was rewritten depends on it."""
        seen = set(self._ranked)
        if not self.readings.exported and seen:
            alone = Values(self.target.module, {}, Memory(self.target.graph, self.target.module))

            def is_open(n: fx.Node) -> bool:
                return n not in alone.known and n not in alone.pieces and alone.rank(n) is None

            seen = {n for n in seen if is_open(n) or any(map(is_open, n.all_input_nodes))}
        stack = list(seen)
        while stack:
            fresh = [n for n in stack.pop().all_input_nodes if n not in seen]
            seen.update(fresh)
            stack += fresh
        placeholders = self.target.graph.find_nodes(op="placeholder")
        asked = [(placeholders[-1], x, rank) for x in placeholders if x in seen and (rank := self._given_rank(x))]
        asked += [
            (placeholders[-1] if x in placeholders else x, x, rank)
            for x, rank in self.readings.facts.assumed.items()
            if x in seen and not self._given_rank(x)
        ]
        for node in seen:  # how many axes of extent one there are, other inputs may tell otherwise
            call, rank = self.readings.facts.calls.get(node), self.readings.facts.rank(node)
            if call is not None and call.op == "squeeze" and call.args.get("dim") is None and rank is not None:
                asked.append((node, node, rank))
        for place, x, rank in asked:
            with self.target.graph.inserting_after(place):
                read = self.target.graph.call_method("dim", (x,))
            with self.target.graph.inserting_after(read):
                equal = self.target.graph.call_function(operator.eq, (read, rank))
            with self.target.graph.inserting_after(equal):
                why = "as it was fused for, without example_inputs"
                if x not in self.readings.facts.assumed:
                    why = "as the example had with which this was fused"
                message = f"{x.target if x.op == 'placeholder' else x.name} must have {rank} axes, {why}"
                self.target.graph.call_function(torch._assert, (equal, message))

    def _given_rank(self, x: fx.Node) -> int | None:
        """The rank that the argument ``x`` has in the example."""
        value = x.meta.get("val") if self.readings.exported else self.readings.examples.get(str(x.target))
        return value.ndim if isinstance(value, Tensor) else None

    def _would_share(self, splice: Splice, root: fx.Node) -> bool:
        """Whether the replacement is a view of a value of which ``root`` was none, and someone writes into either."""
        e = splice.expr
        while e not in splice.native and isinstance(e, Layout | Select):
            e = e.x
        if e not in splice.native:
            return False
        base = cast(fx.Node, splice.native[e])
        writers = [*self.readings.memory.writers(base), *self.readings.memory.writers(root)]
        late = any(self.readings.order[w] > self.readings.order[root] for w in writers)
        return late and base not in self.readings.memory.aliases(root)

    def fold_constants(self) -> int:
        """Keep what forward computes from parameters alone, instead of computing it; how many results are kept.

        A result that takes more room than its operands is left.
        """
        folded = 0
        for node in list(self.target.graph.nodes):
            value = self.readings.facts.known.get(node)
            users = [u for u in node.users if u not in self.readings.facts.known]
            if not isinstance(value, Tensor) or not node.op.startswith("call") or not users:
                continue
            given = [v for n in node.all_input_nodes if isinstance(v := self.readings.facts.known.get(n), Tensor)]
            if value.numel() > max(sum(t.numel() for t in given), 1024):
                continue
            holder = nn.Module()
            is_trained = value.is_floating_point() and any(t.requires_grad for t in given)
            holder.value = nn.Parameter(value.detach().clone(), requires_grad=is_trained)
            path = self.target.fresh_path("folded")
            self.target.module.add_submodule(path, holder)
            with self.target.graph.inserting_before(node):
                kept = self.target.graph.get_attr(f"{path}.value")
            for user in users:
                user.replace_input_with(node, kept)
            self.suspects.append(node)
            folded += 1
        return folded

    def finish(self) -> fx.GraphModule:
        """Drop what is dead, and what only it used."""
        self._assert_ranks()
        suspects = list(self.suspects)
        while suspects:
            node = suspects.pop()
            if node.graph is not self.target.graph or getattr(node, "_erased", False):
                continue
            for user in list(node.users):
                if (reads_size_only(user) and only_asserted(user)) or _is_unread(user):
                    _erase_tree(self.target.graph, user)
            if not node.users and node.op not in ("placeholder", "output"):
                suspects.extend(n for n in node.all_input_nodes if n.op != "placeholder" and _is_quiet(n, self))
                self.target.graph.erase_node(node)
        self.target.graph.lint()
        fused = fx.GraphModule(self.target.module, self.target.graph, type(self.target.module).__name__)
        fused.training = False
        for module in fused.modules():
            if type(module) is nn.Module:  # a container that tracing made; the modules in it keep their modes
                module.training = False
        return fused


def _is_quiet(node: fx.Node, editor: Editor) -> bool:
    """Whether ``node`` may be erased once nothing reads it."""
    return (
        node.op == "get_attr"
        or node in editor.readings.facts.known
        or node in editor.readings.through
        or node in editor.readings.inner
        or node in editor.suspects
        or reads_size_only(node)
    )


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
