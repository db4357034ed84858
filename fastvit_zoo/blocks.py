"""The building blocks of FastViT, in training form and in deployed form.

Source: P. K. A. Vasu et al., "FastViT: A Fast Hybrid Vision Transformer using Structural Reparameterization",
ICCV 2023. Every map is laid out as (batch, channels, height, width), written (B, C, H, W).

In training form a convolution may be spread over parallel branches and a mixer may carry a skip connection;
in deployed form the same place holds one plain `nn.Conv2d`. Three functions make that choice, and nothing
else does: `convolution`, `token_mixing_convolution` and `position_encoding`.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 32  # channels of one attention head, in every variant


def _conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int) -> nn.Sequential:
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False
    )
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))


class BranchedConv(nn.Module):
    """A convolution trained as a sum of parallel branches (section 3.2.2).

    There is one branch conv -> BatchNorm for each kernel size and, where input and output have the same
    shape, one that is a BatchNorm alone. The paddings keep the kernels' centres aligned, so in
    evaluation mode the sum equals one convolution with the largest kernel, and a bias.

    (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)); kernel sizes are odd.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: Sequence[int],
        *,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            _conv_bn(in_channels, out_channels, kernel_size, stride, groups) for kernel_size in kernel_sizes
        )
        keeps_shape = in_channels == out_channels and stride == 1
        self.identity = nn.BatchNorm2d(out_channels) if keeps_shape else None

    def forward(self, x: Tensor) -> Tensor:
        parallel: list[Tensor] = [branch(x) for branch in self.branches]
        if self.identity is not None:
            parallel.append(self.identity(x))
        return sum(parallel[1:], start=parallel[0])


def convolution(
    in_channels: int,
    out_channels: int,
    kernel_sizes: Sequence[int],
    *,
    stride: int = 1,
    groups: int = 1,
    deployed: bool,
) -> nn.Module:
    """A `BranchedConv`, or in deployed form the one convolution with bias that it amounts to."""
    if deployed:
        largest = max(kernel_sizes)
        return nn.Conv2d(in_channels, out_channels, largest, stride, padding=largest // 2, groups=groups)
    return BranchedConv(in_channels, out_channels, kernel_sizes, stride=stride, groups=groups)


class SqueezeExcite(nn.Module):
    """Gates every channel by a two-layer function of all channel means: (B, C, H, W) -> the same shape.

    The hidden layer has C // `reduction` channels. Source: Hu et al., "Squeeze-and-Excitation Networks".
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.fc1(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.fc2(hidden))


class MobileOneBlock(nn.Module):
    """Branched convolution, optional squeeze-and-excite, GELU.

    (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)). A kernel larger than 1x1
    gets a second, 1x1 branch. Source: Vasu et al., "MobileOne: An Improved One millisecond Mobile Backbone".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        squeeze_excite: bool = False,
        deployed: bool,
    ) -> None:
        super().__init__()
        kernel_sizes = (kernel_size, 1) if kernel_size > 1 else (1,)
        self.conv = convolution(
            in_channels, out_channels, kernel_sizes, stride=stride, groups=groups, deployed=deployed
        )
        self.se = SqueezeExcite(out_channels) if squeeze_excite else None
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.se is not None:
            x = self.se(x)
        return self.act(x)


def stem(in_channels: int, dim: int, *, deployed: bool) -> nn.Sequential:
    """Three MobileOne blocks: (B, in_channels, H, W) -> (B, dim, ceil(H / 4), ceil(W / 4))."""
    return nn.Sequential(
        MobileOneBlock(in_channels, dim, 3, stride=2, deployed=deployed),
        MobileOneBlock(dim, dim, 3, stride=2, groups=dim, deployed=deployed),
        MobileOneBlock(dim, dim, 1, deployed=deployed),
    )


def patch_embedding(in_channels: int, out_channels: int, *, deployed: bool) -> nn.Sequential:
    """Large-kernel downsampling: (B, C, H, W) -> (B, out_channels, ceil(H / 2), ceil(W / 2)) (section 3.2.3).

    There is no activation between the grouped 7x7 convolution and the pointwise block: the published weights
    were trained without one.
    """
    return nn.Sequential(
        convolution(in_channels, out_channels, (7, 3), stride=2, groups=in_channels, deployed=deployed),
        MobileOneBlock(out_channels, out_channels, 1, deployed=deployed),
    )


