"""Fuse the backend tests of ONNX, as they are and with their inputs turned into initializers: is every result right?

    python benchmarks/backend_tests.py               all
    python benchmarks/backend_tests.py a b conv      those of the modules whose name begins so; "simple" and other
                                                     kinds of models that onnx brings along go by their names

Each is fused at every level, and run by ONNX Runtime beside its original on the inputs of the test. Counted and listed
are tracebacks, more than ten seconds of processor time, results that differ or do not run, and right results that
verification objects to. Exit code 1 if there is any.
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import numpy as np
from fuzz_graphs import fused_at, tally
from onnx import ModelProto, load, load_tensor, numpy_helper
from onnx.backend.test.case import node as cases
from onnx.backend.test.loader import DATA_DIR

LEVELS = ("off", "region", "full")
KINDS = ("simple", "pytorch-converted", "pytorch-operator", "light")
Feeds = dict[str, np.ndarray]


def tests(wanted: Sequence[str]) -> Iterator[tuple[str, ModelProto, list[Any]]]:
    """The name, the model and the inputs of each test; models without data get none."""
    chosen = lambda name: not wanted or name.startswith(tuple(wanted))  # noqa: E731
    for found in iter_modules(cases.__path__):
        if chosen(found.name):
            del cases._NodeTestCases[:]
            with redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import_module(f"{cases.__name__}.{found.name}")
            for case in cases._NodeTestCases:
                yield case.name, case.model, list(case.data_sets[0][0])
    for kind in filter(chosen, KINDS):
        for path in sorted(Path(DATA_DIR, kind).glob("**/*.onnx")):
            model = load(path)
            files = sorted(path.parent.glob("test_data_set_0/input_*.pb"), key=lambda p: (len(p.name), p.name))
            try:
                yield (
                    f"{kind}/{path.parent.name}/{path.stem}",
                    model,
                    [numpy_helper.to_array(load_tensor(f)) for f in files],
                )
            except Exception:  # sequences and optional values are no tensors
                yield f"{kind}/{path.parent.name}/{path.stem}", model, []


def with_constants(model: ModelProto, given: Feeds) -> ModelProto | None:
    """``model`` with all its inputs but the first as initializers, or all where that is the only one."""
    names = [v.name for v in model.graph.input if isinstance(given.get(v.name), np.ndarray)]
    kept = set(names[:1]) if len(names) > 1 else set()
    if not names:
        return None
    found = ModelProto.FromString(model.SerializeToString())
    found.ir_version = max(found.ir_version, 4)
    for name in names:
        if name not in kept:
            found.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(given[name]), name))
    left = [v for v in found.graph.input if v.name in kept or v.name not in names]
    del found.graph.input[:]
    found.graph.input.extend(left)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("wanted", nargs="*", help="how the names of modules, or of kinds of models, begin")
    wanted = parser.parse_args(argv).wanted
    warnings.simplefilter("ignore")
    return tally("files", outcomes(wanted))


def outcomes(wanted: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """The name, the verdict and what is wrong, of each form of each test."""
    for name, model, arrays in tests(wanted):
        given = dict(zip((v.name for v in model.graph.input), arrays, strict=False))
        forms = {"": model, " (constants)": with_constants(model, given)}
        for form, made in forms.items():
            if made is None:
                continue
            read = {v.name for v in made.graph.input}
            verdict, where = fused_at(LEVELS, made, [{k: a for k, a in given.items() if k in read}])
            if verdict == "refused" and "uses opset" in where:
                verdict = "too old"
            yield f"{name}{form}", verdict, where


if __name__ == "__main__":
    sys.exit(main())
