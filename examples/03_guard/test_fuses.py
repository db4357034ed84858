"""The guard: this fails on the commit that breaks the structure, not on the day of deployment.

Run it with `python -m pytest examples/03_guard`. The fixture `fuse_guard` comes with reparamc. It fuses a copy of the
network, compares both on inputs of many sizes, and holds the result to what is asked here.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_net import Mixer, TinyNet
from torch import Tensor
from torch.nn import functional as F

IMAGES = torch.zeros(2, 3, 32, 32)


@pytest.mark.fuse_guard(max_conv=3, fused=["stem", "mixers.0", "mixers.1", "head"])
def test_the_network_fuses(fuse_guard: Callable[..., Any]) -> None:
    fuse_guard(TinyNet(), IMAGES)


def test_mixers_of_every_kernel_fuse(fuse_guard: Callable[..., Any]) -> None:
    for kernel in (3, 7):
        fuse_guard(Mixer(4, kernel), torch.zeros(1, 4, 9, 9), max_conv=1)


class Careless(TinyNet):
    """The kind of commit that the guard is for: someone adds an auxiliary reader of a value inside a mixer."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for mixer in self.mixers:
            x = F.gelu(mixer(x)) + torch.sigmoid(mixer.large(x))
        return self.head(x.mean((2, 3)))


def test_the_guard_notices_and_says_where(fuse_guard: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError, match=r"mixers\.0 no longer fuses"):
        fuse_guard(Careless(), IMAGES, max_conv=3, fused=["mixers.0", "mixers.1"])
