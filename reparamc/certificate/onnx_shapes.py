"""Types and shapes of the tensors of a main graph, as ONNX's own shape inference has them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple, cast

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto, helper, numpy_helper

from reparamc.certificate.axes import Dim
from reparamc.certificate.normal_form import Array
from reparamc.certificate.onnx_bounds import FAILURES, LAST, hide_doubtful, may_propagate, stand_in, unnamed

WEIGHT = 1024
"""A stored tensor of more elements is a weight: shape inference gets its type alone."""

FLOATS: dict[int, np.dtype] = {
    kind: np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    for kind in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
}


def attribute(node: NodeProto, name: str, default: object = None) -> object:
    """The value of an attribute, or ``default`` where it is absent."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def is_plain_fused(node: NodeProto) -> bool:
    """Whether ``node`` is ONNX Runtime's own convolution, with nothing fused into it."""
    fused = node.domain == "com.microsoft" and node.op_type == "FusedConv"
    return fused and not attribute(node, "activation") and not any(n for n in node.input[3:])


class Typed(NamedTuple):
    """A floating tensor whose sizes are all known."""

    dtype: np.dtype
    dims: tuple[int, ...]


def outline(model: ModelProto, stored: Mapping[str, Array], typed: Mapping[str, Typed]) -> ModelProto:
    """``model`` for shape inference, without large weights: ``stored`` and ``typed`` tensors need not be computed."""
    found = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph = found.graph
    graph.name = "outline"
    known = stored.keys() | typed.keys()
    graph.node.extend(n for n in model.graph.node if not known or _is_wanted(n, stored, known))
    for node in graph.node:
        if node.domain == "ai.onnx":  # inference knows this domain by its other name only
            node.domain = ""
        elif is_plain_fused(node):
            node.domain, node.op_type = "", "Conv"
        stand_in(node)
    graph.input.extend(model.graph.input)
    graph.output.extend(o for o in model.graph.output if o.name not in known)
    named = {d.dim_param for v in graph.input for d in v.type.tensor_type.shape.dim}
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            # Some exporters write an open size so; and what an output calls a size may be another one elsewhere.
            if dim.dim_value < 0 or (dim.dim_param and dim.dim_param not in named):
                dim.Clear()
    for sparse in model.graph.sparse_initializer:  # inference takes it for the vector of its values
        graph.input.append(helper.make_tensor_value_info(sparse.values.name, sparse.values.data_type, sparse.dims))
    given = {v.name for v in model.graph.input}
    defaults = given if model.ir_version >= 4 else set[str]()  # inference takes them for what no caller can override
    for tensor in model.graph.initializer:
        if tensor.name in defaults:
            continue
        if prod(tensor.dims) <= WEIGHT and tensor.data_location != TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
        elif tensor.name not in given:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in stored.items())
    for name, (dtype, dims) in typed.items():
        graph.input.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), dims))
    hide_doubtful(found)
    return found


def _is_wanted(node: NodeProto, stored: Mapping[str, Array], known: set[str]) -> bool:
    """Whether a result of ``node`` is to be inferred: none is stored, and not all are known."""
    names = {name for name in node.output if name}
    return names.isdisjoint(stored) and not (names and names <= known)


def _inferred(light: ModelProto) -> tuple[ModelProto, bool]:
    """``light`` with what inference tells, and whether it has no objection; as it is where it finds a contradiction."""
    for options in ({"strict_mode": True, "data_prop": may_propagate(light)}, {}):
        try:
            return onnx.shape_inference.infer_shapes(light, **options), bool(options)
        except FAILURES:
            continue
    return light, False


def _has_rest(tensor: TensorProto) -> bool:
    """Whether a shape has an entry of -1, which a reshape takes for the rest."""
    small = tensor.data_type == TensorProto.INT64 and prod(tensor.dims) <= WEIGHT and not tensor.external_data
    return small and -1 in numpy_helper.to_array(tensor)


