"""What a model must be before anything is done to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from math import prod

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper

from reparamc.certificate.onnx_bounds import FAILURES, bodies, nested
from reparamc.errors import InputError, one_line
from reparamc.onnx.sizes import in_order
from reparamc.onnx.values import captured, defined, skeleton, strictly_inferred
from reparamc.onnx.weights import PACKED, UNEVEN, check_loaded, is_reference, length

OLDEST_OPSET = 7
"""Before it, broadcasting and BatchNormalization meant something else."""

MOST_ELEMENTS = 2**40
"""Of one tensor: beyond any memory, and sizes still multiply without overflow in what reads them."""


def check(model: ModelProto) -> str | None:
    """What the ONNX checker says against ``model``, if ONNX Runtime takes it all the same; None if it says nothing.

    Raises:
        InputError: neither takes it, or it holds what neither looks at.
    """
    if not model.graph.node and not model.graph.output:
        is_there = model.graph.ByteSize()
        what = "no operators and no outputs" if is_there else "no graph: the file is empty or not ONNX"
        raise InputError(f"the model has {what}")
    check_loaded(model, "load the model with onnx.load(path)")
    _check_opsets(model)
    try:
        for graph in graphs(model):
            for tensor in tensors(graph):
                _check_tensor(tensor)
            _check_names(graph)
        for node in model.graph.node:
            for attribute in node.attribute[:]:
                if attribute.ref_attr_name:
                    name = attribute.ref_attr_name
                    raise ValueError(f"a {node.op_type} refers to an attribute {name!r} of a function, but is in none")
        light = skeleton(model)
    except (ValueError, TypeError) as error:
        raise InputError(f"the model does not pass the ONNX checker: {one_line(error)}") from error
    said = _objection(partial(onnx.checker.check_model, light))
    wrong = said or _objection(partial(strictly_inferred, light))
    if wrong is not None:
        from reparamc.onnx.session import session

        try:
            with session(model, "the model", narrowed=False):
                pass
        except InputError as error:
            raise InputError(f"the model does not pass the ONNX checker: {wrong}") from error
    return said


def _objection(look: Callable[[], object]) -> str | None:
    try:
        look()
    except FAILURES as error:
        return one_line(error)
    return None


def in_execution_order(model: ModelProto) -> ModelProto:
    """``model``, or a copy of it in which every operator comes after what it reads, as not all exporters have it.

    Raises:
        InputError: operators wait for one another, or read what nothing computes.
    """
    stack = [(model.graph, frozenset[str]())]
    ordered = True
    while stack:
        graph, outside = stack.pop()
        inside = outside.union(defined(graph))
        computed = {name for node in graph.node for name in node.output[:]}
        for node in graph.node:
            read = [name for name in (*node.input[:], *captured(node)) if name]
            ordered = ordered and computed.isdisjoint(read)
            computed.difference_update(node.output[:])
            if not inside.issuperset(read):
                unknown = next(name for name in read if name not in inside)
                raise InputError(
                    f"the model is damaged: {node.op_type} {node.name!r} reads {unknown!r}, which nothing computes"
                )
            stack.extend((body, inside) for body in bodies(node))
    if ordered:
        return model
    made = ModelProto()
    made.CopyFrom(model)
    for graph in graphs(made):
        try:
            nodes = in_order(graph.node)
        except ValueError as error:
            raise InputError(f"the model is damaged: {error}") from error
        del graph.node[:]
        graph.node.extend(nodes)
    return made


def _check_opsets(model: ModelProto) -> None:
    opsets = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if len(set(opsets)) > 1:
        raise InputError(f"the model imports opset {min(opsets)} and opset {max(opsets)}; leave the one that it means")
    newest = onnx.defs.onnx_opset_version()
    for opset in opsets:
        if opset < OLDEST_OPSET:
            raise InputError(
                f"the model uses opset {opset}; convert it to {OLDEST_OPSET} or later (onnx.version_converter)"
            )
        if opset > newest:
            raise InputError(
                f"the model uses opset {opset}, and the installed onnx {onnx.__version__} knows those up to {newest}; "
                "install a later onnx, or convert the model"
            )


def graphs(model: ModelProto) -> Iterator[GraphProto]:
    """The main graph and the bodies in it, at any depth."""
    return nested(model.graph)


def tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every tensor that ``graph`` holds, those of its bodies left out."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for a in node.attribute[:]:
            match a.type:
                case AttributeProto.INT | AttributeProto.INTS | AttributeProto.FLOAT | AttributeProto.STRING:
                    continue
                case AttributeProto.TENSOR:
                    yield a.t
                case AttributeProto.SPARSE_TENSOR:
                    yield from (a.sparse_tensor.values, a.sparse_tensor.indices)
                case _:
                    yield from a.tensors


def _check_names(graph: GraphProto) -> None:
    """What runtimes take of two initializers of one name is not known unless these are equal."""
    if len({tensor.name for tensor in graph.initializer}) == len(graph.initializer):
        return
    found: dict[str, TensorProto] = {}
    for tensor in graph.initializer:
        if found.setdefault(tensor.name, tensor) != tensor:
            raise ValueError(f"there are two initializers {tensor.name!r}, of different values")


_dtype = cache(helper.tensor_dtype_to_np_dtype)


def _check_tensor(tensor: TensorProto) -> None:
    """The checker's test of a tensor's size, without copying its data; and that its type is one."""
    try:
        kind = _dtype(tensor.data_type)
    except KeyError as error:
        raise ValueError(f"the tensor {tensor.name!r} is of the unknown element type {tensor.data_type}") from error
    if min(tensor.dims[:], default=0) < 0:
        raise ValueError(f"the tensor {tensor.name!r} has a negative size")
    refers = is_reference(tensor)
    if tensor.data_location == TensorProto.EXTERNAL and not refers:
        return
    count = prod(tensor.dims[:])
    if count > MOST_ELEMENTS:
        raise ValueError(f"the tensor {tensor.name!r} has {count} elements")
    if tensor.data_type in UNEVEN:
        return
    packed = PACKED.get(tensor.data_type, 1)
    if refers or tensor.HasField("raw_data"):
        need, has, unit = -(-count // packed) * kind.itemsize, length(tensor), "bytes"
    else:
        parts = 2 if kind.kind == "c" else 1
        need, unit = -(-count // packed) * parts, "entries"
        has = len(getattr(tensor, helper.tensor_dtype_to_field(tensor.data_type)))
    if has != need:
        raise ValueError(f"the tensor {tensor.name!r} holds {has} {unit} and its shape needs {need}")
