"""Certificates of ONNX models.

See `proof` for what is proven, and `normal_form` for the algebra. Only the main graph is read, and
local functions that differ; operators with bodies, of other domains, or not listed in `READERS`, are atoms.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import cache
from math import prod

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, inliner, numpy_helper

import reparamc.certificate.normal_form as nf
from reparamc.certificate.agreement import Precision
from reparamc.certificate.axes import Dim, Unrepresentable
from reparamc.certificate.narrowing import Separate
from reparamc.certificate.normal_form import Array, Value
from reparamc.certificate.onnx_bounds import FAILURES, bodies, unnamed
from reparamc.certificate.onnx_constants import RANDOM, Constants, run_alone
from reparamc.certificate.onnx_operators import (
    ELEMENTWISE,
    HOMOGENEOUS,
    MIXING,
    NORMS,
    READERS,
    Call,
    bound,
    is_convolution,
    keeps_numbers,
    rescaled,
    weighted,
)
from reparamc.certificate.onnx_shapes import FLOATS, SIZES, Shapes, Sizes, Typed, is_standard, sizes_made
from reparamc.certificate.proof import Certificate, Window, certify, same_bytes
from reparamc.certificate.ranges import Bound
from reparamc.certificate.sides import Form, Opened

PRECISIONS = {
    "float64": Precision(2.0**-53, 2.0**-1075),
    "float32": Precision(2.0**-24, 2.0**-150),
    "float16": Precision(2.0**-11, 2.0**-25),
    "bfloat16": Precision(2.0**-8, 2.0**-134),
}

MOST_STEPS = 8
"""Operators in a row that are followed to the sizes which a tensor tells."""

OLDEST = 7
"""The operator set from which on the readings here hold; before it, an attribute names the axis of a broadcast."""


def certify_onnx(
    original: ModelProto,
    result: ModelProto,
    read: Callable[[TensorProto], Array] = numpy_helper.to_array,
    without: Collection[str] = (),
) -> Certificate:
    """Prove that ``result`` computes what ``original`` does, for every input size.

    Parameters of ``result`` may be off by the rounding of their dtype. Neither model is run. ``read`` gives the value
    of a tensor. Tensors ``without`` which the proof is to do may mean something else in each model.
    """
    _keep_freed_blocks()
    if _functions(original) != _functions(result):
        original, result = (_inlined(m) for m in (original, result))
    # Where inference is silent, what both files declare of a tensor is believed.
    declared = {v.name: v for v in original.graph.value_info}
    declared = [v for v in result.graph.value_info if declared.get(v.name) == v]
    after = _Side("emitted", result, declared, {}, read)
    # A tensor has the sizes in the original that it has in the result, once it is proven to be the same.
    typed, alone = after.typed(), Shapes(original, declared)
    typed = {name: t for name, t in typed.items() if _is_news(alone.shape(name), t.dims)}
    before = _Side("original", original, declared, typed, read, alone)
    computed = set(before.order)
    stands_for = {name: name for name in after.order if name in computed and name not in without}
    stands_for.update({v.name: v.name for v in result.graph.input if v.name in before.inputs})
    after.doubted |= before.doubted
    after.shape_of = {name: before.shapes.shape(meant) for name, meant in stands_for.items()}
    outputs = [(o.name, o.name) for o in result.graph.output]
    parameters = sum(prod(t.dims) for t in original.graph.initializer)
    outside = [*_outside(original, result, read), *after.stored.idle()]
    if alone.is_strict and not after.shapes.is_strict:
        outside.append(Window("graph", "undecided", reason="shape inference refuses the result alone"))
    return certify(before, after, outputs, stands_for, after.precision, outside, parameters)


def _is_news(shape: Sequence[Dim] | None, dims: Sequence[int]) -> bool:
    """Whether these sizes tell more of a tensor of that shape, and are possible: with channels lost, it has others."""
    known = None if shape is None else [e.known for e in shape]
    if known == [*dims]:
        return False
    return known is None or (len(known) == len(dims) and all(m in (None, n) for m, n in zip(known, dims, strict=True)))


def _functions(model: ModelProto) -> list[bytes]:
    return [f.SerializeToString() for f in model.functions]


def _inlined(model: ModelProto) -> ModelProto:
    """``model`` with the bodies of local functions in the place of their calls, if that can be done."""
    try:
        return inliner.inline_local_functions(model)
    except FAILURES:
        return model


def _keep_freed_blocks() -> None:
    """Keep freed blocks in the heap, which saves clearing pages for each window (glibc's mmap threshold)."""
    np.empty(2**25 - 2**16, np.uint8)


def _outside(original: ModelProto, result: ModelProto, read: Callable[[TensorProto], Array]) -> list[Window]:
    """What a caller would see differ: inputs, outputs, operator sets."""
    found = []
    for what in ("input", "output"):
        lists = [[(v.name, v.type.SerializeToString()) for v in getattr(m.graph, what)] for m in (original, result)]
        if original.ir_version < 4 and what == "input":  # every initializer is listed among the inputs
            lists = [
                [v for v in values if v[0] not in {i.name for i in m.graph.initializer}]
                for values, m in zip(lists, (original, result), strict=True)
            ]
        if lists[0] != lists[1]:
            found.append(Window(what, "different", np.inf, np.inf, f"the {what}s of the graph differ"))
    if (name := _other_default(original, result, read)) is not None:
        found.append(Window("input", "different", np.inf, np.inf, f"the default of the input {name!r} differs"))
    versions = [{(o.domain, o.version) for o in m.opset_import} for m in (original, result)]
    if versions[0] != versions[1]:
        found.append(Window("opset", "different", np.inf, np.inf, "the operator sets differ"))
    if _functions(original) != _functions(result):
        found.append(Window("functions", "different", np.inf, np.inf, "the local functions differ"))
    return found


def _other_default(original: ModelProto, result: ModelProto, read: Callable[[TensorProto], Array]) -> str | None:
    """The first input that a caller may leave out in one of the two, or that has another value then."""
    defaults = []
    for m in (original, result):
        inputs = {v.name for v in m.graph.input} if m.ir_version >= 4 else set()
        defaults.append({t.name: t for t in m.graph.initializer if t.name in inputs})
    for name in dict.fromkeys((*defaults[0], *defaults[1])):
        a, b = (d.get(name) for d in defaults)
        if a is None or b is None or not same_bytes(read(a), read(b)):
            return name
    return None


class _Side:
    """`sides.Side` over the main graph of a model.

    Args:
        declared: types to believe where inference says nothing.
        typed: what another graph tells of tensors of the same name.
        read: gives the value of a tensor.
        alone: the shapes that this graph alone tells, if ``typed`` tells more.
    """

    def __init__(
        self,
        which: str,
        model: ModelProto,
        declared: Sequence[ValueInfoProto],
        typed: dict[str, Typed],
        read: Callable[[TensorProto], Array],
        alone: Shapes | None = None,
    ) -> None:
        graph = model.graph
        self.which, self.model = which, model
        # Unknowns that both graphs name alike; others are numbered by shape inference.
        self.symbols = {d.dim_param for v in graph.input for d in v.type.tensor_type.shape.dim if d.dim_param}
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
        self.inputs = {v.name for v in graph.input}
        self.producers = {name: (node, at) for node in graph.node for at, name in enumerate(node.output) if name}

        def inferred(stored: Mapping[str, Array]) -> Shapes:
            if alone is not None and not typed and not stored:
                return alone
            return Shapes(model, declared, stored, typed)

        self.stored = Constants(model, inferred, read)
        self.shapes, self.constants, self.constant = self.stored.shapes, self.stored.names, self.stored.array
        self._by_itself = alone or self.shapes
        self._kinds: dict[str, Hashable] = {}
        self._sizes: dict[str, Sizes | None] = {}
        self.doubted = {name for s in self.shapes.doubted for name in (s, self._own(s))}
        """Symbols that may stand for two sizes; see `Shapes`."""
        self.shape_of: dict[str, tuple[Dim, ...] | None] | None = None
        """The shapes of tensors as the original has them, if this is not the original."""
        self._operands: dict[str, Sequence[str]] = {}
        sparse = (t.values.name for t in graph.sparse_initializer)
        self.known = {*self.inputs, *self.producers, *self.stored.tensors, *sparse}
        self.order = [name for node in graph.node for name in node.output if name and name not in self.constants]

    def typed(self) -> dict[str, Typed]:
        """All floating tensors that are computed, and whose sizes are known."""
        found = {name: (self.shapes.dtype(name), self.shapes.known_shape(name)) for name in self.order}
        return {name: Typed(dtype, n) for name, (dtype, n) in found.items() if dtype is not None and n is not None}

    def dtype(self, name: str) -> np.dtype | None:
        return self.shapes.dtype(name)

    def inferred(self, name: str) -> list[Dim | None] | None:
        """The sizes of ``name`` as far as this graph alone tells them; None where the rank is unknown."""
        shape = self._by_itself.shape(name)  # what the other graph says of this very tensor is what is to be proven
        return None if shape is None else [e if self.symbols.issuperset(e.symbols) else None for e in shape]

    def measured(self, name: str) -> str | None:
        """The tensor whose shape ``name`` is."""
        node = self.producers[name][0] if name in self.producers else None
        is_whole = node is not None and is_standard(node) and node.op_type == "Shape" and not node.attribute
        return node.input[0] if node is not None and is_whole else None

    # The protocol

    def operands(self, name: str) -> Sequence[str]:
        """Operands by position, and what the bodies of an operator capture."""
        if name not in self.producers:
            return ()
        if name not in self._operands:
            node, _ = self.producers[name]
            given = [n for n in node.input if n]
            captured = _captured(node)
            self._operands[name] = [*given, *(n for n in captured if n in self.known)]
        return self._operands[name]

    def kind(self, name: str) -> Hashable:
        if name not in self.producers:
            return None
        if name not in self._kinds:
            self._kinds[name] = self._kind(name)
        return self._kinds[name]

    def _kind(self, name: str) -> Hashable:
        node, at = self.producers[name]
        domain = ("" if node.domain == "ai.onnx" else node.domain, node.overload)
        said = [a for a in node.attribute if not _is_default(a, node, self.opset)]
        attributes = tuple(sorted(a.SerializeToString(deterministic=True) for a in said))
        absent = tuple(bool(n) for n in node.input)
        if node.op_type in RANDOM or bodies(node):  # only the very same node, by its name, may be the same
            return (domain, node.op_type, attributes, absent, at, len(node.output), tuple(node.output))
        return (domain, node.op_type, attributes, absent, at, len(node.output))

    def is_input(self, name: str) -> bool:
        return name not in self.producers

    def opened(self, name: str) -> Opened | None:
        """A normalization before its scale; a convolution over what it gathers, which may depend on the input size."""
        node = self.producers[name][0] if name in self.producers else None
        is_norm = node is not None and is_standard(node) and node.op_type in NORMS and not any(node.output[1:])
        if node is None or not (is_norm or is_convolution(node)):
            return None
        call = Call(self, node, 0, lambda _: nf.leaf("", ()))
        if not call.is_constant(1) or (call.name(2) is not None and not call.is_constant(2)):
            return None
        if is_norm:
            return self._normalized(name, call)
        weight = call.constant(1)
        attributes = (a.SerializeToString(deterministic=True) for a in node.attribute if a.name != "group")

        def leaf(known_as: str) -> Value:
            inside = weight.shape[0] if node.op_type == "ConvTranspose" else weight.shape[1] * call.integer("group", 1)
            batch, _, *rest = self.leaf(name, known_as).shape
            return nf.leaf(known_as, [batch, Dim(inside * prod(weight.shape[2:])), *rest])

        def finish(gathered: Value) -> Value:
            return self._with_doubts(node, weighted(call, gathered))

        kind = ("gathered", node.op_type, weight.shape[2:], tuple(sorted(attributes)))
        return Opened(kind, [node.input[0]], leaf, finish)

    def _normalized(self, name: str, call: Call) -> Opened:
        attributes = tuple(sorted(a.SerializeToString(deterministic=True) for a in call.node.attribute))

        def finish(normal: Value) -> Value:
            return rescaled(call, normal)

        kind = ("normalized", call.node.op_type, attributes)
        return Opened(kind, [call.node.input[0]], lambda known_as: self.leaf(name, known_as), finish)

    def narrowed(self, name: str) -> None:
        if self.shape_of is not None:
            self.shape_of.pop(name, None)

    def separate(self, name: str) -> Separate | None:
        node = self.producers[name][0]
        if not is_standard(node) or any(node.output[1:]) or not _has_schema(node, self.opset):
            return None
        if node.op_type in ELEMENTWISE:
            kinds = node.op_type == "Mul", node.op_type in HOMOGENEOUS
            return Separate(lambda axis: axis, lambda known: self._computed_alone(node, known), *kinds)
        return Separate(lambda axis: axis, None) if keeps_numbers(node, self.constant) else None

    def _computed_alone(self, node: NodeProto, known: Mapping[str, Array]) -> Array:
        """What an elementwise operator makes of numbers, one for each channel; NaN where another operand varies."""
        count = len(next(iter(known.values())))
        dtype = self.dtype(node.output[0]) or np.dtype(np.float32)
        feeds = {name: row.astype(dtype) for name, row in known.items()}
        feeds |= {n: a.reshape(-1) for n in node.input if n and (a := self.constant(n)) is not None}
        if not feeds.keys() >= {n for n in node.input if n}:
            return np.full(count, np.nan)
        return run_alone([node], feeds, [node.output[0]], self.model)[0].astype(np.float64)

    def sizes_told(self, name: str) -> Sizes | None:
        if name not in self._sizes:
            self._sizes[name] = self.told(name, self.known_as)
        return self._sizes[name]

    def known_as(self, name: str) -> Sequence[Dim] | None:
        """The shape of a tensor, with unknown sizes as the original has them."""
        shape = self.shapes.shape(name) if self.shape_of is None else self.shape_of.get(name)
        named = (tuple(s if s in self.symbols else self._own(s, "original") for s in e.symbols) for e in shape or ())
        return None if shape is None else [Dim(e.factor, n) for e, n in zip(shape, named, strict=True)]

    def told(self, name: str, shape_of: Callable[[str], Sequence[Dim] | None], steps: int = MOST_STEPS) -> Sizes | None:
        """The whole numbers that ``name`` holds, if they are sizes of tensors, given the shapes of these."""
        if name in self.constants:
            array = self.constant(name)
            return None if array is None else Sizes.of(array)
        node = self.producers[name][0] if name in self.producers else None
        if node is None or not is_standard(node) or not all(node.input) or not steps:
            return None
        given = [self.told(n, shape_of, steps - 1) for n in node.input] if node.op_type in SIZES else []
        shape = self.shapes.shape(name)
        made = sizes_made(node, shape_of, None if shape is None else len(shape), given)
        return made if made is None or self.doubted.isdisjoint(made.symbols) else None

    def bound(self, name: str) -> Bound:
        node, at = self.producers[name]
        first = not at or node.op_type == "Split"
        if not first or not is_standard(node) or not _has_schema(node, self.opset) or self.dtype(name) is None:
            return Bound()
        return bound(Call(self, node, at, lambda _: nf.leaf("", ())))

    def unread(self, met: Collection[str]) -> Sequence[str]:
        met = set(met)
        return [name for name in self.order if met.isdisjoint(self.producers[name][0].output)]

    def mixes(self, name: str) -> bool:
        return name in self.producers and self.producers[name][0].op_type in MIXING

    def leaf(self, name: str, known_as: str) -> Value:
        shape = self.shapes.shape(name)
        if shape is None:
            raise Unrepresentable(f"the rank of {name!r} is unknown")
        return nf.leaf(known_as, [Dim(e.factor, self._named(e.symbols)) for e in shape])

    def _named(self, symbols: Sequence[str]) -> tuple[str, ...]:
        return tuple(sorted(s if s in self.symbols else self._own(s) for s in symbols))

    def _own(self, symbol: str, which: str = "") -> str:
        """What a symbol that shape inference made up in one of the two graphs goes by."""
        return unnamed(f"{which or self.which} {symbol}", self.symbols)

    def value(self, name: str, of: Callable[[str], Value]) -> Value:
        node, at = self.producers[name]
        reader = READERS.get(node.op_type) if node.domain in ("", "ai.onnx") or is_convolution(node) else None
        if reader is None or self.dtype(name) is None or self.opset < OLDEST:
            raise Unrepresentable(f"{node.op_type} is not affine")
        if node.domain in ("", "ai.onnx") and not _has_schema(node, self.opset):
            raise Unrepresentable(f"{node.op_type} has attributes or operands that the standard does not know")
        return self._with_doubts(node, reader(self._call(node, at, of)))

    def _call(self, node: NodeProto, at: int, of: Callable[[str], Value]) -> Call:
        return Call(self, node, at, of)

    def form(self, name: str) -> Form | None:
        node, dtype = self.producers[name][0], self.dtype(name)
        if node.op_type not in BESIDE or not is_standard(node) or dtype is None:
            return None
        stored = [self.stored.tensors.get(n) for n in node.input if n in self.constants]
        shapes = tuple(tuple(t.dims[:]) for t in stored if t is not None and FLOATS.get(t.data_type) == dtype)
        return Form(self.kind(name), dtype, shapes) if len(shapes) == len(stored) else None

    def beside(self, members: Sequence[Mapping[str, str]]) -> _Beside:
        return _Beside(self, members)

    def _with_doubts(self, node: NodeProto, value: Value) -> Value:
        """``value``, the result of ``node``, unsure by the rounding of what its weight is multiplied from."""
        if node.op_type in MIXING and any(self._is_dequantized(n) for n in node.input):
            return nf.computed(value, value)
        return value

    def _is_dequantized(self, name: str) -> bool:
        """Whether ``name`` is a constant that an operator multiplies by its scale, and rounds, when the model runs."""
        made = self.producers.get(name)
        return made is not None and made[0].op_type == "DequantizeLinear" and name in self.constants

    def precision(self, name: str) -> Precision:
        dtype = self.dtype(name)
        return PRECISIONS["float32" if dtype is None else dtype.name]


BESIDE = {"Add": None, "BatchNormalization": 0, "Conv": 0, "Div": None, "Mul": None, "Sub": None}
"""Operators that can be put side by side, each with its channels along axis 1, and the axis of channels in their
parameters; None where these lie as their operand does."""


class _Beside(_Side):
    """See `sides.Side.beside`."""

    def __init__(self, side: _Side, members: Sequence[Mapping[str, str]]) -> None:
        vars(self).update(vars(side))
        self.members = members

    def leaf(self, name: str, known_as: str) -> Value:
        shape = list(super().leaf(name, known_as).shape)
        if len(shape) < 2 or shape[1].known is None:
            raise Unrepresentable("the number of channels is unknown")
        shape[1] = Dim(shape[1].factor * len(self.members))
        return nf.leaf(known_as, shape)

    def opened(self, name: str) -> Opened | None:
        raise Unrepresentable("an operator that cannot be put beside others")

    def _call(self, node: NodeProto, at: int, of: Callable[[str], Value]) -> Call:
        if node.output[at] not in self.members[0]:
            raise Unrepresentable("what is before the window need not be of one form")
        return _CallBeside(self, node, at, of)


class _CallBeside(Call):
    """Nodes of one form as one, with the channels of all."""

    side: _Beside

    def integer(self, key: str, default: int = 0) -> int:
        return super().integer(key, default) * (len(self.side.members) if key == "group" else 1)

    def constant(self, position: int) -> Array:
        made = self.node.output[self.at]
        nodes = [self.side.producers[of[made]][0] for of in self.side.members]
        found = [a for n in nodes if (a := self.side.constant(n.input[position])) is not None]
        axis = BESIDE[self.node.op_type]
        if axis is None:
            x = self.value(1 - position)
            axis = 1 - (x.rank - found[0].ndim)
            if axis < 0 or Dim(found[0].shape[axis] * len(nodes)) != x.shape[1]:
                raise Unrepresentable("a parameter that is not one for each channel")
        return np.concatenate(found, axis)


@cache
def _schema(op_type: str, opset: int) -> tuple[int, int, Mapping[str, AttributeProto]] | None:
    """The least and most operands of an operator of the standard, and the defaults of its attributes."""
    try:
        schema = onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        return None
    return schema.min_input, schema.max_input, {n: a.default_value for n, a in schema.attributes.items()}


def _has_schema(node: NodeProto, opset: int) -> bool:
    """Whether the standard knows all attributes of an operator, and so many operands."""
    found = _schema(node.op_type, opset)
    if found is None:
        return False
    least, most, defaults = found
    return all(a.name in defaults for a in node.attribute) and least <= len(node.input) <= most


WINDOW = {"pads": 0, "strides": 1, "dilations": 1}
"""What a kernel has along each axis where nothing is said of it; the schema leaves it to the text."""


def _is_default(said: AttributeProto, node: NodeProto, opset: int) -> bool:
    """Whether an operator of the standard is the same one without this attribute."""
    if not is_standard(node) or not _has_schema(node, opset):
        return False
    if said.name in WINDOW and said.type == AttributeProto.INTS:
        return set(said.ints) == {WINDOW[said.name]} and not any(a.name == "auto_pad" for a in node.attribute)
    _, _, defaults = _schema(node.op_type, opset) or (0, 0, {})
    default = defaults[said.name]
    return default.type == said.type and helper.get_attribute_value(default) == helper.get_attribute_value(said)


def _captured(node: NodeProto) -> list[str]:
    """All names that the bodies of ``node`` read, their own among them."""
    found: list[str] = []
    stack = bodies(node)
    while stack:
        graph = stack.pop()
        found += [o.name for o in graph.output]
        for inner in graph.node:
            found += inner.input
            stack += bodies(inner)
    return list(dict.fromkeys(found))
