"""A torch module on its way through the compiler: traced, rewritten, proven, compared."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn

from reparamc.algebra.cost import objective as priced_by
from reparamc.algebra.rewrite import Pass
from reparamc.certificate.fx import certify_fx
from reparamc.certificate.fx_shapes import shapes_of, sizes_of
from reparamc.certificate.proof import Certificate
from reparamc.compiler.graph import Splice, Value
from reparamc.compiler.plan import Plan, make_plan
from reparamc.compiler.rollback import proven, regions_of, rewritten, undone
from reparamc.equivalence.end_to_end import Alone
from reparamc.errors import InputError
from reparamc.fx.arguments import arguments_of, bound_to, examples_of, tried
from reparamc.fx.calls import operation
from reparamc.fx.end_to_end import verify_end_to_end
from reparamc.fx.graph import FxGraph
from reparamc.fx.regions_alone import by_position, run_alone
from reparamc.fx.runnable import own_randomness, unchanged
from reparamc.fx.trace import followed
from reparamc.report.data import Counts, Origin, Report, Rewrite
from reparamc.report.record import records_of

ShapeT = TypeVar("ShapeT")


def fuse_module(
    model: nn.Module, example_inputs: Any, selected: tuple[Pass, ...], level: str, objective: str
) -> fx.GraphModule:
    given = args, kwargs = arguments_of(example_inputs)
    expected = None
    if example_inputs is not None:
        args, kwargs = bound_to(model, args, kwargs)
        expected = tried(model, args, kwargs)
    start = perf_counter()
    traced, note = followed(model, given if example_inputs is not None else None)
    _refuse_changed_state(model, traced)
    before = count(traced)
    traced_at = perf_counter()
    kept = fx.GraphModule(traced, copy.deepcopy(traced.graph)) if level != "off" else None
    examples = examples_of(model, args, kwargs)
    positional = None
    if example_inputs is not None:
        positional = (*given[0], *given[1].values()) if note else by_position(traced, args, kwargs)
    sizes = _of_runs(sizes_of, model, traced, positional)
    ranks = {name: len(shape) for name, shape in sizes.items()}

    def rewrite(traced: fx.GraphModule, without: set[str]) -> _Rewritten:
        graph = FxGraph(traced, examples, ranks, exported=bool(note))
        with priced_by(objective):
            return _rewrite(graph, make_plan(graph, selected, verify=level != "off"), selected, without)

    made = rewrite(traced, set())
    certificate, wrong = None, dict[str, str]()
    if kept is not None and (any(made.counts.values()) or made.graph.sizes_moved):
        shapes = _of_runs(partial(shapes_of, first=sizes or None), model, kept, positional)

        def certificate_without(units: set[str]) -> Certificate:
            nonlocal made
            if units:
                made = rewrite(followed(model, given if example_inputs is not None else None)[0], units)
            return certify_fx(kept, made.fused, shapes)

        certificate, wrong = proven(made.units, certificate_without)
    graph, plan, fused, counts = made.graph, made.plan, made.fused, made.counts
    failed, left = undone(graph, plan.splices, wrong, _node_name)
    done = perf_counter()
    report = Report(
        before=before,
        after=count(fused),
        passes={p.name: counts[p.name] for p in selected},
        rewrites=made.rewrites,
        kept=[*plan.kept, *left],
        failed=[*plan.failed, *failed],
        host=plan.host,
        certificate=certificate,
        note=note,
        seconds={"tracing": traced_at - start, "rewriting": done - traced_at},
        objective=objective,
        level=level,
        origin=_origin(model),
        history=_history(model),
    )
    if level == "full":
        if expected is None:
            report.note = "not run end to end: no example_inputs"
        else:
            call = given if note else (args, kwargs)
            regions = regions_of(graph, made.splices, _node_name)
            places = {_node_name(s.root): graph.current(s.root).name for s in made.splices}

            def alone(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Alone | None:
                original = followed(model, given)[0]
                positional = by_position(original, args, kwargs)
                if positional is None:
                    return None
                return run_alone(original, fused, regions, places, positional)

            report.end_to_end = verify_end_to_end(model, fused, *call, expected, regions, alone, resize=not note)
            report.seconds["verification"] = perf_counter() - done
    fused.meta["reparamc"] = report
    return fused


@dataclass(frozen=True)
class _Rewritten:
    """A module with its splices carried out, and what was done; ``units``: those of the splices by their last node."""

    fused: fx.GraphModule
    graph: FxGraph
    plan: Plan
    splices: list[Splice]
    counts: Counter[str]
    rewrites: list[Rewrite]
    units: dict[str, str]


def _rewrite(graph: FxGraph, plan: Plan, selected: tuple[Pass, ...], without: set[str]) -> _Rewritten:
    """Carry out ``plan``, but for the splices of the units ``without``."""
    splices = [s for s in plan.splices if _node_name(s.unit) not in without]
    rewrites = [rewritten(graph, s) for s in splices]
    units = {_node_name(s.root): _node_name(s.unit) for s in splices}
    for splice in splices:
        graph.splice(splice)
    counts = sum((s.counts for s in splices), Counter[str]())
    if any(p.name == "constant-folding" for p in selected):
        counts["constant-folding"] = graph.fold_constants()
    return _Rewritten(graph.finish(), graph, plan, splices, counts, rewrites, units)


def _node_name(value: Value) -> str:
    return cast(fx.Node, value).name


def _origin(model: nn.Module) -> Origin | None:
    """SHA-256 of all parameters and buffers, names and types included; None where one has no data of its own."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            return None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return Origin(digest.hexdigest(), "parameters and buffers")


def _history(model: nn.Module) -> list[dict[str, Any]]:
    """The records of ``model``, if it was fused before."""
    meta = model.meta if isinstance(model, fx.GraphModule) else {}
    earlier = meta.get("reparamc")
    return records_of(earlier) if isinstance(earlier, Report) else []


def _refuse_changed_state(model: nn.Module, traced: fx.GraphModule) -> None:
    """Raise InputError where running forward once, to trace it, has changed a parameter or buffer."""
    kept = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, after in (*traced.named_parameters(), *traced.named_buffers()):
        before = kept.get(name)
        if before is not None and before.is_meta:
            raise InputError(f"{name!r} is on the meta device and has no value; load the weights first")
        if before is not None and not _same(before, after):
            raise InputError(f"forward changes {name!r}: a state that every call updates cannot be fused")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _of_runs(
    ask: Callable[[fx.GraphModule, Sequence[Any]], dict[str, ShapeT]],
    model: nn.Module,
    traced: fx.GraphModule,
    args: Sequence[Any] | None,
) -> dict[str, ShapeT]:
    """What ``ask`` learns from running ``traced``; nothing where it does not run."""
    if args is None:
        return {}
    with unchanged(traced), own_randomness(model), torch.no_grad():
        try:
            return ask(traced, args)
        except Exception:  # whatever the model's forward raises; the comparison will say so
            return {}


def count(module: fx.GraphModule) -> Counts:
    """The size of a traced module: calls, convolutions and BatchNorms (modules or functions), parameters."""
    ops = conv = norm = 0
    for node in module.graph.nodes:
        if node.op in ("call_module", "call_function", "call_method"):
            call = operation(node, module)
            ops += 1
            conv += call is not None and call.op == "conv"
            norm += call is not None and call.op in ("batch_norm", "native_batch_norm")
    return Counts(ops, conv, norm, sum(p.numel() for p in module.parameters()))
