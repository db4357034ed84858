"""Every family of timm through the compiler: what is fused, what is refused, what breaks.

    python benchmarks/sweep.py [MODEL ...] [--jobs N] [--resume] [--latency] [--summary]
    python benchmarks/sweep.py --choose

The models are the smallest of each family; ``--choose`` computes that table, ``sweep_models.txt``, anew. Each
is built with random BatchNorm statistics and no weights of zeros, exported in its training form, and fused as an
ONNX file and as a torch module, in a process of its own with a time limit. Where a model brings its own method of
fusing, the sweep also counts what that reaches. Results are appended to a JSONL file, one line a model;
``--resume`` skips models that are in it, ``--summary`` only reads it.
"""

import argparse
import copy
import io
import json
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
import torch
from models import ROOT, SEED, timm
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import reparamc
from reparamc.errors import one_line
from reparamc.onnx.files import load
from reparamc.onnx.fuse import count, fuse_model
from reparamc.onnx.runtime_fusions import fused_by_runtime
from reparamc.report.data import Report
from reparamc.testing import randomize_batchnorm, randomize_layer_scales

TABLE = Path(__file__).with_name("sweep_models.txt")
LIMIT = 60e6
"""Larger models are left out: parameters."""

FACTOR = 20
"""How much further than its original a result may be from float64; in float64 itself, by digits, too."""

OWN = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods by which modules of timm fuse themselves."""

FAMILY = re.compile(r"[a-z]+(?:(?<=v)\d+)?")
"""The part of a name before its first size; the number of a version belongs to the family."""

BIG = re.compile(
    r"large|huge|giant|base|gigantic|_\d+b|_xl|_l(_|$|\d)|_g_|so400m|so150m|[1-9]\d\dm|medium|_m(_|$)"
    r"|384|448|512|5120|336|280|101|152|200|270|350|420|269"
)
"""Sizes that are not the smallest of a family with others: not even built to be counted, which takes long."""

CONVOLUTIONS = {"convolution", "mkldnn_convolution", "_slow_conv2d_forward"}
NORMS = {"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"}
LINEARS = {"addmm", "mm"}

Record = dict[str, Any]


# The table of models


def choose() -> None:
    """Write the smallest model of each family and module of timm, those with methods of their own first."""
    zoo = timm()
    families: dict[tuple[str, str], list[str]] = {}
    for name in zoo.list_models():
        family = FAMILY.match(name)
        module = zoo.models.model_entrypoint(name).__module__
        families.setdefault((module, family[0] if family else name), []).append(name)
    small = [[name for name in names if not BIG.search(name)] or names for names in families.values()]
    rows = [min(map(row, names)) for names in small]
    rows = sorted((not own, parameters, name) for parameters, name, own in rows if parameters <= LIMIT)
    lines = [f"{name} {parameters} {'-' if last else 'own'}\n" for last, parameters, name in rows]
    TABLE.write_text("# model, parameters, whether it brings a method of fusing; written by sweep.py --choose\n")
    with TABLE.open("a") as file:
        file.writelines(lines)


def row(name: str) -> tuple[int, str, bool]:
    """Parameters, name, and whether a module of the model has a method of fusing."""
    with torch.device("meta"):
        model = timm().create_model(name, num_classes=10)
    return sum(p.numel() for p in model.parameters()), name, has_own(model)


def table() -> list[str]:
    return [line.split()[0] for line in TABLE.read_text().splitlines() if not line.startswith("#")]


def has_own(model: nn.Module) -> bool:
    return any(callable(getattr(m, method, None)) for m in model.modules() for method in OWN)


# One model


def examine(name: str, options: argparse.Namespace) -> Record:
    """Everything about one model. Runs in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    record: Record = {"model": name}
    with guarded(record, "build"):
        model, x = build(name)
        record |= {"size": x.shape[-1], "parameters": sum(p.numel() for p in model.parameters())}
    if "build" in record:
        return record
    files = {"onnx": options.cache / f"{name}.onnx", "own": options.cache / f"{name}.own.onnx"}
    with guarded(record, "export"):
        export(model, x, files["onnx"])
    own = None
    if has_own(model):
        with guarded(record, "own"):
            own = timm().models.reparameterize_model(model)
            export(own, x, files["own"])
    if not options.export_only:
        double = copy.deepcopy(model).double()
        reference = outputs(double, x)
        if files["onnx"].exists():
            through_onnx(record, files["onnx"], x, reference, options)
        with guarded(record, "fx"):
            record["fx"] = through_fx(model, x, reference, options.verify)
            # Rounding hides little in float64, also in networks that amplify it.
            record["fx"]["error_float64"] = error(
                outputs(reparamc.fuse_fx(double, x.double(), verify="off"), x), reference
            )
        if own is not None and "own" not in record:
            with guarded(record, "own"):
                record["own"] = {
                    "onnx": graph_counts(load(files["own"])),
                    "torch": executed(own, x),
                    "error": error(outputs(own, x), reference),
                }
    record["seconds"] = round(time.perf_counter() - start, 1)
    return record


