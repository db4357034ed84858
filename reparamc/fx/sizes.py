"""Who is asked for a size: no value of a torch.fx graph stays for its shape alone.

``y = conv(x); z = bn(y); return z.view(y.shape[0], -1)`` reads y a second time, for a number that x has as well. Where
a size is the same for every input, the read can ask a value that stays whatever is rewritten. `Sizes` says which
reads can be moved; nothing is moved until a splice takes the value away, and then `Mover` does it as part of that.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx
from torch.fx.node import map_arg

from reparamc.algebra.shape import Dim, Shape
from reparamc.fx.calls import Call
from reparamc.fx.memory import only_asserted, reads_size_only
from reparamc.fx.operators import OPERATORS
from reparamc.fx.shapes import Values


@dataclass(frozen=True)
class Freed:
    """How all reads of the shape of a value can ask others.

    Attributes:
        reads: the operators that read the shape.
        asked: a value of the same shape, which all of ``reads`` can ask instead; None where each number is told.
        leaves: what is computed from the reads, and may be dropped once nobody uses it.
        uses: what tells a number (or several), which, and who uses it.
    """

    reads: tuple[fx.Node, ...]
    asked: fx.Node | None = None
    leaves: tuple[fx.Node, ...] = ()
    uses: tuple[tuple[fx.Node, Dim | Shape, fx.Node], ...] = ()

    @property
    def users(self) -> list[fx.Node]:
        """The operators that something else tells a shape."""
        return [u for _, _, u in self.uses] if self.asked is None else [u for r in self.reads for u in r.users]


class Sizes:
    """The reads of shapes that can be moved; the graph is not changed.

    Attributes:
        freed: by the value that nobody asks for its shape then. All reads of a value can be moved, or none.
        homes: for each size that is no number the first value that stays and has it, and along which axis.
        shared: the same of values that several read, which are asked where nothing else tells a size.

    Args:
        goes: whether an operator may become part of another one.
    """

    def __init__(self, facts: Values, goes: Callable[[fx.Node], bool]) -> None:
        self.facts, self.goes = facts, goes
        self.position = {node: at for at, node in enumerate(facts.module.graph.nodes)}
        self.homes: dict[Dim, tuple[fx.Node, int]] = {}
        self.shared: dict[Dim, tuple[fx.Node, int]] = {}
        for node in self.position:
            if node not in facts.known and ((stays := self._stays(node)) or self._is_shared(node)):
                for axis, dim in enumerate(facts.shapes.get(node, ())):
                    if dim.known is None:
                        (self.homes if stays else self.shared).setdefault(dim, (node, axis))
        found = {node: self._free(node) for node in self.position if self._can_be_freed(node)}
        self.freed = {node: freed for node, freed in found.items() if freed is not None}

    def _stays(self, node: fx.Node) -> bool:
        """Whether something computes ``node``, or what is equal, whatever is rewritten."""
        kept = not self.goes(node) or any(not self.goes(u) and not reads_size_only(u) for u in node.users)
        return kept and self.facts.memory.keeps_shape(node)

    def _is_shared(self, node: fx.Node) -> bool:
        """Whether several read more of ``node`` than its shape."""
        return self.facts.memory.keeps_shape(node) and len(node.users) > len(self._reads(node)) + 1

    def _reads(self, node: fx.Node) -> list[fx.Node]:
        return [u for u in node.users if (reads_size_only(u) and not only_asserted(u)) or self._is_like(u, node)]

    def _is_like(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether ``user`` gives something else the shape of ``node``."""
        call = self.facts.calls.get(user)
        return call is not None and call.op == "reshape_as" and call.args.get("other") is node is not call.input

    def _can_be_freed(self, node: fx.Node) -> bool:
        """Whether ``node`` may go once nobody asks for its shape."""
        if not self.goes(node) or self._stays(node) or not self.facts.memory.keeps_shape(node):
            return False
        return 0 < len(self._reads(node)) < len(node.users)

    def _free(self, node: fx.Node) -> Freed | None:
        """How all who ask ``node`` for its shape can ask others; None where one of them cannot.

        What a BatchNorm is asked, its operand can be asked as well. Otherwise each chain of readers is followed (the
        shape, one size of it, a product of two) to those that use a number, and these are told one.
        """
        reads = self._reads(node)
        call = self.facts.calls[node]
        x = call.input if call is not None and call.plain and call.op == "batch_norm" else None
        if x is not None and (self._stays(x) or self._is_shared(x)):  # of one shape, whatever that is
            return Freed(tuple(reads), asked=x)
        pending, seen = list(reads), set[fx.Node]()
        uses: list[tuple[fx.Node, Dim | Shape | None, fx.Node]] = []
        while pending:
            leaf = pending.pop()
            if self._is_like(leaf, node):
                uses.append((node, self.facts.shapes.get(node), leaf))
            elif leaf not in seen:
                seen.add(leaf)
                pending += [u for u in leaf.users if self._told_by(u) is not None]
                uses += [(leaf, self._told_by(leaf), u) for u in leaf.users if self._told_by(u) is None]
        told = tuple((leaf, dims, u) for leaf, dims, u in uses if dims is not None and self._can_be_told(dims, u))
        return Freed(tuple(reads), None, tuple(seen), told) if len(told) == len(uses) else None

    def _told_by(self, node: fx.Node) -> Dim | Shape | None:
        return self.facts.dims.get(node) or self.facts.sizes.get(node)

    def _can_be_told(self, dims: Dim | Shape, user: fx.Node) -> bool:
        """Whether ``user`` may be given ``dims`` as numbers, and these are there before it."""
        if isinstance(dims, Dim):
            return self._is_there(dims, user)
        call = self.facts.calls.get(user)
        takes = call is not None and call.plain and (OPERATORS[call.op].takes_sizes or call.op == "reshape_as")
        return takes and all(self._is_there(dim, user) for dim in dims)

    def _is_there(self, dim: Dim, user: fx.Node) -> bool:
        symbols = [Dim.of(s) for s in dim.symbols]
        return dim.known is not None or self.home(dim, user) is not None or all(self.home(s, user) for s in symbols)

    def home(self, dim: Dim, user: fx.Node) -> tuple[fx.Node, int] | None:
        """The value, and its axis, that tell ``dim`` before ``user``; None where its factors do, or nothing does."""

        def told_by(homes: dict[Dim, tuple[fx.Node, int]], dim: Dim) -> tuple[fx.Node, int] | None:
            home = homes.get(dim)
            return home if home is not None and self.position[home[0]] < self.position[user] else None

        if (home := told_by(self.homes, dim)) or all(told_by(self.homes, Dim.of(s)) for s in dim.symbols):
            return home
        return told_by(self.shared, dim)


