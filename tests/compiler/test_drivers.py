"""What the drivers of the compiler do, one by one, with the result written down.

In these graphs ``scale=2`` stands for an activation: nothing is read of it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from expression_graph import planned
from expression_models import assert_close, draw, reference, source_shapes

from reparamc.algebra.expr import Conv, Expr, Scale, Sum, flatten
from reparamc.algebra.text import parse, show

MAP = "%x = source c=4 axis=-3 shape=[N,4,9,9]\n"
TOKENS = "%x = source c=4 axis=-1 shape=[N,5,4]\n"


def is_activation(e: Expr) -> bool:
    return isinstance(e, Scale) and e.axis is None and float(e.scale) == 2


def becomes(before: Expr, expected: str) -> None:
    after = planned(before, is_activation)
    inputs = draw(source_shapes(before, (9, 9, 9)), 0)
    assert_close(reference(before, inputs), reference(after, inputs), 1e-10)
    assert show(after) == expected.strip()


def check(before: str, expected: str, shape: str = MAP) -> None:
    becomes(flatten(parse(shape + before)), shape + expected)


def test_joining() -> None:
    """A value that a region reads twice, and the region that computes it, become one operator."""
    check(
        """
%0 = conv %x 4->4 k=1x1 s=1 p=0
%1 = conv %0 4->4 k=3x3 s=1 p=0
%2 = conv %0 4->4 k=3x3 s=1 p=0
%3 = sum %1, %2
""",
        "%0 = conv %x 4->4 k=3x3 s=1 p=0",
    )


def test_joining_that_does_not_pay() -> None:
    """A bottleneck: one operator of all would be dearer."""
    check(
        """
%0 = conv %x 4->1 k=1x1 s=1 p=0 bias
%1 = conv %0 1->4 k=3x3 s=1 p=1
%2 = conv %0 1->4 k=1x1 s=1 p=0
%3 = sum %1, %2
""",
        """%0 = conv %x 4->1 k=1x1 s=1 p=0 bias
%1 = conv %0 1->4 k=3x3 s=1 p=1""",
    )


def test_sharing_a_scale() -> None:
    """A BatchNorm goes into all its users."""
    check(
        """
%0 = scale=2 %x
%1 = batchnorm %0 c=4 axis=-3
%2 = conv %1 4->4 k=1x1 s=1 p=0
%3 = conv %1 4->4 k=1x1 s=1 p=0 bias
%4 = scale=2 %2
%5 = scale=2 %3
%6 = sum %4, %5
""",
        """%0 = scale=2 %x
%1 = conv %0 4->4 k=1x1 s=1 p=0 bias
%2 = scale=2 %1
%3 = conv %0 4->4 k=1x1 s=1 p=0 bias
%4 = scale=2 %3
%5 = sum %2, %4""",
    )


def test_sharing_or_none() -> None:
    """One user cannot take the BatchNorm in, so that it stays for all."""
    check(
        """
%0 = scale=2 %x
%1 = batchnorm %0 c=4 axis=-3
%2 = conv %1 4->4 k=1x1 s=1 p=0
%3 = conv %1 4->4 k=3x3 s=1 p=1
%4 = scale=2 %2
%5 = scale=2 %3
%6 = sum %4, %5
""",
        """%0 = scale=2 %x
%1 = batchnorm %0 c=4 axis=-3
%2 = conv %1 4->4 k=1x1 s=1 p=0
%3 = scale=2 %2
%4 = conv %1 4->4 k=3x3 s=1 p=1
%5 = scale=2 %4
%6 = sum %3, %5""",
    )


def test_sharing_computes_a_move_once() -> None:
    """The BatchNorm goes through the permutation into both users, over which it is still one."""
    check(
        """
%0 = scale=2 %x
%1 = batchnorm %0 c=4 axis=-3
%2 = permute %1 axes=0,2,3,1 axis=-3->-1
%3 = conv %2 4->8
%4 = conv %2 4->8
%5 = scale=2 %3
%6 = scale=2 %4
%7 = sum %5, %6
""",
        """%0 = scale=2 %x
%1 = permute %0 axes=0,2,3,1 axis=-3->-1
%2 = conv %1 4->8 bias
%3 = scale=2 %2
%4 = conv %1 4->8 bias
%5 = scale=2 %4
%6 = sum %3, %5""",
    )


def test_pieces() -> None:
    """The BatchNorm of one piece goes into the convolution that both are cut from."""
    check(
        """
