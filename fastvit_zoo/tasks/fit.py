"""What the tasks share: a training loop over updates, and the way from a trained network to a compared ONNX file."""

# pyright: reportPrivateImportUsage=false
# timm exports its names without saying so.

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor, nn

import fastvit_zoo.torchvision_operators  # noqa: F401
from fastvit_zoo.checkpoint import read, save
from fastvit_zoo.model import Backbone, create_model
from fastvit_zoo.onnx_export import export_onnx
from fastvit_zoo.options import Options, check_claim, claim
from fastvit_zoo.tasks.steps import Steps
from fastvit_zoo.train.step import Stepper

# isort: split
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed


@contextmanager
def source(data: Path | None, tiny: Callable[[Path], None] | None) -> Iterator[Path]:
    """The folder `data`, or without one a folder that `tiny` writes into. Raises ValueError if there is neither."""
    if data is not None:
        if not data.is_dir():
            raise ValueError(f"{data} is not a folder")
        yield data
    elif tiny is None:
        raise ValueError("no images: give --data DIR, or --recipe tiny")
    else:
        with tempfile.TemporaryDirectory() as folder:
            tiny(Path(folder))
            yield Path(folder)


class Shuffled(torch.utils.data.Sampler):
    """The images of every update from `first` on, as pairs of the update and an index.

    Each pass over the images has an order of its own, which follows from the seed: any update can be the first.
    """

    def __init__(self, count: int, steps: Steps, first: int) -> None:
        self.count, self.steps, self.first = count, steps, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch, updates = self.steps.batch, range(self.first, self.steps.updates)
        order: list[int] = []
        for update in updates:
            which, place = divmod(update, self.count // batch)
            if place == 0 or not order:
                random = torch.Generator().manual_seed(self.steps.seed + which)
                order = torch.randperm(self.count, generator=random).tolist()
            yield [(update, index) for index in order[place * batch : (place + 1) * batch]]


class Seeded(torch.utils.data.Dataset):
    """Images whose augmentation follows from the update and the index, in every process."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        update, index = key
        random_seed((self.seed + update * len(self.dataset) + index) % 2**32)
        return self.dataset[index]


def fit(
    network: nn.Module, loss: Callable[[Any], Tensor], dataset: Any, steps: Steps, options: Options, *,
    about: dict[str, Any], collate: Callable[[list[Any]], Any] | None = None,
) -> list[float]:  # fmt: skip
    """Train `network` in place; the loss of every update. `network` is in eval mode after it, on the device.

    `loss` takes a batch on the device. `about` and the recipe are what the run in the output folder is. It writes
    `last.pt` there as it goes, from which `options.resume` continues with the same batches, and at the end `model.pt`.
    Raises ValueError if there are fewer images than a batch, the run is another, or the loss is not finite.
    """
    if len(dataset) < steps.batch:
        raise ValueError(f"{len(dataset)} images are too few for a batch of {steps.batch}: lower --batch")
    wanted, device = {**about, "recipe": asdict(steps)}, torch.device(options.device)
    check_claim(options, wanted)
    network.to(device).train()
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
    stepper = Stepper(optimizer, device, options.amp)
    parts = {"network": network, "optimizer": optimizer, **({"scaler": stepper.scaler} if stepper.scaler else {})}
    last = options.output / "last.pt"
    losses = _restored(last, parts) if options.resume and last.exists() else []
    if losses:
        schedule.step_update(len(losses))
    sampler = Shuffled(len(dataset), steps, len(losses))
    loader = torch.utils.data.DataLoader(
        Seeded(dataset, steps.seed), batch_sampler=sampler, collate_fn=collate, num_workers=options.workers
    )
    often, rest = min(500, -(-steps.updates // 20)), steps.updates - len(losses)
    with claim(options, wanted):
        for batch in track(loader, "training", rest, disable=not sys.stdout.isatty(), transient=True):
            random_seed(steps.seed + len(losses))
            with stepper.autocast():
                value = loss(moved(batch, device))
            optimizer.zero_grad()
            stepper.step(value, network)
            losses.append(value.item())
            schedule.step_update(len(losses))
            if len(losses) % often == 0 or len(losses) == steps.updates:
                save({"losses": losses, **{name: part.state_dict() for name, part in parts.items()}}, last)
                print(f"update {len(losses)} of {steps.updates}: loss {np.mean(losses[-often:]):.3f}", flush=True)
    network.eval()
    save(network.state_dict(), options.output / "model.pt")
    return losses


def _restored(file: Path, parts: dict[str, Any]) -> list[float]:
    """Load the state of a run; the losses so far. Raises CheckpointError if the file is damaged or of another run."""
    state = read(file)
    if state.keys() != {"losses", *parts}:
        raise ValueError(f"{file} was written with --amp, or without: resume as the run was started")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return list(state["losses"])


def opened(file: Path) -> Image.Image:
    """An image that is read to its end. Raises ValueError if it cannot be."""
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def size_of(file: Path) -> tuple[int, int]:
    """Width and height of an image, from its first bytes. Raises OSError if it is none."""
    with Image.open(file) as image:
        return image.size


def moved(batch: Any, device: torch.device) -> Any:
    """The tensors of a batch, in lists, tuples and dicts, on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: moved(value, device) for key, value in batch.items()}
    return type(batch)(moved(value, device) for value in batch) if isinstance(batch, list | tuple) else batch


def place(network: nn.Module) -> torch.device:
    """Where a network is."""
    return next(network.parameters()).device


def backbone(name: str, checkpoint: Path | None, drop_path: float = 0.0) -> Backbone:
    """The stages of a variant. Raises ValueError, CheckpointError or OSError as `create_model`."""
    return create_model(name, features_only=True, checkpoint=checkpoint, drop_path_rate=drop_path)


def difference(actual: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest difference, relative to the largest value of each expected array; infinite for other shapes."""
    worst = 0.0
    for one, other in zip(actual, expected, strict=True):
        a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
        if a.shape != b.shape:
            return float("inf")
        worst = max(worst, float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-12)))
    return worst


def deploy(fused: nn.Module, path: Path, image: Tensor, outputs: Sequence[str]) -> float:
    """Write the fused network as ONNX, run it in ONNX Runtime; the largest error against torch on `image`."""
    fused, image = fused.cpu(), image.cpu()
    export_onnx(fused, path, size=image.shape[-1], batch=len(image), outputs=outputs)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = fused(image)
    expected = [expected] if isinstance(expected, Tensor) else expected
    found = session.run(None, {"image": image.numpy()})
    return difference(found, [tensor.numpy() for tensor in expected])
