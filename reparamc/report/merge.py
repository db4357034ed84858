"""One report of several: of the parts of a model that were fused one by one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import TypeVar

from reparamc.report.data import Certified, Counts, HostCheck, OutputError, Report, Rewrite

NumberT = TypeVar("NumberT", int, float)


def merged(reports: Sequence[tuple[str, Report]], left: Sequence[Counts]) -> Report:
    """The report of a whole; places in those of its parts are prefixed by where the part is.

    Args:
        reports: of the parts, by the path of each.
        left: the sizes of what was not fused.
    """
    if len(reports) == 1 and not left and not reports[0][0]:
        return reports[0][1]
    every = [r for _, r in reports]
    certificates = [r.certificate for r in every if r.certificate is not None]
    hosts = [r.host for r in every if r.host is not None]
    first = every[0] if every else None
    return Report(
        before=total([*(r.before for r in every), *left]),
        after=total([*(r.after for r in every), *left]),
        passes=_summed(r.passes for r in every) if first is not None else {},
        rewrites=[_rewrite_inside(at, w) for at, r in reports for w in r.rewrites],
        provenance={
            inside(at, name): tuple(inside(at, p) for p in of) for at, r in reports for name, of in r.provenance.items()
        },
        kept=[replace(k, where=inside(at, k.where)) for at, r in reports for k in r.kept],
        failed=[replace(f, where=inside(at, f.where)) for at, r in reports for f in r.failed],
        host=HostCheck(sum(h.kinds for h in hosts), [u for h in hosts for u in h.unable]) if hosts else None,
        certificate=_certified(certificates) if certificates else None,
        seconds=_summed(r.seconds for r in every),
    )


def in_a_row(reports: Sequence[Report]) -> Report:
    """The report of one fusion after the other: the last, with what the others did to what it started from."""
    *others, last = reports
    for earlier in reversed(others):
        consumed = {p for w in last.rewrites for p in w.parameters}
        of = earlier.provenance
        provenance = {name: found for name, found in of.items() if name not in consumed}
        for name, found in last.provenance.items():
            provenance[name] = tuple(dict.fromkeys(p for n in found for p in of.get(n, (n,))))
        certificates = [r.certificate for r in (earlier, last) if r.certificate is not None]
        last = replace(
            last,
            before=earlier.before,
            passes=_summed([earlier.passes, last.passes]),
            rewrites=[*earlier.rewrites, *last.rewrites],
            provenance=provenance,
            kept=[*earlier.kept, *last.kept],
            failed=[*earlier.failed, *last.failed],
            end_to_end=_worst(earlier.end_to_end, last.end_to_end),
            certificate=_certified(certificates) if certificates else None,
            seconds=_summed([earlier.seconds, last.seconds]),
        )
    return last


def _worst(earlier: Sequence[OutputError], last: Sequence[OutputError]) -> list[OutputError]:
    """What was found of each output, the larger of two."""
    found = {e.output: e for e in earlier}
    return [max(e, found.pop(e.output, e), key=lambda e: e.max_rel) for e in last] + [*found.values()]


def inside(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _rewrite_inside(place: str, rewrite: Rewrite) -> Rewrite:
    parameters, tensors = (tuple(inside(place, n) for n in names) for names in (rewrite.parameters, rewrite.tensors))
    return replace(rewrite, where=inside(place, rewrite.where), parameters=parameters, tensors=tensors)


def total(counts: Iterable[Counts]) -> Counts:
    every = list(counts)
    return Counts(*(sum(getattr(c, f.name) for c in every) for f in fields(Counts)))


def _summed(counts: Iterable[dict[str, NumberT]]) -> dict[str, NumberT]:
    found: dict[str, NumberT] = {}
    for each in counts:
        for name, n in each.items():
            found[name] = found[name] + n if name in found else n
    return found


def _certified(every: Sequence[Certified]) -> Certified:
    return Certified(
        sum(c.equal for c in every),
        tuple(u for c in every for u in c.undecided),
        sum(c.rolled_back for c in every),
        max(c.units for c in every),
        max(c.bound for c in every),
        sum(c.seconds for c in every),
    )
