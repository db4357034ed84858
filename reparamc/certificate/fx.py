"""Certificates of traced torch modules: how each operator is read as an affine map, from torch's documentation alone.

See `proof` for what is proven, and `normal_form` for the algebra. Modules are read by their exact
type, functions and methods by what they are; all else is an atom. Nodes keep their names where nothing is rewritten;
what replaces a node says in its metadata which one (`STANDS_FOR`).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

import reparamc.certificate.layouts as nl
import reparamc.certificate.normal_form as nf
from reparamc.certificate.agreement import Precision
from reparamc.certificate.axes import Dim, Unrepresentable
from reparamc.certificate.fx_calls import Described, attribute, described, name_of
from reparamc.certificate.fx_memory import Memory
from reparamc.certificate.fx_operators import (
    HOMOGENEOUS,
    KERNELS,
    NORMS,
    NUMBERS,
    ON_PARAMETERS,
    READERS,
    Read,
    Size,
    as_array,
    axis_of_norm,
    bound,
    is_elementwise,
    is_transposed,
    keeps_numbers,
    rescaled,
    weighted,
)
from reparamc.certificate.narrowing import Separate
from reparamc.certificate.normal_form import Array, Value
from reparamc.certificate.proof import Certificate, Window, certify
from reparamc.certificate.ranges import Bound
from reparamc.certificate.sides import Opened

STANDS_FOR = "stands_for"
"""The key in the metadata of a node; its value is the name of the node that it replaces."""

PRECISIONS = {
    torch.float64: Precision(2.0**-53, 2.0**-1075),
    torch.float32: Precision(2.0**-24, 2.0**-150),
    torch.float16: Precision(2.0**-11, 2.0**-25),
    torch.bfloat16: Precision(2.0**-8, 2.0**-134),
}

Shapes = Mapping[str, tuple[Dim, ...]]


def certify_fx(original: fx.GraphModule, result: fx.GraphModule, shapes: Shapes | None = None) -> Certificate:
    """Prove that ``result`` computes what ``original`` does, for every input size.

    Args:
        original, result: traced modules; ``original`` as it was before anything was rewritten.
        shapes: of the nodes of ``original``, by name; see `fx_shapes`. Without them the operators alone tell ranks.
    """
    stored = next((p.dtype for p in result.parameters() if p.is_floating_point()), torch.float32)
    precision = PRECISIONS.get(stored, PRECISIONS[torch.float32])
    before = _Side(original, dict(shapes or {}))
    after = _Side(result, {})
    computed = {*before.order, *before.inputs}
    stands_for = {name: name for name in (*after.order, *after.inputs) if name in computed}
    for node in result.graph.nodes:
        meant = node.meta.get(STANDS_FOR)
        if meant in computed and node.name in after.positions and node.name not in computed:
            stands_for[node.name] = meant
    after.shapes.update({name: before.shapes[meant] for name, meant in stands_for.items() if meant in before.shapes})
    outside: list[Window] = []
    if [(n.name, n.args) for n in _inputs(original)] != [(n.name, n.args) for n in _inputs(result)]:
        outside.append(Window("input", "different", np.inf, np.inf, "the arguments differ"))
    if before.memory.attributes or after.memory.attributes:
        outside.append(Window("attributes", "undecided", reason="a parameter or buffer is written in place"))
    if before.memory.lasting != after.memory.lasting:
        outside.append(Window("input", "undecided", reason="an argument is written in place, not by the same nodes"))
    returned = [_returned(side) for side in (before, after)]
    if returned[0][1] != returned[1][1] and not (_tells_sizes(before) and _tells_sizes(after)):
        returned = [_returned(side, but_numbers=True) for side in (before, after)]
        if returned[0][1] == returned[1][1]:
            outside.append(Window("output", "undecided", reason="sizes are returned that are read from other values"))
    if returned[0][1] != returned[1][1]:
        outside.append(Window("output", "different", np.inf, np.inf, "the structure that is returned differs"))
        outputs = []
    else:
        outputs = list(zip(returned[0][0], returned[1][0], strict=True))
    parameters = sum(p.numel() for p in original.parameters())
    return certify(before, after, outputs, stands_for, lambda _: precision, outside, parameters)


def _inputs(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def _returned(side: _Side, but_numbers: bool = False) -> tuple[list[str], Any]:
    """The names of the nodes that are returned, and the structure around them; with all numbers alike if wanted."""
    (output,) = side.module.graph.find_nodes(op="output")
    given, key = side.flat(output, but_numbers)  # of sizes that are returned, what they are read from
    return [node.name for node in given], (pytree.tree_structure(_plain(output.args)), key)


def _tells_sizes(side: _Side) -> bool:
    """Whether all sizes that are returned are known, as numbers or symbols."""
    (output,) = side.module.graph.find_nodes(op="output")
    return all(side.told(n) is not None for n in output.all_input_nodes if n in side.sizes or n in side.plain)


def _plain(value: Any) -> Any:
    """``value`` with torch.fx's own containers as Python's."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(v) for v in value) if type(value) in (list, tuple) else [_plain(v) for v in value]
    return value