@contextmanager
def guarded(record: Record, key: str) -> Iterator[None]:
    """Turns an exception into ``record[key]``: its text, and the place that raised it."""
    try:
        yield
    except Exception as failure:  # whatever a model, an exporter or the compiler raises
        frames = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(failure.__traceback__)]
        text = one_line(failure)
        record[key] = {"failure": type(failure).__name__, "text": text, "at": frames[-4:]}


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The model in evaluation mode, and one image of a size that it takes."""
    torch.manual_seed(SEED)
    model = timm().create_model(name, pretrained=False, num_classes=10).eval()
    config = model.pretrained_cfg
    channels, size, _ = config["input_size"]
    x = torch.randn(1, channels, size, size)
    if size > 224 and not config.get("fixed_input_size") and runs(model, x[..., :224, :224]):
        x = x[..., :224, :224].contiguous()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if not key.endswith("bias") and not p.any():  # before training a head or branch may be switched off
                p.normal_(0, 0.1)
    randomize_layer_scales(model, SEED)
    randomize_batchnorm(model, SEED, torch.randn(2, *x.shape[1:]))
    return model, x


def runs(model: nn.Module, x: torch.Tensor) -> bool:
    try:
        with torch.no_grad():
            model(x)
    except Exception:  # whatever a model makes of a size it was not made for
        return False
    return True


def export(model: nn.Module, x: torch.Tensor, path: Path) -> None:
    if path.exists():
        return
    part = path.with_suffix(".part")
    with redirect_stdout(io.StringIO()):  # the exporter prints the whole graph when it fails
        torch.onnx.export(
            model,
            (x,),
            str(part),
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,  # this and the next line keep every BatchNorm
            do_constant_folding=False,
            opset_version=17,
        )
    part.rename(path)


def through_onnx(
    record: Record, path: Path, x: torch.Tensor, reference: list[np.ndarray], options: argparse.Namespace
) -> None:
    """Fuse the file ``path`` into ``record["onnx"]``, and time it into ``record["latency"]``."""
    with guarded(record, "onnx"):
        source = load(path)
        start = time.perf_counter()
        result, report = fuse_model(source, verify=options.verify)
        record["onnx"] = summary_of(report, time.perf_counter() - start) | {
            "before": graph_counts(source),
            "after": graph_counts(result),
            "error_before": error(run(source, x), reference),
            "error_after": error(run(result, x), reference),
            "kernels": [Counter((fused_by_runtime(m) or {}).values()) for m in (source, result)],
        }
        if options.latency:
            record["latency"] = latency(source, result, x, options.rounds)


def through_fx(model: nn.Module, x: torch.Tensor, reference: list[np.ndarray], verify: str) -> Record:
    start = time.perf_counter()
    fused = reparamc.fuse_fx(model, x, verify=verify)
    taken = time.perf_counter() - start
    return summary_of(fused.meta["reparamc"], taken) | {
        "before": executed(model, x),
        "after": executed(fused, x),
        "error_before": error(outputs(model, x), reference),
        "error_after": error(outputs(fused, x), reference),
        "opaque": opaque(fused),
    }


def summary_of(report: Report, seconds: float) -> Record:
    reasons = Counter(f"{r.name}: {generic(r.reason)}" for r in report.kept)
    summary: Record = {"seconds": round(seconds, 2), "passes": report.passes, "refused": reasons, "note": report.note}
    summary["undone"] = [f"{f.where}: {f.reason}" for f in report.failed]
    if (proof := report.certificate) is not None:
        undecided = [f"{kept.where}: {kept.reason}" for kept in proof.undecided]
        summary["certificate"] = {"equal": proof.equal, "undecided": undecided, "seconds": round(proof.seconds, 2)}
    return summary


def generic(reason: str) -> str:
    """A reason without the names and numbers of its place, so that equal reasons can be counted."""
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "NAME", reason))


def opaque(module: nn.Module) -> list[str]:
    """Submodules, and their classes, that tracing did not follow although they are not torch's own: these stay."""
    if not isinstance(module, torch.fx.GraphModule):
        return [p.where for p in cast(Any, module).meta["reparamc"].parts if p.how == "as it is"]
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    classes = {name: type(module.get_submodule(name)) for name in called}
    return sorted(f"{name} ({c.__name__})" for name, c in classes.items() if not c.__module__.startswith("torch.nn"))


