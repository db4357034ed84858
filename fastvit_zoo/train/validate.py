"""Accuracy of two forms of one network on the same batches."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reparamc.fx.fuse import full_precision


@dataclass(frozen=True)
class Agreement:
    """What the training form and the fused form say of `images` images; accuracies in percent."""

    images: int
    top1: float
    top5: float
    top1_fused: float
    top5_fused: float
    differing: int


def compare(model: nn.Module, fused: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Agreement:
    """Run both forms, `model` in eval mode, over images and labels; every process of a group sees its own batches.

    They run on the device of `model`, whose mode is left as it was, and on a GPU without TF32.
    """
    device = next(model.parameters()).device
    counts = torch.zeros(6, dtype=torch.float64)
    training = model.training
    model.eval()
    with torch.inference_mode(), full_precision():
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            found = [scores.topk(min(5, scores.shape[1])).indices for scores in (model(images), fused(images))]
            hits = [indices == labels[:, None] for indices in found]
            differing = (found[0][:, 0] != found[1][:, 0]).sum()
            sums = [len(labels), *(part.sum() for hit in hits for part in (hit[:, :1], hit)), differing]
            counts += torch.tensor(sums, dtype=torch.float64)
    model.train(training)
    if torch.distributed.is_initialized():
        counts = counts.to(device, torch.float32)
        torch.distributed.all_reduce(counts)
    images, *percents, differing = counts.tolist()
    percents = [100 * hits / max(images, 1) for hits in percents]
    return Agreement(int(images), *percents, differing=int(differing))
