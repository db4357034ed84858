"""A fused ONNX file with new weights: the same graph, from a checkpoint of the model that it was made from.

A record comes with the structure of the original: its graph without the values of its parameters. With the weights of a
checkpoint in it, that is the original again, which is fused as before, and verified.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from onnx import ModelProto, helper, numpy_helper

from reparamc.errors import InputError, one_line
from reparamc.onnx.files import load
from reparamc.onnx.fuse import fuse_model
from reparamc.onnx.record import inscribe, model_origin, structures
from reparamc.onnx.structure import is_parameter, model_of
from reparamc.report.data import Report

Weights = Mapping[str, np.ndarray]

_KINDS = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def refreshed(
    fused: ModelProto, weights: Weights, checkpoint: object = "the checkpoint", verify: str = "full"
) -> tuple[ModelProto, Report]:
    """``fused`` with what becomes of the ``weights`` of its original, and the report. Neither argument is changed.

    Args:
        fused: a model with a record.
        weights: parameters of the original by name.
        checkpoint: what messages call them.
        verify: as for `fuse_model`.

    Raises:
        InputError: there is no structure in ``fused``, the weights do not fit it, or they lead to another graph.
        VerificationError: the result differs from the original with these weights.
    """
    stages = structures(fused)
    if not stages:
        raise InputError("the model cannot be refreshed: it holds no structure of its original; fuse that again")
    report = None
    result = ModelProto()
    for text in stages:
        original = _with(model_of(text), weights, checkpoint)
        chosen = {entry.key: entry.value for entry in original.metadata_props}
        del original.metadata_props[:]
        result, report = fuse_model(
            original, passes=chosen["passes"].split(","), objective=chosen["objective"], verify=verify
        )
        report.origin = model_origin(original)
        weights = {t.name: numpy_helper.to_array(t) for t in result.graph.initializer}
    assert report is not None
    made = ModelProto()
    made.CopyFrom(fused)
    if not _are_alike(made, result):
        raise InputError(
            f"with {checkpoint} the fusion takes another form, for it depends on values that have changed; "
            "fuse the original with these weights instead"
        )
    del made.graph.initializer[:]
    made.graph.initializer.extend(result.graph.initializer)
    inscribe(made, report, replace=True)
    return made, report


def _with(model: ModelProto, weights: Weights, checkpoint: object) -> ModelProto:
    """``model``, a structure, with its parameters."""
    named = _by_their_names(weights, [t.name for t in model.graph.initializer])
    _refuse_merged(model, weights, named, checkpoint)
    for tensor in model.graph.initializer:
        given = named(tensor.name)
        shape = tuple(tensor.dims)
        if given is None:
            if is_parameter(tensor):
                raise InputError(f"{checkpoint} does not fit: it has no {tensor.name!r}, which is {list(shape)}")
            continue
        if given.shape != shape:
            raise InputError(
                f"{checkpoint} does not fit: {tensor.name!r} is {list(given.shape)} there, {list(shape)} in the model"
            )
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if _is_floating(given.dtype) != _is_floating(dtype):
            raise InputError(f"{checkpoint} does not fit: {tensor.name!r} is {given.dtype} there, {dtype} in the model")
        if np.isnan(given).any():
            raise InputError(f"{checkpoint} holds NaN in {tensor.name!r}; take weights from before training diverged")
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(given).astype(dtype), tensor.name))
    return model


def _is_floating(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "fV"  # V: those of ml_dtypes


def _refuse_merged(
    model: ModelProto, weights: Weights, named: Callable[[str], np.ndarray | None], checkpoint: object
) -> None:
    """Raise InputError where one parameter of ``model`` may stand for several that were equal when it was exported."""
    users = Counter(name for node in model.graph.node for name in node.input)
    used = [named(t.name) for t in model.graph.initializer]
    shared = [(t.name, w) for t, w in zip(model.graph.initializer, used, strict=True) if users[t.name] > 1]
    taken = {id(w) for w in used}
    for key, other in weights.items():
        if id(other) in taken or not other.ndim or not _is_floating(other.dtype):
            continue
        alike = {name: w for name, w in shared if w is not None and w.shape == other.shape}
        if alike and not any(np.array_equal(w, other) for w in alike.values()):
            raise InputError(
                f"{checkpoint} does not fit: the model has one parameter for {min(alike)!r} and perhaps {key!r}, "
                "for exporters merge what is equal; export and fuse it with these weights"
            )


def _by_their_names(weights: Weights, wanted: list[str]) -> Callable[[str], np.ndarray | None]:
    """Weights by the names of the model; a prefix that wrappers add (``module.``) is left out."""
    if not any(name in weights for name in wanted):
        for name in wanted:
            found = next((key for key in weights if key.endswith(f".{name}")), None)
            if found is not None:
                prefix = found.removesuffix(name)
                return lambda n: weights.get(prefix + n)
    return weights.get


def _are_alike(a: ModelProto, b: ModelProto) -> bool:
    """Whether two models have the same graph, all but the values of initializers."""

    def form(model: ModelProto) -> list[Any]:
        return [
            [n.SerializeToString(deterministic=True) for n in model.graph.node],
            [(t.name, t.data_type, tuple(t.dims)) for t in model.graph.initializer],
        ]

    return form(a) == form(b)


def replaced(model: ModelProto, weights: Weights, checkpoint: object) -> ModelProto:
    """``model`` with the initializers that ``weights`` name in their place; all parameters must be among them.

    Raises:
        InputError: one is not, or is of another shape.
    """
    made = ModelProto()
    made.CopyFrom(model)
    return _with(made, weights, checkpoint)


def outputs_of(model: ModelProto, inputs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """What ONNX Runtime makes of ``inputs``, in their order.

    Raises:
        InputError: the model does not run on them.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        given = dict(zip([i.name for i in session.get_inputs()], inputs, strict=True))
        results: Any = session.run(None, given)
        return dict(zip([o.name for o in session.get_outputs()], results, strict=True))
    except Exception as error:  # whatever the runtime raises
        raise InputError(f"the file does not run on the example: {one_line(error)}") from error


def read_weights(path: Path, target: Path | None = None) -> Weights:
    """The parameters in a file .npz, .safetensors or .onnx, by name.

    Raises:
        InputError: it cannot be read, or they lie in ``target``.
    """
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return {t.name: numpy_helper.to_array(t) for t in load(path, target).graph.initializer}
    try:
        if suffix == ".npz":
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                return dict(file)
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        return {name: _tensor(data, 8 + length, entry) for name, entry in header.items()}
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # whatever a damaged file leads to
        wrong = f"it is empty, cut short, or no {suffix} file of plain numbers; save it again"
        raise InputError(f"{path} cannot be read: {wrong}") from error


def unreadable(path: Path, error: OSError) -> InputError:
    """What is said of a checkpoint that the system does not let us read."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: no such file")
    return InputError(f"{path} cannot be read: {error.strerror or one_line(error)}")


def _tensor(data: bytes, start: int, entry: Mapping[str, Any]) -> np.ndarray:
    begin, end = entry["data_offsets"]
    return np.frombuffer(data[start + begin : start + end], _KINDS[entry["dtype"]]).reshape(entry["shape"])
