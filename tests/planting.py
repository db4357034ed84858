"""Planting a fault, and asking each layer of verification whether it sees it.

A fault replaces a function by another, which is made from the original. The function gets code that calls the
replacement, so that everybody who holds it runs the fault, whoever imported it and when.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from types import CodeType, FunctionType
from typing import Any
from unittest.mock import patch

import numpy as np
from onnx import ModelProto, helper

from reparamc.certificate.onnx import certify_onnx
from reparamc.certificate.proof import Certificate
from reparamc.errors import InputError, VerificationError
from reparamc.onnx.check import check
from reparamc.onnx.end_to_end import verify_end_to_end
from reparamc.onnx.fuse import fuse_model
from reparamc.onnx.session import random_inputs, session

ENOUGH = 1e-4
"""An output that is wrong by this much, relative to its largest value, is wrong in float32."""
SIZES = (7, 8, 33)
"""Small and large, odd and even sizes at which original and result are compared."""

Make = Callable[[Callable[..., Any]], Callable[..., Any]]
"""From a function to the wrong one that replaces it."""


@dataclass(frozen=True)
class Replace:
    """The function ``where`` ("module:function" or "module:Class.method") is replaced by ``make(original)``."""

    where: str
    make: Make


@dataclass(frozen=True)
class Fault:
    """What somebody might get wrong, and the smallest models on which it shows.

    Attributes:
        name: what is wrong, in words.
        changes: how it gets wrong.
        text: an expression (`reparamc.algebra.text`) on which it shows through ONNX and through torch.
        onnx, fx: makes a model for one of them alone; for torch with its example inputs.
        least: the smallest relative error that makes it a fault.
    """

    name: str
    changes: tuple[Replace, ...]
    text: str | None = None
    onnx: Callable[[], ModelProto] | None = None
    fx: Callable[[], tuple[Any, tuple[Any, ...]]] | None = None
    least: float = ENOUGH

    @property
    def where(self) -> str:
        """The function that is wrong; the first, if several are."""
        return self.changes[0].where.removeprefix("reparamc.").removeprefix("reparamc_passes.")


def fault(name: str, where: str, make: Make, *more: Replace, **models: Any) -> Fault:
    """A `Fault` of one replacement, or of several."""
    return Fault(name, (Replace(where, make), *more), **models)


NO_SHRINK = Replace("reparamc.compiler.shrink:shrink", lambda _: lambda *_, **__: None)
"""For faults in selections: otherwise lossless-shrink leaves none."""


def given(change: Callable[..., Any]) -> Make:
    """The function gets other arguments: ``change`` returns all positional ones, as a tuple."""
    return lambda original: lambda *args, **kwargs: original(*change(*args), **kwargs)


def result(change: Callable[[Any], Any]) -> Make:
    """The function returns something else: ``change`` of what it returns."""
    return lambda original: lambda *args, **kwargs: change(original(*args, **kwargs))


def instead(function: Callable[..., Any]) -> Make:
    """Another function altogether."""
    return lambda original: function


@dataclass(frozen=True)
class Verdict:
    """What a fault does to a model, and who sees it.

    Attributes:
        error: the largest relative error of an output, with verification off; infinite if the result does not run.
        seen_by: the layers that see it, each asked alone.
        outcome: what a fusion at the default level comes to: "refused" (an error, nothing is returned), "kept" (the
            wrong replacement is not made) or "escaped".
    """

    error: float
    seen_by: tuple[str, ...]
    outcome: str


@contextmanager
def planted(changes: Sequence[Replace]) -> Iterator[None]:
    """The changes in force, until the block ends."""
    with ExitStack() as stack:
        for where in dict.fromkeys(c.where for c in changes):
            holder, function = _function(where)
            clear = getattr(holder, "cache_clear", lambda: None)
            before = function.__code__
            stack.callback(clear)
            stack.callback(setattr, function, "__code__", before)
            for change in (c for c in changes if c.where == where):
                function.__code__ = _calling(change.make(_copy(function)), function)
            clear()
        yield


def _function(where: str) -> tuple[Any, FunctionType]:
    """What is found at ``where``, and the plain function in it."""
    module, _, path = where.partition(":")
    found: Any = import_module(module)
    for part in path.split("."):
        found = inspect.getattr_static(found, part)
    match found:
        case property():
            return found, found.fget  # type: ignore[return-value]
        case cached_property():
            return found, found.func
        case staticmethod() | classmethod():
            return found, found.__func__
        case _:
            return found, inspect.unwrap(found)


def _copy(function: FunctionType) -> FunctionType:
    """The function as it is now, under no name."""
    f = function
    copy = FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    copy.__kwdefaults__ = f.__kwdefaults__
    return copy


def _calling(replacement: Callable[..., Any], function: FunctionType) -> CodeType:
    """Code for ``function`` that calls ``replacement``. It has the same free variables, as Python demands."""
    name, free = function.__name__, ", ".join(function.__code__.co_freevars)
    inner = f"def {name}(*args, **kwargs):\n  [{free}]\n  planted = 'replacement'\n  return planted(*args, **kwargs)"
    code: Any = compile(f"def outer({free}):\n {inner}", "<planted>", "exec")
    for wanted in ("outer", name):
        (code,) = (c for c in code.co_consts if getattr(c, "co_name", "") == wanted)
    return code.replace(co_consts=tuple(replacement if c == "replacement" else c for c in code.co_consts))


# ONNX


def judge_onnx(fault: Fault, model: ModelProto) -> Verdict:
    with planted(fault.changes):
        try:
            wrong = fuse_model(model, verify="off")[0]
        except InputError:  # the ONNX checker refuses the result, whatever the level
            return Verdict(float("inf"), ("checker",), "refused")
        seen_by = tuple(name for name, sees in ONNX_LAYERS.items() if sees(model, wrong))
        outcome, result = _fused(lambda: fuse_model(model)[0])
    if result is not None and _onnx_error(model, result) > fault.least / 10:
        outcome = "escaped"
    return Verdict(_onnx_error(model, wrong), seen_by, outcome)


def _fused(fuse: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "kept", fuse()
    except (VerificationError, InputError):
        return "refused", None


def _raises(check: Callable[[], Any]) -> bool:
    try:
        check()
    except (VerificationError, InputError):
        return True
    return False


SILENT = {
    "region": ("reparamc.compiler.reference.Reference.compare", lambda *_: (None, None)),
    "host": ("reparamc.compiler.rollback.compare_expressions", lambda *_, **__: 0.0),
}
"""For a check of regions, the other one, and what it says when it has no objection."""


def _region_onnx(layer: str) -> Callable[[ModelProto, ModelProto], bool]:
    """Whether a check of regions refuses what is wrong: with an error, or by leaving a region as it was."""

    def sees(model: ModelProto, wrong: ModelProto) -> bool:
        found: list[ModelProto] = []
        unproven = patch("reparamc.certificate.onnx.certify_onnx", lambda *_: Certificate((), 0, 0.0))
        with patch(*SILENT[layer]), unproven:
            return _raises(lambda: found.append(fuse_model(model, verify="region")[0])) or found[0] != wrong

    return sees


ONNX_LAYERS: dict[str, Callable[[ModelProto, ModelProto], bool]] = {
    "region": _region_onnx("region"),
    "host": _region_onnx("host"),
    "certificate": lambda model, wrong: certify_onnx(model, wrong).different > 0,
    "end to end": lambda model, wrong: _raises(lambda: (check(wrong), verify_end_to_end(model, wrong))),
}
"""Whether a layer sees that ``wrong`` differs from ``model``; asked with the fault in force."""


def _onnx_error(model: ModelProto, other: ModelProto) -> float:
    worst = 0.0
    for seed, dim in enumerate(SIZES):
        feeds = {**random_inputs(model, seed, dim), **_overrides(model, seed)}
        with session(model, "the model") as original:
            expected = original(feeds)
        try:
            with session(other, "the result", narrowed=False) as result:
                found = result(feeds)
        except Exception:  # whatever a wrong graph raises
            return float("inf")
        worst = max([worst, *(relative_error(found[name], y) for name, y in expected.items())])
    return worst


def _overrides(model: ModelProto, seed: int) -> dict[str, np.ndarray]:
    """Other values for the inputs that have one."""
    rng = np.random.default_rng(seed)
    inputs = {v.name for v in model.graph.input}
    return {
        t.name: rng.standard_normal(tuple(t.dims)).astype(helper.tensor_dtype_to_np_dtype(t.data_type))
        for t in model.graph.initializer
        if t.name in inputs
    }


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest value expected; infinite where shapes or finiteness differ."""
    if found.shape != expected.shape or not np.array_equal(np.isfinite(found), np.isfinite(expected)):
        return float("inf")
    a, b = (np.nan_to_num(v.astype(np.float64)) for v in (found, expected))
    return float(np.abs(a - b).max(initial=0.0) / max(np.abs(b).max(initial=0.0), np.finfo(np.float64).tiny))


