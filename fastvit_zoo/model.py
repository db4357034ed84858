"""The seven FastViT networks of the paper's table 2."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fastvit_zoo.blocks import (
    Block,
    ConvFFN,
    MobileOneBlock,
    patch_embedding,
    position_encoding,
    stem,
)
from fastvit_zoo.checkpoint import load_checkpoint


@dataclass(frozen=True)
class Config:
    """One variant: four stages, of which the last one may mix tokens by attention.

    `depths` counts the blocks of each stage and `dims` its channels; `mlp_ratio` is the widening inside the
    feed-forward networks, `layer_scale_init` the value at which every layer scale starts.
    """

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    mlp_ratio: int = 4
    attention: bool = False
    layer_scale_init: float = 1e-5


CONFIGS: Mapping[str, Config] = {
    "fastvit_t8": Config((2, 2, 4, 2), (48, 96, 192, 384), mlp_ratio=3),
    "fastvit_t12": Config((2, 2, 6, 2), (64, 128, 256, 512), mlp_ratio=3),
    "fastvit_s12": Config((2, 2, 6, 2), (64, 128, 256, 512)),
    "fastvit_sa12": Config((2, 2, 6, 2), (64, 128, 256, 512), attention=True),
    "fastvit_sa24": Config((4, 4, 12, 4), (64, 128, 256, 512), attention=True),
    "fastvit_sa36": Config((6, 6, 18, 6), (64, 128, 256, 512), attention=True, layer_scale_init=1e-6),
    "fastvit_ma36": Config((6, 6, 18, 6), (76, 152, 304, 608), attention=True, layer_scale_init=1e-6),
}


class Stage(nn.Module):
    """Downsampling and position encoding where given, then blocks: (B, C, H, W) -> (B, dim, H', W')."""

    def __init__(self, downsample: nn.Module | None, position: nn.Module | None, blocks: list[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.position = position
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(x)
        if self.position is not None:
            x = self.position(x)
        return self.blocks(x)


class FastViT(nn.Module):
    """A FastViT image classifier: images (B, in_channels, H, W) -> logits (B, num_classes).

    With `num_classes` = 0 the result is the pooled features, (B, 2 * dims[3]). Any size of image works; the
    published weights were trained on 256x256 RGB images normalised by ImageNet's mean and standard deviation.

    `deployed` chooses the reparameterized structure. `drop_path_rate` is the probability of stochastic
    depth in the last block; it rises linearly with the index of the block, from 0 in the first one.

    Raises ValueError if `num_classes` is negative or `drop_path_rate` lies outside [0, 1).
    """

    def __init__(
        self,
        config: Config,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        deployed: bool = False,
        drop_path_rate: float = 0.0,
        layer_scale_init: float | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must lie in [0, 1), got {drop_path_rate}")
        self.config = config
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.deployed = deployed
        scale = config.layer_scale_init if layer_scale_init is None else layer_scale_init
        last_block = max(sum(config.depths) - 1, 1)
        rates: Iterator[float] = (drop_path_rate * i / last_block for i in range(sum(config.depths)))

        stages: list[Stage] = []
        for index, (depth, dim) in enumerate(zip(config.depths, config.dims, strict=True)):
            attention = config.attention and index == 3
            downsample = patch_embedding(config.dims[index - 1], dim, deployed=deployed) if index else None
            position = position_encoding(dim, deployed=deployed) if attention else None
            blocks = [
                Block(
                    dim,
                    config.mlp_ratio,
                    attention=attention,
                    layer_scale_init=scale,
                    drop_path=next(rates),
                    deployed=deployed,
                )
                for _ in range(depth)
            ]
            stages.append(Stage(downsample, position, blocks))

        dim = config.dims[-1]
        self.stem = stem(in_channels, config.dims[0], deployed=deployed)
        self.stages = nn.ModuleList(stages)
        self.final_conv = MobileOneBlock(dim, 2 * dim, 3, groups=dim, squeeze_excite=True, deployed=deployed)
        self.head = nn.Linear(2 * dim, num_classes) if num_classes else None
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            drawn: list[nn.Module] = []
            if isinstance(module, nn.Linear):
                drawn = [module]
            elif isinstance(module, ConvFFN):
                drawn = [module.conv[0], module.fc1, module.fc2]
            for layer in drawn:
                assert isinstance(layer, nn.Linear | nn.Conv2d)
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def feature_maps(self, image: Tensor) -> list[Tensor]:
        """The outputs of the stages, (B, dims[i], H / stride, W / stride) for strides 4, 8, 16 and 32."""
        x = self.stem(image)
        maps: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, image: Tensor) -> Tensor:
        x = self.final_conv(self.feature_maps(image)[-1])
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return pooled if self.head is None else self.head(pooled)


def list_models() -> list[str]:
    """The names of the seven variants, smallest first."""
    return list(CONFIGS)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    deployed: bool = False,
    drop_path_rate: float = 0.0,
    layer_scale_init: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> FastViT:
    """Build a FastViT in training form or, with `deployed`, in its reparameterized form.

    `num_classes` = 0 leaves the classifier out. `layer_scale_init` defaults to the variant's own. Drop path
    is off by default; the paper's recipe uses 0.1 for SA12 and SA24, 0.2 for SA36 and 0.35 for MA36.
    `checkpoint` is a file for `load_checkpoint`.

    Raises ValueError for an unknown name or an impossible argument, CheckpointError for a checkpoint that
    does not fit, OSError for a file that cannot be read.
    """
    if name not in CONFIGS:
        raise ValueError(f"unknown model {name!r}; known models: {', '.join(CONFIGS)}")
    model = FastViT(
        CONFIGS[name],
        num_classes=num_classes,
        in_channels=in_channels,
        deployed=deployed,
        drop_path_rate=drop_path_rate,
        layer_scale_init=layer_scale_init,
    )
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model
