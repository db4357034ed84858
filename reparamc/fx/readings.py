"""What each node of a traced module is read as, and what that tells of others: axes, channels, dtypes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, fx

from reparamc.algebra.arrays import Array, Parameter
from reparamc.algebra.expr import Source
from reparamc.algebra.recorded import tape
from reparamc.algebra.rewrite import Declined
from reparamc.compiler.readings import Reading, Taps, Value, values_in
from reparamc.fx.calls import Call, lookup, spelled
from reparamc.fx.handed import handed
from reparamc.fx.memory import Memory, reads_size_only
from reparamc.fx.operators import OPERATORS, Operator
from reparamc.fx.shapes import Values
from reparamc.fx.sizes import Sizes

DTYPES: dict[torch.dtype, np.dtype] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
}
HOOKED = "it has hooks or a forward of its own, which folding would drop"
HANDED = "it is an argument of a function that may read its weights"


Reader = Callable[["Readings", fx.Node, Call], "Reading | Declined | None"]


class Readings:
    """The nodes of a traced module as linear operators.

    Args:
        readers: of the operators that are linear, by name.
        examples: the example inputs that are tensors, by the name of their placeholder.
        seen: the sizes of the values that those give, by the name of their node.
        exported: whether torch.export made the graph and recorded its shapes.

    Attributes:
        handed: modules that functions are given, other than for their shapes and settings.
        sizes: which reads of shapes can ask other values.
        elements: tensors in an argument that is a list; and the first of them, where all are as many examples.
        written: values with the slice assignments that complete them.
        through: for a node that is looked through, what takes its place as a user of its operand.
        shuffles: of the last node of a channel shuffle, its operand, its groups and the nodes between.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        readers: Mapping[str, Reader],
        examples: Mapping[str, Tensor],
        seen: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
        *,
        exported: bool = False,
    ) -> None:
        self.module, self.graph, self.exported = module, module.graph, exported
        self.examples, self._reader_of = examples, readers
        given = {name: t.ndim for name, t in examples.items() if t.is_floating_point()}
        self.ranks: dict[fx.Node, int] = {}
        for node in module.graph.nodes:
            of_run = len(seen[node.name]) if node.name in seen else None
            rank = given.get(str(node.target)) if node.op == "placeholder" else of_run
            if rank is not None:
                self.ranks[node] = rank
        self.memory = Memory(self.graph, self.module)
        self.elements = elements(self.graph, seen)
        self.facts = Values(self.module, self.ranks, self.memory, self.elements, exported=exported, batched=True)
        self.sizes = Sizes(self.facts, self._may_go)
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.through: dict[fx.Node, list[fx.Node]] = {}
        self.shuffles: dict[fx.Node, tuple[fx.Node, int, list[fx.Node]]] = {}
        self.inner: set[fx.Node] = set()
        self._readings: dict[fx.Node, Reading | Declined | None] = {}
        self._likes: dict[fx.Node, Tensor | None] = {}
        self.handed = {inner for n in handed(module) for inner in lookup(module, str(n.target)).modules()}
        self.written = self._find_written()
        for node in self.graph.nodes:
            self._look_through(node)

    def _may_go(self, node: fx.Node) -> bool:
        """Whether an operator is linear by its kind, so that it may become part of another one."""
        if not node.op.startswith("call_") or node in self.elements:
            return False
        called = self._called(node)
        return node.target is operator.setitem or (
            called is not None and (called.name in self._reader_of or called.linear is not None)
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
        """Note what takes the place of ``node`` as a user: the pieces of a split, the end of a shuffle."""
        call = self.facts.calls[node]
        if call is not None and call.op in ("split", "chunk", "unbind") and node.users:
            users = list(node.users)
            if all((c := self.facts.calls[u]) is not None and c.op == "getitem" for u in users):
                self.through[node] = users
        shuffle = find_shuffle(self.facts, node)
        if shuffle is not None:
            self.shuffles[node] = shuffle
            self.inner.update(shuffle[2])
            self.through[shuffle[2][-1]] = [node]

    def source(self, value: Value) -> Source:
        if isinstance(value, Taps):
            return value.source(self.facts.shapes.get(cast(fx.Node, value.of)))
        return Source(value, shape=self.facts.shapes.get(cast(fx.Node, value)))

    def operand(self, node: fx.Node) -> Source:
        """``node`` as an operand of a reading."""
        axis = self.axis(node)
        return Source(node, self.channels(node, axis), axis)

    def leaf(self, value: Any) -> Parameter | None:
        """A parameter or constant operand in float64, loaded when its values are asked for; None for anything else."""
        held = self.facts.held(value)
        if held is None:
            return None
        tensor, names = held
        return Parameter(names, tuple(tensor.shape), lambda: array(tensor), tensor)

    def tensors(self, members: Sequence[Value]) -> list[Tensor]:
        """The parameters of ``members``, or else a tensor of the dtype and device of the last of them."""
        readings = [self.read(m) for m in members]
        found = [t for r in readings if isinstance(r, Reading) for t in _that_round(r)]
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
            elif isinstance(reading, Reading) and (tensors := _that_round(reading)):
                found, at = tensors[0], None
            elif isinstance(reading, Reading):
                at = cast(fx.Node, next(values_in(reading.operands)))
            else:
                call = self.facts.calls.get(at)
                kept = call is not None and "dtype" in OPERATORS[call.op].keeps and "dtype" not in call.args
                at = call.input if call is not None and kept else None
        if at is not None:
            found = self._likes[at]
        self._likes.update(dict.fromkeys(chain, found))
        return found

    def axis(self, value: Any) -> int | None:
        reading = self.read(value) if isinstance(value, fx.Node) and value in self.order else None
        return reading.axis if isinstance(reading, Reading) else None

    def channels(self, node: fx.Node, axis: int | None) -> int | None:
        """The number of channels of ``node`` along ``axis``, where it is known."""
        reading, shape = self.read(node), self.facts.shapes.get(node)
        if isinstance(reading, Reading) and reading.channels is not None and reading.axis in (axis, None):
            return reading.channels
        return shape[axis].known if shape is not None and axis is not None and -axis <= len(shape) else None

    def read(self, value: Value) -> Reading | Declined | None:
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

    def _read(self, node: fx.Node) -> Reading | Declined | None:
        call = self.facts.calls.get(node)
        if call is None or node in self.facts.known or node in self.facts.dims:
            return None
        if node in self.inner or node in self.written:
            return None
        reader = self._reader_of.get(call.op)
        found = reader(self, node, call) if reader is not None else None
        operands = cast("Iterable[fx.Node]", values_in(found.operands) if isinstance(found, Reading) else ())
        if any(node in self.memory.writers(v) and not self.is_private(v, node) for v in operands):
            return Declined(f"{node.name!r} changes an operand in place")
        if isinstance(found, Reading) and node.op == "call_module" and self.handed:
            found = Declined(HANDED) if lookup(self.module, str(node.target)) in self.handed else found
        return Declined(HOOKED) if isinstance(found, Reading) and not call.plain else found

    def is_private(self, value: fx.Node, writer: fx.Node) -> bool:
        """Whether nothing but the result of ``writer`` shows that it writes into the memory of ``value``."""
        aliases = self.memory.aliases(value)
        older = [a for a in aliases if self.order[a] < self.order[writer]]
        late = any(self.order[u] > self.order[writer] for a in older for u in a.users if not reads_size_only(u))
        return aliases[0].op not in ("placeholder", "get_attr") and not late


def _that_round(reading: Reading) -> list[Tensor]:
    """The parameters in a reading that tell the dtype of the result: whole numbers give way."""
    return [leaf.origin for leaf in reading.leaves if leaf.origin.is_floating_point()]


def elements(graph: fx.Graph, seen: Mapping[str, tuple[int, ...]]) -> dict[fx.Node, fx.Node]:
    """The tensors in arguments that are lists; each with the first of its list if all are as many examples, or itself.

    ``seen``: sizes of all tensors, by the name of their node.
    """
    lists: dict[fx.Node, fx.Node] = {}
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=operator.getitem):
        held = cast(fx.Node, node.args[0])
        if held.name not in seen and (held.op == "placeholder" or held in lists):
            lists[node] = lists.get(held, held)
            if seen.get(node.name):
                found.setdefault(lists[node], []).append(node)
    return {
        node: nodes[0] if len({seen[n.name][0] for n in nodes}) == 1 else node
        for nodes in found.values()
        for node in nodes
    }


