"""`python -m fastvit_zoo segment`, `detect` and `hands`."""

import argparse
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from fastvit_zoo.options import Options, add_options, changes_of, options_of
from fastvit_zoo.tasks.steps import Steps

TASKS = {
    "segment": ("fastvit_zoo.tasks.segmentation", "train a Semantic FPN on folders in the layout of ADE20K"),
    "detect": ("fastvit_zoo.tasks.detection", "train a Mask R-CNN on data in the layout of COCO"),
    "hands": ("fastvit_zoo.tasks.hands", "train the regression of a hand on data in the layout of FreiHAND"),
}
"""The module of each command, which has a function of its name, and what it does."""


def add(commands: Any) -> None:
    """Add the commands to a parser."""
    for task, (_, what) in TASKS.items():
        parser: argparse.ArgumentParser = commands.add_parser(task, help=what)
        parser.add_argument("--model", metavar="NAME", help="default: fastvit_sa12, and fastvit_digits for tiny")
        parser.add_argument(
            "--recipe", choices=("paper", "tiny"), default="paper", help="tiny: scenes made from digits"
        )
        parser.add_argument("--data", type=Path, metavar="DIR")
        if task == "segment":
            parser.add_argument("--classes", type=int, metavar="N", help="default: 150, those of ADE20K")
        if task == "hands":
            parser.add_argument("--mano", type=Path, metavar="FILE", help="MANO_RIGHT.pkl, from the authors of MANO")
        add_options(parser, Steps)
        parser.set_defaults(run=_run, task=task)


def _run(arguments: argparse.Namespace) -> None:
    module, _ = TASKS[arguments.task]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{arguments.task} runs in one process: start it without torchrun")
    tiny = arguments.recipe == "tiny"
    model = arguments.model or ("fastvit_digits" if tiny else "fastvit_sa12")
    more = {name: getattr(arguments, name, None) for name in ("classes", "mano")}
    changes = changes_of(arguments, Steps) | {name: value for name, value in more.items() if value is not None}
    options = Options(**options_of(arguments))
    found = getattr(import_module(module), arguments.task)(model, arguments.data, options, tiny=tiny, **changes)
    for name, value in found.items():
        print(f"{name}: {value:.2e}" if 0 < value < 0.01 else f"{name}: {value:.2f}")
