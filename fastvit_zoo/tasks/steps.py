"""Hyper-parameters of the tasks."""

from dataclasses import dataclass
from typing import Literal

from fastvit_zoo.options import check


@dataclass(frozen=True)
class Steps:
    """How long and how fast: `updates` of `batch` images, AdamW, and a rate that falls by `schedule`.

    "poly" falls by the power 0.9, "multistep" by ten at each of the shares `milestones` of all updates.
    """

    updates: int
    batch: int
    lr: float
    weight_decay: float = 1e-4
    schedule: Literal["poly", "multistep"] = "poly"
    milestones: tuple[float, ...] = ()
    warmup: int = 0
    size: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, positive=("updates", "batch", "lr", "size"), natural=("weight_decay", "warmup", "seed"))
