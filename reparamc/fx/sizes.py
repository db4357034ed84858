"""Who is asked for an extent: no value of a torch.fx graph stays for its shape alone.

``y = conv(x); z = bn(y); return z.view(y.shape[0], -1)`` reads y a second time, for a number that x has as well. Where
an extent is the same for every input, the read asks a value that stays whatever is rewritten.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import cast

import torch
from torch import fx
from torch.fx.node import map_arg

from reparamc.algebra.shape import Dim, Shape
from reparamc.fx.calls import Call
from reparamc.fx.memory import only_asserted, reads_size_only
from reparamc.fx.operators import OPERATORS
from reparamc.fx.shapes import Values


def free_sizes(facts: Values, goes: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Ask values that stay for the extents of those that may go. All reads of a value are moved, or none.

    Args:
        goes: whether an operator may become part of another one.

    Returns:
        The values whose number of axes is taken to be what ``facts`` say; none where nothing was moved.
    """
    sizes = _Sizes(facts, goes)
    for node in list(sizes.position):
        if sizes.can_be_freed(node):
            sizes.free(node)
    return sizes.ranked


class _Sizes:
    """A graph while its reads of shapes are moved.

    Attributes:
        position: of each value in the order of execution, as it was at first.
        homes: for each extent that is no number the first value that stays and has it, and along which axis.
        asked: the nodes that were made to tell an extent; True: by a read, False: as a product.
        ranked: as `free_sizes` returns them.
    """

    def __init__(self, facts: Values, goes: Callable[[fx.Node], bool]) -> None:
        self.facts, self.goes, self.graph = facts, goes, facts.module.graph
        self.position = {node: at for at, node in enumerate(self.graph.nodes)}
        self.homes: dict[Dim, tuple[fx.Node, int]] = {}
        for node in self.position:
            if node not in facts.known and self._stays(node):
                for axis, dim in enumerate(facts.shapes.get(node, ())):
                    if dim.known is None:
                        self.homes.setdefault(dim, (node, axis))
        self.asked: dict[tuple[Dim, bool], fx.Node] = {}
        self.ranked: list[fx.Node] = []
        self._last: dict[fx.Node, fx.Node] = {}

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

    def can_be_freed(self, node: fx.Node) -> bool:
        """Whether ``node`` may go once nobody asks for its shape."""
        if not self.goes(node) or self._stays(node) or not self.facts.memory.keeps_shape(node):
            return False
        return 0 < len(self._reads(node)) < len(node.users)

    def free(self, node: fx.Node) -> None:
        """Let all who ask ``node`` for its shape ask others; nothing is changed where that cannot be done.

        What a BatchNorm is asked, its operand can be asked as well. Otherwise each chain of readers is followed (the
        shape, one extent of it, a product of two) to those that use a number, and these are given one.
        """
        reads = self._reads(node)
        call = self.facts.calls[node]
        x = call.input if call is not None and call.plain and call.op == "batch_norm" else None
        if x is not None and (self._stays(x) or self._is_shared(x)):  # of one shape, whatever that is
            for read in reads:
                read.replace_input_with(node, x)
            return
        leaves: dict[fx.Node, Dim | Shape | None] = {}  # what tells extents, and which; for reshape_as, node itself
        uses: list[tuple[fx.Node, fx.Node]] = []  # a leaf, and who uses its number
        while reads:
            leaf = reads.pop()
            if self._is_like(leaf, node):
                leaves[node] = self.facts.shapes.get(node)
                uses.append((node, leaf))
            elif leaf not in leaves:
                leaves[leaf] = self._told_by(leaf)
                reads += [u for u in leaf.users if self._told_by(u) is not None]
                uses += [(leaf, u) for u in leaf.users if self._told_by(u) is None]
        if not all(self._can_be_told(leaves[leaf], user) for leaf, user in uses):
            return
        self.ranked.append(node)
        for leaf, user in uses:
            dims = cast("Dim | Shape", leaves[leaf])
            told = self._ask(dims, user) if isinstance(dims, Dim) else tuple(self._ask(d, user) for d in dims)
            self._tell(user, leaf, told)
        for leaf in sorted(leaves.keys() - {node}, reverse=True):
            if not leaf.users:
                self.graph.erase_node(leaf)

    def _told_by(self, node: fx.Node) -> Dim | Shape | None:
        return self.facts.dims.get(node) or self.facts.sizes.get(node)

    def _can_be_told(self, dims: Dim | Shape | None, user: fx.Node) -> bool:
        """Whether ``user`` may be given ``dims`` as numbers, and these are there before it."""
        if isinstance(dims, Dim):
            return self._is_there(dims, user)
        call = self.facts.calls.get(user)
        takes = call is not None and call.plain and (OPERATORS[call.op].takes_sizes or call.op == "reshape_as")
        return takes and dims is not None and all(self._is_there(dim, user) for dim in dims)

    def _tell(self, user: fx.Node, leaf: fx.Node, numbers: int | fx.Node | tuple[int | fx.Node, ...]) -> None:
        """Let ``user`` take ``numbers`` instead of ``leaf``."""
        call = cast("Call | None", self.facts.calls.get(user))
        if call is not None and call.op == "reshape_as":
            user.op, user.target = "call_function", torch.reshape
            user.args, user.kwargs = (call.input, numbers), {}
        else:
            args = map_arg((user.args, user.kwargs), lambda n: cast(fx.Node, numbers) if n is leaf else n)
            user.args, user.kwargs = cast("tuple[tuple, dict]", args)

    def _is_there(self, dim: Dim, user: fx.Node) -> bool:
        return dim.known is not None or self._home(dim, user) is not None or self._factors(dim, user) is not None

    def _home(self, dim: Dim, user: fx.Node) -> tuple[fx.Node, int] | None:
        """The value that stays, and its axis, that tell ``dim`` before ``user``."""
        home = self.homes.get(dim)
        return home if home is not None and self.position[home[0]] < self.position[user] else None

    def _factors(self, dim: Dim, user: fx.Node) -> list[Dim] | None:
        """The unknowns that ``dim`` is the product of, if values that stay tell them all before ``user``."""
        symbols = [Dim.of(s) for s in dim.symbols]
        return symbols if all(self._home(s, user) for s in symbols) else None

    def _ask(self, dim: Dim, user: fx.Node) -> int | fx.Node:
        """``dim`` as a number, or as a node right behind the values that tell it, all in front of ``user``."""
        if dim.known is not None:
            return dim.known
        home = self._home(dim, user)
        key = dim, home is not None
        if key not in self.asked:
            self.asked[key] = self._read(*home) if home is not None else self._product(dim, user)
        return self.asked[key]

    def _read(self, x: fx.Node, axis: int) -> fx.Node:
        self.ranked.append(x)
        if not self.facts.exported:
            return self._behind(x, self.graph.call_method, "size", (x, axis))
        read = self._behind(x, self.graph.call_function, torch.ops.aten.sym_size.int, (x, axis))
        read.meta["val"] = x.meta["val"].shape[axis]
        return read

    def _product(self, dim: Dim, user: fx.Node) -> fx.Node:
        symbols = [Dim.of(s) for s in dim.symbols]
        latest = max((self.homes[s][0] for s in symbols), key=self.position.__getitem__)
        product, *rest = (*(self._ask(s, user) for s in symbols), *[dim.factor] * (dim.factor != 1))
        for factor in rest:
            pair = product, factor
            product = self._behind(latest, self.graph.call_function, operator.mul, pair)
            if self.facts.exported:
                product.meta["val"] = operator.mul(*(n.meta["val"] if isinstance(n, fx.Node) else n for n in pair))
        return cast(fx.Node, product)

    def _behind(self, x: fx.Node, make: Callable[..., fx.Node], *what: object) -> fx.Node:
        """A node behind ``x``, and behind all that was put there before."""
        if x.op == "placeholder":
            x = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(self._last.get(x, x)):
            self._last[x] = made = make(*what)
        return made
