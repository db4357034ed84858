"""A whole run: every epoch on one line, then the best weights fused, exported and compared."""

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from fastvit_zoo.checkpoint import load_checkpoint
from fastvit_zoo.onnx_export import export_onnx
from fastvit_zoo.train.data import Source, readable
from fastvit_zoo.train.plot import plot
from fastvit_zoo.train.recipe import Recipe
from fastvit_zoo.train.run import Options, Run


def train(model: str, recipe: Recipe, source: Source, options: Options) -> list[dict[str, float]]:
    """Train and deploy: checkpoints, `summary.csv`, `model.onnx` and `plot.png` in the output folder.

    Returns the figures of every epoch. Raises what `Run` raises.
    """
    run = Run(model, recipe, source, options)
    figures: list[dict[str, float]] = []
    for found in run.epochs():
        figures.append(found)
        if run.rank == 0:
            differing = f"{found['differing']} of {found['images']} predictions differ"
            print(
                f"epoch {found['epoch']}: loss {found['loss']:.3f}, top-1 {found['top1']:.2f} %, fused "
                f"{found['top1_fused']:.2f} % ({differing}), {found['ms']:.1f} > {found['ms_fused']:.1f} ms",
                flush=True,
            )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # what follows takes longer than other processes would wait
    if run.rank == 0:
        _deploy(run)
    return figures


def _deploy(run: Run) -> None:
    output = run.options.output
    best = output / "model_best.pth.tar"
    if not best.exists():
        return
    load_checkpoint(run.averaged, best)
    fused = run.fuser().cpu()
    file = output / "model.onnx"
    export_onnx(fused, file, size=run.recipe.size, dynamic=True)
    equal, images = predictions_equal(fused, file, run)
    print(f"{file}: ONNX Runtime predicts the same for {equal} of {images} images")
    picture = output / "plot.png"
    try:
        plot(run.summary, picture)
    except ImportError:
        print("no plot: matplotlib is not installed")
    else:
        print(picture)


def predictions_equal(fused: nn.Module, file: Path, run: Run, enough: int = 1024) -> tuple[int, int]:
    """For how many validation images of this process both predict the same class, and how many were tried.

    It stops after the batch with which it has seen `enough`.
    """
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    equal = images = 0
    for batch, _ in readable(run.validation):
        (scores,) = session.run(None, {"image": batch.cpu().numpy()})
        with torch.inference_mode():
            expected = fused(batch.cpu()).argmax(1).numpy()
        equal += int((np.asarray(scores).argmax(1) == expected).sum())
        images += len(batch)
        if images >= enough:
            break
    return equal, images
