"""Large tensors stay where they are; a **light** model refers to them.

A light model is a ModelProto like any other, but each large tensor of its main graph is marked as external data whose
location names a buffer: a file and a place in it, a tensor of the caller's model, or an array that was made here. So
copies, checks and shape inference take no time for weights, ONNX Runtime gets them without a copy, and what no rewrite
touches goes from file to file as bytes. Buffers live as long as the `holding` block that they were made in.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeAlias
from weakref import WeakValueDictionary, ref

import numpy as np
from google.protobuf.message import DecodeError, Message
from onnx import ModelProto, NodeProto, StringStringEntryProto, TensorProto, helper, numpy_helper

from reparamc.algebra.records import record
from reparamc.errors import InputError

FILE_LIMIT = 2**31 - 2**20
"""A serialized model beyond this many bytes keeps its weights in a file beside it."""

LARGE = 2**13
"""Bytes of a tensor from which on a light model refers to it. All that shape inference reads is smaller."""

BLOCK = 2**22
"""Bytes that are read and written at once."""

MARK = "reparamc buffer "
"""Before the number of a buffer, in the place of the name of a file."""

PACKED = {
    kind: 4 if name.endswith("2") else 2
    for name, kind in TensorProto.DataType.items()
    if name in ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")
}
"""How many entries of a type share a byte."""
UNEVEN = {kind for name, kind in TensorProto.DataType.items() if name.startswith("FLOAT6")}
"""Types whose entries end within a byte."""

_PLAIN = {helper.np_dtype_to_tensor_dtype(np.dtype(kind)) for kind in "?bBhHiIlLefd"}
"""Types that NumPy itself has."""

Bytes: TypeAlias = "bytes | memoryview"


class Buffer(Protocol):
    """Bytes that lie somewhere."""

    def read(self, start: int, length: int) -> Bytes: ...


@dataclass
class Counters:
    """What was done with weights; it does not depend on the clock.

    Attributes:
        decoded: bytes that became arrays of float64.
        made: bytes of arrays that were stored as new tensors.
        sessions: how often ONNX Runtime loaded a model with weights.
    """

    decoded: int = 0
    made: int = 0
    sessions: int = 0

    def reset(self) -> None:
        self.decoded = self.made = self.sessions = 0


COUNTERS = Counters()


class File:
    """A file that is read in parts; ``external`` if it holds weights and no model."""

    def __init__(self, path: Path, external: bool = False) -> None:
        self.path, self.external = path, external
        self._handle = path.open("rb", buffering=0)
        self._mapped: ref[mmap.mmap] | None = None  # a map takes memory: it goes with the last array that reads it
        self._found = self._state()

    def _state(self) -> tuple[int, int]:
        state = os.fstat(self._handle.fileno())
        return state.st_size, state.st_mtime_ns

    @property
    def size(self) -> int:
        return self._state()[0]

    @property
    def has_changed(self) -> bool:
        return self._state() != self._found

    def read(self, start: int, length: int) -> bytes:
        handle, found = self._handle.fileno(), b""
        while len(found) < length and (more := os.pread(handle, length - len(found), start + len(found))):
            found = found + more if found else more  # one call reads 2 GiB at most
        if len(found) < length:
            raise InputError(f"{self.path} ends within a tensor: it is damaged, or has changed")
        return found

    def mapped(self) -> memoryview:
        if not self.size:
            return memoryview(b"")
        if self._mapped is None or (held := self._mapped()) is None:
            held = mmap.mmap(self._handle.fileno(), 0, access=mmap.ACCESS_READ)
            self._mapped = ref(held)
        return memoryview(held)

    def is_at(self, path: str) -> bool:
        """Whether this file is what lies at ``path`` now."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._handle.fileno()))
        except OSError:
            return False

    def close(self) -> None:
        self._handle.close()


class Stream:
    """Bytes in memory."""

    def __init__(self, data: Bytes) -> None:
        self._data = memoryview(data)

    def read(self, start: int, length: int) -> memoryview:
        return self._data[start : start + length]

    def mapped(self) -> memoryview:
        return self._data


class Given:
    """A tensor of the caller's model; protobuf copies its data whenever it hands them out."""

    def __init__(self, tensor: TensorProto) -> None:
        self.tensor = tensor

    def read(self, start: int, length: int) -> memoryview:
        return memoryview(self.tensor.raw_data)[start : start + length]


