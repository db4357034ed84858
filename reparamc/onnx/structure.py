"""The structure of an ONNX model: all of it but the values of its parameters, as text that fits into a record."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from typing import Any

from onnx import AttributeProto, ModelProto, TensorProto, numpy_helper

from reparamc.errors import InputError, one_line
from reparamc.onnx import weights
from reparamc.onnx.values import FLOATS

LARGEST = 1 << 16
"""Bytes of a constant inside a node up to which it is part of the structure."""


def structure_of(model: ModelProto, passes: Iterable[str], objective: str) -> str:
    """``model`` without its parameters, as text; empty where large ones are inside nodes."""
    light = ModelProto()
    for field, value in model.ListFields():
        if field.name not in ("graph", "metadata_props"):
            _copied(light, field.name, value)
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            _copied(light.graph, field.name, value)
    held = [a for node in light.graph.node for a in node.attribute]
    tensors = (a.t for a in held if a.type == AttributeProto.TENSOR)
    if any(a.ByteSize() > LARGEST for a in held) or any(map(weights.is_reference, tensors)) or light.functions:
        return ""
    for tensor in model.graph.initializer:
        if is_parameter(tensor):
            light.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        else:
            light.graph.initializer.add().CopyFrom(numpy_helper.from_array(weights.array(tensor), tensor.name))
    light.metadata_props.add(key="passes", value=",".join(passes))
    light.metadata_props.add(key="objective", value=objective)
    return base64.b64encode(zlib.compress(light.SerializeToString(deterministic=True))).decode()


def _copied(message: Any, name: str, value: Any) -> None:
    if hasattr(value, "add") or hasattr(value, "extend"):
        getattr(message, name).extend(value)
    elif hasattr(value, "ListFields"):
        getattr(message, name).CopyFrom(value)
    else:
        setattr(message, name, value)


def is_parameter(tensor: TensorProto) -> bool:
    """Whether it has to be in a checkpoint: all but scalars and whole numbers, which the graph itself is made of."""
    return bool(tensor.dims) and tensor.data_type in FLOATS


def model_of(text: str) -> ModelProto:
    """The model that ``text`` is the structure of; its parameters have no values.

    Raises:
        InputError: it is damaged.
    """
    try:
        return ModelProto.FromString(zlib.decompress(base64.b64decode(text, validate=True)))
    except Exception as error:  # whatever damaged text leads to
        raise InputError(f"the structure in the model is damaged: {one_line(error)}") from error