# What is counted and compared


def graph_counts(model: onnx.ModelProto) -> Record:
    kinds = Counter(node.op_type for node in model.graph.node)
    total = count(model)
    return {"ops": total.ops, "conv": total.conv, "bn": total.batchnorm, "linear": kinds["Gemm"] + kinds["MatMul"]}


class _Executed(TorchDispatchMode):
    """Counts the operators that run, whether modules, functions or untraced code call them."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.kinds[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def executed(model: nn.Module, x: torch.Tensor) -> Record:
    """Operators of one forward pass; views count as operators."""
    with torch.no_grad(), _Executed() as seen:
        model(x)

    def of(names: set[str]) -> int:
        return sum(seen.kinds[name] for name in names)

    return {"ops": sum(seen.kinds.values()), "conv": of(CONVOLUTIONS), "bn": of(NORMS), "linear": of(LINEARS)}


def outputs(model: nn.Module, x: torch.Tensor) -> list[np.ndarray]:
    """Every tensor that the model returns, computed in its own dtype."""
    dtype = next((p.dtype for p in model.parameters()), x.dtype)
    with torch.no_grad():
        leaves = _pytree.tree_leaves(model(x.to(dtype)))
    return [leaf.double().numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def run(model: onnx.ModelProto, x: torch.Tensor) -> list[np.ndarray]:
    """Every output in ONNX Runtime without its optimizations."""
    return session(model, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)(x.numpy())


def session(model: onnx.ModelProto, level: ort.GraphOptimizationLevel) -> Callable[[np.ndarray], list[np.ndarray]]:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    ready = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = ready.get_inputs()[0].name
    return lambda x: [np.asarray(value, np.float64) for value in ready.run(None, {name: x})]


def error(found: list[np.ndarray], reference: list[np.ndarray]) -> float:
    """Largest difference, relative to the largest magnitude of its output; infinite where shapes differ."""
    if [a.shape for a in found] != [b.shape for b in reference]:
        return float("inf")
    worst = 0.0
    for a, b in zip(found, reference, strict=True):
        gap = np.abs(a - b).max(initial=0.0) / max(np.abs(b).max(initial=0.0), 1e-30)
        worst = max(worst, float(gap) if np.isfinite(gap) else float("inf"))
    return worst


def latency(source: onnx.ModelProto, result: onnx.ModelProto, x: torch.Tensor, rounds: int) -> Record:
    """Milliseconds in ONNX Runtime with all of its optimizations; ``ratio`` and its 95 % interval are of pairs."""
    runs = [session(m, ort.GraphOptimizationLevel.ORT_ENABLE_ALL) for m in (source, result)]
    image, pairs = x.numpy(), []
    for turn in range(rounds + 3):
        pair = [0.0, 0.0]
        for which in (0, 1) if turn % 2 else (1, 0):
            start = time.process_time()  # on one thread; other processes do not count
            runs[which](image)
            pair[which] = 1000 * (time.process_time() - start)
        pairs.append(pair)
    before, after = np.array(pairs[3:]).T
    ratio, low, high = median_interval(after / before)
    return {"before": np.median(before), "after": np.median(after), "ratio": ratio, "low": low, "high": high}


def median_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The median, and the order statistics that enclose it with a probability of about 95 %."""
    ordered = np.sort(values)
    reach = 0.98 * np.sqrt(len(ordered))
    low = max(int(np.floor(len(ordered) / 2 - reach)), 0)
    high = min(int(np.ceil(len(ordered) / 2 + reach)), len(ordered) - 1)
    return float(np.median(ordered)), float(ordered[low]), float(ordered[high])


# All models


