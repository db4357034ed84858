"""A network under test: a stem and two token mixers with large kernels, as in FastViT."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mixer(nn.Module):
    """``x + scale * (mixer(x) - norm(x))``, all of it depthwise and linear."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.large = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.large_norm = nn.BatchNorm2d(channels)
        self.small = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
        self.small_norm = nn.BatchNorm2d(channels)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.large_norm(self.large(x)) + self.small_norm(self.small(x))
        return x + self.scale * (mixed - self.norm(x))


class TinyNet(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels), nn.GELU()
        )
        self.mixers = nn.ModuleList([Mixer(channels, 3), Mixer(channels, 7)])
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for mixer in self.mixers:
            x = F.gelu(mixer(x))
        return self.head(x.mean((2, 3)))
