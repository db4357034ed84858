"""What is wrong or not proven in a plan that was carried out is undone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from reparamc.algebra.equal import REGION_TOLERANCE, compare_expressions
from reparamc.algebra.expr import Expr, Source, replaced, walk
from reparamc.algebra.records import record
from reparamc.compiler.attempt import Attempt
from reparamc.compiler.graph import Edit, Splice
from reparamc.compiler.host import ResultT, Trial
from reparamc.errors import VerificationError, one_line
from reparamc.report.data import Certified, FailedRegion, Refusal

if TYPE_CHECKING:  # without verification these are not needed
    from reparamc.certificate.proof import Certificate
    from reparamc.equivalence.end_to_end import Region

UNPROVEN = "the result could not be proven equal to the original"


@record
class _Finding:
    """Why an edit is undone; ``check`` says which check found it wrong, and is empty where none did."""

    reason: str
    check: str = ""


@dataclass
class Proven:
    """What is proven of what is left, and what the report says of what was undone."""

    certificate: Certified
    failed: list[FailedRegion] = field(default_factory=list[FailedRegion])
    kept: list[Refusal] = field(default_factory=list[Refusal])


def prove(attempt: Attempt[ResultT], *, is_compared: bool) -> Proven:
    """Prove what was carried out, and undo what is wrong.

    Unless both models are compared afterwards, what is neither proven nor confirmed by a run of it alone is undone,
    too: nothing else would look at it.

    Raises:
        VerificationError: something differs that no edit is to blame for.
    """
    start = perf_counter()
    findings: dict[Edit, _Finding] = {}
    while True:
        found = _certificate(attempt)
        if not attempt.edits:
            break
        fresh = _disproved(attempt, found) or _sampled(attempt, found)
        if not fresh and not is_compared:
            fresh = _doubted(attempt, found)
        if not fresh:
            break
        findings.update(fresh)
        attempt.leave_out({attempt.unit(edit) for edit in fresh})
    return _told(attempt, findings, found, perf_counter() - start)


def _certificate(attempt: Attempt[ResultT]) -> Certificate:
    """What can be proven; where the proof fails as a whole, all that was rewritten is undecided."""
    from reparamc.certificate.proof import Certificate, Window

    if not attempt.edits:
        return Certificate((), 0, 0.0)
    try:
        return attempt.host.certify(attempt.result)
    except VerificationError:
        raise
    except Exception as error:  # whatever a graph raises that no reader has thought of
        reason = f"the proof stopped at {type(error).__name__}: {one_line(error)}"
        where = dict.fromkeys(name for names in _shown(attempt).values() for name in names)
        return Certificate(tuple(Window(name, "undecided", reason=reason) for name in where), 0, 0.0)


def _shown(attempt: Attempt[ResultT]) -> dict[Edit, set[str]]:
    host = attempt.host
    found = {edit: set(host.shown(edit, attempt.result)) for edit in attempt.edits}
    for splice in attempt.splices:
        found[splice].update(map(host.tensor, splice.narrows))
    return found


def _reasons(found: Certificate, verdict: str) -> dict[str, str]:
    return {w.where: w.reason for w in found.windows if w.verdict == verdict}


def _disproved(attempt: Attempt[ResultT], found: Certificate) -> dict[Edit, _Finding]:
    """The edits that are proven wrong."""
    wrong = _reasons(found, "different")
    if not wrong:
        return {}
    blamed = {
        edit: _Finding(wrong[name], "certificate")
        for edit, names in _shown(attempt).items()
        for name in names
        if name in wrong
    }
    if not blamed:
        where, reason = next(iter(wrong.items()))
        raise VerificationError(
            f"{where!r} differs from the original: {reason}; nothing was changed. Report this as a bug", where=where
        )
    return blamed


def _sampled(attempt: Attempt[ResultT], found: Certificate) -> dict[Edit, _Finding]:
    """The edits that are not proven, and wrong on samples; each is sampled once."""
    proven = {w.where for w in found.windows if w.verdict == "equal"}
    wrong: dict[Edit, _Finding] = {}
    for splice in attempt.splices:
        if splice.original is None or splice in attempt.sampled or attempt.host.tensor(splice.root) in proven:
            continue
        attempt.sampled.add(splice)
        try:
            error = attempt.errors[splice] = compare_expressions(splice.original, _over(splice.original, splice.expr))
        except ValueError as unsampled:
            wrong[splice] = _Finding(f"it cannot be verified: {unsampled}")
            continue
        if not error <= REGION_TOLERANCE:
            wrong[splice] = _Finding(f"it differs by {error:.2g} (relative, in float64)", "rewrite")
    return wrong


def _over(original: Expr, expr: Expr) -> Expr:
    """``expr`` over the sources of ``original``: where regions share operators, those of another one may be in it.

    Raises:
        ValueError: it reads a value that the original does not.
    """
    own = {e.key: e for e in walk(original) if isinstance(e, Source)}
    for e in [e for e in walk(expr) if isinstance(e, Source)]:
        if e.key not in own:
            raise ValueError("it reads another value than its region")
        expr = replaced([expr], e, own[e.key])[expr]
    return expr


def _doubted(attempt: Attempt[ResultT], found: Certificate) -> dict[Edit, _Finding]:
    """The edits that are not proven, but for those that a run of them alone confirms; all if none is to blame."""
    undecided = _reasons(found, "undecided")
    if not undecided:
        return {}
    shown = _shown(attempt)
    ends = {
        name: [attempt.host.tensor(edit.root) for edit, names in shown.items() if name in names] for name in undecided
    }
    alone = _run_alone(attempt, dict.fromkeys(n for name, roots in ends.items() for n in (name, *roots)))
    verdicts = {name: alone[name] for name in undecided if name in alone}
    verdicts |= {name: alone[r] for name, roots in ends.items() for r in roots if alone.get(r)}
    doubts = {
        name: _Finding(verdicts.get(name) or f"{UNPROVEN}: {reason}", "run" if name in verdicts else "")
        for name, reason in undecided.items()
        if verdicts.get(name) != ""
    }
    if not doubts:
        return {}
    blamed = {edit: doubts[name] for edit, names in shown.items() for name in names if name in doubts}
    if blamed:
        return blamed
    where = next(iter(doubts))
    return dict.fromkeys(shown, _Finding(f"{UNPROVEN}, because {where!r} is not: {undecided[where]}"))


def _run_alone(attempt: Attempt[ResultT], names: Iterable[str]) -> dict[str, str]:
    """For each tensor that can be run alone on both sides "" where it agrees within rounding, or how it differs."""
    from reparamc.equivalence.end_to_end import Region

    if any(s.narrows for s in attempt.splices):
        return {}
    regions = {region.root: region for region in attempt.regions()}
    asked: dict[str, Region | None] = {}
    for name in names:
        if name not in regions and (operands := attempt.host.operands(name)) is not None:
            regions[name] = Region(name, tuple(operands), name, "", "")
        asked[name] = regions.get(name)
    verdicts: dict[str, str] = {}
    for trial in attempt.host.trials(attempt.result, list(regions.values())):
        for name, region in asked.items():
            verdict = _outputs_agree(trial, regions) if region is None else _agrees(trial, region)
            if verdict is not None:
                verdicts[name] = verdicts.get(name) or verdict
    return verdicts


def _agrees(trial: Trial, region: Region) -> str | None:
    """ "" if ``region`` agrees, else how it differs; None where it was not run."""
    from reparamc.equivalence.end_to_end import region_error

    seen, epsilon = trial
    if region.root not in seen.actual or region.root not in seen.expected:
        return None
    _, error, allowed = region_error(seen, region, epsilon)
    if error <= allowed:
        return ""
    size = f"by {error:.2g} relative to the largest value of a channel" if np.isfinite(error) else "in kind"
    return f"run alone on the values of the original, it differs {size}, where {allowed:.1g} is rounding"


def _outputs_agree(trial: Trial, regions: Mapping[str, Region]) -> str | None:
    """As `_agrees`, for what concerns the model as a whole: its outputs from where the last regions end."""
    from reparamc.equivalence.end_to_end import Region

    outputs = [name for name in trial[0].expected if name not in regions]
    verdicts = [_agrees(trial, Region(name, (), name, "", "")) for name in outputs]
    return next((v for v in verdicts if v != ""), "" if verdicts else None)


def _told(attempt: Attempt[ResultT], findings: Mapping[Edit, _Finding], found: Certificate, seconds: float) -> Proven:
    undecided = tuple(Refusal(w.where, "certificate", w.reason) for w in found.windows if w.verdict == "undecided")
    told = Proven(Certified(found.equal, undecided, len(findings), found.units, found.bound, seconds))
    graph = attempt.plan.graph
    blamed = {attempt.unit(edit): graph.name(edit.root) for edit in findings}
    for edit in (*attempt.plan.splices, *attempt.plan.folds):
        where, finding = graph.name(edit.root), findings.get(edit)
        if finding is None:
            if (other := blamed.get(attempt.unit(edit))) is not None:
                why = f"it pays only together with {other!r}, which is undone"
                told.kept.append(Refusal(where, "certificate", why))
            continue
        told.kept.append(Refusal(where, "certificate", finding.reason))
        if finding.check and isinstance(edit, Splice):
            told.failed.append(
                FailedRegion(where, finding.check, None, 0.0, (*edit.counts,), edit.before, edit.after, finding.reason)
            )
    return told
