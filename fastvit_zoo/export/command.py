"""`python -m fastvit_zoo export`, `targets` and `study`."""

import argparse
import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import torch

from fastvit_zoo.export.targets import TARGETS
from fastvit_zoo.model import CONFIGS, create_model
from fastvit_zoo.onnx_export import export_onnx
from fastvit_zoo.options import positive

KINDS = ("mixers", "variants")


def add(commands: Any) -> None:
    """Add the commands to a parser."""
    export: argparse.ArgumentParser = commands.add_parser(
        "export", help="write the training form of a variant as an ONNX file, or its fused form for a runtime"
    )
    export.add_argument("name", help=f"one of {', '.join(CONFIGS)}")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write")
    export.add_argument(
        "--to",
        metavar="TARGET",
        help=f"fuse, convert for one of {', '.join(TARGETS)}, and compare with torch",
    )
    export.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights of the training form; without them the weights are random, with BatchNorm statistics "
        "and layer scales of ordinary size",
    )
    export.add_argument("--classes", type=positive, default=1000, metavar="N", help="default: 1000")
    export.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    export.add_argument("--size", type=positive, default=256, metavar="PIXELS", help="default: 256")
    export.add_argument("--batch", type=positive, default=1, metavar="IMAGES", help="default: 1")
    export.add_argument("--dynamic", action="store_true", help="leave batch, height and width open (not with --to)")
    export.set_defaults(run=_export)

    targets = commands.add_parser("targets", help="try every runtime that is installed: errors and latencies")
    targets.add_argument("name", nargs="?", default="fastvit_t8", help="default: fastvit_t8")
    targets.add_argument("--size", type=positive, default=256, metavar="PIXELS", help="default: 256")
    targets.add_argument("--to", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET", help="only these")
    targets.add_argument("--rounds", type=positive, default=10, metavar="N", help="turns to time; default: 10")
    targets.set_defaults(run=_targets)

    study = commands.add_parser("study", help="the paper's comparisons of latency, as ratios")
    study.add_argument("--sizes", type=positive, nargs="+", default=[224, 384, 768], metavar="PIXELS")
    study.add_argument(
        "--runtimes", nargs="+", default=["onnx", "torch"], metavar="NAME", help="targets, torch, compiled"
    )
    study.add_argument("--rounds", type=positive, default=3, metavar="N", help="turns to time; default: 3")
    study.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios, as PNG or SVG")
    study.add_argument("--table", type=Path, metavar="FILE", help="JSON: rows of earlier studies, and of this one")
    study.add_argument("--of", choices=KINDS, default="mixers", help="token mixers and kernels, or the variants")
    study.set_defaults(run=_study)


def _export(arguments: argparse.Namespace) -> None:
    from fastvit_zoo.export.deploy import random_model, target_of

    output: Path = arguments.output
    if output.is_dir() and arguments.to != "coreml":
        raise IsADirectoryError(f"{output} is a folder, not a file")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"the folder {output.parent} does not exist")
    if arguments.to:
        target_of(arguments.to)
        if arguments.dynamic:
            raise ValueError("--dynamic and --to do not go together: a converted file has one size")
    if arguments.checkpoint is None:
        model = random_model(arguments.name, arguments.seed, arguments.classes)
    else:
        model = create_model(arguments.name, num_classes=arguments.classes, checkpoint=arguments.checkpoint)
    if arguments.to:
        _deploy(model.eval(), arguments)
        return
    export_onnx(model, output, size=arguments.size, batch=arguments.batch, dynamic=arguments.dynamic)
    kinds = Counter(node.op_type for node in onnx.load(output, load_external_data=False).graph.node)
    operators = kinds.total() - kinds["Constant"] - kinds["Identity"]
    print(
        f"{output}: {output.stat().st_size / 2**20:.1f} MiB, {operators} operators, "
        f"{kinds['Conv']} Conv, {kinds['BatchNormalization']} BatchNormalization"
    )


def _deploy(model: torch.nn.Module, arguments: argparse.Namespace) -> None:
    import reparamc
    from fastvit_zoo.export.deploy import deploy

    size, target = arguments.size, arguments.to
    fused = reparamc.fuse_fx(model, torch.randn(2, 3, size, size))
    found = deploy(fused, target, arguments.output, torch.randn(arguments.batch, 3, size, size))
    if found.error is None:
        kinds = ", ".join(f"{count} {kind}" for kind, count in found.operators.most_common(4))
        print(f"{arguments.output}: converted for {target}, which does not run here; {kinds}, ...")
    else:
        print(f"{arguments.output}: converted for {target}, largest error against torch {found.error:.1e}")


def _targets(arguments: argparse.Namespace) -> None:
    from fastvit_zoo.export.deploy import matrix

    for row in matrix(arguments.name, arguments.size, arguments.rounds, arguments.to):
        print(row, flush=True)


def _study(arguments: argparse.Namespace) -> None:
    from fastvit_zoo.export.study import NETWORKS, line, plot, read_table, study, write_table

    picture: Path | None = arguments.plot
    if picture is not None:
        if picture.suffix not in (".png", ".svg") or picture.is_dir() or not picture.parent.is_dir():
            raise ValueError(f"--plot {picture} should be a PNG or SVG file in a folder that exists")
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib: pip install 'reparamc[zoo]'")
    table: Path | None = arguments.table
    if table is not None and (table.is_dir() or not table.parent.is_dir()):
        raise ValueError(f"--table {table} should be a file in a folder that exists")
    with torch.device("meta"):
        names = list(NETWORKS[arguments.of]())
    kept = read_table(table, names) if table is not None and table.exists() else {}
    print(f"| runtime | size | {' | '.join(names)} |\n|---|---{'|---' * len(names)}|")
    for row in study(arguments.sizes, arguments.runtimes, arguments.rounds, arguments.of):
        print(line(row), flush=True)
        kept[row[:2]] = row
        if table is not None:
            write_table(table, kept.values())
    if picture is not None:
        plot(list(kept.values()), picture)
