"""The record in an ONNX file: one entry of ``metadata_props`` for each fusion."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

from google.protobuf.message import Message
from onnx import ModelProto

from reparamc.errors import InputError
from reparamc.onnx import weights
from reparamc.report.data import Origin, Report
from reparamc.report.record import Record, compact, parsed

KEY = "reparamc.record."
"""Followed by the number of the fusion, from 1."""

STRUCTURE = "reparamc.structure."
"""The structure of the original of that fusion; see `reparamc.onnx.refresh`."""

_NUMBER = re.compile("[1-9][0-9]{0,17}")


def inscribe(model: ModelProto, report: Report, *, replace: bool = False) -> None:
    """Write what ``report`` says into ``model``, unless nothing was done to it. Other entries stay.

    ``replace``: in the place of what the last fusion wrote.
    """
    if report.changed and not report.original_kept:
        number = max((n for n, _ in _entries(model)), default=0) + 1
        report.result = graph_hash(model)
        if replace:
            number -= 1
            kept = [e for e in model.metadata_props if e.key not in (f"{KEY}{number}", f"{STRUCTURE}{number}")]
            del model.metadata_props[:]
            model.metadata_props.extend(kept)
        if report.structure:
            model.metadata_props.add(key=f"{STRUCTURE}{number}", value=report.structure)
        model.metadata_props.add(key=f"{KEY}{number}", value=compact(report.record()))


def records(model: ModelProto) -> list[Record]:
    """The records in ``model``, the first fusion first.

    Raises:
        InputError: one cannot be read.
    """
    found: dict[int, Record] = {}
    for number, text in _entries(model):
        if number in found:
            raise InputError(f"the metadata entry {KEY}{number} is there twice, so neither can be trusted; {_ADVICE}")
        try:
            found[number] = parsed(text)
        except ValueError as error:
            raise InputError(
                f"the metadata entry {KEY}{number} is no record that this version can read: {error}; {_ADVICE}"
            ) from error
    return [found[number] for number in sorted(found)]


def structures(model: ModelProto) -> list[str]:
    """The structures of the originals, the first fusion first; none unless every fusion left its own."""
    held = {e.key: e.value for e in model.metadata_props}
    found = [held.get(f"{STRUCTURE}{n}", "") for n in sorted(n for n, _ in _entries(model))]
    return found if all(found) else []


_ADVICE = "reparamc verify compares the model with its original"


def _entries(model: ModelProto) -> Iterator[tuple[int, str]]:
    for entry in model.metadata_props:
        if not isinstance(entry.key, str):
            continue  # protobuf hands out bytes where they are no UTF-8
        number = entry.key.removeprefix(KEY)
        if entry.key.startswith(KEY) and _NUMBER.fullmatch(number):
            yield int(number), entry.value


def stream_origin(data: bytes) -> Origin:
    """The hash of a file that was read from a stream."""
    return Origin(hashlib.sha256(data).hexdigest(), "file")


def model_origin(model: ModelProto) -> Origin:
    """The hash of ``model``, serialized; of its parts where it is too large for that."""
    if model.ByteSize() < weights.FILE_LIMIT:
        return Origin(hashlib.sha256(_bytes(model)).hexdigest(), "serialized ModelProto")
    return Origin(graph_hash(model), "parts of the graph")


def graph_hash(model: ModelProto) -> str:
    """SHA-256 of all that decides what ``model`` computes, part by part, so that it holds for models of any size.

    That is the main graph, the operator sets by which its operators are read, the functions that they may call, and
    the IR version, which says whether callers can override initializers. Names, notes, metadata of the model and
    the types noted for inner values decide nothing.
    """
    digest = hashlib.sha256()
    graph = model.graph
    opsets = sorted(("" if o.domain == "ai.onnx" else o.domain, o.version) for o in model.opset_import)
    heads = [f"ir {model.ir_version}", *(f"opset {version} {domain}" for domain, version in opsets)]
    _add(digest, ([head.encode()] for head in heads), len(heads))
    for group in (
        graph.input,
        graph.node,
        graph.initializer,
        graph.sparse_initializer,
        graph.output,
        graph.quantization_annotation,
        model.functions,
    ):
        _add(digest, map(weights.pieces, group), len(group))
    return digest.hexdigest()


def _add(digest: hashlib._Hash, parts: Iterable[Sequence[weights.Piece]], count: int) -> None:
    """Every part with its length, so that no two lists of parts give the same bytes."""
    digest.update(count.to_bytes(8, "little"))
    for pieces in parts:
        digest.update(weights.size(pieces).to_bytes(8, "little"))
        for block in weights.blocks(pieces):
            digest.update(block)


def _bytes(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)
