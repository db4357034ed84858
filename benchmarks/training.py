"""Fusion in the training loop: what it costs.

    python benchmarks/training.py replay [NAME ...]     # fused again, beside one forward pass of 32 images
    python benchmarks/training.py through [NAME ...]    # a step through the fusion, beside one without
    python benchmarks/training.py grow [NAME ...]       # every recipe: grown, trained for some steps, fused
    python benchmarks/training.py compile [NAME ...]    # torch.compile of the model, of its fused form, and the backend
    python benchmarks/training.py cost [NAME ...]       # fuse_fx once, beside forward passes

NAME is one of fastvit_zoo, or timm/ or torchvision/ and one of those. Times are CPU seconds, the median of REPEATS,
taken in turns; where other programs run, set OMP_NUM_THREADS=1. The search is the one without checks.
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
import torch._inductor.config
from models import build, size
from torch import Tensor, nn
from torch.nn import functional as F

from reparamc import Fuser, InputError, fuse_fx, overparameterize, parameter_groups
from reparamc.training.backend import backend
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


def row(*cells: Any) -> None:
    """The first column is wide; numbers have three digits."""
    shown = (f"{c:.2g}" if isinstance(c, float) else str(c) for c in cells[1:])
    print(f"{cells[0]:<26}", *(f"{c:>14}" for c in shown), flush=True)


def images(name: str, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, 3, size(name), size(name), generator=torch.Generator().manual_seed(0))


def moved(model: nn.Module) -> None:
    """Other weights, as after an epoch."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.01 * torch.rand_like(p))


@torch.no_grad()
def replay(names: list[str]) -> None:
    row("seconds", "search", "again", "with check", "forward", "again", "with check", "differs by")
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
        row(name, search, again, checked, forward, again / forward, checked / forward, error)


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
    row("seconds, MiB for backward", "step", "through", "ratio", "fused alone", "step", "through", "ratio")
    for name in names or ["timm/repvgg_a0", "timm/mobileone_s0", "fastvit_t8"]:
        model, x = build(name), images(name)
        labels = torch.zeros(len(x), dtype=torch.long)
        through = Fuser(model, x[:2], differentiable=True, verify=False)()
        alone = Fuser(model, x[:2], verify=False)().requires_grad_(
            True
        )  # its kernels are parameters: nothing is folded

        def step(module: nn.Module, x: Tensor = x, labels: Tensor = labels) -> float:
            module.zero_grad()
            saved = Saved(module)
            with torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t):
                loss = F.cross_entropy(module(x), labels)
            loss.backward()
            return saved.mebibytes

        before, after = step(model), step(through)
        slow, fast, least = seconds(*(partial(step, m) for m in (model, through, alone)))
        row(name, slow, fast, fast / slow, least / slow, round(before), round(after), after / before)


def grow(names: list[str]) -> None:
    """Errors are the largest difference of outputs, relative to the largest output."""
    row("millions, differences", "recipe", "parameters", "grown", "at the start", "trained", "fused", "plain kernels")
    for name in names or ["timm/resnet18", "timm/mobilenetv2_100", "timm/convnext_atto", "timm/vit_tiny_patch16_224"]:
        model, x = build(name), images(name, 4)
        plain = fuse_fx(model, x[:2], verify=False)
        for recipe in RECIPES:
            try:
                grown = overparameterize(model, recipe)
            except InputError:
                row(name, recipe, "no place to grow")
                continue
            start = apart(grown, model, x)
            sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, grown)]
            trained(grown, x)
            fused = fuse_fx(grown, x[:2], verify=False)
            kernels = [Counter(tuple(t.shape) for t in m.state_dict().values() if t.ndim > 1) for m in (fused, plain)]
            row(name, recipe, *sizes, start, apart(grown, model, x), apart(fused, grown, x), kernels[0] == kernels[1])


@torch.no_grad()
def apart(a: Callable[[Tensor], Tensor], b: nn.Module, x: Tensor) -> float:
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


@torch.no_grad()
def compile(names: list[str]) -> None:
    """By inductor, which needs a compiler of C++; eight images."""
    row("seconds", "eager", "fused", "compiled", "frozen", "fused, compiled", "backend", "differs by")
    for name in names or ["timm/repvgg_a0"]:
        model, x = build(name), images(name, 8)
        fused = fuse_fx(model, x[:2], verify=False)
        runs: list[Callable[[Tensor], Tensor]] = [model, fused, torch.compile(model)]
        runs[2](x)
        torch._dynamo.reset()
        with torch._inductor.config.patch(freezing=True):
            runs.append(torch.compile(model))
            runs[3](x)
        torch._dynamo.reset()
        runs += [torch.compile(fused), torch.compile(model, backend=backend)]
        error = max(apart(run, model, x) for run in runs)
        row(name, *seconds(*(partial(run, x) for run in runs)), error)


@torch.no_grad()
def cost(names: list[str]) -> None:
    """Each once, in turns, after a small fusion; as multiples of a forward pass of 8 images, or of 32 if verified."""
    fuse_fx(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(2, 3, 224, 224))
    row("", "8 images, s", "32 images, s", "unverified / 8", "full / 32", "no example", "example of 32")
    for name in names or COSTLY:
        model, x = build(name), images(name)
        with torch.no_grad():
            model(x[:2])
            least, many = (min(seconds_of(model, given) for _ in range(2)) for given in (x[:8], x))
        bare = seconds_of(fuse_fx, model, x[:2], verify=False)
        full = [seconds_of(fuse_fx, model, *given) for given in ((x[:2],), (), (x,))]
        row(name, least, many, bare / least, *(f / many for f in full))


def seconds_of(run: Callable[..., Any], *given: Any, **options: Any) -> float:
    start = process_time()
    run(*given, **options)
    return process_time() - start


COSTLY = [
    *("fastvit_t8", "fastvit_sa12", "fastvit_sa36", "timm/mobileone_s0", "timm/repvit_m0_9", "timm/repvgg_a0"),
    *("torchvision/mobilenet_v3_small", "torchvision/mobilenet_v3_large", "torchvision/efficientnet_b0"),
    *("torchvision/resnet18", "torchvision/convnext_tiny", "torchvision/densenet121"),
    "torchvision/deeplabv3_mobilenet_v3_large",
]


COMMANDS = {"replay": replay, "through": through, "grow": grow, "compile": compile, "cost": cost}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    main()
