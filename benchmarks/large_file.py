"""Fuse a model of 3 GB whose weights lie in two files, with verification: time and memory.

    python benchmarks/large_file.py [GIGABYTES] [LEVEL]

The model is a convolution with BatchNorm, and diagonal matrices of 4096 x 4096 with Sigmoid between them: no
channel is dead, and the files take little room on the disk. Prints CPU seconds, peak memory, and its ratio to the
weights.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

N = 4096
MATRIX = 4 * N * N


def main() -> None:
    size, level = float(sys.argv[1]) if len(sys.argv) > 1 else 3.0, sys.argv[2] if len(sys.argv) > 2 else "full"
    with tempfile.TemporaryDirectory(prefix="large-", dir=os.environ.get("TMPDIR")) as folder:
        source, target = Path(folder) / "large.onnx", Path(folder) / "fused.onnx"
        total = make(source, round(size * 1e9 / MATRIX))
        code = "from reparamc.__main__ import main; import sys; raise SystemExit(main(sys.argv[1:]))"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "fuse", source, "-o", target, "--verify", level, "--no-record"]
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = status
        memory = used.ru_maxrss * 1024
        print(
            f"{total / 1e9:.2f} GB of weights, {level}: {used.ru_utime + used.ru_stime:.1f} CPU s, "
            f"{memory / 1e9:.2f} GB of memory, {memory / total:.2f} times the weights; "
            f"{', '.join(sorted(p.name for p in Path(folder).iterdir()))}"
        )
        sys.exit(status)


def make(path: Path, matrices: int) -> int:
    """Write the model; the bytes of its weights."""
    rng = np.random.default_rng(0)
    norm = {n: rng.uniform(0.5, 1.5, 64).astype(np.float32) for n in ("gamma", "beta", "mean", "var")}
    stored = [numpy_helper.from_array(a, n) for n, a in norm.items()]
    stored.append(numpy_helper.from_array(rng.normal(0, 0.1, (64, 8, 3, 3)).astype(np.float32), "w"))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c", *norm], ["b"]),
        helper.make_node("Relu", ["b"], ["r"]),
        helper.make_node("Flatten", ["r"], ["y0"]),
    ]
    (path.parent / "sub").mkdir()
    for at in range(matrices):
        location = ("a.bin", "sub/b.bin")[at % 2]
        offset = MATRIX * (at // 2)
        with (path.parent / location).open("r+b" if at > 1 else "w+b") as file:
            file.truncate(offset + MATRIX)
            entries = np.memmap(file, np.float32, "r+", offset, N * N)
            entries[:: N + 1] = rng.normal(0, 1, N)
        t = TensorProto(name=f"m{at}", dims=(N, N), data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
        for key, value in {"location": location, "offset": str(offset), "length": str(MATRIX)}.items():
            t.external_data.add(key=key, value=value)
        stored.append(t)
        nodes.append(helper.make_node("MatMul", [f"y{at}", f"m{at}"], [f"p{at}"]))
        nodes.append(helper.make_node("Sigmoid", [f"p{at}"], [f"y{at + 1}"]))
    shapes = {"x": [1, 8, 8, 8], f"y{matrices}": [1, N]}
    given, made = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items())
    graph = helper.make_graph(nodes, "large", [given], [made], stored)
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    )
    return matrices * MATRIX


if __name__ == "__main__":
    main()