def _tell_ranks(light: ModelProto) -> bool:
    """Note the ranks that only the weights of convolutions tell; whether there is any."""
    graph = light.graph
    convolutions = [
        n for n in graph.node if n.op_type in ("Conv", "ConvTranspose") and not n.domain and len(n.input) > 1
    ]
    wanted = {name for node in convolutions for name in (*node.input[:2], node.output[0])}
    values = (*graph.value_info, *graph.output, *graph.input)
    ranked = {v.name for v in values if v.type.tensor_type.HasField("shape")}
    if wanted <= ranked | {t.name for t in graph.initializer}:
        return False
    shaped = {
        v.name: (v.type.tensor_type.elem_type, [d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in values
        if v.name in wanted and v.name in ranked
    } | {t.name: (t.data_type, list(t.dims)) for t in graph.initializer if t.name in wanted}
    told: dict[str, ValueInfoProto] = {}
    for node in convolutions:
        kind, weight = shaped.get(node.input[1], (0, []))
        if len(weight) >= 3:
            inside = (
                weight[0] if node.op_type == "ConvTranspose" else weight[1] * cast(int, attribute(node, "group", 1))
            )
            for name, channels in ((node.input[0], inside), (node.output[0], None)):
                if name not in shaped:
                    dims = [None, channels or None, *[None] * (len(weight) - 2)]
                    told[name] = helper.make_tensor_value_info(name, kind, dims)
    if not told:
        return False
    kept = [v for v in graph.value_info if v.name not in told]
    del graph.value_info[:]
    graph.value_info.extend([*kept, *told.values()])
    return True


def constant(node: NodeProto) -> TensorProto | None:
    """What a Constant holds; None for strings and sparse tensors."""
    for a in node.attribute:
        if a.name == "value":
            return a.t
        if a.name in _NUMBERS:
            return numpy_helper.from_array(np.array(helper.get_attribute_value(a), _NUMBERS[a.name]))
    return None


_NUMBERS = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}


def may_be_copied(told: Dim, own: Dim | None) -> bool:
    """Whether a reshape to the size ``told`` takes ``own`` instead, the size of its operand there, if that is zero."""
    return bool(told.symbols) and (own is None or not set(told.symbols) <= set(own.symbols))


def _copied(node: NodeProto, before: Sequence[Dim] | None, told: Sequence[Dim]) -> list[Dim]:
    """Those of the sizes ``told`` to a reshape for which it takes others, of its operand, if they are zero."""
    if node.op_type != "Reshape" or attribute(node, "allowzero", 0):
        return []
    if before is None:
        return [e for e in told if e.symbols]
    return [e for own, e in zip(before, told, strict=False) if may_be_copied(e, own)]  # behind these, it refuses zero


def _is_made_up(size: Dim, given: Collection[str]) -> bool:
    """Whether ``size`` is a symbol of inference, and none of those ``given``."""
    return size.factor == 1 and len(size.symbols) == 1 and size.symbols[0] not in given


TOLD = {"Reshape": 1, "ConstantOfShape": 0}
"""Operators that are given the sizes of their result, and by which operand."""

WINDOWS = {"AveragePool", "Conv", "LpPool", "MaxPool"}

MADE = {"Expand", "Range", "Slice", "Tile"}
"""Operators that are given numbers from which sizes follow, in another way."""

BROADCAST = {"Add", "Div", "Max", "Mean", "Min", "Mod", "Mul", "Pow", "Sub", "Sum", "Where"}
"""Operators whose operands are stretched to one shape."""


def _sum(dims: Iterable[Dim]) -> Dim | None:
    known = [e.known for e in dims]
    return None if None in known else Dim(sum(e for e in known if e is not None))


def is_standard(node: NodeProto) -> bool:
    return node.domain in ("", "ai.onnx")


def bounds(shape: NodeProto) -> slice:
    """The axes that a Shape reads."""
    return slice(cast(int, attribute(shape, "start", 0)), cast("int | None", attribute(shape, "end")))


class Sizes(NamedTuple):
    """A whole number (rank 0) or several in a row (rank 1), each a size or a product of such."""

    rank: int
    sizes: tuple[Dim, ...]
    are_truths: bool = False
    """Whether one and zero stand for true and false."""

    @property
    def symbols(self) -> set[str]:
        return {s for e in self.sizes for s in e.symbols}

    @classmethod
    def of(cls, array: Array) -> Sizes | None:
        """The sizes that a constant holds; None where it is no shape."""
        if array.dtype != np.int64 or array.ndim > 1 or array.size > MOST_SIZES:
            return None
        return cls(array.ndim, tuple(map(Dim, array.reshape(-1).tolist())))


MOST_SIZES = 16
"""A constant of more elements is no shape."""


def _gathered(node: NodeProto, given: Sequence[Sizes]) -> tuple[Dim, ...] | None:
    sizes, places = given[0].sizes, [e.known for e in given[1].sizes]
    picked = [sizes[i] for i in places if i is not None and -len(sizes) <= i < len(sizes)]
    return tuple(picked) if given[0].rank == 1 and len(picked) == len(places) else None


def _sliced(node: NodeProto, given: Sequence[Sizes]) -> tuple[Dim, ...] | None:
    numbers = [e.known for part in given[1:] for e in part.sizes]
    if not 2 <= len(numbers) == len(given) - 1 or None in numbers:
        return None
    start, end, axis, step = [*numbers, *(0, 1)[len(numbers) - 2 :]]
    return given[0].sizes[start:end] if axis in (0, -1) and step == 1 else None


def _multiplied(node: NodeProto, given: Sequence[Sizes]) -> tuple[Dim, ...] | None:
    """Sizes times others, or divided without a rest; negative numbers are no sizes."""
    found = [_product(node, first, second) for first, second in _side_by_side(given)]
    return None if None in found or not found else tuple(e for e in found if e is not None)


def _product(node: NodeProto, first: Dim, second: Dim) -> Dim | None:
    if first.known is not None and second.known is not None and node.op_type == "Mul":
        return Dim(first.factor * second.factor) if abs(first.factor * second.factor) < LAST else None
    if min(first.factor, second.factor) < 0:
        return None
    found = first.times(second) if node.op_type == "Mul" else first.over(second)
    return None if node.op_type == "Div" and second.symbols else found  # which may be zero


def _side_by_side(given: Sequence[Sizes]) -> list[tuple[Dim, ...]]:
    """The entries of vectors that an operator takes together, of one length but for single numbers; else nothing."""
    length = max(len(part.sizes) for part in given)
    wide = [part.sizes * (length if len(part.sizes) == 1 else 1) for part in given]
    return [*zip(*wide, strict=True)] if all(len(part) == length for part in wide) else []


def _compared(node: NodeProto, given: Sequence[Sizes]) -> tuple[Dim, ...] | None:
    """Whether sizes are equal: one and zero where that is known for all of them. No size is negative."""
    pairs = _side_by_side(given)
    for a, b in pairs:
        is_apart = min(a.factor, b.factor) < 0 <= max(a.factor, b.factor)
        if a != b and not is_apart and (a.symbols or b.symbols):
            return None
    return tuple(Dim(int(a == b)) for a, b in pairs) or None


def _chosen(node: NodeProto, given: Sequence[Sizes]) -> tuple[Dim, ...] | None:
    rows = _side_by_side(given)
    return tuple(a if here == Dim() else b for here, a, b in rows) or None


def _filled(node: NodeProto, given: Sequence[Sizes]) -> tuple[Dim, ...] | None:
    """A vector of one number."""
    value = cast("TensorProto | None", attribute(node, "value"))
    length = given[0].sizes[0].known if len(given[0].sizes) == 1 else None
    if value is None or value.data_type != TensorProto.INT64 or length is None or not 0 <= length <= MOST_SIZES:
        return None
    return (Dim(int(numpy_helper.to_array(value).reshape(-1)[0])),) * length


def _same(node: NodeProto, given: Sequence[Sizes]) -> tuple[Dim, ...] | None:
    return given[0].sizes if attribute(node, "to", TensorProto.INT64) == TensorProto.INT64 else None


SIZES: Mapping[str, Callable[[NodeProto, Sequence[Sizes]], tuple[Dim, ...] | None]] = {
    "Concat": lambda node, given: sum((part.sizes for part in given), ()),
    "Gather": _gathered,
    "Slice": _sliced,
    "Mul": _multiplied,
    "Div": _multiplied,
    "Equal": _compared,
    "Where": _chosen,
    "ConstantOfShape": _filled,
    **dict.fromkeys(("Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze"), _same),
}
"""Operators on sizes in a row. Axes decide nothing, for there is one. Only Where reads truths."""


def sizes_made(
    node: NodeProto, shape_of: Callable[[str], Sequence[Dim] | None], rank: int | None, given: Sequence[Sizes | None]
) -> Sizes | None:
    """The sizes that the result of ``node`` holds, given those that its operands hold, if they do.

    Args:
        shape_of: gives the shape of a tensor, which a Shape reads.
        rank: that of the result, if it is known.
    """
    if node.op_type == "Shape":
        shape = shape_of(node.input[0])
        return None if shape is None else Sizes(1, tuple(shape[bounds(node)]))
    known = [e for e in given if e is not None]
    if node.op_type not in SIZES or rank is None or rank > 1 or len(known) < len(given):
        return None
    if [e.are_truths for e in known] != [node.op_type == "Where", *[False] * len(known)][: len(known)]:
        return None
    sizes = SIZES[node.op_type](node, known)
    return None if sizes is None else Sizes(rank, sizes, node.op_type == "Equal")


class Shapes:
    """What is inferred of every tensor of a main graph.

    Args:
        declared: types to believe where inference says nothing.
        stored: the values of some constants that operators compute.
        typed: tensors that are known from elsewhere.
    """

    def __init__(
        self,
        model: ModelProto,
        declared: Sequence[ValueInfoProto] = (),
        stored: Mapping[str, Array] | None = None,
        typed: Mapping[str, Typed] | None = None,
    ) -> None:
        light = outline(model, stored or {}, typed or {})
        light, self.is_strict = _inferred(light)
        """Also, whether inference has no objection."""
        if _tell_ranks(light):
            light, self.is_strict = _inferred(light)
        self._types: dict[str, TypeProto.Tensor] = {}
        # Names that inference makes up, too, are not believed.
        declared = [
            v for v in declared if not any(d.dim_param.startswith("unk__") for d in v.type.tensor_type.shape.dim)
        ]
        for values in (declared, light.graph.value_info, light.graph.output, light.graph.input):
            self._types.update((v.name, v.type.tensor_type) for v in values if v.type.HasField("tensor_type"))
        kept = [*model.graph.initializer, *(t for t in light.graph.initializer if t.name in (stored or {}))]
        self._stored = {t.name: (t.data_type, tuple(map(Dim, t.dims))) for t in kept}
        self._shapes: dict[str, tuple[Dim, ...] | None] = {}
        self._meaning: dict[str, Dim] = {}
        """What a symbol that inference made up is, where that is known."""
        self._named = {d.dim_param for v in model.graph.input for d in v.type.tensor_type.shape.dim}
        given = {*self._named}
        constants = [n for n in light.graph.node if n.op_type == "Constant" and not n.domain]
        made = {n.output[0]: t for n in constants if (t := constant(n)) is not None}
        stored_ = {t.name: t for t in light.graph.initializer}
        rests = {name for name, t in (made | stored_).items() if _has_rest(t)}
        open_ = {v.name for v in model.graph.input}
        self._parts = made | {name: t for name, t in stored_.items() if name not in open_}
        self._vectors: dict[str, Sizes] = {}
        self._cut: dict[Dim, Dim] = {}
        """The sizes of slices that end at a size, or at the end of what is not empty: that size.

        What is stretched together with such a slice to the size where it ends has that size, or does not run."""
        self.doubted: set[str] = set()
        """Unknown sizes that inference believes of a reshape that copies another one where they are zero."""
        opened = {name for name, kind in self._types.items() if any(d.dim_value < 1 for d in kind.shape.dim[:])}
        fresh: set[str] = set()
        for node in light.graph.node:  # operands come first
            given |= fresh  # what a symbol is follows from the operator that it comes from
            fresh = self._symbols(opened.intersection(node.output))
            if node.domain:
                continue
            self._measure(node)
            if node.op_type in TOLD:
                self._explain_told(node, given)
            if node.op_type in ("Concat", "Identity", "Unsqueeze") and not rests.isdisjoint(node.input):
                rests.add(node.output[0])
            if opened.isdisjoint(node.output):
                continue
            if node.op_type == "Split":
                self._explain_parts(node, given)
            if node.op_type in BROADCAST or node.op_type in ("Concat", "MatMul"):
                self._explain_sizes(node, given)
            if node.op_type in MADE:
                self._explain_made(node, given)
            if node.op_type in WINDOWS:
                self._explain_window(node, given)
            if node.op_type in ("Flatten", "Reshape"):
                is_rest = node.op_type == "Flatten" or not rests.isdisjoint(node.input[1:])
                self._explain(node, given, is_rest)

    def dtype(self, name: str) -> np.dtype | None:
        """The dtype of a floating tensor; None for other types and where it is unknown."""
        if name in self._stored:
            return FLOATS.get(self._stored[name][0])
        return FLOATS.get(self._types[name].elem_type) if name in self._types else None

    def shape(self, name: str) -> tuple[Dim, ...] | None:
        """The shape of ``name``, unknown sizes as symbols; None where the rank is unknown."""
        if name not in self._shapes:
            self._shapes[name] = self._read(name)
        return self._shapes[name]

    def known_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of ``name`` if every size is known."""
        shape = self.shape(name)
        return None if shape is None or any(e.symbols for e in shape) else tuple(e.factor for e in shape)

    def is_inferred(self, name: str, given: Collection[str]) -> bool:
        """Whether inference alone knows all sizes of ``name``, as numbers or as symbols ``given``."""
        if name in self._stored:
            return True
        if name not in self._types or not self._types[name].HasField("shape"):
            return False
        return all(d.HasField("dim_value") or d.dim_param in given for d in self._types[name].shape.dim)

    def _read(self, name: str) -> tuple[Dim, ...] | None:
        if name in self._stored:
            return self._stored[name][1]
        if name not in self._types or not self._types[name].HasField("shape"):
            return None
        return tuple(
            Dim(d.dim_value)
            if d.HasField("dim_value") and d.dim_value >= 0
            else self._open(d.dim_param or unnamed(f"{name}[{axis}]", self._named))
            for axis, d in enumerate(self._types[name].shape.dim)
        )

    def _open(self, symbol: str) -> Dim:
        return self._meaning.get(symbol, Dim(1, (symbol,)))

    def _symbols(self, names: Iterable[str]) -> set[str]:
        kinds = (self._types[name] for name in names if name in self._types)
        return {d.dim_param for kind in kinds for d in kind.shape.dim if d.dim_param}

    def _measure(self, node: NodeProto) -> None:
        """Enter what sizes a node gives, if it gives such."""
        if node.op_type == "Shape" or node.op_type in SIZES:
            shape = self._read(node.output[0])
            given = [self._vectors.get(n) or self._stored_sizes(n) for n in node.input]
            made = sizes_made(node, self._read, None if shape is None else len(shape), given)
            if made is not None and self.doubted.isdisjoint(made.symbols):
                self._vectors[node.output[0]] = made

    def _stored_sizes(self, name: str) -> Sizes | None:
        tensor = self._parts.get(name)
        if tensor is None or tensor.data_type != TensorProto.INT64 or prod(tensor.dims) > MOST_SIZES:
            return None
        if (found := Sizes.of(numpy_helper.to_array(tensor))) is not None:
            self._vectors[name] = found
        return found

    def _explain_told(self, node: NodeProto, given: set[str]) -> None:
        """Learn sizes of a result from those that it is given as numbers; doubt what may be copied in their place."""
        at = TOLD[node.op_type]
        told = self._vectors.get(node.input[at]) if at < len(node.input) else None
        before, after = self._read(node.input[0]), self._read(node.output[0])
        if after is None or (told is not None and len(after) != len(told.sizes)):
            return
        sizes = after if told is None else told.sizes
        doubtful = _copied(node, before, sizes)
        self.doubted.update(s for e in doubtful for s in e.symbols)
        for made_up, size in zip(after, sizes, strict=True):
            if size not in doubtful and _is_made_up(made_up, given) and size.factor > 0 and size != made_up:
                self._meaning[made_up.symbols[0]] = size

    def _explain_sizes(self, node: NodeProto, given: set[str]) -> None:
        """Learn sizes of a result that inference made up before those of the operands were explained."""
        after = self._read(node.output[0])
        if after is None or all(s in given or s in self._meaning for e in after for s in e.symbols):
            return
        shapes = [self._read(name) for name in node.input]
        operands = [shape for shape in shapes if shape is not None]
        if len(operands) < len(shapes) or (node.op_type == "MatMul" and any(len(shape) < 2 for shape in operands)):
            return  # a vector takes an axis away
        if node.op_type in BROADCAST and any(a.name in ("axis", "broadcast") for a in node.attribute):
            return  # the first operator sets stretch along axes that are named
        joined = cast(int, attribute(node, "axis", 0)) % len(after) if node.op_type == "Concat" and after else -1
        for axis, made_up in enumerate(after):
            if not _is_made_up(made_up, given) or (node.op_type == "MatMul" and axis >= len(after) - 2):
                continue
            at = axis - len(after)
            dims = [shape[at] for shape in operands if len(shape) >= -at]
            if (found := _sum(dims) if axis == joined else self._broadcast(dims)) not in (None, made_up):
                self._meaning[made_up.symbols[0]] = found

    def _explain_made(self, node: NodeProto, given: set[str]) -> None:
        """Learn sizes of an Expand, a Range, a Slice or a Tile from the numbers that it is given."""
        before, after = self._read(node.input[0]), self._read(node.output[0])
        if before is None or after is None or not any(_is_made_up(e, given) for e in after):
            return
        numbers = [self._vectors.get(n) or self._stored_sizes(n) for n in node.input]
        found: list[Dim | None] = [None] * len(after)
        if node.op_type == "Slice":
            found = self._sliced(before, after, numbers[1:])
        elif node.op_type == "Range" and None not in numbers:
            start, limit, step = (part.sizes for part in numbers if part is not None)
            found = [*limit] if (start, step) == ((Dim(0),), (Dim(),)) and limit[0].factor >= 0 else found
        elif node.op_type == "Tile" and (told := numbers[1]) is not None and len(told.sizes) == len(before):
            found = [e.times(n) if n.factor > 0 else None for e, n in zip(before, told.sizes, strict=True)]
        elif node.op_type == "Expand" and (told := numbers[1]) is not None and len(told.sizes) <= len(after):
            rows = ((Dim(),) * (len(after) - len(row)) + row for row in (before, told.sizes))
            found = [self._broadcast(pair) for pair in zip(*rows, strict=True)]
        for made_up, size in zip(after, found, strict=True):
            if _is_made_up(made_up, given) and size not in (None, made_up):
                self._meaning[made_up.symbols[0]] = size

    def _explain_window(self, node: NodeProto, given: set[str]) -> None:
        """Learn the sizes that a kernel or a pooling leaves as they are, in steps of one."""
        before, after = self._read(node.input[0]), self._read(node.output[0])
        if (
            before is None
            or after is None
            or len(before) != len(after)
            or not any(_is_made_up(e, given) for e in after)
        ):
            return
        weight = self.shape(node.input[1]) if node.op_type == "Conv" and len(node.input) > 1 else None
        dims = [e.known for e in weight[2:]] if weight is not None else []
        kernel, n = cast("Sequence[int | None]", attribute(node, "kernel_shape", dims)), len(before) - 2
        ones, pads = [1] * n, cast("Sequence[int]", attribute(node, "pads", [0] * 2 * n))
        steps, spread = (cast("Sequence[int]", attribute(node, key, ones)) for key in ("strides", "dilations"))
        is_same = attribute(node, "auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER")
        if not len(kernel) == len(steps) == len(spread) == n or len(pads) != 2 * n:
            return
        for i, k in enumerate(kernel):
            keeps = is_same or (k is not None and pads[i] + pads[i + n] == spread[i] * (k - 1))
            if keeps and steps[i] == 1 and _is_made_up(after[2 + i], given) and after[2 + i] != before[2 + i]:
                self._meaning[after[2 + i].symbols[0]] = before[2 + i]

    def _sliced(self, before: Sequence[Dim], after: Sequence[Dim], numbers: Sequence[Sizes | None]) -> list[Dim | None]:
        """The sizes of a slice, as far as it starts at the start and leaves nothing out; others are noted in `_cut`."""
        known = [part.sizes for part in numbers if part is not None]
        if len(known) < max(len(numbers), 3) or not all(
            a.known is not None and -len(after) <= a.factor < len(after) for a in known[2]
        ):
            return [None] * len(after)
        starts, ends, axes, steps = *known, *[(Dim(),) * len(known[0])][: 4 - len(known)]
        if len({len(starts), len(ends), len(axes), len(steps)}) > 1:
            return [None] * len(after)
        found: list[Dim | None] = [*before]
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            at, width = axis.factor, before[axis.factor]
            is_first = start == Dim(0) and step == Dim()
            if is_first and end.symbols and end.factor > 0 and width.known and not after[at].known:
                self._cut[after[at]] = end
            if not is_first or (end != width and end.factor < LAST):
                found[at] = None
        return found

    def _broadcast(self, dims: Iterable[Dim]) -> Dim | None:
        """The size that operands of the sizes ``dims`` are stretched to; None where that is unknown."""
        wide = {e for e in dims if e != Dim()}
        wide = {e for e in wide if self._cut.get(e) not in wide}
        found = {e for e in wide if e.known is not None} or wide or {Dim()}
        return found.pop() if len(found) == 1 and min(found).factor >= 0 else None

    def _explain_parts(self, node: NodeProto, given: set[str]) -> None:
        """Learn the sizes that a Split cuts; inference tells them only where it knows their sum."""
        parts = cast("Sequence[int] | None", attribute(node, "split"))
        if len(node.input) > 1 and (tensor := self._parts.get(node.input[1])) is not None:
            parts = numpy_helper.to_array(tensor).reshape(-1).tolist()
        axis = cast(int, attribute(node, "axis", 0))
        for name, size in zip(node.output, parts or (), strict=False):
            shape = self._read(name)
            if shape and _is_made_up(shape[axis], given) and size >= 0:
                self._meaning[shape[axis].symbols[0]] = Dim(size)

    def _explain(self, node: NodeProto, given: set[str], is_rest: bool) -> None:
        """Learn the one size of a reshape that inference made up: what is left of the elements.

        Empty tensors tell nothing of it, unless the runtime takes it for the rest, too (``is_rest``): it refuses them.
        """
        before, after = self._read(node.input[0]), self._read(node.output[0])
        if before is None or after is None:
            return
        known = {s for e in before for s in e.symbols}
        new = [e for e in after if _is_made_up(e, given) and known.isdisjoint(e.symbols)]
        new = [e for e in new if e.symbols[0] not in self._meaning]
        if len(new) != 1 or any(e != new[0] for e in _copied(node, before, after)):
            return
        elements, others = Dim(), Dim()
        for e in before:
            elements = elements.times(e)
        for e in after:
            others = others if e == new[0] else others.times(e)
        if (rest := elements.over(others)) is not None and (is_rest or not others.symbols):
            self._meaning[new[0].symbols[0]] = rest
