"""Operators, convolutions and BatchNorms before and after, and the work it takes.

    python benchmarks/structure.py [MODEL ...]

Operators are counted without Constant and Identity. Times are CPU seconds for the whole
way of a file, loading and saving included: without verification, the best of three, and with it in full.
"""

import tempfile
from pathlib import Path
from time import process_time

import onnx
from models import ALL, names, onnx_file

import reparamc


def main() -> None:
    chosen = names(__doc__ or "", ALL).parse_args().models
    print(f"{'model':<22} {'ops':>11} {'Conv':>11} {'BatchNorm':>9} {'fuse, CPU s':>12} {'verified, CPU s':>16}")
    for name in chosen:
        source = onnx_file(name)
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "fused.onnx"
            reports: list[reparamc.Report] = []
            best = {"off": float("inf"), "full": float("inf")}
            for level in ("off", "off", "off", "full"):
                start = process_time()
                reparamc.fuse_onnx(source, output=target, verify=level, on_report=reports.append)
                best[level] = min(best[level], process_time() - start)
            onnx.checker.check_model(str(target))
        a, b = reports[-1].before, reports[-1].after
        print(
            f"{name:<22} {f'{a.ops} > {b.ops}':>11} {f'{a.conv} > {b.conv}':>11} "
            f"{f'{a.batchnorm} > {b.batchnorm}':>9} {best['off']:>12.2f} {best['full']:>16.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
