"""Kernels from impulse responses: what is a convolution is found, and nothing else is.

A wrong yes is a wrong network, so most of what is here must be refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import pytest
from expression_models import assert_close, reference

from reparamc.algebra.expr import Conv, Source
from reparamc.algebra.probe import find_kernel, only_moves
from reparamc.algebra.rewrite import Declined
from reparamc.algebra.text import parse

Function = Callable[[np.ndarray], np.ndarray]
FLOAT64 = np.dtype(np.float64)


def function(text: str, seed: int = 0) -> Function:
    """The convolution ``text`` of %x, by PyTorch."""
    conv = parse(f"%x = source\n%0 = conv %x {text}", seed)
    (x,) = conv.children
    return lambda a: reference(conv, {cast(Source, x): a})


def probe(
    f: Function, channels: int, sizes: Sequence[int | None], batch: int = 1, dtype: np.dtype = FLOAT64
) -> Conv | Declined:
    found = find_kernel(f, Source("x"), batch, channels, sizes, 8, dtype)
    return found if isinstance(found, Declined) else found[0]


def assert_found(
    f: Function, channels: int, sizes: Sequence[int | None], batch: int = 1, shapes: Sequence[Sequence[int]] = ()
) -> Conv:
    """``f`` is found, and the kernel gives what f gives where the probe has not looked."""
    conv = probe(f, channels, sizes, batch)
    assert isinstance(conv, Conv), conv
    for seed, tried in enumerate(shapes or [sizes]):
        x = np.random.default_rng(100 + seed).standard_normal((3 if shapes else batch, channels, *cast("list", tried)))
        assert_close(f(x), reference(conv, {cast(Source, conv.x): x}), 1e-11)
    return conv


KERNELS = [
    ("3->4 k=3 s=1 p=1 bias", 3, 1),
    ("2->5 k=4 s=3 p=1:2", 2, 1),
    ("3->4 k=3x3 s=1 p=1 bias", 3, 2),
    ("3->2 k=2x4 s=1 p=0:1,2:1 bias", 3, 2),
    ("3->2 k=3x2 s=2,3 p=1,0 bias", 3, 2),
    ("6->4 k=3x1 s=1 d=2,1 p=2,0 g=2", 6, 2),
    ("5->5 k=3x5 s=2 p=1,2 g=5 bias", 5, 2),
    ("3->3 k=2x2 s=1 d=3,2 p=1 bias", 3, 2),
    ("4->2 k=1x1 s=1 p=0", 4, 2),
    ("4->2 k=1x1 s=2 p=0 bias", 4, 2),
    ("2->3 k=2x1x3 s=1 p=0,0,1 bias", 2, 3),
]


@pytest.mark.parametrize(("text", "channels", "axes"), KERNELS, ids=[k[0] for k in KERNELS])
def test_a_kernel_is_found_for_every_size(text: str, channels: int, axes: int) -> None:
    shapes = [(19, 22, 17)[:axes], (8, 9, 10)[:axes]]
    wanted = parse(f"%x = source\n%0 = conv %x {text}")
    conv = assert_found(function(text), channels, [None] * axes, 1, shapes)
    assert isinstance(wanted, Conv)
    assert (conv.stride, conv.delta, conv.groups) == (wanted.stride, wanted.delta, wanted.groups)
    assert conv.kernel == wanted.kernel
    assert (conv.bias is None) == (wanted.bias is None)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("text", "channels", "axes"), KERNELS, ids=[k[0] for k in KERNELS])
def test_a_kernel_is_found_for_one_size(text: str, channels: int, axes: int, batch: int) -> None:
    assert_found(function(text), channels, (9, 12, 7)[:axes], batch)


def test_one_size_may_be_fixed() -> None:
    assert_found(function("3->4 k=3x3 s=2 p=1 bias"), 3, [None, 11], 1, [(14, 11), (9, 11)])


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("text", ["3->4 k=3x3 s=1 p=1 bias", "3->3 k=1x1 s=1 p=0", "3->3 k=3x3 s=2 p=1 g=3"])
def test_tiny_maps_are_right_or_refused(text: str, sizes: tuple[int, int]) -> None:
    conv = probe(function(text), 3, sizes)
    if isinstance(conv, Conv):
        x = np.random.default_rng(7).standard_normal((2, 3, *sizes))
        assert_close(function(text)(x), reference(conv, {cast(Source, conv.x): x}), 1e-11)


def differences(x: np.ndarray) -> np.ndarray:
    return x[:, :, 1:, :-1] - 2 * x[:, :, :-1, 1:] + 1


def every_other(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x[:, 1:, ::2], 3 * x[:, :1, ::2]], axis=1)


def in_place(x: np.ndarray) -> np.ndarray:
    """A shift by assignment, as shifting modules are written."""
    y = np.zeros_like(x)
    y[:, :1, 1:] = x[:, :1, :-1]
    y[:, 1:, :, :-1] = x[:, 1:, :, 1:]
    return y


@pytest.mark.parametrize("sizes", [(None, None), (9, 12)], ids=["any", "one"])
@pytest.mark.parametrize("f", [differences, every_other, in_place])
def test_what_slices_say_is_found(f: Function, sizes: Sequence[int | None]) -> None:
    assert_found(f, 3, sizes, 1, [(17, 20), (8, 9)] if None in sizes else ())


def test_the_zero_function_is_a_kernel_of_zeros() -> None:
    conv = assert_found(lambda x: 0 * x[:, :2] + 1.5, 3, (None, None), 1, [(5, 6)])
    assert not np.any(conv.weight)


# What is none

OUTER, INNER = function("4->3 k=3x3 s=1 p=1 bias", 1), function("3->4 k=3x3 s=1 p=1 bias", 2)


def one_channel_clipped(x: np.ndarray) -> np.ndarray:
    y = INNER(x)
    y[:, 2] = np.maximum(y[:, 2], 0)
    return OUTER(y)


def ramp(x: np.ndarray) -> np.ndarray:
    return np.linspace(1, 1.001, x.shape[-1])


def corner(x: np.ndarray) -> np.ndarray:
    y = INNER(x)
    y[..., -1, -1] *= 1.01
    return y


def corner_bias(x: np.ndarray) -> np.ndarray:
    y = INNER(x)
    y[..., 0, 0] += 1e-3
    return y


def reflected(x: np.ndarray) -> np.ndarray:
    return function("3->4 k=3x3 s=1 p=0")(np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)], mode="reflect"))


def phases(x: np.ndarray) -> np.ndarray:
    """Even rows first, then odd ones."""
    return np.concatenate([x[:, :, ::2], x[:, :, 1::2]], axis=2)


NONE: dict[str, Function] = {
    "relu": lambda x: OUTER(np.maximum(INNER(x), 0)),
    "relu after": lambda x: np.maximum(INNER(x), 0),
    "relu far from zero": lambda x: OUTER(np.maximum(INNER(x), -1000)),
    "relu far above zero": lambda x: np.minimum(INNER(x), 1000),
    "relu on one channel": one_channel_clipped,
    "leaky": lambda x: np.where(x > 0, x, 0.999 * x),
    "square": lambda x: x + 1e-6 * x**2,
    "absolute": np.abs,
    "shift before zero padding": lambda x: INNER(x + 1),
    "pad with ones": lambda x: function("3->4 k=3x3 s=1 p=0")(
        np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=1)
    ),
    "reflect": reflected,
    "edge": lambda x: function("3->4 k=3x3 s=1 p=0")(np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)], mode="edge")),
    "circular": lambda x: np.roll(x, 1, axis=2),
    "gain by place": lambda x: INNER(x) * ramp(x),
    "bias by place": lambda x: INNER(x) + ramp(x),
    "gain in one corner": corner,
    "bias in one corner": corner_bias,
    "mean over the map": lambda x: x - x.mean((2, 3), keepdims=True),
    "mean over rows": lambda x: INNER(x) + 1e-3 * x.mean(3, keepdims=True)[:, :1],
    "flip": lambda x: x[..., ::-1],
    "sum from the left": lambda x: np.cumsum(x, axis=3),
    "sorted": lambda x: np.sort(x, axis=3),
    "rows reordered": phases,
    "two kernels in turn": lambda x: np.where(np.arange(x.shape[3]) % 2, 2.0, 1.0) * x,
    "upsampled": lambda x: x.repeat(2, axis=2),
    "not a number": lambda x: x * np.nan,
    "infinite": lambda x: x / 0.0,
    "raises": lambda x: x[:, 99],
    "rank lost": lambda x: x[:, :, 0],
}


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize("sizes", [(None, None), (9, 12), (5, 5)], ids=["any", "one", "square"])
@pytest.mark.parametrize("name", NONE)
def test_anything_else_is_refused(name: str, sizes: Sequence[int | None]) -> None:
    for dtype in (np.dtype(np.float64), np.dtype(np.float32)):
        assert isinstance(probe(NONE[name], 3, sizes, dtype=dtype), Declined)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (2, 3), (3, 3)])
@pytest.mark.parametrize("name", ["relu", "relu on one channel", "square", "reflect", "flip", "mean over the map"])
def test_tiny_maps_hide_nothing(name: str, sizes: tuple[int, int]) -> None:
    """On a map as small as the kernel some of these are convolutions; then they must equal it."""
    if name == "reflect" and min(sizes) < 2:
        return
    f = NONE[name]
    conv = probe(f, 3, sizes)
    if isinstance(conv, Conv):
        for scale in (1.0, 1e3):
            x = scale * np.random.default_rng(9).standard_normal((1, 3, *sizes))
            assert_close(f(x), reference(conv, {cast(Source, conv.x): x}), 1e-9)
    if name in ("relu", "square"):
        assert isinstance(conv, Declined)


def test_rows_exchanged_with_columns_are_refused() -> None:
    assert isinstance(probe(lambda x: x.swapaxes(2, 3), 3, (7, 7)), Declined)


@pytest.mark.parametrize("f", [lambda x: x + x[::-1], lambda x: x - x.mean(0, keepdims=True), lambda x: x[:1]])
def test_samples_must_stay_apart(f: Function) -> None:
    assert isinstance(probe(f, 3, (7, 6), batch=2), Declined)


def test_a_size_that_does_not_fit_is_no_proof() -> None:
    """It runs at the size of the impulses only."""

    def f(x: np.ndarray) -> np.ndarray:
        if x.shape[2:] != (13, 15):
            raise ValueError("no")
        return x

    assert isinstance(probe(f, 3, (None, None)), Declined)


@pytest.mark.parametrize(("factor", "moves"), [(1.0, True), (2.0, False)])
def test_a_kernel_that_only_moves_elements_is_known(factor: float, moves: bool) -> None:
    """Channels below one another, on maps of two rows: all channels but one are read in the padding."""
    weight = np.zeros((1, 3, 3))
    weight[0, [0, 1, 2], [2, 1, 0]] = factor
    conv = Conv.padded(Source("x", 3, -2), weight, None, stride=(1,), dilation=(2,), begin=(4,), end=(4,))
    assert only_moves(conv, [2]) == moves


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e-6, 1e-8])
def test_a_bias_that_meets_padding_is_uneven_however_small(factor: float) -> None:
    first, second = function("3->3 k=1x1 s=1 p=0"), function("3->3 k=3x3 s=1 p=1", 1)
    bias = factor * np.array([1.0, -2.0, 0.5]).reshape(3, 1, 1)
    assert isinstance(probe(lambda a: second(first(a) + bias), 3, (None, None), dtype=np.dtype(np.float32)), Declined)


@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e-10])
def test_a_small_bias_and_small_taps_are_kept(factor: float) -> None:
    first, second = function("3->3 k=3x3 s=1 p=1"), function("3->3 k=1x1 s=1 p=0", 1)
    bias = factor * np.array([1.0, -2.0, 0.5]).reshape(3, 1, 1)
    conv = probe(lambda a: second(a) + factor * first(a) + bias, 3, (None, None), dtype=np.dtype(np.float32))
    assert isinstance(conv, Conv)
    assert conv.bias is not None
    assert_close(np.array(conv.bias), bias.ravel(), 1e-9)
    zero, tap = np.zeros((1, 3, 9, 9)), np.zeros((1, 3, 9, 9))
    tap[0, :, 4, 4] = 1
    expected = (factor * (first(tap) - first(zero)))[0, :, 3, 3]
    assert_close(np.array(conv.weight)[:, :, -1, -1].sum(1), expected, 1e-4)
