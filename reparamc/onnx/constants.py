"""Constant folding on ONNX graphs: operators whose operands are all constant are computed once, now.

A node is folded when it is deterministic, its result is beyond doubt (see `exact`) or two independent sources agree on
it (see `witnesses`), and what takes the place of a constant takes no more bytes than that (small results always may):
the file never grows. The sizes of a value that are known count as constant, also where
others are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from math import prod
from typing import cast

import numpy as np
from onnx import ModelProto, NodeProto, helper

from reparamc.algebra.records import lazy
from reparamc.certificate.onnx_bounds import bodies
from reparamc.onnx.exact import exactly
from reparamc.onnx.values import (
    SMALL,
    Constant,
    Constants,
    Types,
    attribute,
    captured,
    commit,
    is_placed,
    is_standard,
    itemsize,
    opset_of,
    read_elsewhere,
    users,
)
from reparamc.onnx.weights import tensor

LEFT = {
    "Constant", "Identity", "DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear",
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
    "Dropout", "Optional", "SequenceConstruct", "SequenceEmpty", "StringNormalizer",
}  # fmt: skip
"""Not deterministic, inflating, without tensor results, or constant as they are. Quantised weights stay quantised."""

MOVES = {"Concat", "Flatten", "Reshape", "Shape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators that cannot inflate; others are folded only when the size of the result is known beforehand."""

SPELLED = {"ConstantOfShape": 0, "Expand": 1}
"""Operators whose result has the sizes that an operand spells out, and the position of that operand."""

SMALL_BYTES, SCALAR_BYTES = 4 * SMALL, 8


def fold_constants(model: ModelProto, small: int = SMALL_BYTES) -> list[str]:
    """Fold the constant operators of the main graph in place; what those that were folded computed.

    ``small``: bytes that a parameter may take in any case.
    """
    names, result, _ = folded(model, cache(partial(Types, model)), small, Constants(model))
    if names:
        model.CopyFrom(result)
    return names


def folded(
    model: ModelProto, types: Callable[[], Types], small: int, constants: Constants
) -> tuple[list[str], ModelProto, Callable[[], Types]]:
    """As `fold_constants`, in a copy if there is anything to fold; and the types of what comes of ``model``.

    Args:
        types: of its values; they are asked for only if something may be folded.
        constants: of ``model``.
    """
    total: list[str] = []
    result = model
    while found := _Foldable(result, types, small, constants).values():
        if result is model:
            result = ModelProto()
            result.CopyFrom(model)
        names = _replaced(result, found)
        total += names
        told = types().tells_all or not any(node.op_type in ("Shape", *SPELLED) for node in result.graph.node)
        types = types if types().tells_all else cache(partial(Types, result))
        if told or not names:
            break  # nothing more can have become known
        constants = Constants(result)
    return total, result, types


def _replaced(model: ModelProto, values: Mapping[str, np.ndarray]) -> list[str]:
    """Have ``model`` hold ``values`` where it computes all results of a node; the first of each such node."""
    kept, folded = [], []
    for node in model.graph.node:
        done = all(name in values for name in node.output[:] if name)
        (folded if done and any(node.output[:]) else kept).append(node)
    if folded:
        read = {name for node in kept for name in (*node.input[:], *captured(node))}
        fed = {name for node in folded for name in node.input[:]}
        fresh = [tensor(a, name) for name, a in values.items() if name in read]
        commit(model, kept, fresh, fed)
    return [_first(node) for node in folded]


def _first(node: NodeProto) -> str:
    return next(filter(None, node.output), "")