class _Holder:
    """The buffers of a `holding` block."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.arrays: WeakValueDictionary[Hashable, np.ndarray] = WeakValueDictionary()
        self.runtime: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()

    def add(self, buffer: Buffer) -> int:
        self.buffers.append(buffer)
        return len(self.buffers) - 1


_current: ContextVar[_Holder | None] = ContextVar("buffers", default=None)


@contextmanager
def holding() -> Iterator[None]:
    """Light models can be made and read inside, and only there. In another such block it changes nothing.

    Raises:
        InputError: a file that was read has changed in the meantime, so that nothing holds that was found.
    """
    if _current.get() is not None:
        yield
        return
    holder = _Holder()
    token = _current.set(holder)
    try:
        yield
        check_unchanged()
    except Exception:
        check_unchanged()
        raise
    finally:
        _current.reset(token)
        for buffer in holder.buffers:
            if isinstance(buffer, File):
                buffer.close()


def check_unchanged() -> None:
    """Raise InputError where a file that was read in this block, if it is one, has changed since."""
    for buffer in holder.buffers if (holder := _current.get()) else ():
        if isinstance(buffer, File) and buffer.has_changed:
            raise InputError(f"{buffer.path} has changed while it was read; run it again")


def _holder() -> _Holder:
    holder = _current.get()
    assert holder is not None, "light models live in a block of `holding`"
    return holder


# References


@record
class Place:
    """Where the bytes of a tensor lie."""

    buffer: Buffer
    start: int
    length: int

    def blocks(self) -> Iterator[Bytes]:
        for at in range(self.start, self.start + self.length, BLOCK):
            yield self.buffer.read(at, min(BLOCK, self.start + self.length - at))


def is_reference(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL and any(e.value.startswith(MARK) for e in tensor.external_data)


def _refer(tensor: TensorProto, number: int, start: int, length: int) -> TensorProto:
    """Have ``tensor``, which holds no data, refer to bytes of the buffer ``number``."""
    return _locate(tensor, f"{MARK}{number}", start, length)


def _locate(tensor: TensorProto, location: str, start: int, length: int) -> TensorProto:
    """Have ``tensor``, which holds no data, refer to bytes that lie there."""
    del tensor.external_data[:]
    entries = {"location": location, "offset": start, "length": length}
    tensor.external_data.extend(StringStringEntryProto(key=key, value=str(value)) for key, value in entries.items())
    tensor.data_location = TensorProto.EXTERNAL
    return tensor


def place(tensor: TensorProto) -> Place:
    """Where the bytes of a reference lie."""
    number, start, length = (entry.value for entry in tensor.external_data)
    return Place(_holder().buffers[int(number.removeprefix(MARK))], int(start), int(length))


def length(tensor: TensorProto) -> int:
    """The bytes that a tensor with raw data, or a reference, holds."""
    return int(tensor.external_data[2].value) if is_reference(tensor) else len(tensor.raw_data)


def array(tensor: TensorProto) -> np.ndarray:
    """The value of ``tensor``, a reference or not; not to be written to. While it is held, it is not read again."""
    is_external = tensor.data_location == TensorProto.EXTERNAL
    if not is_external or not is_reference(tensor):
        data = b"" if is_external else tensor.raw_data
        return _decoded(tensor, data) if data else numpy_helper.to_array(tensor)
    found = place(tensor)
    if isinstance(found.buffer, Made):
        return found.buffer.array.reshape(tensor.dims)
    key = (id(found.buffer), found.start, tensor.data_type, tuple(tensor.dims[:]))
    held = _holder().arrays
    if (known := held.get(key)) is None:
        held[key] = known = _decoded(tensor, found.buffer.read(found.start, found.length))
    return known


def _decoded(tensor: TensorProto, data: Bytes) -> np.ndarray:
    kind = tensor.data_type
    if kind in PACKED or kind in UNEVEN or sys.byteorder == "big":
        whole = TensorProto(dims=tensor.dims, data_type=kind, raw_data=bytes(data))
        return numpy_helper.to_array(whole)
    return np.frombuffer(data, helper.tensor_dtype_to_np_dtype(kind)).reshape(tensor.dims)


class Made:
    """An array that was made here."""

    def __init__(self, made: np.ndarray) -> None:
        self.array = made

    def read(self, start: int, length: int) -> memoryview:
        return memoryview(self.array.reshape(-1).view(np.uint8).data)[start : start + length]


def tensor(value: np.ndarray, name: str) -> TensorProto:
    """A tensor that holds ``value``, or refers to it where it is large."""
    value = np.asarray(value, order="C")
    COUNTERS.made += value.nbytes
    holder, kind = _current.get(), helper.np_dtype_to_tensor_dtype(value.dtype)
    if holder is None or value.nbytes <= LARGE or kind in PACKED or kind in UNEVEN or value.dtype.kind in "OSU":
        return numpy_helper.from_array(value, name)
    return _refer(TensorProto(name=name, dims=value.shape, data_type=kind), holder.add(Made(value)), 0, value.nbytes)


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """The tensors of the main graph that may be references."""
    yield from model.graph.initializer
    yield from (
        a.t for node in model.graph.node if node.op_type == "Constant" for a in node.attribute[:] if a.HasField("t")
    )


def references(model: ModelProto) -> list[TensorProto]:
    return [t for t in _tensors(model) if is_reference(t)]


def total(model: ModelProto) -> int:
    """The bytes of ``model`` with all its weights."""
    return model.ByteSize() + sum(length(t) for t in references(model))


# From a model, and to one


def check_loaded(model: ModelProto, way: str) -> None:
    """Raise InputError, with the ``way`` out, where weights of ``model`` lie in another file."""
    if any(t.data_location == TensorProto.EXTERNAL and not is_reference(t) for t in model.graph.initializer):
        raise InputError(f"the weights are in another file and not loaded; {way}")


def light(model: ModelProto) -> ModelProto:
    """A light copy of ``model``, which stays as it is and keeps its data; to be read in the same `holding` block.

    Raises:
        InputError: its weights lie in another file.
    """
    check_loaded(model, "load the model with onnx.load(path)")
    found = ModelProto()
    for descriptor, value in model.ListFields():
        if descriptor.name != "graph":
            _copy(found, descriptor.name, value)
    found.graph.SetInParent()
    for descriptor, value in model.graph.ListFields():
        match descriptor.name:
            case "initializer":
                found.graph.initializer.extend(_referring(t) for t in value)
            case "node":
                found.graph.node.extend(_with_reference(n) if n.op_type == "Constant" else n for n in value)
            case _:
                _copy(found.graph, descriptor.name, value)
    return found


def lightened(model: ModelProto) -> ModelProto:
    """``model``, or a light copy of it where it has no references."""
    return model if references(model) else light(model)


def _copy(message: Any, name: str, value: Any) -> None:
    field_ = getattr(message, name)
    if hasattr(field_, "extend"):
        field_.extend(value)
    elif hasattr(field_, "CopyFrom"):
        field_.CopyFrom(value)
    else:
        try:
            setattr(message, name, value)
        except UnicodeDecodeError as error:  # protobuf reads such text, and hands it out as bytes
            raise InputError(f"the model is damaged: its {name} is no text in UTF-8") from error


def _referring(t: TensorProto) -> TensorProto:
    """``t``, or a reference to it where it is large, and its data are as many as its shape says."""
    if t.data_location == TensorProto.EXTERNAL or not t.HasField("raw_data") or t.ByteSize() <= LARGE:
        return t
    made = TensorProto(dims=t.dims, metadata_props=t.metadata_props)
    for name in ("data_type", "name", "doc_string", "data_location"):
        if t.HasField(name):
            setattr(made, name, getattr(t, name))
    size = prod(t.dims[:]) * _itemsize(t.data_type)
    whole = made.ByteSize() + 1 + len(_as_varint(size)) + size  # its own data would be copied to be counted
    return _refer(made, _holder().add(Given(t)), 0, size) if size > LARGE and whole == t.ByteSize() else t


def _itemsize(kind: int) -> int:
    """Bytes of an entry; 0 where that is no whole number, or there is no such type."""
    if kind in PACKED or kind in UNEVEN or kind not in TensorProto.DataType.values():
        return 0
    return helper.tensor_dtype_to_np_dtype(kind).itemsize


def _with_reference(node: NodeProto) -> NodeProto:
    if node.ByteSize() <= LARGE:
        return node
    made = NodeProto()
    for descriptor, value in node.ListFields():
        if descriptor.name != "attribute":
            _copy(made, descriptor.name, value)
    for a in node.attribute[:]:
        copy = made.attribute.add()
        for descriptor, value in a.ListFields():
            _copy(copy, descriptor.name, _referring(value) if descriptor.name == "t" else value)
    return made


def fill(model: ModelProto) -> ModelProto:
    """``model`` with all data in it again."""
    for t in references(model):
        _inlined(t)
    return model


def _inlined(t: TensorProto) -> None:
    found = place(t)
    t.raw_data = bytes(found.buffer.read(found.start, found.length))
    del t.external_data[:]
    t.ClearField("data_location")


# From bytes, and to bytes: the wire format of protobuf, read just as far as needed

_INSIDE = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor"},
}
"""Where large tensors lie: the numbers of the fields that lead to them."""
RAW_DATA, DATA_LOCATION, EXTERNAL_DATA = 9, 14, 13

Piece: TypeAlias = "Bytes | Place"
_Change: TypeAlias = "Callable[[Any, int, int], list[Piece] | None]"


def _varint(data: Any, at: int) -> tuple[int, int]:
    found = shift = 0
    while True:
        byte = data[at]
        at += 1
        found |= (byte & 127) << shift
        if byte < 128:
            return found, at
        shift += 7
        if shift > 63:
            raise DecodeError("a number is too long")


def _as_varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


_WIDTHS = {1: 8, 5: 4}


def _fields(data: Any, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Each field of a message: its number, and where it starts, where its content starts, and where it ends."""
    at = start
    while at < stop:
        first = at
        tag, at = _varint(data, at)
        kind, content = tag & 7, at
        if kind == 2:
            size, content = _varint(data, at)
            at = content + size
        elif kind == 0:
            _, at = _varint(data, at)
        elif kind in _WIDTHS:
            at += _WIDTHS[kind]
        else:
            raise DecodeError(f"there is no field of kind {kind}")
        if at > stop:
            raise DecodeError("a field ends after its message")
        yield tag >> 3, first, content, at


