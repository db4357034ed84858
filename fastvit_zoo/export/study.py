"""The paper's comparisons of latency: token mixers, branches and kernel sizes, over resolutions and runtimes."""

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import reparamc
from fastvit_zoo.blocks import Block
from fastvit_zoo.export.deploy import convert, one_line, target_of
from fastvit_zoo.model import FastViT, create_model, list_models
from fastvit_zoo.timing import ratios
from reparamc.testing import randomize_layer_scales

BASE = "RepMixer"

Row = tuple[str, int, dict[str, tuple[float, float]]]
"""A runtime, a size, and the latencies of every network fused and unfused, relative to the first one fused."""


class Pooling(nn.Module):
    """The token mixer of PoolFormer, with its skip connection as it is run: x + (pool(x) - x)."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.pool(x) - x)


def mixers() -> dict[str, nn.Module]:
    """S12 in training form, and what the paper compares it with; weights are random."""
    base, pooling, small = (create_model("fastvit_s12") for _ in range(3))
    for block in _blocks(pooling):
        block.token_mixer = Pooling()
    two = create_model("fastvit_sa12")
    config = two.config
    two.get_submodule("stages.2").blocks = nn.Sequential(
        *(
            Block(config.dims[2], config.mlp_ratio, attention=True, layer_scale_init=0.1, drop_path=0.0, deployed=False)
            for _ in range(config.depths[2])
        )
    )
    for module in small.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (7, 7):
            _shrink(module)
    return {
        BASE: base,
        "pooling": pooling,
        "attention in stage 4": create_model("fastvit_sa12"),
        "attention in stages 3 and 4": two,
        "kernels of 3 for 7": small,
    }


def variants() -> dict[str, nn.Module]:
    """The seven variants in training form; weights are random."""
    return {name: create_model(name) for name in list_models()}


NETWORKS: Mapping[str, Callable[[], dict[str, nn.Module]]] = {"mixers": mixers, "variants": variants}


def _blocks(network: FastViT) -> list[Block]:
    return [module for module in network.modules() if isinstance(module, Block)]


def _shrink(conv: nn.Conv2d) -> None:
    """Keep the middle of a 7x7 kernel."""
    conv.kernel_size, conv.padding = (3, 3), (1, 1)
    conv.weight = nn.Parameter(conv.weight[:, :, 2:5, 2:5].detach().clone())


def study(sizes: Sequence[int], runtimes: Sequence[str], rounds: int = 3, of: str = "mixers") -> Iterator[Row]:
    """Time every network, fused by `reparamc` and unfused, in turns with the first one: CPU time, on one thread.

    `of` is "mixers" or "variants". Raises ValueError if a runtime is not installed.
    """
    for runtime in runtimes:
        if runtime not in ("torch", "compiled") and target_of(runtime).load is None:
            raise ValueError(f"{runtime} runs on another machine: it cannot be timed here")
    forms: dict[str, tuple[nn.Module, nn.Module]] = {}
    for name, network in NETWORKS[of]().items():
        randomize_layer_scales(network.eval())
        forms[name] = reparamc.fuse_fx(network, torch.randn(2, 3, 64, 64)), network
    torch.set_num_threads(1)
    with torch.inference_mode():
        for runtime, size in itertools.product(runtimes, sizes):
            image, found = torch.randn(1, 3, size, size), dict[str, tuple[float, float]]()
            with tempfile.TemporaryDirectory() as folder:
                first = None
                for name, pair in forms.items():
                    path = Path(folder) / f"network{len(found)}"
                    fused, unfused = (_call(runtime, path.with_name(f"{path.name}{i}"), pair[i], image) for i in (0, 1))
                    first = first or fused
                    times = ratios([first, fused, unfused], rounds)
                    found[name] = (times[1] if found else 1.0), times[2]
            yield runtime, size, found


def _call(runtime: str, path: Path, network: nn.Module, image: Tensor) -> Callable[[], Any]:
    """One pass of the network over the image. Raises ValueError if it cannot be compiled or converted."""
    if runtime == "torch":
        return partial(network, image)
    if runtime == "compiled":
        compiled = torch.compile(network)
        with one_line("torch.compile"):  # there is no compiler for C++, say
            compiled(image)
        return partial(compiled, image)
    run = convert(runtime, network, image, path.with_suffix(target_of(runtime).suffix))
    assert run is not None
    return partial(run, image.numpy())


def line(row: Row) -> str:
    """A row of a table in Markdown."""
    cells = (f"{fused:.2f} ({unfused:.2f})" for fused, unfused in row[2].values())
    return f"| {row[0]} | {row[1]} | {' | '.join(cells)} |"


def read_table(file: Path, names: Sequence[str]) -> dict[tuple[str, int], Row]:
    """The rows of `file`, by runtime and size. Raises ValueError if it is not of the networks `names`."""
    table: dict[tuple[str, int], Row] = {}
    try:
        for runtime, size, cells in json.loads(file.read_text()):
            row = str(runtime), int(size), {name: (float(a), float(b)) for name, (a, b) in cells.items()}
            table[row[:2]] = row
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no table of a study: {error}") from error
    if odd := [row for row in table.values() if list(row[2]) != list(names)]:
        raise ValueError(f"{file} is of other networks: {', '.join(odd[0][2])}")
    return table


def write_table(file: Path, rows: Iterable[Row]) -> None:
    """What `read_table` reads; the file appears complete or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(list(rows), indent=1))
    os.replace(partial, file)


def plot(table: Sequence[Row], picture: Path) -> None:
    """The ratios over the sizes for every runtime with several, and over the runtimes at the size that most have."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    by_runtime, by_size = (_grouped(table, place) for place in (0, 1))
    parts = [(f"{name}, over pixels", 1, rows) for name, rows in by_runtime.items() if len(rows) > 1]
    size, most = max(by_size.items(), key=lambda item: len(item[1]))
    if len(most) > 1 or not parts:
        parts.append((f"{size} pixels", 0, most))
    figure = Figure(figsize=(5 * len(parts), 4), layout="constrained")
    for axes, (title, place, rows) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        for number, name in enumerate(rows[0][2]):
            for form, fill in enumerate(("full", "none")):
                values = [row[2][name][form] for row in rows]
                line = {"linestyle": ("-", ":")[form] if place else "", "color": f"C{number}", "fillstyle": fill}
                axes.plot([row[place] for row in rows], values, marker="o", label=None if form else name, **line)
        axes.set(title=title, ylabel=f"latency, {next(iter(rows[0][2]))} = 1", ylim=(0, None))
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, title="hollow: unfused"
    )
    figure.savefig(picture)


def _grouped(table: Sequence[Row], place: int) -> dict[Any, list[Row]]:
    """The rows by runtime (0), in order of their size, or by size (1)."""
    groups: dict[Any, list[Row]] = {}
    for row in sorted(table, key=lambda row: row[1]):
        groups.setdefault(row[place], []).append(row)
    return groups
