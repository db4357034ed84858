"""`fuse_onnx`: the whole way of an ONNX model, from checking to verification."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from onnx import GraphProto, ModelProto

from reparamc.algebra.records import replace
from reparamc.algebra.rewrite import Pass, select
from reparamc.certificate.onnx_bounds import bodies, nested
from reparamc.compiler.graph import Edit, Graph, Splice
from reparamc.compiler.host import Options, Trial
from reparamc.compiler.pipeline import fuse, level_of, seldom_collecting_garbage
from reparamc.compiler.plan import FoldingPass
from reparamc.compiler.readings import Value
from reparamc.compiler.regions import LIFT
from reparamc.errors import InputError, InputTypeError
from reparamc.onnx import weights
from reparamc.onnx.bodies import called, fuse_bodies, fuse_functions, has_bodies, inlined, merged, resolve
from reparamc.onnx.check import check, graphs, in_execution_order
from reparamc.onnx.emit import OnnxEdit
from reparamc.onnx.files import check_keeps_weights, check_target, file_origin, opened, save_outcome
from reparamc.onnx.graph import OnnxGraph
from reparamc.onnx.record import inscribe, model_origin
from reparamc.onnx.structure import structure_of
from reparamc.onnx.values import FLOATS, constant_tensor, is_standard
from reparamc.report.data import Counts, OutputError, Refusal, Report

if TYPE_CHECKING:  # checks are imported when they are asked for
    from reparamc.certificate.proof import Certificate
    from reparamc.equivalence.end_to_end import Region


def fuse_model(model: ModelProto, **options: Any) -> tuple[ModelProto, Report]:
    """A fused copy of ``model``, which is not changed, and the report; ``options`` are those of `fuse_light`."""
    with weights.holding():
        result, report = fuse_light(weights.light(model), **options)
        return weights.fill(result), report


@seldom_collecting_garbage()
def fuse_light(
    model: ModelProto,
    *,
    passes: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    verify: bool | str = "full",
    objective: str = "latency",
    only_if_faster: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
    pass_table: tuple[Pass, ...] | None = None,
    described: bool = True,
) -> tuple[ModelProto, Report]:
    """As `fuse_model`, from a light model to a light one (see `weights`).

    Args:
        passes, skip: names of the passes to apply, and to leave out.
        verify: "off"; "region" checks every replacement in float64 and proves the whole result equal where it
            can, undoing what is wrong; "full" also runs both models in ONNX Runtime, and undoes what would break a
            pattern that it fuses on its own.
        objective: what to minimize: "latency", "macs" or "params".
        only_if_faster: time both models in ONNX Runtime, and return a copy of ``model`` unless the
            result is faster beyond noise; the report says so.
        progress: called with (regions done, regions in all).
        pass_table: the passes to choose from, instead of the built-in ones.
        described: see `reparamc.compiler.host.Options`; with verification it is always so.

    Raises:
        InputError: the model does not pass the checker or cannot be timed, or an option is unknown.
        VerificationError: the result differs from the original.
    """
    if pass_table is None:
        from reparamc_passes import PASSES as pass_table
    options = Options(select(pass_table, passes, skip), level_of(verify), objective, progress)
    options = replace(options, described=described or options.level != "off")
    given, model = model, in_execution_order(model)
    said = check(model)
    try:
        result, report = _Whole(model, options, pass_table, doubted=said is not None).fused()
    except _Refused as error:  # a runtime may object to a constant where it takes what computes the same
        rest = tuple(p for p in options.passes if not isinstance(p, FoldingPass))
        if rest == options.passes:
            raise
        result, report = _Whole(model, replace(options, passes=rest), pass_table, doubted=said is not None).fused()
        report.remarks.append(f"no constants are folded: {error}")
    if model is not given:
        report.remarks.append("the operators of the model are not in execution order; those of the result are")
        if not report.changed:
            result.CopyFrom(given)
    if said is not None:
        report.remarks.append(f"the ONNX checker objects to the model, which ONNX Runtime takes: {said}")
    if only_if_faster and report.changed:
        from reparamc.onnx.latency import compare_latency

        start = perf_counter()
        report.latency = compare_latency(model, result)
        report.seconds["timing"] = perf_counter() - start
        if report.original_kept:
            result.CopyFrom(model)
    if report.changed:
        report.structure = structure_of(model, [p.name for p in options.passes], objective)
    return result, report


class _Refused(InputError):
    """Neither the checker nor ONNX Runtime takes a result."""


def _check_result(result: ModelProto) -> str | None:
    try:
        return check(result)
    except InputError as error:
        raise _Refused(str(error).replace("the model", "the result", 1)) from error


MOST_FUNCTIONS = 8
"""Local functions that are tried by themselves where the file would grow if all calls were replaced by their bodies."""


class _Whole:
    """A model with its bodies and local functions.

    Args:
        doubted: see `Facts`.
    """

    def __init__(self, model: ModelProto, options: Options, pass_table: tuple[Pass, ...], doubted: bool) -> None:
        self.model, self.options, self.doubted = model, options, doubted
        self.room = weights.total(model)
        """Bytes that a result may take in which calls are replaced."""
        self.least = self.again = 0
        """What folds where they are not; and what of that counts once more for each further call."""
        self.folding = next((p.name for p in options.passes if isinstance(p, FoldingPass)), None)
        names = [p.name for p in options.passes]
        inside = "off" if options.level == "off" else "region"
        self._fuse_body = partial(
            fuse_light, verify=inside, passes=names, objective=options.objective, pass_table=pass_table,
            described=options.described,
        )  # fmt: skip

    def fused(self) -> tuple[ModelProto, Report]:
        """The model, fused; calls are replaced by the bodies of functions where more folds then and no file grows."""
        result, report = self._attempt(self.model)
        functions = called(self.model)
        if not functions:
            return result, report
        self.room = min(self.room, weights.total(result))
        self.least = sum(report.passes.values()) + self.again
        found = self._inlined(functions)
        if found is not None and not self._fits(found[0]) and len(functions) > 1:
            tried = {f: self._inlined([f]) for f in functions[:MOST_FUNCTIONS]}
            fitting = [f for f, made in tried.items() if made is not None and self._fits(made[0])]
            grown = [f for f, made in tried.items() if made is not None and f not in fitting] or functions
            if fitting:
                result, report = self._inlined(fitting) or (result, report)
        elif found is not None and self._fits(found[0]):
            return found
        else:
            grown = [] if found is None else functions
        why = "more would fold in what its calls compute, each in its place, but the file would grow"
        report.kept += [Refusal(".".join(filter(None, f)), LIFT, why) for f in grown]
        return result, report

    def _fits(self, result: ModelProto) -> bool:
        return weights.total(result) <= self.room

    def _inlined(self, functions: Sequence[tuple[str, str]]) -> tuple[ModelProto, Report] | None:
        """What comes of the model without calls of ``functions``; None if no more folds then."""
        plain = inlined(self.model, functions)
        if plain is None:
            return None
        result, found = self._attempt(plain)
        if sum(found.passes.values()) + self.again <= self.least:
            return None
        found.before = count(self.model)
        if self.options.level == "full" and self._fits(result):
            from reparamc.onnx.end_to_end import verify_end_to_end

            found.end_to_end = verify_end_to_end(self.model, result)
        return result, found

    def _attempt(self, start: ModelProto) -> tuple[ModelProto, Report]:
        """The main graph and its bodies, which are proven one by one, and compared together."""
        self.again = 0
        if not has_bodies(start) and not start.functions:
            return self._fuse_graph(start)
        whole = ModelProto()
        whole.CopyFrom(start)
        resolved = resolve(whole) if self.folding is not None else 0
        functions = fuse_functions(whole, self._fuse_body)
        calls = Counter(f"{node.domain}.{node.op_type}" for node in whole.graph.node)
        self.again = sum((calls[where] - 1) * sum(found.passes.values()) for where, found in functions)
        inner = fuse_bodies(whole, self._fuse_body) + functions
        result, report = self._fuse_graph(whole)
        report.before = count(start)
        if not resolved and not any(found.changed for _, found in inner):
            return result, report
        report = merged(report, inner)
        if self.folding is not None:
            report.passes[self.folding] += resolved
        if self.options.level == "full":
            from reparamc.onnx.end_to_end import verify_end_to_end

            _check_result(result)
            report.end_to_end = verify_end_to_end(start, result)
        return result, report

    def _fuse_graph(self, model: ModelProto) -> tuple[ModelProto, Report]:
        """The main graph alone."""
        start = perf_counter()
        host = OnnxHost(model, self.doubted)
        read = perf_counter()
        result, report = fuse(host, self.options)
        report.seconds = {"reading": read - start, **report.seconds}
        return result, report


class OnnxHost:
    """`reparamc.compiler.host.Host` over a model."""

    def __init__(self, model: ModelProto, doubted: bool = False) -> None:
        self.model, self.graph, self.doubted = model, OnnxGraph(model, doubted), doubted

    def carry_out(self, graph: Graph, edits: Iterable[Edit]) -> ModelProto:
        read = cast(OnnxGraph, graph)
        return OnnxEdit(read, read.sizes).carry_out(edit for edit in edits if isinstance(edit, Splice))

    def over(self, result: ModelProto) -> OnnxHost:
        return OnnxHost(result, self.doubted)

    def size(self, result: ModelProto | None) -> Counts:
        return count(self.model if result is None else result)

    def tensor(self, value: Value) -> str:
        return str(value)

    def shown(self, edit: Edit, result: ModelProto) -> Collection[str]:
        if isinstance(edit, Splice):
            return {str(edit.root)}
        users = self.graph.uses.get(str(edit.root), [])
        return {name for node in users if node is not None for name in node.output[:] if name}

    def operands(self, tensor: str) -> Sequence[str] | None:
        node = self.graph.producers.get(tensor)
        return None if node is None else [name for name in node.input[:] if name and name not in self.graph.constants]

    def certify(self, result: ModelProto) -> Certificate:
        from reparamc.certificate.onnx import certify_onnx

        return certify_onnx(self.model, result, weights.array)

    def trials(self, result: ModelProto, regions: Sequence[Region]) -> Iterator[Trial]:
        from reparamc.onnx.end_to_end import run_regions

        return run_regions(self.model, result, regions)

    def objections(
        self, splices: Sequence[Splice], result: ModelProto, without: Callable[[Collection[str]], ModelProto]
    ) -> Mapping[str, str]:
        """Those whose result ONNX Runtime would fuse less of."""
        from reparamc.onnx.runtime_fusions import fused_by_runtime, harmful, reason

        kernels = fused_by_runtime(self.model) if splices else None
        if not kernels:
            return {}
        units = list(dict.fromkeys(str(s.unit) for s in splices))

        def left(chosen: Collection[str]) -> Counter[str] | None:
            """The kernels that a result has, or that it does not need any more: nothing reads what they compute."""
            others = set(units).difference(chosen)
            fused = without(others) if others else result
            found = fused_by_runtime(fused)
            if found is None:
                return None
            computed = {name for node in fused.graph.node for name in node.output[:]}
            needed = computed.union(*(map(str, s.members) for s in splices if str(s.unit) not in others))
            return Counter(found.values()) + Counter(kind for name, kind in kernels.items() if name not in needed)

        return {unit: reason(kind) for unit, kind in harmful(units, Counter(kernels.values()), left).items()}

    def check(self, result: ModelProto) -> None:
        said = _check_result(result)
        if said is not None and not self.doubted:
            raise InputError(f"the result does not pass the ONNX checker: {said}")

    def can_compare(self, changed: bool) -> bool:
        return changed

    def compare(self, result: ModelProto, regions: Sequence[Region]) -> list[OutputError]:
        from reparamc.onnx.end_to_end import verify_end_to_end

        return verify_end_to_end(self.model, result, regions)


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
        objective: what to minimize: "latency" (on a runtime: "latency@openvino"), "macs" (multiply-adds) or "params".
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
    fused = partial(
        fuse_light, passes=passes, skip=skip, verify=verify, objective=objective, only_if_faster=only_if_faster
    )
    if isinstance(model, ModelProto):
        with weights.holding():
            result, report = fused(weights.light(model))
            report.origin = model_origin(model)
            inscribe(result, report)
            returned: Any = weights.fill(result)
    elif isinstance(model, str | os.PathLike):
        source = Path(model)
        target = Path(output) if output is not None else source.with_suffix(".fused.onnx")
        check_target(source, target)
        with weights.holding():
            loaded, origin = opened(source), file_origin(source)
            check_keeps_weights(target)
            result, report = fused(loaded)
            report.origin = origin
            save_outcome(result, report, source, target)
        returned = str(target) if isinstance(model, str) else target
    elif (surgeon := sys.modules.get("onnx_graphsurgeon")) is not None and isinstance(model, surgeon.Graph):
        exported = surgeon.export_onnx(model.copy())
        with weights.holding():
            result, report = fused(weights.light(exported))
            report.origin = model_origin(exported)
            returned = surgeon.import_onnx(weights.fill(result))
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
    """The size of ``model``, its bodies and local functions among it."""
    parts = [*graphs(model), *model.functions]
    parts += [g for f in model.functions for node in f.node for body in bodies(node) for g in nested(body)]
    nodes = [node for part in parts for node in part.node]
    kinds = Counter(n.op_type for n in nodes if is_standard(n))
    ops = len(nodes) - kinds["Constant"] - kinds["Identity"]
    tensors = [t for part in parts if isinstance(part, GraphProto) for t in part.initializer]
    tensors += [t for n in nodes if n.op_type == "Constant" and (t := constant_tensor(n)) is not None]
    elements = sum(prod(t.dims[:]) for t in tensors if t.data_type in FLOATS)
    return Counts(ops, kinds["Conv"], kinds["BatchNormalization"], elements)
