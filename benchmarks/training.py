"""Fusion in the training loop: what it costs.

    python benchmarks/training.py replay [NAME ...]     # fused again, beside one forward pass of 32 images
    python benchmarks/training.py through [NAME ...]    # a step through the fusion, beside a step without
    python benchmarks/training.py grow [NAME ...]       # every recipe: grown, trained for some steps, fused

NAME is one of fastvit_zoo, or timm/ and one of timm. Times are CPU seconds, the median of REPEATS, taken in turns; where
other programs run, set OMP_NUM_THREADS=1. The search is the one without checks.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import median
from time import process_time
from typing import Any

import torch
from models import build, size
from torch import Tensor, nn
from torch.nn import functional as F

from reparamc import Fuser, InputError, fuse_fx, overparameterize, parameter_groups
from reparamc.training.grow import RECIPES

REPEATS = 3
BATCH = 32


def seconds(*runs: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):  # the first is thrown away
        for run, found in zip(runs, taken, strict=True):
            start = process_time()
            run()
            found.append(process_time() - start)
    return [median(found[1:]) for found in taken]


def images(name: str, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, 3, size(name), size(name), generator=torch.Generator().manual_seed(0))


def moved(model: nn.Module) -> None:
    """Other weights, as after an epoch."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.01 * torch.rand_like(p))


@torch.no_grad()
def replay(names: list[str]) -> None:
    print(
        f"{'model':<18} {'search':>9} {'again':>9} {'+ check':>9} {'forward':>9} {'/ forward':>10} {'+ check':>9} {'differs':>9}"
    )
    for name in names or ["timm/mobileone_s0", "fastvit_sa36"]:
        model, x = build(name), images(name)
        start = process_time()
        fuser = Fuser(model, x[:2], verify=False)
        search = process_time() - start
        moved(model)
        bare = copy.copy(fuser)
        bare._check = False
        checked, again = seconds(fuser, bare)
        (forward,) = seconds(lambda model=model, x=x: model(x), repeats=1)
        expected = model(x[:4])
        error = ((fuser()(x[:4]) - expected).abs().max() / expected.abs().max()).item()
        assert fuser.searches == 1
        print(
            f"{name:<18} {search:>7.2f} s {again:>7.3f} s {checked:>7.3f} s {forward:>7.2f} s {again / forward:>10.3f} "
            f"{checked / forward:>9.3f} {error:>9.1e}",
            flush=True,
        )


class Saved:
    """The bytes that autograd keeps for the backward pass, each storage once."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.found: dict[int, int] = {}

    def __call__(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.found[storage.data_ptr()] = storage.nbytes()
        return t

    @property
    def mebibytes(self) -> float:
        return sum(self.found.values()) / 2**20


def through(names: list[str]) -> None:
    print(
        f"{'model':<18} {'step':>9} {'through':>9} {'ratio':>6} {'fused alone':>12} {'kept for backward':>18} "
        f"{'through':>11} {'ratio':>6}"
    )
    for name in names or ["timm/repvgg_a0", "timm/mobileone_s0", "fastvit_t8"]:
        model, x = build(name), images(name)
        labels = torch.zeros(len(x), dtype=torch.long)
        through = Fuser(model, x[:2], differentiable=True, verify=False)()
        alone = Fuser(model, x[:2], verify=False)().requires_grad_(True)  # its kernels are parameters: nothing is folded

        def step(module: nn.Module, x: Tensor = x, labels: Tensor = labels) -> float:
            module.zero_grad()
            saved = Saved(module)
            with torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t):
                loss = F.cross_entropy(module(x), labels)
            loss.backward()
            return saved.mebibytes

        before, after = step(model), step(through)
        slow, fast, least = seconds(*(partial(step, m) for m in (model, through, alone)))
        print(
            f"{name:<18} {slow:>7.2f} s {fast:>7.2f} s {fast / slow:>6.2f} {least / slow:>12.2f} {before:>14.0f} MiB {after:>7.0f} MiB "
            f"{after / before:>6.2f}",
            flush=True,
        )


def grow(names: list[str]) -> None:
    """Errors are the largest difference of outputs, relative to the largest output."""
    print(f"{'model':<26} {'recipe':<10} {'parameters':>22} {'at the start':>13} {'trained':>9} {'fused':>7} {'plain':>7}")
    for name in names or ["timm/resnet18", "timm/mobilenetv2_100", "timm/convnext_atto", "timm/vit_tiny_patch16_224"]:
        model, x = build(name), images(name, 4)
        plain = fuse_fx(model, x[:2], verify=False)
        for recipe in RECIPES:
            try:
                grown = overparameterize(model, recipe)
            except InputError:
                print(f"{name:<26} {recipe:<10} no place to grow", flush=True)
                continue
            start = apart(grown, model, x)
            sizes = [sum(p.numel() for p in m.parameters()) for m in (model, grown)]
            trained(grown, x)
            fused = fuse_fx(grown, x[:2], verify=False)
            shapes = [Counter(tuple(t.shape) for t in m.state_dict().values()) for m in (fused, plain)]
            print(
                f"{name:<26} {recipe:<10} {sizes[0] / 1e6:>8.2f} M -> {sizes[1] / 1e6:>6.2f} M {start:>13.1e} "
                f"{apart(grown, model, x):>9.2f} {apart(fused, grown, x):>7.0e} {shapes[0] == shapes[1]!s:>7}",
                flush=True,
            )


@torch.no_grad()
def apart(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    expected = b(x)
    return ((a(x) - expected).abs().max() / expected.abs().max()).item()


def trained(model: nn.Module, x: Tensor, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(len(x))).backward()
        optimizer.step()
    model.eval()


COMMANDS = {"replay": replay, "through": through, "grow": grow}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    main()