class Mover:
    """Moves reads of shapes in a copy of a graph.

    Args:
        copies: the node of the copy for each node that ``sizes`` knows.

    Attributes:
        ranked: the values whose number of axes is taken to be what the facts say.
    """

    def __init__(self, sizes: Sizes, graph: fx.Graph, copies: Mapping[fx.Node, fx.Node]) -> None:
        self.sizes, self.graph, self.copies = sizes, graph, copies
        self.ranked: list[fx.Node] = []
        self._asked: dict[tuple[Dim, bool], int | fx.Node] = {}  # True: told by a read, False: as a product
        self._last: dict[fx.Node, fx.Node] = {}
        self._made: list[fx.Node] = []

    def free(self, nodes: Iterable[fx.Node]) -> None:
        """Let nobody ask ``nodes`` for their shapes, as far as that can be done."""
        for node in nodes:
            freed = self.sizes.freed.get(node)
            if freed is None:
                continue
            if freed.asked is not None:
                for read in freed.reads:
                    self.copies[read].replace_input_with(self.copies[node], self.copies[freed.asked])
                continue
            self.ranked.append(node)
            for leaf, dims, user in freed.uses:
                told = self._ask(dims, user) if isinstance(dims, Dim) else tuple(self._ask(d, user) for d in dims)
                self._tell(user, leaf, told)
            for leaf in sorted((self.copies[n] for n in freed.leaves), reverse=True):
                if not leaf.users and not leaf._erased:
                    self.graph.erase_node(leaf)

    def _tell(self, user: fx.Node, leaf: fx.Node, numbers: int | fx.Node | tuple[int | fx.Node, ...]) -> None:
        """Let ``user`` take ``numbers`` instead of ``leaf``."""
        call = cast("Call | None", self.sizes.facts.calls.get(user))
        copy = self.copies[user]
        if call is not None and call.op == "reshape_as":
            copy.op, copy.target = "call_function", torch.reshape
            copy.args, copy.kwargs = (self.copies[cast(fx.Node, call.input)], numbers), {}
        else:
            old = self.copies[leaf]
            args = map_arg((copy.args, copy.kwargs), lambda n: cast(fx.Node, numbers) if n is old else n)
            copy.args, copy.kwargs = cast("tuple[tuple, dict]", args)

    def _ask(self, dim: Dim, user: fx.Node) -> int | fx.Node:
        """``dim`` as a number, or as a node of the copy right after the values that tell it, before ``user``."""
        if dim.known is not None:
            return dim.known
        home = self.sizes.home(dim, user)
        key = dim, home is not None
        if key not in self._asked:
            self._asked[key] = self._read(*home) if home is not None else self._product(dim, user)
        return self._asked[key]

    def _read(self, x: fx.Node, axis: int) -> fx.Node:
        self.ranked.append(x)
        at = self.copies[x]
        if not self.sizes.facts.exported:
            return self._after(at, self.graph.call_method, "size", (at, axis))
        read = self._after(at, self.graph.call_function, torch.ops.aten.sym_size.int, (at, axis))
        read.meta["val"] = x.meta["val"].shape[axis]
        return read

    def _product(self, dim: Dim, user: fx.Node) -> int | fx.Node:
        symbols = [Dim.of(s) for s in dim.symbols]
        homes = (home[0] for s in symbols if (home := self.sizes.home(s, user)))
        latest = max(homes, key=self.sizes.position.__getitem__)
        product, *rest = (*(self._ask(s, user) for s in symbols), *[dim.factor] * (dim.factor != 1))
        for factor in rest:
            pair = product, factor
            product = made = self._after(self.copies[latest], self.graph.call_function, operator.mul, pair)
            if self.sizes.facts.exported:
                made.meta["val"] = operator.mul(*(n.meta["val"] if isinstance(n, fx.Node) else n for n in pair))
        return product

    def _after(self, x: fx.Node, make: Callable[..., fx.Node], *what: object) -> fx.Node:
        """A node after ``x``, and after all that was put there before."""
        if x.op == "placeholder":
            x = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(self._last.get(x, x)):
            self._last[x] = made = make(*what)
        self._made.append(made)
        return made

    def drop_unused(self) -> None:
        """Erase what was put into the graph and nobody uses."""
        for node in reversed(self._made):
            if not node.users and not node._erased:  # the editor may have erased it with what used it
                self.graph.erase_node(node)
