"""ONNX files of the models, with nothing folded."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

OPSET = 17


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    size: int = 256,
    batch: int = 1,
    dynamic: bool = False,
    outputs: Sequence[str] = ("logits",),
) -> None:
    """Write `model` as it is, with nothing folded, to an ONNX file of its evaluation mode (opset 17).

    The input "image" is (batch, channels, size, size), the output of a classifier "logits" (batch, num_classes);
    `dynamic` leaves batch, height and width open. The file appears complete or not at all. The training mode of
    every module is left as it was.

    Raises OSError if the file cannot be written.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    axes = {"image": {0: "batch", 2: "height", 3: "width"}, **{name: {0: "batch"} for name in outputs}}
    weight = next(model.parameters())
    channels = getattr(model, "in_channels", 3)
    image = torch.zeros(batch, channels, size, size, dtype=weight.dtype, device=weight.device)
    modes = [(module, module.training) for module in model.modules()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # These settings keep every BatchNorm apart from its convolution.
            torch.onnx.export(
                model.eval(),
                (image,),
                str(partial),
                dynamo=False,
                training=torch.onnx.TrainingMode.PRESERVE,
                do_constant_folding=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=list(outputs),
                dynamic_axes=axes if dynamic else None,
            )
        os.replace(partial, target)
    finally:
        for module, training in modes:
            module.training = training
        partial.unlink(missing_ok=True)