def sweep(names: list[str], options: argparse.Namespace, record: Callable[[Record], None]) -> None:
    """Examine each of ``names`` in a process of its own, ``options.jobs`` at a time."""
    context = get_context("fork")  # torch and timm are imported once
    waiting, running = list(reversed(names)), {}
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, options, sender))
            process.start()
            sender.close()
            running[receiver] = name, process, time.monotonic() + options.timeout
        ready = connection.wait(list(running), timeout=1)
        for receiver, (name, process, deadline) in list(running.items()):
            if receiver in ready:
                record(_received(receiver, name, process))
            elif time.monotonic() > deadline:
                process.kill()
                record({"model": name, "died": f"no result within {options.timeout} s"})
            else:
                continue
            process.join()
            receiver.close()
            del running[receiver]


def _child(name: str, options: argparse.Namespace, sender: Any) -> None:
    record: Record = {"model": name}
    with guarded(record, "sweep"):
        record |= examine(name, options)
    sender.send(record)


def _received(receiver: Any, name: str, process: Any) -> Record:
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return {"model": name, "died": f"exit status {process.exitcode}"}


def read(path: Path) -> dict[str, Record]:
    """The last record of each model."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["model"]: record for record in map(json.loads, lines)}


# The summary


def summarize(records: list[Record]) -> None:
    print(f"{len(records)} models")
    for way in ("onnx", "fx"):
        proven = sum(r[way]["certificate"]["equal"] for r in records if "certificate" in r.get(way, {}))
        print(f"{way}: {proven} windows proven equal for every input size")
    for title, lines in (
        ("died", [f"{r['model']}: {r['died']}" for r in records if "died" in r]),
        ("could not be built, exported or compared", failures(records, ("build", "export", "sweep", "own"))),
        ("wrong", [*failures(records, ("onnx", "fx"), {"VerificationError"}), *inexact(records)]),
        ("not traceable", failures(records, ("fx",), {"InputError", "InputTypeError"})),
        ("partly traceable", [f"{r['model']}: {some(names)}" for r in records if (names := hidden(r))]),
        ("crashed, or bad input", crashes(records)),
        ("BatchNorms left", left(records)),
        ("undone, because a check objected", undone(records)),
        ("windows that the certificate leaves undecided", undecided(records)),
        ("patterns that ONNX Runtime no longer fuses", lost(records)),
        ("slower beyond noise", slower(records)),
        ("worse than the model's own method", worse(records)),
    ):
        print(f"\n{title}: {len(lines)}", *lines, sep="\n  ")
    for way in ("onnx", "fx"):
        reasons: Counter[str] = Counter()
        models: Counter[str] = Counter()
        for r in records:
            refused = r.get(way, {}).get("refused", {})
            reasons.update(refused)
            models.update(refused.keys())
        print(f"\nrefusals, {way}: times, models")
        for reason, times in reasons.most_common(25):
            print(f"  {times:>6} {models[reason]:>4}  {reason}")


def failures(records: list[Record], keys: tuple[str, ...], kinds: set[str] | None = None) -> list[str]:
    return [
        f"{r['model']}, {key}: {found['failure']}: {found['text'][:160]} [{found['at'][-1]}]"
        for r in records
        for key in keys
        if "failure" in (found := r.get(key, {})) and (kinds is None or found["failure"] in kinds)
    ]


def crashes(records: list[Record]) -> list[str]:
    known = {"VerificationError"}
    lines = failures(records, ("onnx",))
    lines += [line for line in failures(records, ("fx",)) if ": InputError:" not in line]
    return [line for line in lines if not any(f": {kind}:" in line for kind in known)]


def inexact(records: list[Record]) -> list[str]:
    """Results much further from float64 than the original, whatever the compiler's own verification says."""
    return [
        f"{r['model']}, {way}: {found['error_before']:.1e} > {found['error_after']:.1e}"
        + (f", in float64 {found['error_float64']:.1e}" if "error_float64" in found else "")
        for r in records
        for way in ("onnx", "fx")
        if "error_after" in (found := r.get(way, {}))
        and not (
            found["error_after"] <= max(FACTOR * found["error_before"], 1e-5)
            and found.get("error_float64", 0) <= max(FACTOR * found["error_before"] * 2**-29, 1e-9)
        )
    ]


def hidden(record: Record) -> list[str]:
    return record.get("fx", {}).get("opaque", [])


