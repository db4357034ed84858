"""What a multiply-add of a transposed convolution takes, by that of a convolution: the prices of ``--target``.

    python benchmarks/targets.py [--targets onnxruntime,openvino]

A 3x3 convolution of a map that was doubled, beside the transposed 4x4 of stride 2 that equals both; one thread, CPU
time, the two take turns. The median over the shapes goes into `TARGETS` of `reparamc/algebra/cost.py`.
"""

import argparse
from collections.abc import Callable
from statistics import median
from time import process_time

import numpy as np
import onnx
from onnx import helper, numpy_helper

from reparamc.onnx.fuse import fuse_model

SHAPES = ((32, 16, 32), (32, 64, 32), (32, 128, 64), (16, 128, 128), (8, 256, 128))
"""Height and width of the small map, channels in, channels out."""


def doubled(size: int, inputs: int, outputs: int) -> onnx.ModelProto:
    """Nearest upsampling by 2, and a 3x3 convolution."""
    rng = np.random.default_rng(0)
    tensors = {
        "w": rng.standard_normal((outputs, inputs, 3, 3)).astype(np.float32) / inputs,
        "b": rng.standard_normal(outputs).astype(np.float32),
        "by": np.array([1, 1, 2, 2], np.float32),
    }
    nodes = [
        helper.make_node(
            "Resize", ["x", "", "by"], ["u"], coordinate_transformation_mode="asymmetric", nearest_mode="floor"
        ),
        helper.make_node("Conv", ["u", "w", "b"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    infos = [
        helper.make_tensor_value_info(name, 1, shape)
        for name, shape in (("x", [1, inputs, size, size]), ("y", [1, outputs, 2 * size, 2 * size]))
    ]
    stored = [numpy_helper.from_array(a, n) for n, a in tensors.items()]
    graph = helper.make_graph(nodes, "doubled", infos[:1], infos[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def in_onnxruntime(model: onnx.ModelProto) -> Callable[[np.ndarray], object]:
    from latency import session

    run = session(model.SerializeToString(), 1)
    return lambda x: run.run(None, {"x": x})


def in_openvino(model: onnx.ModelProto) -> Callable[[np.ndarray], object]:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_NUM_THREADS": 1})
    return lambda x: compiled([x])


RUNTIMES = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(RUNTIMES))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print(f"{'target':<12} {'map':>5} {'channels':>9} {'time':>6} {'price':>6}")
    for target in arguments.targets.split(","):
        prices: list[float] = []
        for size, inputs, outputs in SHAPES:
            before = doubled(size, inputs, outputs)
            after, report = fuse_model(before, verify="off", objective="macs")
            assert report.passes["upsampling"] == 1
            ratio = compared([RUNTIMES[target](m) for m in (before, after)], inputs, size, arguments.rounds)
            prices.append(ratio * 36 / 16)
            print(f"{target:<12} {size:>5} {inputs:>4},{outputs:>4} {ratio:>6.2f} {prices[-1]:>6.2f}", flush=True)
        print(f"{target:<12} {'median':>15} {'':>6} {median(prices):>6.2f}")


def compared(runs: list[Callable[[np.ndarray], object]], inputs: int, size: int, rounds: int) -> float:
    """The ratio of the least times."""
    x = np.random.default_rng(1).standard_normal((1, inputs, size, size)).astype(np.float32)
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for run, seen in zip(runs, times, strict=True):
            start = process_time()
            run(x)
            seen.append(process_time() - start)
    return min(times[1]) / min(times[0])


if __name__ == "__main__":
    main()
