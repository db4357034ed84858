"""Tensors of a main graph that no input reaches, and their values: what ONNX Runtime makes of each operator alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from reparamc.certificate.axes import Unrepresentable
from reparamc.certificate.normal_form import Array
from reparamc.certificate.onnx_bounds import bodies
from reparamc.certificate.onnx_shapes import MOST_SIZES, Shapes, bounds, constant, is_standard
from reparamc.certificate.proof import Window

RANDOM = {
    "Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
}  # fmt: skip
"""Operators whose result is not decided by their operands."""

SHAPED = {
    "CenterCropPad", "Col2Im", "ConstantOfShape", "Expand", "MaxUnpool", "MelWeightMatrix", "OneHot", "Pad", "Range",
    "Reshape", "Resize", "Slice", "Tile", "Upsample", "AffineGrid", "BlackmanWindow", "HammingWindow", "HannWindow",
}  # fmt: skip
"""Operators whose operands decide the shape of the result: where it is unknown, it may be vast."""

MOST_MADE, PER_STORED = 2**23, 8
"""Elements that constants may have in all, and so many more for each that is stored."""

MOST_SMALL = 4096
"""Elements of a constant that is given to a session together with others."""


class Constants:
    """The constants of a main graph.

    Attributes:
        names: all of them.
        tensors: those that are stored.
        shapes: what can be inferred, given the values of constants.
    """

    def __init__(
        self,
        model: ModelProto,
        inferred: Callable[[Mapping[str, Array]], Shapes],
        read: Callable[[TensorProto], Array] = numpy_helper.to_array,
    ) -> None:
        graph = model.graph
        self.model, self._read = model, read
        self.producers = {name: node for node in graph.node for name in node.output if name}
        overridable = {v.name for v in graph.input} if model.ir_version >= 4 else set()
        self.tensors = {t.name: t for t in graph.initializer if t.name not in overridable}
        self._open = {d.dim_param for v in graph.input for d in v.type.tensor_type.shape.dim}
        self._arrays: dict[str, Array] = {}
        self._tried = 0
        self.shapes = inferred({})
        self.names = self._names()
        given: dict[str, Array] = {}
        while fresh := self._deciding(given):  # a shape may follow from constants, which may follow from shapes
            given.update(fresh)
            self.shapes = inferred(given)
            self.names = self._names()

    def _names(self) -> set[str]:
        sizes = {name: prod(t.dims) for name, t in self.tensors.items()}
        most = left = MOST_MADE + PER_STORED * sum(sizes.values())
        for node in self.model.graph.node:
            if not is_standard(node) or node.op_type in RANDOM or bodies(node):
                continue
            made = self._made(node, sizes, most)
            if sum(made.values()) <= left:
                left -= sum(made.values())
                sizes.update(made)
        return set(sizes)

    def _made(self, node: NodeProto, sizes: Mapping[str, int], most: int) -> dict[str, int]:
        """The results of a node that are constants, and how many elements they have at most."""
        results = [name for name in node.output if name]
        if node.op_type == "Constant":
            held = constant(node)
            return {} if held is None else dict.fromkeys(results, prod(held.dims))
        if (told := self._of_shape(node)) is not None:
            return dict.fromkeys(results, told.size)
        if not node.input or not all(name in sizes for name in node.input if name):
            return {}
        given = 1
        for name in filter(None, node.input):
            given = min(given * max(sizes[name], 1), most)
        unknown = most + 1 if node.op_type in SHAPED else given
        shapes = {name: self.shapes.known_shape(name) for name in results}
        return {name: unknown if shape is None else prod(shape) for name, shape in shapes.items()}

    def _deciding(self, given: Mapping[str, Array]) -> dict[str, Array]:
        """Constants that operators compute, from which shapes follow that are unknown so far."""
        found: dict[str, Array] = {}
        for node in self.model.graph.node:
            if node.op_type not in SHAPED or self._is_told(node.output[0]):
                continue
            for name in self._parts(node.input[node.op_type not in ("ConstantOfShape", "Range") :]):
                if name not in self.names or name in given or self._stored(name) is not None:
                    continue
                try:
                    array = self.array(name)
                except Unrepresentable:
                    continue
                if array is not None and array.size <= MOST_SIZES:
                    found[name] = array
        return found

    def _is_told(self, name: str) -> bool:
        """Whether inference itself knows the sizes of ``name``, or has those of inputs: others follow from them."""
        return self.shapes.is_inferred(name, self._open)

    def _parts(self, names: Iterable[str]) -> Iterator[str]:
        """``names``, and what those are joined of that are no constants."""
        for name in names:
            joined = None if name in self.names else self.producers.get(name)
            yield from joined.input if joined is not None and joined.op_type == "Concat" else (name,)

    # Shapes

    def _of_shape(self, node: NodeProto) -> Array | None:
        """What a node reads of known sizes or of a dtype, for any operand; None for all others."""
        if node.op_type == "Shape":
            dims = self.shapes.known_shape(node.input[0])
            return None if dims is None else np.array(dims[bounds(node)], np.int64)
        if node.op_type == "CastLike" and is_standard(node):
            number, dtype = self._small(node.input[0]), self.shapes.dtype(node.input[1])
            with np.errstate(all="ignore"):
                return None if number is None or dtype is None else number.astype(dtype)
        return self._picked(node) if node.op_type in ("Gather", "Slice") and len(node.input) > 1 else None

    def _picked(self, node: NodeProto) -> Array | None:
        """What a Gather or Slice picks of sizes; others may be unknown."""
        made = self.producers.get(node.input[0])
        if made is None or made.op_type != "Shape" or not is_standard(made):
            return None
        shape = self.shapes.shape(made.input[0])
        given = [self._stored(name) for name in node.input[1:]]
        if shape is None or any(g is None for g, name in zip(given, node.input[1:], strict=True) if name):
            return None
        dims = [e.known for e in shape[bounds(made)]]
        index = given[0] if node.op_type == "Gather" else _range(given, len(dims))
        if index is None:
            return None
        places = [int(i) for i in index.reshape(-1)]
        if not all(-len(dims) <= i < len(dims) for i in places):
            return None
        found = [dims[i] for i in places]
        return None if None in found else np.array(found, np.int64).reshape(index.shape)

    # Values

    def _stored(self, name: str) -> Array | None:
        """The value of a constant that no operator computes; None for all others."""
        if name in self.tensors:  # read again where it is read again: the weights need not all be held twice
            return self._read(self.tensors[name])
        node = self.producers.get(name)
        held = constant(node) if node is not None and node.op_type == "Constant" and is_standard(node) else None
        return None if held is None else self._read(held)

    def array(self, name: str) -> Array | None:
        """The value of a constant; None for what is none.

        Raises:
            Unrepresentable: ONNX Runtime does not compute it.
        """
        if name not in self.names:
            return None
        if (stored := self._stored(name)) is not None:
            return stored
        stack = [name]
        while stack:
            node = self.producers[stack[-1]]
            if stack[-1] in self._arrays:
                stack.pop()
                continue
            of_shape = self._of_shape(node)
            waiting = [n for n in node.input if n and n not in self._arrays and self._stored(n) is None]
            if of_shape is not None:
                self._arrays[node.output[0]] = of_shape
            elif self._tried < len(self.names):
                self._compute_small()
            elif waiting:
                stack.extend(waiting)
            else:
                self._compute(node)
        return self._arrays[name]

    def _compute_small(self) -> None:
        """Enter what all operators on small constants make, in one session; nothing where one of them does not run."""
        self._tried = len(self.names)
        feeds: dict[str, Array] = {}
        nodes: list[NodeProto] = []
        inside: set[str] = set()
        for node in self.model.graph.node:
            results = [name for name in node.output if name]
            if not results or not self.names.issuperset(results) or node.op_type == "Constant":
                continue
            if self._arrays.keys() >= set(results):
                continue
            known = {n: a for n in node.input if n and n not in inside and (a := self._small(n)) is not None}
            if (told := self._of_shape(node)) is not None:
                self._arrays[results[0]] = told
            elif node.op_type == "Identity" and known:
                self._arrays[results[0]] = known[node.input[0]]
            elif all(n in inside or n in known for n in node.input if n):
                nodes.append(node)
                inside.update(results)
                feeds |= known
        outputs = [name for node in nodes for name in node.output if name]
        if not nodes:
            return
        try:
            self._arrays.update(zip(outputs, run_alone(nodes, feeds, outputs, self.model), strict=True))
        except Exception:  # then each is computed alone, when it is asked for
            return

    def _small(self, name: str) -> Array | None:
        """The value of a constant of few elements, if it is stored or known by now."""
        if name in self.tensors and prod(self.tensors[name].dims) > MOST_SMALL:
            return None
        known = self._arrays[name] if name in self._arrays else self._stored(name)
        return None if known is None or known.size > MOST_SMALL else known

    def idle(self) -> list[Window]:
        """Constants that nothing reads, and that cannot be computed."""
        read = {name for node in self.model.graph.node for name in node.input}
        found = []
        for name in self.names - read - self.tensors.keys():
            try:
                self.array(name)
            except Unrepresentable as error:
                found.append(Window(name, "undecided", reason=str(error)))
        return found

    def _compute(self, node: NodeProto) -> None:
        """Enter what a node makes of constants."""
        feeds = {}
        for name in filter(None, node.input):
            stored = self._stored(name)
            feeds[name] = self._arrays[name] if stored is None else stored
        if node.op_type == "Identity":
            self._arrays[node.output[0]] = feeds[node.input[0]]
            return
        outputs = [name for name in node.output if name]
        try:
            results = run_alone([node], feeds, outputs, self.model)
        except Exception as error:  # the runtime lacks an operator or a type, or refuses the operands
            raise Unrepresentable(f"the constant {outputs[0]!r} cannot be computed") from error
        self._arrays.update(zip(outputs, results, strict=True))


def run_alone(
    nodes: Sequence[NodeProto], feeds: Mapping[str, Array], outputs: Sequence[str], model: ModelProto
) -> list[Array]:
    """The results of operators, as ONNX Runtime has them. Types that NumPy lacks it takes only as stored."""
    import onnxruntime as ort

    stored = [numpy_helper.from_array(a, name) for name, a in feeds.items() if a.dtype.isbuiltin != 1]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for name, a in feeds.items()
        if a.dtype.isbuiltin == 1
    ]
    results = [helper.make_empty_tensor_value_info(o) for o in outputs]
    body = helper.make_graph(nodes, "constant", inputs, results, stored)
    made = helper.make_model(body, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(
        made.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
    )
    return [np.asarray(found) for found in session.run(list(outputs), {v.name: feeds[v.name] for v in inputs})]


def _range(given: Sequence[Array | None], width: int) -> Array | None:
    """The positions of a Slice with the operands ``given``; None in reverse, or along an axis that is not there."""
    start, end, axis, step = (None if g is None else int(g.item()) for g in [*given, None, None][:4])
    return None if (step or 1) < 1 or axis not in (None, 0, -1) else np.arange(width)[start:end:step]
