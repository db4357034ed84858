"""Golden cases: one expression a file, and what becomes of it.

A file holds comments that say what it is about, the expression, and the verdict: ``# becomes`` with the
simplified text or ``# unchanged``, then one ``# refused:`` line for each reason given. ``pytest --accept``
writes the verdicts anew; review them as a diff. Two comments direct the harness:

    # sizes: 8x8           the only sizes at which the branches agree
    # algebra only: why    no host graph can hold the expression, or a driver of the whole graph changes it further
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from expression_graph import planned
from expression_models import (
    EXTENTS,
    assert_close,
    draw,
    operators,
    reference,
    run,
    source_shapes,
    sources,
    time_limit,
    to_module,
    to_onnx,
)

from reparamc.algebra.expr import BatchNorm, Concat, Conv, Expr, Layout, Source, flatten, rebuild, walk
from reparamc.algebra.infer import channels
from reparamc.algebra.rewrite import Declined, Pass, simplify
from reparamc.algebra.shape import shape_of
from reparamc.algebra.text import parse, show
from reparamc.onnx.fuse import fuse_model
from reparamc_passes import PASSES

CASES = Path(__file__).parent / "cases"
VERDICT = re.compile(r"^# (becomes|unchanged|refused:)", re.MULTILINE)


@dataclass(frozen=True)
class Case:
    path: Path
    head: str
    verdict: str

    @property
    def expr(self) -> Expr:
        return flatten(parse(self.head))

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        found = re.search(r"^# sizes: (\S+)", self.head, re.MULTILINE)
        return (tuple(map(int, found[1].split("x"))),) if found else EXTENTS

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.stem}"

    @property
    def algebra_only(self) -> str | None:
        """Why no host graph can hold it; None if one can."""
        found = re.search(r"^# algebra only: (.+)", self.head, re.MULTILINE)
        return found[1] if found else None


def read_case(path: Path) -> Case:
    text = path.read_text()
    found = VERDICT.search(text)
    end = found.start() if found else len(text)
    return Case(path, text[:end], text[end:])


def verdict(e: Expr) -> str:
    with time_limit(5):
        outcome = simplify(e, PASSES)
    lines = [f"# becomes\n{show(outcome.expr)}"] if outcome.steps else []
    lines += [f"# refused: {r}" for r in dict.fromkeys(r.reason for r in outcome.refusals)]
    return "\n".join(lines or ["# unchanged"]) + "\n"


ALL = [read_case(path) for path in sorted(CASES.glob("*/*.txt"))]
every_case = pytest.mark.parametrize("case", ALL, ids=[case.name for case in ALL])


@every_case
def test_text(case: Case, request: pytest.FixtureRequest) -> None:
    found = verdict(case.expr)
    if request.config.getoption("--accept"):
        case.path.write_text(case.head + found)
    else:
        assert found == case.verdict


@every_case
def test_value(case: Case) -> None:
    before = case.expr
    with time_limit(5):
        after = simplify(before, PASSES).expr
    for seed, sizes in enumerate(case.sizes):
        inputs = draw(source_shapes(before, sizes), seed)
        assert_close(reference(before, inputs), reference(after, inputs), 1e-12)


@every_case
def test_nothing_is_left_to_do(case: Case) -> None:
    with time_limit(5):
        once = simplify(case.expr, PASSES)
        twice = simplify(once.expr, PASSES)
    assert twice.expr is once.expr
    assert not twice.steps


# The same through host graphs

MORE = (
    "not what becomes of the expression; if a driver of the whole graph changes it further, say '# algebra only: why'"
)


def through_onnx(case: Case) -> None:
    e = parse(case.head)
    models = [(to_onnx(e, case.sizes[0]), with_sizes(e, case.sizes[0]))]
    if len(case.sizes) > 1:  # otherwise the sizes drawn for unknown sizes would not fit
        models.append((to_onnx(e), e))
    for place, (model, known) in enumerate(models):
        after = planned(known)
        expected = Counter() if isinstance(after, Source) else operators(to_onnx(after))
        fused, report = fuse_model(model)
        assert operators(fused) == expected, f"{MORE}; what stays: {report.kept}"
        for seed, sizes in enumerate(case.sizes if place else case.sizes[:1]):
            inputs = draw(source_shapes(e, sizes), seed)
            feeds = {str(s.key): x.astype(np.float32) for s, x in inputs.items()}
            assert_close(run(model, feeds)[0], run(fused, feeds)[0], 1e-5)


def through_fx(case: Case) -> None:
    torch = pytest.importorskip("torch")
    fuse_fx = import_module("reparamc.fx.fuse").fuse_fx
    e = parse(case.head)
    module = to_module(e)
    inputs = draw(source_shapes(e, case.sizes[0]))
    example = tuple(torch.from_numpy(inputs[s]) for s in sources(e))
    fused = fuse_fx(module, example, specialize=True)
    with torch.no_grad():
        assert_close(module(*example).numpy(), fused(*example).numpy(), 1e-10)
    unsized = with_sizes(e, None)  # as torch.fx leaves them
    if not leans(e) and tells_channels(unsized):  # PyTorch pads a kernel that leans by an operator of its own
        parts = list(walk(planned(unsized)))
        kernels = [p for p in parts if isinstance(p, Conv) and not p.is_weightless]
        expected = [len(kernels), sum(isinstance(p, BatchNorm) for p in parts)]
        assert fx_counts(fused) == expected


def with_sizes(e: Expr, sizes: tuple[int, ...] | None) -> Expr:
    """``e`` over sources of these sizes, or of open ones; as it is where layout operators name sizes."""
    if any(isinstance(x, Layout) for x in walk(e)):
        return e
    shapes = {s: None if sizes is None else shape_of(d) for s, d in source_shapes(e, sizes or EXTENTS[0]).items()}
    done: dict[Expr, Expr] = {}
    for x in walk(e):
        old = isinstance(x, Source)
        done[x] = replace(x, shape=shapes[x]) if old else rebuild(x, [done[c] for c in x.children])
    return done[e]


def tells_channels(e: Expr) -> bool:
    """Whether the operators themselves tell how many channels are concatenated."""
    known = channels(e)
    joined = [c for c in walk(e) if isinstance(c, Concat)]
    return all(known[t] == n for c in joined for t, n in zip(c.terms, c.sizes, strict=True))


def leans(e: Expr) -> bool:
    return any(isinstance(c, Conv) and not c.transposed and c.padding[0] != c.padding[1] for c in walk(e))


def fx_counts(fused: object) -> list[int]:
    """How many convolutions (linear layers included) and BatchNorms a graph module calls."""
    modules = dict(fused.named_modules())  # type: ignore[attr-defined]
    kinds = [
        type(modules[str(n.target)]).__name__ if n.op == "call_module" else getattr(n.target, "__name__", str(n.target))
        for n in fused.graph.nodes  # type: ignore[attr-defined]
        if n.op.startswith("call_")
    ]
    return [sum(bool(re.match(pattern, kind, re.I)) for kind in kinds) for pattern in ("conv|linear", "batch_?norm")]


BACKENDS: dict[str, Callable[[Case], None]] = {"onnx": through_onnx, "fx": through_fx}
RANK_IS_OPEN = (
    *("bn-folding/after-through-layouts", "bn-folding/before-through-layouts"),
    "layout-cancelling/reshape-and-back",
)
"""Cases that are not folded through torch yet: the rank of the input is fixed by nothing but the caller."""


@pytest.mark.parametrize("backend", BACKENDS)
@every_case
def test_host_graph(case: Case, backend: str, request: pytest.FixtureRequest) -> None:
    if case.algebra_only:
        pytest.skip(case.algebra_only)
    if backend == "fx":
        pytest.importorskip("torch")
        if case.name in RANK_IS_OPEN:
            request.applymarker(pytest.mark.xfail(reason="the rank of the input is open", strict=True))
    with time_limit(60):
        BACKENDS[backend](case)


# The cases themselves


def reasons(table: Pass) -> list[re.Pattern[str]]:
    """Every reason that a pass may give."""
    return [re.compile(re.escape(text).replace(r"\.\.\.", ".+")) for text in table.refusals]


def is_listed(refusal: Declined) -> bool:
    """Whether the pass says that it may give this reason."""
    (table,) = (p for p in PASSES if p.name == refusal.by)
    return any(r.fullmatch(refusal.reason) for r in reasons(table))


@every_case
def test_every_reason_is_listed(case: Case) -> None:
    with time_limit(5):
        assert all(map(is_listed, simplify(case.expr, PASSES).refusals))


def gaps(table: Pass, cases: list[Case]) -> list[str]:
    """What the cases of one pass lack."""
    mine = [case for case in cases if case.path.parent.name == table.name]
    outcomes = []
    for case in mine:
        with time_limit(5):
            outcomes.append(simplify(case.expr, (table,)))
    missing = []
    if not any(outcome.steps for outcome in outcomes):
        missing.append("a positive case")
    given = {r.reason for outcome in outcomes for r in outcome.refusals}
    missing += [f"a case for {r.pattern!r}" for r in reasons(table) if not any(map(r.fullmatch, given))]
    if not any(shares_a_value(case.expr) for case in mine):
        missing.append("a case where two operators read one value")
    return missing


def shares_a_value(e: Expr) -> bool:
    readers = Counter(c for node in walk(e) for c in set(node.children))
    return any(count > 1 and not isinstance(node, Source) for node, count in readers.items())


OF_HOSTS = ("norm-folding",)
"""Passes over operators that no text can hold; the tests of the adapters have their cases."""


@pytest.mark.parametrize(
    "table", [p for p in PASSES if type(p) is Pass and p.name not in OF_HOSTS], ids=lambda p: p.name
)
def test_every_pass_has_its_cases(table: Pass) -> None:
    assert gaps(table, ALL) == []


def test_missing_cases_are_noticed() -> None:
    table = next(p for p in PASSES if p.name == "branch-merging")
    assert gaps(table, [])[0] == "a positive case"
    assert len(gaps(table, [])) == 2 + len(reasons(table)) >= 5
    without = [c for c in ALL if c.path.stem not in ("sizes", "open-even")]
    assert len(gaps(table, without)) == 1


def test_every_folder_is_a_pass() -> None:
    assert {case.path.parent.name for case in ALL} <= {p.name for p in PASSES}


def test_every_case_says_what_it_is_about() -> None:
    for case in ALL:
        comments = [line for line in case.head.splitlines() if line.startswith("# ")]
        assert any(not re.match("# (sizes|algebra only):", line) for line in comments), case.path
