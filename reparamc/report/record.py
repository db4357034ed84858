"""What a fused model says of itself: from which original it was made, by which rewrites, and how well they agree.

A record is plain data, so that it can travel in a file: no times, no paths, and figures to two digits, so that fusing
the same model twice gives the same bytes. Its size grows with the number of regions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from reparamc.report.text import counts, line

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


LEVELS_OF_NESTING = 16
"""A record has five. What nests deeper is not a record, and could exhaust the reader of JSON."""

_COUNTS = {str: "a count"}
_SIZE = dict.fromkeys(("ops", "conv", "batchnorm", "parameters"), "a count")
_FORM: dict[str, Any] = {
    "reparamc": "a text",
    "input": (None, {"sha256": "a hash", "of": "a text"}),
    "objective": "a text",
    "verified": "a text",
    "size": {"before": _SIZE, "after": _SIZE},
    "passes": _COUNTS,
    "regions": [{"at": "a text", "passes": _COUNTS, "error": (None, "a number")}],
    "outputs": [{"output": "a text", "max_abs": "a number", "max_rel": "a number", "allowed": (None, "a number")}],
    "certificate": (None, _COUNTS),
    "result": "a hash",
}
"""The form of a record in a file. A dict is an object that has these members, others beside them allowed; ``{str: x}``
any members that are x; a list holds any number of what it names; a pair may be null instead."""


def parsed(text: str) -> Record:
    """The record that ``text`` holds as JSON.

    Raises:
        ValueError: it holds none that this version can read; says why, in one line.
    """
    try:
        record = json.loads(text)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error
    except ValueError as error:
        raise ValueError(f"it is no JSON ({error})") from error
    level = [record]
    for _ in range(LEVELS_OF_NESTING):
        level = [x for e in level for x in (e.values() if isinstance(e, dict) else e if isinstance(e, list) else ())]
    if level:
        raise ValueError("it nests too deeply")
    if flaw := _flaw(record, _FORM, "it"):
        raise ValueError(flaw)
    if (files := (record["input"] or {}).get("data")) is not None and (flaw := _flaw(files, {str: "a hash"}, "'data'")):
        raise ValueError(flaw)
    return record


def _flaw(value: Any, form: Any, what: str) -> str:
    """Why ``value``, called ``what``, is not of the form; empty where it is."""
    match form:
        case (None, other):
            return "" if value is None else _flaw(value, other, what)
        case [inner]:
            if not isinstance(value, list):
                return f"{what} is {_kind(value)}, not a list"
            return next((flaw for x in value if (flaw := _flaw(x, inner, f"an entry of {what}"))), "")
        case dict():
            if not isinstance(value, dict):
                return f"{what} is {_kind(value)}, not an object"
            if str in form:
                return next((flaw for x in value.values() if (flaw := _flaw(x, form[str], f"an entry of {what}"))), "")
            if missing := next((key for key in form if key not in value), ""):
                return f"{what} lacks {missing!r}"
            return next((flaw for key in form if (flaw := _flaw(value[key], form[key], repr(key)))), "")
        case _:
            return "" if _IS[form](value) else f"{what} is {_kind(value)}, not {form}"


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and abs(float(value)) >= 0  # neither NaN nor beyond all floats
    except OverflowError:
        return False


_IS: dict[str, Callable[[Any], bool]] = {
    "a text": lambda x: isinstance(x, str),
    "a hash": lambda x: isinstance(x, str) and re.fullmatch("[0-9a-f]{64}", x) is not None,
    "a count": lambda x: type(x) is int and x >= 0,
    "a number": _is_number,
}


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a truth value"
        case list():
            return "a list"
        case dict():
            return "an object"
        case str():
            return "another text"
        case _:
            return "another number"


def page(record: Record, everything: bool) -> list[str]:
    """The lines of one record; without ``everything`` only the first regions."""
    source, sizes = record["input"], record["size"]
    lines = [line("by", f"reparamc {record['reparamc']}, for {record['objective']}")]
    if source is not None:
        lines.append(line("made from", f"{source['sha256']} (SHA-256 of the {source['of']})"))
        lines += [line("", f"{digest} (SHA-256 of {name})") for name, digest in (source.get("data") or {}).items()]
    lines.append(line("verified", _LEVELS.get(record["verified"], str(record["verified"]))))
    for output in record["outputs"]:
        allowed = output["allowed"]
        explained = "which rounding alone explains" if allowed is None else f"{allowed:.1e} allowed"
        lines.append(line("output", f"{output['output']}: largest error {output['max_rel']:.1e} relative, {explained}"))
    if (certified := record.get("certificate")) is not None:
        lines.append(line("tensors", ", ".join(f"{n} {verdict}" for verdict, n in certified.items())))
    for when in ("before", "after"):
        lines.append(line(when, ", ".join(f"{sizes[when][what]:,} {what}" for what in _SIZE)))
    lines.append(line("passes", counts(record["passes"].items())))
    regions = record["regions"]
    worst = max((r["error"] for r in regions if r["error"] is not None), default=None)
    error = "" if worst is None else f", largest error {worst:.1e} (float64, relative)"
    lines.append(line("regions", f"{len(regions)} replaced{error}"))
    shown = regions if everything else regions[:SHOWN]
    unsampled = "not verified" if record.get("certificate") is None else "proven"
    for region in shown:
        applied = ", ".join(name if n == 1 else f"{name} {n}" for name, n in region["passes"].items())
        figure = unsampled if region["error"] is None else f"{region['error']:.1e}"
        lines.append(f"    {region['at']}: {applied}; {figure}")
    if len(shown) < len(regions):
        lines.append(f"    and {len(regions) - len(shown)} more; --all lists them")
    return lines


def printable(text: str) -> str:
    """``text`` on one line whatever the names in it are: a record comes from anybody, and must not write our lines."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
