"""A picture of a run: loss, accuracy and latency of both forms over the epochs."""

import csv
from pathlib import Path


def plot(summary: Path, picture: Path) -> None:
    """Draw the columns of `summary` into `picture`, a PNG or SVG file."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    with summary.open(newline="") as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) for row in rows]
    figure = Figure(figsize=(11, 3), layout="constrained")
    parts = (
        ("loss", {"training": "train_loss"}),
        ("top-1 accuracy, %", {"training form": "eval_top1", "fused": "eval_top1_fused"}),
        ("latency of one image, ms", {"training form": "eval_ms", "fused": "eval_ms_fused"}),
    )
    for axes, (title, lines) in zip(figure.subplots(1, 3), parts, strict=True):
        for style, (label, column) in zip(("-", "--"), lines.items(), strict=False):
            axes.plot(epochs, [float(row[column]) for row in rows], style, label=label)
        axes.set(title=title, xlabel="epoch")
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.savefig(picture)
