"""Do two ONNX models have the same inputs and outputs? Before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from onnx import ModelProto

from reparamc.equivalence.trials import Slot
from reparamc.onnx.session import free_inputs
from reparamc.verify.arrays import slot, slots


@dataclass
class Interface:
    """How the inputs and outputs of two models belong together.

    Attributes:
        inputs: those of the original.
        inputs_in_fused: name in the original to name in the fused model.
        outputs: names in the original; the fused model gives the same ones in the same order.
        problem: why a caller of the original cannot call the fused model; empty if one can.
        notes: what differs without harm.
    """

    inputs: list[Slot]
    inputs_in_fused: dict[str, str] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    problem: str = ""
    notes: list[str] = field(default_factory=list)


def compare_interfaces(original: ModelProto, fused: ModelProto) -> Interface:
    """Match inputs and outputs by their place.

    Number, order, dtypes and ranks must agree, and the fused model must take every size that the original
    declares. Other names alone are a note.

    Raises:
        InputError: the original has an input that is no tensor.
    """
    found = Interface(slots(original), outputs=[o.name for o in original.graph.output])
    if any(not v.type.HasField("tensor_type") for v in free_inputs(fused)):
        found.problem = "an input of the fused model is no tensor"
        return found
    theirs = slots(fused)
    outputs = [o.name for o in fused.graph.output]
    found.problem = _names("input", [s.name for s in found.inputs], [s.name for s in theirs], found.notes)
    found.problem = found.problem or _names("output", found.outputs, outputs, found.notes)
    if found.problem:
        return found
    for a, b in zip(found.inputs, theirs, strict=True):
        found.problem = found.problem or _input(a, b, found.notes)
    for a, b in zip(original.graph.output, fused.graph.output, strict=True):
        if a.type.HasField("tensor_type") and b.type.HasField("tensor_type"):
            x, y = slot(a), slot(b)
            problem = _declared("output", x, y, x.ranked and y.ranked, found.notes)
        else:
            same = a.type.WhichOneof("value") == b.type.WhichOneof("value")
            problem = "" if same else f"output {a.name!r} is of another kind in the fused model"
        found.problem = found.problem or problem
    found.inputs_in_fused = {a.name: b.name for a, b in zip(found.inputs, theirs, strict=True)}
    return found


def _names(what: str, ours: Sequence[str], theirs: Sequence[str], notes: list[str]) -> str:
    missing = [n for n in ours if n not in theirs]
    more = [n for n in theirs if n not in ours]
    if len(ours) != len(theirs):
        odd = f"lacks {what} {missing[0]!r}" if missing else f"has one more {what}, {more[0]!r}" if more else "differs"
        return f"the fused model {odd}: the original has {len(ours)} {what}s, the fused model {len(theirs)}"
    for place, name in enumerate(ours):
        if name in theirs and theirs.index(name) != place:
            return (
                f"the {what}s come in another order: {_list(ours)} in the original, {_list(theirs)} in the fused model"
            )
    if missing:
        renamed = [f"{a!r} is {b!r}" for a, b in zip(ours, theirs, strict=True) if a != b]
        notes.append(f"{what}s of other names are matched by their place: {', '.join(renamed)} in the fused model")
    return ""


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _input(ours: Slot, theirs: Slot, notes: list[str]) -> str:
    if problem := _declared("input", ours, theirs, ours.ranked and theirs.ranked, []):
        return problem
    if theirs.ranked and not ours.ranked:
        return f"the fused model takes input {theirs}, where the original takes {ours}"
    for a, b in zip(ours.dims, theirs.dims, strict=theirs.ranked):
        if isinstance(b, int) and a != b:
            return f"the fused model takes input {theirs}, where the original takes {ours}"
    pairs = zip(ours.dims, theirs.dims, strict=theirs.ranked)
    if ours.ranked > theirs.ranked or any(isinstance(a, int) and isinstance(b, str) for a, b in pairs):
        notes.append(
            f"the fused model declares {theirs}, which is wider than {ours}; what the original takes was tried"
        )
    return ""


def _declared(what: str, ours: Slot, theirs: Slot, ranks: bool, notes: list[str]) -> str:
    """Dtypes and, where both declare them, ranks; other sizes of an output are a note: the arrays are compared."""
    if ours.dtype != theirs.dtype:
        return f"{what} {ours.name!r} is {ours.kind} in the original and {theirs.kind} in the fused model"
    if ranks and len(ours.dims) != len(theirs.dims):
        return (
            f"{what} {ours.name!r} has {len(ours.dims)} axes in the original and {len(theirs.dims)} in the fused model"
        )
    pairs = zip(ours.dims, theirs.dims, strict=False)
    if ranks and any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
        notes.append(f"declared sizes differ: {ours} in the original, {theirs} in the fused model")
    return ""
