"""What other tests compare with must itself be right, and able to say no."""

from __future__ import annotations

from time import sleep

import numpy as np
import pytest
from expression_models import assert_close, reference, run, source_shapes, time_limit, to_module, to_onnx

from reparamc.algebra.expr import Conv, Source
from reparamc.algebra.text import parse

BLOCK = """%x = source c=4 axis=-3
%0 = conv %x 4->4 k=2x3 s=2,1 d=1,2 p=0:1,2 g=2 bias
%1 = batchnorm %0 c=4 axis=-3
%2 = conv %x 4->4 k=1x1 s=2,1 p=0
%3 = scale=-1 %2
%4 = scale %1 c=4 axis=-3 shift
%5 = sum %4, %3
%6 = permute %5 axes=0,2,3,1 axis=-3->-1
%7 = conv %6 4->3 bias"""


def test_the_reference_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    source = Source("x", 2, -2)
    conv = Conv(source, rng.standard_normal((2, 1, 3)), rng.standard_normal(2), (2,), (2,), (-1,), (2,), 2)
    x = rng.standard_normal((1, 2, 8))
    count = (8 - 1 - 2) // 2 + 1
    expected = np.zeros((1, 2, count))
    for o in range(2):
        for p in range(count):
            at = [2 * p - 1 + 2 * t for t in range(3)]
            expected[0, o, p] = conv.bias_or_zero[o] + sum(
                conv.weight[o, 0, t] * x[0, o, a] for t, a in enumerate(at) if 0 <= a < 8
            )
    assert_close(expected, reference(conv, {source: x}), 1e-14)


def test_the_reference_of_transposed_convolutions_is_the_formula() -> None:
    rng = np.random.default_rng(3)
    source = Source("x", 4, -2)
    weight, bias = rng.standard_normal((6, 2, 3)), rng.standard_normal(6)
    conv = Conv(source, weight, bias, (3,), (2,), (-1,), (1,), 2, transposed=True)
    x = rng.standard_normal((1, 4, 5))
    expected = np.zeros((1, 6, 3 * 4 + 1 + 1)) + bias[:, None]
    for o in range(6):
        for i in range(2):
            for p in range(5):
                for t in range(3):
                    at = 3 * p - 1 + 2 * t
                    if 0 <= at < expected.shape[2]:
                        expected[0, o, at] += weight[o, i, t] * x[0, 2 * (o // 3) + i, p]
    assert_close(expected, reference(conv, {source: x}), 1e-14)


CHANNELS = """%x = source c=6 axis=-3
%0 = conv %x 6->4 k=3x2 s=2,3 d=1,2 p=1,1:0 g=2 transposed bias
%1 = select %0 3,0,1 of 4 axis=-3
%2 = select %0 1:3 of 4 axis=-3
%3 = concat %2, %1, %0 c=2,3,4 axis=-3
%4 = mean %3 axes=3 of 4 axis=-3->-3 keep
%5 = mean %4 axes=2,3 of 4 axis=-3->-1
%6 = conv %5 9->5 bias"""


@pytest.mark.parametrize("text", [BLOCK, CHANNELS], ids=["block", "channels"])
@pytest.mark.parametrize("sizes", [(8, 6), (7, 9), (9, 8)])
def test_all_forms_of_an_expression_agree(sizes: tuple[int, int], text: str) -> None:
    torch = pytest.importorskip("torch")
    e = parse(text)
    ((source, shape),) = source_shapes(e, sizes).items()
    x = np.random.default_rng(1).standard_normal(shape)
    expected = reference(e, {source: x})
    for static in (sizes, None):
        assert_close(expected, run(to_onnx(e, static), {"x": x.astype(np.float32)})[0], 1e-5)
    with torch.no_grad():
        assert_close(expected, to_module(e)(torch.from_numpy(x)).numpy(), 1e-12)


@pytest.mark.parametrize(
    "other",
    [
        np.array([[1.0, 2.0, np.nan]]),
        np.array([1.0, 2.1, np.nan]),
        np.array([1.0, 2.0, 3.0]),
        np.array([1.0, np.nan, np.nan]),
        np.array([1.0, 2.0, np.inf]),
    ],
    ids=["shape", "value", "number for NaN", "NaN for number", "infinity for NaN"],
)
def test_comparison_can_fail(other: np.ndarray) -> None:
    assert_close(np.array([1.0, 2.0, np.nan]), np.array([1.0, 2.0, np.nan]), 0.0)
    with pytest.raises(AssertionError):
        assert_close(np.array([1.0, 2.0, np.nan]), other, 1e-3)


def test_comparison_with_zero_can_fail() -> None:
    with pytest.raises(AssertionError):
        assert_close(np.zeros(3), np.full(3, 1e-30), 1e-3)


def test_the_time_limit_expires() -> None:
    with pytest.raises(TimeoutError), time_limit(1):
        sleep(10)
