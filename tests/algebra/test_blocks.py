"""Kernels over blocks of positions, as channels, are kernels over the positions: on random slices and kernels."""

from __future__ import annotations

import numpy as np
from expression_models import assert_close, reference
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from reparamc.algebra.cost import LATENCY, MACS
from reparamc.algebra.expr import Concat, Conv, Expr, Layout, Source, Spread
from reparamc.algebra.kernels import equal_taps
from reparamc_passes.space_to_depth import into_kernel, into_producer

RANDOM = settings(
    derandomize=True, deadline=None, max_examples=40, database=None, phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
)  # fmt: skip


@st.composite
def kernels(draw: st.DrawFn, x: Expr, inside: int) -> Conv:
    """A dense kernel over ``x``, which has so many channels."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    sides = [draw(st.sampled_from([(1, 0, 0), (2, 0, 1), (3, 1, 1), (3, 0, 0), (3, 2, 0)])) for _ in range(2)]
    size, begin, end = zip(*sides, strict=True)
    weight = rng.standard_normal((draw(st.integers(1, 4)), inside, *size))
    bias = rng.standard_normal(len(weight)) if draw(st.booleans()) else None
    stride = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    return Conv.padded(x, weight, bias, stride, (1, 1), begin, end)


def cut(x: Expr, channels: int, step: tuple[int, int], first: tuple[int, int], gone: tuple[int, int]) -> Conv:
    begin = tuple(-n for n in first)
    end = tuple(-n for n in gone)
    return Conv.padded(x, equal_taps(channels, (1, 1)), None, step, (1, 1), begin, end, channels)


def checked(before: Expr, after: Expr, source: Source, channels: int) -> int:
    """How many sizes the expression takes, at all of which it is ``after``."""
    taken = 0
    for height, width in [(h, w) for h in (2, 6, 7) for w in (4, 6)]:
        x = np.random.default_rng(height).standard_normal((2, channels, height, width))
        try:
            expected = reference(before, {source: x})
        except (RuntimeError, ValueError):
            continue
        if expected.size:
            assert_close(expected, reference(after, {source: x}), 1e-12)
            taken += 1
    return taken


@RANDOM
@given(st.data())
def test_slices_side_by_side(data: st.DataObject) -> None:
    channels, source = data.draw(st.integers(1, 3)), Source("x", axis=-3)
    step = data.draw(st.sampled_from([(2, 2), (2, 1), (3, 2), (1, 3)]))
    starts = st.tuples(*(st.integers(-1, n) for n in step))
    ends = st.sampled_from([(0, 0)] * 4 + [(1, 0), (0, 2)])
    places = data.draw(st.lists(st.tuples(starts, ends), min_size=1, max_size=4))
    cuts = tuple(cut(source, channels, step, first, gone) for first, gone in places)
    whole = Concat(cuts, (channels,) * len(cuts), -3)
    e = data.draw(kernels(whole, channels * len(cuts)))
    if isinstance(found := into_kernel(e, LATENCY), Conv):
        assert found.x is source
        assert not found.skips_border
        checked(e, found, source, channels)


def test_the_slices_of_focus_are_taken_at_every_size() -> None:
    source = Source("x", axis=-3)
    cuts = tuple(cut(source, 3, (2, 2), (i, j), (0, 0)) for j in range(2) for i in range(2))
    weight = np.random.default_rng(0).standard_normal((4, 12, 3, 3))
    e = Conv.padded(Concat(cuts, (3,) * 4, -3), weight, None, (1, 1), (1, 1), (1, 1), (1, 1))
    found = into_kernel(e, LATENCY)
    assert isinstance(found, Conv)
    assert (found.kernel, found.stride, found.padding) == ((6, 6), (2, 2), ((2, 2), (2, 2)))
    assert checked(e, found, source, 3) == 4  # two heights and two widths are even


@RANDOM
@given(st.data())
def test_blocks_as_channels(data: st.DataObject) -> None:
    channels, block, source = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 3)), Source("x", axis=-3)
    e = data.draw(
        kernels(Layout(source, Spread(4, block, data.draw(st.booleans()), back=True), -3), channels * block**2)
    )
    found = into_kernel(e, LATENCY)
    assert isinstance(found, Conv)
    checked(e, found, source, channels)


@RANDOM
@given(st.data())
def test_a_matrix_after_a_pixel_shuffle(data: st.DataObject) -> None:
    channels, block, source = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 3)), Source("x", axis=-3)
    inner = data.draw(kernels(source, channels))
    rng, width = np.random.default_rng(data.draw(st.integers(0, 99))), data.draw(st.integers(1, 3))
    spread = Conv(
        source, rng.standard_normal((width * block**2, *inner.weight.shape[1:])), rng.standard_normal(width * block**2),
        inner.stride, inner.dilation, inner.offset, inner.delta,
    )  # fmt: skip
    e = Conv.padded(
        Layout(spread, Spread(4, block, data.draw(st.booleans())), -3),
        rng.standard_normal((data.draw(st.integers(1, width)), width, 1, 1)),
        rng.standard_normal(1)[0] * np.ones(1) if width == 1 else None, (1, 1), (1, 1), (0, 0), (0, 0),
    )  # fmt: skip
    found = into_producer(e, MACS)
    assert isinstance(found, Layout)
    checked(e, found, source, channels)
