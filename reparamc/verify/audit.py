"""The audit of a fused ONNX file: what its record says, and whether that holds."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reparamc.errors import InputError
from reparamc.onnx.files import file_origin, load
from reparamc.onnx.record import graph_hash, model_origin, records
from reparamc.report.record import Record, page, printable
from reparamc.report.text import line
from reparamc.verify.result import Verification
from reparamc.verify.search import verify_onnx


@dataclass
class Audit:
    """What was found out about a fused model.

    Attributes:
        model: what was read.
        records: one for each fusion, the first first.
        unchanged: whether the model is as the last fusion left it: its graph, operator sets and functions.
        against: the original that was given; None where there was none.
        matches: which record, counted from 1, was made from ``against``; 0 for none of them.
        verification: ``against`` compared with the model.
    """

    model: str
    records: list[Record]
    unchanged: bool | None = None
    against: str | None = None
    matches: int = 0
    verification: Verification | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether all that could be checked is as the records say."""
        return not self.problems

    def to_json(self) -> str:
        data: dict[str, Any] = {
            "model": self.model,
            "holds": self.holds,
            "problems": self.problems,
            "unchanged": self.unchanged,
            "records": self.records,
        }
        if self.against is not None:
            data |= {"against": self.against, "matches": self.matches}
        if self.verification is not None:
            data["verification"] = json.loads(self.verification.to_json())
        return json.dumps(data, indent=2)

    def page(self, everything: bool = False) -> str:
        """A page to read; with ``everything`` all regions are listed."""
        lines = [line("model", self.model)]
        for number, record in enumerate(self.records, 1):
            lines += ["", f"fusion {number} of {len(self.records)}", *page(record, everything)]
        lines.append("")
        if self.unchanged is not None:
            lines.append(line("graph", "as the fusion left it" if self.unchanged else "changed since"))
        if self.against is not None:
            which = f"what fusion {self.matches} was made from" if self.matches else "nothing that was fused here"
            lines.append(line("against", f"{self.against}: {which}"))
        if self.verification is not None:
            lines.append(line("compared", self.verification.verdict))
        lines += [line("problem", problem) for problem in self.problems]
        return "\n".join(map(printable, lines)).rstrip()


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
        result.problems.append("the models differ" if result.verification.failure else result.verification.verdict)
    return result