def _layer_scale(dim: int, init: float) -> nn.Parameter:
    return nn.Parameter(torch.full((dim, 1, 1), init))


class RepMixer(nn.Module):
    """Depthwise token mixing whose skip connection can be folded away: (B, C, H, W) -> the same shape.

    y = x + layer_scale * (mixer(x) - norm(x)). This is section 3.2.1, equation 2, with its BatchNorm moved
    after the zero-padded convolution, as in the published weights; only then is the block exactly one
    depthwise 3x3 convolution (equation 3).
    """

    def __init__(self, dim: int, layer_scale_init: float) -> None:
        super().__init__()
        self.mixer = BranchedConv(dim, dim, (3, 1), groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.layer_scale = _layer_scale(dim, layer_scale_init)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))


def token_mixing_convolution(dim: int, layer_scale_init: float, *, deployed: bool) -> nn.Module:
    """A `RepMixer`, or in deployed form the depthwise 3x3 convolution with bias that it amounts to."""
    if deployed:
        return nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
    return RepMixer(dim, layer_scale_init)


class RepCPE(nn.Module):
    """Conditional position encoding, y = x + depthwise 7x7 convolution of x (section 3.2.1).

    (B, C, H, W) -> the same shape.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def position_encoding(dim: int, *, deployed: bool) -> nn.Module:
    """A `RepCPE`, or in deployed form its convolution with the skip connection absorbed."""
    encoding = RepCPE(dim)
    return encoding.conv if deployed else encoding


class Attention(nn.Module):
    """BatchNorm, then multi-head self-attention over all positions: (B, C, H, W) -> the same shape.

    Raises ValueError if `dim` is no multiple of the head size, 32.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % HEAD_DIM:
            raise ValueError(f"attention needs a multiple of {HEAD_DIM} channels, got {dim}")
        self.heads = dim // HEAD_DIM
        self.norm = nn.BatchNorm2d(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        # Heads q, then heads k, then heads v: (B, 3 * heads, H * W, HEAD_DIM), cut in three.
        heads = self.qkv(tokens).reshape(x.shape[0], -1, 3 * self.heads, HEAD_DIM).transpose(1, 2)
        q, k, v = heads.split(self.heads, dim=1)
        # The scale is the default one; written out, an exporter need not compute it from the shape of q.
        mixed = F.scaled_dot_product_attention(q, k, v, scale=HEAD_DIM**-0.5)
        tokens = self.proj(mixed.transpose(1, 2).flatten(2))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class ConvFFN(nn.Module):
    """Feed-forward network that starts with a depthwise 7x7 convolution (section 3.2.3).

    (B, C, H, W) -> the same shape, through `hidden` channels.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv = _conv_bn(dim, dim, 7, stride=1, groups=dim)
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.conv(x))))


class ScaledResidual(nn.Module):
    """y = x + drop_path(layer_scale * branch(x)); x and branch(x) are (B, C, H, W).

    While training, stochastic depth leaves the branch out for each sample with probability `drop_path` and
    divides it by the probability of staying otherwise (Huang et al., "Deep Networks with Stochastic Depth").
    """

    def __init__(self, branch: nn.Module, dim: int, layer_scale_init: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.branch = branch
        self.layer_scale = _layer_scale(dim, layer_scale_init)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        change = self.layer_scale * self.branch(x)
        if self.training and self.drop_path > 0:
            change = change * F.dropout(change.new_ones((x.shape[0], 1, 1, 1)), self.drop_path)
        return x + change


class Block(nn.Module):
    """Token mixing, then channel mixing (figure 2): (B, C, H, W) -> the same shape.

    The mixer is attention or `token_mixing_convolution`; drop path never touches the latter.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: int,
        *,
        attention: bool,
        layer_scale_init: float,
        drop_path: float,
        deployed: bool,
    ) -> None:
        super().__init__()
        if attention:
            self.token_mixer = ScaledResidual(Attention(dim), dim, layer_scale_init, drop_path)
        else:
            self.token_mixer = token_mixing_convolution(dim, layer_scale_init, deployed=deployed)
        self.ffn = ScaledResidual(ConvFFN(dim, mlp_ratio * dim), dim, layer_scale_init, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.token_mixer(x))