# torch


def _fuse_fx() -> Any:
    """`fuse_fx` with plain arrays, for which faults are written."""
    from reparamc.fx.fuse import fuse_fx

    return partial(fuse_fx, specialize=True)


def judge_fx(fault: Fault, model: Any, inputs: tuple[Any, ...]) -> Verdict:
    fuse_fx = _fuse_fx()

    with planted(fault.changes):
        with _unchecked():
            wrong = fuse_fx(model, inputs, verify="off")
            seen_by = tuple(name for name, sees in FX_LAYERS.items() if sees(model, wrong, inputs))
        outcome, result = _fused(lambda: fuse_fx(model, inputs))
    if result is not None and _fx_error(model, result, inputs) > fault.least / 10:
        outcome = "escaped"
    return Verdict(_fx_error(model, wrong, inputs), seen_by, outcome)


def _unchecked() -> Any:
    """Without the comparison of the whole copy with the model, which is made at every level."""
    return patch("reparamc.fx.fuse._Fusion.checked", lambda self, parts, taken: taken)


def _region_fx(layer: str) -> Callable[[Any, Any, tuple[Any, ...]], bool]:
    """As `_region_onnx`."""
    fuse_fx = _fuse_fx()

    def sees(model: Any, wrong: Any, inputs: tuple[Any, ...]) -> bool:
        found: list[Any] = []
        silent = patch("reparamc.fx.host.certify_fx", lambda *_: Certificate((), 0, 0.0))
        with silent, patch(*SILENT[layer]):
            return _raises(lambda: found.append(fuse_fx(model, inputs, verify="region"))) or found[0].code != wrong.code

    return sees


