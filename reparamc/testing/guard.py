"""`fuse_guard`: a model fuses as it should, or an AssertionError names the part that does not, and why."""

from __future__ import annotations

import copy
import difflib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reparamc.errors import InputError, InputTypeError, one_line
from reparamc.report.data import Refusal, Report, Rewrite
from reparamc.testing.assertions import assert_equivalent, check_tolerance
from reparamc.testing.inputs import arrays_of, domain_of
from reparamc.testing.randomize import randomize_batchnorm, randomize_layer_scales

_CONVOLUTION = re.compile(r"^%\S+ = conv ", re.MULTILINE)


def fuse_guard(
    model: Any,
    example_inputs: Any = None,
    *,
    max_conv: int | None = None,
    no_batchnorm: bool = True,
    fused: Iterable[str] | Mapping[str, int] = (),
    tolerance: float | None = None,
    examples: int = 6,
    randomize: bool = True,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Fuse a copy of ``model``, compare both on several inputs, and hold the result to a structure.

    The copy is in eval mode and, unless ``randomize`` is False, has random BatchNorm statistics and layer scales, which
    a mistake cannot hide behind. Inputs are of sizes that the model takes, odd and small ones among them. The model
    itself stays as it is.

    Args:
        model: a torch module, an ONNX ModelProto or the path of one.
        example_inputs: as of `inputs_for`: one tensor, a tuple, or a mapping.
        max_conv: how many convolutions may be left in all; None for any number.
        no_batchnorm: whether no BatchNorm may be left.
        fused: names of submodules (torch) or prefixes of node names (ONNX) each of which must become one convolution or
            linear layer, and keep no BatchNorm; or a mapping from such names to how many may be left.
        tolerance, examples, seed: those of `assert_equivalent`; ``seed`` also of the random parameters.
        options: those of `fuse_fx` or `fuse_onnx`: ``passes``, ``skip``, ``objective``.

    Returns:
        The fused copy, for further assertions.

    Raises:
        AssertionError: it computes something else, or is less fused than it should be.
        InputError: the model cannot be fused or run, or has no part of a name in ``fused``; or the tolerance is
            negative.
        InputTypeError: it is no model, or there is no option of that name.
    """
    check_options(options)
    check_tolerance(tolerance)
    fuse = _way(model)
    outcome = fuse(model, example_inputs, seed if randomize else None, options)
    allowed = (
        dict(fused) if isinstance(fused, Mapping) else dict.fromkeys([fused] if isinstance(fused, str) else fused, 1)
    )
    faults = [fault for name, count in allowed.items() for fault in _faults(outcome, name, count)]
    faults += _faults_of_all(outcome.report, max_conv, no_batchnorm)
    if faults:
        raise AssertionError("\n".join([f"{outcome.name} does not fuse as it should", *faults]))
    # A copy that holds for the sizes of the example only is asked which sizes these are.
    exported = any(p.how == "torch.export" for p in outcome.report.parts)
    asked = outcome.result if exported else outcome.original
    inputs = list(domain_of(asked, outcome.example).some(examples, seed))
    assert_equivalent(outcome.original, outcome.result, inputs, tolerance=tolerance, seed=seed)
    return outcome.result


_FUSING = ("passes", "skip", "objective")
OPTIONS = ("max_conv", "no_batchnorm", "fused", "tolerance", "examples", "randomize", "seed", *_FUSING)
"""What `fuse_guard`, its marker and the fixture may be asked for."""


def check_options(options: Iterable[str], who: str = "fuse_guard") -> None:
    """Raise InputTypeError unless all ``options`` are known: one that is misspelt must not be passed over."""
    for name in options:
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, 1)
            meant = f"; did you mean {near[0]!r}?" if near else f"; the options are {', '.join(OPTIONS)}"
            raise InputTypeError(f"{who} has no option {name!r}{meant}")


def _way(model: Any) -> Callable[..., _Outcome]:
    onnx, torch = sys.modules.get("onnx"), sys.modules.get("torch")
    if isinstance(model, str | os.PathLike) or (onnx is not None and isinstance(model, onnx.ModelProto)):
        return _fuse_onnx
    if torch is not None and isinstance(model, torch.nn.Module):
        return _fuse_torch
    what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    raise InputTypeError(f"fuse_guard takes a torch module, an onnx.ModelProto or the path of one, not {what}")


@dataclass(frozen=True)
class _Outcome:
    """What fusing gave.

    Attributes:
        linear, norms: how often each convolution or linear layer of the original is called, and each BatchNorm.
        parts: names that may be asked for; None if any prefix may.
        separator: between the parts of a name.
    """

    name: str
    original: Any
    result: Any
    report: Report
    example: Any
    linear: Counter[str]
    norms: Counter[str]
    parts: frozenset[str] | None
    separators: str


def _fuse_torch(model: Any, example: Any, seed: int | None, options: Mapping[str, Any]) -> _Outcome:
    from reparamc.fx.fuse import fuse_fx

    try:
        original = copy.deepcopy(model).eval()
    except Exception as error:  # whatever the attributes of the user's module raise
        raise InputError(f"{type(model).__name__} cannot be copied: {one_line(error)}") from error
    if example is None:
        example = domain_of(original).example()
    if seed is not None:
        positional = example if not isinstance(example, Mapping) else None
        randomize_layer_scales(randomize_batchnorm(original, seed, positional), seed)
    result = fuse_fx(original, example, **options)
    linear, norms = _layers_of_module(original)
    parts = frozenset(name for name, _ in original.named_modules())
    name = type(model).__name__
    return _Outcome(name, original, result, result.meta["reparamc"], example, linear, norms, parts, ".")


def _fuse_onnx(model: Any, example: Any, seed: int | None, options: Mapping[str, Any]) -> _Outcome:
    from reparamc.onnx.fuse import fuse_model
    from reparamc.onnx.runnable import OnnxRunnable

    runnable = OnnxRunnable(model)
    original = runnable.model
    domain = runnable.domain(arrays_of(example))
    if seed is not None:
        inputs = domain.example() if example is None else arrays_of(example)
        original = randomize_batchnorm(original, seed, inputs)
    result, report = fuse_model(original, **options)
    name = Path(model).name if isinstance(model, str | os.PathLike) else "the ONNX model"
    return _Outcome(name, original, result, report, example, *_layers_of_model(original), None, "/.")


def _layers_of_model(model: Any) -> tuple[Counter[str], Counter[str]]:
    """The names of all convolutions and linear layers, and of all BatchNorms; for want of one, that of the output."""
    named = [(node.name or node.output[0], node.op_type) for node in model.graph.node]
    linear = Counter(name for name, kind in named if kind in ("Conv", "ConvTranspose", "Gemm", "MatMul"))
    return linear, Counter(name for name, kind in named if kind == "BatchNormalization")


def _layers_of_module(module: Any) -> tuple[Counter[str], Counter[str]]:
    """How often each convolution and linear layer is called, and each BatchNorm; once where torch.fx cannot tell."""
    from torch import nn

    from reparamc.fx.trace import trace

    linear, norms = (nn.modules.conv._ConvNd, nn.Linear), nn.modules.batchnorm._BatchNorm
    named = dict(module.named_modules())
    try:
        calls = Counter(str(n.target) for n in trace(copy.deepcopy(module)).graph.find_nodes(op="call_module"))
    except InputError:
        calls = Counter(dict.fromkeys(named, 1))
    for name in named:  # inside a submodule that torch.fx calls as it is
        parts = name.split(".")
        if not calls[name] and any(".".join(parts[:n]) in calls for n in range(1, len(parts))):
            calls[name] = 1
    found = [Counter({n: calls[n] for n, m in named.items() if isinstance(m, kinds)}) for kinds in (linear, norms)]
    return found[0], found[1]


# What is wrong


def _faults(outcome: _Outcome, name: str, allowed: int) -> list[str]:
    """Why the part called ``name`` is not fused; nothing if it is."""
    inside = _inside(name, outcome.separators)
    rewrites = [r for r in outcome.report.rewrites if any(map(inside, (*r.operators, *r.parameters)))]
    linear = [n for n in outcome.linear if inside(n)]
    norms = [n for n in outcome.norms if inside(n)]
    if (outcome.parts is not None and name not in outcome.parts) or not (linear or norms or rewrites):
        raise InputError(f"{outcome.name} has no convolution, linear layer or BatchNorm in a part called {name!r}")
    count = sum(_left(n, outcome.linear, rewrites) for n in linear) + sum(
        len(_CONVOLUTION.findall(r.after)) for r in rewrites
    )
    remaining = [n for n in norms if _left(n, outcome.norms, rewrites)]
    for r in rewrites:
        if " = batchnorm " in r.after:
            remaining.append(f"in {r.where}, among {', '.join(n for n in norms if _taken(n, r)) or r.where}")
    faults = []
    if remaining:
        faults.append(f"BatchNorm left: {', '.join(remaining)}")
    if count > allowed:
        faults.append(f"{count} convolutions or linear layers left, {allowed} allowed")
    if not faults:
        return []
    return [f"  {name} no longer fuses: {'; '.join(faults)}", *_reasons(outcome.report, inside)]


def _faults_of_all(report: Report, max_conv: int | None, no_batchnorm: bool) -> list[str]:
    faults = []
    if no_batchnorm and report.after.batchnorm:
        faults.append(f"  {report.after.batchnorm} BatchNorm left, none allowed")
    if max_conv is not None and report.after.conv > max_conv:
        faults.append(f"  {report.after.conv} convolutions left, {max_conv} allowed")
    return faults + _reasons(report, lambda name: True) if faults else []


def _reasons(report: Report, inside: Callable[[str], bool], most: int = 8) -> list[str]:
    """The refusals of a part; those of the whole model, if none has a name of that part."""
    near: list[Refusal] = [k for k in report.kept if inside(k.where)] or report.kept
    lines = [f"    {k.where}: {k.reason} ({k.name})" for k in near[:most]]
    if len(near) > most:
        lines.append(f"    and {len(near) - most} more")
    return lines or ["    nothing was declined: no pass knows this structure"]


def _inside(part: str, separators: str) -> Callable[[str], bool]:
    """Whether a name is ``part`` or below it; the empty name is the whole model."""
    stem = part.rstrip(separators)
    return lambda name: not stem or name == stem or (name.startswith(stem) and name[len(stem)] in separators)


def _taken(name: str, rewrite: Rewrite) -> int:
    """How many calls of a layer went into ``rewrite``; by its parameters, where operators have other names."""
    return rewrite.operators.count(name) or int(any(p.startswith(f"{name}.") for p in rewrite.parameters))


def _left(name: str, calls: Counter[str], rewrites: Iterable[Rewrite]) -> int:
    """How many calls of a layer no rewrite took."""
    return max(calls[name] - sum(_taken(name, r) for r in rewrites), 0)
