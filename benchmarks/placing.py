"""Where matrices of channels go, and channels that leave: parameters, and CPU time in ONNX Runtime.

    python benchmarks/placing.py [MODEL or FILE.onnx ...] [--rounds 8] [--through onnx|fx]

Needs timm, transformers and segmentation_models_pytorch for the models they have. One image, one thread, all of the
runtime's own optimizations on; the two sessions take turns, and the figure is the ratio of the least CPU times. Of
``fx``, the copy that `fuse_fx` makes is exported and compared with the export of the model, whose BatchNorms the
exporter has folded.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from latency import session
from torch import nn

import reparamc
from reparamc.testing import randomize_batchnorm

if not hasattr(torch.ops.torchvision, "nms"):  # a torchvision without its compiled operators
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class _Logits(nn.Module):
    def __init__(self, inner: nn.Module, key: str = "logits") -> None:
        super().__init__()
        self.inner, self.key = inner, key

    def forward(self, x: Any) -> Any:
        return self.inner(x)[self.key]


def segformer(depths: list[int], sizes: list[int], width: int) -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(num_labels=150, depths=depths, hidden_sizes=sizes, decoder_hidden_size=width)
    return _Logits(SegformerForSemanticSegmentation(config))


def of_timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **options)


def lraspp() -> nn.Module:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    return _Logits(lraspp_mobilenet_v3_large(weights=None, weights_backbone=None), "out")


def of_smp(kind: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    return getattr(smp, kind)(encoder, encoder_weights=None)


def pruned() -> nn.Module:
    """A ResNet-50 with half of the gammas zeroed at random, the same ones along each residual stream."""
    model = of_timm("resnet50", zero_init_last=False).eval()
    randomize_batchnorm(model, 0, torch.randn(1, 3, 64, 64))
    generator = torch.Generator().manual_seed(0)
    streams: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for path, part in model.named_modules():
            if isinstance(part, nn.BatchNorm2d):
                joined = path.endswith("bn3") or "downsample" in path
                dead = torch.rand(part.num_features, generator=generator) < 0.5
                dead = streams.setdefault(part.num_features, dead) if joined else dead
                part.weight[dead] = part.bias[dead] = 0
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "segformer-b0": (lambda: segformer([2, 2, 2, 2], [32, 64, 160, 256], 256), 512),
    "segformer-b2": (lambda: segformer([3, 4, 6, 3], [64, 128, 320, 512], 768), 512),
    "smp/segformer-mit_b0": (lambda: of_smp("Segformer", "mit_b0"), 512),
    "smp/unet-resnet34": (lambda: of_smp("Unet", "resnet34"), 256),
    "smp/fpn-resnet34": (lambda: of_smp("FPN", "resnet34"), 256),
    "smp/upernet-resnet34": (lambda: of_smp("UPerNet", "resnet34"), 192),
    "smp/deeplabv3+-resnet34": (lambda: of_smp("DeepLabV3Plus", "resnet34"), 256),
    "lraspp": (lraspp, 256),
    "timm/densenet121": (lambda: of_timm("densenet121"), 224),
    "timm/hrnet_w18_small": (lambda: of_timm("hrnet_w18_small"), 224),
    "resnet50-pruned": (pruned, 224),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--through", choices=("onnx", "fx"), default="onnx")
    arguments = parser.parse_args()
    print(f"{'model':<26} {'parameters':>23} {'placing':>7} {'shrink':>6} {'undecided':>9} {'error':>8} {'ratio':>6}")
    for name in arguments.models:
        before, after, report = fused(name, arguments.through)
        error, ratio = compared(before, after, arguments.rounds)
        undecided = len(report.certificate.undecided) if report.certificate is not None else 0
        counts = f"{report.before.parameters:,} > {report.after.parameters:,}"
        done = [report.passes[p] for p in ("placing", "lossless-shrink")]
        print(
            f"{name[-26:]:<26} {counts:>23} {done[0]:>7} {done[1]:>6} {undecided:>9} {error:>8.1g} {ratio:>6.3f}",
            flush=True,
        )


def fused(name: str, through: str) -> tuple[onnx.ModelProto, onnx.ModelProto, Any]:
    """A model as an ONNX file, what becomes of it, and the report."""
    reports: list[Any] = []
    if name.endswith(".onnx"):
        before = onnx.load(name)
        return before, reparamc.fuse_onnx(before, verify="region", on_report=reports.append), reports[0]
    make, size = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(1, 3, size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "pruned" not in name:
            randomize_batchnorm(model, 0, x[:, :, :128, :128] if "segformer" not in name else x)
        before = exported(model.eval(), x)
        if through == "fx":
            module = reparamc.fuse_fx(model, x, verify="region", specialize=True)
            return before, exported(module, x), module.meta["reparamc"]
    return before, reparamc.fuse_onnx(before, verify="region", on_report=reports.append), reports[0]


def exported(model: nn.Module, x: torch.Tensor) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x,), str(path), dynamo=False, opset_version=17)
        return onnx.load(path)


def compared(before: onnx.ModelProto, after: onnx.ModelProto, rounds: int) -> tuple[float, float]:
    """The largest relative difference, and the ratio of the least CPU times."""
    runs = [session(m.SerializeToString(), 1) for m in (before, after)]
    given = runs[0].get_inputs()[0]
    for height in (192, 48):  # lines of text are of a fixed height
        sizes = zip(given.shape, (1, 3, height, 192), strict=False)
        dims = [n if isinstance(n, int) and n > 0 else size for n, size in sizes]
        x = np.random.default_rng(0).standard_normal(dims).astype(np.float32)
        try:
            a, b = (run.run(None, {given.name: x}) for run in runs)
            break
        except ort.capi.onnxruntime_pybind11_state.Fail:
            continue
    error = max(float(np.abs(m - n).max() / max(np.abs(m).max(), 1e-30)) for m, n in zip(a, b, strict=True))
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for run, taken in zip(runs, times, strict=True):
            start = process_time()
            run.run(None, {given.name: x})
            taken.append(process_time() - start)
    return error, min(times[1]) / min(times[0])


if __name__ == "__main__":
    main()