def _end_to_end_fx(model: Any, wrong: Any, inputs: tuple[Any, ...]) -> bool:
    from reparamc.fx.arguments import others
    from reparamc.fx.end_to_end import verify_end_to_end as verify
    from reparamc.fx.runnable import run

    trials = [((inputs, {}), run(model, inputs, {}))]
    for args, kwargs in others(trials[0][0]):
        with suppress(Exception):
            trials.append(((args, kwargs), run(model, args, kwargs)))
            break
    return _raises(lambda: verify(model, wrong, trials))


def _certificate_fx(model: Any, wrong: Any, inputs: tuple[Any, ...]) -> bool:
    from reparamc.certificate.fx import certify_fx
    from reparamc.certificate.fx_shapes import shapes_of
    from reparamc.fx.trace import trace

    original = trace(model)
    return certify_fx(original, wrong, shapes_of(trace(model), inputs)).different > 0


FX_LAYERS: dict[str, Callable[[Any, Any, tuple[Any, ...]], bool]] = {
    "region": lambda *given: _region_fx("region")(*given),
    "host": lambda *given: _region_fx("host")(*given),
    "certificate": _certificate_fx,
    "end to end": _end_to_end_fx,
}
"""As `ONNX_LAYERS`."""


def _fx_error(model: Any, other: Any, inputs: tuple[Any, ...]) -> float:
    import torch
    from torch.utils import _pytree as pytree

    worst = 0.0
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in inputs]
        with torch.no_grad():
            expected = pytree.tree_leaves(model(*(x.clone() for x in drawn)))
            try:
                found = pytree.tree_leaves(other(*(x.clone() for x in drawn)))
            except Exception:  # whatever a wrong graph raises
                return float("inf")
        if len(found) != len(expected):
            return float("inf")
        pairs = zip(found, expected, strict=True)
        worst = max([worst, *(relative_error(a.double().numpy(), b.double().numpy()) for a, b in pairs)])
    return worst


@dataclass
class Row:
    """One line of the table: a fault, and the verdict through each adapter on which it has a model."""

    fault: Fault
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)


def judge(fault: Fault, ways: Sequence[str] = ("onnx", "fx")) -> Row:
    """The verdicts on ``fault`` through the adapters ``ways``."""
    found: dict[str, Verdict] = {}
    if "onnx" in ways and (fault.onnx or fault.text):
        found["onnx"] = judge_onnx(fault, _onnx_model(fault))
    if "fx" in ways and (fault.fx or fault.text):
        found["fx"] = judge_fx(fault, *_fx_model(fault))
    return Row(fault, found)


def escapes(fault: Fault, way: str) -> list[str]:
    """The levels at which a wrong model comes back although a level below "full", or no inputs, were given."""
    if way == "onnx":
        model = _onnx_model(fault)
        fusions = {"region": lambda: fuse_model(model, verify="region")[0]}
        return _escaped(fault, fusions, lambda result: _onnx_error(model, result))
    fuse_fx = _fuse_fx()

    module, inputs = _fx_model(fault)
    fusions = {
        "region": lambda: fuse_fx(module, inputs, verify="region"),
        "no inputs": lambda: fuse_fx(module),  # there, "full" does what "region" does
    }
    return _escaped(fault, fusions, lambda result: _fx_error(module, result, inputs))


def _escaped(fault: Fault, fusions: Mapping[str, Callable[[], Any]], error: Callable[[Any], float]) -> list[str]:
    with planted(fault.changes):
        results = {level: _fused(fusion)[1] for level, fusion in fusions.items()}
    return [level for level, found in results.items() if found is not None and error(found) > fault.least / 10]


def _onnx_model(fault: Fault) -> ModelProto:
    from expression_models import to_onnx

    from reparamc.algebra.text import parse

    return fault.onnx() if fault.onnx else to_onnx(parse(fault.text or ""))


def _fx_model(fault: Fault) -> tuple[Any, tuple[Any, ...]]:
    if fault.fx:
        return fault.fx()
    import torch
    from expression_models import draw, source_shapes, to_module

    from reparamc.algebra.text import parse

    e = parse(fault.text or "")
    return to_module(e), tuple(torch.from_numpy(x) for x in draw(source_shapes(e)).values())
