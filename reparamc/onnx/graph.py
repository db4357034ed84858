"""The ONNX adapter: a main graph as regions of linear operators, and expressions as operators.

Nodes that no rewrite touches are never rebuilt: they keep their names, doc strings and metadata.
What bodies of If, Loop and Scan capture counts as read; they are graphs of their own (see `bodies`).
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from math import prod

import numpy as np
from onnx import ModelProto

from reparamc.algebra.expr import Array, Conv, Expr, Source
from reparamc.algebra.records import lazy
from reparamc.algebra.rewrite import Declined
from reparamc.compiler.graph import Bounded, Fold, Separate
from reparamc.compiler.readings import LAST, MOST_CONCATENATED, Reading, Taps, Value
from reparamc.onnx import taps
from reparamc.onnx.bounds import bounded
from reparamc.onnx.constants import folded
from reparamc.onnx.emit import is_rows
from reparamc.onnx.facts import Facts
from reparamc.onnx.operators import READERS
from reparamc.onnx.reference import Operator, in_float64
from reparamc.onnx.separate import may_narrow, separate
from reparamc.onnx.sizes import Sizes, reads_size_only
from reparamc.onnx.values import FLOATS, attribute, captured, is_standard

LINEAR_KINDS = {
    "Add", "Concat", "CumSum", "DepthToSpace", "Div", "Einsum", "Expand", "Flatten", "Gather", "GatherElements",
    "GatherND", "Gemm", "Identity", "MatMul", "Mean", "Mul", "Neg", "Pad", "ReduceMean", "ReduceSum", "Reshape",
    "ScatterElements", "ScatterND", "Slice", "SpaceToDepth", "Split", "Squeeze", "Sub", "Sum", "Tile", "Transpose",
    "Trilu", "Unsqueeze", "Where",
}  # fmt: skip
"""Operators that are affine in each operand that is no constant, all other operands being constant."""


MOST_ELEMENTS = 2**24
"""Of a value that is computed to find out what it is."""


class OnnxGraph(Facts):
    """`reparamc.compiler.graph.Graph` over the main graph of a model. Values are tensor names."""

    pools_clamp = True
    stores_ones = True

    def __init__(self, model: ModelProto, doubted: bool = False) -> None:
        super().__init__(model, READERS, doubted)
        self._functions: dict[str, Operator] = {}
        self._users: dict[Value, Sequence[Value | None]] = {}

    @lazy
    def sizes(self) -> Sizes:
        return Sizes(self, lambda name: self.is_linear(name) or self.moves(name) is not None)

    # Reading

    def values(self) -> Sequence[str]:
        return self._values

    @lazy
    def _values(self) -> list[str]:
        return [name for node in self.nodes for name in self.results(node) if name not in self.constants]

    def name(self, value: Value) -> str:
        node = self.producers.get(str(value))
        return node.name if node is not None and node.name else str(value)

    def users(self, value: Value) -> Sequence[Value | None]:
        if value not in self._users:
            self._users[value] = self._users_of(value)
        return self._users[value]

    def _users_of(self, value: Value) -> Sequence[Value | None]:
        found: list[str | None] = []
        freed = str(value) in self.sizes.freed
        for node in self.uses.get(str(value), []):
            if freed and reads_size_only(node):
                continue
            found += [None] if node is None else [name for name in self.results(node) if name in self.uses] or [None]
        return [self._reader(name, str(value)) for name in found]

    def _reader(self, user: str | None, value: str) -> str | None:
        """``user`` of ``value``, or what reads that two operators later, as one that three of them make up together."""
        name = self._moved.get(self._moved.get(user))
        reading = self.read(name) if name is not None else None
        return name if isinstance(reading, Reading) and value in reading.operands else user

    @lazy
    def _moved(self) -> dict[str | None, str]:
        """By each value the result of the operator that reads it, where it is the only one and moves it at most."""
        moving = (node for node in self.nodes if node.op_type in ("Reshape", "Transpose"))
        named = ((node.input[0], node.output[0]) for node in moving if node.input and node.output)
        return {x: y for x, y in named if len(self.uses.get(x, ())) == 1}

    def holders(self, parameter: str) -> Sequence[Value | None]:
        return self.users(parameter)

    def dtype(self, members: Sequence[Value]) -> np.dtype | None:
        dtypes = {self.types.dtype(str(v)) for v in members}
        return dtypes.pop() if len(dtypes) == 1 else None

    def source(self, value: Value) -> Source:
        if isinstance(value, Taps):
            return value.source(self.types.shape(str(value.of)))
        return Source(value, shape=self.types.shape(str(value)))

    def obstacle(
        self, root: Value, members: Sequence[Value], sources: Sequence[Value], made: Collection[Expr]
    ) -> str | None:
        """ONNX Runtime convolves no doubles: a model that it runs must not be given a convolution of them."""
        for e in made:
            if isinstance(e, Conv) and e.reads_taps and (why := taps.obstacle(self, e)) is not None:
                return why
        if self.dtype(members) != np.float64 or any(node.op_type in ("Conv", "ConvTranspose") for node in self.nodes):
            return None
        kernels = any(isinstance(e, Conv) and e.spatial and not e.is_weightless and not is_rows(e) for e in made)
        return "it would be a convolution of doubles, which ONNX Runtime does not have" if kernels else None

    def _is_vast(self, name: str) -> bool:
        """Whether ``name`` has too many elements, as far as its size is known, to be computed for a try."""
        shape = self.types.shape(name)
        factors = [dim.factor for dim in shape or ()]
        return prod(factors) > MOST_ELEMENTS or max(factors, default=0) > MOST_CONCATENATED

    def is_written(self, value: Value, but: Value | None = None) -> bool:
        return False

    def moves(self, value: Value) -> tuple[Value, ...] | None:
        node = self.producers[str(value)]
        if not is_standard(node) or node.op_type not in LINEAR_KINDS or self.types.dtype(str(value)) is None:
            return None
        if self.is_empty(node) or self._is_vast(str(value)):
            return None
        if isinstance(self.read(value), Declined) and node.op_type in ("Add", "Sub", "Mul", "Div"):
            return None  # it broadcasts, or is part of an activation
        if node.op_type == "Pad" and attribute(node, "mode", b"constant") != b"constant":
            return None  # what is at the border depends on its neighbours
        if len(node.output) > 1 and node.op_type != "Split":
            return None
        floating = [name for name in node.input[:] if name and name not in self.constants]
        if any(self.types.dtype(name) is None for name in floating):
            return None  # indices that are computed at run time
        most = {"Mul": 1, "Div": 1, "MatMul": 1, "Gemm": 1, "Einsum": 1}.get(node.op_type, len(floating))
        by_itself = node.op_type == "Div" and node.input[0] in self.constants
        return tuple(floating) if 0 < len(floating) <= most and not by_itself else None

    def reads(self, value: Value) -> Sequence[Value]:
        node = self.producers[str(value)]
        return [n for n in (*node.input[:], *captured(node)) if n and n not in self.constants]

    def separate(self, value: Value) -> Separate | None:
        return separate(self, str(value))

    def bounded(self, value: Value) -> Bounded | None:
        return bounded(self, str(value))

    def may_narrow(self, value: Value) -> bool:
        return may_narrow(self, str(value))

    def reach(self, value: Value) -> int:
        node = self.producers[str(value)]
        found = [0]
        for a in node.attribute[:]:
            found += [abs(n) for n in (a.i, *a.ints)]
        for name in node.input[:]:
            if name in self.constants:
                array = self.constants.array(name)
                found += [abs(int(n)) for n in array.ravel()] if array.dtype.kind in "iu" else list(array.shape[2:])
        return max(n for n in found if n < LAST)  # ends that mean "all" do not count

    def run(self, value: Value, operands: Mapping[Value, Array], sizes: Mapping[str, int] = {}) -> Array:
        name = str(value)
        if name not in self._functions:
            node = self.producers[name]
            constants = {n: self.constants.array(n) for n in node.input[:] if n in self.constants}
            self._functions[name] = in_float64(node, name, constants, self.opset, self.model.ir_version)
        return self._functions[name]({str(v): x for v, x in operands.items()})

    def kind(self, value: Value) -> Hashable:
        node = self.producers[str(value)]
        attributes = [a.SerializeToString(deterministic=True) for a in node.attribute[:] if a.name != "group"]
        inputs: list[Hashable] = [str(value) == name for name in node.output[:]]
        for name in node.input[:]:
            if name not in self.constants:
                inputs.append(bool(name))
                continue
            shape = self.constants.shape(name)
            whole = self.constants.element_type(name) not in FLOATS and node.op_type not in (
                "Reshape",
                "Split",
                "Gather",
            )
            inputs.append((tuple(n == 1 for n in shape[:2]), shape[2:], whole and self.constants.array(name).tobytes()))
        return node.op_type, frozenset(attributes), tuple(inputs)

    def folded(self, small: int) -> tuple[OnnxGraph, list[Fold]]:
        """As `Graph.folded`: the graph of a copy in which it is done already, for all or none."""
        names, model, types = folded(self.model, lambda: self.types, 4 * small, self.constants)
        if not names:
            return self, []
        graph = OnnxGraph(model, self.doubted)
        graph.types = types()
        return graph, [Fold(name, names[0]) for name in names]
