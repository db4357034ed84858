"""Blocks of papers on structural reparameterization in training form, each equal to one operator in eval mode.

They follow the formulas of the papers, small and in our own words, down to what makes a compiler's work
hard: borders written by assignment, weights summed in forward, sums that start from the number zero.
`CASES` names one or more forms of each. Parameters are random (factors are never near zero or all
one) until `Case.module` also randomises the BatchNorms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparamc.testing import randomize_batchnorm

Pair = int | tuple[int, int]


def factor(*shape: int) -> nn.Parameter:
    """Random factors, 0.4 to 1.6 in size, one in four negative."""
    return nn.Parameter((torch.rand(shape) * 1.2 + 0.4) * torch.where(torch.rand(shape) < 0.25, -1.0, 1.0))


def weight(*shape: int) -> nn.Parameter:
    """A random weight whose rows have norm one on average."""
    return nn.Parameter(torch.randn(shape) / max(1, torch.Size(shape[1:]).numel()) ** 0.5)


def same(kernel: Pair, dilation: int = 1) -> tuple[int, int]:
    """The padding with which an odd ``kernel`` keeps the size."""
    high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
    return dilation * (high - 1) // 2, dilation * (wide - 1) // 2


def conv_bn(inputs: int, outputs: int, kernel: Pair, **options: Any) -> nn.Sequential:
    """A convolution without bias and a BatchNorm; the padding keeps the size unless ``options`` give another."""
    options = {"padding": same(kernel, options.get("dilation", 1)), "bias": False} | options
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs))


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum, from the first term on."""
    first, *others = terms
    return sum(others, first)


def pad_with(x: Tensor, width: int, value: Tensor, written: bool) -> Tensor:
    """``x`` (N, C, H, W) with ``width`` rows and columns of ``value`` (C) on all four sides.

    The papers pad with zeros and then write over them; the same without ``written`` is to pad what is left
    of x when the value is subtracted, and to add it again.
    """
    value = value.view(1, -1, 1, 1)
    if not written:
        return F.pad(x - value, [width] * 4) + value
    x = F.pad(x, [width] * 4)
    x[:, :, :width, :] = value
    x[:, :, -width:, :] = value
    x[:, :, :, :width] = value
    x[:, :, :, -width:] = value
    return x


class RepVGG(nn.Module):
    """Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", 2021: 3x3, 1x1 and, if possible, identity."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.dense = conv_bn(inputs, outputs, 3, stride=stride, groups=groups)
        self.point = conv_bn(inputs, outputs, 1, stride=stride, groups=groups)
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        skip = 0 if self.identity is None else self.identity(x)
        return self.dense(x) + self.point(x) + skip


class ACNet(nn.Module):
    """Ding et al., "ACNet: Strengthening the Kernel Skeletons", 2019: 3x3 beside 3x1 and 1x3.

    Without padding, the flat kernels read a cropped input, so that all three see the same centre.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        self.cropped = not padded
        own: dict[str, Any] = {"stride": stride} if padded else {"stride": stride, "padding": 0}
        self.square = conv_bn(inputs, outputs, 3, **own)
        self.vertical = conv_bn(inputs, outputs, (3, 1), **own)
        self.horizontal = conv_bn(inputs, outputs, (1, 3), **own)

    def forward(self, x: Tensor) -> Tensor:
        narrow, low = (x[:, :, :, 1:-1], x[:, :, 1:-1, :]) if self.cropped else (x, x)
        return self.square(x) + self.vertical(narrow) + self.horizontal(low)


class NormThenPad(nn.Module):
    """BatchNorm, then a border of the value that it gives to zero: what it would do after zero padding."""

    def __init__(self, channels: int, width: int, written: bool) -> None:
        super().__init__()
        self.norm, self.width, self.written = nn.BatchNorm2d(channels), width, written

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self.norm
        y = norm(x)
        border = norm.bias - norm.running_mean * norm.weight / torch.sqrt(norm.running_var + norm.eps)
        return pad_with(y, self.width, border, self.written)


