"""What a fused model says of itself: from which original it was made, by which rewrites, and how well they agree.

A record is plain data, so that it can travel in a file: no times, no paths, and figures to two digits, so that fusing
the same model twice gives the same bytes. Its size grows with the number of regions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from reparamc.report import Report
from reparamc.verification import Verification

Record = dict[str, Any]

SHOWN = 10
"""Regions that are listed unless all are asked for."""

_LEVELS = {
    "full": "every replacement in float64, and both models end to end",
    "region": "every replacement in float64",
    "off": "nothing",
}


def compact(record: Record) -> str:
    """``record`` as JSON in one line."""
    return json.dumps(record, separators=(",", ":"))


@dataclass
class Audit:
    """What was found out about a fused model.

    Attributes:
        model: what was read.
        records: one for each fusion, the first first.
        unchanged: whether the graph is as the last fusion left it; None where its record does not say.
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
        lines = [f"model      {self.model}"]
        for number, record in enumerate(self.records, 1):
            lines += ["", f"fusion {number} of {len(self.records)}", *_page(record, everything)]
        lines.append("")
        if self.unchanged is not None:
            lines.append(f"graph      {'as the fusion left it' if self.unchanged else 'changed since'}")
        if self.against is not None:
            which = f"what fusion {self.matches} was made from" if self.matches else "nothing that was fused here"
            lines.append(f"against    {self.against}: {which}")
        if self.verification is not None:
            lines.append(f"compared   {self.verification.verdict}")
        lines += [f"problem    {problem}" for problem in self.problems]
        return "\n".join(lines).rstrip()


def _page(record: Record, everything: bool) -> list[str]:
    source, sizes = record["input"], record["size"]
    lines = [f"by         reparamc {record['reparamc']}, for {record['objective']}"]
    if source is not None:
        lines.append(f"made from  {source['sha256']} (SHA-256 of the {source['of']})")
        lines += [f"           {digest} (SHA-256 of {name})" for name, digest in source.get("data", {}).items()]
    lines.append(f"verified   {_LEVELS.get(record['verified'], record['verified'])}")
    for output in record["outputs"]:
        figures = f"largest error {output['max_rel']:.1e} relative, {output['allowed']:.1e} allowed"
        lines.append(f"output     {output['output']}: {figures}")
    if (counts := record.get("certificate")) is not None:
        windows = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
        lines.append(f"windows    {windows}")
    for when in ("before", "after"):
        figures = ", ".join(f"{n:,} {what}" for what, n in sizes[when].items())
        lines.append(f"{when:<10} {figures}")
    lines.append("passes     " + ", ".join(f"{name} {n}" for name, n in record["passes"].items()))
    regions = record["regions"]
    worst = max((r["error"] for r in regions if r["error"] is not None), default=None)
    error = "" if worst is None else f", largest error {worst:.1e} (float64, relative)"
    lines.append(f"regions    {len(regions)} replaced{error}")
    shown = regions if everything else regions[:SHOWN]
    for region in shown:
        applied = ", ".join(name if n == 1 else f"{name} {n}" for name, n in region["passes"].items())
        figure = "not verified" if region["error"] is None else f"{region['error']:.1e}"
        lines.append(f"    {region['at']}: {applied}; {figure}")
    if len(shown) < len(regions):
        lines.append(f"    and {len(regions) - len(shown)} more; --all lists them")
    return lines


def records_of(report: Report) -> list[Record]:
    """The records that a model with this report has to carry: those it had, and that of this fusion."""
    return [*report.history, *([report.record()] if report.changed and not report.original_kept else [])]
