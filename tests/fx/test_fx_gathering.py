"""Convolutions of classes of their own take scales of their result where their source says that they apply a weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from fx_checks import CHANNELS, check, counts, ready, relative_error, report, run
from torch import Tensor, nn
from torch.nn import functional as F

from reparamc import fuse_fx
from reparamc.certificate.fx_sources import applied_by
from reparamc.fx.gathering import applies_weight


class Same(nn.Conv2d):
    """ "Same" padding as EfficientNets have it: by the size of the map."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ih, iw = x.size()[-2:]
        kh, kw = self.weight.size()[-2:]
        oh, ow = math.ceil(ih / self.stride[0]), math.ceil(iw / self.stride[1])
        h = max((oh - 1) * self.stride[0] + (kh - 1) * self.dilation[0] + 1 - ih, 0)
        w = max((ow - 1) * self.stride[1] + (kw - 1) * self.dilation[1] + 1 - iw, 0)
        if h > 0 or w > 0:
            x = F.pad(x, [w // 2, w - w // 2, h // 2, h - h // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class Even(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        def odd(size: int) -> int:
            return size % 2

        if any(odd(n) for n in x.shape[-2:]):
            x = F.pad(x, (0, odd(x.shape[-1]), 0, odd(x.shape[-2])), "replicate")
        return super().forward(x)


class Rows(nn.Conv1d):
    """It has more channels than it is given."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if x.shape[-1] > 7:
            return self._conv_forward(torch.cat([x, x.flip(1)], dim=1), self.weight, self.bias)
        return F.conv1d(torch.cat([x, x.flip(1)], 1), self.weight, self.bias, padding=self.padding)


@pytest.mark.parametrize("kind", [Same, Even])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_batchnorm_goes_into_it(kind: Any, groups: int) -> None:
    first = kind(CHANNELS, 6, 3, 2, groups=groups, bias=groups == 2)
    second = kind(6, CHANNELS, (2, 3), groups=groups)
    model = nn.Sequential(first, nn.BatchNorm2d(6), nn.SiLU(), second, nn.BatchNorm2d(CHANNELS))
    shapes = ((2, CHANNELS, 8, 7), (1, CHANNELS, 9, 10), (3, CHANNELS, 7, 8))
    fused = check(model, *shapes, examples=True, verify="region")
    assert counts(fused) == (2, 0)
    certificate = report(fused).certificate
    assert certificate is not None
    assert (certificate.equal, certificate.undecided) == (2, ())
    assert [type(m) for m in fused.modules() if isinstance(m, nn.Conv2d)] == [kind] * 2


def test_one_that_adds_channels_of_its_own() -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 1), Rows(6, 4, 3, padding=1), nn.BatchNorm1d(4))
    assert counts(check(model, (2, 3, 8), (1, 3, 6), (3, 3, 11), examples=True)) == (2, 0)


def test_a_matrix_after_it_is_another_operator() -> None:
    """It may count on the number of its rows."""
    model = nn.Sequential(Same(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3))
    fused = check(model, (2, 4, 8, 7), (1, 4, 9, 10), examples=True)
    assert counts(fused) == (2, 0)
    assert next(m for m in fused.modules() if isinstance(m, Same)).out_channels == 6


class Pair(nn.Module):
    """Python that cannot be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = Same(CHANNELS, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.conv(x))
        return {"y": y, "large": float(y.sum()) > 1e9}


def test_a_pair_in_python_that_cannot_be_followed() -> None:
    model, x = ready(Pair()), torch.randn(2, CHANNELS, 6, 6)
    fused = fuse_fx(model, x)
    assert counts(fused) == (1, 0)
    assert relative_error(run(fused, x), run(model, x)) < 1e-5


def _standardised(self: Any, x: Tensor) -> Tensor:
    weight = self.weight / self.weight.std()
    return F.conv2d(x, weight, self.bias)


def _by_the_weight(self: Any, x: Tensor) -> Tensor:
    return F.conv2d(x * self.weight.mean(), self.weight, self.bias)


def _by_its_own_name(self: Any, x: Tensor) -> Tensor:
    return F.conv2d(x * getattr(self, "weight").mean(), self.weight, self.bias)  # noqa: B009


def _by_all_parameters(self: Any, x: Tensor) -> Tensor:
    return F.conv2d(x * next(self.parameters()).mean(), self.weight, self.bias)


def _handed_on(self: Any, x: Tensor) -> Tensor:
    return F.conv2d(_of_module(self, x), self.weight, self.bias)


def _of_module(module: Any, x: Tensor) -> Tensor:
    return x * module.weight.sum()


def _not_always(self: Any, x: Tensor) -> Tensor:
    if x.shape[-1] > 99:
        return x
    return F.conv2d(x, self.weight, self.bias)


def _falls_through(self: Any, x: Tensor) -> Any:
    y = None
    if x.shape[-1] < 99:
        y = F.conv2d(x, self.weight, self.bias)
    return y


def _afterwards(self: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, self.weight, self.bias).relu()


def _without_bias(self: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, self.weight, None)


def _others(self: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, self.bias, self.weight)


def _writes(self: Any, x: Tensor) -> Tensor:
    x += 1
    return F.conv2d(x, self.weight, self.bias)


def _writes_by_name(self: Any, x: Tensor) -> Tensor:
    return F.conv2d(x.add_(1), self.weight, self.bias)


def _writes_a_slice(self: Any, x: Tensor) -> Tensor:
    x[:, 0] = 0
    return F.conv2d(x, self.weight, self.bias)


def _writes_out(self: Any, x: Tensor) -> Tensor:
    return F.conv2d(torch.add(x, 1, out=x), self.weight, self.bias)


def _keeps(self: Any, x: Tensor) -> Tensor:
    self.last = x
    return F.conv2d(x, self.weight, self.bias)


def _another_function(self: Any, x: Tensor, F: Any = torch) -> Tensor:
    return F.conv2d(x, self.weight, self.bias)


def _twice(self: Any, x: Tensor) -> Tensor:
    return F.conv2d(F.conv2d(x, self.weight, self.bias), self.weight, self.bias)


def _at_another_place(self: Any, x: Tensor) -> Tensor:
    def inner() -> Tensor:
        return F.conv2d(x, self.weight, self.bias)

    return inner()


class Above(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x).relu()


class Below(Above):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x)


class Applied(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.abs(), bias)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._conv_forward(x, self.weight, self.bias)


REFUSED: tuple[Callable[..., Any], ...] = (
    _standardised, _by_the_weight, _by_its_own_name, _by_all_parameters, _handed_on, _not_always, _falls_through,
    _afterwards, _without_bias, _others, _writes, _writes_by_name, _writes_a_slice, _writes_out, _keeps,
    _another_function, _twice, _at_another_place, Above, Below, Applied,
)  # fmt: skip


@pytest.mark.parametrize("forward", REFUSED)
def test_what_is_not_sure_is_refused_by_both(forward: Any) -> None:
    kind = forward if isinstance(forward, type) else type("Own", (nn.Conv2d,), {"forward": forward})
    assert not applies_weight(kind)
    assert applied_by(kind) is None


@pytest.mark.parametrize("kind", [Same, Even, Rows])
def test_what_is_sure_is_taken_by_both(kind: Any) -> None:
    assert applies_weight(kind)
    assert applied_by(kind) in kind.__mro__


def test_what_wraps_a_forward_is_not_read_as_that() -> None:
    class Wrapped(Same):
        pass

    @functools.wraps(Same.forward)
    def forward(self: Same, x: Tensor, inside: Any = Same.forward) -> Tensor:
        return inside(self, x).relu()

    Wrapped.forward = forward
    assert not applies_weight(Wrapped)
    assert applied_by(Wrapped) is None
