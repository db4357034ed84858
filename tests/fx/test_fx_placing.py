"""Matrices of channels at their cheapest place, in heads that take a list of maps of several sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from fx_checks import report  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from reparamc import fuse_fx  # noqa: E402
from reparamc.testing import randomize_batchnorm  # noqa: E402

WIDTHS = (8, 12, 16)
Back = Callable[[Any, Any, Any, list[Any]], Any]


def inferred(y: Any, h: Any, w: Any, maps: list[Any]) -> Any:
    return y.transpose(1, 2).reshape(maps[-1].shape[0], -1, h, w)


def told(y: Any, h: Any, w: Any, maps: list[Any]) -> Any:
    return y.transpose(1, 2).reshape(maps[0].size(0), 8, h, w)


def of_itself(y: Any, h: Any, w: Any, maps: list[Any]) -> Any:
    n, _, c = y.shape
    return y.permute(0, 2, 1).reshape((n, c, h, w))


class Head(nn.Module):
    """A head as that of SegFormer: linear layers, maps of one size, side by side, and a matrix."""

    def __init__(self, back: Back = inferred, *, may_skip: bool = False) -> None:
        super().__init__()
        self.back, self.may_skip = back, may_skip
        self.projections = nn.ModuleList([nn.Linear(n, 8) for n in WIDTHS])
        self.fuse, self.norm = nn.Conv2d(8 * len(WIDTHS), 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, maps: list[Tensor]) -> Tensor:
        if self.may_skip:
            maps = maps[2:] if maps[1].size(1) == 0 else maps[1:]
        size = [n * 1 for n in maps[0].shape[2:]]
        found: list[Tensor] = []
        for x, projection in zip(maps, self.projections, strict=False):
            h, w = x.shape[2:]
            y = self.back(projection(x.flatten(2).transpose(1, 2)), h, w, maps)
            found.append(F.interpolate(y, size=size, mode="bilinear", align_corners=False))
        return F.relu(self.norm(self.fuse(torch.cat(found, 1))))


def pyramid(batch: int, size: int) -> list[Tensor]:
    torch.manual_seed(batch)
    return [torch.randn(batch, n, size >> at, (size >> at) + 1) for at, n in enumerate(WIDTHS)]


def fused(head: Head, maps: list[Tensor]) -> Any:
    torch.manual_seed(0)
    randomize_batchnorm(head, 0, maps)
    return fuse_fx(head.eval(), (maps,))


@pytest.mark.parametrize("back", [inferred, told, of_itself])
def test_it_goes_into_the_linear_layers(back: Back) -> None:
    head = Head(back)
    copy = fused(head, pyramid(2, 16))
    found = report(copy)
    assert found.passes["placing"] > 0
    assert found.after.conv == 0  # linear layers are not counted
    assert found.certificate is not None
    assert not found.certificate.undecided
    for maps in (pyramid(1, 20), pyramid(3, 9)):
        torch.testing.assert_close(copy(maps), head(maps), rtol=1e-5, atol=1e-5)


def test_lists_of_unequal_batches_are_refused() -> None:
    copy = fused(Head(), pyramid(2, 16))
    with pytest.raises(AssertionError, match="must be as many"):
        copy([pyramid(1, 16)[0], *pyramid(2, 16)[1:]])


@pytest.mark.parametrize("channels", [0, 3])
def test_a_list_with_an_element_that_may_be_empty(channels: int) -> None:
    def maps(channels: int) -> list[Tensor]:
        skipped = torch.zeros(2, channels, 4, 4)
        return [skipped, skipped, *pyramid(2, 16)] if not channels else [skipped, *pyramid(2, 16)]

    head = Head(may_skip=True)
    copy = fused(head, maps(channels))
    assert report(copy).passes["placing"] > 0
    torch.testing.assert_close(copy(maps(channels)), head(maps(channels)), rtol=1e-5, atol=1e-5)
    other = maps(channels)
    other[1] = torch.zeros(2, 5 - 5 * (channels > 0), 4, 4)
    with pytest.raises(AssertionError, match="a size must be"):
        copy(other)
