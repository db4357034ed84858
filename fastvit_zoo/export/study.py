"""The paper's comparisons of latency: token mixers, branches and kernel sizes, over resolutions and runtimes."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvit_zoo.blocks import Block
from fastvit_zoo.export.deploy import target_of
from fastvit_zoo.export.targets import Target
from fastvit_zoo.model import FastViT, create_model
from fastvit_zoo.timing import milliseconds

BASE = "RepMixer"

Row = tuple[str, int, dict[str, float]]
"""A runtime, a size, and the latency of every network relative to that of `BASE`."""


class Pooling(nn.Module):
    """The token mixer of PoolFormer, with its skip connection as it is run: x + (pool(x) - x)."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.pool(x) - x)


def networks() -> Mapping[str, nn.Module]:
    """S12 as it is deployed, and what the paper compares it with; weights are random."""
    base = create_model("fastvit_s12", deployed=True)
    pooling = create_model("fastvit_s12", deployed=True)
    for block in _blocks(pooling):
        block.token_mixer = Pooling()
    two = create_model("fastvit_sa12", deployed=True)
    config = two.config
    third = [
        Block(config.dims[2], config.mlp_ratio, attention=True, layer_scale_init=0.1, drop_path=0.0, deployed=True)
        for _ in range(config.depths[2])
    ]
    two.get_submodule("stages.2").blocks = nn.Sequential(*third)
    small = create_model("fastvit_s12", deployed=True)
    for module in small.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (7, 7):
            _shrink(module)
    made = {
        BASE: base,
        "pooling": pooling,
        "attention in stage 4": create_model("fastvit_sa12", deployed=True),
        "attention in stages 3 and 4": two,
        "kernels of 3 for 7": small,
        "with branches": create_model("fastvit_s12"),
    }
    return {name: network.eval() for name, network in made.items()}


def _blocks(network: FastViT) -> list[Block]:
    return [module for module in network.modules() if isinstance(module, Block)]


def _shrink(conv: nn.Conv2d) -> None:
    """Keep the middle of a 7x7 kernel."""
    conv.kernel_size, conv.padding = (3, 3), (1, 1)
    conv.weight = nn.Parameter(conv.weight[:, :, 2:5, 2:5].detach().clone())


def study(sizes: Sequence[int], runtimes: Sequence[str], rounds: int = 3) -> Iterator[Row]:
    """Time all networks in turns, by CPU time on one thread. Raises ValueError if a runtime is not installed."""
    targets = {runtime: target_of(runtime) for runtime in runtimes if runtime != "torch"}
    forms = networks()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for runtime in runtimes:
            for size in sizes:
                image = torch.randn(1, 3, size, size)
                calls = [
                    _call(network, image, targets.get(runtime), Path(folder) / f"{i}_{size}")
                    for i, network in enumerate(forms.values())
                ]
                times = dict(zip(forms, milliseconds(calls, rounds), strict=True))
                yield runtime, size, {name: time / times[BASE] for name, time in times.items()}


def _call(network: nn.Module, image: Tensor, target: Target | None, path: Path) -> Callable[[], Any]:
    """One pass of the network over the image, in torch if there is no target."""
    if target is None:
        return partial(network, image)
    if target.load is None:
        raise ValueError(f"{target.packages[0]} converts, but its runtime needs another machine")
    path = path.with_suffix(target.suffix)
    target.convert(network, image, path)
    return partial(target.load(path), image.numpy())


def line(row: Row) -> str:
    """A row of a table in Markdown."""
    runtime, size, ratios = row
    return f"| {runtime} | {size} | {' | '.join(f'{ratio:.2f}' for ratio in ratios.values())} |"


def plot(table: Sequence[Row], picture: Path) -> None:
    """The ratios over the sizes, a part for each runtime."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    runtimes = list(dict.fromkeys(row[0] for row in table))
    figure = Figure(figsize=(4 * len(runtimes) + 2, 3.5), layout="constrained")
    for axes, runtime in zip(figure.subplots(1, len(runtimes), squeeze=False)[0], runtimes, strict=True):
        rows = [row for row in table if row[0] == runtime]
        for name in rows[0][2]:
            axes.plot([row[1] for row in rows], [row[2][name] for row in rows], "o-", label=name)
        axes.set(title=runtime, xlabel="pixels", ylabel=f"latency, {BASE} = 1")
        axes.set_ylim(bottom=0)
    figure.axes[-1].legend(fontsize="small")
    figure.savefig(picture)
