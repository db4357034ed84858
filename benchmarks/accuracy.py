"""How far float32 lies from float64, before and after fusing.

    python benchmarks/accuracy.py [MODEL ...]

The reference is the unfused network in float64 (PyTorch). Errors are root mean squares over all logits
of four random images, relative to the root mean square of the reference, in ONNX Runtime without its
own optimizations and in PyTorch. A ratio below one means that the fused network is the more exact one.
"""

import copy

import numpy as np
import onnx
import onnxruntime as ort
import torch
from models import ZOO, build, names, onnx_file, size

import reparamc

IMAGES = 4


def main() -> None:
    chosen = names(__doc__ or "", ZOO).parse_args().models
    print(f"{'':<22} {'ONNX Runtime':^28} {'PyTorch':^28}")
    print(f"{'model':<22}" + f" {'unfused':>9} {'fused':>9} {'ratio':>8}" * 2)
    ratios = []
    for name in chosen:
        model = build(name)
        fused = reparamc.fuse_fx(model)
        exact = copy.deepcopy(model).double()
        source = onnx.load(onnx_file(name))
        target = reparamc.fuse_onnx(source, verify="region")
        runs = [session(m.SerializeToString()) for m in (source, target)]
        outputs = []
        for seed in range(IMAGES):
            x = torch.randn(1, 3, size(name), size(name), generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                reference = exact(x.double()).numpy()
                in_torch = [m(x).numpy() for m in (model, fused)]
            in_onnx = [run.run(None, {run.get_inputs()[0].name: x.numpy()})[0] for run in runs]
            outputs.append([reference, *in_onnx, *in_torch])
        reference, *others = (np.concatenate(column).astype(np.float64) for column in zip(*outputs, strict=True))
        errors = [rms(other - reference) / rms(reference) for other in others]
        row = [(errors[i], errors[i + 1], errors[i + 1] / errors[i]) for i in (0, 2)]
        ratios.append([ratio for _, _, ratio in row])
        print(f"{name:<22}" + "".join(f" {a:>9.2e} {b:>9.2e} {c:>8.2f}" for a, b, c in row), flush=True)
    means = np.exp(np.log(ratios).mean(0))
    print(f"{'geometric mean':<22}" + "".join(f" {'':>9} {'':>9} {mean:>8.2f}" for mean in means))


def session(model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def rms(a: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(a))))


if __name__ == "__main__":
    main()
