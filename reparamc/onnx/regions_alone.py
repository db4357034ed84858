"""Each region of a rewritten ONNX model alone, in ONNX Runtime, fed with the original's own values.

The result is cut where a region ends: what reads the region reads an input instead, which is given the value that the
original computes there. So every region starts from the same numbers in both models, and no difference grows
from one to the next, however the model amplifies rounding. One run of each model shows all regions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import ModelProto, ValueInfoProto, helper

from reparamc.equivalence.end_to_end import Alone, Region
from reparamc.onnx.reference import float64, in_float64
from reparamc.onnx.session import session
from reparamc.onnx.values import constant_tensor, defined_names, opset_of
from reparamc.onnx.weights import array


def run_alone(
    original: ModelProto, result: ModelProto, regions: Sequence[Region], inputs: Mapping[str, np.ndarray], seed: int = 0
) -> Alone | None:
    """Every region, and every output, from the values that the original has before it; None if ONNX Runtime fails.

    The values of all roots and operands are held, and one model at a time.
    """
    computed = {name for node in original.graph.node for name in node.output}
    left = {name for node in result.graph.node for name in node.output}
    roots = [r.root for r in regions if r.root in left]  # others have become dead
    outputs = [o.name for o in original.graph.output]
    if not roots:
        return None
    operands = [v for v in dict.fromkeys(o for r in regions for o in r.operands) if v in computed]
    try:
        with session(showing(original, [*roots, *operands]), "the model") as run:
            expected, narrowed = run(inputs), run.narrowed
        given = {operand: expected[operand] for operand in operands}
        cut, names = cut_at(showing(original, roots), given)
        with session(cut, "the model, cut before its regions") as run:
            noises = [_named(run(run.perturbed({**inputs, **given}, seed + n)), names) for n in range(2)]
        given = {root: expected[root] for root in roots}
        cut, names = cut_at(result, given)
        with session(cut, "the rewritten model, cut after its regions", narrowed=narrowed) as run:
            actual = _named(run({**inputs, **given}), names)
    except Exception:  # ONNX Runtime's exceptions share no base class
        return None
    assert set(actual) >= {*roots, *outputs}
    values = {**inputs, **expected}
    return Alone(values, actual, noises, lambda region: _exact(original, region, values))


def _exact(original: ModelProto, region: Region, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the nodes of a region give in float64, from ``values``; may raise anything."""
    nodes = list(original.graph.node)
    places = {name: place for place, node in enumerate(nodes) for name in node.output}
    stored = {t.name: t for t in original.graph.initializer}
    stored |= {n.output[0]: t for n in nodes if n.op_type == "Constant" and (t := constant_tensor(n)) is not None}
    given = {name for name in values if name not in places} | {*region.operands}
    needed: set[int] = set()
    stack = [region.root]
    while stack:
        name = stack.pop()
        if name and name not in given and name not in stored and (place := places[name]) not in needed:
            needed.add(place)
            stack += nodes[place].input
    found = {name: float64(values[name]) for name in given}
    for node in (nodes[place] for place in sorted(needed)):
        constants = {n: array(stored[n]) for n in node.input if n in stored and n not in found}
        for output in filter(None, node.output):
            run = in_float64(node, output, constants, opset_of(original), original.ir_version)
            found[output] = run(found)
    return found[region.root]


def _named(values: Mapping[str, np.ndarray], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    return {name: values[names.get(name, name)] for name in {*values, *names} if names.get(name, name) in values}


def showing(model: ModelProto, roots: Sequence[str]) -> ModelProto:
    """``model`` with ``roots`` as outputs besides its own."""
    copy = ModelProto()
    copy.CopyFrom(model)
    known = {o.name for o in copy.graph.output}
    copy.graph.output.extend(ValueInfoProto(name=root) for root in dict.fromkeys(roots) if root not in known)
    return copy


def cut_at(model: ModelProto, given: Mapping[str, np.ndarray]) -> tuple[ModelProto, dict[str, str]]:
    """``model`` with the values ``given`` as inputs, and what it computes there itself as outputs, by their names."""
    copy = ModelProto()
    copy.CopyFrom(model)
    taken = set(defined_names(copy.graph))
    names: dict[str, str] = {}
    for root in given:
        name = f"{root}/computed"
        while name in taken:
            name += "_"
        names[root] = name
    for node in copy.graph.node:
        for i, name in enumerate(node.output):
            node.output[i] = names.get(name, name)
    for info in [v for v in copy.graph.value_info if v.name in names]:
        copy.graph.value_info.remove(info)
    for info in copy.graph.output:
        info.name = names.get(info.name, info.name)
    known = {o.name for o in copy.graph.output}
    copy.graph.output.extend(ValueInfoProto(name=name) for name in names.values() if name not in known)
    for root, value in given.items():
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        copy.graph.input.append(helper.make_tensor_value_info(root, kind, None))
    return copy, names
