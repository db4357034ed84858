"""`python -m fastvit_zoo train` and `evaluate`."""

import argparse
from pathlib import Path
from typing import Any

from fastvit_zoo.options import add_machine, add_options, changes_of, options_of, positive
from fastvit_zoo.train.recipe import RECIPES, Recipe, recipe


def add(commands: Any) -> None:
    """Add the commands to a parser."""
    _add_evaluate(commands)
    parser: argparse.ArgumentParser = commands.add_parser("train", help="train a classifier by the paper's recipe")
    parser.add_argument("--model", metavar="NAME", help="default: fastvit_t8, and the small fastvit_digits for digits")
    parser.add_argument("--recipe", default="paper", metavar="NAME", help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--data", type=Path, metavar="DIR", help="has train and val, and a folder per class in each")
    parser.add_argument(
        "--dataset", default="", metavar="KIND", help="digits, hfds or torch/NAME instead of folders of images"
    )
    parser.add_argument("--teacher", metavar="NAME", help="learn from this model of timm or of the zoo as well")
    parser.add_argument("--teacher-checkpoint", type=Path, metavar="FILE", help="the weights of the teacher")
    add_options(parser, Recipe)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Train, then write the fused network as ONNX and a plot.

    Raises ValueError or OSError for input that does not fit, ImportError if a package is missing.
    """
    if (arguments.teacher is None) != (arguments.teacher_checkpoint is None):
        raise ValueError("--teacher and --teacher-checkpoint belong together")
    changes = changes_of(arguments, Recipe)
    small = arguments.recipe == "digits"
    model = arguments.model or ("fastvit_digits" if small else "fastvit_t8")
    chosen = recipe(arguments.recipe, model, distilled=arguments.teacher is not None, **changes)
    from fastvit_zoo.train.finish import train
    from fastvit_zoo.train.run import Options, Source, Teacher

    teacher = Teacher(arguments.teacher, arguments.teacher_checkpoint) if arguments.teacher else None
    options = Options(**options_of(arguments), teacher=teacher)
    kind = arguments.dataset or ("digits" if small and arguments.data is None else "")
    train(model, chosen, Source(arguments.data, kind), options)


def _add_evaluate(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "evaluate", help="accuracy of both forms: on a folder of images, corrupted, on some of the classes"
    )
    parser.add_argument("--model", default="fastvit_t8", metavar="NAME", help="default: fastvit_t8")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="weights of the training form")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder per class, or val with them")
    parser.add_argument("--size", type=positive, default=256, metavar="PIXELS", help="default: 256")
    parser.add_argument("--crop", type=float, default=0.9, metavar="SHARE", help="of the image; default: 0.9")
    parser.add_argument("--batch", type=positive, default=64, metavar="N", help="default: 64")
    parser.add_argument("--corruptions", nargs="*", metavar="KIND", help="these, or all 15 of ImageNet-C")
    add_machine(parser)
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from fastvit_zoo.train.evaluate import ALEXNET, Agreement, evaluate

    found = evaluate(
        arguments.model,
        arguments.checkpoint,
        arguments.data,
        size=arguments.size,
        crop=arguments.crop,
        batch=arguments.batch,
        corruptions=() if arguments.corruptions is None else arguments.corruptions or tuple(ALEXNET),
        device=arguments.device,
        workers=arguments.workers,
    )
    for name, value in found.items():
        if not isinstance(value, Agreement):
            print(f"{name}: {value:.2f} %")
        else:
            print(
                f"{name}: top-1 {value.top1:.2f} %, fused {value.top1_fused:.2f} % "
                f"({value.differing} of {value.images} predictions differ)"
            )
