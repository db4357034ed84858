"""`python -m fastvit_zoo`: `list`, `train`, `evaluate`, the tasks, `export`, `targets` and `study`.

Exit codes: 0 done, 2 bad usage or bad input, in one line on standard error, 130 interrupted."""

import argparse
import sys
from typing import NoReturn

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


class Parser(argparse.ArgumentParser):
    """Says what is wrong on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastvit_zoo: error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m fastvit_zoo", description="FastViT in its training form.")
    commands = parser.add_subparsers(required=True)
    listing = commands.add_parser("list", help="print the variants and their parameter counts")
    listing.set_defaults(run=lambda _: _list())
    for part in export, train, tasks:
        part.add(commands)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns 0, 2 after one line on stderr that says what is wrong, or 130 if it was interrupted.
    """
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # What a process that reads images reports is a traceback, the error last.
        print(f"fastvit_zoo: error: {lines[-1] if lines[0].startswith('Caught ') else lines[0]}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"fastvit_zoo: error: {error}: pip install 'reparamc[zoo]' brings what this needs", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        print("fastvit_zoo: error: out of memory: give a smaller --batch or --size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastvit_zoo: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
