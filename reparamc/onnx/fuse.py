"""`fuse_onnx`: the whole way of an ONNX model, from checking to verification."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable
from functools import cached_property, partial
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

from onnx import ModelProto

from reparamc.algebra.cost import objective as priced_by
from reparamc.algebra.rewrite import Pass, select
from reparamc.certificate.onnx import certify_onnx
from reparamc.certificate.proof import Certificate
from reparamc.compiler.graph import Splice
from reparamc.compiler.pipeline import level_of
from reparamc.compiler.plan import make_plan
from reparamc.compiler.rollback import proven, regions_of, rewritten, undone
from reparamc.errors import InputError, InputTypeError, one_line
from reparamc.onnx.bodies import fuse_bodies, has_bodies, inlined, merged, resolve
from reparamc.onnx.check import check
from reparamc.onnx.constants import fold_constants
from reparamc.onnx.end_to_end import verify_end_to_end
from reparamc.onnx.files import check_target, load, save_outcome
from reparamc.onnx.graph import OnnxGraph
from reparamc.onnx.latency import compare_latency
from reparamc.onnx.record import file_origin, inscribe, model_origin
from reparamc.onnx.runtime_fusions import fused_by_runtime, harmful, reason
from reparamc.onnx.values import FLOATS, constant_tensor, is_standard
from reparamc.report.data import Counts, Refusal, Report


def fuse_model(
    model: ModelProto,
    *,
    passes: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    verify: bool | str = "full",
    objective: str = "latency",
    only_if_faster: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
    pass_table: tuple[Pass, ...] | None = None,
) -> tuple[ModelProto, Report]:
    """A fused copy of ``model``, and the report. ``model`` itself is not changed.

    Args:
        passes, skip: names of the passes to apply, and to leave out.
        verify: "off"; "region" checks every replacement in float64 and proves the whole result equal where it
            can, undoing what is wrong; "full" also runs both models in ONNX Runtime, and undoes what would break a
            pattern that it fuses by itself.
        objective: what shall become small: "latency", "macs" or "params".
        only_if_faster: time both models in ONNX Runtime, and return a copy of ``model`` unless the
            result is faster beyond noise; the report says so.
        progress: called with (regions done, regions in all).
        pass_table: the passes to choose from, instead of the built-in ones.

    Raises:
        InputError: the model does not pass the checker or cannot be timed, or an option is unknown.
        VerificationError: the result differs from the original.
    """
    if pass_table is None:
        from reparamc_passes import PASSES as pass_table
    selected = select(pass_table, passes, skip)
    options: dict[str, Any] = {"passes": [p.name for p in selected], "objective": objective, "pass_table": pass_table}
    level = level_of(verify)
    if not model.functions and not has_bodies(model):
        return _fuse_graph(model, level=level, only_if_faster=only_if_faster, progress=progress, **options)
    check(model)

    def attempt(start: ModelProto) -> tuple[ModelProto, Report]:
        """The main graph and its bodies, which are proven one by one, and compared together."""
        whole = ModelProto()
        whole.CopyFrom(start)
        resolved = resolve(whole) if any(p.name == FOLDING for p in selected) else 0
        inside = "off" if level == "off" else "region"
        inner = fuse_bodies(whole, partial(fuse_model, verify=inside, **options))
        result, report = _fuse_graph(whole, level=level, only_if_faster=False, progress=progress, **options)
        report.before = count(model)
        if not resolved and not any(found.changed for _, found in inner):
            return result, report
        report = merged(report, inner)
        if resolved:
            report.passes[FOLDING] += resolved
        if level == "full":
            check(result)
            report.end_to_end = verify_end_to_end(model, result)
        return result, report

    result, report = attempt(model)
    if (plain := inlined(model)) is not None:
        other, found = attempt(plain)
        if sum(found.passes.values()) > sum(report.passes.values()) and other.ByteSize() <= model.ByteSize():
            if level == "full":
                found.end_to_end = verify_end_to_end(model, other)
            result, report = other, found
    if only_if_faster and report.changed:
        report.latency = compare_latency(model, result)
        if report.original_kept:
            result.CopyFrom(model)
    return result, report


FOLDING = "constant-folding"


def _fuse_graph(
    model: ModelProto,
    *,
    passes: Iterable[str],
    level: str,
    objective: str,
    only_if_faster: bool,
    progress: Callable[[int, int], None],
    pass_table: tuple[Pass, ...],
) -> tuple[ModelProto, Report]:
    """`fuse_model`, of the main graph alone."""
    selected = select(pass_table, passes, ())
    clock = [perf_counter()]
    check(model)
    made = _Attempt(model, folding=any(p.name == "constant-folding" for p in selected))
    graph = made.graph
    clock.append(perf_counter())
    with priced_by(objective):
        plan = make_plan(graph, selected, verify=level != "off", progress=progress)
    kept, failed = [*plan.kept], [*plan.failed]
    made.carry_out(plan.splices)
    clock.append(perf_counter())
    if made.splices and level == "full":
        harm = _harm(made)
        kept += [
            Refusal(graph.name(s.root), [*s.counts][-1], harm[str(s.unit)]) for s in made.splices if str(s.unit) in harm
        ]
        made.leave_out(harm)
    certificate = None
    if (made.splices or made.folded) and level != "off":

        def certificate_without(units: set[str]) -> Certificate:
            made.leave_out(units)
            return certify_onnx(model, made.result)

        planned = made.splices
        units = {str(s.root): str(s.unit) for s in planned}
        certificate, wrong = proven(units, certificate_without)
        disproved, left = undone(graph, planned, wrong)
        failed += disproved
        kept += left
    splices, result = made.splices, made.result
    counts = sum((s.counts for s in splices), Counter({"constant-folding": made.folded}))
    report = Report(
        before=count(model),
        after=count(result),
        passes={p.name: counts[p.name] for p in selected},
        rewrites=[rewritten(graph, s) for s in splices],
        kept=kept,
        failed=failed,
        host=plan.host,
        seconds={"reading": clock[1] - clock[0], "rewriting": clock[2] - clock[1]},
        objective=objective,
        level=level,
        certificate=certificate,
    )
    if report.changed:
        check(result)
        if level == "full":
            try:
                report.end_to_end = verify_end_to_end(model, result, regions_of(graph, splices))
            except MemoryError as error:
                why = f"({one_line(error)}); try --verify region"
                raise InputError(f"the comparison of the whole models does not fit into memory {why}") from error
            report.seconds["verification"] = perf_counter() - clock[2]
        if only_if_faster:
            start = perf_counter()
            report.latency = compare_latency(model, result)
            report.seconds["timing"] = perf_counter() - start
            if report.original_kept:
                result.CopyFrom(model)
    return result, report


class _Attempt:
    """A copy of a model with splices of one plan carried out.

    Attributes:
        graph: the copy as a graph, for the plan.
        folded: how many of its constants were folded.
        splices: what is carried out.
        result: the outcome.
    """

    def __init__(self, model: ModelProto, folding: bool) -> None:
        self.original, self._folding = model, folding
        copy, self.folded = self._copied()
        self.graph = OnnxGraph(copy)
        self.splices: list[Splice] = []
        self.result = copy

    def _copied(self) -> tuple[ModelProto, int]:
        copy = ModelProto()
        copy.CopyFrom(self.original)
        return copy, fold_constants(copy) if self._folding else 0

    @cached_property
    def _folded(self) -> ModelProto:
        """What every other result starts from; made when the first of them is wanted, for it takes memory."""
        return self._copied()[0]

    def carry_out(self, splices: list[Splice]) -> None:
        """Make the result, with all of a plan."""
        self.splices, self.result = splices, _carried_out(self.graph, splices)

    def without(self, units: Container[str]) -> ModelProto:
        """Another result, without the splices of these units."""
        copy = ModelProto()
        copy.CopyFrom(self._folded)
        return _carried_out(OnnxGraph(copy), [s for s in self.splices if str(s.unit) not in units])

    def leave_out(self, units: Container[str]) -> None:
        """Make the result anew without the splices of these units, if there are any."""
        left = [s for s in self.splices if str(s.unit) not in units]
        if len(left) < len(self.splices):
            self.result, self.splices = self.without(units), left


def _carried_out(graph: OnnxGraph, splices: Iterable[Splice]) -> ModelProto:
    for splice in splices:
        graph.splice(splice)
    graph.finish()
    return graph.model


def _harm(made: _Attempt) -> dict[str, str]:
    """The units to leave out, because ONNX Runtime would fuse less of the result by itself, with reasons."""
    kernels = fused_by_runtime(made.original)
    if not kernels:
        return {}
    units = list(dict.fromkeys(str(s.unit) for s in made.splices))

    def left(chosen: Collection[str]) -> Counter[str] | None:
        """The kernels that a result has, or that it does not need any more: nothing reads what they compute."""
        others = set(units).difference(chosen)
        fused = made.without(others) if others else made.result
        found = fused_by_runtime(fused)
        if found is None:
            return None
        computed = {name for node in fused.graph.node for name in node.output}
        needed = computed.union(*(map(str, s.members) for s in made.splices if str(s.unit) not in others))
        return Counter(found.values()) + Counter(kind for name, kind in kernels.items() if name not in needed)

    return {unit: reason(kind) for unit, kind in harmful(units, Counter(kernels.values()), left).items()}


def fuse_onnx(
    model: Any,
    *,
    passes: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    verify: bool | str = True,
    objective: str = "latency",
    only_if_faster: bool = False,
    output: str | os.PathLike[str] | None = None,
    on_report: Callable[[Report], None] | None = None,
) -> Any:
    """Collapse every linear structure of an ONNX model; the result has the type that was given.

    Args:
        model: a ModelProto; an onnx-graphsurgeon Graph; or the path of a file, in which case the
            result is written to ``output`` (default: ``NAME.fused.onnx`` beside it), atomically, and
            that path is returned. The argument itself is never changed. A rewritten model carries a record
            of that in its metadata (a Graph has none); see `reparamc.report.record`.
        passes, skip: names of passes to apply (default: all) and to leave out.
        verify: True or "full": every replacement in float64, the certificate of the whole result, and both models
            in ONNX Runtime; "region": all but the last; False or "off": nothing.
        objective: what shall become small: "latency", "macs" (multiply-adds) or "params" (parameters).
        only_if_faster: time both models in ONNX Runtime; unless the result is faster beyond noise,
            return or write the original. The report has the figures.
        on_report: called with the `Report`.

    Raises:
        InputTypeError: ``model`` is none of the three.
        InputError: the file or model is not valid, or an option is unknown.
        VerificationError: the result differs from the original; nothing is written.
    """
    if output is not None and not isinstance(model, str | os.PathLike):
        raise InputError("output is for models given as a path; this one is returned")
    fuse = partial(
        fuse_model, passes=passes, skip=skip, verify=verify, objective=objective, only_if_faster=only_if_faster
    )
    if isinstance(model, ModelProto):
        result, report = fuse(model)
        report.origin = model_origin(model)
        inscribe(result, report)
        returned: Any = result
    elif isinstance(model, str | os.PathLike):
        source = Path(model)
        target = Path(output) if output is not None else source.with_suffix(".fused.onnx")
        check_target(source, target)
        loaded, origin = load(source), file_origin(source)
        result, report = fuse(loaded)
        report.origin = origin
        save_outcome(result, report, source, target)
        returned = str(target) if isinstance(model, str) else target
    elif (surgeon := sys.modules.get("onnx_graphsurgeon")) is not None and isinstance(model, surgeon.Graph):
        exported = surgeon.export_onnx(model.copy())
        result, report = fuse(exported)
        report.origin = model_origin(exported)
        returned = surgeon.import_onnx(result)
    else:
        raise InputTypeError(
            f"fuse_onnx takes an onnx.ModelProto, a path or an onnx_graphsurgeon.Graph, not {type(model).__name__}; "
            "a torch module goes to fuse_fx"
        )
    if report.warning is not None:
        warnings.warn(report.warning, RuntimeWarning, stacklevel=2)
    if on_report is not None:
        on_report(report)
    return returned


def count(model: ModelProto) -> Counts:
    """The size of the main graph of ``model``."""
    kinds = Counter(n.op_type for n in model.graph.node if is_standard(n))
    ops = len(model.graph.node) - kinds["Constant"] - kinds["Identity"]
    tensors = [*model.graph.initializer]
    tensors += [t for n in model.graph.node if n.op_type == "Constant" and (t := constant_tensor(n)) is not None]
    elements = sum(prod(t.dims) for t in tensors if t.data_type in FLOATS)
    return Counts(ops, kinds["Conv"], kinds["BatchNormalization"], elements)
