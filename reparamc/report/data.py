"""What was done to a model and what was left, for people and for programs."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from types import SimpleNamespace
from typing import Any

from reparamc import __version__
from reparamc.algebra.records import record
from reparamc.report.text import counts, line, several, table


@record
class Counts:
    """The size of a graph: ``ops`` without Constant and Identity, ``parameters`` in elements of float constants."""

    ops: int
    conv: int
    batchnorm: int
    parameters: int


@record
class Rewrite:
    """One region that was replaced.

    Attributes:
        where: the operator that the region ended in.
        operators: all operators it consisted of.
        passes: how often each pass applied.
        parameters: names of the parameters that went into the new ones.
        before, after: both forms as text; empty where no one was to read them.
        error: largest difference in float64 on samples, relative; None when it was not sampled, because it is proven,
            or nothing is verified.
        tensors: names of the new parameters.
    """

    where: str
    operators: tuple[str, ...]
    passes: dict[str, int]
    parameters: tuple[str, ...]
    before: str
    after: str
    error: float | None
    tensors: tuple[str, ...] = ()


@record
class Refusal:
    """A linear structure that stays: where, which pass declined, and why."""

    where: str
    name: str
    reason: str


@record
class FailedRegion:
    """A region whose replacement failed a check: it was left as it was, and the rest of the graph was rewritten.

    Attributes:
        where: the operator that the region ends in.
        check: "rewrite" where the two forms differ on samples; "reading" where the framework's own operators give
            something else than what reparamc takes the region for; "certificate" where what was emitted is proven
            to differ, "run" where it differed when it ran, as ``detail`` describes.
        error: of the worst element, relative to the terms it is the sum of; None where shapes or NaN patterns differ.
        passes: what was applied to it.
        before, after: both forms as text.
        detail: what the certificate, or the run, found.
    """

    where: str
    check: str
    error: float | None
    tolerance: float
    passes: tuple[str, ...]
    before: str
    after: str
    detail: str = ""

    @property
    def reason(self) -> str:
        """What is wrong, in words."""
        if self.check == "certificate":
            return f"it is proven to differ from the original: {self.detail}"
        if self.check == "run":
            return f"it was run beside the original: {self.detail}"
        size = "in kind" if self.error is None else f"by {self.error:.2g} (relative, in float64)"
        if self.check == "reading":
            return f"the framework's own operators differ {size} from what they are read as"
        return f"the rewritten form differs {size} from the original after {', '.join(self.passes)}"


@record
class HostCheck:
    """What the framework's own operators said, once per kind of region.

    Attributes:
        kinds: kinds of region that they were run for.
        unable: one place of every kind for which they could not, with the reason: there, nothing but the way that
            reparamc reads its operators was checked.
    """

    kinds: int
    unable: list[Refusal]


@record
class OutputError:
    """End-to-end difference of one output, relative to its largest magnitude, and the tolerance it was held to.

    Attributes:
        tolerance: None where rounding alone makes another output of it, so that its regions were judged instead.
        alone: this is no output but a region, named by where it ends, that was fed with the original's own values.
            Figures are those of its worst channel.
        in_float32: the runtime lacks operators of the dtype of the model, and both models ran in float32.
    """

    output: str
    max_abs: float
    max_rel: float
    tolerance: float | None
    alone: bool = False
    in_float32: bool = False

    @property
    def closeness(self) -> float:
        """The error in parts of what is allowed; 0 where nothing is."""
        return self.max_rel / self.tolerance if self.tolerance else 0.0


@record
class Certified:
    """What was proven of the result, for every input size; see `reparamc.certificate.proof`.

    Attributes:
        equal: how many windows are proven.
        undecided: those that are not, each with the reason. They were checked on samples only.
        rolled_back: rewrites that were undone because they were found to be wrong; they are among `Report.kept` and
            `Report.failed`.
        units: the largest error of a coefficient, in units of what the rounding of parameters explains.
        bound: how far a window can be off, relative to the sum of the magnitudes of the products it is added up from.
        seconds: wall time of the proof.
    """

    equal: int
    undecided: tuple[Refusal, ...]
    rolled_back: int
    units: float
    bound: float
    seconds: float


@record
class Latency:
    """Original and result timed in turns in ONNX Runtime.

    Attributes:
        original, result: median seconds of one run.
        ratio: median over the turns of result / original.
        low, high: interval that holds the true median ratio with 95 % confidence.
        turns: how often each was run.
    """

    original: float
    result: float
    ratio: float
    low: float
    high: float
    turns: int

    @property
    def faster(self) -> bool:
        """Whether the result is faster than the original, beyond noise."""
        return self.high < 1


@record
class Origin:
    """What was fused, by its SHA-256.

    Attributes:
        sha256: the hash, in hexadecimal digits.
        of: what is hashed: "file", "serialized ModelProto", "parameters and buffers".
        data: hashes of the files beside a model that hold its weights, by their names.
    """

    sha256: str
    of: str
    data: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "of": self.of} | ({"data": self.data} if self.data else {})


@record
class Part:
    """A part of a module: where, how it was fused ("torch.fx", "torch.export", or "as it is"), and why that way.

    Attributes:
        conv, batchnorm: how many are in it now.
    """

    where: str
    how: str
    why: str
    conv: int
    batchnorm: int


@dataclass
class Report:
    """The outcome of one fusion.

    In a file it is plain data with the same attributes, for which reparamc is not needed.

    Attributes:
        passes: applications of each selected pass, in pass order.
        rewrites: the regions replaced.
        kept: what was declined and why.
        failed: regions whose replacement was wrong, and which were therefore left: each a bug in reparamc.
        host: the outcome of running regions by the framework's own operators; None when regions were not verified.
        end_to_end: one entry per output, and one per region where regions were compared by themselves; empty when that
            check was off or could not run.
        note: why the end-to-end check did not run, or which inputs a module traced by torch.export takes.
        seconds: wall time of each phase.
        certificate: what was proven; None when that was not asked for, or nothing was rewritten.
        latency: both models timed; None when that was not asked for, or nothing was rewritten.
        objective: what was to become small.
        level: how much was verified: "off", "region" or "full".
        origin: what was fused; None where that is not known.
        result: SHA-256 of the fused graph; None where that is not known.
        history: records of earlier fusions of the same module; an ONNX model carries its own.
        parts: the parts of a module that was not fused as one graph.
        provenance: for every new parameter the names of the original ones that it is made from: those of the operators
            that went into its own. An operator that is found by its impulse response, or that is split, names those
            of its whole region.
        remarks: what is odd about the input, but no reason to refuse it.
        structure: the original without its parameters, with which an ONNX file can be refreshed; in no other output.
    """

    before: Counts
    after: Counts
    passes: dict[str, int]
    rewrites: list[Rewrite] = field(default_factory=list)
    kept: list[Refusal] = field(default_factory=list)
    failed: list[FailedRegion] = field(default_factory=list)
    host: HostCheck | None = None
    end_to_end: list[OutputError] = field(default_factory=list)
    note: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    version: str = __version__
    latency: Latency | None = None
    objective: str = "latency"
    level: str = "full"
    origin: Origin | None = None
    result: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    certificate: Certified | None = None
    parts: list[Part] = field(default_factory=list)
    provenance: dict[str, tuple[str, ...]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    structure: str = field(default="", repr=False)

    def __str__(self) -> str:
        return self.table()

    def __deepcopy__(self, memo: dict[int, Any]) -> Report:
        made = copy.copy(self)
        memo[id(self)] = made
        for f in fields(self):
            setattr(made, f.name, copy.deepcopy(getattr(self, f.name), memo))
        return made

    def __copy__(self) -> Report:
        return Report(**{f.name: getattr(self, f.name) for f in fields(self)})

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            SimpleNamespace,
            (),
            {f.name: _plain(getattr(self, f.name)) for f in fields(self)} | {"records": self.records},
        )

    @property
    def records(self) -> list[dict[str, Any]]:
        """What a model with this report has to carry: the records that it had, and that of this fusion."""
        return [*self.history, *([self.record()] if self.changed and not self.original_kept else [])]

    @property
    def changed(self) -> bool:
        return any(self.passes.values())

    @property
    def original_kept(self) -> bool:
        """Whether the original was returned after all, because what is described here is not faster."""
        return self.latency is not None and not self.latency.faster

    @property
    def region_error(self) -> float | None:
        """Largest error of any region that was sampled; None when none was."""
        errors = [r.error for r in self.rewrites if r.error is not None]
        return max(errors, default=None)

    def record(self) -> dict[str, Any]:
        """What a fused model should carry of this: plain data, without times and paths."""
        return {
            "reparamc": self.version,
            "input": None if self.origin is None else self.origin.record(),
            "objective": self.objective,
            "verified": self.level,
            "size": {"before": asdict(self.before), "after": asdict(self.after)},
            "passes": {name: n for name, n in self.passes.items() if n},
            "regions": [{"at": r.where, "passes": r.passes, "error": _short(r.error)} for r in self.rewrites],
            "outputs": [
                {
                    "output": e.output,
                    "max_abs": _short(e.max_abs),
                    "max_rel": _short(e.max_rel),
                    "allowed": _short(e.tolerance),
                }
                for e in self.end_to_end
                if not e.alone
            ],
            "certificate": None
            if (c := self.certificate) is None
            else {"equal": c.equal, "undecided": len(c.undecided), "rolled back": c.rolled_back},
            "result": self.result,
        }

    @property
    def warning(self) -> str | None:
        """One line about what is odd, and the regions that failed their check; None when all is well."""
        lines = [*self.remarks]
        if self.failed:
            first, more = self.failed[0], len(self.failed) - 1
            others = f" and {more} more" if more else ""
            lines.append(
                f"region {first.where!r}{others} failed verification and stays as it was: {first.reason}. "
                "The rest is rewritten and verified. Please report this as a bug, with the model"
            )
        return "; ".join(lines) or None

    def to_json(self) -> str:
        data: dict[str, Any] = asdict(self)
        del data["structure"]
        data["region_error"] = self.region_error
        data["original_kept"] = self.original_kept
        return json.dumps(data, indent=2)

    def table(self) -> str:
        """A few lines for a terminal."""
        sizes = [["", "ops", "Conv", "BatchNorm", "parameters"]]
        for label, c in (("before", self.before), ("after", self.after)):
            sizes.append([f"{label:<10}", f"{c.ops:,}", f"{c.conv:,}", f"{c.batchnorm:,}", f"{c.parameters:,}"])
        lines = [*table(sizes), ""]
        lines.append(line("passes", counts(self.passes.items()) or "nothing to fuse"))
        if self.rewrites:
            error = self.region_error
            checked = "not verified" if error is None else f"largest error {error:.1e} (float64, relative)"
            lines.append(line("regions", f"{len(self.rewrites)} replaced, {checked}"))
        lines += self._checks()
        if (t := self.latency) is not None:
            figures = f"{1000 * t.original:.2f} ms before, {1000 * t.result:.2f} ms after"
            interval = f"ratio {t.ratio:.3f} ({t.low:.3f} to {t.high:.3f}, {t.turns} turns)"
            lines.append(line("latency", f"{figures}, {interval}"))
        if self.original_kept:
            lines.append(line("kept", "the original, unchanged: the fused model is not faster beyond noise"))
        if self.note:
            lines.append(line("note", self.note))
        lines.append(line("time", ", ".join(f"{phase} {s:.2f} s" for phase, s in self.seconds.items())))
        return "\n".join(lines)

    def _checks(self) -> list[str]:
        """What each check found, in the lines of the table."""
        lines: list[str] = []
        if self.host is not None and (self.host.kinds or self.host.unable):
            kinds = several(self.host.kinds, "kind of region", "kinds of region")
            agree = f"{kinds} re-run with the framework's own operators: all agree"
            unable = f"; {len(self.host.unable)} more could not be run" if self.host.unable else ""
            lines.append(line("reference", agree + unable))
        lines += [line("FAILED", f"{f.where}: {f.reason}; it stays as it was") for f in self.failed[:SHOWN]]
        if len(self.failed) > SHOWN:
            lines.append(line("", f"and {len(self.failed) - SHOWN} more"))
        lines += self._ways()
        if (c := self.certificate) is not None:
            undone = f", {c.rolled_back} rolled back" if c.rolled_back else ""
            undecided = f", {len(c.undecided)} undecided" if c.undecided else ""
            proven = f"{c.equal} of {c.equal + len(c.undecided)} tensors proven equal for every input size"
            lines.append(line("certified", f"{proven}{undecided}{undone}, {c.seconds:.2f} s"))
        outputs = sorted((e for e in self.end_to_end if not e.alone), key=lambda e: -e.closeness)
        for e in outputs[:SHOWN]:
            allowed = "which rounding alone explains" if e.tolerance is None else f"{e.tolerance:.1e} allowed"
            where = " in float32" * e.in_float32
            lines.append(line("output", f"{e.output}: largest error {e.max_rel:.1e} relative{where}, {allowed}"))
        if len(outputs) > SHOWN:
            lines.append(line("", f"and {len(outputs) - SHOWN} more outputs that are closer"))
        alone = [e for e in self.end_to_end if e.alone and e.tolerance]
        if alone:
            e = max(alone, key=lambda e: e.closeness)
            error = f"largest error {e.max_rel:.1e} relative to a channel, {e.tolerance:.1e} allowed, at {e.output}"
            lines.append(
                line("one by one", f"{several(len(alone), 'region')} run alone on the original's values: {error}")
            )
        return lines

    def _ways(self) -> list[str]:
        """The parts of a module that was not fused as one graph."""
        if not self.parts:
            return []
        fused = sum(p.how != "as it is" for p in self.parts)
        left: dict[str, list[Part]] = {}
        for p in sorted((p for p in self.parts if p.how == "as it is"), key=lambda p: -p.batchnorm):
            left.setdefault(p.why, []).append(p)
        lines = [line("parts", f"{fused} followed as graphs, {len(self.parts) - fused} left as they are")]
        for why, alike in [*left.items()][:SHOWN]:
            where = f"{alike[0].where or 'the model itself'}{f' and {len(alike) - 1} more' if alike[1:] else ''}"
            what = f"{sum(p.conv for p in alike)} Conv and {sum(p.batchnorm for p in alike)} BatchNorm stay"
            lines.append(line("", f"{where}: {what}{f'; {why}' if why else ''}"))
        return lines


SHOWN = 5
"""Outputs, failures and parts that a table shows."""


def _plain(value: Any) -> Any:
    """``value`` in types that Python itself has."""
    if is_dataclass(value) and not isinstance(value, type):
        return SimpleNamespace(**{f.name: _plain(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def _short(error: float | None) -> float | None:
    """Two digits: what follows them may depend on the number of threads."""
    return None if error is None else float(f"{error:.1e}")
