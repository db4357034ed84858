"""`python -m fastvit_zoo`: `list`, `export`, `targets`, `train` and the tasks."""

import argparse
import sys

import torch

from fastvit_zoo.export import command as export
from fastvit_zoo.model import create_model, list_models
from fastvit_zoo.tasks import command as tasks
from fastvit_zoo.train import command as train


def _list() -> None:
    for name in list_models():
        with torch.device("meta"):
            training, deployed = create_model(name), create_model(name, deployed=True)
        counts = [sum(p.numel() for p in model.parameters()) for model in (training, deployed)]
        print(f"{name:13} {counts[0]:>11,} parameters in training form, {counts[1]:>11,} deployed")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastvit_zoo", description="FastViT in its training form.")
    commands = parser.add_subparsers(required=True)
    listing = commands.add_parser("list", help="print the variants and their parameter counts")
    listing.set_defaults(run=lambda _: _list())
    for part in export, train, tasks:
        part.add(commands)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns 0, or 2 after one line on stderr that says what is wrong."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except (OSError, ValueError) as error:
        print(f"fastvit_zoo: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
