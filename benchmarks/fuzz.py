"""Fuse random networks, and compare each with its original.

    python benchmarks/fuzz.py --count 1000 --way onnx --verify region     through ONNX, or --way fx, through torch
    python benchmarks/fuzz.py --models --verify full                      the networks of the other benchmarks

A result is wrong if it differs from the original by more than rounding: in ONNX Runtime at several sizes, or in torch
in double precision. Whatever verification says about a network is checked against that: where it raises, or leaves a
region because of what it found, the network is fused once more without, and the result was wrong (caught) or not (a
false alarm). A result that is wrong though verification had no objection has escaped; with --verify off that is every
wrong one. Networks that fail are left in build/fuzz, with the command that repeats them. The benchmark networks are
looked at for false alarms only. Exit code 1 if anything is wrong, crashes or is a false alarm.
"""

from __future__ import annotations

import argparse
import copy
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from reparamc.errors import InputError, VerificationError
from reparamc.report.data import Report
from reparamc.testing.onnx_models import OPSETS, build_onnx
from reparamc.testing.sketch import random_structure
from reparamc.testing.structure import Structure

FOLDER = Path("build/fuzz")
ROUNDING = 5e-6
"""Largest difference that rounding to float32 explains, relative to the largest magnitude met in the network."""
PLAIN = 1e-5
"""Below this, relative to the largest value of the output, a difference is rounding without further question."""
DTYPES = {"onnx": ("float32",), "fx": ("float64", "float64", "float32", "float32", "float16", "bfloat16")}
BAD = ("escaped", "caught", "crashed", "false alarm")


@dataclass
class Tally:
    """What came of many networks."""

    counts: Counter[str] = field(default_factory=Counter)
    passes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.counts.update(other.counts)
        self.passes.update(other.passes)
        self.failures += other.failures

    def count(self, report: Report) -> None:
        """Add what was done to one network."""
        self.counts["fused"] += report.changed
        self.counts["regions"] += len(report.rewrites)
        self.counts["refused"] += len(report.kept)
        self.counts["undecided"] += unsampled(report)
        if report.certificate is not None:
            self.counts["windows"] += report.certificate.equal + len(report.certificate.undecided)
            self.counts["unproven"] += len(report.certificate.undecided)
        self.passes.update(report.passes)


def objections(report: Report) -> list[str]:
    """What verification found in regions that were left because of it."""
    return [f"{failed.where}: {failed.reason}" for failed in report.failed]


def unsampled(report: Report) -> int:
    return sum("cannot be verified" in kept.reason for kept in report.kept)


# One network


def try_one(seed: Sequence[int], way: str, level: str) -> tuple[str, Report | None, str]:
    """(verdict, report, details) of the network of ``seed``."""
    network = draw(seed, way)
    subject: Any = Onnx(network) if way == "onnx" else Torch(network)
    if not subject.works:
        return "unusable", None, ""
    objection = ""
    report = None
    try:
        result, report = subject.fuse(level)
        if not (found := objections(report)):
            difference = subject.difference(result)
            if difference:
                return "escaped", report, difference
            if not unsampled(report):
                return "right", report, ""
        objection = "; ".join(found)
    except VerificationError as error:
        objection = str(error)
    except Exception as error:  # whatever a fault raises: it is what is looked for
        unfit = isinstance(error, InputError) and "on random inputs" in str(error)  # it runs at sizes of its own only
        return "unusable" if unfit else "crashed", report, traceback.format_exc()
    difference = subject.difference(subject.fuse("off")[0])
    if not objection:
        return ("right" if not difference else "caught"), report, difference
    return ("caught" if difference else "false alarm"), report, f"{objection}\n{difference}"


@dataclass(frozen=True)
class Network:
    """A random structure, and how it is written.

    Attributes:
        open: whether the batch and the sizes of an ONNX model are names.
        constants: whether some constants of an ONNX model are nodes.
    """

    structure: Structure
    dtype: str
    opset: int
    open: bool
    constants: bool

    def inputs(self, grown: int) -> np.ndarray:
        """Random float64 numbers that every dtype can hold, ``grown`` larger than the example, and so is the batch."""
        shape, channel = self.structure.shape(), self.structure.values[0].axis
        larger = [n + grown * (axis != channel) for axis, n in enumerate(shape)]
        return np.random.default_rng(grown).standard_normal(larger).astype(np.float16).astype(np.float64)


def draw(seed: Sequence[int], way: str) -> Network:
    """The network of a seed."""
    rng = np.random.default_rng([*seed, 0])
    dtype, opset = str(rng.choice(DTYPES[way])), int(rng.choice(OPSETS))
    return Network(random_structure(seed), dtype, opset, bool(rng.random() < 0.6), bool(rng.random() < 0.5))


