"""Laws that hold for every expression, on random ones.

Examples are drawn from a fixed seed and limited in number, so that a run is repeatable and short.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from expression_models import assert_close, draw, reference, source_shapes, time_limit
from hypothesis import HealthCheck, Phase, assume, given, reject, settings
from hypothesis import strategies as st

from reparamc.algebra.cost import LATENCY
from reparamc.algebra.equal import REGION_TOLERANCE, compare_expressions
from reparamc.algebra.evaluate import evaluate
from reparamc.algebra.expr import (
    BatchNorm,
    Concat,
    Conv,
    Expr,
    Ints,
    Layout,
    Mean,
    Permute,
    Scale,
    Select,
    Source,
    Sum,
    flatten,
    rebuild,
    total,
    walk,
)
from reparamc.algebra.rewrite import Pass, simplify
from reparamc.algebra.shape import shape_of
from reparamc.algebra.text import __doc__ as language
from reparamc.algebra.text import parse, show
from reparamc.errors import InputError, RewriteLimitError
from reparamc_passes import PASSES

# No shrinking: where rules do not terminate, each attempt would run into the time limit.
LAW = settings(
    derandomize=True,
    deadline=None,
    max_examples=100,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
)
WIDTHS = (1, 2, 4, 6)
RULED = [p for p in PASSES if type(p) is Pass]
CASES = Path(__file__).parent / "cases"


def numbers(data: st.DataObject, *shape: int) -> np.ndarray:
    return np.random.default_rng(data.draw(st.integers(0, 2**16))).standard_normal(shape)


def convolution(data: st.DataObject, x: Expr, width: int, spatial: int, delta: Ints | None, stride: Ints) -> Conv:
    """A random convolution of ``x``; its delta is as given (or free), by padding more on one side than on the other."""
    draw_int = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    out = width if data.draw(st.booleans()) or delta is not None else data.draw(st.sampled_from(WIDTHS))
    groups = data.draw(st.sampled_from([g for g in (1, 2, 3, 6) if width % g == 0 and out % g == 0]))
    kernel = tuple(draw_int(1, 3) for _ in range(spatial))
    dilation = tuple(draw_int(1, 2) for _ in range(spatial))
    reach = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    given_delta = delta if delta is not None else tuple(draw_int(0, r) for r in reach)
    # Padding before is between nothing and all there is; the delta fixes the rest.
    offset = tuple(-draw_int(0, max(r - d, 0)) for r, d in zip(reach, given_delta, strict=True))
    weight = numbers(data, out, width // groups, *kernel)
    bias = numbers(data, out) if data.draw(st.booleans()) else None
    return Conv(x, weight, bias, stride, dilation, offset, given_delta, groups)


def affine(data: st.DataObject, x: Expr, width: int, spatial: int) -> Expr:
    kind = data.draw(st.sampled_from(["batchnorm", "scale", "shift", "number", "negation"]))
    match kind:
        case "batchnorm":
            gamma, beta, mean = (numbers(data, width) for _ in range(3))
            return BatchNorm(x, gamma, beta, mean, np.abs(numbers(data, width)) + 0.3, 1e-5, -1 - spatial)
        case "scale":
            return Scale(x, numbers(data, width), np.zeros(()), -1 - spatial)
        case "shift":
            return Scale(x, numbers(data, width), numbers(data, width), -1 - spatial)
        case "number":
            return Scale(x, numbers(data), np.zeros(()))
        case _:
            return Scale(x, -np.ones(()), np.zeros(()))


def branch(data: st.DataObject, x: Expr, width: int, spatial: int, delta: Ints, stride: Ints) -> Expr:
    """Something of the width of ``x`` on the grid of ``delta`` and ``stride``, a few operators long."""
    keeps = not any(delta) and all(s == 1 for s in stride)
    e = x
    if not (keeps and data.draw(st.integers(0, 3)) == 0):
        e = convolution(data, x, width, spatial, delta, stride)
    if data.draw(st.booleans()):
        e = affine(data, e, width, spatial)
    if keeps and data.draw(st.integers(0, 4)) == 0:
        e = total([e, branch(data, x, width, spatial, delta, stride)])
        e = affine(data, e, width, spatial)
    return e


def same_sizes(data: st.DataObject, sizes: Ints | None, stride: Ints) -> Ints:
    """A delta that gives the sizes that 0 gives: for every input size 0 itself, for known sizes any of several."""
    if sizes is None:
        return (0,) * len(stride)
    return tuple(data.draw(st.integers(0, (h - 1) % s)) for h, s in zip(sizes, stride, strict=True))


def transposed(data: st.DataObject, x: Expr, width: int, spatial: int, delta: Ints) -> Conv:
    """A random transposed convolution of stride 2 that keeps the number of channels."""
    draw_int = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups = data.draw(st.sampled_from([g for g in (1, 2, 3, 6) if width % g == 0]))
    kernel = tuple(draw_int(1, 3) for _ in range(spatial))
    dilation, offset = (tuple(draw_int(*of) for _ in range(spatial)) for of in ((1, 2), (-2, 0)))
    bias = numbers(data, width) if data.draw(st.booleans()) else None
    weight = numbers(data, width, width // groups, *kernel)
    return Conv(x, weight, bias, (2,) * spatial, dilation, offset, delta, groups, transposed=True)


def pointwise(data: st.DataObject, x: Expr, width: int, spatial: int) -> Conv:
    """A matrix of channels, for chains that may be composed."""
    out = data.draw(st.sampled_from(WIDTHS))
    bias = numbers(data, out) if data.draw(st.booleans()) else None
    ones, zeros = (1,) * spatial, (0,) * spatial
    return Conv(x, numbers(data, out, width, *ones), bias, ones, ones, zeros, zeros)


def selection(data: st.DataObject, x: Expr, width: int, spatial: int) -> Select:
    """Some channels: neighbours, or any in any order, or all of them shuffled."""
    every = list(range(width))
    low = data.draw(st.integers(0, width - 1))
    high = data.draw(st.integers(low + 1, width))
    any_order = st.lists(st.sampled_from(every), min_size=1, max_size=width)
    index = data.draw(st.one_of(st.just(every[low:high]), any_order, st.permutations(every)))
    return Select(x, tuple(index), width, -1 - spatial)


def concatenation(terms: list[Expr], spatial: int) -> Concat:
    return Concat(tuple(terms), tuple(next(channel_counts(t)) for t in terms), -1 - spatial)


@st.composite
def expressions(choose: st.DrawFn) -> Expr:
    """Chains of blocks; a block is an operator, or a sum or concatenation of branches that share its input."""
    data = choose(st.data())
    spatial, width = choose(st.integers(0, 3)), choose(st.sampled_from(WIDTHS))
    fixed = tuple(choose(st.integers(8, 11)) for _ in range(spatial)) if choose(st.integers(0, 2)) == 0 else None
    e: Expr = Source("x", width, -1 - spatial, shape_of(["N", width, *(fixed or "HWD"[:spatial])]))
    kinds = ["conv", "pointwise", "affine", "select", "concat", "sum", "sum", "sum"]
    kinds += ["transposed"] if 0 < spatial < 3 else []
    for _ in range(choose(st.integers(1, 3))):
        width = next(channel_counts(e))
        ones = (1,) * spatial
        match kind := choose(st.sampled_from(kinds)):
            case "conv":
                e = convolution(data, e, width, spatial, None, tuple(choose(st.integers(1, 2)) for _ in range(spatial)))
            case "pointwise":
                e = pointwise(data, e, width, spatial)
            case "affine":
                e = affine(data, e, width, spatial)
            case "select":
                e = selection(data, e, width, spatial)
            case "transposed":
                kinds.remove(kind)  # maps grow
                delta = tuple(choose(st.integers(0, 2)) for _ in range(spatial))
                e = total([transposed(data, e, width, spatial, delta) for _ in range(choose(st.integers(1, 3)))])
            case _:
                stride = ones if choose(st.booleans()) else tuple(choose(st.integers(1, 2)) for _ in range(spatial))
                known = fixed if isinstance(e, Source) else None
                deltas = [same_sizes(data, known, stride) for _ in range(choose(st.integers(2, 4)))]
                terms = [branch(data, e, width, spatial, delta, stride) for delta in deltas]
                if choose(st.booleans()):
                    terms.append(choose(st.sampled_from(terms)))  # one value, read twice
                cut = choose(st.integers(1, len(terms) - 1))
                if kind == "concat":
                    picked = [selection(data, t, width, spatial) if choose(st.booleans()) else t for t in terms]
                    e = concatenation(picked, spatial)
                elif choose(st.booleans()):
                    e = Sum((total(terms[:cut]), total(terms[cut:])))
                else:
                    e = Sum(tuple(terms))
    if spatial and choose(st.integers(0, 5)) == 0:
        e = Layout(e, Mean(2 + spatial, tuple(range(2, 2 + spatial)), keep=False), -1 - spatial)
        e = pointwise(data, affine(data, e, next(channel_counts(e)), 0), next(channel_counts(e)), 0)
    return e


def channel_counts(e: Expr) -> Iterator[int]:
    """The width of ``e``, found from its nearest operand that states it."""
    while True:
        match e:
            case Conv():
                yield e.out_channels
            case Source():
                yield e.channels or 1
            case Concat():
                yield sum(e.sizes)
            case Select():
                yield len(e.index)
            case _:
                e = e.children[0]
                continue
        return


def tree(e: Expr) -> Expr:
    """``e`` with every shared operator written once for each of its readers, as regions have it."""
    return e if isinstance(e, Source) else rebuild_afresh(e)


def rebuild_afresh(e: Expr) -> Expr:
    copies = [tree(c) for c in e.children]
    if isinstance(e, Sum | Concat):
        return replace(e, terms=tuple(copies))
    return rebuild(e, copies) if copies[0] is not e.children[0] else shallow(e)


def shallow(e: Expr) -> Expr:
    return replace(e)


@LAW
@given(expressions())
def test_the_value_is_kept(e: Expr) -> None:
    with time_limit(20):
        after = simplify(flatten(e), PASSES).expr
    for seed, sizes in enumerate([(9, 10, 11), (12, 9, 8)]):
        inputs = draw(source_shapes(e, sizes), seed)
        assert_close(reference(e, inputs), reference(after, inputs), 1e-10)


@LAW
@given(expressions())
def test_the_evaluator_gives_the_reference(e: Expr) -> None:
    """What replacements are verified with, against PyTorch."""
    inputs = draw(source_shapes(e, (9, 10, 11)), 1)
    assert_close(reference(e, inputs), evaluate(e, inputs)[0], 1e-11)


@LAW
@given(expressions())
def test_simplifying_again_changes_nothing(e: Expr) -> None:
    with time_limit(20):
        once = simplify(flatten(e), PASSES).expr
        twice = simplify(once, PASSES)
    assert twice.expr is once
    assert twice.steps == ()


@LAW
@given(expressions())
def test_without_passes_nothing_changes(e: Expr) -> None:
    before = flatten(e)
    assert simplify(before, ()).expr is before


@LAW
@given(expressions())
def test_untouched_nodes_are_the_same_objects(e: Expr) -> None:
    with time_limit(20):
        outcome = simplify(flatten(e), PASSES)
    if not outcome.steps:
        assert {id(n) for n in walk(outcome.expr)} == {id(n) for n in walk(flatten(e)) if n is not e} | {
            id(outcome.expr)
        }
    assert {id(n) for n in walk(outcome.expr) if isinstance(n, Source)} <= {id(n) for n in walk(e)}


WITHOUT_REPMIXER = [p for p in PASSES if p.name != "repmixer"]


@LAW
@given(expressions())
def test_repmixer_is_a_macro(e: Expr) -> None:
    """Without it the other passes reach the same result."""
    before = flatten(e)
    with time_limit(20):
        found = [show(simplify(before, passes).expr) for passes in (PASSES, WITHOUT_REPMIXER)]
    assert found[0] == found[1]


@pytest.mark.parametrize("path", sorted(CASES.glob("repmixer/*.txt")), ids=lambda path: path.stem)
def test_repmixer_is_a_macro_in_its_cases(path: Path) -> None:
    before = flatten(parse(path.read_text().split("# becomes")[0].split("# unchanged")[0]))
    found = [simplify(before, passes).expr for passes in (PASSES, WITHOUT_REPMIXER)]
    assert show(found[0]) == show(found[1])
    inputs = draw(source_shapes(before, (9, 10, 11)), 0)
    assert_close(reference(found[0], inputs), reference(found[1], inputs), 1e-12)


@LAW
@given(expressions())
def test_no_branch_grows_dearer(e: Expr) -> None:
    """Where every operator has one reader, as in a region, the rules themselves never raise the price.

    A negation has no price, since sums subtract; one that is merged into a BatchNorm seems to gain one.
    """
    assume(not any(isinstance(n, Scale) and n.axis is None for n in walk(e)))
    before = flatten(tree(e))
    with time_limit(20):
        after = simplify(before, PASSES).expr
    assert LATENCY.cost(after) <= LATENCY.cost(before) * (1 + 1e-12)


@LAW
@given(expressions(), st.permutations(RULED))
def test_the_price_does_not_depend_on_the_order_of_passes(e: Expr, order: list[Pass]) -> None:
    before = flatten(tree(e))
    with time_limit(20):
        prices = [LATENCY.cost(simplify(before, passes).expr) for passes in (PASSES, order)]
    assert prices[0] == pytest.approx(prices[1], rel=1e-12)


@LAW
@given(expressions())
def test_flattening_keeps_the_value(e: Expr) -> None:
    inputs = draw(source_shapes(e, (9, 10, 11)))
    assert_close(reference(e, inputs), reference(flatten(e), inputs), 1e-12)
    assert flatten(flatten(e)) is flatten(e) or show(flatten(flatten(e))) == show(flatten(e))


@LAW
@given(expressions())
def test_text_can_be_read_back(e: Expr) -> None:
    text = show(e)
    assert show(parse(text)) == text
    parts = [[type(n) for n in walk(x)] for x in (e, parse(text))]
    assert parts[0] == parts[1]


@LAW
@given(expressions())
def test_a_wrong_value_is_noticed(e: Expr) -> None:
    try:
        assert compare_expressions(e, e) == 0
    except ValueError:  # no sizes fit all branches
        reject()
    assert compare_expressions(e, Scale(e, np.ones(()), np.full((), 1e-6))) > REGION_TOLERANCE


# Termination, and names that texts must keep apart


def endless(rewrite: Callable[[Scale], Expr]) -> Pass:
    """A pass that always applies; it gives up by itself long after its driver should have."""
    calls = count(1)

    def rule(e: Expr) -> Expr | None:
        assert next(calls) < 20_000, "the driver does not notice"
        return rewrite(e) if isinstance(e, Scale) else None

    return Pass("endless", "", "", (rule,))


@pytest.mark.parametrize(
    "rewrite",
    [lambda e: Scale(e.x, -e.scale, e.shift), lambda e: Scale(e, np.ones(()), np.zeros(()))],
    ids=["undoes itself", "grows"],
)
def test_rules_that_do_not_terminate_end_in_an_error(rewrite: Callable[[Scale], Expr]) -> None:
    with pytest.raises(RewriteLimitError, match="endless"):
        simplify(Scale(Source("x", 2, -1), np.ones(()), np.zeros(())), [endless(rewrite)])


def test_long_chains_need_no_recursion() -> None:
    e: Expr = Source("x", 2, -1)
    for _ in range(3000):
        e = Sum((e, Scale(e, np.ones(2), np.zeros(2), -1)))
    before: Expr = Source("x", 2, -1)
    for _ in range(3000):
        before = Scale(before, np.full(2, 1.0), np.ones(2), -1)
    with time_limit(30):
        assert LATENCY.cost(flatten(e)) > 0
        after = simplify(before, PASSES).expr
    assert isinstance(after, Scale)
    assert isinstance(after.x, Source)
    np.testing.assert_allclose(after.shift, [3000, 3000])


@pytest.mark.parametrize("key", ["0", "input.1", "a b", "a,b", "x=1", "/stem/conv#2", "ä%1"])
def test_a_source_of_any_name_can_be_read_back(key: str) -> None:
    x = Source(key, 4, -3)
    ones, zeros = (1, 1), (0, 0)
    e = Sum((Conv(x, np.ones((4, 4, 1, 1)), None, ones, ones, zeros, zeros), x))
    again = parse(show(e))
    assert isinstance(again, Sum)
    assert isinstance(again.terms[0], Conv)
    assert again.terms[0].x is again.terms[1]
    assert isinstance(again.terms[1], Source)
    assert show(again) == show(e)


def test_the_language_is_what_its_page_says() -> None:
    page = re.findall(r"^    (%.*?) *(?:#.*)?$", language or "", re.MULTILINE)
    assert len(page) >= 14
    for end, line in enumerate(page, 1):
        described = show(parse("\n".join(page[:end]))).splitlines()[-1]
        assert re.sub(r"%\w+", "%", described) == re.sub(r"%\w+", "%", line)


def test_layouts_can_be_read_back() -> None:
    text = """%x = source c=6 axis=-3 shape=[N,6,H,2*W]
%0 = reshape %x [N,6,H,2*W]->[N,6,2*H*W] axis=-3->-2
%1 = permute %0 axes=0,2,1 axis=-2->-1
%2 = conv %1 6->4 bias"""
    e = parse(text)
    assert show(e) == text
    assert [type(n) for n in walk(e)] == [Source, Layout, Layout, Conv]
    assert isinstance(e.children[0], Layout)
    assert e.children[0].op == Permute((0, 2, 1))


@pytest.mark.parametrize(
    "text",
    [
        "", "%0", "%0 = conv %x 3->4 k=3x3", "%x = source\n%0 = twist %x", "%x = source c=a", "%0 = sum %0, %0",
        "%x = source\n%0 = conv %x 3->4 bais", "%x = source\n%0 = permute %x axes=0,2,1 axis=-2->-2",
    ],
)  # fmt: skip
def test_unreadable_text_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match="expression"):
        parse(text)
