"""The certificate of every model: what is proven of its fused form, and what the proof takes beside one inference.

    python benchmarks/certify.py [MODEL ...]

CPU seconds are the least of three: of the proof, and of one image in ONNX Runtime without its optimizations, 2
threads, of the unfused model. `bound` is how far a window can be off because parameters were rounded, relative to the
magnitudes of the products that it is the sum of.
"""

from collections.abc import Callable
from time import process_time

import onnx
import onnxruntime as ort
from models import ALL, names, onnx_file

from reparamc.certificate.onnx import certify_onnx
from reparamc.onnx.fuse import fuse_model
from reparamc.onnx.session import random_inputs

MORE = [
    "timm/fastvit_mci0", "timm/mobileone_s1", "timm/mobileone_s4", "timm/repvgg_b1g4", "timm/repvit_m2_3",
    "timm/ghostnetv3_100", "timm/repghostnet_100", "timm/lcnetv2_base", "timm/levit_128s",
]  # fmt: skip


def main() -> None:
    arguments = names(__doc__ or "", [*ALL, *MORE]).parse_args()
    print(
        f"{'model':<24} {'windows':>7} {'proven':>7} {'different':>9} {'undecided':>9} {'congruent':>9} "
        f"{'bound':>8} {'proof, CPU s':>12} {'inference, CPU s':>17}"
    )
    for name in arguments.models:
        model = onnx.load(onnx_file(name))
        result, _ = fuse_model(model, verify="off")
        found = certify_onnx(model, result)
        proof = least(lambda model=model, result=result: certify_onnx(model, result))
        session = unoptimized(model)
        feeds = random_inputs(model, 0)
        run = least(lambda session=session, feeds=feeds: session.run(None, feeds))
        print(
            f"{name:<24} {len(found.windows):>7} {found.equal:>7} {found.different:>9} {found.undecided:>9} "
            f"{found.congruent:>9} {found.bound:>8.1e} {proof:>12.2f} {run:>16.2f}",
            flush=True,
        )
        for w in found.windows:
            if w.verdict != "equal":
                print(f"    {w.verdict}: {w.where}: {w.reason}")


def unoptimized(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def least(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(3):
        start = process_time()
        run()
        seconds.append(process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
