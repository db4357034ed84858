"""What readers ask about an ONNX graph: constants, types, who makes and who reads a value, readings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto

from reparamc.algebra.arrays import Parameter
from reparamc.algebra.expr import Array, Reshape, Source
from reparamc.algebra.records import lazy
from reparamc.algebra.rewrite import Declined
from reparamc.compiler.readings import Reading, Value
from reparamc.errors import InputError
from reparamc.onnx.values import (
    FLOATS,
    Constants,
    Types,
    is_fused_conv,
    is_placed,
    is_standard,
    operand,
    opset_of,
    read_elsewhere,
    users,
)
from reparamc.onnx.weights import COUNTERS, LARGE

Reader = Callable[["Facts", NodeProto, str], "Reading | Declined | None"]
"""From a graph, a node of it and one output of that node to the reading of that output."""


class Facts:
    """The main graph of a model, and the readings of its values by a table of readers.

    Args:
        doubted: the checker objects to the model: operators that it objects to have no reading.
    """

    def __init__(self, model: ModelProto, table: Mapping[str, Reader], doubted: bool = False) -> None:
        self.model, self.doubted = model, doubted
        self.nodes = list(model.graph.node)
        self.constants = Constants(model)
        self.opset = opset_of(model)
        self._results = {id(node): results_of(node) for node in self.nodes}
        self.producers = {name: node for node in self.nodes for name in node.output[:] if name}
        self.uses = users(model.graph)
        for name in read_elsewhere(model):
            self.uses.setdefault(name, []).append(None)
        """The nodes that read each value, once per operand; None for a graph output or a body that captures it."""
        self._table = table
        self._readings: dict[str, Reading | Declined | None] = {}
        self._parameters: dict[str, Parameter] = {}

    @lazy
    def types(self) -> Types:
        return Types(self.model)

    def read(self, value: Value) -> Reading | Declined | None:
        name = str(value)
        if name not in self._readings:
            node = self.producers[name]
            reader = self._table.get(node.op_type) if is_standard(node) or is_fused_conv(node) else None
            readable = (
                reader is not None
                and name in self.results(node)
                and not is_placed(node)
                and self.types.dtype(name) is not None
                and not self.is_empty(node)
                and not (self.doubted and self._is_wrong(node))
            )
            self._readings[name] = reader(self, node, name) if reader is not None and readable else None
        return self._readings[name]

    def results(self, node: NodeProto) -> list[str]:
        """As `results_of`, of a node of this graph."""
        return self._results[id(node)]

    def is_empty(self, node: NodeProto) -> bool:
        """Whether an operand or a result of ``node`` has no elements, for every input: there is nothing to gain."""
        return not (self._empty.isdisjoint(node.input[:]) and self._empty.isdisjoint(node.output[:]))

    @lazy
    def _empty(self) -> set[str]:
        known = self.constants.known
        found = {name for name, c in known.items() if 0 in c.dims}
        return found.union(name for name in self.types.empty if name not in known)

    def _is_wrong(self, node: NodeProto) -> bool:
        context = onnx.checker.C.CheckerContext()
        context.ir_version = self.model.ir_version
        context.opset_imports = {o.domain: o.version for o in self.model.opset_import}
        try:
            onnx.checker.check_node(node, context)
        except onnx.checker.ValidationError:
            return True
        return False

    def axis(self, name: str) -> int | None:
        """The channel axis of ``name``, where a linear operator fixes it."""
        reading = self.read(name) if name in self.producers else None
        return reading.axis if isinstance(reading, Reading) else None

    def is_linear(self, name: str) -> bool:
        """Whether ``name`` is computed by an operator that has a reading."""
        return name in self.producers and isinstance(self.read(name), Reading)

    def constant(self, node: NodeProto, position: int) -> str | None:
        """The name of the constant operand at ``position``; None when it is absent or no constant."""
        name = operand(node, position)
        return name if name is not None and name in self.constants else None

    def operand(self, name: str) -> Source:
        """``name`` as an operand of a reading."""
        return Source(name, axis=self.axis(name))

    def parameter(self, name: str) -> Array:
        """The parameter ``name`` in float64, loaded when its values are asked for.

        Raises:
            InputError: it is no tensor of floating numbers, which the checker overlooks.
        """
        kind = self.constants.element_type(name)
        if kind not in FLOATS:
            stored = TensorProto.DataType.Name(kind).lower()
            raise InputError(f"the parameter {name!r} is of type {stored}, where a floating type is needed")

        def look() -> np.ndarray:
            return self.constants.array(name)

        def load() -> Array:
            stored = look()
            COUNTERS.decoded += stored.nbytes if stored.nbytes > LARGE else 0
            return stored.astype(np.float64)

        self._parameters[name] = found = Parameter((name,), self.constants.shape(name), load, look=look)
        found.is_exact = True
        return cast(Array, found)

    def is_stored(self, array: Parameter, dtype: np.dtype) -> bool:
        """Whether ``array`` is a parameter as it lies in the graph, in ``dtype``."""
        name = array.names[0]
        return self._parameters.get(name) is array and FLOATS[self.constants.element_type(name)] == dtype

    def reshapes(self, node: NodeProto) -> Reshape | None:
        """What ``node`` does to the shape of its operand, where both shapes are known."""
        before, after = self.types.shape(node.input[0]), self.types.shape(node.output[0])
        return None if before is None or after is None else Reshape(before, after, node.output[0])


def results_of(node: NodeProto) -> list[str]:
    """The outputs of ``node`` that values are read from: one, but for Split."""
    outputs = node.output[:] if node.op_type == "Split" else node.output[:1]
    return [name for name in outputs if name]
