"""The torch.fx adapter: linear operators of a traced module as expressions.

Nodes that no rewrite touches stay the same objects with the same metadata. Parameters are read by
value, so that modules called twice and tied weights get private copies where they are folded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from reparamc.algebra.expr import Array, Expr, Layout, Select, Source
from reparamc.algebra.rewrite import Declined
from reparamc.compiler.graph import Reading, Splice, Taps, Value, values_in
from reparamc.fx.calls import Held, as_plain, lookup, spelled
from reparamc.fx.emit import Emitter
from reparamc.fx.memory import Memory, only_asserted, reads_size_only
from reparamc.fx.operators import OPERATORS, Operator
from reparamc.fx.readers import HOOKED, READERS, FxReading, find_shuffle
from reparamc.fx.shapes import Values
from reparamc.fx.sizes import free_sizes

DTYPES: dict[torch.dtype, np.dtype] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
}


class FxGraph:
    """`reparamc.compiler.graph.Graph` over a traced module. Values are nodes.

    Args:
        examples: the example inputs that are tensors, by the name of their placeholder.
        ranks: of the values that those give, by the name of their node.
        exported: whether torch.export made the graph and recorded its shapes.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        examples: Mapping[str, Tensor],
        ranks: Mapping[str, int] = MappingProxyType({}),
        *,
        exported: bool = False,
    ) -> None:
        self.module, self.graph, self.exported = module, module.graph, exported
        self.examples = examples
        given = {name: t.ndim for name, t in examples.items() if t.is_floating_point()}
        self.ranks: dict[fx.Node, int] = {}
        for node in module.graph.nodes:
            rank = given.get(str(node.target)) if node.op == "placeholder" else ranks.get(node.name)
            if rank is not None:
                self.ranks[node] = rank
        self._learn()
        self._ranked = free_sizes(self.facts, self._may_go)
        self.sizes_moved = bool(self._ranked)
        """Whether the shapes of some values are asked of others than before."""
        if self.sizes_moved:
            self._learn()
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.through: dict[fx.Node, list[fx.Node]] = {}
        self.shuffles: dict[fx.Node, tuple[fx.Node, int, list[fx.Node]]] = {}
        self.inner: set[fx.Node] = set()
        self._readings: dict[fx.Node, FxReading | Declined | None] = {}
        self._likes: dict[fx.Node, Tensor | None] = {}
        self._spliced: dict[fx.Node, fx.Node] = {}
        self.emitted: dict[Expr, fx.Node] = {}
        self.suspects: list[fx.Node] = []
        self._next: dict[str, int] = {}
        self.written = self._find_written()
        for node in self.graph.nodes:
            self._look_through(node)

    def _learn(self) -> None:
        self.memory = Memory(self.graph, self.module)
        self.facts = Values(self.module, self.ranks, self.memory, exported=self.exported, batched=True)

    def _may_go(self, node: fx.Node) -> bool:
        """Whether an operator is linear by its kind, so that it may become part of another one."""
        if not node.op.startswith("call_"):
            return False
        called = self._called(node)
        return node.target is operator.setitem or (
            called is not None and (called.name in READERS or called.linear is not None)
        )

    def _called(self, node: fx.Node) -> Operator | None:
        """The operator that ``node`` calls; None where that is not known, or hooks run."""
        call = self.facts.calls.get(node)
        if call is None:
            found = spelled(node, self.module) if node.op in ("call_function", "call_method") else None
            return found[0] if found is not None and not found[0].arguments else None
        return OPERATORS[call.op] if call.plain else None

    def _find_written(self) -> dict[fx.Node, list[fx.Node]]:
        """Values with the slice assignments that complete them: constants, before anything else reads the value."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target is operator.setitem and isinstance(node.args[0], fx.Node):
                found.setdefault(node.args[0], []).append(node)
        return {value: writes for value, writes in found.items() if self._is_completed(value, writes)}

    def _is_completed(self, value: fx.Node, writes: list[fx.Node]) -> bool:
        constant = all(n in self.facts.known for w in writes for n in w.all_input_nodes if n is not value)
        own = value.op.startswith("call") and set(self.memory.aliases(value)) <= {value, *writes}
        last = max(self.order[w] for w in writes)
        return constant and own and all(self.order[u] > last for u in value.users if u not in writes)

    def _look_through(self, node: fx.Node) -> None:
        """Note what stands for ``node`` as a reader of its operand: the pieces of a split, the end of a shuffle."""
        call = self.facts.calls[node]
        if call is not None and call.op in ("split", "chunk", "unbind") and node.users:
            users = list(node.users)
            if all((c := self.facts.calls[u]) is not None and c.op == "getitem" for u in users):
                self.through[node] = users
        if call is not None and call.op == "native_batch_norm":
            read = [u for u in node.users if u.users]
            if len(read) == 1 and self.facts.is_normalised(read[0]):
                self.through[node] = read
        shuffle = find_shuffle(self, node)
        if shuffle is not None:
            self.shuffles[node] = shuffle
            self.inner.update(shuffle[2])
            self.through[shuffle[2][-1]] = [node]

    # Reading

    def values(self) -> Sequence[fx.Node]:
        return [
            n
            for n in self.graph.nodes
            if n.op in ("call_module", "call_function", "call_method") and n not in self.facts.known
        ]

    def name(self, value: Value) -> str:
        node = cast(fx.Node, value)
        return str(node.target) if node.op == "call_module" else node.name

    def readers(self, value: Value) -> Sequence[Value | None]:
        found: list[Value | None] = []
        for user in cast(fx.Node, value).users:
            if user in self.written.get(cast(fx.Node, value), ()):
                continue
            if user.op == "output":
                found.append(None)
            elif not (reads_size_only(user) and only_asserted(user)):
                found += self.through.get(user) or [user] * _mentions(user, value)
        return found

    def source(self, value: Value) -> Source:
        if isinstance(value, Taps):
            return value.source(self.facts.shapes.get(cast(fx.Node, value.of)))
        return Source(value, shape=self.facts.shapes.get(cast(fx.Node, value)))

    def tensors(self, members: Sequence[Value]) -> list[Tensor]:
        """The parameters of ``members``, or else a tensor of the dtype and device of the last of them."""
        readings = [self.read(m) for m in members]
        found = [t for r in readings if isinstance(r, FxReading) for t in r.tensors]
        if not found and (like := self.like(cast(fx.Node, members[-1]))) is not None:
            return [like]
        return found

    def dtype(self, members: Sequence[Value]) -> np.dtype | None:
        found = {t.dtype for t in self.tensors(members)}
        return DTYPES.get(found.pop()) if len(found) == 1 else None

    def like(self, node: fx.Node) -> Tensor | None:
        """A tensor of the dtype and device of ``node``, where those are known."""
        chain: list[fx.Node] = []
        at: fx.Node | None = node
        found: Tensor | None = None
        while at is not None and at not in self._likes:
            chain.append(at)
            value = at.meta.get("val") if self.exported else self.examples.get(str(at.target))
            reading = self.read(at)
            if isinstance(value, Tensor) and (at.op == "placeholder" or self.exported):
                found, at = value, None
            elif isinstance(reading, FxReading) and reading.tensors:
                found, at = reading.tensors[0], None
            elif isinstance(reading, FxReading):
                at = cast(fx.Node, reading.operands[0])
            else:
                call = self.facts.calls.get(at)
                kept = call is not None and "dtype" in OPERATORS[call.op].keeps and "dtype" not in call.args
                at = call.input if call is not None and kept else None
        if at is not None:
            found = self._likes[at]
        self._likes.update(dict.fromkeys(chain, found))
        return found

    def obstacle(
        self, root: Value, members: Sequence[Value], sources: Sequence[Value], made: Collection[Expr]
    ) -> str | None:
        """Devices and dtypes must agree, and nothing that is written in place may look different to any reader."""
        nodes = cast(Sequence[fx.Node], members)
        if len({t.device for t in self.tensors(nodes)}) > 1:
            return "its parameters are on different devices"
        recorded = [n.meta.get("val") for n in (*nodes, *cast(Sequence[fx.Node], sources)) if self.exported]
        if len({v.dtype for v in recorded if isinstance(v, Tensor)}) > 1:
            return "its values are of different dtypes"
        last = self.order[cast(fx.Node, root)]
        shared = set(self.memory.aliases(cast(fx.Node, root)))
        for value in (*cast(Sequence[fx.Node], sources), *nodes[:-1]):
            reads = [self.order[u] for u in cast("list[fx.Node]", self.readers(value)) if u in nodes]
            writers = self.memory.writers(value)
            view = value in shared and value in sources and not any(w in nodes for w in writers)
            for writer in writers:
                if writer in nodes:
                    visible = not self._is_private(value, writer)
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

    def _is_private(self, value: fx.Node, writer: fx.Node) -> bool:
        """Whether nothing but the result of ``writer`` shows that it writes into the memory of ``value``."""
        aliases = self.memory.aliases(value)
        older = [a for a in aliases if self.order[a] < self.order[writer]]
        late = any(self.order[u] > self.order[writer] for a in older for u in a.users)
        return aliases[0].op not in ("placeholder", "get_attr") and not late

    def axis(self, value: Any) -> int | None:
        reading = self.read(value) if isinstance(value, fx.Node) and value in self.order else None
        return reading.axis if isinstance(reading, Reading) else None

    def channels(self, node: fx.Node, axis: int | None) -> int | None:
        """The number of channels of ``node`` along ``axis``, where it is known."""
        reading, shape = self.read(node), self.facts.shapes.get(node)
        if isinstance(reading, FxReading) and reading.channels is not None and reading.axis in (axis, None):
            return reading.channels
        return shape[axis].known if shape is not None and axis is not None and -axis <= len(shape) else None

    def read(self, value: Value) -> FxReading | Declined | None:
        """As `Graph.read`. Operands are read first, by an explicit stack: readers ask for their axes."""
        stack = [cast(fx.Node, value)]
        while stack:
            node = stack[-1]
            if node in self._readings:
                stack.pop()
                continue
            waiting = [n for n in node.all_input_nodes if n not in self._readings]
            if waiting:
                stack += waiting
                continue
            self._readings[stack.pop()] = self._read(node)
        return self._readings[cast(fx.Node, value)]

    def _read(self, node: fx.Node) -> FxReading | Declined | None:
        call = self.facts.calls.get(node)
        if call is None or node in self.facts.known or node in self.facts.dims:
            return None
        if node in self.inner or node in self.written:
            return None
        reader = READERS.get(call.op)
        found = reader(self, node, call) if reader is not None else None
        operands = values_in(found.operands) if isinstance(found, Reading) else ()
        if any(node in self.memory.writers(v) and not self._is_private(v, node) for v in operands):
            return Declined(f"{node.name!r} changes an operand in place")
        return Declined(HOOKED) if isinstance(found, Reading) and not call.plain else found

    def is_written(self, value: Value) -> bool:
        node = cast(fx.Node, value)
        return any(self.order[w] > self.order[node] for w in self.memory.writers(node))

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

    def run(self, value: Value, operands: Mapping[Value, Array], extents: Mapping[str, int] = {}) -> Array:
        """By torch's own operator, in float64 on the CPU."""
        root = cast(fx.Node, value)
        values: dict[fx.Node, Any] = {
            cast(fx.Node, v): torch.from_numpy(np.array(x, copy=True)) for v, x in operands.items()
        }
        if extents:  # sizes may be read from a value that is not given
            for node, dims in (*((n, (d,)) for n, d in self.facts.dims.items()), *self.facts.sizes.items()):
                if all(s in extents for d in dims for s in d.symbols):
                    found = torch.Size(d.at(extents) for d in dims)
                    values.setdefault(node, found if node in self.facts.sizes else found[0])
        modules: dict[str, nn.Module] = {}
        with torch.no_grad():
            for node in self._between(set(values), root):
                known = self.facts.known.get(node)
                if known is not None:
                    is_float = isinstance(known, Tensor) and known.is_floating_point()
                    values[node] = known.detach().to("cpu", torch.float64, copy=True) if is_float else known
                    continue
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                if node.op == "call_module":
                    path = str(node.target)
                    if path not in modules:
                        modules[path] = as_plain(lookup(self.module, path)).to("cpu", torch.float64)
                    values[node] = modules[path](*args, **kwargs)
                elif node.op == "call_method":
                    values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    values[node] = cast(Callable[..., Any], node.target)(*args, **kwargs)
        return values[root].numpy()

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

    def _between(self, given: set[fx.Node], root: fx.Node) -> list[fx.Node]:
        """What has to be computed for ``root`` where ``given`` is there, in execution order."""
        found = set(given)
        stack = [root]
        while stack:
            node = stack.pop()
            if node not in found:
                found.update((node, *self.written.get(node, ())))
                stack += [n for w in self.written.get(node, ()) for n in w.all_input_nodes]
                stack += [] if node in self.facts.known else node.all_input_nodes
        return sorted(found - given, key=self.order.__getitem__)

    # Writing

    def splice(self, splice: Splice) -> None:
        root = cast(fx.Node, splice.root)
        emitter = Emitter(self, splice, root)
        with self.graph.inserting_before(root):
            result = emitter.run()
            if self._would_share(splice, root):
                result = self.graph.call_function(torch.clone, (result,))
        root.replace_all_uses_with(result, propagate_meta=False)
        if not result.meta:
            result.meta.update({k: v for k, v in root.meta.items() if k in ("tensor_meta", "val")})
        result.meta["reparamc"] = dict(splice.counts)
        if splice.expr not in splice.native:
            result.meta.setdefault("stands_for", root.name)
        self._spliced[root] = result
        for member in cast(Sequence[fx.Node], splice.members):
            self.suspects += [member, *self.written.get(member, ())]
        members = cast(Sequence[fx.Node], splice.members)
        self._ranked += [m for m in members if self.exported or self._depends_on_rank(m)]

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
            axis = self.axis(node)
            return any(t.ndim > (0 if axis is None else -axis) for t in held)
        return not OPERATORS[call.op].any_rank

    def _constant(self, arg: Any) -> Any:
        return self.facts.known.get(arg) if isinstance(arg, fx.Node) else arg

    def _assert_ranks(self) -> None:
        """Refuse inputs of another rank than the examples', where something that was rewritten depends on it."""
        seen = set(self._ranked)
        if not self.exported and seen:
            alone = Values(self.module, {}, Memory(self.graph, self.module))

            def is_open(n: fx.Node) -> bool:
                return n not in alone.known and n not in alone.pieces and alone.rank(n) is None

            seen = {n for n in seen if is_open(n) or any(map(is_open, n.all_input_nodes))}
        stack = list(seen)
        while stack:
            fresh = [n for n in stack.pop().all_input_nodes if n not in seen]
            seen.update(fresh)
            stack += fresh
        placeholders = self.graph.find_nodes(op="placeholder")
        asked = [(placeholders[-1], x, rank) for x in placeholders if x in seen and (rank := self._given_rank(x))]
        asked += [
            (placeholders[-1] if x in placeholders else x, x, rank)
            for x, rank in self.facts.assumed.items()
            if x in seen and not self._given_rank(x)
        ]
        for node in seen:  # how many axes of extent one there are, other inputs may tell otherwise
            call, rank = self.facts.calls.get(node), self.facts.rank(node)
            if call is not None and call.op == "squeeze" and call.args.get("dim") is None and rank is not None:
                asked.append((node, node, rank))
        for place, x, rank in asked:
            with self.graph.inserting_after(place):
                read = self.graph.call_method("dim", (x,))
            with self.graph.inserting_after(read):
                equal = self.graph.call_function(operator.eq, (read, rank))
            with self.graph.inserting_after(equal):
                why = "as it was fused for, without example_inputs"
                if x not in self.facts.assumed:
                    why = "as the example had with which this was fused"
                message = f"{x.target if x.op == 'placeholder' else x.name} must have {rank} axes, {why}"
                self.graph.call_function(torch._assert, (equal, message))

    def _given_rank(self, x: fx.Node) -> int | None:
        """The rank that the argument ``x`` has in the example."""
        value = x.meta.get("val") if self.exported else self.examples.get(str(x.target))
        return value.ndim if isinstance(value, Tensor) else None

    def _would_share(self, splice: Splice, root: fx.Node) -> bool:
        """Whether the replacement is a view of a value of which ``root`` was none, and someone writes into either."""
        e = splice.expr
        while e not in splice.native and isinstance(e, Layout | Select):
            e = e.x
        if e not in splice.native:
            return False
        base = cast(fx.Node, splice.native[e])
        writers = [*self.memory.writers(base), *self.memory.writers(root)]
        late = any(self.order[w] > self.order[root] for w in writers)
        return late and base not in self.memory.aliases(root)

    def fresh_path(self, wanted: str) -> str:
        """``wanted``, or that with a number behind it: a path that names nothing yet."""
        path, n = wanted, self._next.get(wanted, 1)
        while _exists(self.module, path):
            path, n = f"{wanted}_{n}", n + 1
        self._next[wanted] = n
        return path

    def current(self, value: Value) -> fx.Node:
        """The node that now stands for ``value``."""
        node = cast(fx.Node, value)
        while node in self._spliced:
            node = self._spliced[node]
        return node

    def fold_constants(self) -> int:
        """Keep what forward computes from parameters alone, instead of computing it; how many results are kept.

        A result that takes more room than its operands is left.
        """
        folded = 0
        for node in list(self.graph.nodes):
            value = self.facts.known.get(node)
            users = [u for u in node.users if u not in self.facts.known]
            if not isinstance(value, Tensor) or not node.op.startswith("call") or not users:
                continue
            given = [v for n in node.all_input_nodes if isinstance(v := self.facts.known.get(n), Tensor)]
            if value.numel() > max(sum(t.numel() for t in given), 1024):
                continue
            holder = nn.Module()
            is_trained = value.is_floating_point() and any(t.requires_grad for t in given)
            holder.value = nn.Parameter(value.detach().clone(), requires_grad=is_trained)
            path = self.fresh_path("folded")
            self.module.add_submodule(path, holder)
            with self.graph.inserting_before(node):
                kept = self.graph.get_attr(f"{path}.value")
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
            if node.graph is not self.graph or getattr(node, "_erased", False):
                continue
            for user in list(node.users):
                if (reads_size_only(user) and only_asserted(user)) or _is_unread(user):
                    _erase_tree(self.graph, user)
            if not node.users and node.op not in ("placeholder", "output"):
                suspects.extend(n for n in node.all_input_nodes if n.op != "placeholder" and _is_quiet(n, self))
                self.graph.erase_node(node)
        self.graph.lint()
        fused = fx.GraphModule(self.module, self.graph, type(self.module).__name__)
        fused.training = False
        for module in fused.modules():
            if type(module) is nn.Module:  # a container that tracing made; the modules in it keep their modes
                module.training = False
        return fused


def _mentions(user: fx.Node, value: Value) -> int:
    count = 0

    def see(n: fx.Node) -> fx.Node:
        nonlocal count
        count += n is value
        return n

    map_arg((user.args, user.kwargs), see)
    return count


def _is_quiet(node: fx.Node, graph: FxGraph) -> bool:
    """Whether ``node`` may be erased once nothing reads it."""
    return (
        node.op == "get_attr"
        or node in graph.facts.known
        or node in graph.through
        or node in graph.inner
        or node in graph.suspects
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


def _exists(module: nn.Module, path: str) -> bool:
    try:
        lookup(module, path)
    except AttributeError:
        return False
    return True
