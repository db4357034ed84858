"""Files: ONNX models are read, and written all or nothing."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain, count
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto
from onnx.serialization import registry

from reparamc.errors import InputError, one_line
from reparamc.onnx import weights
from reparamc.onnx.check import graphs, tensors
from reparamc.onnx.record import inscribe
from reparamc.onnx.values import defined_names
from reparamc.onnx.weights import FILE_LIMIT
from reparamc.report.data import Origin, Report

STANDARD = Path("-")
"""In the place of a file: standard input, or standard output."""


def parsed(data: bytes, name: object) -> ModelProto:
    """The light model that ``data`` is, read from ``name``; its weights must be in it.

    Raises:
        InputError: it is no ONNX model; one line that names it.
    """
    try:
        model = weights.parse(weights.Stream(data))
    except (DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{name} is not an ONNX file: it cannot be parsed") from error
    return _checked(model, name)


def _checked(model: ModelProto, name: object) -> ModelProto:
    if not model.HasField("graph"):
        raise InputError(f"{name} is not an ONNX file: it holds no graph")
    if (text := _no_text(model)) is not None:
        raise InputError(f"{name} is damaged: the name {text[:40]!r} in it is no text in UTF-8")
    return model


def load(path: Path, target: Path | None = None) -> ModelProto:
    """The model in the file ``path``, external data included.

    Raises:
        InputError: there is no such file, or it is not ONNX, or its weights lie in ``target``; one line that names it.
    """
    with weights.holding():
        model = opened(path)
        check_keeps_weights(target)
        return weights.fill(model)


def opened(path: Path) -> ModelProto:
    """As `load`, but light."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the .onnx file in it")
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file; a model from a pipe is read from standard input, which is -")
    try:
        kind = registry.get_format_from_file_extension(path.suffix)
        model = _read(path) if kind in (None, "protobuf") else weights.light(onnx.load(path))
    except FileNotFoundError as error:
        missing = error.filename or path
        raise InputError(f"{missing}: no such file") from error
    except (DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not an ONNX file: it cannot be parsed") from error
    except (OSError, ValueError, RuntimeError, onnx.checker.ValidationError) as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from error
    return _checked(model, path)


def _read(path: Path) -> ModelProto:
    model = weights.parse(weights.File(path))
    weights.attach(model, (t for graph in graphs(model) for t in tensors(graph)), path.parent)
    return model


def file_origin(path: Path) -> Origin:
    """The hash of the file ``path``, and of the files beside it that hold its weights.

    Raises:
        InputError: one of them cannot be read.
    """
    with weights.holding():
        if not weights.has_read(path):
            opened(path)
        beside = {os.path.relpath(p, path.parent): p for p in weights.external_files()}
        return Origin(_hash_of(path), "file", {name: _hash_of(beside[name]) for name in sorted(beside)})


def _hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            block = memoryview(bytearray(1 << 20))
            while length := file.readinto(block):
                digest.update(block[:length])
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _no_text(model: ModelProto) -> bytes | None:
    """A name in ``model`` that is no UTF-8; None if all are. Protobuf lets them pass, and hands them out as bytes."""
    graph = model.graph
    values = (v for group in (graph.input, graph.output, graph.value_info) for v in group)
    names: Iterable[object] = chain(
        defined_names(graph),
        (o.domain for o in model.opset_import),
        (text for n in graph.node for text in (n.op_type, n.domain, *(a.name for a in n.attribute[:]))),
        (d.dim_param for v in values for d in v.type.tensor_type.shape.dim),
    )
    return next((name for name in names if isinstance(name, bytes)), None)


def check_target(source: Path, target: Path, in_place: bool = False) -> None:
    """Raise InputError unless a file can be written at ``target``, without touching ``source`` if not ``in_place``."""
    if target == STANDARD:
        return
    try:
        target.resolve()
        exists = target.exists()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{target} cannot be written: it is a link to itself, or its name is too long") from error
    if target.is_dir():
        raise InputError(f"{target} is a folder; give a file name for the output")
    if exists and not target.is_file():
        raise InputError(f"{target} is no regular file, and would be replaced by one; give another name")
    if not target.parent.is_dir():
        raise InputError(f"the folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"the folder {target.parent} cannot be written to")
    if not in_place and source.exists() and target.exists() and os.path.samefile(source, target):
        raise InputError(f"the output {target} is the input itself; give another name")


def check_keeps_weights(*targets: Path | None) -> None:
    """Raise InputError where one of ``targets`` is a file that holds weights of a model read in this block."""
    held = {path.resolve() for path in weights.external_files()}
    for target in targets:
        if target is not None and target != STANDARD and target.resolve() in held:
            raise InputError(f"{target} holds weights of the input; give another name")


def save_outcome(model: ModelProto, report: Report, source: Path | bytes, target: Path, *, record: bool = True) -> None:
    """Write the outcome of fusing ``source``, a file or its bytes, to ``target``, all of it or nothing.

    Where nothing was done, or the original is kept, that is the same bytes, unless its weights lie in other files. What
    is rewritten carries a ``record`` of that; see `reparamc.report.record`.

    Raises:
        InputError: the file cannot be written.
    """
    if (not report.changed or report.original_kept) and not weights.external_files():
        write_atomically(target, [source] if isinstance(source, bytes) else _content(source))
        return
    if record:
        inscribe(model, report)
    save(model, target)


def _content(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(weights.BLOCK):
            yield block


def save(model: ModelProto, path: Path) -> None:
    """Write ``model`` to ``path``, all of it or nothing.

    Weights beyond the file limit go to ``NAME.data`` beside it, and so do those of a model that was read from several
    files.

    Raises:
        InputError: the file cannot be written.
    """
    with weights.holding():
        model = weights.lightened(model)
        is_large = weights.total(model) >= FILE_LIMIT
        if not is_large and (path == STANDARD or not weights.external_files()):
            write_atomically(path, weights.blocks(weights.pieces(model)))
        elif path == STANDARD:
            raise InputError("the model is too large for one stream: its weights need a file of their own; give -o OUT")
        else:
            _save_beside(model, path.resolve())


def _save_beside(model: ModelProto, path: Path) -> None:
    """Write ``model`` to ``path``, and its weights to one file beside it."""
    names = (f"{path.name}{n}.data" for n in chain([""], (f".{n}" for n in count(1))))
    sources = {source.resolve() for source in weights.external_files()}
    data = next(p for name in names if (p := path.with_name(name)).resolve() not in sources)
    light, content = weights.moved_out(model, data.name)
    if not content:
        write_atomically(path, [light.SerializeToString()])
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".reparamc-", dir=path.parent) as folder:
            for name, blocks in ((data.name, weights.blocks(content)), (path.name, [light.SerializeToString()])):
                _write(Path(folder) / name, blocks)
            os.replace(Path(folder) / data.name, data)
            os.replace(Path(folder) / path.name, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


def write_atomically(path: Path, blocks: Iterable[weights.Bytes]) -> None:
    """Write ``blocks`` to ``path``, all of it or nothing; to standard output where that is "-".

    Raises:
        InputError: the file cannot be written.
    """
    try:
        if path == STANDARD:
            if sys.stdout is None:
                raise OSError("it is closed")
            sys.stdout.buffer.writelines(blocks)
            sys.stdout.buffer.flush()
            return
        path = path.resolve()  # a link keeps pointing where it does
        with tempfile.TemporaryDirectory(prefix=".reparamc-", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            _write(temporary, blocks)
            os.replace(temporary, path)
    except OSError as error:
        name = "standard output" if path == STANDARD else path
        raise InputError(f"{name} cannot be written: {error.strerror or error}") from error


def from_standard_input() -> tuple[ModelProto, bytes]:
    """The light model on standard input, and its bytes.

    Raises:
        InputError: they cannot be read, or are no ONNX model.
    """
    try:
        if sys.stdin is None:
            raise OSError("it is closed")
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise InputError(f"standard input cannot be read: {error.strerror or error}") from error
    model = parsed(data, "standard input")
    weights.check_loaded(model, "give the path of the model, so that they are found beside it")
    return model, data


def _write(path: Path, blocks: Iterable[weights.Bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(blocks)
