"""What the comparison of two models found: the figures of each output, the verdict, a table and JSON. Pure data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from reparamc import __version__
from reparamc.algebra.dtypes import kind_of
from reparamc.equivalence.difference import Difference, tolerance
from reparamc.report.text import line, several, table


@dataclass(frozen=True)
class OutputCheck:
    """How far one output lies from the original's.

    Attributes:
        output: its name in the original.
        max_abs: largest absolute difference of finite entries.
        max_rel: ``max_abs`` relative to the largest finite magnitude of the original's output; of whole numbers
            the share of entries that differ.
        ulps: largest distance in units in the last place of the output's dtype; None for whole numbers.
        noise: what rounding may be expected to do to ``max_rel``: the original's response to a perturbation
            of its inputs at rounding level, and one machine epsilon at least.
        allowed: the largest ``max_rel`` that is put down to rounding; None where the user gave tolerances.
        problem: why the outputs are not equal; empty where they are.
    """

    output: str
    max_abs: float
    max_rel: float
    ulps: int | None
    noise: float
    allowed: float | None
    problem: str

    @property
    def in_noise(self) -> float:
        """The error in units of the rounding to be expected."""
        return 0.0 if self.max_rel == 0 else self.max_rel / self.noise if self.noise else float("inf")

    @property
    def badness(self) -> tuple[bool, float]:
        """For finding the worst of several checks of one output."""
        return bool(self.problem), self.max_rel / self.allowed if self.allowed else self.max_rel


def check_output(
    output: str,
    found: Difference,
    noise: float,
    epsilon: float,
    floor: float = 0.0,
    given: tuple[float, float] | None = None,
) -> OutputCheck:
    """One output of the fused model against that of the original.

    Args:
        found: how far they lie apart.
        noise: the original's relative response to a perturbation at rounding level.
        epsilon: the machine epsilon that the output is judged by.
        floor: a largest absolute difference up to this is rounding in any case.
        given: ``(rtol, atol)`` to judge by instead, as in ``numpy.allclose``.
    """
    noise = max(noise, epsilon)
    allowed = None if given is not None else tolerance(noise, epsilon)
    problem = ""
    if not (found.same_shape and found.same_dtype):
        what = [f"{kind_of(a.dtype)} {list(a.shape)}" for a in (found.expected, found.actual)]
        problem = f"the original gives {what[0]}, the fused model {what[1]}"
        return OutputCheck(output, float("inf"), float("inf"), None, noise, allowed, problem)
    if not found.same_kind:
        what = [_not_finite(a) for a in (found.expected, found.actual)]
        problem = f"NaN or infinity in other places: {what[0]} in the original, {what[1]} in the fused model"
    elif given is not None:
        if not found.close(*given):
            problem = f"differs by {found.max_abs:.2g}, beyond rtol {given[0]:g} and atol {given[1]:g}"
    elif allowed is not None and not found.within(allowed) and found.max_abs > floor:
        of = "relative to its largest value" if found.rounds else "of its entries"
        problem = f"differs by {found.max_rel:.2g} {of}, {allowed:.1g} is what rounding explains"
    return OutputCheck(output, found.max_abs, found.max_rel, found.ulps, noise, allowed, problem)


def _not_finite(array: npt.NDArray) -> str:
    values = array.astype(np.float64)
    return f"{int(np.isnan(values).sum())} NaN and {int(np.isinf(values).sum())} infinite"


@dataclass(frozen=True)
class Disagreement:
    """The smallest input found for which the models differ.

    Attributes:
        reason: what differs, in one line.
        inputs: the input in words; empty where the models differ before anything is run.
        saved: the file that holds it.
    """

    reason: str
    inputs: str = ""
    saved: str | None = None


@dataclass
class Verification:
    """The outcome of comparing two models.

    Attributes:
        original, fused: what was compared.
        inputs: the inputs of the original, with dtype and declared sizes.
        outputs: the worst that was met of each output; of the failing input where there is one.
        compared: inputs on which both models ran and every output was compared.
        refused: inputs that the original refuses: sizes that it does not take.
        set_aside: inputs of large values by which the original itself overflows, and inputs at which rounding alone
            changes its outputs too much for a comparison.
        failure: why the models are not equal; None where they are.
        windows: how many tensors are proven "equal" for every input size, "rounded": equal up to the rounding of
            parameters that were combined in their own dtype, "different" or "undecided"; None where nothing was proven.
        doubt: why they may differ all the same, although no input shows it; empty where nothing speaks for that.
        notes: what a reader should know besides.
        seconds: wall time in all.
    """

    original: str
    fused: str
    inputs: list[str] = field(default_factory=list)
    outputs: list[OutputCheck] = field(default_factory=list)
    compared: int = 0
    refused: int = 0
    set_aside: int = 0
    failure: Disagreement | None = None
    windows: dict[str, int] | None = None
    doubt: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    version: str = __version__

    @property
    def equal(self) -> bool:
        """Whether no difference was found, and nothing speaks for one."""
        return self.failure is None and not self.doubt

    @property
    def verdict(self) -> str:
        """One line."""
        if self.failure is None:
            inputs = f"on {several(self.compared, 'input')}"
            if self.doubt:
                return f"not certain: no difference found {inputs}, but {self.doubt}"
            if self.windows is None:
                return f"no difference found {inputs}; nothing is proven"
            proven = self.windows["equal"] + self.windows.get("rounded", 0)
            if proven < (of := sum(self.windows.values())):
                return f"no difference found {inputs}; {proven} of {of} tensors proven"
            return f"equal within rounding, {inputs}"
        text = f"differs: {self.failure.reason}"
        if self.failure.inputs:
            text += f"; at input {self.failure.inputs}"
        if self.failure.saved:
            text += f"; saved to {self.failure.saved}"
        return text

    def to_json(self) -> str:
        data: dict[str, Any] = asdict(self)
        for entry, check in zip(data["outputs"], self.outputs, strict=True):
            entry["in_noise"] = check.in_noise
        return json.dumps({"equal": self.equal, "verdict": self.verdict, **data}, indent=2)

    def table(self) -> str:
        """A few lines for a terminal."""
        lines = [line("original", self.original), line("fused", self.fused)]
        lines += [line("input", text) for text in self.inputs]
        counts = several(self.compared, "input")
        counts += f", {self.refused} more that the original refuses" * bool(self.refused)
        counts += f", {self.set_aside} set aside as overflow or all rounding" * bool(self.set_aside)
        lines.append(line("compared", f"{counts} in {self.seconds:.1f} s"))
        if self.outputs:
            rows = [["output", "max abs", "max rel", "allowed", "error/rounding", "ULP"]]
            for c in self.outputs:
                allowed = "given" if c.allowed is None else f"{c.allowed:.1e}"
                ulps = "-" if c.ulps is None else f"{c.ulps:,}"
                rows.append([c.output, f"{c.max_abs:.1e}", f"{c.max_rel:.1e}", allowed, f"{c.in_noise:.2g}", ulps])
            problems = ["", *("  differs" * bool(c.problem) for c in self.outputs)]
            lines += ["", *(row + problem for row, problem in zip(table(rows), problems, strict=True))]
            lines.append("")
        if self.windows is not None:
            lines.append(line("tensors", _windows(self.windows)))
        lines += [line("note", note) for note in self.notes]
        lines.append(line("verdict", self.verdict))
        return "\n".join(lines)


def _windows(counts: dict[str, int]) -> str:
    in_all = sum(counts.values())
    text = f"{counts.get('equal', 0)} of {in_all} proven equal for every input size"
    if counts.get("rounded"):
        text += f", {counts['rounded']} up to the rounding of parameters"
    if counts.get("different"):
        text += f", {counts['different']} of another form"
    if counts.get("undecided"):
        text += f", {counts['undecided']} undecided: for these the inputs above are all the evidence"
    return text
