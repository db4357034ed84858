"""The way of every fusion, whatever the host: plan, carry out, prove, undo, compare, report."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from time import perf_counter

from reparamc.algebra.cost import objective_of
from reparamc.compiler.attempt import Attempt, rewritten
from reparamc.compiler.host import Host, Options, ResultT
from reparamc.compiler.plan import FirstPass, Plan, folded, make_plan
from reparamc.errors import InputError, one_line
from reparamc.report.data import Report
from reparamc.report.merge import in_a_row

LEVELS = ("off", "region", "full")


def level_of(verify: bool | str) -> str:
    """The level that an argument ``verify`` asks for: True means "full", and False "off".

    Raises:
        InputError: there is no such level.
    """
    level = ("full" if verify else "off") if isinstance(verify, bool) else verify
    if level not in LEVELS:
        raise InputError(f"unknown verification level {verify!r}; the levels are {', '.join(LEVELS)}")
    return level


@contextmanager
def seldom_collecting_garbage() -> Generator[None]:
    """Many small objects are made that stay until the end, and Python would look through them over and over."""
    often, *others = gc.get_threshold()
    gc.set_threshold(often and max(often, 100_000), *others)
    try:
        yield
    finally:
        gc.set_threshold(often, *others)


def fuse(host: Host[ResultT], options: Options) -> tuple[ResultT, Report]:
    """A fused copy of the model of ``host``, and the report.

    A pass that comes before all others is carried out, proven and compared by itself, with the constants that are
    folded; the others go on with its result.

    Raises:
        InputError: the model cannot be read, or the framework does not accept the result.
        VerificationError: the result differs, and no edit is to blame for it.
    """
    told: list[Report] = []
    start = perf_counter()
    objective = objective_of(options.objective)
    graph, folds = folded(host.graph, options.passes, objective)
    for p in options.passes:
        plan = p.first(graph, p.name, options.level != "off") if isinstance(p, FirstPass) else None
        if plan is not None:
            plan.folds += folds
            result, report = _carried_out(host, options, plan, start)
            told.append(report)
            if report.changed:
                host = host.over(result)
                graph, folds = folded(host.graph, options.passes, objective)
            start = perf_counter()
    plan = make_plan(
        graph, options.passes, objective, folds, verify=options.level != "off",
        progress=options.progress, told=options.told, described=options.described,
    )  # fmt: skip
    result, report = _carried_out(host, options, plan, start)
    return result, in_a_row([*told, report])


def _carried_out(host: Host[ResultT], options: Options, plan: Plan, start: float) -> tuple[ResultT, Report]:
    level = options.level
    clock = [start]
    attempt = Attempt(host, plan, again=level != "off")
    clock.append(perf_counter())
    kept, failed, certificate = [*plan.kept], [*plan.failed], None
    if level == "full":
        kept += attempt.without_objections()
    if level != "off" and attempt.edits:
        from reparamc.compiler.rollback import prove

        proven = prove(attempt, is_compared=level == "full" and host.can_compare(changed=True))
        certificate = proven.certificate
        kept += proven.kept
        failed += proven.failed
    counts = sum((edit.counts for edit in attempt.edits), Counter[str]())
    report = Report(
        before=host.size(None),
        after=host.size(attempt.result),
        passes={p.name: counts[p.name] for p in options.passes},
        rewrites=[
            rewritten(plan.graph, s, attempt.errors[s], made)
            for s, made in zip(attempt.splices, attempt.tensors, strict=True)
        ],
        provenance={name: of for made in attempt.tensors for name, of in made.items()},
        kept=kept,
        failed=failed,
        host=plan.host,
        certificate=certificate,
        seconds={"rewriting": clock[1] - clock[0]},
        objective=options.objective,
        level=level,
    )
    if report.changed:
        host.check(attempt.result)
    if level == "full" and host.can_compare(report.changed):
        try:
            report.end_to_end = host.compare(attempt.result, attempt.regions())
        except MemoryError as error:
            raise InputError(
                f"the comparison of the whole models does not fit into memory ({one_line(error)}); try --verify region"
            ) from error
    if level != "off" and report.changed:
        report.seconds["verification"] = perf_counter() - clock[1]
    return attempt.result, report
