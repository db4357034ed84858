"""The audit of a fused ONNX file: what its record says, and whether that holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from reparamc.errors import InputError
from reparamc.onnx_fuse import load
from reparamc.onnx_record import file_origin, graph_hash, model_origin, records
from reparamc.onnx_verify import verify_onnx
from reparamc.record import Audit


def audit(model: str | os.PathLike[str], against: str | os.PathLike[str] | None = None, **options: Any) -> Audit:
    """Read the records of the fused file ``model``, and check what can be checked.

    Args:
        against: the original: is it the file that was fused, and is it equal to the fused one?
        options: for `verify_onnx`.

    Raises:
        InputError: there is no record, or none that can be read, or a file cannot be read or compared.
    """
    path = Path(model)
    fused = load(path)
    result = Audit(os.fspath(model), records(fused))
    if not result.records:
        raise InputError(
            f"{path} holds no record: reparamc did not fuse it, or found nothing to fuse, or the record was removed; "
            "reparamc verify compares it with its original"
        )
    result.unchanged = graph_hash(fused) == result.records[-1]["result"]
    if not result.unchanged:
        result.problems.append(
            "the graph was changed after the fusion, or its operator sets or functions were: "
            "the record describes an earlier form of it"
        )
    if against is None:
        return result
    original = Path(against)
    theirs = load(original)
    result.against = os.fspath(against)
    known = [file_origin(original).record(), model_origin(theirs).record()]
    result.matches = next((n for n, r in enumerate(result.records, 1) if r["input"] in known), 0)
    if not result.matches:
        result.problems.append(f"{original} is not what was fused: its hash is {known[0]['sha256']}")
    del fused, theirs
    result.verification = verify_onnx(original, path, **options)
    if not result.verification.equal:
        result.problems.append("the models differ")
    return result