%0 = conv %x 4->6
%1 = select %0 0:3 of 6 axis=-1
%2 = select %0 3:6 of 6 axis=-1
%3 = batchnorm %1 c=3 axis=-1
%4 = scale=2 %3
%5 = scale=2 %2
%6 = sum %4, %5
""",
        """%0 = conv %x 4->6 bias
%1 = select %0 0:3 of 6 axis=-1
%2 = scale=2 %1
%3 = select %0 3:6 of 6 axis=-1
%4 = scale=2 %3
%5 = sum %2, %4""",
        TOKENS,
    )


def test_impulse_response() -> None:
    """Two shifts that meet the padding cancel: no rule sees it, a probe does."""
    rng = np.random.default_rng(0)
    x = parse(MAP + "%0 = scale=2 %x")
    weight, shift = rng.standard_normal((4, 4, 3, 3)), rng.standard_normal(4)
    first, second = (Scale(x, factor, shift, -3) for factor in rng.uniform(0.5, 2, (2, 4)))
    plus, minus = (
        Conv.padded(e, w, None, (1, 1), (1, 1), (1, 1), (1, 1)) for e, w in ((first, weight), (second, -weight))
    )
    becomes(Sum((plus, minus)), MAP + "%0 = scale=2 %x\n%1 = conv %0 4->4 k=3x3 s=1 p=1")


@pytest.mark.parametrize("equal", [True, False])
def test_duplicates(equal: bool) -> None:
    """Equal convolutions of one value are computed once."""
    x = parse(MAP + "%0 = scale=2 %x")
    one = Conv.padded(x, np.random.default_rng(0).standard_normal((4, 4, 3, 3)), None, (1, 1), (1, 1), (1, 1), (1, 1))
    other = replace(one, weight=one.weight.copy() if equal else one.weight * 2)
    activations = [Scale(e, np.full((), 2.0), np.zeros(())) for e in (one, other)]
    first = MAP + "%0 = scale=2 %x\n%1 = conv %0 4->4 k=3x3 s=1 p=1\n%2 = scale=2 %1\n"
    once = "%3 = scale=2 %1\n%4 = sum %2, %3"
    twice = "%3 = conv %0 4->4 k=3x3 s=1 p=1\n%4 = scale=2 %3\n%5 = sum %2, %4"
    becomes(Sum(tuple(activations)), first + (once if equal else twice))


def test_sharing_makes_equal_moves_once() -> None:
    """The reshape that both users read becomes one with the reshape of each, which is the same one."""
    check(
        """
%0 = scale=2 %x
%1 = reshape %0 [N,5,4]->[N,20] axis=-1->?
%2 = reshape %1 [N,20]->[N,2,10] axis=?->?
%3 = permute %2 axes=0,2,1 axis=?->?
%4 = reshape %1 [N,20]->[N,2,10] axis=?->?
%5 = permute %4 axes=0,2,1 axis=?->?
%6 = scale=2 %3
%7 = scale=2 %5
%8 = sum %6, %7
""",
        """%0 = scale=2 %x
%1 = reshape %0 [N,5,4]->[N,2,10] axis=-1->?
%2 = permute %1 axes=0,2,1 axis=?->?
%3 = scale=2 %2
%4 = permute %1 axes=0,2,1 axis=?->?
%5 = scale=2 %4
%6 = sum %3, %5""",
        TOKENS,
    )


def test_a_move_stays_with_the_region_before_it() -> None:
    """The reshape after the BatchNorm undoes the one before it, although two regions read it."""
    check(
        """
%0 = conv %x 4->4
%1 = reshape %0 [2,5,4]->[10,4] axis=-1->-1
%2 = batchnorm %1 c=4 axis=-1
%3 = reshape %2 [10,4]->[2,5,4] axis=-1->-1
%4 = reshape %3 [2,5,4]->[2,5,2,2] axis=-1->?
%5 = permute %4 axes=0,2,1,3 axis=?->?
%6 = permute %4 axes=0,2,1,3 axis=?->?
%7 = scale=2 %5
%8 = scale=2 %6
%9 = sum %7, %8
""",
        """%0 = conv %x 4->4 bias
%1 = reshape %0 [2,5,4]->[2,5,2,2] axis=-1->?
%2 = permute %1 axes=0,2,1,3 axis=?->?
%3 = scale=2 %2
%4 = permute %1 axes=0,2,1,3 axis=?->?
%5 = scale=2 %4
%6 = sum %3, %5""",
        "%x = source c=4 axis=-1 shape=[2,5,4]\n",
    )
