"""Latency in ONNX Runtime, before and after fusing.

    python benchmarks/latency.py [MODEL ...] [--rounds 30] [--threads 2]

One image, all of the runtime's own optimizations on. The two sessions take turns, so that whatever else
the machine does meets both; the figures are medians.
"""

from time import perf_counter

import numpy as np
import onnx
import onnxruntime as ort
from models import names, onnx_file, size

import reparamc

CHOSEN = ["fastvit_t8", "fastvit_sa12", "timm/mobileone_s0", "timm/repvgg_a0", "timm/repvit_m0_9"]


def main() -> None:
    parser = names(__doc__ or "", CHOSEN)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    print(f"{'model':<22} {'unfused, ms':>12} {'fused, ms':>10} {'ratio':>6}")
    for name in arguments.models:
        source = onnx.load(onnx_file(name))
        target = reparamc.fuse_onnx(source, verify="region")
        runs = [session(m.SerializeToString(), arguments.threads) for m in (source, target)]
        x = np.random.default_rng(0).standard_normal((1, 3, size(name), size(name))).astype(np.float32)
        times: list[list[float]] = [[], []]
        for turn in range(arguments.rounds + 3):
            for run, taken in zip(runs, times, strict=True):
                start = perf_counter()
                run.run(None, {run.get_inputs()[0].name: x})
                if turn >= 3:
                    taken.append(1000 * (perf_counter() - start))
        before, after = (float(np.median(taken)) for taken in times)
        print(f"{name:<22} {before:>12.1f} {after:>10.1f} {after / before:>6.2f}", flush=True)


def session(model: bytes, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
