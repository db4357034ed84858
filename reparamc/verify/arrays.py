"""Inputs of ONNX models: what a model declares, and arrays in files.

A set of inputs is a .npz file, a folder of .npy files named by input, or a folder of ``input_N.pb`` files as
in ONNX's own test data. A folder may also hold several sets: .npz files, or folders of the other two kinds.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from reparamc.certificate.onnx_bounds import unnamed
from reparamc.equivalence.trials import Inputs, Slot
from reparamc.errors import InputError, one_line
from reparamc.onnx.session import free_inputs


def slots(model: ModelProto) -> list[Slot]:
    """The inputs that a caller of ``model`` must give.

    Raises:
        InputError: one of them is no dense tensor.
    """
    named = {d.dim_param for value in free_inputs(model) for d in value.type.tensor_type.shape.dim}
    return [slot(value, named) for value in free_inputs(model)]


def slot(value: onnx.ValueInfoProto, named: Collection[str] = ()) -> Slot:
    """A declared input or output; a size without a name is named by its place, unless that is among those ``named``."""
    if not value.type.HasField("tensor_type"):
        what = _OTHER.get(value.type.WhichOneof("value") or "", "no tensor")
        raise InputError(f"{value.name!r} is {what}; such models cannot be compared")
    kind = value.type.tensor_type
    dims: list[int | str] = []
    for axis, d in enumerate(kind.shape.dim):
        known = d.HasField("dim_value") and d.dim_value >= 0
        dims.append(d.dim_value if known else d.dim_param or unnamed(f"{value.name}[{axis}]", named))
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    except KeyError as error:
        what = f"the unknown element type {kind.elem_type}" if kind.elem_type else "no element type"
        raise InputError(f"{value.name!r} declares {what}; such models cannot be compared") from error
    return Slot(value.name, dtype, tuple(dims), kind.HasField("shape"))


_OTHER = {
    "optional_type": "an optional value, no tensor",
    "sequence_type": "a sequence, no tensor",
    "map_type": "a map, no tensor",
    "opaque_type": "an opaque value, no tensor",
    "sparse_tensor_type": "a sparse tensor, no dense one",
    "": "of no declared type",
}


def read_inputs(path: Path, wanted: Sequence[Slot]) -> list[tuple[str, Inputs]]:
    """Every set of inputs at ``path``, with the file or folder it comes from.

    Raises:
        InputError: there is none, one cannot be read, or its names are not those of ``wanted``.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_file():
        return [(str(path), _fitting(_npz(path), wanted, path))]
    if single := _folder(path, wanted):
        return [(str(path), single)]
    sets = []
    for item in sorted(path.iterdir()):
        if item.suffix == ".npz":
            sets.append((str(item), _fitting(_npz(item), wanted, item)))
        elif item.is_dir() and (found := _folder(item, wanted)):
            sets.append((str(item), found))
    if not sets:
        raise InputError(f"{path} holds no inputs: give .npz files, .npy files named by input, or input_0.pb")
    return sets


def write_inputs(path: Path, inputs: Mapping[str, np.ndarray]) -> None:
    """Write one set of inputs as ``path`` (.npz), all of it or nothing; equal inputs give equal bytes.

    Raises:
        InputError: the file cannot be written.
    """
    from reparamc.onnx.files import write_atomically

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in inputs.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # of a fixed date
            entry.compress_type = zipfile.ZIP_DEFLATED
            plain = array.astype(str) if array.dtype.kind == "O" else array
            data = io.BytesIO()
            np.lib.format.write_array(data, np.asarray(plain, order="C"), allow_pickle=False)
            archive.writestr(entry, data.getvalue())
    write_atomically(path, [buffer.getvalue()])


def _npz(path: Path) -> Inputs:
    try:
        with path.open("rb") as file:
            if file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
                raise InputError(f"{path} holds one array without a name; give a .npz file, or the folder it is in")
            if not zipfile.is_zipfile(file):
                raise InputError(
                    f"{path} cannot be read as a .npz file: it is no zip archive; numpy.savez writes one, with each "
                    "array under the name of its input"
                )
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
    except InputError:
        raise
    except Exception as error:  # whatever a file by an unknown hand leads NumPy, zipfile or zlib to
        raise InputError(f"{path} cannot be read as a .npz file: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if "pickle" in str(error):  # NumPy's own advice would run what the file holds
        return "it holds Python objects; give arrays of numbers or strings"
    return one_line(error) or type(error).__name__


def _folder(path: Path, wanted: Sequence[Slot]) -> Inputs | None:
    """The set of .npy or .pb files in ``path``; None where there are none."""
    arrays = sorted(path.glob("*.npy"))
    protos = sorted(path.glob("input_*.pb"))
    try:
        if arrays:
            return _fitting({p.stem: np.load(p, allow_pickle=False) for p in arrays}, wanted, path)
        if protos:
            found = {}
            for p in protos:
                number = p.stem.removeprefix("input_")
                if not number.isdecimal() or int(number) >= len(wanted):
                    raise InputError(f"{p} is the input number {number} of a model that has {len(wanted)}")
                found[wanted[int(number)].name] = numpy_helper.to_array(TensorProto.FromString(p.read_bytes()))
            return _fitting(found, wanted, path)
    except InputError:
        raise
    except Exception as error:  # as above
        raise InputError(f"the inputs in {path} cannot be read: {_reason(error)}") from error
    return None


def _fitting(arrays: Inputs, wanted: Sequence[Slot], path: Path) -> Inputs:
    """``arrays`` in the dtypes that NumPy's format does not know; names must be exactly those wanted."""
    names = [s.name for s in wanted]
    missing = [n for n in names if n not in arrays]
    unknown = [n for n in arrays if n not in names]
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"holds {unknown[0]!r}, which is no input"
        raise InputError(f"{path} {what}; the inputs are {', '.join(map(repr, names)) or 'none'}")
    fitted = {}
    for s in wanted:
        x = arrays[s.name]
        if x.dtype.kind == "V" and x.dtype.itemsize == s.dtype.itemsize:
            x = x.view(s.dtype)  # bfloat16 and the like come back as bare bytes
        elif x.dtype.kind in "US" and s.dtype.kind == "O":
            x = x.astype(object)
        fitted[s.name] = x
    return fitted
