"""What every command that trains takes besides its recipe, and the folder that its run claims."""

import argparse
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Options:
    """What of a run is no hyper-parameter: where it runs, and what it starts from.

    `checkpoint` gives first weights. `resume` continues the run in the folder `output` from its last checkpoint. `amp`
    computes in half precision where that is safe: float16 on a GPU, bfloat16 elsewhere.
    """

    output: Path
    checkpoint: Path | None = None
    resume: bool = False
    device: str = "cpu"
    workers: int = 0
    amp: bool = False

    def __post_init__(self) -> None:
        check(self, natural=("workers",))
        device_of(self.device)


def device_of(name: str) -> torch.device:
    """The device `name`. Raises ValueError if it is not here; nothing is allocated on it."""
    try:
        device = torch.device(name)
        if (device.index or 0) < getattr(torch, device.type).device_count():
            return device
    except (RuntimeError, AttributeError):
        pass
    raise ValueError(f"there is no device {name!r} here; --device cpu is everywhere")


def check(
    values: Any, *, positive: tuple[str, ...] = (), natural: tuple[str, ...] = (), shares: tuple[str, ...] = ()
) -> None:
    """Raise ValueError if a field of `values` is infinite or no number, not above 0, negative, or not from 0 to 1."""
    for name, value in vars(values).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')} must be a number, not {value}")
    for names, holds, kind in (
        (positive, lambda value: value > 0, "above 0"),
        (natural, lambda value: value >= 0, "0 or more"),
        (shares, lambda value: 0 <= value <= 1, "from 0 to 1"),
    ):
        for name in names:
            if not holds(value := getattr(values, name)):
                raise ValueError(f"--{name.replace('_', '-')} must be {kind}, not {value}")


def add_options(parser: argparse.ArgumentParser, recipe: Any) -> None:
    """Add the options of a run to a parser, and one for every number and word of the dataclass `recipe`."""
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for checkpoints and results")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights to start from")
    add_machine(parser)
    parser.add_argument("--amp", action="store_true", help="half precision where it is safe")
    changes = parser.add_argument_group("instead of what the recipe says")
    for field in fields(recipe):
        kinds: dict[Any, Any] = {int: int, float: float, str: str, float | None: float}
        if field.type in kinds:
            changes.add_argument(f"--{field.name.replace('_', '-')}", type=kinds[field.type], metavar="X")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where it runs."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=best, metavar="NAME", help="default: cuda where there is one, else cpu")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images; default: 0")


def positive(text: str) -> int:
    """A whole number above 0, for a parser. Raises ValueError otherwise."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Options` that a command line gives."""
    return {field.name: getattr(arguments, field.name) for field in fields(Options)}


def changes_of(arguments: argparse.Namespace, recipe: Any) -> dict[str, Any]:
    """The fields of the dataclass `recipe` that a command line gives."""
    given = {field.name: getattr(arguments, field.name, None) for field in fields(recipe)}
    return {name: value for name, value in given.items() if value is not None}


def check_claim(options: Options, wanted: dict[str, Any]) -> None:
    """Raise ValueError if the output folder has another run than `wanted`, or none to resume."""
    kept = options.output / "run.json"
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"{options.output} is a file, not a folder")
    if kept.exists() and not options.resume:
        raise ValueError(f"{options.output} has a run already: give --resume, or another --output")
    if not options.resume:
        return
    if not kept.exists():
        raise ValueError(f"nothing to resume in {options.output}")
    flat = [{**{k: v for k, v in d.items() if k != "recipe"}, **d["recipe"]} for d in (run_of(kept), wanted)]
    for key, value in json.loads(json.dumps(flat[1])).items():
        if flat[0].get(key) != value:
            raise ValueError(f"{kept} has another {key}: {flat[0].get(key)}, not {value}")


@contextmanager
def claim(options: Options, wanted: dict[str, Any]) -> Iterator[None]:
    """Write into `run.json` of the output folder what its run is, or find that it is this one.

    A run that ends before its first checkpoint, last.*, leaves nothing. Raises ValueError as `check_claim`, OSError if
    the folder cannot be written.
    """
    check_claim(options, wanted)
    kept = options.output / "run.json"
    if not options.resume:
        options.output.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(wanted, indent=1))
        os.replace(partial, kept)
    try:
        yield
    except BaseException:
        if not list(options.output.glob("last.*")):
            for file in kept, options.output / "summary.csv":
                file.unlink(missing_ok=True)
            with suppress(OSError):  # it holds something else
                options.output.rmdir()
        raise


def run_of(file: Path) -> dict[str, Any]:
    """What a `run.json` says. Raises ValueError if it is something else."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("recipe", {}), dict):
        raise ValueError(f"{file} does not describe a run")
    return {"recipe": {}, **content}
