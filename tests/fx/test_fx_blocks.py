"""Positions as channels before a convolution (Focus, pixel unshuffle), and channels as positions after one."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from fx_checks import CHANNELS, Net, fuse_fx, ready, relative_error, report
from torch import Tensor, fx, nn
from torch.nn import functional as F

MAPS = ((1, CHANNELS, 8, 12), (3, CHANNELS, 6, 2), (2, CHANNELS, 10, 4))


def focus(x: Tensor) -> Tensor:
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


def row_by_row(x: Tensor) -> Tensor:
    rows = x[:, :, 0::2], x[:, :, 1::2]
    return torch.cat([row[:, :, :, at::2] for row in rows for at in range(2)], dim=-3)


def undecided(fused: fx.GraphModule) -> int:
    found = report(fused).certificate
    assert found is not None
    return len(found.undecided)


FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "focus": lambda m, x: focus(x),
    "row by row": lambda m, x: row_by_row(x),
    "function": lambda m, x: F.pixel_unshuffle(x, 2),
    "module": lambda m, x: m.unshuffle(x),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_kernel_over_blocks(form: str, kernel: int) -> None:
    conv, norm = nn.Conv2d(4 * CHANNELS, 6, kernel, padding=kernel // 2), nn.BatchNorm2d(6)
    model = ready(
        Net(lambda m, x: m.norm(m.conv(FORMS[form](m, x))).relu(), conv=conv, norm=norm, unshuffle=nn.PixelUnshuffle(2))
    )
    fused = fuse_fx(model, torch.randn(2, CHANNELS, 8, 6))
    (made,) = (m for m in fused.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d))
    assert (made.kernel_size, made.stride, made.padding) == ((2 * kernel,) * 2, (2, 2), (kernel // 2 * 2,) * 2)
    assert undecided(fused) == 0
    assert report(fused).passes["space-to-depth"] == 1
    for shape in MAPS:
        x = torch.randn(shape)
        assert relative_error(fused(x), model(x)) < 1e-5
    with pytest.raises(RuntimeError):
        model(torch.randn(1, CHANNELS, 7, 8))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_a_shift_before_blocks_that_a_padded_kernel_reads(form: str, stride: int) -> None:
    """No map of a size that blocks do not fill gets here, so that the borders of the two are one."""
    inner = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=stride, padding=1)
    parts = {"conv": nn.Conv2d(4 * CHANNELS, 6, 3, padding=1), "unshuffle": nn.PixelUnshuffle(2)}
    norm = nn.BatchNorm2d(CHANNELS)
    model = ready(Net(lambda m, x: m.conv(FORMS[form](m, m.norm(m.inner(x)))), inner=inner, norm=norm, **parts))
    fused = fuse_fx(model, torch.randn(2, CHANNELS, 8 * stride, 4 * stride))
    assert report(fused).after.batchnorm == 0
    assert undecided(fused) == 0
    for height, width in ((8, 4), (4, 6)):
        x = torch.randn(1, CHANNELS, stride * height, stride * (width - 1) + 1)
        assert relative_error(fused(x), model(x)) < 1e-5


def test_a_matrix_after_a_pixel_shuffle() -> None:
    parts = {"conv": nn.Conv2d(CHANNELS, 12, 3, padding=1), "mean": nn.Conv2d(3, 3, 1)}
    model = ready(Net(lambda m, x: m.mean(F.pixel_shuffle(m.conv(x), 2)), **parts))
    fused, x = fuse_fx(model, torch.randn(2, CHANNELS, 5, 6)), torch.randn(1, CHANNELS, 4, 3)
    assert sum(isinstance(m, nn.Conv2d) for m in fused.modules()) == 1
    assert undecided(fused) == 0
    assert relative_error(fused(x), model(x)) < 1e-5


def test_a_slice_that_is_written_into_stays() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = x.clone()
        parts = y[..., ::2, ::2], y[..., 1::2, 1::2]
        y[..., ::2, ::2] = 0
        return m.conv(torch.cat(parts, 1))

    model = ready(Net(forward, conv=nn.Conv2d(2 * CHANNELS, 4, 1)))
    fused, x = fuse_fx(model, torch.randn(2, CHANNELS, 8, 6)), torch.randn(1, CHANNELS, 6, 6)
    assert relative_error(fused(x), model(x)) < 1e-5
