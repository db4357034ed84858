"""Inputs made from a few numbers and a name: what each pattern is, and what whole numbers stay within."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from reparamc.equivalence.trials import NON_FINITE, PATTERNS, SCALES, Slot, Space, Trial, make_inputs, scales, strategy

UNHURRIED: Any = list(HealthCheck)


def made(slot: Slot, **settings: object) -> np.ndarray:
    return make_inputs([slot], Trial(**settings))["x"]  # pyright: ignore[reportArgumentType]


def image(dtype: object = np.float32, **more: object) -> Slot:
    return Slot("x", np.dtype(dtype), ("N", 3, "H", 6), **more)  # pyright: ignore[reportCallIssue, reportArgumentType]


SIZED = {"N": 2, "H": 5}


@pytest.mark.parametrize("pattern", [*PATTERNS, *NON_FINITE])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_pattern_fits_its_slot(pattern: str, dtype: type) -> None:
    x = made(image(dtype), sizes=SIZED, pattern=pattern)
    assert (x.shape, x.dtype) == ((2, 3, 5, 6), np.dtype(dtype))
    assert np.isfinite(x.astype(np.float64)).all() == (pattern in PATTERNS)
    assert np.array_equal(x, made(image(dtype), sizes=SIZED, pattern=pattern), equal_nan=True)


def test_borders_and_impulses() -> None:
    x = made(image(), sizes=SIZED, pattern="border")
    assert not x[:, :, 1:-1, 1:-1].any()
    assert x[:, :, [0, -1]].all()
    assert x[:, :, :, [0, -1]].all()
    assert made(Slot("x", np.dtype(np.float32), (2, 3)), pattern="border").all(), "without an interior all is border"
    assert (made(image(), sizes=SIZED, pattern="impulse") != 0).sum() == 1


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, ml_dtypes.int4])
def test_whole_numbers_stay_below_the_limit_and_within_their_dtype(dtype: type) -> None:
    drawn = {int(v) for seed in range(20) for v in made(image(dtype), sizes=SIZED, limit=256, seed=seed).ravel()}
    assert min(drawn) == 0
    assert max(drawn) > {bool: 0, ml_dtypes.int4: 6}.get(dtype, 250)
    assert max(drawn) < {bool: 2, ml_dtypes.int4: 8}.get(dtype, 256)


@pytest.mark.parametrize("pattern", ["normal", "zeros", "impulse"])
def test_whole_numbers_stay_within_their_bounds(pattern: str) -> None:
    assert set(made(image(np.int64, bounds=(3, 4)), sizes=SIZED, pattern=pattern).ravel().tolist()) == {3, 4}


def test_narrow_dtypes_keep_to_scales_that_leave_them_digits() -> None:
    assert scales([image()]) == SCALES
    assert scales([image(), image(np.float16)]) == SCALES[:3] == scales([image(ml_dtypes.bfloat16)])


def test_a_strategy_draws_from_its_space() -> None:
    space = Space({"N": (2, 1), "H": range(1, 4)}, ("ones", "border"), (1.0, 10.0), (2,), 7)

    @settings(max_examples=30, database=None, derandomize=True, deadline=None, suppress_health_check=UNHURRIED)
    @given(strategy(space))
    def fits(trial: Trial) -> None:
        assert set(trial.sizes) == {"N", "H"}
        assert all(n in space.sizes[name] for name, n in trial.sizes.items())
        assert trial.pattern in space.patterns
        assert trial.scale in space.scales
        assert trial.limit == 2
        assert trial.seed <= 7

    fits()