def size(pieces: Iterable[Piece]) -> int:
    return sum(p.length if isinstance(p, Place) else len(p) for p in pieces)


def _changed(
    kind: str, data: Any, start: int, stop: int, enters: Callable[[int, int], bool], change: _Change
) -> list[Piece] | None:
    """The message with the tensors that are entered as ``change`` has them; None where nothing changes."""
    if kind == "tensor":
        return change(data, start, stop)
    if kind == "node" and not _is_constant(data, start, stop):
        return None
    pieces: list[Piece] = []
    done = start
    for number, first, content, end in _fields(data, start, stop):
        inner = _INSIDE[kind].get(number)
        if inner is None or not enters(content, end):
            continue
        found = _changed(inner, data, content, end, enters, change)
        if found is not None:
            pieces += [data[done:first], _as_varint(number << 3 | 2), _as_varint(size(found)), *found]
            done = end
    if not pieces:
        return None
    return [*pieces, data[done:stop]]


def _is_constant(data: Any, start: int, stop: int) -> bool:
    names = {number: bytes(data[a:b]) for number, _, a, b in _fields(data, start, stop) if number in (4, 7)}
    return names.get(4) == b"Constant" and names.get(7, b"") in (b"", b"ai.onnx")


def parse(buffer: File | Stream) -> ModelProto:
    """The light model whose serialized form is in ``buffer``.

    Raises:
        DecodeError: it is none.
    """
    number = _holder().add(buffer)

    def change(data: Any, start: int, stop: int) -> list[Piece] | None:
        pieces: list[Piece] = []
        found = None
        for field_number, first, content, end in _fields(data, start, stop):
            if field_number == RAW_DATA and found is None and end - content > LARGE:
                found = content, end - content
            elif field_number in (EXTERNAL_DATA, RAW_DATA) or (field_number == DATA_LOCATION and data[content]):
                return None
            elif field_number != DATA_LOCATION:
                pieces.append(data[first:end])
        return None if found is None else [*pieces, _refer(TensorProto(), number, *found).SerializeToString()]

    data = buffer.mapped()
    try:
        pieces = _changed("model", data, 0, len(data), lambda start, stop: stop - start > LARGE, change)
    except IndexError as error:
        raise DecodeError("it ends within a field") from error
    whole: Any = data if pieces is None else b"".join(pieces)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return ModelProto.FromString(whole)