class IdentityBased1x1(nn.Module):
    """A 1x1 convolution whose weight is a parameter plus the identity."""

    identity: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.deviation = weight(channels, channels, 1, 1)
        self.register_buffer("identity", torch.eye(channels).view(channels, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.deviation + self.identity)


class DBB(nn.Module):
    """Ding et al., "Diverse Branch Block: Building a Convolution as an Inception-like Unit", 2021.

    Six branches: k x k; 1x1; 1x1 and k x k; 1x1 and average pooling; 1 x k; identity. The inner BatchNorms are followed
    by the padding with their value at zero, ``border`` "written" or "shifted". With "none", there is neither inner
    BatchNorm nor inner bias, so that zero padding of the inner map is exact.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, border: str = "written") -> None:
        super().__init__()
        pad, written = kernel // 2, border == "written"
        inner = pad if border == "none" else 0
        self.origin = conv_bn(inputs, outputs, kernel, stride=stride)
        self.point = conv_bn(inputs, outputs, 1, stride=stride)
        self.flat = conv_bn(inputs, outputs, (1, kernel), stride=stride)
        self.point_dense = nn.Sequential(
            IdentityBased1x1(inputs),
            nn.Identity() if border == "none" else NormThenPad(inputs, pad, written),
            conv_bn(inputs, outputs, kernel, stride=stride, padding=inner),
        )
        self.point_average = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.Identity() if border == "none" else NormThenPad(outputs, pad, written),
            nn.AvgPool2d(kernel, stride, inner),
            nn.BatchNorm2d(outputs),
        )
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.origin(x)
        if self.identity is not None:
            out += self.identity(x)
        out += self.point(x)
        out += self.flat(x)
        out += self.point_average(x)
        out += self.point_dense(x)
        return out


class MobileOne(nn.Module):
    """Vasu et al., "MobileOne: An Improved One Millisecond Mobile Backbone", 2023.

    ``branches`` equal convolutions, a 1x1 "scale" branch beside larger kernels, and identity where shapes allow.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, branches: int = 3
    ) -> None:
        super().__init__()
        own: dict[str, Any] = {"stride": stride, "groups": groups}
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.scale = conv_bn(inputs, outputs, 1, **own) if kernel > 1 else None
        self.convs = nn.ModuleList(conv_bn(inputs, outputs, kernel, **own) for _ in range(branches))

    def forward(self, x: Tensor) -> Tensor:
        skip: Any = 0 if self.identity is None else self.identity(x)
        scaled = 0 if self.scale is None else self.scale(x)
        out = scaled + skip
        for conv in self.convs:
            out += conv(x)
        return out


class RepMixer(nn.Module):
    """Vasu et al., "FastViT: A Fast Hybrid Vision Transformer using Structural Reparameterization", 2023."""

    def __init__(self, channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.mixer = MobileOne(channels, channels, kernel, groups=channels, branches=1)
        self.norm = nn.BatchNorm2d(channels)
        self.layer_scale = factor(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))


SOBEL = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
LAPLACIAN = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])


