"""What fusing a file costs, beside loading and saving it, and beside other tools that rewrite ONNX files.

    python benchmarks/speed.py [--tools PYTHON] [MODEL.onnx ...]

Each tool runs in a process of its own with one thread, twice; the better of the two counts, in CPU seconds and MiB of
peak memory of the whole process. Tools that the interpreter PYTHON does not have are left out. Without files, the zoo's
models are exported in training form. Exits with 1 where a ratio is above its limit.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = {
    "onnx": "import onnx; onnx.save(onnx.load(a), b)",
    "onnxruntime": """
import onnxruntime as ort
o = ort.SessionOptions()
o.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
o.optimized_model_filepath = b
o.intra_op_num_threads = 1
ort.InferenceSession(a, o, providers=["CPUExecutionProvider"])""",
    "onnxslim": "import onnxslim; onnxslim.slim(a, b)",
    "onnxsim": "import onnx, onnxsim; onnx.save(onnxsim.simplify(onnx.load(a), check_n=0)[0], b)",
    "onnxoptimizer": "import onnx, onnxoptimizer; onnx.save(onnxoptimizer.optimize(onnx.load(a)), b)",
    "onnxscript": "import onnx, onnxscript.optimizer as s; onnx.save(s.optimize(onnx.load(a)), b)",
    "off": "from reparamc.cli import main; raise SystemExit(main(['fuse', a, '-o', b, '-q', '--verify', 'off']))",
    "region": "from reparamc.cli import main; raise SystemExit(main(['fuse', a, '-o', b, '-q', '--verify', 'region']))",
    "full": "from reparamc.cli import main; raise SystemExit(main(['fuse', a, '-o', b, '-q']))",
}
OTHERS = ("onnxruntime", "onnxslim", "onnxsim", "onnxoptimizer", "onnxscript")
RUNS = 2


@dataclass(frozen=True)
class Cost:
    """Of a process: CPU seconds and MiB."""

    seconds: float
    memory: float


def run(python: str, tool: str, source: Path, folder: Path) -> Cost | None:
    """The cost of one run of ``tool``; None where it fails."""
    code = f"import sys; a, b = sys.argv[1:]\n{SCRIPTS[tool]}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    process = subprocess.Popen(
        [python, "-c", code, str(source), str(folder / "out.onnx")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd=folder,
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = status
    return None if status else Cost(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def best(python: str, tool: str, source: Path) -> Cost | None:
    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        costs = [run(python, tool, source, Path(folder)) for _ in range(RUNS)]
    kept = [cost for cost in costs if cost is not None]
    return Cost(min(c.seconds for c in kept), min(c.memory for c in kept)) if kept else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tools", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--only", default=",".join(SCRIPTS))
    parser.add_argument("files", nargs="*", type=Path)
    chosen = parser.parse_args()
    names = chosen.only.split(",")
    print(f"{'model':<14} {'MB':>5} " + " ".join(f"{n:>17}" for n in names))
    for path in chosen.files:
        cells = []
        for name in names:
            cost = best(chosen.tools if name in OTHERS else sys.executable, name, path.resolve())
            cells.append("-" if cost is None else f"{cost.seconds:.2f} s {cost.memory:5.0f} MiB")
        print(f"{path.stem:<14} {path.stat().st_size / 1e6:>5.0f} " + " ".join(f"{c:>17}" for c in cells), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