class _Foldable:
    """The nodes of a main graph that can be computed now.

    Attributes:
        apart: constants from which nothing is computed.
        nodes: those that have to be computed, in execution order; a CastLike as the Cast that it is.
        shapes: what the known sizes of values tell, without being computed.
        sizes: bytes of every constant, those to be computed included.
    """

    def __init__(self, model: ModelProto, types: Callable[[], Types], small: int, constants: Constants) -> None:
        self.model, self.constants, self._types, self.small = model, constants, types, small
        self.apart: set[str] = set()
        self._outputs = {o.name for o in model.graph.output} | read_elsewhere(model)

    @lazy
    def types(self) -> Types:
        return self._types()

    def _collect(self) -> None:
        self.nodes: list[NodeProto] = []
        self.shapes: dict[str, np.ndarray] = {}
        self.sizes = {name: _bytes(c) for name, c in self.constants.known.items() if c.stored}
        partly: dict[str, np.ndarray] = {}  # results of Shape of which some sizes are unknown
        for node in self.model.graph.node:
            if not is_standard(node) or node.op_type in LEFT or bodies(node) or is_placed(node):
                continue
            if self._outputs.isdisjoint(node.output[:]) and not self._is_told(node, partly):
                self._consider(node)

    def _is_told(self, node: NodeProto, partly: dict[str, np.ndarray]) -> bool:
        """Whether known sizes of values tell the result of ``node``; it is then among `shapes`."""
        if node.op_type == "Shape":
            found = _sizes_of(node, self.types)
        elif node.op_type in ("Gather", "Slice") and node.input[0] in partly:
            found = _picked(node, partly[node.input[0]], self.constants)
        else:
            return False
        if found is None:
            return False
        name = node.output[0]
        if all(n is not None for n in found.flat):
            self.shapes[name] = found.astype(np.int64)
            self.sizes[name] = self.shapes[name].nbytes
            return True
        if node.op_type == "Shape":
            partly[name] = found
        return False

    def _consider(self, node: NodeProto) -> None:
        node = self._plain_cast(node)
        given = [name for name in node.input[:] if name]
        if not given or not all(name in self.sizes for name in given) or not self.apart.isdisjoint(given):
            return
        room = max(sum(self.sizes[name] for name in set(given)), self._small(node.output[0]))
        outputs = [name for name in node.output[:] if name]
        sizes = [self._size(node, name, sum(self.sizes[name] for name in given)) for name in outputs]
        if outputs and all(size is not None and size <= room for size in sizes):
            self.sizes.update(zip(outputs, (s or 0 for s in sizes), strict=True))
            self.nodes.append(node)

    def _plain_cast(self, node: NodeProto) -> NodeProto:
        """A CastLike as a Cast, where the type that it casts to is known."""
        if node.op_type != "CastLike" or (kind := self.types.element_type(node.input[1])) is None:
            return node
        return helper.make_node("Cast", node.input[:1], node.output, node.name, to=kind)

    def _size(self, node: NodeProto, name: str, given: int) -> int | None:
        """Bytes of the result ``name``; ``given`` when unknown but bounded by the operands; None when unknown."""
        if (sizes := self.types.sizes(name)) is not None:
            return prod(sizes) * itemsize(self.types.element_type(name))
        if node.op_type in SPELLED and (spelled := self._whole_numbers(node.input[SPELLED[node.op_type]])) is not None:
            return prod([abs(n) for n in spelled]) * max(self.sizes[node.input[0]], itemsize(None))
        return given if node.op_type in MOVES else None

    def _small(self, name: str) -> int:
        """Bytes that do not count; whole numbers are no parameters, and neither are scalars."""
        return max(self.small, SCALAR_BYTES) if self.types.dtype(name) is not None else SMALL_BYTES

    def _whole_numbers(self, name: str) -> list[int] | None:
        """The entries of a vector that is known already; None where it is still to be computed."""
        known = self.shapes.get(name, self.constants.array(name) if name in self.constants else None)
        return known.ravel().tolist() if known is not None and known.dtype.kind in "iu" else None

    def _growing(self, uses: Mapping[str, Sequence[NodeProto | None]]) -> set[str]:
        """The large constants that take less room than their shares of what is made of them, or stay beside that."""
        made = {_first(node): sum(self.sizes[name] for name in node.output[:] if name) for node in self.nodes}
        found: set[str] = set()
        for name in {name for node in self.nodes for name in node.input[:]}:
            size, shares, stays = self.sizes.get(name, 0), 0.0, False
            for user in uses.get(name, []) if size > self._small(name) else []:
                result = made.get(_first(user), 0) if user is not None else 0
                stays = stays or user is None or (_first(user) not in made and _first(user) not in self.shapes)
                if user is not None and result > self._small(name):
                    shares += result * size / sum(self.sizes.get(n, 0) for n in user.input)
            if shares > size * (1 + 1e-9) or (stays and shares):
                found.add(name)
        return found

    def values(self) -> dict[str, np.ndarray]:
        """The results of all that can be folded, without those whose sources disagree.

        What is beyond doubt takes no sources: ONNX Runtime and the reference are not even imported for it.
        """
        self._collect()
        if not self.nodes and not self.shapes:
            return {}
        uses = users(self.model.graph)
        while not (growing := self._growing(uses)) <= self.apart:
            self.apart |= growing
            self._collect()
        known = self.constants.copied()
        for name, sizes in self.shapes.items():
            known.enter(name, sizes)
        found, left = dict(self.shapes), list[NodeProto]()
        for node in self.nodes:
            name = node.output[0]
            if not name:
                left.append(node)
                continue
            if not known.follow(node) and all(n in known for n in node.input[:]):
                known.enter(name, exactly(node, map(known.array, node.input)))
            if name in known:
                found[name] = known.array(name)
            else:
                left.append(node)
        if not left:
            return found
        from reparamc.onnx.witnesses import computed

        given = {n: known.array(n) for node in left for n in node.input[:] if n in known}
        kinds = {name: self.types.dtype(name) for node in left for name in node.output[:]}
        return found | computed(left, given, opset_of(self.model), self.sizes, kinds)


def _sizes_of(node: NodeProto, types: Types) -> np.ndarray | None:
    """What a Shape gives, with None for a size that is unknown; None where the rank is."""
    shape = types.shape(node.input[0])
    if shape is None:
        return None
    first, last = cast(int, attribute(node, "start", 0)), cast("int | None", attribute(node, "end"))
    return np.array([dim.known for dim in shape[first:last]], dtype=object)


def _picked(node: NodeProto, sizes: np.ndarray, constants: Constants) -> np.ndarray | None:
    """What a Gather or Slice takes of the vector ``sizes``; None where its own operands are not known, or wrong."""
    if any(name and name not in constants for name in node.input[1:]) or len(node.input) < 2:
        return None
    given = [constants.array(name) if name else None for name in node.input[1:]]
    index = given[0]
    try:
        if node.op_type == "Slice":
            start, end, _, step = (None if a is None else a.item() for a in [*given, None, None][:4])
            in_range = start is not None and end is not None and -len(sizes) <= start and end < len(sizes)
            if step is not None and step < 0 and not in_range:
                return None  # the standard and runtimes do not agree on it
            index = slice(start, end, step)
        return np.asarray(sizes[index], dtype=object)
    except (IndexError, ValueError):
        return None


def _bytes(constant: Constant) -> int:
    return prod(constant.dims) * itemsize(constant.element_type)
