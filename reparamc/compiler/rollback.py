"""From a plan to a report, for any host: which splices are proven wrong and undone, and what is said of the others.

Of some splices all are made, or none; what these have in common is their unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from time import perf_counter

import numpy as np

from reparamc.algebra.evaluate import evaluate
from reparamc.algebra.expr import Array, Expr, Source, walk
from reparamc.algebra.infer import channel_axes
from reparamc.certificate.proof import Certificate, roll_back
from reparamc.compiler.graph import Graph, Splice, Value
from reparamc.equivalence.difference import Outputs
from reparamc.equivalence.end_to_end import Region
from reparamc.report.data import Certified, FailedRegion, Refusal, Rewrite


def proven(
    units: Mapping[str, str], certificate: Callable[[set[str]], Certificate]
) -> tuple[Certified, dict[str, str]]:
    """What is proven of the result, and the splices that are wrong, by the tensors they end in, each with the reason.

    Args:
        units: by the tensor that each splice ends in.
        certificate: of the result without these units; called without any, and then as often as new ones turn out to
            be wrong. The last call is about what is left.

    Raises:
        VerificationError: something differs that no splice is to blame for.
    """
    start = perf_counter()
    found, wrong = roll_back(certificate(set()), units, lambda roots: certificate({units[root] for root in roots}))
    return certified(found, len(wrong), perf_counter() - start), wrong


def undone(
    graph: Graph, splices: Iterable[Splice], wrong: Mapping[str, str], name: Callable[[Value], str] = str
) -> tuple[list[FailedRegion], list[Refusal]]:
    """What the report says of the splices that are undone: those that are ``wrong``, and those of the same units.

    ``name`` is what tensors go by.
    """
    failed: list[FailedRegion] = []
    kept: list[Refusal] = []
    splices = list(splices)
    blamed = {name(s.unit): graph.name(s.root) for s in splices if name(s.root) in wrong}
    for s in splices:
        where = graph.name(s.root)
        if (why := wrong.get(name(s.root))) is not None:
            failed.append(FailedRegion(where, "certificate", None, 0.0, (*s.counts,), s.before, s.after, why))
            kept.append(Refusal(where, "certificate", why))
        elif other := blamed.get(name(s.unit)):
            kept.append(Refusal(where, "certificate", f"it pays only together with {other!r}, which is undone"))
    return failed, kept


def regions_of(graph: Graph, splices: Iterable[Splice], name: Callable[[Value], str] = str) -> list[Region]:
    """What was rewritten, for the comparison of whole models; ``name`` is what tensors go by."""
    return [
        Region(
            name(s.root),
            (*map(name, s.operands),),
            graph.name(s.root),
            s.before,
            s.after,
            channel_axes(s.expr)[s.expr],
            None if s.original is None else partial(_exactly, s.original, name),
        )
        for s in splices
    ]


def _exactly(original: Expr, name: Callable[[Value], str], values: Outputs) -> Array:
    """What ``original`` is in float64, from values by name."""
    sources = [e for e in walk(original) if isinstance(e, Source)]
    return evaluate(original, {e: values[name(e.key)].astype(np.float64) for e in sources})[0]


def rewritten(graph: Graph, splice: Splice) -> Rewrite:
    """The entry of ``splice``; ask before it is carried out, while its operators are there to be named."""
    operators = tuple(graph.name(v) for v in splice.members)
    return Rewrite(
        graph.name(splice.root),
        operators,
        dict(splice.counts),
        splice.parameters,
        splice.before,
        splice.after,
        splice.error,
    )


def certified(found: Certificate, rolled_back: int, seconds: float) -> Certified:
    """The entry of a certificate."""
    undecided = tuple(Refusal(w.where, "certificate", w.reason) for w in found.windows if w.verdict == "undecided")
    return Certified(found.equal, undecided, rolled_back, found.units, found.bound, seconds)