def attach(model: ModelProto, tensors: Iterable[TensorProto], folder: Path) -> None:
    """Have the tensors of ``model`` that lie in other files of ``folder`` refer to these.

    Others among ``tensors``, which are all of it, and small ones are read.

    Raises:
        InputError: a file is not in the folder, or holds less.
    """
    numbers: dict[str, int] = {}
    for t in _tensors(model):
        if t.data_location == TensorProto.EXTERNAL and not is_reference(t):
            _attach(t, numbers, folder)
            if length(t) <= LARGE:
                _inlined(t)
    for t in tensors:
        if t.data_location == TensorProto.EXTERNAL and not is_reference(t):
            _inlined(_attach(t, numbers, folder))


def _attach(t: TensorProto, numbers: dict[str, int], folder: Path) -> TensorProto:
    entries = {entry.key: entry.value for entry in t.external_data}
    location = entries.get("location", "")
    if location not in numbers:
        numbers[location] = _holder().add(File(_inside(folder, location, t.name), external=True))
    file = _holder().buffers[numbers[location]]
    assert isinstance(file, File)
    start = _number(entries.get("offset", "0"), t.name)
    size = _number(entries["length"], t.name) if "length" in entries else _needed(t, max(file.size - start, 0))
    if start + size > file.size:
        raise InputError(f"{file.path} is too short: {t.name!r} should be {size} bytes from {start} on")
    return _refer(t, numbers[location], start, size)


