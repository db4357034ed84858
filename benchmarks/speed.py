"""What fusing a file costs, beside loading and saving it, and beside other tools that rewrite ONNX files.

    python benchmarks/speed.py [--tools PYTHON] [--only A,B] [--nodes N,M] [MODEL | FILE.onnx ...]

Every tool runs in a process of its own with one thread, twice; the better of the two counts, in CPU seconds and MiB of
peak memory of the whole process. Tools are run by the interpreter PYTHON, and those that it lacks are left out.
`--nodes` gives the sizes of a chain of operators (see fuse_time.py), which should take time in proportion.

Exits with 1 where a limit is missed: without verification 1.5 times loading and saving, 1.2 times its memory, the time
of the fastest other tool that folds and is not ONNX Runtime, and 1.5 times that of ONNX Runtime; with verification the
time of onnxsim, whose own check is left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx

OTHERS = {
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
}
LEVELS = ("off", "region", "full")
FOLDING = ("onnxslim", "onnxsim", "onnxoptimizer", "onnxscript")
MODELS = [
    "fastvit_t8", "fastvit_t12", "fastvit_s12", "fastvit_sa12", "fastvit_sa24", "fastvit_sa36", "fastvit_ma36",
    "timm/mobileone_s0", "timm/repvgg_a0", "timm/repvit_m0_9", "timm/repghostnet_100", "timm/repvgg_b2",
]  # fmt: skip
RUNS = 2
MOST_MS = {"off": 250, "region": 800, "full": 800}
"""Milliseconds for 1,000 nodes of the chain."""


@dataclass(frozen=True)
class Cost:
    """Of a process: CPU seconds and MiB."""

    seconds: float
    memory: float


def run(python: str, tool: str, source: Path, folder: Path) -> Cost | None:
    """The cost of one run of ``tool``; None where it fails."""
    ours = f"""
from reparamc.__main__ import main
sys.argv[1:] = ['fuse', a, '-o', b, '-q', '--verify', {tool!r}]
raise SystemExit(main())"""
    code = f"import sys; a, b = sys.argv[1:]\n{OTHERS.get(tool, ours)}"
    # Python compiles what it imports once; that belongs to the first run, which never is the better one.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
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


def best(tools: str, tool: str, source: Path) -> Cost | None:
    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        costs = [run(tools if tool in OTHERS else sys.executable, tool, source, Path(folder)) for _ in range(RUNS)]
    kept = [cost for cost in costs if cost is not None]
    return Cost(min(c.seconds for c in kept), min(c.memory for c in kept)) if kept else None


def missed(name: str, costs: dict[str, Cost]) -> list[str]:
    """The limits that ``costs`` exceed."""
    found = []

    def limit(tool: str, what: str, most: float | None, of: str) -> None:
        if tool in costs and most is not None and getattr(costs[tool], what) > most:
            found.append(f"{name}: {tool} takes {getattr(costs[tool], what) / most:.2f} times {of}")

    known = costs.get("onnx")
    limit("off", "seconds", known and 1.5 * known.seconds, "1.5 times the seconds of loading and saving")
    limit("off", "memory", known and 1.2 * known.memory, "1.2 times the memory of loading and saving")
    limit("off", "seconds", min((costs[t].seconds for t in FOLDING if t in costs), default=None), "the fastest tool")
    runtime = costs.get("onnxruntime")
    limit("off", "seconds", runtime and 1.5 * runtime.seconds, "1.5 times the seconds of ONNX Runtime")
    other = costs.get("onnxsim")
    limit("full", "seconds", other and other.seconds, "the seconds of onnxsim")
    return found


def measure(tools: str, chosen: list[str], files: list[Path]) -> list[str]:
    print(f"{'model':<20} {'MB':>4}  " + "  ".join(f"{tool:>13}" for tool in chosen))
    found = []
    for path in files:
        costs = {tool: cost for tool in chosen if (cost := best(tools, tool, path)) is not None}
        cells = (f"{costs[t].seconds:.2f} s {costs[t].memory:>5,.0f}" if t in costs else "-" for t in chosen)
        print(f"{path.stem:<20} {path.stat().st_size / 1e6:>4.0f}  " + "  ".join(f"{c:>13}" for c in cells), flush=True)
        found += missed(path.stem, costs)
    return found


def chains(sizes: list[int], chosen: list[str]) -> list[str]:
    """Whether the time grows in proportion to the chain."""
    from fuse_time import BLOCK, chain

    found, seconds = [], dict[tuple[str, int], float]()
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="speed-") as folder:
            source = Path(folder) / "chain.onnx"
            onnx.save(chain(size // BLOCK), source)
            for level in (level for level in LEVELS if level in chosen):
                cost = best(sys.executable, level, source)
                if cost is None:
                    found.append(f"{size} nodes: {level} fails")
                    continue
                seconds[level, size] = cost.seconds
                each = 1e6 * cost.seconds / size
                print(f"{size:>6} nodes  {level:<7} {cost.seconds:>6.1f} s  {each:>4.0f} ms per 1,000", flush=True)
                if each > MOST_MS[level]:
                    found.append(f"{size} nodes: {level} takes {each:.0f} ms per 1,000 nodes, not {MOST_MS[level]}")
                if seconds.get((level, size // 2), float("inf")) * 2.1 < cost.seconds:
                    found.append(f"{size} nodes: {level} takes more than 2.1 times as long as half as many")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--only", default=",".join((*OTHERS, *LEVELS)), metavar="A,B")
    parser.add_argument("--nodes", default="10000,20000", metavar="N,M")
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    given = parser.parse_args()
    chosen = given.only.split(",")
    files = [Path(name).resolve() if name.endswith(".onnx") else exported(name) for name in given.models]
    found = measure(given.tools, chosen, files)
    found += chains([int(n) for n in given.nodes.split(",") if n], chosen)
    print("\n".join(["", *(f"missed: {text}" for text in found)] if found else ["all limits are kept"]))
    return 1 if found else 0


def exported(name: str) -> Path:
    """The file of a model, made by another process: what is started by a large one counts as being as large."""
    code = "import sys, models; print(models.onnx_file(sys.argv[1]))"
    found = subprocess.run(
        [sys.executable, "-c", code, name], cwd=Path(__file__).parent, check=True, stdout=subprocess.PIPE, text=True
    )
    return Path(found.stdout.splitlines()[-1]).resolve()


if __name__ == "__main__":
    sys.exit(main())
