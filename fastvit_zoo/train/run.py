"""One training run of a classifier, in one process or in many."""

# pyright: reportPrivateImportUsage=false
# timm exports its names without saying so.

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fastvit_zoo.torchvision_operators  # noqa: F401
import reparamc
from fastvit_zoo import options
from fastvit_zoo.checkpoint import CheckpointError, load_checkpoint
from fastvit_zoo.model import FastViT, create_model
from fastvit_zoo.timing import milliseconds
from fastvit_zoo.train.data import Source, loaders, readable
from fastvit_zoo.train.recipe import Recipe
from fastvit_zoo.train.step import Stepper
from fastvit_zoo.train.validate import compare

# isort: split
import timm
from timm.models import load_checkpoint as load_timm_checkpoint
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import (
    AverageMeter,
    CheckpointSaver,
    ModelEmaV3,
    distribute_bn,
    random_seed,
)
from timm.utils.distributed import init_distributed_device_so
from timm.utils.summary import trim_summary, update_summary


@dataclass(frozen=True)
class Teacher:
    """A network whose predictions are learned as well: a name of timm or of the zoo, and its weights."""

    name: str
    checkpoint: Path


@dataclass(frozen=True)
class Options(options.Options):
    """Those of every run, and a teacher. A classifier of other classes in `checkpoint` is dropped."""

    teacher: Teacher | None = None


class Saver(CheckpointSaver):
    """That of timm, which for a moment has no file where it replaces one."""

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        try:
            super()._save(save_path, epoch, metric)
        except RuntimeError as error:  # a full disk, as torch says it
            Path(save_path).unlink(missing_ok=True)
            raise OSError(f"{save_path} cannot be written: {str(error).splitlines()[0]}") from error

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        partial = f"{dst}.partial"
        Path(partial).unlink(missing_ok=True)
        super()._duplicate(src, partial)
        os.replace(partial, dst)