def _needed(t: TensorProto, otherwise: int) -> int:
    """The bytes that the shape of ``t`` needs, where all its elements take whole ones."""
    if t.data_type in PACKED or t.data_type in UNEVEN or t.data_type not in helper.get_all_tensor_dtypes():
        return otherwise
    return max(prod(t.dims[:]), 0) * helper.tensor_dtype_to_np_dtype(t.data_type).itemsize


def _inside(folder: Path, location: str, name: str) -> Path:
    path = folder / location
    if not location or not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"the weights of {name!r} are in {location!r}, which is not in the folder of the model")
    if path.exists() and not path.is_file():
        raise InputError(f"the weights of {name!r} are in {location!r}, which is no regular file")
    return path


def _number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise InputError(f"the place of the tensor {name!r} in its file is {text[:40]!r}, which is no number")
    return int(text)


def has_read(path: Path) -> bool:
    """Whether the model in ``path`` was read in this `holding` block."""
    return any(isinstance(b, File) and not b.external and b.path == path for b in _holder().buffers)


def external_files() -> list[Path]:
    """The files beside models that were read in this `holding` block."""
    return [b.path for b in _holder().buffers if isinstance(b, File) and b.external]


def moved_out(model: ModelProto, location: str) -> tuple[ModelProto, list[Piece]]:
    """A copy of ``model`` whose references lie in one file ``location``, and what that holds."""
    copy = ModelProto()
    copy.CopyFrom(model)
    parts: list[Piece] = []
    at = 0
    for t in references(copy):
        where = place(t)
        gap = -at % ALIGNED
        parts += [bytes(gap), where]
        _locate(t, location, at + gap, where.length)
        at += gap + where.length
    return copy, parts


ALIGNED = 4096
"""Tensors in a file beside the model start at multiples of this, so that runtimes can map them."""


def pieces(message: Message) -> list[Piece]:
    """``message``, a light model or a part of one, serialized in parts; the data that it refers to are not read yet."""
    data = message.SerializeToString(deterministic=True)
    kind = _KINDS.get(type(message).__name__)
    if kind is None or (mark := MARK.encode()) not in data:
        return [data]
    found = _changed(kind, memoryview(data), 0, len(data), lambda a, b: data.find(mark, a, b) >= 0, _filled)
    return [data] if found is None else found


_KINDS = {"ModelProto": "model", "NodeProto": "node", "TensorProto": "tensor"}


def _filled(data: Any, start: int, stop: int) -> list[Piece] | None:
    """A tensor as protobuf would serialize it with its data in it; None where they are in it."""
    t = TensorProto.FromString(data[start:stop])
    if not is_reference(t):
        return None
    where = place(t)
    del t.external_data[:]
    t.ClearField("data_location")
    rest = TensorProto(metadata_props=t.metadata_props)
    del t.metadata_props[:]
    if t.HasField("doc_string"):
        rest.doc_string = t.doc_string
        t.ClearField("doc_string")
    head = _as_varint(RAW_DATA << 3 | 2) + _as_varint(where.length)
    return [t.SerializeToString(deterministic=True) + head, where, rest.SerializeToString(deterministic=True)]


