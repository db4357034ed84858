"""What fusing a model would do, and why everything else stays, from a `Report`."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Any

from reparamc.report.data import Refusal, Report
from reparamc.report.text import counts, several

FEW = 3
"""Places shown of each reason, unless all are wanted."""

_PARTICULARS = re.compile(r"'[^']*'|(?<=\bat )(?:\S+$|\S*[/._\d]\S*)|\b\d+(?:\.\d+)?(?:x\d+)*\b")


def grouped(kept: list[Refusal]) -> dict[str, list[Refusal]]:
    """``kept`` by reason, most frequent first; names and numbers in a reason do not make it another one.

    A reason that occurs in one wording only keeps it; otherwise "..." replaces what differs.
    """
    groups: dict[str, list[Refusal]] = {}
    for refusal in kept:
        groups.setdefault(_PARTICULARS.sub("...", refusal.reason), []).append(refusal)
    named = {}
    for general, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        wordings = {r.reason for r in group}
        named[wordings.pop() if len(wordings) == 1 else general] = group
    return named


def explain_text(report: Report, *, everything: bool = False) -> str:
    """A page for a terminal: regions that would be replaced, and what is left by reason.

    Args:
        everything: list every place, not the first few of each kind.
    """
    rewrites = report.rewrites
    lines = [f"would be replaced: {several(len(rewrites), 'region')}"]
    places = [f"{r.where}: {several(len(r.operators), 'operator')}, {counts(r.passes.items())}" for r in rewrites]
    lines += _listed(places, everything)
    folded = sum(report.passes.values()) - sum(n for r in rewrites for n in r.passes.values())
    if folded:
        lines.append(f"would be computed once: {several(folded, 'constant')}")
    before, after = report.before, report.after
    lines.append(
        f"that would leave {after.ops:,} of {before.ops:,} operators and {after.parameters:,} of {before.parameters:,} "
        "parameters"
    )
    lines += ["", f"would stay: {several(len(report.kept), 'place')}"]
    for reason, group in grouped(report.kept).items():
        lines.append(f"{len(group):>6}  {reason}")
        differ = any(r.reason != reason for r in group)
        places = [f"{r.where} ({r.name})" + (f": {r.reason}" if differ else "") for r in group]
        lines += [f"    {line}" for line in _listed(places, everything)]
    return "\n".join(lines)


def explain_json(report: Report) -> str:
    """The same, in full, for programs."""
    data: dict[str, Any] = {
        "version": report.version,
        "before": asdict(report.before),
        "after": asdict(report.after),
        "passes": report.passes,
        "rewrites": [asdict(r) for r in report.rewrites],
        "failed": [asdict(f) for f in report.failed],
        "kept": [
            {"reason": reason, "count": len(group), "places": [asdict(r) for r in group]}
            for reason, group in grouped(report.kept).items()
        ],
    }
    return json.dumps(data, indent=2)


def _listed(places: list[str], everything: bool) -> list[str]:
    shown = places if everything or len(places) <= FEW + 1 else places[:FEW]
    rest = len(places) - len(shown)
    return [f"    {place}" for place in shown] + ([f"    and {rest} more (--all)"] if rest else [])
