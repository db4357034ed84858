"""What an optimizer that folds must and must not do: small ONNX files, and what each optimizer makes of them.

    python benchmarks/conformance.py            # those that are installed
    python benchmarks/conformance.py --markdown # the table of docs/conformance.md

Each case is a model of a few operators, whether a BatchNormalization or constant can fold in it, and inputs. The
result must give what the original gives, in ONNX Runtime without optimizations. Each optimizer works in a process of
its own. "folds" and "stays" are right; "kept" means that a fold was missed, "WRONG" that outputs
differ, "fails" that there is no result, or that it does not load. Exit code 1 if reparamc is wrong or misses a fold.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

SECONDS = 120


class Case(NamedTuple):
    """A model, how many operators are left where all is folded (None: nothing can be), and shapes of inputs."""

    name: str
    model: ModelProto
    least: int | None
    shapes: list[tuple[int, ...]]


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def norm(x: str, y: str, name: str = "n") -> NodeProto:
    return node("BatchNormalization", f"{x} {name}g {name}b {name}m {name}v", y)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def statistics(channels: int, name: str = "n") -> dict[str, np.ndarray]:
    given = {f"{name}{kind}": numbers(channels, seed=at) for at, kind in enumerate("gbmv")}
    given[f"{name}v"] = np.abs(given[f"{name}v"]) + 0.5
    return given


def model(nodes: list[NodeProto], constants: dict[str, np.ndarray], shape: Any, outputs: str = "y", **rest: Any) -> Any:
    info = helper.make_tensor_value_info
    rank = rest.pop("rank", len(shape))
    kind = helper.np_dtype_to_tensor_dtype(rest.pop("dtype", np.dtype(np.float32)))
    results = [info(name, kind, [f"{name}{axis}" for axis in range(rank)]) for name in outputs.split()]
    tensors = [numpy_helper.from_array(a, name) for name, a in constants.items()]
    graph = helper.make_graph(nodes, "case", [info("x", kind, shape)], results, tensors)
    domains = [helper.make_opsetid("", 17), *(helper.make_opsetid(f.domain, 1) for f in rest.get("functions", ()))]
    return helper.make_model(graph, opset_imports=domains, ir_version=9, **rest)


IMAGE: tuple[Any, ...] = ("N", 6, "H", "W")
SIZES = [(1, 6, 7, 8), (2, 6, 5, 3)]
W3, W1, N = {"w": numbers(6, 6, 3, 3)}, {"u": numbers(6, 6, 1, 1)}, statistics(6)
CONV = node("Conv", "x w", "c", pads=[1] * 4)


def cases() -> list[Case]:
    row = np.arange(1, 7, dtype=np.float32)
    half = {name: a.astype(np.float16) for name, a in {**W3, **N}.items()}
    half["w"], half["ng"] = np.full((6, 6, 3, 3), 300, np.float16), np.full(6, 300, np.float16)
    half["nv"] = np.full(6, 0.9, np.float16)
    nan = {**W3, **N, "nb": np.array([np.nan, 1, 2, 3, 4, 5], np.float32)}
    own = helper.make_function(
        "own", "BatchNormalization", list("xsbmv"), ["r"],
        [node("Mul", "x x", "q"), node("Neg", "q", "r")], [helper.make_opsetid("", 17)],
    )  # fmt: skip
    named = helper.make_node("BatchNormalization", ["c", "ng", "nb", "nm", "nv"], ["y"], domain="own")
    loose = model([CONV, norm("c", "y")], {**W3, **N}, IMAGE)
    loose.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [6, 6, 3, 3]))
    two = model([CONV, norm("c", "y"), node("Conv", "x w", "d", pads=[1] * 4), norm("d", "z", "o")],
                {**W3, **N, **statistics(6, "o")}, IMAGE, "y z")  # fmt: skip
    branches = [CONV, norm("c", "a"), node("Conv", "x u", "d"), norm("d", "b", "o"), node("Add", "a b", "s"),
                norm("x", "i", "p"), node("Add", "s i", "y")]  # fmt: skip
    tokens: tuple[Any, ...] = ("N", 6, 6)
    shape = [CONV, node("Shape", "c", "s"), norm("c", "b"), node("Relu", "b", "r"), node("Expand", "r s", "y")]
    return [
        Case("BatchNormalization after a convolution", model([CONV, norm("c", "y")], {**W3, **N}, IMAGE), 1, SIZES),
        Case("two convolutions with one weight", two, 2, SIZES),
        Case("BatchNormalization before an unpadded convolution",
             model([norm("x", "b"), node("Conv", "b w", "y")], {**W3, **N}, IMAGE), 1, SIZES),
        Case("BatchNormalization before a padded convolution",
             model([norm("x", "b"), node("Conv", "b w", "y", pads=[1] * 4)], {**W3, **N}, IMAGE), None, SIZES),
        Case("a constant along the width, as wide as there are channels",
             model([CONV, node("Mul", "c k", "y")], {**W3, "k": row}, ("N", 6, "H", 6)), None, [(1, 6, 7, 6)]),
        Case("a constant for each channel",
             model([CONV, node("Mul", "c k", "y")], {**W3, "k": row.reshape(6, 1, 1)}, IMAGE), 1, SIZES),
        Case("a convolution that is an output, too",
             model([CONV, norm("c", "y")], {**W3, **N}, IMAGE, "y c"), None, SIZES),
        Case("a weight that the caller may replace", loose, None, SIZES),
        Case("a function that is called BatchNormalization",
             model([CONV, named], {**W3, **N}, IMAGE, functions=[own]), None, SIZES),
        Case("float16 whose product overflows",
             model([CONV, norm("c", "y")], half, IMAGE, dtype=np.dtype(np.float16)), None, [(1, 6, 5, 5)]),
        Case("NaN in a bias", model([CONV, norm("c", "y")], nan, IMAGE), None, SIZES),
        Case("three branches of RepVGG",
             model(branches, {**W3, **W1, **N, **statistics(6, "o"), **statistics(6, "p")}, IMAGE), 1, SIZES),
        Case("a skip around a convolution of stride 2, which broadcasts at size 1",
             model([node("Conv", "x w", "c", pads=[1] * 4, strides=[2, 2]), node("Add", "x c", "y")], W3, IMAGE),
             None, [(1, 6, 1, 1)]),
        Case("BatchNormalization over tokens, as many as channels",
             model([node("MatMul", "x k", "c"), norm("c", "y")], {"k": numbers(6, 6), **N}, tokens), None,
             [(2, 6, 6)]),
        Case("a convolution whose shape is read", model(shape, {**W3, **N}, IMAGE), 4, SIZES),
        Case("1x1 with bias before a padded 3x3",
             model([node("Conv", "x u k", "c"), node("Conv", "c w", "y", pads=[1] * 4)], {**W3, **W1, "k": row}, IMAGE),
             None, SIZES),
        Case("arithmetic of constants",
             model([node("Add", "k k", "j"), node("Mul", "x j", "y")], {"k": row.reshape(6, 1, 1)}, IMAGE), 1, SIZES),
    ]  # fmt: skip


# Optimizers: from a file to a file


def _reparamc(a: str, b: str) -> None:
    import reparamc

    reparamc.fuse_onnx(a, output=b)


def _onnxsim(a: str, b: str) -> None:
    import onnxsim  # type: ignore[import-not-found]

    onnx.save(onnxsim.simplify(a)[0], b)


def _onnxslim(a: str, b: str) -> None:
    import onnxslim  # type: ignore[import-not-found]

    onnxslim.slim(a, b)


def _onnxoptimizer(a: str, b: str) -> None:
    import onnxoptimizer  # type: ignore[import-not-found]

    passes = onnxoptimizer.get_fuse_and_elimination_passes()
    onnx.save(onnxoptimizer.optimize(onnx.load(a), passes), b)


def _onnxscript(a: str, b: str) -> None:
    from onnxscript import optimizer, rewriter  # type: ignore[import-not-found]

    onnx.save(rewriter.rewrite(optimizer.optimize(onnx.load(a))), b)


def _onnxruntime(a: str, b: str) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = b
    ort.InferenceSession(a, options, providers=["CPUExecutionProvider"])


OPTIMIZERS: dict[str, Callable[[str, str], None]] = {
    "reparamc": _reparamc, "onnxsim": _onnxsim, "onnxslim": _onnxslim, "onnxoptimizer": _onnxoptimizer,
    "onnxscript": _onnxscript, "onnxruntime": _onnxruntime,
}  # fmt: skip


def run(path: str, case: Case) -> list[list[np.ndarray]]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    dtype = helper.tensor_dtype_to_np_dtype(case.model.graph.input[0].type.tensor_type.elem_type)
    feeds = [numbers(*shape, seed=1).astype(dtype) for shape in case.shapes]
    names = [o.name for o in case.model.graph.output]
    others = {
        v.name: 2 * numbers(*(d.dim_value for d in v.type.tensor_type.shape.dim)) for v in case.model.graph.input[1:]
    }
    return [[np.asarray(a) for a in session.run(names, {"x": x} | others)] for x in feeds]


def verdict(case: Case, original: str, result: str) -> str:
    try:
        found = run(result, case)
    except Exception:  # ONNX Runtime's exceptions share no base class
        return "fails"
    eps = 1e-4 if case.model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT else 1e-2
    for mine, other in zip(run(original, case), found, strict=True):
        for a, b in zip(mine, other, strict=True):
            largest = np.abs(np.nan_to_num(a.astype(np.float64), posinf=0, neginf=0)).max(initial=0)
            if a.shape != b.shape or not np.allclose(a, b, rtol=eps, atol=eps * largest, equal_nan=True):
                return "WRONG"
    ops = [n for n in onnx.load(result).graph.node if n.op_type not in ("Constant", "Identity")]
    if case.least is None:
        return "stays"
    return "folds" if len(ops) <= case.least else "kept"


def judged(optimizer: str, case: Case) -> str:
    with tempfile.TemporaryDirectory() as folder:
        original, result = str(Path(folder, "a.onnx")), str(Path(folder, "b.onnx"))
        onnx.save(case.model, original)
        command = [sys.executable, __file__, "--child", optimizer, original, result]
        try:
            done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return "fails"
        if done.returncode or not Path(result).exists():
            return "absent" if b"ModuleNotFoundError" in done.stderr else "fails"
        return verdict(case, original, result)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare optimizers on small models.")
    parser.add_argument("--markdown", action="store_true", help="print a table for the documentation")
    parser.add_argument("--only", help="one optimizer")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        name, original, result = arguments.child
        OPTIMIZERS[name](original, result)
        return 0
    names = [arguments.only] if arguments.only else [*OPTIMIZERS]
    bad = False
    lines = [["case", *names], ["---"] * (len(names) + 1)]
    for case in cases():
        found = [judged(name, case) for name in names]
        lines.append([case.name, *found])
        bad |= "reparamc" in names and found[names.index("reparamc")] in ("WRONG", "kept", "fails")
        if not arguments.markdown:
            print(f"{case.name}: " + ", ".join(f"{n} {v}" for n, v in zip(names, found, strict=True)), flush=True)
    if arguments.markdown:
        print("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
