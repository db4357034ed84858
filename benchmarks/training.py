"""Fusion in the training loop: what it costs.

    python benchmarks/training.py replay [NAME ...]     # fused again, beside one forward pass of 32 images
    python benchmarks/training.py through [NAME ...]    # a step through the fusion, beside a step without

NAME is one of fastvit_zoo, or timm/ and one of timm. Times are CPU seconds, the median of REPEATS; where other programs
run, set OMP_NUM_THREADS=1. The search is the one without checks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any

import torch
from models import build, size
from torch import Tensor, nn
from torch.nn import functional as F

from reparamc import Fuser

REPEATS = 3
BATCH = 32


def seconds(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    run()
    taken = []
    for _ in range(repeats):
        start = process_time()
        run()
        taken.append(process_time() - start)
    return median(taken)


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
        f"{'model':<18} {'search':>9} {'again':>9} {'+ check':>9} {'forward':>9} {'again / forward':>16} {'differs':>9}"
    )
    for name in names or ["timm/mobileone_s0", "fastvit_sa36"]:
        model, x = build(name), images(name)
        start = process_time()
        fuser = Fuser(model, x[:2], verify=False)
        search = process_time() - start
        moved(model)
        checked = seconds(fuser)
        fuser._check = False
        again = seconds(fuser)
        forward = seconds(lambda model=model, x=x: model(x), 1)
        expected = model(x[:4])
        error = ((fuser()(x[:4]) - expected).abs().max() / expected.abs().max()).item()
        assert fuser.searches == 1
        print(
            f"{name:<18} {search:>7.2f} s {again:>7.3f} s {checked:>7.3f} s {forward:>7.2f} s {again / forward:>16.3f} "
            f"{error:>9.1e}",
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
    print(f"{'model':<18} {'step':>9} {'fused':>9} {'ratio':>6} {'kept for backward':>18} {'fused':>11} {'ratio':>6}")
    for name in names or ["timm/repvgg_a0", "timm/mobileone_s0", "fastvit_t8"]:
        model, x = build(name), images(name)
        labels = torch.zeros(len(x), dtype=torch.long)
        fused = Fuser(model, x[:2], differentiable=True, verify=False)()

        def step(module: nn.Module, model: nn.Module = model, x: Tensor = x, labels: Tensor = labels) -> float:
            model.zero_grad()
            saved = Saved(model)
            with torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t):
                loss = F.cross_entropy(module(x), labels)
            loss.backward()
            return saved.mebibytes

        before, after = step(model), step(fused)
        slow, fast = (seconds(lambda m=m, step=step: step(m)) for m in (model, fused))
        print(
            f"{name:<18} {slow:>7.2f} s {fast:>7.2f} s {fast / slow:>6.2f} {before:>14.0f} MiB {after:>7.0f} MiB "
            f"{after / before:>6.2f}",
            flush=True,
        )


COMMANDS = {"replay": replay, "through": through}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    main()