def blocks(parts: Iterable[Piece]) -> Iterator[Bytes]:
    """What ``parts`` hold, one after the other, without holding it all."""
    for part in parts:
        if isinstance(part, Place):
            yield from part.blocks()
        else:
            yield part
    check_unchanged()


# For ONNX Runtime


@record
class ForRuntime:
    """A light model as a session takes it.

    Attributes:
        data: the serialized model.
        values: those of its references that lie in memory, by name. They must outlive the session, which copies them.
        is_large: whether two sessions should not map it at the same time.
    """

    data: bytes
    values: dict[str, Any]
    is_large: bool

    def set_in(self, options: Any) -> None:
        """Add to the options of a session what it needs for this model."""
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", ROOT)
        options.add_external_initializers(list(self.values), list(self.values.values()))
        options.enable_mem_pattern = False  # to plan where n weights lie takes n^2 steps, and runs are few


ROOT = os.path.abspath(os.sep)
"""The folder that the places of mapped tensors are relative to: ONNX Runtime takes no absolute ones."""


MAPS = (1, 21)
"""The version of ONNX Runtime from which on a model in memory may have its weights in files."""


TINY = 128
"""Bytes of an initializer that ONNX Runtime leaves in the graph."""


def for_runtime(model: ModelProto) -> ForRuntime:
    """A light ``model`` for ONNX Runtime, which maps what lies well in a file, and is given the values of the rest.

    Sessions that are open at the same time share values.
    """
    from onnxruntime import OrtValue, __version__

    COUNTERS.sessions += 1
    copy, maps = ModelProto(), tuple(map(int, __version__.split(".")[:2])) >= MAPS
    copy.CopyFrom(model)
    for t in copy.graph.initializer:
        if maps and is_reference(t) and (path := _mappable(t)) is not None:
            where = place(t)
            _locate(t, path, where.start, where.length)
    # ONNX Runtime moves those that are not tiny, and looks for each from the first on.
    copy.graph.initializer.sort(key=lambda t: t.ByteSize() < TINY)
    values: dict[str, Any] = {}
    named = [(t.name, t) for t in copy.graph.initializer]
    for node in copy.graph.node:
        if node.op_type == "Constant":
            named += [(node.output[0], a.t) for a in node.attribute[:] if a.HasField("t")]
    for name, t in named:
        if not is_reference(t):
            continue
        if t.data_type not in _PLAIN:
            _inlined(t)
            continue
        where = place(t)
        key = (id(where.buffer), where.start, t.data_type, tuple(t.dims[:]))
        held = _holder().runtime
        value = held.get(key)
        if value is None:
            value = held[key] = OrtValue.ortvalue_from_numpy(_aligned(t, where))
        values[name] = value
    return ForRuntime(copy.SerializeToString(), values, total(model) > FILE_LIMIT)


def _mappable(t: TensorProto) -> str | None:
    """The path, relative to `ROOT`, of the file that a reference can be mapped from; None where it cannot."""
    where, dtype = place(t), helper.tensor_dtype_to_np_dtype(t.data_type)
    if not isinstance(where.buffer, File) or t.data_type in PACKED or where.start % dtype.itemsize:
        return None
    path = os.path.abspath(where.buffer.path)
    if os.path.splitdrive(path)[0] != os.path.splitdrive(ROOT)[0] or not where.buffer.is_at(path):
        return None
    try:
        path.encode()
    except UnicodeEncodeError:
        return None
    return os.path.relpath(path, ROOT)


def _aligned(t: TensorProto, where: Place) -> np.ndarray:
    """As `array`, in memory that can be shared: mapped from the file where it lies well there."""
    if isinstance(where.buffer, File | Stream):
        dtype = helper.tensor_dtype_to_np_dtype(t.data_type)
        count = where.length // dtype.itemsize
        mapped = np.frombuffer(where.buffer.mapped(), dtype, count, where.start).reshape(t.dims)
        if mapped.flags.aligned:
            return mapped
    return np.require(array(t), requirements=["C", "A"])
