"""What the tasks share: a training loop over updates, and the way from a trained network to a compared ONNX file."""

# pyright: reportPrivateImportUsage=false
# timm exports its names without saying so.

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.progress import track
from torch import Tensor, nn

import fastvit_zoo.torchvision_operators  # noqa: F401
from fastvit_zoo.model import Backbone, create_model
from fastvit_zoo.onnx_export import export_onnx

# isort: split
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed


@dataclass(frozen=True)
class Steps:
    """How long and how fast: `updates` of `batch` images, AdamW, and a rate that falls by `schedule`.

    "poly" falls by the power 0.9, "multistep" by ten at each of the shares `milestones` of all updates.
    """

    updates: int
    batch: int
    lr: float
    weight_decay: float = 1e-4
    schedule: str = "poly"
    milestones: tuple[float, ...] = ()
    warmup: int = 0
    size: int = 512
    seed: int = 0


def fit(network: nn.Module, loss: Callable[[Any], Tensor], batches: Iterator[Any], steps: Steps) -> list[float]:
    """Train `network`, in place and in training mode; the loss of every update. `network` is in eval mode after it."""
    random_seed(steps.seed)
    optimizer = create_optimizer_v2(network, opt="adamw", lr=steps.lr, weight_decay=steps.weight_decay)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=steps.schedule,
        num_epochs=steps.updates,
        decay_rate=0.9 if steps.schedule == "poly" else 0.1,
        decay_milestones=[int(share * steps.updates) for share in steps.milestones],
        warmup_epochs=steps.warmup,
        warmup_lr=steps.lr / 1000,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    assert schedule is not None
    network.train()
    losses: list[float] = []
    for update in track(range(steps.updates), "training", disable=not sys.stdout.isatty(), transient=True):
        value = loss(next(batches))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step_update(update + 1)
        losses.append(value.item())
    network.eval()
    return losses


def forever(dataset: Any, steps: Steps, collate: Callable[[list[Any]], Any] | None = None) -> Iterator[Any]:
    """Shuffled batches without end. Raises ValueError if there are fewer images than a batch."""
    if len(dataset) < steps.batch:
        raise ValueError(f"{len(dataset)} images are too few for a batch of {steps.batch}")
    random = torch.Generator().manual_seed(steps.seed)
    loader = torch.utils.data.DataLoader(
        dataset, steps.batch, shuffle=True, drop_last=True, generator=random, collate_fn=collate
    )
    while True:
        yield from loader


def backbone(name: str, checkpoint: Path | None, drop_path: float = 0.0) -> Backbone:
    """The stages of a variant. Raises ValueError, CheckpointError or OSError as `create_model`."""
    return create_model(name, features_only=True, checkpoint=checkpoint, drop_path_rate=drop_path)


def difference(actual: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest difference, relative to the largest value of each of the expected arrays."""
    worst = 0.0
    for one, other in zip(actual, expected, strict=True):
        a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
        worst = max(worst, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12)))
    return worst


def deploy(fused: nn.Module, path: Path, image: Tensor, outputs: Sequence[str]) -> float:
    """Write the fused network as ONNX, run it in ONNX Runtime; the largest error against torch on `image`."""
    export_onnx(fused, path, size=image.shape[-1], batch=len(image), outputs=outputs)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = fused(image)
    expected = [expected] if isinstance(expected, Tensor) else expected
    found = session.run(None, {"image": image.numpy()})
    return difference(found, [tensor.numpy() for tensor in expected])