# Nodes


FACTORIES = {torch.arange, torch.eye, torch.full, torch.linspace, torch.ones, torch.tensor, torch.zeros}
"""Functions that make a constant of numbers alone."""

KEEPS_CHANNELS = ("identity", "dropout", "neg", "avg_pool", "adaptive_avg_pool")
"""Operators whose result has the channels of their operand."""

RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal_", "uniform_", "empty")
"""Parts of names of operators whose result is not decided by their operands."""


class _Computed(NamedTuple):
    """A constant as the module computes it, and as it would be without rounding on the way."""

    stored: Any
    exact: Any


def _called(node: fx.Node, operands: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), operands.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]


def _doubled(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)


class _Side:
    """`certify.Side` over a traced module."""

    def __init__(self, module: fx.GraphModule, shapes: dict[str, tuple[Dim, ...]]) -> None:
        self.module, self.shapes = module, shapes
        self.nodes: dict[str, fx.Node] = {n.name: n for n in module.graph.nodes}
        self.positions = {name: at for at, name in enumerate(self.nodes)}
        self.inputs = [n.name for n in _inputs(module)]
        self.memory = Memory(module)
        self._calls: dict[fx.Node, Described | None] = {}
        self._flats: dict[fx.Node, tuple[list[fx.Node], Hashable]] = {}
        self.sizes: dict[fx.Node, Size] = {}
        self.plain: set[fx.Node] = set()
        """What is no tensor, but follows from operands: dtypes, devices, arithmetic with sizes."""
        self._computed: dict[str, _Computed] = {}
        for node in self.nodes.values():
            self._note_size(node)
            self._note_plain(node)
        self.constants = self._constants()
        self.order = [
            n.name
            for n in self.nodes.values()
            if n.op.startswith("call_") and n.name not in self.constants
            if n not in self.sizes and n not in self.plain and n not in self.memory.parts
            if not (self._is_cut_up(n) and all(self._is_piece(u) for u in n.users))
        ]
        for name, root in self.memory.roots.items():  # recorded are the results of writes, not the states they make
            self.shapes.pop(name, None)
            if root in self.shapes:
                self.shapes[name] = self.shapes[root]
        self.counts: dict[str, int] = {}
        self.ranks = self._ranks()

    # Constants

    def _constants(self) -> set[str]:
        found: set[str] = set()
        for node in self.nodes.values():
            if node.name in self.memory.written:
                continue
            if node.op == "get_attr":
                if isinstance(attribute(self.module, str(node.target)), Tensor):
                    found.add(node.name)
            elif node.op in ("call_function", "call_method") and (node.all_input_nodes or node.target in FACTORIES):
                quiet = not any(word in name_of(node) for word in RANDOM) and node not in self.memory.writes
                if quiet and all(n.name in found for n in node.all_input_nodes):
                    found.add(node.name)
        return found - {node.name for node in self.plain}

    def constant(self, name: str) -> Array | None:
        tensor = self.tensor(name)
        return None if tensor is None else as_array(tensor)

    def tensor(self, name: str) -> Tensor | None:
        """A constant in its own dtype."""
        if name not in self.constants:
            return None
        stack = [name]
        while stack:
            node = self.nodes[stack[-1]]
            if node.name in self._computed:
                stack.pop()
                continue
            waiting = [n.name for n in node.all_input_nodes if n.name not in self._computed]
            if waiting:
                stack.extend(waiting)
                continue
            self._computed[node.name] = self._compute(node)
        found = self._computed[name].stored
        if not isinstance(found, Tensor):
            raise Unrepresentable(f"the constant {name!r} is no tensor")
        return found

    def _compute(self, node: fx.Node) -> _Computed:
        if node.op == "get_attr":
            tensor = attribute(self.module, str(node.target))
            return _Computed(tensor, tensor)
        try:
            with torch.no_grad():
                stored = _called(node, {n: self._computed[n.name].stored for n in node.all_input_nodes})
        except Exception as error:
            raise Unrepresentable(f"the constant {node.name!r} cannot be computed") from error
        try:
            with torch.no_grad():
                exact = _called(node, {n: _doubled(self._computed[n.name].exact) for n in node.all_input_nodes})
        except Exception:  # an operator mixes what was made double with what was not
            exact = stored
        return _Computed(stored, exact)

    def magnitude(self, name: str) -> Array | None:
        """What a constant that the module computes was added up from, by what rounding did to it; None for others."""
        if self.nodes[name].op == "get_attr" or self.tensor(name) is None:
            return None
        stored, exact = self._computed[name]
        if not isinstance(exact, Tensor) or not stored.is_floating_point() or stored.shape != exact.shape:
            return None
        wide, error = stored.double(), (stored.double() - exact.double()).abs()
        if error.ndim > 1 and error.numel():  # one element may be exact by chance
            error = error.flatten(1).amax(1).view(-1, *[1] * (error.ndim - 1))
        return as_array(torch.maximum(wide.abs(), error / (torch.finfo(stored.dtype).eps / 2)))

    # Sizes, ranks, writes

    def _note_size(self, node: fx.Node) -> None:
        """Note a node that reads sizes: all of them, some, or one."""
        args = list(node.args)
        first = args[0] if args else None
        if not isinstance(first, fx.Node):
            return
        name = name_of(node)
        if name == "size" and isinstance(at := node.kwargs.get("dim"), int):
            args.append(at)
        whole = node.op == "call_method" and name == "size" and len(args) == 1
        if whole or (node.target is getattr and args[1] == "shape"):
            self.sizes[node] = Size(first, slice(None))
        elif name in ("size", "sym_size") and len(args) == 2 and isinstance(args[1], int):
            self.sizes[node] = Size(first, args[1])
        elif node.target is operator.getitem and first in self.sizes:
            of, index = self.sizes[first], args[1]
            if of.axis != slice(None):
                axis = _within(of.axis, index)
                if axis is not None:
                    self.sizes[node] = Size(of.node, axis)
                return
            bounds = (index.start, index.stop, index.step) if isinstance(index, slice) else (index,)
            if all(b is None or isinstance(b, int) for b in bounds):
                self.sizes[node] = Size(of.node, index)  # pyright: ignore[reportArgumentType]

    def _note_plain(self, node: fx.Node) -> None:
        """Note a node that is no tensor: every reader has it among its own attributes, with what it follows from."""
        if node.op != "call_function":
            return
        if node.target is getattr:
            if node.args[1] in ("device", "dtype", "is_cuda", "layout", "ndim", "requires_grad"):
                self.plain.add(node)
        elif node.target in NUMBERS and all(n in self.plain or n in self.sizes for n in node.all_input_nodes):
            self.plain.add(node)

    def _ranks(self) -> dict[str, int]:
        """Ranks that the operators themselves tell: those of kernels, and of what keeps them."""
        found = {name: len(shape) for name, shape in self.shapes.items()}
        nodes = list(self.nodes.values())
        for order in (nodes, reversed(nodes), nodes):
            for node in order:
                call = self.call(node)
                if call is None or not node.op.startswith("call_"):
                    continue
                first = call.args.get("input")
                given = first.name if isinstance(first, fx.Node) else None
                self._count(node, call, given)
                axes = self._axes(call)
                if axes is not None:
                    found.setdefault(node.name, axes + 2)
                    if given:
                        found.setdefault(given, axes + 2)
                elif call.op in ("add", "sub", "mul", "div", "neg", "identity", "dropout", "pad", "same", "batch_norm"):
                    names = [n.name for n in node.all_input_nodes if n.name not in self.constants]
                    known = [found[n] for n in (node.name, *names) if n in found]
                    if known and (len(names) == 1 or len(set(known)) == 1):
                        for n in (node.name, *names):
                            found.setdefault(n, known[0])
        return found

    def _axes(self, call: Described) -> int | None:
        """How many axes a kernel or a norm has that are no batch and no channels; None where it does not tell."""
        if call.op == "convolution" and (weight := self._stored(call.args.get("weight"))) is not None:
            return weight.ndim - 2
        return call.axes if call.op in ("conv", "conv_transpose", "batch_norm", "avg_pool") else None

    def _stored(self, given: Any) -> Tensor | None:
        """A parameter or buffer that a call is given; None for anything else."""
        if isinstance(given, fx.Node) and given.op == "get_attr":
            given = attribute(self.module, str(given.target))
        return given if isinstance(given, Tensor) else None

    def _count(self, node: fx.Node, call: Described, given: str | None) -> None:
        """Note how many channels a kernel or a norm reads and gives, and who has as many; these lie along axis 1."""
        if call.op in KEEPS_CHANNELS and given is not None:
            for name, other in ((node.name, given), (given, node.name)):
                if name in self.counts:
                    self.counts.setdefault(other, self.counts[name])
        weight = self._stored(call.args.get("running_mean" if call.op == "batch_norm" else "weight"))
        if call.op not in ("conv", "convolution", "batch_norm") or weight is None or is_transposed(call):
            return
        self.counts[node.name] = weight.shape[0]
        if given is not None:
            inside = weight.shape[1] * call.args.get("groups", 1) if call.op != "batch_norm" else weight.shape[0]
            self.counts.setdefault(given, inside)

    def call(self, node: fx.Node) -> Described | None:
        """What a node calls."""
        if node not in self._calls:
            self._calls[node] = described(node, self.module)
        return self._calls[node]

    # The protocol

    def _is_cut_up(self, node: fx.Node) -> bool:
        call = self.call(node)
        return call is not None and call.op in ("split", "chunk", "unbind")

    def _is_piece(self, node: fx.Node) -> bool:
        """Whether a node is one of the results of a split."""
        first, index = (*node.args, None, None)[:2]
        return (
            node.target is operator.getitem
            and isinstance(first, fx.Node)
            and isinstance(index, int)
            and self._is_cut_up(first)
        )

    def operands(self, name: str) -> Sequence[str]:
        """Nodes in the order of the arguments; for an size, the node that it is read from."""
        if not self.nodes[name].op.startswith("call_"):
            return ()
        return [n.name for n in self.flat(self.nodes[name])[0]]

    def flat(self, node: fx.Node, but_numbers: bool = False) -> tuple[list[fx.Node], Hashable]:
        """The nodes among the arguments, and a key of all else; in which all numbers are alike if wanted."""
        if but_numbers:
            return self._flat(node, (node.args, node.kwargs), but_numbers=True)
        if node not in self._flats:
            self._flats[node] = self._flat(node, (node.args, node.kwargs))
        return self._flats[node]

    def _flat(self, node: fx.Node, what: Any, but_numbers: bool = False) -> tuple[list[fx.Node], Hashable]:
        """`flat` of ``what``, some arguments of ``node``."""
        given: list[fx.Node] = []
        whole = node.args[0] if self._is_piece(node) else None

        def key(value: Any) -> Hashable:
            if but_numbers and isinstance(value, int):
                return "number"
            if isinstance(value, fx.Node):
                if but_numbers and (value in self.sizes or value in self.plain):
                    return "number"
                if (told := self.told(value)) is not None:
                    return key(told)
                if (size := self.sizes.get(value)) is not None:
                    given.append(size.node)
                    return ("size", repr(size.axis))
                if whole is not None and value is whole:
                    return ("split", str(value.target), key(value.args), key(value.kwargs))
                if value in self.plain:
                    return ("plain", str(value.target), key(value.args), key(value.kwargs))
                if value in self.memory.parts:
                    inner, slices = self.memory.whole(value)
                    given.append(self.memory.seen(inner, node))
                    return ("part", *((str(s.target), key(s.args[1:]), key(s.kwargs)) for s in slices))
                if value.op == "get_attr" and not isinstance(held := attribute(self.module, str(value.target)), Tensor):
                    return ("held", id(held))  # a graph that an operator calls: both modules have the same
                given.append(self.memory.seen(value, node))
                return "node"
            if isinstance(value, Dim):
                return ("size", value) if value.known is None else key(value.known)
            if isinstance(value, slice):
                return ("slice", key(value.start), key(value.stop), key(value.step))
            if isinstance(value, Mapping):
                return tuple((k, key(v)) for k, v in value.items())
            if isinstance(value, list | tuple):
                return tuple(key(v) for v in value)
            return (type(value).__name__, repr(value))

        return given, key(what)

    def shape(self, node: fx.Node) -> tuple[Dim, ...] | None:
        """The shape of a constant, or what runs told of that of a node, if it has one only."""
        if node.op == "get_attr" and isinstance(tensor := attribute(self.module, str(node.target)), Tensor):
            return tuple(map(Dim, tensor.shape))
        return None if node.name in self.memory.unsafe else self.shapes.get(node.name)

    def told(self, node: fx.Node) -> Dim | list[Dim] | None:
        """The sizes that a node reads or multiplies, where runs told the shape: it does not matter whose they are."""
        size = self.sizes.get(node)
        if size is not None:
            shape = self.shape(size.node)
            if shape is None:
                return None
            if isinstance(size.axis, slice):
                return list(shape[size.axis])
            return shape[size.axis] if -len(shape) <= size.axis < len(shape) else None
        if node not in self.plain or node.target not in (operator.mul, operator.floordiv) or len(node.args) != 2:
            return None
        a, b = (Dim(arg) if isinstance(arg, int) else self.told(cast(fx.Node, arg)) for arg in node.args)
        if not isinstance(a, Dim) or not isinstance(b, Dim):
            return None
        return a.times(b) if node.target is operator.mul else a.over(b)

    def is_input(self, name: str) -> bool:
        return not self.nodes[name].op.startswith("call_")

    def kind(self, name: str) -> Hashable:
        node = self.nodes[name]
        if not node.op.startswith("call_"):
            return None
        key = self.flat(node)[1]
        target: Any = node.target
        if node.op == "call_module":
            module = attribute(self.module, str(node.target))
            target = id(module)  # both graphs hold what nothing replaced
        drawn = isinstance(target, HigherOrderOperator) or any(word in name_of(node) for word in RANDOM)
        random = node.name if drawn else ""
        around = self.memory.events.get(name, ())
        return (node.op, target if isinstance(target, int | str) else id(target), key, random, around)

    def narrowed(self, name: str) -> None:
        self.shapes.pop(name, None)
        self._flats.clear()

    def sizes_told(self, name: str) -> None:
        """Reads of sizes are compared by `kind`."""

    def form(self, name: str) -> None:
        """Modules are read one by one."""

    def beside(self, members: Sequence[Mapping[str, str]]) -> _Side:
        raise Unrepresentable("modules are read one by one")

    def unread(self, met: Collection[str]) -> Sequence[str]:
        return ()

    def bound(self, name: str) -> Bound:
        if name in self.memory.unsafe or not (given := self.operands(name)):
            return Bound()
        return bound(self.nodes[name], self.module, given, self._stored)

    def mixes(self, name: str) -> bool:
        call = self.call(self.nodes[name])
        return call is not None and call.op in ("conv", "conv_transpose", "linear", "matmul", "addmm", "avg_pool")

    def _described(self, node: fx.Node) -> Described | None:
        """What a node calls; a copy into a slice is an assignment."""
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node) or first not in self.memory.parts:
            return self.call(node)
        whole, slices = self.memory.whole(first)
        index: dict[int, Any] = {}
        for part in slices:
            call = self.call(part)
            for axis, bounds in (_sliced_axes(call) if call is not None else None) or [(-1, None)]:
                if bounds == slice(None):
                    continue
                if axis < 0 or axis in index:
                    return None
                index[axis] = bounds
        items = tuple(index.get(axis, slice(None)) for axis in range(max(index, default=-1) + 1))
        return Described("setitem", {"input": whole, "index": items, "value": node.args[1]})

    def separate(self, name: str) -> Separate | None:
        node = self.nodes[name]
        if name in self.memory.unsafe:
            return None
        if is_elementwise(node, self.module):
            module = node.op == "call_module"
            name = type(attribute(self.module, str(node.target))).__name__ if module else name_of(node).rstrip("_")
            kinds = name in ("mul", "imul"), name in HOMOGENEOUS
            return Separate(lambda axis: axis, lambda known: self._computed_alone(node, known), *kinds)
        return Separate(lambda axis: axis, None) if keeps_numbers(node, self.module) else None

    def _computed_alone(self, node: fx.Node, known: Mapping[str, Array]) -> Array:
        """What an elementwise operator makes of numbers, one for each channel; NaN where another operand varies."""
        given: dict[fx.Node, Any] = {}
        for n in node.all_input_nodes:
            if n.name in known:
                given[n] = torch.from_numpy(known[n.name].astype(np.float32))
            elif n.name in self.constants:
                given[n] = self.tensor(n.name)
            else:
                return np.full(len(next(iter(known.values()))), np.nan)
        with torch.no_grad():
            if node.op == "call_module":
                args, kwargs = map_arg((node.args, node.kwargs), given.__getitem__)
                found = copy.deepcopy(attribute(self.module, str(node.target))).float()(*args, **kwargs)
            else:
                found = _called(node, given)
        return as_array(found).astype(np.float64)

    def leaf(self, name: str, known_as: str) -> Value:
        if name in self.memory.unsafe:
            raise Unrepresentable(f"{name!r} is written in place while others read it")
        shape = self.shapes.get(name)
        if shape is None and name in self.ranks:
            shape = tuple(
                Dim(self.counts[name]) if axis == 1 and name in self.counts else Dim(1, (f"{known_as}[{axis}]",))
                for axis in range(self.ranks[name])
            )
        if shape is None:
            raise Unrepresentable(f"the rank of {name!r} is unknown; give example_inputs")
        return nf.leaf(known_as, shape)

    def value(self, name: str, of: Callable[[str], Value]) -> Value:
        node = self.nodes[name]
        if name in self.memory.unsafe:
            raise Unrepresentable(f"{name!r} is written in place while others read it")
        call = self._described(node)
        reader = READERS.get(call.op) if call is not None else None
        if call is None or reader is None or not call.plain:
            raise Unrepresentable(f"{name_of(node)} is not affine")
        return self._read(node, call, of, reader)

    def _read(
        self, node: fx.Node, call: Described, of: Callable[[str], Value], reader: Callable[[Read], Value]
    ) -> Value:
        """What ``reader`` makes of a call, with what is unsure about parameters that the module computes."""
        value = reader(Read(self, node, call, of))
        if call.op in ON_PARAMETERS and any(
            isinstance(given, fx.Node) and given.name in self.constants and given.op != "get_attr"
            for given in call.args.values()
        ):
            return nf.computed(value, reader(Read(self, node, call, of, magnitudes=True)))
        return value

    def opened(self, name: str) -> Opened | None:
        """A normalization before its scale; a kernel over what it gathers, at reflected positions or computed ones."""
        node = self.nodes[name]
        call = self._described(node)
        if call is not None and call.plain and call.op in NORMS:
            return self._normalized(node, call)
        if call is None or not call.plain or call.op not in KERNELS:
            return None
        parameters = ("weight", "bias", "groups", "transposed")
        weight = Read(self, node, call, lambda _: nf.leaf("", ())).parameter("weight")
        given, key = self._flat(node, {k: v for k, v in sorted(call.args.items()) if k not in parameters})
        inside = weight.shape[0] if is_transposed(call) else weight.shape[1] * call.args.get("groups", 1)

        def leaf(known_as: str) -> Value:
            shape = list(self.leaf(name, known_as).shape)
            shape[len(shape) - weight.ndim + 1] = Dim(inside * prod(weight.shape[2:]))
            return nf.leaf(known_as, shape)

        def finish(gathered: Value) -> Value:
            return self._read(node, call, lambda _: gathered, lambda read: weighted(read, gathered))

        return Opened(("gathered", is_transposed(call), weight.shape[2:], key), [n.name for n in given], leaf, finish)

    def _normalized(self, node: fx.Node, call: Described) -> Opened | None:
        """A normalization before its scale, if that is one of constants for each channel."""
        shape, held = call.args.get("normalized_shape", 1), [call.args.get(key) for key in ("weight", "bias")]
        if not isinstance(shape, int) and len(shape) != 1:
            return None
        if any(isinstance(a, fx.Node) and a.name not in self.constants for a in held):
            return None
        options = {k: v for k, v in sorted(call.args.items()) if k not in ("weight", "bias") and v is not None}
        given, key = self._flat(node, options)

        def leaf(known_as: str) -> Value:
            sizes = list(self.leaf(node.name, known_as).shape)
            counts = [t.numel() for t in map(self._stored, held) if t is not None]
            if counts:
                sizes[axis_of_norm(call, len(sizes))] = Dim(counts[0])
            return nf.leaf(known_as, sizes)

        def finish(normal: Value) -> Value:
            return self._read(node, call, lambda _: normal, lambda read: rescaled(read, normal))

        return Opened((call.op, key), [n.name for n in given], leaf, finish)


def _within(axes: int | slice, index: Any) -> int | None:
    """The axis at ``index`` of some in a row; None where it takes the rank to tell."""
    if not isinstance(axes, slice) or type(index) is not int or axes.step not in (None, 1):
        return None
    start = axes.start or 0
    if index < 0:
        return index if axes.stop is None and start >= 0 else None
    return start + index if start >= 0 or start + index < 0 else None


def _sliced_axes(call: Described) -> list[tuple[int, Any]] | None:
    """The axes along which a slice is one, with its bounds; None for other calls."""
    if call.op == "getitem":
        index = call.args["index"]
        return list(enumerate(index if isinstance(index, tuple | list) else (index,)))
    if call.op != "slice" or not isinstance(dim := call.args.get("dim", 0), int):
        return None
    start, end, step = (call.args.get(key) for key in ("start", "end", "step"))
    start, end = (None if start == 0 else start), (None if isinstance(end, int) and end >= nl.WHOLE else end)
    return [(dim, slice(start, end, None if step == 1 else step))]
