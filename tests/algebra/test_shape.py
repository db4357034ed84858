"""Shapes: what a reshape can be told before run time."""

import pytest

from reparamc.algebra.shape import shape_of, sizes_after


@pytest.mark.parametrize(
    ("before", "after", "sizes"),
    [
        ([2, 6, 5], [2, 30], [2, 30]),
        (["N", 6, 5], ["N", 30], [0, 30]),
        (["N", "L", 6], ["N", 1, "L", 6], [0, 1, -1, 6]),
        (["N", "L", 6], [1, "N", "L", 6], None),
        (["N", 0], [0, "N"], None),
    ],
)
def test_sizes_after(before: list[int | str], after: list[int | str], sizes: list[int] | None) -> None:
    assert sizes_after(shape_of(before), shape_of(after)) == sizes