def find_shuffle(facts: Values, node: fx.Node) -> tuple[fx.Node, int, list[fx.Node]] | None:
    """(operand, groups, nodes between) of the channel shuffle that ends in ``node``: split, exchanged, merged."""
    merging = facts.layout(node)
    if merging is None or merging[2] is not None or merging[0] is None:
        return None
    inner: list[fx.Node] = []
    at = facts.calls[node]
    for ops in (("transpose", "permute"), ("reshape", "unflatten")):
        while True:
            step = at.input if at is not None else None
            at = facts.calls.get(step) if step is not None else None
            if step is None or at is None or len(step.users) != 1 or step in facts.known:
                return None
            inner.append(step)
            if at.op not in ("identity", "copy"):
                break
        if at.op not in ops:
            return None
    x = at.input if at is not None else None
    exchanged = next(n for n in inner if cast(Call, facts.calls[n]).op in ("transpose", "permute"))
    split, moved = facts.layout(inner[-1]), facts.layout(exchanged)
    if x is None or split is None or moved is None or split[0] is None or split[0] != merging[1] or not moved[2]:
        return None
    before, between, axes = split[0], split[1], moved[2]
    at_axis = next((i for i, (a, b) in enumerate(zip(before, between, strict=False)) if a != b), None)
    if at_axis is None or len(between) != len(before) + 1 or between[at_axis + 2 :] != before[at_axis + 1 :]:
        return None
    swapped = list(range(len(between)))
    swapped[at_axis : at_axis + 2] = [at_axis + 1, at_axis]
    groups, rest, width = (d.known for d in (*between[at_axis : at_axis + 2], before[at_axis]))
    if list(axes) != swapped or not groups or not rest or groups * rest != width:
        return None
    return (x, groups, inner) if at_axis == 1 else None


def array(tensor: Tensor) -> Array:
    """A tensor as a float64 array of its own."""
    a = np.array(tensor.detach().to("cpu", torch.float64).numpy(), copy=True)
    on = tape()
    return a if on is None else on.array(tensor, a)
