"""What is known about the values of an ONNX graph: constants, types, shapes, users."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import suppress
from copy import copy
from functools import lru_cache
from itertools import chain
from math import prod
from typing import Any, cast

import numpy as np
import onnx
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    TensorShapeProto,
    TypeProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from reparamc.algebra.records import lazy, record, replace
from reparamc.algebra.shape import Dim, Shape, size
from reparamc.certificate.onnx_bounds import FAILURES, bodies, hide_doubtful, may_propagate, stand_in, unnamed
from reparamc.errors import InputError
from reparamc.onnx.weights import LARGE, array, is_reference

SMALL = 1024
"""Constants of up to this many elements take part in shape inference; larger ones are weights."""

FLOATS: dict[int, np.dtype] = {
    kind: np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    for kind in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
}


def attribute(node: NodeProto, name: str, default: object = None) -> object:
    """The value of an attribute, or ``default`` where it is absent.

    Here and in what else runs for each node, a field is copied by ``[:]``, which takes half as long as to iterate over
    it: protobuf ends that with an error each time.
    """
    for a in node.attribute[:]:
        if a.name == name:
            return helper.get_attribute_value(a)
    return default


def is_standard(node: NodeProto) -> bool:
    return node.domain in ("", "ai.onnx")


def operand(node: NodeProto, position: int) -> str | None:
    """The name of the operand at ``position``; None when it is absent or empty."""
    names = node.input
    return names[position] or None if position < len(names) else None


def is_placed(node: NodeProto) -> bool:
    """Whether ``node`` says on which devices it runs, and how its tensors are spread over them."""
    return bool(getattr(node, "device_configurations", ()))


def is_fused_conv(node: NodeProto) -> bool:
    """Whether ``node`` is a convolution under the name that ONNX Runtime gives it, with nothing fused into it."""
    if node.domain != "com.microsoft" or node.op_type != "FusedConv":
        return False
    return not attribute(node, "activation") and operand(node, 3) is None


def opset_of(model: ModelProto) -> int:
    """The version of the standard operators that ``model`` imports; 1 where it imports none."""
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)


def itemsize(element_type: int | None) -> int:
    """Bytes of one entry of a tensor; 8 where that is unknown or varies."""
    return helper.tensor_dtype_to_np_dtype(element_type).itemsize if element_type else 8


def known_size(dim: TensorShapeProto.Dimension) -> int | None:
    """A declared size; None where it is open. Some exporters write an open one as -1."""
    return dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None


def forget_negative_sizes(values: Iterable[ValueInfoProto]) -> None:
    """Have sizes below zero declared as open, as they are meant."""
    for value in values:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value < 0:
                dim.Clear()


def captured(node: NodeProto) -> list[str]:
    """Names that the bodies of ``node`` read from outside, at any depth."""
    if not (graphs := bodies(node)):
        return []  # as most have none
    stack = [(graph, frozenset[str]()) for graph in graphs]
    found: dict[str, None] = {}
    while stack:
        graph, outside = stack.pop()
        own = outside.union(defined(graph))
        for inner in graph.node:
            found.update(dict.fromkeys(name for name in inner.input[:] if name and name not in own))
            stack.extend((body, own) for body in bodies(inner))
        found.update(dict.fromkeys(o.name for o in graph.output if o.name not in own))
    return list(found)


def defined(graph: GraphProto) -> list[str]:
    """The values that ``graph`` itself is given, stores or computes."""
    given = [*(v.name for v in graph.input), *(t.name for t in graph.initializer)]
    given += [t.values.name for t in graph.sparse_initializer]
    return list(dict.fromkeys([*given, *(name for node in graph.node for name in node.output[:] if name)]))


def defined_names(graph: GraphProto) -> Iterator[str]:
    """Every tensor and node name in ``graph`` and its bodies."""
    stack = [graph]
    while stack:
        g = stack.pop()
        yield from (v.name for group in (g.input, g.output, g.value_info) for v in group)
        yield from (t.name for t in g.initializer)
        yield from (t.values.name for t in g.sparse_initializer)
        for node in g.node:
            yield node.name
            yield from node.input[:]
            yield from node.output[:]
            stack.extend(bodies(node))


@record
class Constant:
    """A tensor that no input reaches; ``load`` reads its value. ``stored``: as it lies in the file."""

    element_type: int
    dims: tuple[int, ...]
    load: Callable[[], np.ndarray]
    stored: bool = False

    @staticmethod
    def of(tensor: TensorProto) -> Constant:
        return Constant(tensor.data_type, tuple(tensor.dims[:]), lambda: array(tensor), stored=True)

    @staticmethod
    def sparse(tensor: SparseTensorProto) -> Constant:
        return Constant(tensor.values.data_type, tuple(tensor.dims[:]), lambda: _dense(tensor))


def _dense(tensor: SparseTensorProto) -> np.ndarray:
    values, at = numpy_helper.to_array(tensor.values), numpy_helper.to_array(tensor.indices)
    dense = np.zeros(tensor.dims, values.dtype)
    if at.ndim == 2:
        dense[tuple(at.T)] = values
    else:
        dense.reshape(-1)[at] = values
    return dense


class Constants:
    """What no caller can override in a main graph: initializers and Constant nodes, also after what moves them only.

    Attributes:
        known: each by its name.
        overridable: the initializers that callers may replace.
    """

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        inputs = {v.name for v in graph.input}
        overridable = inputs if model.ir_version >= 4 else set()
        overridable = overridable | trained(model)
        self.overridable = {t.name for t in graph.initializer} & overridable
        self._small: dict[str, np.ndarray] = {}  # that were asked for: they are decoded once
        self.known = {t.name: Constant.of(t) for t in graph.initializer if t.name not in overridable}
        self.known |= {
            t.values.name: Constant.sparse(t) for t in graph.sparse_initializer if prod(t.dims[:]) < MOST_DENSE
        }
        for node in filter(is_standard, graph.node):
            if node.op_type != "Constant":
                self.follow(node)
            elif (found := constant_of(node)) is not None:
                self.known[node.output[0]] = found

    def __contains__(self, name: str) -> bool:
        return name in self.known

    def copied(self) -> Constants:
        """The same, to enter more into."""
        found = copy(self)
        found.known, found._small = self.known.copy(), self._small.copy()
        return found

    def array(self, name: str) -> np.ndarray:
        """The value of the constant ``name``, in its own dtype."""
        if name in self._small:
            return self._small[name]
        try:
            found = self.known[name].load()
            if found.nbytes <= LARGE:
                self._small[name] = found
            return found
        except (ValueError, RuntimeError, IndexError, onnx.checker.ValidationError) as error:
            raise InputError(f"the constant {name!r} cannot be read: {error}") from error

    def integers(self, name: str) -> list[int]:
        """The entries of a constant that tells positions, sizes or axes.

        Raises:
            InputError: they are no whole numbers.
        """
        array = self.array(name)
        if array.dtype.kind not in "iu":
            raise InputError(f"the constant {name!r} is of type {array.dtype}, where whole numbers are needed")
        return array.ravel().tolist()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.known[name].dims

    def element_type(self, name: str) -> int:
        return self.known[name].element_type

    def enter(self, name: str, value: np.ndarray | None) -> None:
        """Note what ``name`` was found to be, if anything."""
        if value is not None:
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            self.known[name] = Constant(kind, value.shape, lambda: value)

    def follow(self, node: NodeProto) -> bool:
        """Whether ``node`` at most moves a constant, or is known for one; it then is among `known`."""
        if not node.output or not node.input:
            return False
        if node.output[0] not in self.known and (found := self._moved(node)) is not None:
            self.known[node.output[0]] = found
        return node.output[0] in self.known

    def _moved(self, node: NodeProto) -> Constant | None:
        """What a node makes of a constant whose elements it moves at most; None where it does more, or cannot run."""
        if node.op_type not in MOVING or not all(name in self.known for name in node.input[:] if name):
            return None
        x = self.known[node.input[0]]
        if node.op_type == "Identity":
            return x
        if node.op_type == "Transpose":
            order = cast("list[int]", attribute(node, "perm", list(range(len(x.dims)))[::-1]))
            if sorted(order) != list(range(len(x.dims))):
                return None
            return replace(
                x, dims=tuple(x.dims[a] for a in order), load=lambda: x.load().transpose(order), stored=False
            )
        dims = self._dims(node, x)
        if dims is None or prod(dims) != prod(x.dims):
            return None
        return replace(x, dims=dims, load=lambda: x.load().reshape(dims), stored=False)

    def _dims(self, node: NodeProto, x: Constant) -> tuple[int, ...] | None:
        """The shape that ``node`` gives to ``x``; None for a Cast to another type."""
        given = self.integers(node.input[1]) if len(node.input) > 1 and node.op_type in MOVING[:3] else None
        axes = given if given is not None else cast("list[int] | None", attribute(node, "axes"))
        match node.op_type:
            case "Reshape" if given is not None:
                keep = not attribute(node, "allowzero", 0)
                dims = [x.dims[i] if n == 0 and keep and i < len(x.dims) else n for i, n in enumerate(given)]
                rest = prod(n for n in dims if n != -1)
                return tuple(prod(x.dims) // max(rest, 1) if n == -1 else n for n in dims)
            case "Unsqueeze" if axes is not None:
                rank, rest = len(x.dims) + len(axes), iter(x.dims)
                new = {axis % rank for axis in axes}
                return tuple(1 if axis in new else next(rest, 1) for axis in range(rank))
            case "Squeeze":
                gone = {a % max(len(x.dims), 1) for a in axes} if axes else {a for a, n in enumerate(x.dims) if n == 1}
                return tuple(n for axis, n in enumerate(x.dims) if axis not in gone)
            case "Flatten":
                axis = cast(int, attribute(node, "axis", 1)) % (len(x.dims) + 1)
                return prod(x.dims[:axis]), prod(x.dims[axis:])
            case "Cast" if attribute(node, "to") == x.element_type:
                return x.dims
            case "CastLike" if self.element_type(node.input[1]) == x.element_type:
                return x.dims
        return None


MOVING = ("Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Identity", "Cast", "CastLike")
"""Operators that at most move the elements of a constant, if they do not change its type."""

MOST_DENSE = 2**26
"""Elements of a sparse constant that is read as a dense one."""


def constant_of(node: NodeProto) -> Constant | None:
    """The value of a Constant node; None for strings."""
    for a in node.attribute[:]:
        if a.name == "sparse_value" and prod(a.sparse_tensor.dims) < MOST_DENSE:
            return Constant.sparse(a.sparse_tensor)
    tensor = constant_tensor(node)
    return None if tensor is None else Constant.of(tensor)


def constant_tensor(node: NodeProto) -> TensorProto | None:
    """The value of a Constant node; None for strings, sparse tensors and other nodes."""
    for a in node.attribute[:] if node.op_type == "Constant" else ():
        match a.name:
            case "value":
                return a.t
            case "value_float" | "value_floats":
                return numpy_helper.from_array(np.array(helper.get_attribute_value(a), np.float32))
            case "value_int" | "value_ints":
                return numpy_helper.from_array(np.array(helper.get_attribute_value(a), np.int64))
    return None


def skeleton(model: ModelProto) -> ModelProto:
    """``model`` with its large weights as typed inputs: enough for checking and shape inference, and small."""
    light = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    light.graph.name = model.graph.name or "graph"
    light.graph.node.extend(model.graph.node)
    referring: list[int] = []
    for place, node in enumerate(light.graph.node):
        domain = node.domain
        if domain not in ("", "ai.onnx"):
            if is_fused_conv(node):
                node.domain, node.op_type = "", "Conv"
        elif node.op_type == "Constant" and (found := _referred(node)) is not None:
            light.graph.input.append(helper.make_tensor_value_info(node.output[0], found.data_type, found.dims))
            referring.append(place)
        elif domain:
            node.domain = ""  # the same domain; the checker knows it by this name only
    for place in reversed(referring):
        del light.graph.node[place]
    light.graph.input.extend(model.graph.input)
    light.graph.output.extend(model.graph.output)
    forget_negative_sizes((*light.graph.input, *light.graph.output))
    for sparse in model.graph.sparse_initializer:  # inference takes it for the vector of its values
        info = helper.make_tensor_value_info(sparse.values.name, sparse.values.data_type, sparse.dims)
        light.graph.input.append(info)
    inputs = {v.name for v in model.graph.input}
    defaults = inputs if model.ir_version >= 4 else set[str]()  # inference takes them for what no caller can override
    for tensor in model.graph.initializer:
        if tensor.name in defaults:
            continue
        if prod(tensor.dims[:]) <= SMALL and tensor.data_location != TensorProto.EXTERNAL:
            light.graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return light


def _referred(node: NodeProto) -> TensorProto | None:
    """The value of a Constant node where it is a reference."""
    return next((a.t for a in node.attribute[:] if a.name == "value" and is_reference(a.t)), None)


def inferred(light: ModelProto, *ways: dict[str, bool], told: ModelProto | None = None) -> ModelProto:
    """``light`` with what shape inference tells in the first of ``ways`` that it takes; as it is if none.

    ``told``: the same with what is told from shapes alone, where that is known.
    """
    propagates = any(options.get("data_prop") for options in ways) and may_propagate(light, told)
    for options in ways:
        with suppress(*FAILURES):
            options = {key: value and (propagates or key != "data_prop") for key, value in options.items()}
            return onnx.shape_inference.infer_shapes(light, **options)
    return light


STRICT = {"strict_mode": True, "data_prop": True}


def strictly_inferred(light: ModelProto) -> ModelProto:
    """``light`` with what shape inference tells from shapes alone; not to be changed.

    Raises:
        FAILURES: it finds a contradiction.
    """
    return _strictly_inferred(light.SerializeToString(deterministic=True))


@lru_cache(maxsize=1)
def _strictly_inferred(light: bytes) -> ModelProto:
    """A model is checked by it first, and then asked for what it tells."""
    return onnx.shape_inference.infer_shapes(light, strict_mode=True)


class _Declared:
    """The types of values as they are declared; of two for one value, the later.

    Attributes:
        kinds: the tensor type of each value.
        sizes: its sizes, a number, a symbol or None each; None where its rank is open.
    """

    def __init__(self, values: Iterable[ValueInfoProto]) -> None:
        self.kinds: dict[str, TypeProto.Tensor] = {}
        self.sizes: dict[str, tuple[int | str | None, ...] | None] = {}
        for v in values:
            if (kind := v.type).HasField("tensor_type"):
                name, tensor = v.name, kind.tensor_type
                self.kinds[name] = tensor
                self.sizes[name] = tuple(map(_declared, tensor.shape.dim[:])) if tensor.HasField("shape") else None

    def tell_all(self, graph: GraphProto) -> bool:
        """Whether every size of every value of ``graph`` is told: by a number, or a symbol of an input."""
        given = {size for v in graph.input for size in self.sizes.get(v.name) or () if isinstance(size, str)}
        for node in graph.node:
            for name in node.output[:]:
                if name and ((sizes := self.sizes.get(name)) is None or not all(map(given.__contains__, _open(sizes)))):
                    return False
        return True


def _declared(dim: TensorShapeProto.Dimension) -> int | str | None:
    if n := dim.dim_value:
        return n
    return 0 if dim.HasField("dim_value") else dim.dim_param or None


def _open(sizes: Iterable[int | str | None]) -> list[int | str | None]:
    return [size for size in sizes if not isinstance(size, int)]


def _values(graph: GraphProto) -> Iterator[ValueInfoProto]:
    return chain(graph.value_info, graph.output, graph.input)


def _small_constants(graph: GraphProto) -> dict[str, np.ndarray]:
    """The constants of few whole numbers, by name."""
    constants = {t.name: t for t in graph.initializer}
    constants |= {n.output[0]: t for n in graph.node if (t := constant_tensor(n)) is not None}
    return {
        name: numpy_helper.to_array(t)
        for name, t in constants.items()
        if t.data_type == TensorProto.INT64 and prod(t.dims[:]) <= SMALL and not is_reference(t)
    }


def _tell_ranks(light: ModelProto) -> bool:
    """Have the weights of convolutions tell the ranks that inference does not know; whether there was any to tell."""
    graph = light.graph
    known = {v.name: v.type.tensor_type for group in (graph.value_info, graph.output, graph.input) for v in group}
    known = {name: kind for name, kind in known.items() if kind.HasField("shape")}
    weights = {name: (kind.elem_type, [d.dim_value for d in kind.shape.dim]) for name, kind in known.items()}
    weights |= {t.name: (t.data_type, list(t.dims)) for t in graph.initializer}
    found: dict[str, ValueInfoProto] = {}
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and is_standard(node) and len(node.input) > 1:
            kind, weight = weights.get(node.input[1], (0, []))
            if not kind or len(weight) < 3:
                continue
            inside = (
                weight[0] if node.op_type == "ConvTranspose" else weight[1] * cast(int, attribute(node, "group", 1))
            )
            for name, channels in ((node.input[0], inside), (node.output[0], None)):
                if name not in known:
                    sizes = [None, channels, *[None] * (len(weight) - 2)]
                    found[name] = helper.make_tensor_value_info(name, kind, sizes)
    _drop(graph.value_info, set(found))
    graph.value_info.extend(found.values())
    return bool(found)


def _with_rest(graph: GraphProto) -> set[str]:
    """The constants and concatenations that have an entry of -1, which a reshape takes for the rest."""
    found = {name for name, a in _small_constants(graph).items() if -1 in a}
    for node in graph.node:
        if node.op_type in ("Concat", "Identity") and not found.isdisjoint(node.input[:]):
            found.add(node.output[0])
    return found


_dim = lru_cache(maxsize=4096)(Dim)


class Types:
    """Inferred element types and shapes of every value of a main graph.

    ``tells_all``: whether all sizes are numbers, or symbols of inputs.
    """

    def __init__(self, model: ModelProto) -> None:
        light = skeleton(model)
        for node in light.graph.node:
            stand_in(node)
        hide_doubtful(light)
        plain = told = None
        with suppress(*FAILURES):
            plain = strictly_inferred(light)
            told = _Declared(_values(plain.graph))
        if plain is not None and told is not None and told.tell_all(plain.graph):
            self.tells_all = True  # data that are propagated tell no more
        else:
            light = inferred(light, STRICT, {}, told=plain)
            if _tell_ranks(light):
                light = inferred(light, STRICT, {})
            told = _Declared(_values(light.graph))
            self.tells_all = told.tell_all(light.graph)
        # What the file itself says comes first, to be overruled: it may be stale, and inference may be silent.
        stale = _Declared(v for v in model.graph.value_info if v.name not in told.kinds)
        self._types, self._sizes = stale.kinds | told.kinds, stale.sizes | told.sizes
        self._stored = {t.name: (t.data_type, tuple(map(_dim, t.dims[:]))) for t in model.graph.initializer}
        self._shapes: dict[str, Shape | None] = {}
        self._dtypes: dict[str, np.dtype | None] = {}
        self._products: dict[str, Dim] = {}
        self._named = {d.dim_param for v in model.graph.input for d in v.type.tensor_type.shape.dim}
        if self.tells_all:
            return  # nothing is left to be learnt
        given = {symbol for v in model.graph.input for dim in self._shape(v.name) or () for symbol in dim.symbols}
        left = _with_rest(light.graph)
        for node in model.graph.node:
            if node.op_type in ("Flatten", "Reshape") and is_standard(node):
                self._learn_product(node, given, node.op_type == "Flatten" or node.input[1] in left)

    def _learn_product(self, node: NodeProto, given: set[str], is_rest: bool) -> None:
        """Where one size of a reshape is all that inference left open, the others tell it: -1, a merged batch.

        They do not where it is no rest (``is_rest``) and one of the others may be 0.
        """
        before, after = self._shape(node.input[0]), self._shape(node.output[0])
        if before is None or after is None:
            return
        known = given.union(*(dim.symbols for dim in before), self._products)
        fresh = [dim for dim in after if dim.factor == 1 and len(dim.symbols) == 1 and dim.symbols[0] not in known]
        others = size([dim for dim in after if dim not in fresh])
        rest = size(before).divided_by(others) if len(fresh) == 1 else None
        if rest is not None and (is_rest or not others.symbols):
            self._products[fresh[0].symbols[0]] = rest

    def dtype(self, name: str) -> np.dtype | None:
        """The dtype of a floating value; None for other types and where it is unknown."""
        if name not in self._dtypes:
            self._dtypes[name] = FLOATS.get(self.element_type(name) or 0)
        return self._dtypes[name]

    def info(self, name: str) -> ValueInfoProto | None:
        """The type of ``name`` as a declaration; None where it, or the rank, is unknown."""
        kind = self._types.get(name)
        if kind is None or not kind.elem_type or not kind.HasField("shape"):
            return None
        found = ValueInfoProto(name=name)
        found.type.tensor_type.CopyFrom(kind)
        return found

    def element_type(self, name: str) -> int | None:
        """The element type of ``name`` as ONNX numbers them; None where it is unknown."""
        if name in self._stored:
            return self._stored[name][0]
        kind = self._types.get(name)
        return kind.elem_type or None if kind is not None else None

    def shape(self, name: str) -> Shape | None:
        """The shape of ``name``, unknown sizes as symbols; None when the rank is unknown."""
        if name not in self._shapes:
            self._shapes[name] = self._shape(name)
        return self._shapes[name]

    def _shape(self, name: str) -> Shape | None:
        if name in self._stored:
            return self._stored[name][1]
        sizes = self._sizes.get(name)
        if sizes is None:
            return None
        return tuple([self._size(name, axis, n) for axis, n in enumerate(sizes)])

    def _size(self, name: str, axis: int, n: int | str | None) -> Dim:
        if isinstance(n, int) and n >= 0:
            return _dim(n)
        return self._open(n if isinstance(n, str) else unnamed(f"{name}[{axis}]", self._named))

    def _open(self, symbol: str) -> Dim:
        return self._products.get(symbol) or Dim.of(symbol)

    @lazy
    def empty(self) -> Set[str]:
        """The values that have no elements, for every input."""
        sizes = self._sizes.values()
        if not any(0 in dims for dims in sizes if dims) and not any(
            Dim(0) in dims for _, dims in self._stored.values()
        ):
            return frozenset()
        names = {*self._sizes, *self._stored}
        return {name for name in names if any(dim.factor == 0 for dim in self.shape(name) or ())}

    def rank(self, name: str) -> int | None:
        shape = self.shape(name)
        return None if shape is None else len(shape)

    def sizes(self, name: str) -> tuple[int, ...] | None:
        """The shape of ``name`` when every size is a number."""
        shape = self.shape(name)
        if shape is None or any(d.known is None for d in shape):
            return None
        return tuple(d.factor for d in shape)


def users(graph: GraphProto) -> dict[str, list[NodeProto | None]]:
    """For every value the nodes that read it, once per operand, in their bodies or themselves; None for an output."""
    found: dict[str, list[NodeProto | None]] = {}
    for node in graph.node:
        for name in node.input[:]:
            if name:
                found.setdefault(name, []).append(node)
        for name in captured(node):
            found.setdefault(name, []).append(node)
    for output in graph.output:
        found.setdefault(output.name, []).append(None)
    return found


def trained(model: ModelProto) -> set[str]:
    """The initializers that training replaces."""
    infos = model.training_info
    return {e.key for info in infos for group in (info.initialization_binding, info.update_binding) for e in group}


def read_elsewhere(model: ModelProto) -> set[str]:
    """What parts of ``model`` beside its main graph read of it: the graphs that train it, and annotations."""
    found = trained(model)
    for info in model.training_info:
        for graph in (info.initialization, info.algorithm):
            found.update(name for node in graph.node for name in (*node.input[:], *captured(node)))
        found.update(e.value for group in (info.initialization_binding, info.update_binding) for e in group)
    return found


class Names:
    """Names in use, and new ones."""

    def __init__(self, taken: Iterable[str]) -> None:
        self.taken = set(taken)
        self._next: dict[str, int] = {}

    def fresh(self, wanted: str) -> str:
        """``wanted``, or that with a number after it; taken from now on."""
        name, n = wanted, self._next.get(wanted, 1)
        while name in self.taken:
            name, n = f"{wanted}_{n}", n + 1
        self._next[wanted] = n
        self.taken.add(name)
        return name


def commit(
    model: ModelProto,
    nodes: Sequence[NodeProto],
    fresh: Sequence[TensorProto],
    suspects: Iterable[str],
    reshaped: Iterable[str] = (),
) -> None:
    """Make ``nodes`` the body of the main graph, in one edit.

    Nodes that compute ``suspects``, and those that only fed them, are dropped where nothing reads
    them any more, and so are initializers that nothing reads any more. What was dead before stays. What is declared of
    values that are ``reshaped`` goes.
    """
    graph = model.graph
    results = {o.name for o in graph.output} | read_elsewhere(model)
    was_read = {name for node in graph.node for name in (*node.input[:], *captured(node))}
    was_read |= {o.name for o in graph.output} | (suspects := set(suspects))
    nodes, gone = _without_dead(nodes, suspects, results)
    read = {name for node in nodes for name in (*node.input[:], *captured(node))} | results
    alive = read.union(*(node.output for node in nodes))
    annotations = [a for a in graph.quantization_annotation if a.tensor_name in alive]
    read |= {e.value for a in annotations for e in a.quant_parameter_tensor_names}
    orphans = {t.name for t in graph.initializer if t.name in was_read and t.name not in read}
    if model.ir_version >= 4:
        orphans -= {v.name for v in graph.input}  # a caller may pass them
    _drop(graph.initializer, orphans)
    _forget_annotations(model, gone | orphans)
    fresh = [t for t in fresh if t.name in read]
    graph.initializer.extend(fresh)
    if model.ir_version < 4:  # every initializer is listed as an input, too
        _drop(graph.input, orphans)
        graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in fresh)
    _drop(graph.value_info, gone | orphans | set(reshaped))
    del graph.node[:]
    graph.node.extend(nodes)


def _forget_annotations(model: ModelProto, gone: set[str]) -> None:
    """Drop what is noted of how to quantize tensors that are ``gone``."""
    annotations = model.graph.quantization_annotation
    for index in reversed([i for i, a in enumerate(annotations) if a.tensor_name in gone]):
        del annotations[index]


def _drop(items: Any, names: set[str]) -> None:
    for index in reversed([i for i, item in enumerate(items) if item.name in names]):
        del items[index]


def _without_dead(
    nodes: Sequence[NodeProto], suspects: set[str], outputs: set[str]
) -> tuple[list[NodeProto], set[str]]:
    """``nodes`` without the suspects that nothing reads, and the names that are gone with them."""
    reads = [[*node.input[:], *captured(node)] for node in nodes]
    uses = Counter(chain(outputs, *reads))
    kept: list[NodeProto] = []
    gone: set[str] = set()
    for node, names in zip(reversed(nodes), reversed(reads), strict=True):
        computed = node.output
        if suspects.isdisjoint(computed) or any(uses[name] > 0 for name in computed):
            kept.append(node)
            continue
        gone.update(computed)
        uses.subtract(names)
        suspects.update(name for name in names if name)
    return kept[::-1], gone
