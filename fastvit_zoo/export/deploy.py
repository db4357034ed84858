"""Fuse, convert, compare, and only then write."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import reparamc
from fastvit_zoo.export.targets import TARGETS, Runner, Target
from fastvit_zoo.model import CONFIGS, create_model
from fastvit_zoo.timing import ratios
from reparamc.testing import randomize_batchnorm, randomize_layer_scales

TOLERANCE = 1e-3
"""The largest error against torch, relative to the largest value: runtimes choose other algorithms for convolutions."""


@dataclass(frozen=True)
class Deployed:
    """What is known of a converted file: its error against torch, or the operators in it where it cannot run here."""

    error: float | None
    operators: Counter[str]


def target_of(name: str) -> Target:
    """The target `name`. Raises ValueError if it is unknown or its packages are missing."""
    if name not in TARGETS:
        raise ValueError(f"unknown target {name!r}; known targets: {', '.join(TARGETS)}")
    if missing := TARGETS[name].missing():
        raise ValueError(f"the target {name} needs packages that are not installed: pip install {' '.join(missing)}")
    return TARGETS[name]


def deploy(fused: nn.Module, name: str, path: Path, image: Tensor) -> Deployed:
    """Convert the fused network for the target `name`, compare it with torch on `image`, and write `path`.

    Raises ValueError if the target is unknown or not installed, the name of the file does not suit it, the converter
    fails or the result differs; then nothing is written.
    """
    target = target_of(name)
    if path.suffix != target.suffix:
        raise ValueError(f"a file for {name} ends in {target.suffix}, not {path.name}")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        made = Path(folder) / path.name
        run = convert(name, fused, image, made)
        error = None if run is None else _difference(run, fused, image)
        if error is not None and not error <= TOLERANCE:
            raise ValueError(f"{name} computes something else than torch: the largest error is {error:.1e}")
        found = Deployed(error, target.operators(made) if target.operators else Counter())
        for file in Path(folder).iterdir():
            final = path.parent / file.name
            if final.is_dir():
                shutil.rmtree(final)
            os.replace(file, final)
    return found


def convert(name: str, network: nn.Module, image: Tensor, path: Path) -> Runner | None:
    """Write `path` for the target `name`, and load it where its runtime runs here.

    Raises ValueError if the target is unknown or not installed, or if any of this fails.
    """
    target = target_of(name)
    with one_line(f"the converter for {name}"):
        target.convert(network, image, path)
    with one_line(f"the runtime of {name}"):
        run = target.load(path) if target.load else None
        if run is not None:
            run(image.numpy())
    return run


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Raise ValueError that `what` failed, whatever is raised within."""
    try:
        yield
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{what} failed: {line}") from error


def _difference(run: Runner, fused: nn.Module, image: Tensor) -> float:
    """The largest error against torch, relative to the largest value."""
    with torch.no_grad():
        expected = fused(image).numpy()
    return float(np.abs(run(image.numpy()) - expected).max() / np.abs(expected).max())


def random_model(name: str, seed: int = 0, classes: int = 1000) -> nn.Module:
    """A variant with random weights, with BatchNorm statistics and layer scales of ordinary size."""
    torch.manual_seed(seed)
    model = create_model(name, num_classes=classes)
    randomize_layer_scales(model, seed)
    randomize_batchnorm(model, seed, torch.randn(8, 3, 96, 96))
    return model.eval()


def matrix(name: str, size: int, rounds: int = 10, to: Sequence[str] = tuple(TARGETS)) -> Iterator[str]:
    """The rows of a table for one variant: for each target its error, and its latency in three forms.

    The forms are the training form, the one that the authors' own method leaves (`deployed=True`), and the fused one;
    latencies are CPU times taken in turns on one thread, as ratios to the fused form.
    """
    if name not in CONFIGS:
        raise ValueError(f"unknown model {name!r}; known models: {', '.join(CONFIGS)}")
    image = torch.randn(1, 3, size, size)
    training = random_model(name)
    forms = {
        "fused": reparamc.fuse_fx(training, torch.randn(2, 3, size, size)),
        "authors": create_model(name, deployed=True).eval(),
        "training": training,
    }
    yield "| target | error | training form | authors' form | fused |\n|---|---|---|---|---|"
    for kind in to:
        yield f"| {kind} | {_row(kind, forms, image, rounds)} |"


def _row(name: str, forms: dict[str, nn.Module], image: Tensor, rounds: int) -> str:
    target = TARGETS[name]
    if missing := target.missing():
        return f"not installed: {', '.join(missing)} | | |"
    cells = dict.fromkeys(forms, "fails")
    runners: dict[str, Runner] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form, network in forms.items():
            path = Path(folder) / f"{form}{target.suffix}"
            try:
                run = convert(name, network, image, path)
            except ValueError as error:
                print(f"{form}: {error}", file=sys.stderr)
                continue
            if run is not None:
                runners[form] = run
            elif (count := target.operators) is not None:
                cells[form] = f"{count(path).total()} operators"
        if runners:
            relative = ratios([partial(runner, image.numpy()) for runner in runners.values()], rounds)
            cells |= {form: f"{ratio:.2f}" for form, ratio in zip(runners, relative, strict=True)}
        error = f"{_difference(runners['fused'], forms['fused'], image):.0e}" if "fused" in runners else "not run"
    return " | ".join([error, *reversed(cells.values())])
