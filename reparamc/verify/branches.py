"""Where a graph branches: numbers it compares values with, sizes it names, tables it reads rows of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from reparamc.onnx.regions_alone import showing
from reparamc.onnx.session import session

COMPARING = {"Clip", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mod"}
"""Operators that compare with constant operands."""
KNEES: dict[str, tuple[float, ...]] = {"HardSwish": (-3.0, 3.0), "HardSigmoid": (-2.5, 2.5)}
ATTRIBUTES = {"Clip": ("min", "max"), "ThresholdedRelu": ("alpha",), "Shrink": ("lambd",)}
"""And with what is written into them."""
MOVING = {"Cast", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators through which a row number comes from an input."""
FEW = 16
"""Of a constant of more elements none is a threshold."""
LARGEST = 4096
"""No larger size is tried."""


@dataclass
class Branches:
    """What is known of one graph.

    Attributes:
        compared: by tensor, the numbers that it is compared with.
        sizes: whole numbers from which axes may be counted.
        rows: by input, how many rows the table has that it picks from.
    """

    compared: dict[str, set[float]] = field(default_factory=dict)
    sizes: set[int] = field(default_factory=set)
    rows: dict[str, int] = field(default_factory=dict)

    @property
    def values(self) -> set[float]:
        return set().union(*self.compared.values())


def branches_of(model: ModelProto) -> Branches:
    """The branches of the main graph."""
    found = Branches()
    graph = model.graph
    dims = {t.name: list(t.dims) for t in graph.initializer}
    small = {t.name: t for t in graph.initializer if np.prod(t.dims, dtype=np.float64) <= FEW}
    small |= {n.output[0]: a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"}
    known = helper.get_all_tensor_dtypes()
    constants = {
        name: numpy_helper.to_array(t).reshape(-1)
        for name, t in small.items()
        if not t.external_data and t.data_type in known
    }
    producers = {name: node for node in graph.node for name in node.output}
    given = {v.name for v in graph.input} - dims.keys()
    for node in graph.node:
        numbers = {*KNEES.get(node.op_type, ()), *_written(node)}
        for array in (constants[name] for name in node.input if name in constants):
            if array.dtype.kind in "iu" and array.size <= FEW:
                found.sizes.update(int(n) for n in array if 1 < n <= LARGEST)
            if node.op_type in COMPARING and array.dtype.kind in "iuf" and array.size <= FEW:
                numbers.update(float(n) for n in array if np.isfinite(n))
        for name in (name for name in node.input if numbers and name and name not in constants):
            found.compared.setdefault(name, set()).update(numbers)
        if node.op_type == "Gather" and node.input[0] in dims:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            rows, name = dims[node.input[0]][axis], node.input[1]
            while name in producers and producers[name].op_type in MOVING:
                name = producers[name].input[0]
            if name in given:
                found.rows[name] = min(rows, found.rows.get(name, rows))
        if node.op_type in ("Gather", "Slice"):
            found.sizes.update(n for n in dims.get(node.input[0], ()) if 1 < n <= LARGEST)
    return found


def _written(node: NodeProto) -> set[float]:
    wanted = ATTRIBUTES.get(node.op_type, ())
    return {float(helper.get_attribute_value(a)) for a in node.attribute if a.name in wanted}


def factors(model: ModelProto, branches: Branches, inputs: Mapping[str, np.ndarray]) -> set[float]:
    """What ``inputs`` are multiplied by to reach what values are compared with, as far as the model is homogeneous."""
    own = {name for node in model.graph.node for name in node.output}
    shown = [name for name in branches.compared if name in own]
    seen = dict(inputs)
    if shown:
        with session(showing(model, shown), "the model with all that is compared") as run:
            seen |= run(inputs)
    found: set[float] = set()
    for name, numbers in branches.compared.items():
        value = np.asarray(seen.get(name, 0))
        size = float(np.abs(value).max(initial=0)) if value.dtype.kind == "f" else 0.0
        found.update(abs(number) / size for number in numbers if size and number)
    return found
