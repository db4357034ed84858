"""`python -m fastvit_zoo segment`, `detect` and `hands`."""

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

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
        parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for weights and the fused file")
        parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights of the backbone to start from")
        parser.add_argument("--updates", type=int, metavar="N", help="instead of those of the recipe")
        parser.add_argument("--batch", type=int, metavar="N", help="instead of that of the recipe")
        parser.add_argument("--lr", type=float, metavar="RATE", help="instead of that of the recipe")
        parser.set_defaults(run=_run, task=task, mano=None)
        if task == "hands":
            parser.add_argument("--mano", type=Path, metavar="FILE", help="MANO_RIGHT.pkl, from the authors of MANO")


def _run(arguments: argparse.Namespace) -> None:
    module, _ = TASKS[arguments.task]
    try:
        function = getattr(import_module(module), arguments.task)
    except ImportError as error:
        raise ValueError(f"this needs {error.name}: pip install 'reparamc[zoo]'") from error
    tiny = arguments.recipe == "tiny"
    model = arguments.model or ("fastvit_digits" if tiny else "fastvit_sa12")
    given = ((name, getattr(arguments, name)) for name in ("updates", "batch", "lr", "mano"))
    changes = {name: value for name, value in given if value is not None}
    found = function(model, arguments.data, arguments.output, tiny=tiny, checkpoint=arguments.checkpoint, **changes)
    for name, value in found.items():
        print(f"{name}: {value:.2e}" if 0 < value < 0.01 else f"{name}: {value:.2f}")
