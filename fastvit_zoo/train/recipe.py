"""Hyper-parameters: the paper's, from scratch, distilled and at 384 pixels, and small ones for the digits."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastvit_zoo.options import check


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained. Sizes are pixels, learning rates those of the whole batch.

    An update sees `batch` images times the number of processes times `accumulate`. `epochs` includes the `warmup`, and
    `cooldown` epochs follow at the smallest rate. `distillation` is the weight of the teacher's predictions.
    """

    epochs: int = 300
    warmup: int = 5
    cooldown: int = 10
    batch: int = 128
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    clip: float = 0.0
    ema: float = 0.9995
    size: int = 256
    crop: float = 0.9
    augment: str = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25
    jitter: float = 0.4
    flip: float = 0.5
    smallest: float = 0.08
    mixup: float = 0.2
    cutmix: float = 1.0
    mixing: float = 1.0
    smoothing: float = 0.1
    drop_path: float = 0.0
    layer_scale: float | None = None
    distillation: float = 0.5
    seed: int = 42

    def __post_init__(self) -> None:
        check(
            self,
            positive=("epochs", "batch", "accumulate", "lr", "size", "crop", "smallest"),
            natural=(
                "warmup",
                "cooldown",
                "warmup_lr",
                "min_lr",
                "weight_decay",
                "clip",
                "jitter",
                "mixup",
                "cutmix",
                "seed",
            ),
            shares=("ema", "crop", "smallest", "erasing", "flip", "mixing", "smoothing", "drop_path", "distillation"),
        )


PAPER = Recipe()
PAPER_384 = replace(PAPER, epochs=30, cooldown=0, warmup=0, batch=64, lr=5e-5, weight_decay=1e-8, size=384, crop=1.0)
DIGITS = Recipe(
    epochs=8,
    warmup=1,
    cooldown=0,
    batch=64,
    lr=4e-3,
    ema=0.9,
    size=32,
    crop=1.0,
    augment="",
    erasing=0.1,
    jitter=0.0,
    flip=0.0,
    smallest=0.7,
    cutmix=0.0,
    mixing=0.5,
    smoothing=0.05,
)

RECIPES: Mapping[str, Recipe] = {"paper": PAPER, "paper-384": PAPER_384, "digits": DIGITS}

_PLAIN: Mapping[str, dict[str, float]] = {
    "fastvit_sa12": {"drop_path": 0.1},
    "fastvit_sa24": {"drop_path": 0.1},
    "fastvit_sa36": {"drop_path": 0.2},
    "fastvit_ma36": {"drop_path": 0.35, "mixup": 0.8},
}
_DISTILLED: Mapping[str, dict[str, float]] = {
    "fastvit_sa12": {"mixup": 0.8},
    "fastvit_sa24": {"drop_path": 0.05, "mixup": 0.8},
    "fastvit_sa36": {"drop_path": 0.1, "mixup": 0.8},
    "fastvit_ma36": {"drop_path": 0.2, "mixup": 0.8},
}
"""What the paper's recipes change with the variant."""


def recipe(name: str, model: str, *, distilled: bool = False, **changes: Any) -> Recipe:
    """The recipe `name` for the variant `model`, with a teacher or without, and with `changes` to its fields.

    Raises ValueError for an unknown name.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known recipes: {', '.join(RECIPES)}")
    of_variant = (_DISTILLED if distilled else _PLAIN).get(model, {}) if name.startswith("paper") else {}
    return replace(RECIPES[name], **{**of_variant, **changes})
