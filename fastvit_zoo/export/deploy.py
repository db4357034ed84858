"""Fuse, convert, compare, and only then write."""

import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import reparamc
from fastvit_zoo.export.targets import TARGETS, Target
from fastvit_zoo.model import CONFIGS, create_model
from fastvit_zoo.timing import milliseconds
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
        try:
            target.convert(fused, image, made)
        except Exception as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"the converter for {name} failed: {line}") from error
        found = _checked(target, fused, made, image)
        if found.error is not None and not found.error <= TOLERANCE:
            raise ValueError(f"{name} computes something else than torch: the largest error is {found.error:.1e}")
        for file in Path(folder).iterdir():
            final = path.parent / file.name
            if final.is_dir():
                shutil.rmtree(final)
            os.replace(file, final)
    return found


def _checked(target: Target, fused: nn.Module, file: Path, image: Tensor) -> Deployed:
    error = None
    if target.load is not None:
        with torch.no_grad():
            expected = fused(image).numpy()
        error = float(np.abs(target.load(file)(image.numpy()) - expected).max() / np.abs(expected).max())
    return Deployed(error, target.operators(file) if target.operators else Counter())


def random_model(name: str, seed: int = 0) -> nn.Module:
    """A variant with random weights, with BatchNorm statistics and layer scales of ordinary size."""
    torch.manual_seed(seed)
    model = create_model(name)
    randomize_layer_scales(model, seed)
    randomize_batchnorm(model, seed, torch.randn(8, 3, 96, 96))
    return model.eval()


def matrix(name: str, size: int, rounds: int = 10) -> str:
    """A table for one variant: for every target whether it converts, its error, and its latency in three forms.

    The forms are the training form, the one that the authors' own method leaves (`deployed=True`), and the fused one;
    latencies are CPU times taken in turns on one thread, as ratios to the training form.
    """
    if name not in CONFIGS:
        raise ValueError(f"unknown model {name!r}; known models: {', '.join(CONFIGS)}")
    image = torch.randn(1, 3, size, size)
    training = random_model(name)
    forms = {
        "training": training,
        "authors": create_model(name, deployed=True).eval(),
        "fused": reparamc.fuse_fx(training, torch.randn(2, 3, size, size)),
    }
    lines = ["| target | converts | error | authors' form | fused |", "|---|---|---|---|---|"]
    for kind, target in TARGETS.items():
        lines.append(f"| {kind} | {_row(target, forms, image, rounds)} |")
    return "\n".join(lines)


def _row(target: Target, forms: dict[str, nn.Module], image: Tensor, rounds: int) -> str:
    if missing := target.missing():
        return f"not installed: {', '.join(missing)} | | |"
    with tempfile.TemporaryDirectory() as folder:
        files = {form: Path(folder) / f"{form}{target.suffix}" for form in forms}
        try:
            for form, network in forms.items():
                target.convert(network, image, files[form])
            found = _checked(target, forms["fused"], files["fused"], image)
        except Exception as error:
            return f"no: {type(error).__name__} | | |"
        if target.load is None:
            counts = [target.operators(file).total() for file in files.values()] if target.operators else []
            return f"yes | does not run here | {_ratio(counts, 1)} operators | {_ratio(counts, 2)} operators"
        runners = [target.load(file) for file in files.values()]
        times = milliseconds([lambda r=r: r(image.numpy()) for r in runners], rounds)
    return f"yes | {found.error:.0e} | {_ratio(times, 1)} | {_ratio(times, 2)}"


def _ratio(values: list[int] | list[float], index: int) -> str:
    return f"{values[index] / values[0]:.2f}" if isinstance(values[0], float) else f"{values[0]} > {values[index]}"