class Onnx:
    """A network as an ONNX model, and its comparison with another in ONNX Runtime."""

    def __init__(self, network: Network) -> None:
        from reparamc.onnx.session import Run

        self.network = network
        self.model = build_onnx(network.structure, network.dtype, network.opset, network.open, network.constants)
        self.outputs = [o.name for o in self.model.graph.output]
        self.cases: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = []
        run = Run(self.model.SerializeToString(), self.outputs, "the model", False)
        for grown in (0, 1, 2) if network.open else (0,):
            feeds = {"x": network.inputs(grown).astype(np.float32)}
            try:
                self.cases.append((feeds, run(feeds)))
            except Exception:  # the network does not take this size
                continue
        self.works = bool(self.cases)

    def fuse(self, level: str) -> tuple[Any, Report]:
        from reparamc.onnx.fuse import fuse_model

        return fuse_model(self.model, verify=level)

    def difference(self, result: Any) -> str:
        """What is wrong with ``result``, in words; empty if nothing is."""
        from reparamc.onnx.session import Run

        try:
            run = Run(result.SerializeToString(), self.outputs, "the result", False)
        except InputError as error:
            return str(error)
        for feeds, expected in self.cases:
            size = feeds["x"].shape
            try:
                found = run(feeds)
            except Exception as error:  # ONNX Runtime's exceptions share no base class
                return f"does not run at {size}: {error}"
            for name, y in expected.items():
                z = found[name]
                if y.shape != z.shape:
                    return f"{name} has shape {z.shape}, not {y.shape}, at {size}"
                gap = float(np.abs(y.astype(np.float64) - z).max(initial=0.0))
                if not gap <= PLAIN * float(np.abs(y).max(initial=0.0)) and self._is_wrong(feeds["x"], name, y, z):
                    return f"{name} differs by {gap:.3g}, largest value {np.abs(y).max():.3g}, at {size}"
        return ""

    def _is_wrong(self, x: np.ndarray, name: str, y: np.ndarray, z: np.ndarray) -> bool:
        """Whether ``z`` is farther from the value in double precision than ``y`` by more than rounding explains."""
        import torch

        from reparamc.testing.fx_models import build_module

        exact, largest = results(build_module(self.network.structure)[0].double(), torch.from_numpy(x).double())
        truth = exact[self.outputs.index(name)].numpy()
        error, own = np.abs(z - truth).max(initial=0.0), np.abs(y - truth).max(initial=0.0)
        return not error <= 10 * own + ROUNDING * largest

    def save(self, path: Path) -> None:
        path.with_suffix(".onnx").write_bytes(self.model.SerializeToString())
        if self.cases:
            np.savez(path.with_suffix(".npz"), **self.cases[0][0])


def results(module: Any, x: Any) -> tuple[list[Any], float]:
    """The outputs of the module of a structure, and the largest magnitude met on the way."""
    import torch

    largest = 0.0
    with torch.no_grad():
        for value in module.values(x.clone()):
            largest = max(largest, float(value.abs().max()) if value.numel() else 0.0)
        found = module(x.clone())
    return list(found) if isinstance(found, tuple) else [found], largest


class Torch:
    """A network as a torch module, and its comparison with another in double precision."""

    def __init__(self, network: Network) -> None:
        import torch

        from reparamc.testing.fx_models import build_module

        self.network = network
        self.dtype = getattr(torch, network.dtype)
        self.model = build_module(network.structure, network.dtype)[0].requires_grad_(network.open)
        self.cases: list[tuple[Any, list[Any], float]] = []
        exact = copy.deepcopy(self.model).double()
        for grown in (0, 1, 2):
            x = torch.from_numpy(network.inputs(grown))
            try:
                with torch.no_grad():
                    self.model(x.to(self.dtype))
                self.cases.append((x, *results(exact, x)))
            except Exception:  # the network does not take this size, or torch has no such operator in 16 bits
                continue
        self.works = bool(self.cases)

    def fuse(self, level: str) -> tuple[Any, Report]:
        from reparamc import fuse_fx

        fused = fuse_fx(self.model, self.cases[0][0].to(self.dtype), verify=level, specialize=True)
        return fused, fused.meta["reparamc"]

    def difference(self, result: Any) -> str:
        import torch

        epsilon = max(64 * torch.finfo(self.dtype).eps, 1e-11)
        result = copy.deepcopy(result).double()
        for x, expected, largest in self.cases:
            size = tuple(x.shape)
            try:
                with torch.no_grad():
                    found = result(x.clone())
            except Exception as error:  # whatever a wrong graph raises
                return f"does not run at {size}: {error}"
            for at, (y, z) in enumerate(zip(expected, found if isinstance(found, tuple) else [found], strict=True)):
                if y.shape != z.shape:
                    return f"output {at} has shape {tuple(z.shape)}, not {tuple(y.shape)}, at {size}"
                gap = float((y - z).abs().max()) if y.numel() else 0.0
                if not gap <= epsilon * largest:
                    return f"output {at} differs by {gap:.3g}, largest magnitude met {largest:.3g}, at {size}"
        return ""

    def save(self, path: Path) -> None:
        if self.cases:
            np.savez(path.with_suffix(".npz"), x=self.cases[0][0].numpy())