class PointThenMask(nn.Module):
    """1x1, a border of its bias, and a fixed depthwise mask with a learned scale and bias per channel."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, mask: Tensor, written: bool) -> None:
        super().__init__()
        self.point: Any = nn.Conv2d(inputs, outputs, 1)
        self.outputs, self.written = outputs, written
        self.scale, self.bias = factor(outputs, 1, 1, 1), factor(outputs)
        self.register_buffer("mask", mask.repeat(outputs, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = pad_with(self.point(x), 1, self.point.bias, self.written)
        return F.conv2d(y, self.scale * self.mask, self.bias, groups=self.outputs)


class PointThenDense(nn.Module):
    """1x1 to ``inner`` channels, a border of its bias, and 3x3."""

    def __init__(self, inputs: int, inner: int, outputs: int, written: bool) -> None:
        super().__init__()
        self.point: Any = nn.Conv2d(inputs, inner, 1)
        self.dense, self.written = nn.Conv2d(inner, outputs, 3), written

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(pad_with(self.point(x), 1, self.point.bias, self.written))


class ECB(nn.Module):
    """Zhang et al., "Edge-oriented Convolution Block for Real-time Super Resolution on Mobile Devices", 2021.

    3x3; 1x1 and 3x3; 1x1 and the two Sobel masks and the Laplacian; identity where shapes allow.
    """

    def __init__(self, inputs: int, outputs: int, written: bool = True) -> None:
        super().__init__()
        self.dense = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.expanded = PointThenDense(inputs, 2 * outputs, outputs, written)
        self.sobel_x = PointThenMask(inputs, outputs, SOBEL, written)
        self.sobel_y = PointThenMask(inputs, outputs, SOBEL.T, written)
        self.laplacian = PointThenMask(inputs, outputs, LAPLACIAN, written)
        self.skip = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = total(branch(x) for branch in (self.dense, self.expanded, self.sobel_x, self.sobel_y, self.laplacian))
        return y + x if self.skip else y


class SESR(nn.Module):
    """Bhardwaj et al., "Collapsible Linear Blocks for Super-Efficient Super Resolution", 2022: wide 5x5, 1x1, skip."""

    def __init__(self, inputs: int, outputs: int, expanded: int = 256) -> None:
        super().__init__()
        self.expand = nn.Conv2d(inputs, expanded, 5, padding=2)
        self.project = nn.Conv2d(expanded, outputs, 1)
        self.skip = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.expand(x))
        return y + x if self.skip else y


def expand_net(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, rate: int = 4) -> nn.Module:
    """Guo et al., "ExpandNets: Linear Over-parameterization to Train Compact ConvNets", 2020: 1x1, k x k, 1x1.

    The padding is that of the first convolution, so that its bias reaches the border as well.
    """
    return nn.Sequential(
        nn.Conv2d(inputs, rate * inputs, 1, padding=padding),
        nn.Conv2d(rate * inputs, rate * outputs, kernel, stride),
        nn.Conv2d(rate * outputs, outputs, 1),
    )


def expand_net_kernels(inputs: int, outputs: int, padding: int = 0, rate: int = 4) -> nn.Module:
    """The same paper's expansion of a 5x5 into two 3x3, the padding again in the first."""
    return nn.Sequential(nn.Conv2d(inputs, rate * inputs, 3, padding=padding), nn.Conv2d(rate * inputs, outputs, 3))


class LargeKernel(nn.Module):
    """A large depthwise kernel beside smaller or dilated ones, a BatchNorm after each.

    Ding et al., "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs", 2022 (RepLKNet), has one
    dense small kernel; Ding et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet", 2024, dilated ones.
    """

    def __init__(self, channels: int, kernel: int, others: Sequence[tuple[int, int]], stride: int = 1) -> None:
        super().__init__()
        own: dict[str, Any] = {"stride": stride, "groups": channels}
        self.large = conv_bn(channels, channels, kernel, **own)
        self.others = nn.ModuleList(conv_bn(channels, channels, k, dilation=d, **own) for k, d in others)

    def forward(self, x: Tensor) -> Tensor:
        out = self.large(x)
        for other in self.others:
            out = out + other(x)
        return out


