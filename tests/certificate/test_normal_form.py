"""The algebra of normal forms: against sums written out by hand, and its power to tell two maps apart."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from reparamc.certificate import kernels as nk
from reparamc.certificate import layouts as nl
from reparamc.certificate import normal_form as nf
from reparamc.certificate.agreement import Precision, agree
from reparamc.certificate.axes import Digit, Dim, Unrepresentable, composed, identity_view, reshaped
from reparamc.certificate.kernels import Kernel
from reparamc.certificate.normal_form import Value

SINGLE = Precision(2.0**-24, 2.0**-150)
N, H = Dim(1, ("N",)), Dim(1, ("H",))


def image(channels: int = 3, name: str = "x") -> Value:
    return nf.leaf(name, (N, Dim(channels), H))


def kernel(
    rng: np.random.Generator, rows: int, columns: int, size: int, stride: int, begin: int, end: int, groups: int = 1
) -> Kernel:
    weight = rng.standard_normal((rows, columns // groups, size))
    first = nk.grouped_first(rows, columns // groups, groups)
    return Kernel(weight, first, tuple((t - begin,) for t in range(size)), (2,), (stride,), (size - 1 - begin - end,))


def dense(k: Kernel, columns: int) -> np.ndarray:
    found = np.zeros((len(k.weight), columns, k.weight.shape[2]))
    for row, first in enumerate(k.first):
        found[row, first : first + k.weight.shape[1]] = k.weight[row]
    return found


def run(k: Kernel, x: np.ndarray) -> np.ndarray:
    """The kernel applied by its definition: x is (channels, size)."""
    weight, (stride,), (delta,) = dense(k, len(x)), k.stride, k.delta
    out = np.zeros((len(weight), (x.shape[1] - 1 - delta) // stride + 1))
    for p, (t, (offset,)) in product(range(out.shape[1]), enumerate(k.offsets)):
        if 0 <= stride * p + offset < x.shape[1]:
            out[:, p] += weight[:, :, t] @ x[:, stride * p + offset]
    return out


def evaluate(value: Value, x: np.ndarray) -> np.ndarray:
    """A normal form over one source, read literally: coefficients, offsets and guards."""
    ((source, grids),) = value.grids.items()
    stride, delta = grids[2]
    dim = x.shape[1]
    out = np.zeros((value.channels, (dim - 1 - delta) // stride + 1))
    for p in range(out.shape[1]):
        for b in value.blocks:
            for t, tap in enumerate(b.taps):
                offset, low, high = tap[2]
                if p < low or stride * p + high > dim - 1:
                    continue
                for j, row in enumerate(b.rows):
                    run_of = x[b.first[j] : b.first[j] + b.weight.shape[1], stride * p + offset]
                    out[row, p] += b.left[j] * (b.weight[j, :, t] @ run_of)
        for where, vector in value.vectors.items():
            if where is None or (p >= where[1][2].low and stride * p + where[1][2].high <= dim - 1):
                out[:, p] += vector.value
    assert all(b.source == source for b in value.blocks)
    return out


@pytest.mark.parametrize("seed", range(60))
def test_a_chain_of_padded_kernels_with_biases(seed: int) -> None:
    """Whatever two or three kernels do at their borders, the normal form does, at every size."""
    rng = np.random.default_rng(seed)
    value, kernels, width = image(4), [], 4
    for _ in range(int(rng.integers(2, 4))):
        groups = int(rng.choice([1, 2, width])) if width % 2 == 0 else 1
        rows = groups * int(rng.integers(1, 3))
        size, stride = int(rng.integers(1, 4)), int(rng.integers(1, 3))
        begin, end = rng.integers(-1, 3, 2).tolist()
        k = kernel(rng, rows, width, size, stride, begin, end, groups)
        bias = rng.standard_normal(rows)
        kernels.append((k, bias))
        value, width = nf.shifted(nk.convolved(value, k, 1), bias, 1), rows
    for dim in (12, 13, 14, 17):
        x = rng.standard_normal((4, dim))
        expected = x
        for k, bias in kernels:
            expected = run(k, expected) + bias[:, None]
        np.testing.assert_allclose(evaluate(value, x), expected, rtol=1e-12, atol=1e-12)


def test_guards_are_what_tells_a_crop_from_a_border() -> None:
    """The same taps, with and without a border of an intermediate: equal inside, different along the edge."""
    rng = np.random.default_rng(0)
    point, wide = kernel(rng, 3, 3, 1, 1, 0, 0), kernel(rng, 3, 3, 3, 1, 1, 1)
    inner = nk.convolved(image(), point, 1)
    bordered = nk.convolved(nf.shifted(inner, np.ones(3), 1), wide, 1)
    plain = nf.shifted(nk.convolved(inner, wide, 1), wide.weight.sum(axis=(1, 2)), 1)
    found = agree(bordered, plain, SINGLE)
    assert found.verdict == "different"
    assert "from position 1 on" in found.reason or "before the end" in found.reason
    merged = Kernel(
        np.einsum("omt,mi->oit", wide.weight, point.weight[:, :, 0]), wide.first, wide.offsets, (2,), (1,), (0,)
    )
    assert agree(nk.convolved(inner, wide, 1), nk.convolved(image(), merged, 1), SINGLE).verdict == "equal"


def test_a_padding_with_a_value_is_a_bias_outside() -> None:
    rng = np.random.default_rng(1)
    padded = nk.padded(image(), (2,), (2,), (1,), 0.5, 1)
    x = rng.standard_normal((3, 9))
    np.testing.assert_allclose(evaluate(padded, x), np.pad(x, ((0, 0), (2, 1)), constant_values=0.5))


@pytest.mark.parametrize("change", [1e-3, 2e-7])
def test_one_wrong_coefficient_is_named_however_small_its_row(change: float) -> None:
    rng = np.random.default_rng(2)
    k = kernel(rng, 5, 3, 3, 1, 1, 1)
    k.weight[3] *= 1e-9
    wrong = k.weight.copy()
    wrong[3, 2, 0] *= 1 + change
    found = agree(nk.convolved(image(), k, 1), nk.convolved(image(), replace(k, weight=wrong), 1), SINGLE)
    assert found.verdict == "different"
    assert found.units > 1
    assert "channel 3 reads channel 2 of 'x' at offset (-1)" in found.reason


def test_rounding_once_is_equal_and_nearly_as_much_as_is_allowed() -> None:
    k = kernel(np.random.default_rng(3), 8, 3, 3, 1, 1, 1)
    rounded = replace(k, weight=k.weight.astype(np.float32))
    found = agree(nk.convolved(image(), k, 1), nk.convolved(image(), rounded, 1), SINGLE)
    assert found.verdict == "equal"
    assert 0.5 < found.units <= 1
    assert 0 < found.bound <= SINGLE.unit


def test_cancellation_raises_no_alarm() -> None:
    """x + W x - W x: magnitudes of a million, and an identity that is left."""
    k = kernel(np.random.default_rng(4), 3, 3, 3, 1, 1, 1)
    big = replace(k, weight=1e6 * k.weight)
    branch = nf.scaled(nk.convolved(image(), big, 1), np.array([1 / 3, 0.7, 1.1]), 1)
    total = nf.added([image(), branch, nf.scaled(branch, -1.0)])
    assert agree(total, nf.added([image(), nf.scaled(nk.convolved(image(), big, 1), 0.0)]), SINGLE).verdict == "equal"


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_is_different_unless_both_are(wrong: float) -> None:
    k = kernel(np.random.default_rng(5), 3, 3, 1, 1, 0, 0)
    bad = k.weight.copy()
    bad[1, 1] = wrong
    other = nk.convolved(image(), replace(k, weight=bad), 1)
    assert agree(nk.convolved(image(), k, 1), other, SINGLE).verdict == "different"
    assert agree(other, other, SINGLE).verdict == "equal"


def many(weight: np.ndarray) -> tuple[Value, np.ndarray]:
    """A matrix between two scales, and what it is multiplied out and rounded."""
    rng = np.random.default_rng(12)
    left, right = rng.uniform(0.5, 2, len(weight)), rng.uniform(0.5, 2, weight.shape[1])
    inner = nf.scaled(image(weight.shape[1]), right, 1)
    with np.errstate(over="ignore"):
        rounded = (left[:, None] * weight * right).astype(np.float32)
    return nf.scaled(nk.mixed(inner, weight, 1), left, 1), rounded


def ups(a: np.ndarray) -> np.ndarray:
    return np.nextafter(a, np.float32(np.inf))


def test_what_is_rounded_to_nearest_is_equal() -> None:
    value, rounded = many(np.random.default_rng(13).standard_normal((300, 256)))
    found = agree(value, nk.mixed(image(256), rounded, 1), SINGLE)
    assert found.verdict == "equal"
    assert 0.9 < found.units <= 1
    assert found.bound <= SINGLE.unit


def test_subnormal_numbers_are_off_by_more_than_one_rounding() -> None:
    value, rounded = many(np.random.default_rng(16).standard_normal((300, 256)) * 2.0**-140)
    found = agree(value, nk.mixed(image(256), rounded, 1), SINGLE)
    exact = agree(value, nk.mixed(image(256), rounded.astype(np.float64), 1), SINGLE)
    assert (found.verdict, exact.verdict) == ("equal", "equal")
    assert SINGLE.unit < exact.bound <= found.bound


@pytest.mark.parametrize("kind", ["next", "infinite", "overflow", "not a number", "a negative zero"])
def test_one_wrong_coefficient_among_many(kind: str) -> None:
    weight = np.random.default_rng(14).standard_normal((300, 256))
    if kind == "overflow":
        weight[290, 7] = 1e39
    if kind == "a negative zero":
        weight[290, 7] = 0
    value, rounded = many(weight)
    if kind == "next":
        rounded[290, 7] = ups(ups(rounded[290, 7]))
    elif kind == "a negative zero":
        rounded[290, 7] = -0.0
    elif kind != "overflow":
        rounded[290, 7] = np.inf if kind == "infinite" else np.nan
    found = agree(value, nk.mixed(image(256), rounded, 1), SINGLE)
    if kind == "a negative zero":
        assert found.verdict == "equal"
    else:
        assert found.verdict == "different"
        assert "channel 290 reads channel 7 of 'x'" in found.reason


def test_taps_that_read_nothing_may_be_anything_among_many() -> None:
    """A border before two elements, of which one is left."""
    k = kernel(np.random.default_rng(15), 128, 128, 3, 1, 1, 0)
    pair = nf.leaf("x", (N, Dim(128), Dim(2)))
    other = k.weight.astype(np.float32)
    other[:, :, 0] += 1
    value = nk.convolved(pair, k, 1)
    assert agree(value, nk.convolved(pair, replace(k, weight=other), 1), SINGLE).verdict == "equal"
    other[100, 100, 1] *= 2
    assert agree(value, nk.convolved(pair, replace(k, weight=other), 1), SINGLE).verdict == "different"


def test_other_strides_and_sizes_are_different() -> None:
    rng = np.random.default_rng(6)
    k = kernel(rng, 3, 3, 3, 1, 1, 1)
    value = nk.convolved(image(), k, 1)
    strided = nk.convolved(image(), replace(k, stride=(2,)), 1)
    shorter = nk.convolved(image(), replace(k, delta=(1,)), 1)
    assert agree(value, strided, SINGLE).verdict == "different"
    assert agree(value, shorter, SINGLE).verdict == "different"


def test_sizes_that_agree_for_some_sizes_are_compared_at_those_that_are_known() -> None:
    rng = np.random.default_rng(7)
    k = kernel(rng, 3, 3, 2, 2, 0, 0)
    for dim, expected in ((Dim(8), "equal"), (Dim(9), "different"), (H, "undecided")):
        x = nf.leaf("x", (N, Dim(3), dim))
        a, b = nk.convolved(x, k, 1), nk.convolved(x, replace(k, delta=(0,)), 1)
        assert agree(a, b, SINGLE).verdict == expected, dim


# Layouts


def test_a_shuffle_is_a_selection() -> None:
    x = nf.leaf("x", (N, Dim(6), H))
    turned = nl.permuted(nl.regrouped(x, (N, Dim(2), Dim(3), H)), (0, 2, 1, 3))
    shuffled = nl.regrouped(turned, (N, Dim(6), H))
    assert agree(shuffled, nl.selected(x, (0, 3, 1, 4, 2, 5), 1), SINGLE).verdict == "equal"
    assert agree(shuffled, nl.selected(x, (0, 3, 1, 4, 5, 2), 1), SINGLE).verdict == "different"


def test_a_matrix_goes_through_heads() -> None:
    """Linear, BatchNorm over flattened tokens, heads, a slice of each: as one linear layer with some of the rows."""
    rng = np.random.default_rng(8)
    length, matrix = Dim(7), rng.standard_normal((12, 4))
    x = nf.leaf("x", (N, length, Dim(4)))
    gain = rng.uniform(0.5, 2, 12)
    flat = nl.regrouped(nk.mixed(x, matrix, 2), (None, Dim(12)))
    scaled = nl.regrouped(nf.scaled(flat, gain, 1), (N, length, Dim(2), Dim(6)))
    part = nl.permuted(nl.selected(scaled, range(2, 4), 3), (0, 2, 1, 3))
    rows = [2, 3, 8, 9]
    direct = nk.mixed(x, (gain[:, None] * matrix)[rows], 2)
    direct = nl.permuted(nl.regrouped(direct, (N, length, Dim(2), Dim(2))), (0, 2, 1, 3))
    assert agree(part, direct, SINGLE).verdict == "equal"


def test_a_mean_commutes_with_matrices_and_not_with_borders() -> None:
    rng = np.random.default_rng(9)
    point, wide = kernel(rng, 3, 3, 1, 1, 0, 0), kernel(rng, 3, 3, 3, 1, 1, 1)
    before = nl.averaged(nk.convolved(image(), point, 1), (2,), keep=True)
    after = nk.convolved(nl.averaged(image(), (2,), keep=True), point, 1)
    assert agree(before, after, SINGLE).verdict == "equal"
    assert agree(nl.averaged(nk.convolved(image(), wide, 1), (2,), True), before, SINGLE).verdict != "equal"


def test_views() -> None:
    base = (N, Dim(6), H)
    split = reshaped(identity_view(base), (N, Dim(2), Dim(3), None))
    assert split[1] == (Digit(1, Dim(3), Dim(2)),)
    assert composed(split, reshaped(identity_view((N, Dim(2), Dim(3), H)), base)) == identity_view(base)
    with pytest.raises(Unrepresentable):
        reshaped(identity_view(base), (N, Dim(4), None))
    with pytest.raises(Unrepresentable):
        reshaped(identity_view(base), (N, Dim(6)))


# Transposed kernels


def test_zeros_between_make_a_transposed_kernel() -> None:
    """Offsets that only meet zeros do not count; matrices before and factors after do."""
    rng = np.random.default_rng(10)
    k = replace(kernel(rng, 3, 3, 4, 1, 1, 1), delta=(-2,))
    matrix = rng.standard_normal((3, 3))
    through = nk.convolved(nk.spread(nk.mixed(image(), matrix, 1), (2,), (2,)), k, 1)
    composed_ = replace(k, weight=np.einsum("omt,mi->oit", k.weight, matrix))
    assert agree(through, nk.convolved(nk.spread(image(), (2,), (2,)), composed_, 1), SINGLE).verdict == "equal"
    assert agree(through, nk.convolved(nk.spread(image(), (2,), (2,)), k, 1), SINGLE).verdict == "different"
    with pytest.raises(Unrepresentable):
        nk.spread(nf.shifted(image(), 1.0), (2,), (2,))