# Many


def work(seed: int, first: int, count: int, way: str, level: str, jobs: int, until: float) -> Tally:
    """The networks ``first``, ``first + jobs``, ... of a seed."""
    warnings.simplefilter("ignore")
    if way == "fx":
        import torch

        torch.set_num_threads(1)
    tally = Tally()
    start = process_time()
    for index in range(first, first + count * jobs, jobs):
        if perf_counter() > until:
            break
        verdict, report, details = try_one((seed, index), way, level)
        tally.counts[verdict] += 1
        if report is not None:
            tally.count(report)
        if verdict in BAD:
            FOLDER.mkdir(parents=True, exist_ok=True)
            path = FOLDER / f"{way}-{seed}-{index}"
            command = f"python benchmarks/fuzz.py --way {way} --seed {seed} --first {index} --count 1 --verify {level}"
            network = draw((seed, index), way)
            (Onnx if way == "onnx" else Torch)(network).save(path)
            path.with_suffix(".txt").write_text(f"{verdict}\n{command}\n\n{network}\n\n{details}\n")
            last = details.strip().splitlines()[-1] if details.strip() else ""
            tally.failures.append(f"{verdict}: {command}\n    {last}")
    tally.counts["seconds"] += round(process_time() - start)
    return tally


def models(level: str) -> Tally:
    """The networks of the other benchmarks: is there any objection?"""
    from models import ALL, onnx_file

    from reparamc import fuse_onnx

    tally = Tally()
    for name in ALL:
        reports: list[Report] = []
        try:
            fuse_onnx(onnx_file(name), verify=level, on_report=reports.append, output=FOLDER / "model.onnx")
            bad = objections(reports[0])
        except VerificationError as error:
            bad = [str(error)]
        tally.counts["false alarm" if bad else "right"] += 1
        tally.failures += [f"{name}: {line}" for line in bad]
        for report in reports:
            tally.count(report)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="how many networks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first network")
    parser.add_argument("--way", choices=("onnx", "fx"), default="onnx")
    parser.add_argument("--verify", choices=("off", "region", "full"), default="region")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--models", action="store_true", help="the networks of the other benchmarks")
    a = parser.parse_args()
    start = perf_counter()
    tally = Tally()
    if a.models:
        FOLDER.mkdir(parents=True, exist_ok=True)
        tally = models(a.verify)
    elif a.jobs == 1:
        tally = work(a.seed, a.first, a.count, a.way, a.verify, 1, start + a.seconds)
    else:
        run: Callable[[int], Any] = lambda job: pool.submit(  # noqa: E731
            work, a.seed, a.first + job, -(-(a.count - job) // a.jobs), a.way, a.verify, a.jobs, start + a.seconds
        )
        with ProcessPoolExecutor(a.jobs, get_context("spawn")) as pool:
            for future in [run(job) for job in range(a.jobs)]:
                tally.add(future.result())
    c, seconds = tally.counts, perf_counter() - start
    graphs = sum(c[k] for k in ("right", "unusable", *BAD))
    print(f"{graphs} graphs through {'models' if a.models else a.way}, verification {a.verify}, seed {a.seed}")
    print(f"  {c['fused']} fused, {c['regions']} regions replaced, {c['refused']} refusals, {c['unusable']} do not run")
    print(f"  wrong {c['escaped'] + c['caught']} ({c['caught']} caught by verification, {c['escaped']} escaped), "
          f"{c['crashed']} crashed, {c['false alarm']} false alarms, {c['undecided']} regions unsampled")  # fmt: skip
    if c["windows"]:
        print(f"  certificate: {c['windows']} windows, {c['unproven']} undecided")
    print(f"  {seconds:.0f} s, {c['seconds']} CPU s, {graphs / max(c['seconds'], 1):.0f} graphs per CPU second")
    print("  applied: " + ", ".join(f"{name} {n}" for name, n in tally.passes.items()))
    for line in tally.failures[:50]:
        print(line)
    return int(any(c[k] for k in BAD))


if __name__ == "__main__":
    sys.exit(main())
