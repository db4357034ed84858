"""What `reparamc verify` takes, beside loading both models and running them once.

    python benchmarks/verify_time.py [MODEL ...]

Both are timed in turns, three times, and the medians are printed. Models are loaded and run in ONNX Runtime as
`verify` does it: from the file, without its optimizations, for one image.
"""

from pathlib import Path
from statistics import median
from time import perf_counter

import models
import numpy as np
import onnxruntime as ort

from reparamc import fuse_onnx, verify_onnx

TURNS = 3


def main() -> None:
    chosen = models.names(__doc__ or "", ["fastvit_sa36"]).parse_args().models
    print(f"{'model':<16} {'load and run, s':>16} {'verify, s':>10} {'ratio':>6} {'inputs':>7}  verdict")
    for name in chosen:
        original = models.onnx_file(name)
        fused = original.with_suffix(".fused.onnx")
        fuse_onnx(original)
        verify_onnx(original, original, seconds=0.1)  # imports
        plain, whole, result = [], [], None
        for _ in range(TURNS):
            start = perf_counter()
            for path in (original, fused):
                load_and_run(path, models.size(name))
            plain.append(perf_counter() - start)
            result = verify_onnx(original, fused)
            whole.append(result.seconds)
        assert result is not None
        once, verifying = median(plain), median(whole)
        figures = f"{once:>16.2f} {verifying:>10.2f} {verifying / once:>6.2f} {result.compared:>7}"
        print(f"{name:<16} {figures}  {result.verdict}", flush=True)


def load_and_run(path: Path, size: int) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    session.run(None, {session.get_inputs()[0].name: x})


if __name__ == "__main__":
    main()
