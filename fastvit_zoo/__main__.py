"""`python -m fastvit_zoo list`, `export` and `train`."""

import argparse
import sys
from collections import Counter
from pathlib import Path

import onnx
import torch

from fastvit_zoo.model import CONFIGS, create_model, list_models
from fastvit_zoo.onnx_export import export_onnx
from fastvit_zoo.train import command as train
from reparamc.testing import randomize_batchnorm, randomize_layer_scales


def _list() -> None:
    for name in list_models():
        with torch.device("meta"):
            training, deployed = create_model(name), create_model(name, deployed=True)
        counts = [sum(p.numel() for p in model.parameters()) for model in (training, deployed)]
        print(f"{name:13} {counts[0]:>11,} parameters in training form, {counts[1]:>11,} deployed")


def _export(arguments: argparse.Namespace) -> None:
    output: Path = arguments.output
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder, not a file")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"the folder {output.parent} does not exist")
    torch.manual_seed(arguments.seed)
    model = create_model(arguments.name, checkpoint=arguments.checkpoint)
    if arguments.checkpoint is None:
        randomize_layer_scales(model, arguments.seed)
        randomize_batchnorm(model, arguments.seed, torch.randn(8, 3, 96, 96))
    export_onnx(model, output, size=arguments.size, batch=arguments.batch, dynamic=arguments.dynamic)

    kinds = Counter(node.op_type for node in onnx.load(output, load_external_data=False).graph.node)
    operators = kinds.total() - kinds["Constant"] - kinds["Identity"]
    print(
        f"{output}: {output.stat().st_size / 2**20:.1f} MiB, {operators} operators, "
        f"{kinds['Conv']} Conv, {kinds['BatchNormalization']} BatchNormalization"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastvit_zoo", description="FastViT in its training form.")
    commands = parser.add_subparsers(required=True)

    listing = commands.add_parser("list", help="print the variants and their parameter counts")
    listing.set_defaults(run=lambda _: _list())

    export = commands.add_parser("export", help="write the training form of a variant as an ONNX file")
    export.add_argument("name", help=f"one of {', '.join(CONFIGS)}")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write")
    export.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights of the training form; without them the weights are random, with BatchNorm statistics "
        "and layer scales of ordinary size",
    )
    export.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    export.add_argument("--size", type=_positive, default=256, metavar="PIXELS", help="default: 256")
    export.add_argument("--batch", type=_positive, default=1, metavar="IMAGES", help="default: 1")
    export.add_argument("--dynamic", action="store_true", help="leave batch, height and width open")
    export.set_defaults(run=_export)
    train.add(commands)
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