class OREPA(nn.Module):
    """Hu et al., "Online Convolutional Re-parameterization", 2022: the branches' weights are summed, not their results.

    k x k, 1x1, 1x1 with averaging, 1x1 with a fixed prior, 1x1 with k x k, and depthwise with 1x1, each with a
    factor per output channel; then one convolution and one BatchNorm. The products are written as ``einsum``,
    as in the paper, or with broadcasting.
    """

    mean: Tensor
    centre: Tensor
    waves: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, einsum: bool = True) -> None:
        super().__init__()
        self.einsum, self.stride, self.padding = einsum, stride, kernel // 2
        self.origin = weight(outputs, inputs, kernel, kernel)
        self.point = weight(outputs, inputs, 1, 1)
        self.average = weight(outputs, inputs)
        self.prior = weight(outputs, inputs)
        self.first, self.second = weight(inputs, inputs), weight(outputs, inputs, kernel, kernel)
        self.depthwise, self.pointwise = weight(inputs, 2, kernel, kernel), weight(outputs, inputs, 2)
        self.factors = factor(6, outputs)
        self.register_buffer("mean", torch.full((kernel, kernel), 1 / kernel**2))
        self.register_buffer("centre", F.pad(torch.ones(1, 1), [kernel // 2] * 4))
        steps = (torch.arange(kernel) + 0.5) * torch.pi / kernel
        waves = [torch.outer(torch.cos(steps * (i % 3)), torch.cos(steps * (i // 3 % 3))) for i in range(outputs)]
        self.register_buffer("waves", torch.stack(waves))
        self.norm = nn.BatchNorm2d(outputs)

    def kernels(self) -> list[Tensor]:
        point = self.point * self.centre
        if not self.einsum:
            return [
                self.origin,
                point,
                self.average[:, :, None, None] * self.mean,
                self.prior[:, :, None, None] * self.waves[:, None],
                (self.second.permute(0, 2, 3, 1) @ self.first.transpose(0, 1)).permute(0, 3, 1, 2),
                (self.pointwise[:, :, :, None, None] * self.depthwise).sum(2),
            ]
        return [
            self.origin,
            point,
            torch.einsum("oi,hw->oihw", self.average, self.mean),
            torch.einsum("oi,ohw->oihw", self.prior, self.waves),
            torch.einsum("im,omhw->oihw", self.first, self.second),
            torch.einsum("oim,imhw->oihw", self.pointwise, self.depthwise),
        ]

    def forward(self, x: Tensor) -> Tensor:
        if self.einsum:
            factored = (torch.einsum("oihw,o->oihw", k, self.factors[i]) for i, k in enumerate(self.kernels()))
        else:
            factored = (k * self.factors[i].view(-1, 1, 1, 1) for i, k in enumerate(self.kernels()))
        return self.norm(F.conv2d(x, total(factored), None, self.stride, self.padding))


class GhostV3(nn.Module):
    """Liu et al., "GhostNetV3: Exploring the Training Strategies for Compact Models", 2024: one half of a Ghost module.

    Each half (primary: dense 1x1; cheap: depthwise 3x3) has several convolutions, a 1x1 of its own, and
    a BatchNorm as identity where shapes allow.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int = 1, branches: int = 3) -> None:
        super().__init__()
        self.skip = nn.BatchNorm2d(inputs) if inputs == outputs else None
        self.scale = conv_bn(inputs, outputs, 1, groups=groups)
        self.convs = nn.ModuleList(conv_bn(inputs, outputs, kernel, groups=groups) for _ in range(branches))

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.scale(x), *(conv(x) for conv in self.convs)]
        if self.skip is not None:
            branches.append(self.skip(x))
        return total(branches)


class LoRALinear(nn.Module):
    """Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022: W x + b, and s B A x for every adapter."""

    def __init__(self, inputs: int, outputs: int, ranks: Sequence[int] = (2,), bias: bool = True) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias)
        self.down = nn.ModuleList(nn.Linear(inputs, rank, bias=False) for rank in ranks)
        self.up = nn.ModuleList(nn.Linear(rank, outputs, bias=False) for rank in ranks)
        self.dropout = nn.Dropout(0.1)
        self.scalings = [1.5 / (i + 1) for i in range(len(ranks))]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for down, up, scaling in zip(self.down, self.up, self.scalings, strict=True):
            y = y + up(down(self.dropout(x))) * scaling
        return y


class LoRAMatrices(nn.Module):
    """LoRA with bare matrices, as products with their transposes; with ``merged``, W + s B A is formed in forward."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2, merged: bool = False) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.a, self.b, self.merged = weight(rank, inputs), weight(outputs, rank), merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight + 0.7 * (self.b @ self.a), self.base.bias)
        return self.base(x) + (x @ self.a.transpose(0, 1) @ self.b.transpose(0, 1)) * 0.7


class LoRAConv(nn.Module):
    """LoRA of a convolution: k x k to few channels, then 1x1, beside the frozen one; a stack of adapters."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, ranks: Sequence[int] = (2,)
    ) -> None:
        super().__init__()
        own: dict[str, Any] = {"stride": stride, "padding": kernel // 2}
        self.base = nn.Conv2d(inputs, outputs, kernel, **own)
        self.down = nn.ModuleList(nn.Conv2d(inputs, rank, kernel, **own, bias=False) for rank in ranks)
        self.up = nn.ModuleList(nn.Conv2d(rank, outputs, 1, bias=False) for rank in ranks)
        self.scalings = [1.5 / (i + 1) for i in range(len(ranks))]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for down, up, scaling in zip(self.down, self.up, self.scalings, strict=True):
            y = y + up(down(x)) * scaling
        return y


class Upsampling(nn.Module):
    """Transposed convolutions with BatchNorm: one, or two of different kernels that give the same size."""

    def __init__(self, inputs: int, outputs: int, *layers: dict[str, int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(inputs, outputs, **layer), nn.BatchNorm2d(outputs))  # pyright: ignore
            for layer in layers
        )

    def forward(self, x: Tensor) -> Tensor:
        return total(branch(x) for branch in self.branches)


class Focus(nn.Module):
    """Jocher, YOLOv5, 2020: four slices of the image as channels, before a convolution; also with a pixel unshuffle."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, sliced: bool = True) -> None:
        super().__init__()
        self.sliced, self.conv = sliced, conv_bn(4 * inputs, outputs, kernel)

    def forward(self, x: Tensor) -> Tensor:
        if not self.sliced:
            return self.conv(F.pixel_unshuffle(x, 2))
        return self.conv(torch.cat([x[..., i::2, j::2] for j in range(2) for i in range(2)], 1))


class RePaViT(nn.Module):
    """Xu et al., "RePaViT: Scalable Vision Transformer Acceleration via Structural Reparameterization", 2025.

    A feed-forward layer, most channels of which go around the activation, on images or tokens.
    """

    def __init__(self, channels: int, *, in_parts: bool = False, tokens: bool = True) -> None:
        super().__init__()
        self.axis, self.hidden = -1 if tokens else 1, (channels, 3 * channels)
        self.norm = nn.Identity() if tokens else nn.BatchNorm2d(channels)

        def matrix(inputs: int, outputs: int) -> nn.Module:
            return nn.Linear(inputs, outputs) if tokens else nn.Conv2d(inputs, outputs, 1)

        outputs = self.hidden if in_parts else (sum(self.hidden),)
        self.up = nn.ModuleList(matrix(channels, n) for n in outputs)
        self.down = matrix(sum(self.hidden), channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        parts = [up(y) for up in self.up]
        active, idle = parts if len(parts) == 2 else parts[0].split(self.hidden, self.axis)
        return x + self.down(torch.cat([F.relu(active), idle], self.axis))


class RIFormer(nn.Module):
    """Wang et al., "RIFormer: Keep Your Vision Backbone Effective But Removing Token Mixer", 2023: a block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, channels), nn.GroupNorm(1, channels)
        self.affine = nn.Conv2d(channels, channels, 1, groups=channels)
        self.up, self.down = nn.Conv2d(channels, 4 * channels, 1), nn.Conv2d(4 * channels, channels, 1)
        self.scale1, self.scale2 = factor(channels, 1, 1), factor(channels, 1, 1)
        for norm in (self.norm1, self.norm2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.scale1 * (self.affine(y) - y)
        return x + self.scale2 * self.down(F.relu(self.up(self.norm2(x))))


PARTLY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, int]]] = {
    "repavit": (lambda: RePaViT(16), (2, 9, 16), (3, 3)),
    "repavit, in parts": (lambda: RePaViT(16, in_parts=True), (2, 9, 16), (3, 3)),
    "repavit, images": (lambda: RePaViT(16, tokens=False), (2, 16, 7, 5), (3, 3)),
    "riformer": (lambda: RIFormer(8), (2, 8, 7, 5), (3, 2)),
}
"""Blocks with something non-linear in them: an input, and how many kernels and matrices are left in ONNX and in torch.

The exporter writes a GroupNorm with a factor and a shift after it, of which one depthwise 1x1 is left.
"""


IMAGES = ((7, 6), (8, 9), (2, 5), (1, 1))
EVEN = ((8, 6), (2, 10), (4, 4))
"""Sizes that blocks of 2x2 fill."""
UNPADDED = ((7, 6), (8, 9), (5, 6), (5, 5))
"""Sizes at which an unpadded kernel of 5 has a result."""


@dataclass(frozen=True)
class Case:
    """One form of a block.

    Attributes:
        build: makes it, its parameters drawn from torch's global generator.
        channels: of its input, which is (N, channels, H, W), or (N, channels) or (N, L, channels).
        operator: the one operator that it equals: "Conv", "Linear" or "ConvTranspose".
        sizes: sizes of the inputs to try, (H, W), () or (L,).
        fixed: torch's exporter by TorchScript writes it for the first size only: it keeps the sizes of what is
            written into a slice, or names none of those that a pixel unshuffle makes.
        window: kernel, padding and stride of the convolution that it equals.
    """

    build: Callable[[], nn.Module]
    channels: int
    operator: str = "Conv"
    sizes: tuple[tuple[int, ...], ...] = IMAGES
    fixed: bool = False
    window: tuple[int, int, int] = (3, 1, 1)

    @property
    def channel_axis(self) -> int:
        return len(self.sizes[0]) if self.operator == "Linear" else 0

    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of an input of every size; batches of 2 and 1 take turns."""
        axes: list[list[int]] = [list(size) for size in self.sizes]
        for sizes in axes:
            sizes.insert(self.channel_axis, self.channels)
        return [(2 - i % 2, *sizes) for i, sizes in enumerate(axes)]

    def inputs(self) -> list[Tensor]:
        """Random float64 inputs of every size."""
        generator = torch.Generator().manual_seed(7)
        return [torch.randn(s, generator=generator, dtype=torch.float64) for s in self.shapes()]

    def module(self) -> nn.Module:
        """The block in eval mode, in float32, with random parameters and BatchNorm statistics that fit them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            block = self.build()
        return randomize_batchnorm(block, 5, self.inputs()[0].float()).eval()


DILATED = ((5, 1), (5, 2), (3, 3), (3, 4))
DOUBLE, WIDE = {"kernel_size": 2, "stride": 2}, {"kernel_size": 4, "stride": 2, "padding": 1}
ODD = {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}

CASES: dict[str, Case] = {
    "repvgg": Case(lambda: RepVGG(5, 5), 5),
    "repvgg, wider": Case(lambda: RepVGG(5, 7), 5),
    "repvgg, grouped": Case(lambda: RepVGG(6, 6, groups=3), 6),
    "repvgg, stride 2": Case(lambda: RepVGG(5, 5, stride=2), 5, window=(3, 1, 2)),
    "acnet": Case(lambda: ACNet(5, 7), 5),
    "acnet, stride 2": Case(lambda: ACNet(5, 7, stride=2), 5, window=(3, 1, 2)),
    "acnet, cropped": Case(lambda: ACNet(5, 7, padded=False), 5, sizes=UNPADDED, window=(3, 0, 1)),
    "dbb": Case(lambda: DBB(5, 5), 5, fixed=True),
    "dbb, 5x5, wider": Case(lambda: DBB(4, 6, kernel=5), 4, fixed=True, window=(5, 2, 1)),
    "dbb, stride 2": Case(lambda: DBB(5, 5, stride=2), 5, fixed=True, window=(3, 1, 2)),
    "dbb, shifted": Case(lambda: DBB(5, 5, border="shifted"), 5),
    "dbb, shifted, 5x5, wider": Case(lambda: DBB(4, 6, kernel=5, border="shifted"), 4, window=(5, 2, 1)),
    "dbb, shifted, stride 2": Case(lambda: DBB(5, 5, stride=2, border="shifted"), 5, window=(3, 1, 2)),
    "dbb, plain": Case(lambda: DBB(5, 5, border="none"), 5),
    "dbb, plain, stride 2": Case(lambda: DBB(5, 6, stride=2, border="none"), 5, window=(3, 1, 2)),
    "mobileone, depthwise": Case(lambda: MobileOne(5, 5, 3, groups=5), 5),
    "mobileone, pointwise": Case(lambda: MobileOne(5, 5, 1), 5, window=(1, 0, 1)),
    "mobileone, stride 2": Case(lambda: MobileOne(5, 5, 3, stride=2, groups=5), 5, window=(3, 1, 2)),
    "mobileone, 7x7, doubling": Case(lambda: MobileOne(4, 8, 7, stride=2, groups=4, branches=1), 4, window=(7, 3, 2)),
    "repmixer": Case(lambda: RepMixer(5), 5),
    "repmixer, 7x7": Case(lambda: RepMixer(5, 7), 5, window=(7, 3, 1)),
    "ecb": Case(lambda: ECB(5, 5), 5, fixed=True),
    "ecb, wider": Case(lambda: ECB(3, 7), 3, fixed=True),
    "ecb, shifted": Case(lambda: ECB(5, 5, written=False), 5),
    "focus": Case(lambda: Focus(3, 5), 3, sizes=EVEN, window=(6, 2, 2)),
    "focus, 1x1": Case(lambda: Focus(3, 5, kernel=1), 3, sizes=EVEN, window=(2, 0, 2)),
    "focus, pixel unshuffle": Case(lambda: Focus(3, 5, sliced=False), 3, sizes=EVEN, fixed=True, window=(6, 2, 2)),
    "sesr": Case(lambda: SESR(6, 6), 6, window=(5, 2, 1)),
    "sesr, first": Case(lambda: SESR(1, 6), 1, window=(5, 2, 1)),
    "expandnet": Case(lambda: expand_net(3, 5, 3), 3, sizes=UNPADDED, window=(3, 0, 1)),
    "expandnet, padded": Case(lambda: expand_net(3, 5, 3, padding=1), 3),
    "expandnet, stride 2": Case(lambda: expand_net(3, 5, 3, stride=2, padding=1), 3, window=(3, 1, 2)),
    "expandnet, kernels": Case(lambda: expand_net_kernels(3, 5), 3, sizes=UNPADDED, window=(5, 0, 1)),
    "expandnet, kernels, padded": Case(lambda: expand_net_kernels(3, 5, padding=2), 3, window=(5, 2, 1)),
    "unireplknet": Case(
        lambda: LargeKernel(5, 9, DILATED), 5, sizes=((13, 12), (7, 8), (2, 5), (1, 1)), window=(9, 4, 1)
    ),
    "replknet": Case(
        lambda: LargeKernel(5, 13, ((5, 1),)), 5, sizes=((17, 16), (7, 8), (2, 5), (1, 1)), window=(13, 6, 1)
    ),
    "replknet, stride 2": Case(
        lambda: LargeKernel(5, 13, ((5, 1),), stride=2), 5, sizes=((17, 16), (7, 8), (1, 1)), window=(13, 6, 2)
    ),
    "orepa": Case(lambda: OREPA(5, 7), 5),
    "orepa, products": Case(lambda: OREPA(5, 7, einsum=False), 5),
    "orepa, products, stride 2": Case(lambda: OREPA(5, 5, stride=2, einsum=False), 5, window=(3, 1, 2)),
    "ghostnetv3, primary": Case(lambda: GhostV3(5, 7, 1), 5, window=(1, 0, 1)),
    "ghostnetv3, primary, skip": Case(lambda: GhostV3(5, 5, 1), 5, window=(1, 0, 1)),
    "ghostnetv3, cheap": Case(lambda: GhostV3(5, 5, 3, groups=5), 5),
    "lora, linear": Case(lambda: LoRALinear(11, 13), 11, "Linear", ((), ())),
    "lora, linear, stack": Case(lambda: LoRALinear(11, 13, (1, 2, 4)), 11, "Linear", ((), ())),
    "lora, tokens": Case(lambda: LoRALinear(11, 13, (1, 2), bias=False), 11, "Linear", tuple((n,) for n in (7, 4, 1))),
    "lora, matrices": Case(lambda: LoRAMatrices(11, 13), 11, "Linear", ((), ())),
    "lora, merged": Case(lambda: LoRAMatrices(11, 13, merged=True), 11, "Linear", ((), ())),
    "lora, conv": Case(lambda: LoRAConv(5, 7), 5),
    "lora, conv, stack, stride 2": Case(lambda: LoRAConv(5, 7, stride=2, ranks=(1, 2, 4)), 5, window=(3, 1, 2)),
    "transposed": Case(lambda: Upsampling(5, 7, WIDE), 5, "ConvTranspose"),
    "transposed, parallel": Case(lambda: Upsampling(5, 7, WIDE, DOUBLE), 5, "ConvTranspose"),
    "transposed, output padding": Case(lambda: Upsampling(5, 7, ODD, DOUBLE), 5, "ConvTranspose"),
}
