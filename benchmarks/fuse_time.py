"""Time and memory by the size of the graph: both should grow in proportion.

    python benchmarks/fuse_time.py [NODES ...]

The graph is a chain of blocks of six operators: conv 3x3 + BatchNorm beside conv 1x1 + BatchNorm, added,
ReLU. Each size runs in a process of its own, which reports CPU seconds and its peak memory.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import process_time

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZES = [1_000, 2_000, 5_000, 10_000, 20_000]
CHANNELS = 8
BLOCK = 6


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        measure(int(sys.argv[2]))
        return
    print(
        f"{'nodes':>7} {'left':>6} {'load':>8} {'fuse':>8} {'+ regions':>13} {'+ models':>12} "
        f"{'save':>8} {'ms per 1000 nodes':>18} {'peak, MiB':>10}"
    )
    for size in [int(a) for a in sys.argv[1:]] or SIZES:
        subprocess.run([sys.executable, __file__, "--one", str(size)], check=True)


def measure(size: int) -> None:
    from reparamc.onnx.files import load, save
    from reparamc.onnx.fuse import fuse_model

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "chain.onnx", Path(folder) / "fused.onnx"
        onnx.save(chain(size // BLOCK), source)
        start = process_time()
        model = load(source)
        loading = process_time() - start
        seconds = {}
        for level in ("off", "region", "full"):
            start = process_time()
            result, report = fuse_model(model, verify=level)
            seconds[level] = process_time() - start
        start = process_time()
        save(result, target)
        saving = process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{report.before.ops:>7} {report.after.ops:>6} {loading:>8.2f} {seconds['off']:>8.2f} "
        f"{seconds['region']:>13.2f} {seconds['full']:>12.2f} {saving:>8.2f} "
        f"{1e6 * seconds['region'] / report.before.ops:>18.0f} {peak:>10.0f}",
        flush=True,
    )


def chain(blocks: int) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    nodes, weights, x = [], [], "x"

    def parameter(name: str, array: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def branch(block: int, kernel: int) -> str:
        at = f"block{block}/conv{kernel}"
        w = parameter(f"{at}.weight", rng.normal(0, 0.2 / kernel, (CHANNELS, CHANNELS, kernel, kernel)))
        norm = [parameter(f"{at}.{p}", rng.uniform(0.5, 1.5, CHANNELS)) for p in ("gamma", "beta", "mean", "var")]
        nodes.append(helper.make_node("Conv", [x, w], [f"{at}/c"], f"{at}/conv", pads=[kernel // 2] * 4))
        nodes.append(helper.make_node("BatchNormalization", [f"{at}/c", *norm], [f"{at}/b"], f"{at}/bn"))
        return f"{at}/b"

    for block in range(blocks):
        both = [branch(block, 3), branch(block, 1)]
        nodes.append(helper.make_node("Add", both, [f"block{block}/sum"], f"block{block}/add"))
        x = f"block{block}/y"
        nodes.append(helper.make_node("Relu", [f"block{block}/sum"], [x], f"block{block}/relu"))
    shape = [1, CHANNELS, 8, 8]
    given, made = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", x))
    graph = helper.make_graph(nodes, "chain", [given], [made], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


if __name__ == "__main__":
    main()
