"""A torch module on its way through the compiler: traced, rewritten, proven, compared."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn

from reparamc.algebra.cost import objective as priced_by
from reparamc.algebra.rewrite import Pass
from reparamc.certificate.fx import certify_fx
from reparamc.certificate.fx_shapes import shapes_of, sizes_of
from reparamc.certificate.proof import Certificate
from reparamc.compiler.graph import Splice, Value
from reparamc.compiler.plan import Plan, make_plan
from reparamc.compiler.rollback import proven, regions_of, rewritten, undone
from reparamc.equivalence.difference import Outputs
from reparamc.equivalence.end_to_end import Alone
from reparamc.fx.arguments import examples_of
from reparamc.fx.calls import operation
from reparamc.fx.end_to_end import Given, verify_end_to_end
from reparamc.fx.graph import FxGraph
from reparamc.fx.regions_alone import by_position, run_alone
from reparamc.fx.runnable import own_randomness, unchanged
from reparamc.report.data import Counts, Report, Rewrite

ShapeT = TypeVar("ShapeT")


@dataclass(frozen=True)
class Options:
    """What a user asks for: the passes, how much to verify, and what to minimise."""

    passes: tuple[Pass, ...]
    level: str
    objective: str


def fuse_traced(
    traced: fx.GraphModule,
    model: nn.Module,
    given: Given | None,
    expected: Outputs | None,
    options: Options,
    *,
    exported: bool = False,
) -> fx.GraphModule:
    """A fused form of ``traced``, which shares its other modules with it; the report is in its ``meta``.

    Args:
        traced: ``model`` as a graph. Its parts are not changed.
        model: what the result is compared with.
        given: arguments of ``model`` and of ``traced``; None where there are none.
        expected: what ``model`` makes of them; None where the result is not compared end to end.
        exported: whether torch.export made the graph, for inputs of these sizes.

    Raises:
        VerificationError: the result computes something else.
    """
    selected, level = options.passes, options.level
    args, kwargs = given or ((), {})
    start = perf_counter()
    before = count(traced)
    kept = _again(traced)
    examples = examples_of(model, args, kwargs)
    positional = None
    if given is not None:
        positional = (*args, *kwargs.values()) if exported else by_position(traced, args, kwargs)
    sizes = _of_runs(sizes_of, model, traced, positional)
    ranks = {name: len(shape) for name, shape in sizes.items()}

    def rewrite(traced: fx.GraphModule, without: set[str]) -> _Rewritten:
        graph = FxGraph(traced, examples, ranks, exported=exported)
        with priced_by(options.objective):
            return _rewrite(graph, make_plan(graph, selected, verify=level != "off"), selected, without)

    made = rewrite(traced, set())
    certificate, wrong = None, dict[str, str]()
    if level != "off" and (any(made.counts.values()) or made.graph.sizes_moved):
        shapes = _of_runs(partial(shapes_of, first=sizes or None), model, kept, positional)

        def certificate_without(units: set[str]) -> Certificate:
            nonlocal made
            if units:
                made = rewrite(_again(kept), units)
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
        seconds={"rewriting": done - start},
        objective=options.objective,
        level=level,
    )
    if level == "full" and given is not None and expected is not None:
        regions = regions_of(graph, made.splices, _node_name)
        places = {_node_name(s.root): graph.current(s.root).name for s in made.splices}

        def alone(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Alone | None:
            positional = by_position(kept, args, kwargs)
            if positional is None:
                return None
            return run_alone(kept, fused, regions, places, positional)

        report.end_to_end = verify_end_to_end(model, fused, *given, expected, regions, alone, resize=not exported)
        report.seconds["verification"] = perf_counter() - done
    fused.meta["reparamc"] = report
    return fused


def _again(traced: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own, over the same modules."""
    return fx.GraphModule(traced, copy.deepcopy(traced.graph), type(traced).__name__)


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
