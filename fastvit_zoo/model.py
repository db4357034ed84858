"""The seven FastViT networks of the paper's table 2."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

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

SMALL: Mapping[str, Config] = {
    "fastvit_digits": Config((1, 1, 1, 1), (16, 32, 64, 128), mlp_ratio=2, attention=True, layer_scale_init=0.1),
}
"""For trials and tests, on images of 32 pixels: every kind of block in it, and 0.2 million parameters."""

POOLS: Mapping[str, Any] = {
    "avg": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1)),
    "max": lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(1)),
    "": nn.Identity,
}
"""Ways from the last map to one vector per image."""


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


def maps_of(stem: nn.Module, stages: nn.ModuleList, image: Tensor) -> list[Tensor]:
    """The output of every stage."""
    x = stem(image)
    maps: list[Tensor] = []
    for stage in stages:
        x = stage(x)
        maps.append(x)
    return maps


class FastViT(nn.Module):
    """A FastViT image classifier: images (B, in_channels, H, W) -> logits (B, num_classes).

    With `num_classes` = 0 the result is the pooled features, (B, 2 * dims[3]), or with `global_pool` = "" the map
    before pooling, (B, 2 * dims[3], H / 32, W / 32). `global_pool` is "avg", "max" or "". Any size of image works; the
    published weights were trained on 256x256 RGB images normalised by ImageNet's mean and standard deviation.

    `deployed` chooses the reparameterized structure. `drop_path_rate` is the probability of stochastic
    depth in the last block; it rises linearly with the index of the block, from 0 in the first one.

    Raises ValueError if `num_classes` is negative, `drop_path_rate` lies outside [0, 1), or a classifier is asked for
    without pooling.
    """

    def __init__(
        self,
        config: Config,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        global_pool: str = "avg",
        deployed: bool = False,
        drop_path_rate: float = 0.0,
        layer_scale_init: float | None = None,
    ) -> None:
        super().__init__()
        if global_pool not in POOLS:
            raise ValueError(f"global_pool is one of {', '.join(map(repr, POOLS))}, not {global_pool!r}")
        if num_classes and not global_pool:
            raise ValueError("a classifier needs pooling: give num_classes=0 with global_pool=''")
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
        self.pool = POOLS[global_pool]()
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
        return maps_of(self.stem, self.stages, image)

    def forward(self, image: Tensor) -> Tensor:
        pooled = self.pool(self.final_conv(self.feature_maps(image)[-1]))
        return pooled if self.head is None else self.head(pooled)

    def unused_names(self) -> tuple[str, ...]:
        """How the names of those weights begin that a checkpoint may have and this model does without."""
        return ("head.",) if self.head is None else ()


class FeatureInfo:
    """What is known of the maps that a backbone returns, by the names that timm uses."""

    def __init__(self, every: Sequence[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self.info, self.out_indices = list(every), tuple(out_indices)

    def channels(self) -> list[int]:
        """The number of channels of each map."""
        return [self.info[i]["num_chs"] for i in self.out_indices]

    def reduction(self) -> list[int]:
        """The stride of each map against the image."""
        return [self.info[i]["reduction"] for i in self.out_indices]

    def module_name(self) -> list[str]:
        """The name of the module that computes each map."""
        return [self.info[i]["module"] for i in self.out_indices]

    def get_dicts(self) -> list[dict[str, Any]]:
        """All that is known of each map."""
        return [dict(self.info[i]) for i in self.out_indices]

    def __len__(self) -> int:
        return len(self.out_indices)


class Backbone(nn.Module):
    """The stages of a FastViT: images (B, in_channels, H, W) -> maps (B, dims[i], H / stride, W / stride), one for each
    of `out_indices`.

    The strides are 4, 8, 16 and 32; `feature_info` tells channels and strides. Stages after the last wanted one are
    left out. Names of weights are those of the classifier, so `load_checkpoint` takes the same files.

    Raises ValueError if `out_indices` names no stage, or one that does not exist.
    """

    def __init__(self, model: FastViT, out_indices: Sequence[int] = (0, 1, 2, 3)) -> None:
        super().__init__()
        count = len(model.stages)
        wanted = [i + count if i < 0 else i for i in out_indices]
        if not wanted or not all(0 <= i < count for i in wanted):
            raise ValueError(f"out_indices are stages from 0 to {count - 1}, got {list(out_indices)}")
        self.config, self.deployed, self.in_channels = model.config, model.deployed, model.in_channels
        self.stem = model.stem
        self.stages = nn.ModuleList(model.stages[: max(wanted) + 1])
        every = [
            {"num_chs": dim, "reduction": 4 << i, "module": f"stages.{i}", "index": i}
            for i, dim in enumerate(model.config.dims)
        ]
        self.feature_info = FeatureInfo(every, wanted)

    @property
    def out_indices(self) -> tuple[int, ...]:
        """The stages whose maps are returned."""
        return self.feature_info.out_indices

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = maps_of(self.stem, self.stages, image)
        return [maps[i] for i in self.out_indices]

    def unused_names(self) -> tuple[str, ...]:
        """As `FastViT.unused_names`."""
        later = range(len(self.stages), len(self.config.dims))
        return ("head.", "final_conv.", *(f"stages.{i}." for i in later))


def list_models() -> list[str]:
    """The names of the seven variants, smallest first."""
    return list(CONFIGS)


@overload
def create_model(
    name: str, *, features_only: Literal[False] = False, num_classes: int = 1000, in_channels: int = 3,
    in_chans: int | None = None, global_pool: str = "avg", deployed: bool = False, drop_path_rate: float = 0.0,
    layer_scale_init: float | None = None, checkpoint: str | os.PathLike[str] | None = None,
) -> FastViT: ...  # fmt: skip
@overload
def create_model(
    name: str, *, features_only: Literal[True], out_indices: Sequence[int] = (0, 1, 2, 3), in_channels: int = 3,
    in_chans: int | None = None, deployed: bool = False, drop_path_rate: float = 0.0,
    layer_scale_init: float | None = None, checkpoint: str | os.PathLike[str] | None = None,
) -> Backbone: ...  # fmt: skip
def create_model(
    name: str,
    *,
    features_only: bool = False,
    out_indices: Sequence[int] = (0, 1, 2, 3),
    num_classes: int = 1000,
    in_channels: int = 3,
    in_chans: int | None = None,
    global_pool: str = "avg",
    deployed: bool = False,
    drop_path_rate: float = 0.0,
    layer_scale_init: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> FastViT | Backbone:
    """Build a FastViT in training form or, with `deployed`, in its reparameterized form.

    `name` is one of the seven variants, or "fastvit_digits", a small one for trials.
    `num_classes` = 0 leaves the classifier out. `features_only` gives a `Backbone`, which returns the maps of the
    stages `out_indices`. `in_chans` is timm's word for `in_channels`. `layer_scale_init` defaults to the variant's own.
    Drop path is off by default; the paper's recipe uses 0.1 for SA12 and SA24, 0.2 for SA36 and 0.35 for MA36.
    `checkpoint` is a file for `load_checkpoint`.

    Raises ValueError for an unknown name or an impossible argument, CheckpointError for a checkpoint that
    does not fit, OSError for a file that cannot be read.
    """
    config = CONFIGS.get(name) or SMALL.get(name)
    if config is None:
        raise ValueError(f"unknown model {name!r}; known models: {', '.join(CONFIGS)}")
    model: FastViT | Backbone = FastViT(
        config,
        num_classes=0 if features_only else num_classes,
        in_channels=in_channels if in_chans is None else in_chans,
        global_pool=global_pool,
        deployed=deployed,
        drop_path_rate=drop_path_rate,
        layer_scale_init=layer_scale_init,
    )
    if features_only:
        model = Backbone(model, out_indices)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model
