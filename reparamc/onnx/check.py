"""What a model must be before anything is done to it."""

from __future__ import annotations

from math import prod

import onnx
from onnx import ModelProto, TensorProto, helper

from reparamc.errors import InputError, one_line
from reparamc.onnx.values import FLOATS, skeleton

OLDEST_OPSET = 7
"""Before it, broadcasting and BatchNormalization meant something else."""


def check(model: ModelProto) -> None:
    """Raise InputError unless ``model`` passes the ONNX checker."""
    if not model.graph.node and not model.graph.output:
        raise InputError("the model has no graph: the file is empty or not ONNX")
    if any(t.data_location == TensorProto.EXTERNAL for t in model.graph.initializer):
        raise InputError("the weights are in another file and not loaded; load the model with onnx.load(path)")
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
    try:
        onnx.checker.check_model(skeleton(model))
        for tensor in model.graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL:
                _check_tensor(tensor)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    _check_type(attribute.t)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise InputError(f"the model does not pass the ONNX checker: {one_line(error)}") from error


def _check_type(tensor: TensorProto) -> None:
    try:
        helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except KeyError as error:
        raise ValueError(f"the tensor {tensor.name!r} is of the unknown element type {tensor.data_type}") from error


def _check_tensor(tensor: TensorProto) -> None:
    """The checker's test of a tensor's size, without copying its data; and that its type is one."""
    _check_type(tensor)
    if tensor.HasField("raw_data") and tensor.data_type in FLOATS:
        need = prod(tensor.dims) * FLOATS[tensor.data_type].itemsize
        if len(tensor.raw_data) != need:
            raise ValueError(
                f"the tensor {tensor.name!r} holds {len(tensor.raw_data)} bytes and its shape needs {need}"
            )