def left(records: list[Record]) -> list[str]:
    lines = []
    for r in records:
        after = {way: r[way]["after"]["bn"] for way in ("onnx", "fx") if "after" in r.get(way, {})}
        if any(after.values()):
            lines.append(f"{r['model']}: " + ", ".join(f"{way} {number}" for way, number in after.items()))
    return lines


def undone(records: list[Record]) -> list[str]:
    return [f"{r['model']}, {way}: {line}" for r in records for way in ("onnx", "fx") for line in of(r, way, "undone")]


def undecided(records: list[Record]) -> list[str]:
    lines = []
    for r in records:
        for way in ("onnx", "fx"):
            proof = r.get(way, {}).get("certificate", {})
            if found := proof.get("undecided"):
                lines.append(f"{r['model']}, {way}: {len(found)} of {len(found) + proof['equal']}, {found[0][:160]}")
    return lines


def lost(records: list[Record]) -> list[str]:
    lines = []
    for r in records:
        before, after = map(Counter, of(r, "onnx", "kernels") or ({}, {}))
        lines += [f"{r['model']}: {before[kind]} > {after[kind]} {kind}" for kind in before - after]
    return lines


def of(record: Record, way: str, key: str) -> list[Any]:
    return record.get(way, {}).get(key, [])


def some(names: list[str], most: int = 4) -> str:
    rest = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *rest])


def slower(records: list[Record]) -> list[str]:
    timed = [(r["model"], r["latency"]) for r in records if "latency" in r]
    return [
        f"{name}: {t['before']:.2f} > {t['after']:.2f} ms, {t['ratio']:.3f} ({t['low']:.3f} to {t['high']:.3f})"
        for name, t in timed
        if t["low"] > 1
    ]


def worse(records: list[Record]) -> list[str]:
    """Models whose own method leaves fewer convolutions, BatchNorms or linear layers than the compiler."""
    lines = []
    for r in records:
        for way, counted in (("onnx", "onnx"), ("fx", "torch")):
            ours, own = r.get(way, {}).get("after"), r.get("own", {}).get(counted)
            if ours and own and any(ours[kind] > own[kind] for kind in ("conv", "bn", "linear")):
                lines.append(
                    f"{r['model']}, {way}: Conv, BatchNorm, linear {triple(own)} by its own, {triple(ours)} here"
                )
    return lines


def triple(counts: Record) -> str:
    return f"{counts['conv']} {counts['bn']} {counts['linear']}"


def line(r: Record) -> str:
    """One model for the terminal."""
    ways = []
    for way in ("onnx", "fx", "own"):
        found = r.get(way, {})
        if "failure" in found:
            ways.append(f"{way} {found['failure']}")
        elif "after" in found:
            ways.append(f"{way} {triple(found['before'])} > {triple(found['after'])}, {found['error_after']:.0e}")
        elif found:
            ways.append(f"own {triple(found['onnx'])}")
    return f"{r['model']:<28} {r.get('seconds', 0):>6} s  {r.get('died', '')}" + "; ".join(ways)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="default: all of sweep_models.txt")
    parser.add_argument("--choose", action="store_true", help="write sweep_models.txt anew")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "sweep.jsonl")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "sweep", help="folder of exported files")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one model")
    parser.add_argument("--verify", choices=("off", "region", "full"), default="full")
    parser.add_argument("--latency", action="store_true", help="time both files in ONNX Runtime, on one thread")
    parser.add_argument("--rounds", type=int, default=30, help="of --latency")
    parser.add_argument("--export-only", action="store_true", help="fill the cache and write no results")
    parser.add_argument("--resume", action="store_true", help="skip models that are in the output")
    parser.add_argument("--summary", action="store_true", help="only summarize the output")
    options = parser.parse_args()
    if options.choose:
        choose()
        return
    names = options.models or table()
    if not options.summary:
        done = read(options.output) if options.resume else {}
        options.cache.mkdir(parents=True, exist_ok=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        if not options.resume and not options.export_only:
            options.output.unlink(missing_ok=True)
        timm()

        def record(result: Record) -> None:
            print(line(result), flush=True)
            if not options.export_only:
                with options.output.open("a") as file:
                    file.write(json.dumps(result, default=float) + "\n")

        sweep([name for name in names if name not in done], options, record)
    if not options.export_only:
        found = read(options.output)
        summarize([found[name] for name in names if name in found])


if __name__ == "__main__":
    main()