class Run:
    """Trains `model` by `recipe` on `source`; `epochs()` yields what each epoch measured.

    Raises ValueError, CheckpointError or OSError before anything is trained or written if an input does not fit.
    """

    def __init__(self, model: str, recipe: Recipe, source: Source, chosen: Options) -> None:
        self.name, self.recipe, self.options = model, recipe, chosen
        for module in ("timm.utils.checkpoint_saver", "timm.models._helpers", "timm.utils.summary"):
            logging.getLogger(module).setLevel(logging.WARNING)
        group = init_distributed_device_so(device=chosen.device)
        self.device = torch.device(group["device"])
        self.rank, self.size = int(group["global_rank"]), int(group["world_size"])
        random_seed(recipe.seed, 0)  # the same first weights everywhere
        self.training, self.validation, self.classes = loaders(
            source, recipe, self.device, workers=chosen.workers, distributed=self.size > 1
        )
        self.network = create_model(
            model,
            num_classes=len(self.classes),
            drop_path_rate=recipe.drop_path,
            layer_scale_init=recipe.layer_scale,
        )
        if chosen.checkpoint:
            first_weights(self.network, chosen.checkpoint)
        self.teacher = teacher_of(chosen.teacher, len(self.classes), self.device)
        self.about = {"model": model, "classes": self.classes, "recipe": asdict(recipe)}
        options.check_claim(chosen, self.about)
        self.network.to(self.device)
        self.average = ModelEmaV3(self.network, decay=recipe.ema)
        self.model: nn.Module = self.network
        if self.size > 1:
            self.model = DistributedDataParallel(
                self.network, device_ids=[self.device] if self.device.type == "cuda" else None
            )
        self.optimizer = create_optimizer_v2(
            self.model, opt=recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        self.stepper = Stepper(self.optimizer, self.device, chosen.amp)
        self.updates = len(self.training) // recipe.accumulate
        schedule, self.last = create_scheduler_v2(
            self.optimizer,
            num_epochs=recipe.epochs,
            warmup_epochs=recipe.warmup,
            warmup_lr=recipe.warmup_lr,
            min_lr=recipe.min_lr,
            cooldown_epochs=recipe.cooldown,
            step_on_epochs=False,
            updates_per_epoch=self.updates,
        )
        assert schedule is not None
        self.schedule = schedule
        self.saver = Saver(
            self.network,
            self.optimizer,
            model_ema=self.average,
            amp_scaler=self.stepper.scaler,
            checkpoint_dir=str(chosen.output),
            max_history=1,
        )
        self.first = self._resumed() if chosen.resume else 0
        images = torch.randn(2, 3, recipe.size, recipe.size, device=self.device)
        self.fuser = reparamc.Fuser(self.averaged, images)
        if self.rank == 0:
            trim_summary(str(self.summary), self.first)

    @property
    def summary(self) -> Path:
        """The file with one line per epoch."""
        return self.options.output / "summary.csv"

    @property
    def averaged(self) -> FastViT:
        """The network with the averaged weights."""
        return cast(FastViT, self.average.module)

    def epochs(self) -> Iterator[dict[str, float]]:
        """Train; after every epoch validate the averaged weights in both forms, save, and give the figures."""
        images = torch.randn(1, 3, self.recipe.size, self.recipe.size, device=self.device)
        with options.claim(self.options, self.about) if self.rank == 0 else nullcontext():
            for epoch in range(self.first, self.last):
                loss = self._epoch(epoch)
                if self.size > 1:
                    distribute_bn(self.network, self.size, reduce=True)
                    distribute_bn(self.averaged, self.size, reduce=True)
                fused = self.fuser()
                found = compare(self.averaged, fused, readable(self.validation))
                with torch.inference_mode():
                    slow, fast = milliseconds([lambda: self.averaged(images), lambda f=fused: f(images)])
                figures = {
                    "top1": found.top1,
                    "top5": found.top5,
                    "top1_fused": found.top1_fused,
                    "top5_fused": found.top5_fused,
                    "differing": found.differing,
                    "ms": slow,
                    "ms_fused": fast,
                    "lr": self.optimizer.param_groups[0]["lr"],
                }
                if self.rank == 0:
                    # The line first: if the run is killed in between, resuming removes it.
                    update_summary(epoch, {"loss": loss}, figures, str(self.summary))
                    self.saver.save_checkpoint(epoch, metric=found.top1)
                yield {"epoch": epoch, "images": found.images, "loss": loss, **figures}

    def _epoch(self, epoch: int) -> float:
        """One pass over the training images; the mean loss."""
        random_seed(self.recipe.seed + 1000 * (epoch + 1), self.rank)
        sampler = getattr(self.training, "sampler", None)
        if self.size > 1 and sampler is not None:
            sampler.set_epoch(epoch)
        self.model.train()
        losses, update = AverageMeter(), epoch * self.updates
        batches = readable(self.training)
        quiet = self.rank > 0 or not sys.stdout.isatty()
        for _ in track(range(self.updates), f"epoch {epoch}", disable=quiet, transient=True):
            for part in range(self.recipe.accumulate):
                images, labels = next(batches)
                loss = self._backward(images, labels, part == self.recipe.accumulate - 1)
                losses.update(loss, len(images))
            self.optimizer.zero_grad()
            update += 1
            self.average.update(self.network, step=update)
            self.schedule.step_update(update)
        return losses.avg

    def _backward(self, images: Tensor, labels: Tensor, update: bool) -> float:
        """Add the gradients of one batch and, with `update`, take a step; the loss of the batch."""
        waiting: AbstractContextManager[Any] = nullcontext()
        if isinstance(self.model, DistributedDataParallel) and not update:
            waiting = self.model.no_sync()
        with waiting:
            with self.stepper.autocast():
                loss = self._loss(self.model(images), images, labels)
            self.stepper.step(loss / self.recipe.accumulate, self.model, clip=self.recipe.clip, update=update)
        return loss.item()

    def _loss(self, scores: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        smoothing = 0.0 if labels.is_floating_point() else self.recipe.smoothing  # mixed labels are smooth already
        loss = F.cross_entropy(scores, labels, label_smoothing=smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            taught = self.teacher(images).argmax(1)
        weight = self.recipe.distillation
        return (1 - weight) * loss + weight * F.cross_entropy(scores, taught)

    def _resumed(self) -> int:
        """Load the last full epoch; the number of the next."""
        last = str(self.options.output / "last.pth.tar")
        if not os.path.exists(last):
            return 0
        epoch = resume_checkpoint(self.network, last, self.optimizer, self.stepper.scaler, log_info=False)
        load_timm_checkpoint(self.averaged, last, use_ema=True)
        self.saver.load_state_dict_from_checkpoint(last)
        self.schedule.step_update((epoch or 0) * self.updates)
        return epoch or 0


def first_weights(network: FastViT, checkpoint: Path) -> None:
    """Load weights to start from; a classifier of other classes stays as it is.

    Raises CheckpointError if the rest does not fit, OSError if the file cannot be read.
    """
    try:
        load_checkpoint(network, checkpoint)
    except CheckpointError:
        load_checkpoint(network, checkpoint, classifier=False)


def teacher_of(teacher: Teacher | None, classes: int, device: torch.device) -> nn.Module | None:
    """The teacher in eval mode. Raises ValueError or OSError if its weights do not fit."""
    if teacher is None:
        return None
    import fastvit_zoo.timm_models  # noqa: F401

    if not teacher.checkpoint.exists():
        raise FileNotFoundError(f"the teacher's weights {teacher.checkpoint} do not exist")
    try:
        if teacher.name.startswith("fastvit_"):
            network = create_model(teacher.name, num_classes=classes, checkpoint=teacher.checkpoint)
        else:
            network = timm.create_model(teacher.name, num_classes=classes, checkpoint_path=str(teacher.checkpoint))
    except Exception as error:  # whatever timm raises for a name or a file that is something else
        raise ValueError(f"{teacher.checkpoint} does not fit {teacher.name}: {str(error).splitlines()[0]}") from error
    return network.to(device).eval().requires_grad_(False)
