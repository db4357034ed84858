"""What is known about the values of a torch.fx graph: constants and symbolic shapes."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from reparamc.algebra.recorded import tape
from reparamc.algebra.shape import Dim, Shape, shape_of, size
from reparamc.fx.calls import Call, Held, aten_name, first_operand, integers, lookup, operation, takes_all
from reparamc.fx.casts import names_dtype
from reparamc.fx.memory import Memory, is_known, reads_size_only, written
from reparamc.fx.operators import OPERATORS


@dataclass(frozen=True)
class Contraction:
    """A constant matrix along an axis of ``x`` from the right; ``weight`` is (in, out) if ``transposed``."""

    x: fx.Node
    weight: Any
    axis: int
    transposed: bool
    rank: int | None


class Values:
    """Constants and symbolic shapes of a traced graph, found in sweeps in execution order.

    A shape is known from the ranks that an example gives, from operators that accept one rank only
    (BatchNorm2d), from assertions on the rank, and through everything computed from such a value. What
    an operator demands of its operand (a rank, a number of channels) is carried back, and the sweep
    repeated with it. Of a graph that torch.export made, the shapes are those that it recorded.

    A sum of sizes with one that is not known is a size of its own: an operator that demands it tells the other one.

    ``batches`` names values that have as many examples as others. With ``batched``, the operand of a convolution is
    taken to be a batch where nothing tells its rank: ``assumed`` says of which values.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        ranks: Mapping[fx.Node, int],
        memory: Memory,
        batches: Mapping[fx.Node, fx.Node] = MappingProxyType({}),
        *,
        exported: bool = False,
        batched: bool = False,
    ) -> None:
        self.module, self.memory, self.exported = module, memory, exported
        self.calls = {node: operation(node, module) for node in module.graph.nodes}
        self.constants: dict[fx.Node, Tensor] = {}
        self.known: dict[fx.Node, Any] = {}
        self.names: dict[fx.Node, tuple[str, ...]] = {}
        self.ranks, self.batched, self.batches = dict(ranks), batched, batches
        self.bound: dict[str, int] = {}
        self._parts: dict[tuple[str, ...], tuple[str, int, int]] = {}
        self._evaluate_constants()
        self._sweep()

    def without_examples(self) -> Values:
        """What is known where nothing is told or assumed of the arguments."""
        alone = copy.copy(self)
        alone.ranks, alone.bound, alone.batched, alone.batches = {}, {}, False, {}
        alone._sweep()
        return alone

    def _sweep(self) -> None:
        """Visit all nodes in turn, and again those whose facts depend on what was learnt of others after that."""
        self.shapes: dict[fx.Node, Shape] = {}
        self.dims: dict[fx.Node, Dim] = {}
        self.sizes: dict[fx.Node, Shape] = {}
        self.pieces: dict[fx.Node, list[Shape]] = {}
        self.assumed: dict[fx.Node, int] = {}
        nodes = [node for node in self.module.graph.nodes if node not in self.known]
        bound, ranks = set[str](), set(self.ranks)
        for node in nodes:
            self._visit(node)
        for _ in range(_SWEEPS):
            self._carry_ranks_back()
            fresh = self.bound.keys() - bound
            stale = {node for node in nodes if not fresh.isdisjoint(self._symbols(node))} if fresh else set[fx.Node]()
            stale |= self.ranks.keys() - ranks
            if not stale:
                break
            bound, ranks = set(self.bound), set(self.ranks)
            for node in nodes:
                if node in stale:
                    stale.update(self._revisited(node))

    def _revisited(self, node: fx.Node) -> set[fx.Node]:
        """Those who may learn more, after ``node`` was visited again."""
        facts = (self.shapes, self.dims, self.sizes, self.pieces)
        around = (node, *node.all_input_nodes)
        before = [[f.get(n) for f in facts] for n in around]
        for f in (*facts, self.assumed):
            f.pop(node, None)
        self._visit(node)
        told = zip(around, before, strict=True)
        return {user for n, known in told if [f.get(n) for f in facts] != known for user in n.users}

    def _symbols(self, node: fx.Node) -> Iterator[str]:
        """The sizes that the facts of ``node`` name."""
        dim, shapes = self.dims.get(node), (self.shapes.get(node), self.sizes.get(node), *self.pieces.get(node, ()))
        return (s for d in (dim, *(d for shape in shapes for d in shape or ())) if d is not None for s in d.symbols)

    def rank(self, node: fx.Node) -> int | None:
        shape = self.shapes.get(node)
        return None if shape is None else len(shape)

    def held(self, value: Any) -> tuple[Tensor, tuple[str, ...]] | None:
        """A parameter or constant operand, and the names of the parameters in it; None for anything else."""
        if isinstance(value, Held):
            found = None if self.memory.is_changed(value.tensor) else (value.tensor, (value.name,))
        else:
            is_known = isinstance(value, fx.Node) and value in self.constants
            found = (self.constants[value], self.names[value]) if is_known else None
        return found if found is not None and type(found[0]) in (Tensor, nn.Parameter) else None

    # Constants

    def _evaluate_constants(self) -> None:
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                value = lookup(self.module, str(node.target))
                if isinstance(value, Tensor) and not self.memory.writers(node):
                    self._enter(node, value, (str(node.target),))
            elif node.op in ("call_function", "call_method") and self._may_be_constant(node):
                value = self._compute(node)
                if value is not None:
                    names = (name for n in node.all_input_nodes for name in self.names[n])
                    self._enter(node, value, tuple(dict.fromkeys(names)))

    def _enter(self, node: fx.Node, value: Any, names: tuple[str, ...]) -> None:
        self.known[node], self.names[node] = value, names
        if isinstance(value, Tensor):
            self.constants[node] = value

    def _may_be_constant(self, node: fx.Node) -> bool:
        operands = node.all_input_nodes
        known = node.op == "call_method" or is_known(node.target)
        fixed = bool(operands) and all(n in self.known for n in operands)
        stays = node.target is torch._assert or "assert" in aten_name(node.target)
        stays = stays or names_dtype(node)  # weights of a copy may be converted to another one
        return known and fixed and not stays and not self.memory.writers(node) and not written(node, self.module)

    def _compute(self, node: fx.Node) -> Any:
        """The value of a call of constants; None where it draws random numbers, writes, or cannot be run."""
        copies = {n: v.detach().clone() if isinstance(v := self.known[n], Tensor) else v for n in node.all_input_nodes}
        versions = {n: v._version for n, v in copies.items() if isinstance(v, Tensor)}
        before = _random_states(copies.values())
        try:
            with torch.no_grad():
                value = _called(node, *copies.values())
        except Exception:  # whatever the operator raises: the graph will raise it again when it runs
            return None
        drew = any(not torch.equal(*pair) for pair in zip(before, _random_states(copies.values()), strict=True))
        if drew:
            torch.set_rng_state(before[0])
        written = any(copies[n]._version != version for n, version in versions.items())
        if drew or written:
            return None
        trained = any(isinstance(v := self.known[n], Tensor) and v.requires_grad for n in copies)
        value = value.detach().requires_grad_() if trained and _is_float(value) else value
        self._remember(node, value)
        return value

    def _remember(self, node: fx.Node, value: Any) -> None:
        """Note on the tape, if there is one, how a constant is computed from others."""
        on = tape()
        if on is not None and any(
            isinstance(v, Tensor) for v in (value if isinstance(value, tuple | list) else [value])
        ):
            on.follow(value, partial(_called, node), *(self.known[n] for n in node.all_input_nodes))

    # Shapes

    def _visit(self, node: fx.Node) -> None:
        shape = self._recorded(node)
        if shape is None:
            shape = self._shape(node)
        if shape is None and node in self.ranks:
            shape = self._fresh(node, self.ranks[node])
        if shape is not None and self.memory.keeps_shape(node):
            self.shapes[node] = shape
        self._learn_rank(node)
        self._learn_dim(node)
        self._learn_channels(node)

    def _recorded(self, node: fx.Node) -> Shape | None:
        value = node.meta.get("val") if self.exported else None
        return recorded(value) if isinstance(value, Tensor) else node.meta.get("shape")

    def _fresh(self, node: fx.Node, rank: int) -> Shape:
        first = self.batches.get(node, node).name
        return tuple(self._symbol(f"{node.name if i else first}.{i}") for i in range(rank))

    def _spatial(self, node: fx.Node, n: int) -> Shape:
        """New sizes of the last ``n`` axes; their names differ from those of `_fresh`, which count from the left."""
        return tuple(Dim.of(f"{node.name}.s{i}") for i in range(n))

    def _symbol(self, name: str) -> Dim:
        """The size ``name``: a number once an operator has demanded one."""
        return Dim(self.bound[name]) if name in self.bound else Dim.of(name)

    def _learn_channels(self, node: fx.Node) -> None:
        """An operator that takes one number of channels only tells that size of its operand."""
        call = self.calls[node]
        x = call.input if call is not None else None
        shape = self.shapes.get(x) if x is not None else None
        if call is None or shape is None or call.op not in _CHANNEL_COUNTS:
            return
        found = self.held(call.get("running_mean" if call.op == "batch_norm" else "weight"))
        if found is None or not call.plain or found[0].ndim < (2 if call.op in _KERNELS else 1):
            return
        weight = found[0]
        axis = 1 - weight.ndim if call.op in _KERNELS else self.axis_of_norm(call, len(shape))
        count = weight.shape[1] * call.get("groups", 1) if call.op == "conv" else weight.shape[-1]
        count = weight.shape[0] if call.op == "conv_transpose" else count
        if -axis <= len(shape):
            dim = shape[axis]
            if len(dim.symbols) == 1 and dim.factor > 0 and count % dim.factor == 0:
                self.bound.setdefault(dim.symbols[0], count // dim.factor)
                symbol, times, known = self._parts.get(dim.symbols, ("", 1, count))
                if count > known and (count - known) % times == 0:
                    self.bound.setdefault(symbol, (count - known) // times)

    @staticmethod
    def axis_of_norm(call: Call, rank: int) -> int:
        """The axis along which the parameters of a normalization lie, or the last of several."""
        if call.op in ("layer_norm", "rms_norm"):
            return -1
        return -1 - (call.axes if call.op == "instance_norm" and call.axes else max(rank - 2, 0))

    def _carry_ranks_back(self) -> None:
        """From a value whose rank is known to the operands that must have the same rank."""
        for node in reversed(self.module.graph.nodes):
            call = self.calls[node]
            x = call.input if call is not None else None
            if call is None or not call.plain or x is None or x in self.shapes or x in self.ranks or x in self.known:
                continue
            rank = self.rank(node) or self.ranks.get(node)
            if call.op == "batch_norm" and call.axes:
                self.ranks[x] = call.axes + 2
            elif rank is not None and "rank" in OPERATORS[call.op].keeps:
                self.ranks[x] = rank

    def _shape(self, node: fx.Node) -> Shape | None:
        call = self.calls[node]
        if call is None or not call.plain:
            return None
        if call.op in ("add", "sub", "mul", "div"):
            return self._broadcast(node, call.args.get("input"), call.args.get("other"))
        if call.op == "cat":
            return self._joined(node, call)
        if call.op in ("einsum", "matmul") and (found := self.contraction(call)) is not None:
            return self._contracted(found)
        x = call.input
        if call.op == "getitem" and x is not None and x in self.pieces:
            index, pieces = call.args.get("index"), self.pieces[x]
            return pieces[index] if isinstance(index, int) and -len(pieces) <= index < len(pieces) else None
        before = self.shapes.get(x) if x is not None else None
        if call.op == "batch_norm" and before is None and call.axes and x is not None and self.memory.keeps_shape(x):
            before = self.shapes[x] = self._fresh(x, call.axes + 2)
        if before is None and call.op in ("conv", "conv_transpose") and x is not None:
            before = self._batch(x, call)
        if before is None:
            moved = self.layout(node)
            return moved[1] if moved is not None else None
        return self._computed(node, call, before)

    def _batch(self, x: fx.Node, call: Call) -> Shape | None:
        """The shape that the operand of a convolution is taken to have."""
        found = self.held(call.get("weight"))
        if found is None or not self.batched or x in self.known or not self.memory.keeps_shape(x):
            return None
        self.assumed[x] = rank = found[0].ndim
        self.shapes[x] = self._fresh(x, rank)
        return self.shapes[x]

    def _computed(self, node: fx.Node, call: Call, before: Shape) -> Shape | None:
        """The shape of a result over an operand of the shape ``before``."""
        if "shape" in OPERATORS[call.op].keeps:
            return before
        match call.op:
            case "conv" | "conv_transpose":
                found = self.held(call.get("weight"))
                if found is None:
                    return None
                weight = found[0]
                count = weight.shape[1] * call.get("groups", 1) if call.op == "conv_transpose" else weight.shape[0]
                after = self._convolved(node, before, Dim(count), weight.ndim - 2)
                return after if after is None or call.op == "conv_transpose" else _kept(call, before, after, weight)
            case "linear":
                found = self.held(call.get("weight"))
                if found is None:
                    return None
                return (*before[:-1], *shape_of(found[0].shape[:-1]))  # a vector takes the axis away
            case "matmul" | "addmm":
                found = self.held(call.get("other"))
                return (*before[:-1], Dim(found[0].shape[1])) if found and found[0].ndim == 2 else None
            case "adaptive_avg_pool" | "adaptive_max_pool" if (outs := self._adapted(call)) and len(before) > len(outs):
                return (*before[: -len(outs)], *outs)
            case op if op in _POOLS and call.axes and len(before) > call.axes:
                return self._convolved(node, before, before[-1 - call.axes], call.axes)
            case "pixel_shuffle" if len(before) >= 3 and isinstance(block := call.get("groups"), int):
                *lead, c, h, w = before
                inner = c.divided_by(Dim(block * block))
                return None if inner is None else (*lead, inner, h * Dim(block), w * Dim(block))
            case "pixel_unshuffle" if len(before) >= 3 and isinstance(block := call.get("groups"), int):
                outs = [e.divided_by(Dim(block)) or self._symbol(f"{node.name}.{a}") for a, e in enumerate(before[-2:])]
                return (*before[:-3], before[-3] * Dim(block * block), *outs)
            case "interpolate" if len(before) >= 3:
                return self._convolved(node, before, before[1], len(before) - 2)
            case "pad":
                pads = call.get("pad")
                if not isinstance(pads, tuple | list):
                    return None
                spatial = len(pads) // 2
                return (*before[: len(before) - spatial], *self._spatial(node, spatial))
            case "split" | "chunk":
                self._split(node, call, before)
                return None
            case "unbind":
                axis = call.get("dim", 0)
                if isinstance(axis, int) and -len(before) <= axis < len(before) and (size := before[axis].known):
                    axis %= len(before)
                    self.pieces[node] = [(*before[:axis], *before[axis + 1 :])] * size
                return None
            case "slice" if takes_all(call):
                return before
            case "select" | "slice" | "narrow" | "getitem":
                at = self.position(call, before)
                if at is not None:
                    return (*before[: at[0]], *before[at[0] + 1 :])
                return self._cut(node, call, before)
            case "mean" | "amax":
                return _reduced(call, before)
            case "expand" | "repeat":
                times = self.times(call, before)
                return None if times is None else tuple(d * n for d, n in zip(before, times, strict=True))
            case "scaled_dot_product_attention":
                value = self.shapes.get(call.get("value"))
                return None if value is None else (*before[:-1], value[-1])
        moved = self.layout(node)
        return moved[1] if moved is not None else None

    def _convolved(self, node: fx.Node, before: Shape, channels: Dim, n: int) -> Shape | None:
        if len(before) not in (n + 1, n + 2):
            return None
        batch = before[: len(before) - n - 1]
        return (*batch, channels, *self._spatial(node, n))

    def _adapted(self, call: Call) -> Shape | None:
        outs = integers(call.get("output_size"), call.axes) if call.axes else None
        return None if outs is None else shape_of(outs)

    def _joined(self, node: fx.Node, call: Call) -> Shape | None:
        terms, axis = call.get("tensors"), call.get("dim", 0)
        if not isinstance(terms, tuple | list) or not terms or not isinstance(axis, int):
            return None
        shapes = [shape_of(self.constants[t].shape) if t in self.constants else self.shapes.get(t) for t in terms]
        if any(s is None or len(s) != len(shapes[0] or ()) for s in shapes):
            return None
        found = cast("list[Shape]", shapes)
        axis %= len(found[0])
        sizes = [s[axis] for s in found]
        if len(set(sizes)) == 1:
            total = sizes[0] * Dim(len(sizes))
        elif unknown := [s for s in sizes if s.known is None]:
            symbol, *others = unknown[0].symbols
            if len({*unknown}) > 1 or others or unknown[0].factor != 1:
                return None
            total = self._symbol(f"{node.name}.joined")
            self._parts[total.symbols] = symbol, len(unknown), sum(s.known or 0 for s in sizes)
        else:
            total = Dim(sum(s.factor for s in sizes))
        return (*found[0][:axis], total, *found[0][axis + 1 :])

    def contraction(self, call: Call) -> Contraction | None:
        """What an einsum with a constant matrix does, if it puts another axis in the place of one of its operand.

        Of a product with a matrix from the left: the axis before the last one.
        """
        if call.op == "matmul":
            left, x = self.held(call.args.get("input")), call.args.get("other")
            is_matrix = left is not None and left[0].ndim == 2 and self.held(x) is None
            return Contraction(x, call.args["input"], -2, False, None) if is_matrix and isinstance(x, fx.Node) else None
        tensors, equation = call.get("tensors"), call.get("equation")
        if not isinstance(tensors, tuple | list) or len(tensors) != 2 or not isinstance(equation, str):
            return None
        given, _, result = equation.replace(" ", "").partition("->")
        letters = given.split(",")
        held = [self.held(t) for t in tensors]
        if held.count(None) != 1 or len(letters) != 2 or not result:
            return None
        at = held.index(None)
        (x, of_x), (weight, of_weight) = ((tensors[i], letters[i]) for i in (at, 1 - at))
        old = [c for c in of_weight if c in of_x and c not in result]
        new = [c for c in of_weight if c not in of_x]
        plain = of_x.removeprefix("...")
        if len(of_weight) != 2 or len(old) != 1 or len(new) != 1 or "." in plain or len(set(plain)) < len(plain):
            return None
        if result != of_x.replace(old[0], new[0]) or not isinstance(x, fx.Node):
            return None
        rank = None if "." in of_x else len(of_x)
        return Contraction(x, weight, plain.index(old[0]) - len(plain), of_weight[0] == old[0], rank)

    def _contracted(self, found: Contraction) -> Shape | None:
        before, weight = self.shapes.get(found.x), self.held(found.weight)
        if before is None or weight is None:
            return None
        width = weight[0].shape[1 if found.transposed else 0]
        return (*before[: found.axis], Dim(width), *before[len(before) + found.axis + 1 :])

    def _split(self, node: fx.Node, call: Call, before: Shape) -> None:
        axis, parts = call.get("dim", 0), self.parts(call, before)
        if parts is not None:
            axis %= len(before)
            self.pieces[node] = [(*before[:axis], Dim(part), *before[axis + 1 :]) for part in parts]

    def parts(self, call: Call, before: Shape) -> list[int] | None:
        """The sizes of the pieces of a split or chunk along its axis; None where they are unknown."""
        axis = call.get("dim", 0)
        if not isinstance(axis, int) or not -len(before) <= axis < len(before):
            return None
        size = before[axis].known
        wanted = call.get("split_size") if call.op == "split" else call.get("chunks")
        if isinstance(wanted, tuple | list):
            sizes = integers(wanted, 1)
            return list(sizes) if sizes and call.op == "split" and sum(sizes) == (size or sum(sizes)) else None
        if not isinstance(wanted, int) or not size or wanted < 1:
            return None
        part = wanted if call.op == "split" else -(-size // wanted)
        return [min(part, size - start) for start in range(0, size, part)]

    def times(self, call: Call, before: Shape) -> tuple[Dim, ...] | None:
        """How often expand or repeat takes each axis, if that is known and there are no new axes."""
        given = call.get("shape" if call.op == "expand" else "repeats")
        given = (given,) if isinstance(given, int | fx.Node) else given
        wanted = [self.dim(n) for n in given] if isinstance(given, tuple | list) else []
        if None in wanted or len(wanted) != len(before):
            return None
        found = cast("list[Dim]", wanted)
        if call.op == "repeat":
            return tuple(found)
        kept = [n in (d, Dim(-1)) for d, n in zip(before, found, strict=True)]
        if any(not k and d != Dim(1) for d, k in zip(before, kept, strict=True)):
            return None  # a size of one for some inputs only
        return tuple(Dim(1) if k else n for n, k in zip(found, kept, strict=True))

    def position(self, call: Call, before: Shape) -> tuple[int, int] | None:
        """(axis, position) of what takes one position along one axis, which goes; None for anything else."""
        if call.op == "select":
            axis, at = call.get("dim"), call.get("index")
        elif call.op == "getitem":
            index = call.args.get("index")
            index = index if isinstance(index, tuple) else (index,)
            numbers = [n for n, i in enumerate(index) if i != slice(None)]
            if len(numbers) != 1 or len(index) > len(before):
                return None
            axis, at = numbers[0], index[numbers[0]]
        else:
            return None
        if not isinstance(axis, int) or not isinstance(at, int) or isinstance(at, bool):
            return None
        return (axis % len(before), at) if -len(before) <= axis < len(before) else None

    def sliced(self, call: Call, before: Shape) -> tuple[int, range] | None:
        """(axis, positions) of a slice along one axis of known size; None for any other."""
        cuts = self.cuts(call, before) or {}
        if len(cuts) != 1:
            return None
        ((axis, wanted),) = cuts.items()
        size = before[axis].known
        return (axis, range(size)[wanted]) if size is not None and _is_told(wanted) else None

    def cuts(self, call: Call, before: Shape) -> dict[int, slice] | None:
        """The slice along each axis, those of all positions left out; None for what is no slice."""
        rank = len(before)
        if call.op == "getitem":
            index = _slices(call.args.get("index"), rank)
            return None if index is None else {a: i for a, i in enumerate(index) if i != slice(None)}
        axis, start = call.get("dim", 0), call.get("start", 0)
        if not isinstance(axis, int) or not -rank <= axis < rank:
            return None
        end = call.get("end") if call.op == "slice" else None
        if call.op == "narrow":
            length = call.get("length")
            if not isinstance(start, int) or not isinstance(length, int) or start < 0:
                return None
            end = start + length
        return {axis % rank: slice(start, end, call.get("step", 1))}

    def _cut(self, node: fx.Node, call: Call, before: Shape) -> Shape | None:
        """The shape after slices; a size that is not known before is a new one."""
        cuts = self.cuts(call, before)
        if cuts is None:
            return None
        after = list(before)
        for axis, wanted in cuts.items():
            known = before[axis].known
            told = known is not None and _is_told(wanted)
            after[axis] = Dim(len(range(known or 0)[wanted])) if told else self._symbol(f"{node.name}.{axis}")
        return tuple(after)

    def _broadcast(self, node: fx.Node, left: Any, right: Any) -> Shape | None:
        """The shape of two operands together; a size of one gives way, and what is unknown stays unknown."""
        found: list[Shape] = []
        for arg in (left, right):
            number = arg in self.dims or isinstance(self.known.get(arg), int | float)
            if isinstance(arg, fx.Node) and not number:
                shape = shape_of(self.constants[arg].shape) if arg in self.constants else self.shapes.get(arg)
                if shape is None:
                    return None
                found.append(shape)
        if not found:
            return None
        a, b = sorted((found[0], found[-1]), key=len, reverse=True)
        lead = len(a) - len(b)
        dims = [self._together(f"{node.name}.{i}", *pair) for i, pair in enumerate(zip(a[lead:], b, strict=True), lead)]
        return (*a[:lead], *dims)

    def _together(self, name: str, a: Dim, b: Dim) -> Dim:
        if a == b or b == Dim(1):
            return a
        if a == Dim(1):
            return b
        known = [d for d in (a, b) if (d.known or 0) > 1]
        return known[0] if known else self._symbol(name)

    def _learn_rank(self, node: fx.Node) -> None:
        """``_assert(x.ndim == 4)`` and ``_assert(x.dim() == 4)`` tell the rank of x."""
        condition = node.args[0] if node.target is torch._assert and node.args else None
        if not (isinstance(condition, fx.Node) and condition.target is operator.eq):
            return
        read, rank = condition.args[:2]
        if isinstance(read, fx.Node) and isinstance(rank, int) and reads_size_only(read):
            is_rank = read.target in ("dim", "ndimension") or (read.target is getattr and read.args[1] == "ndim")
            x = read.args[0]
            if is_rank and isinstance(x, fx.Node) and x not in self.shapes and self.memory.keeps_shape(x):
                self.shapes[x] = self._fresh(x, rank)
                self.ranks.setdefault(x, rank)

    def _learn_dim(self, node: fx.Node) -> None:
        value = node.meta.get("val") if self.exported else None
        if isinstance(value, int | torch.SymInt):
            self.dims[node] = _dim(value)
            return
        if node.target in (operator.mul, operator.floordiv):
            a, b = (self.dim(arg) for arg in node.args[:2])
            if a is not None and b is not None and node.target is operator.mul:
                self.dims[node] = a * b
            elif a is not None and b is not None and a.known is not None and b.known:
                self.dims[node] = Dim(a.known // b.known)
            return
        x = first_operand(node)
        if x is None:
            return
        shape = self.shapes.get(x)
        at: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        whole = (node.target is getattr and at == "shape") or (node.target == "size" and at is None)
        one = node.target == "size" or aten_name(node.target) == "sym_size"
        if whole and shape is not None:
            self.sizes[node] = shape
        elif one and isinstance(at, int) and shape is not None and -len(shape) <= at < len(shape):
            self.dims[node] = shape[at]
        elif node.target is operator.getitem and x in self.sizes:
            picked = self.sizes[x][at] if isinstance(at, int | slice) else None
            if isinstance(picked, Dim):
                self.dims[node] = picked
            elif picked is not None:
                self.sizes[node] = picked

    def dim(self, arg: Any) -> Dim | None:
        """An argument of a reshape as a size."""
        if isinstance(arg, int):
            return Dim(arg)
        if not isinstance(arg, fx.Node):
            return None
        value = self.known.get(arg)
        return Dim(value) if isinstance(value, int) else self.dims.get(arg)

    def layout(self, node: fx.Node) -> tuple[Shape | None, Shape, tuple[int, ...] | None] | None:
        """(shape before, shape after, permutation or None) of a layout operator; None when ``node`` is none."""
        call = self.calls[node]
        x = call.input if call is not None else None
        if call is None or x is None:
            return None
        before = self.shapes.get(x)
        if call.op == "reshape":
            after = self._reshaped(node, before, call.get("shape"))
            return None if after is None else (before, after, None)
        if call.op == "reshape_as":
            after = self.shapes.get(call.get("other"))
            return None if after is None else (before, after, None)
        if before is None:
            return None
        rank = len(before)
        if call.op in ("transpose", "permute", "t"):
            axes = _order(call, rank)
            return None if axes is None else (before, tuple(before[a] for a in axes), axes)
        after = self._regrouped(node, call, before)
        return None if after is None else (before, after, None)

    def _regrouped(self, node: fx.Node, call: Call, before: Shape) -> Shape | None:
        """The shape that flatten, unflatten, squeeze or unsqueeze of one axis gives."""
        rank = len(before)
        if call.op == "flatten":
            ends = call.args.get("start_dim", 0), call.args.get("end_dim", -1)
            fits = all(isinstance(e, int) and -rank <= e < rank for e in ends)
            return flattened(before, *ends) if fits else None
        axis = call.get("dim")
        if isinstance(axis, tuple | list) and len(axis) == 1:
            axis = axis[0]
        if not isinstance(axis, int) or not -rank - 1 <= axis <= rank:
            return None
        if call.op == "unsqueeze":
            axis %= rank + 1
            return (*before[:axis], Dim(1), *before[axis:])
        if not -rank <= axis < rank:
            return None
        axis %= rank
        if call.op == "squeeze":
            return (*before[:axis], *before[axis + 1 :]) if before[axis] == Dim(1) else None
        if call.op == "unflatten":
            dims = self._reshaped(node, (before[axis],), call.get("sizes"))
            return None if dims is None else (*before[:axis], *dims, *before[axis + 1 :])
        return None

    def _reshaped(self, node: fx.Node, before: Shape | None, dims: Any) -> Shape | None:
        if isinstance(dims, fx.Node):
            if dims in self.sizes:
                return self.sizes[dims]
            known = self.known.get(dims)
            dims = tuple(known) if isinstance(known, torch.Size) else (dims,)
        elif isinstance(dims, int):
            dims = (dims,)
        if not isinstance(dims, tuple | list):
            return None
        wanted = [self.dim(d) for d in dims]
        if any(d is None for d in wanted):
            return None
        known_dims = [d for d in wanted if d is not None and d != Dim(-1)]
        if len(known_dims) < len(wanted):
            rest = size(before).divided_by(size(known_dims)) if before is not None else None
            rest = self._symbol(f"{node.name}.rest") if rest is None else rest
            wanted = [rest if d == Dim(-1) else d for d in wanted]
        elif before is not None:
            self._learn_size(size(before), size(known_dims))
        return tuple(d for d in wanted if d is not None)

    def _learn_size(self, before: Dim, after: Dim) -> None:
        """As many elements before a reshape as after it: that tells the one size that only one of them has."""
        rest = Counter(before.symbols) - Counter(after.symbols)
        others = Counter(after.symbols) - Counter(before.symbols)
        if not others and rest.total() == 1 and before.factor > 0 and after.factor % before.factor == 0:
            (symbol,) = rest
            self.bound.setdefault(symbol, after.factor // before.factor)


def _slices(index: Any, rank: int) -> tuple[slice, ...] | None:
    """The slices of ``x[index]``, an ellipsis written out; None where there is anything else."""
    index = index if isinstance(index, tuple) else (index,)
    at = next((n for n, i in enumerate(index) if i is Ellipsis), None)
    if at is not None:
        index = (*index[:at], *[slice(None)] * (rank - len(index) + 1), *index[at + 1 :])
    return index if len(index) <= rank and all(isinstance(i, slice) for i in index) else None


def _is_told(wanted: slice) -> bool:
    return all(v is None or isinstance(v, int) for v in (wanted.start, wanted.stop, wanted.step))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _random_states(values: Iterable[Any]) -> list[Tensor]:
    devices = {v.device for v in values if isinstance(v, Tensor) and v.is_cuda}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]


_SWEEPS = 4
_KERNELS = ("conv", "conv_transpose", "linear")
_CHANNEL_COUNTS = (*_KERNELS, "batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm")
_POOLS = ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool")


def recorded(value: Tensor) -> Shape:
    """The shape of a value that torch.export recorded."""
    return tuple(map(_dim, value.shape))


def _dim(size: Any) -> Dim:
    """A size that torch.export recorded: a product of numbers and symbols, or else one symbol by its formula."""
    if isinstance(size, int):
        return Dim(size)
    formula = size.node.expr
    factors = [formula] if not formula.is_Mul else list(formula.args)
    numbers = [int(f) for f in factors if f.is_Integer]
    others = [f for f in factors if not f.is_Integer]
    if any(n <= 0 for n in numbers) or not all(f.is_Symbol for f in others):
        return Dim.of(f"({formula})")
    return Dim(prod(numbers), tuple(sorted(str(f) for f in others)))


def _order(call: Call, rank: int) -> tuple[int, ...] | None:
    """The permutation that transpose, permute or t applies."""
    if call.op == "permute":
        dims = call.get("dims")
        order = [dims] if isinstance(dims, int) else dims
        if not isinstance(order, tuple | list) or not all(isinstance(a, int) and -rank <= a < rank for a in order):
            return None
        axes = tuple(a % rank for a in order)
        return axes if sorted(axes) == list(range(rank)) else None
    pair = (0, 1) if call.op == "t" else (call.args.get("dim0"), call.args.get("dim1"))
    if not all(isinstance(a, int) and -rank <= a < rank for a in pair) or (call.op == "t" and rank != 2):
        return None
    i, j = (cast(int, a) % rank for a in pair)
    axes = list(range(rank))
    axes[i], axes[j] = j, i
    return tuple(axes)


def _kept(call: Call, before: Shape, after: Shape, weight: Tensor) -> Shape:
    """``after``, with the sizes of ``before`` along the axes where a convolution keeps them."""
    n = weight.ndim - 2
    stride, dilation = (integers(call.get(key, 1), n) for key in ("stride", "dilation"))
    padding = call.get("padding", 0)
    pads = None if padding in ("same", "valid") else integers(padding, n)
    if stride is None or dilation is None or (pads is None and padding != "same"):
        return after
    kept = [
        s == 1 and (pads is None or d * (k - 1) == 2 * pads[i])
        for i, (s, d, k) in enumerate(zip(stride, dilation, weight.shape[2:], strict=True))
    ]
    lead = len(after) - n
    return (*after[:lead], *(before[lead + i] if keep else after[lead + i] for i, keep in enumerate(kept)))


def _reduced(call: Call, before: Shape) -> Shape | None:
    """The shape of a mean or maximum over some axes."""
    rank, axes = len(before), call.get("dim")
    axes = (axes,) if isinstance(axes, int) else axes
    if not isinstance(axes, tuple | list) or not all(isinstance(a, int) for a in axes):
        return None
    gone = {cast(int, a) % rank for a in axes}
    if call.get("keepdim", False):
        return tuple(Dim(1) if i in gone else d for i, d in enumerate(before))
    return tuple(d for i, d in enumerate(before) if i not in gone)


def flattened(shape: Shape, start: Any = 0, end: Any = -1) -> Shape:
    start, end = start % len(shape), end % len(shape)
    return (*shape[:start], size(shape[start : end + 1]), *shape[end + 1 :])


def _called(node: fx.Node, *operands: Any) -> Any:
    """What a call makes of its operands, in the order of `fx.Node.all_input_nodes`."""
    given = dict(zip(node.all_input_nodes, operands, strict=True))
    args, kwargs = cast(Any, map_arg((node.args, node.kwargs), lambda n: given[n]))
    if callable(node.target):
        return node.target(*args, **kwargs)
    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
