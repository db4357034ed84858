"""Which state of a tensor a node of a traced module reads, where others write into its memory.

A *family* is the nodes that may share memory. Where all that writes into it does so through the whole tensor, or
through a slice that nothing else reads, every write makes a new *state*, and a reader sees the last one before it: then
each state is one value, as if nothing was written in place. Other families are *unsafe*.
"""

from __future__ import annotations

import operator

from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from reparamc.certificate.fx_calls import attribute, name_of

VIEWS = {
    "reshape", "view", "flatten", "permute", "transpose", "t", "squeeze", "unsqueeze", "unflatten", "getitem", "narrow",
    "split", "chunk", "detach", "expand", "contiguous", "identity", "select", "slice", "view_as", "reshape_as", "to",
    "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "expand_as", "broadcast_to", "unbind",
    "tensor_split", "split_with_sizes", "swapaxes", "swapdims", "movedim", "moveaxis", "ravel", "unfold", "diagonal",
    "as_strided", "alias", "positive", "real", "imag", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "alpha_dropout", "feature_dropout", "_unsafe_view", "_reshape_alias", "lift_fresh", "adjoint",
}  # fmt: skip
"""Operators whose result may share memory with their first operand."""

VIEWING_MODULES = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)  # fmt: skip

IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem, operator.ifloordiv, operator.imod,
    operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.ilshift, operator.irshift,
}  # fmt: skip

_AS_METHODS = {f"__{function.__name__}__" for function in IN_PLACE}

RESHAPING = {
    "squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "resize_", "resize_as_", "set_",
    "as_strided_", "detach_",
}  # fmt: skip
"""Operators that change what a tensor is, not what is in it."""


_WITH_INPLACE = {
    "celu", "dropout", "elu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "relu6", "selu",
    "silu",
}  # fmt: skip
"""Functions whose last argument says whether they write into the first."""


def written_by(node: fx.Node, module: fx.GraphModule) -> list[fx.Node]:
    """The operands into which a node may write."""
    out = node.kwargs.get("out")
    if out is not None:
        return [n for n in (out if isinstance(out, list | tuple) else [out]) if isinstance(n, fx.Node)]
    if isinstance(node.target, HigherOrderOperator):
        graphs = [n for n in node.all_input_nodes if n.op == "get_attr"]
        quiet = all(_is_quiet(attribute(module, str(n.target))) for n in graphs)
        return [] if graphs and quiet else [n for n in node.all_input_nodes if n not in graphs]
    if _is_mutating(node.target):
        return list(node.all_input_nodes)
    if not _writes(node, module):
        return []
    first = node.args[0] if node.args else node.kwargs.get("input")
    return [first] if isinstance(first, fx.Node) else node.all_input_nodes


def _is_quiet(called: object) -> bool:
    """Whether an operator calls a graph that writes nothing, and returns nothing that it was given; or a tensor."""
    if not isinstance(called, fx.GraphModule):
        return isinstance(called, Tensor)
    given: set[fx.Node] = set()
    for node in called.graph.nodes:
        if isinstance(node.target, HigherOrderOperator) or written_by(node, called):
            return False
        if node.op in ("placeholder", "get_attr") or (_is_view(node, called) and node.args[0] in given):
            given.add(node)
        elif node.op == "output" and not given.isdisjoint(node.all_input_nodes):
            return False
    return True


def _writes(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether a node may write into its first operand."""
    if node.op == "call_module":
        return bool(getattr(attribute(module, str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = name_of(node)
    return (
        node.target in IN_PLACE
        or (node.op == "call_method" and name in _AS_METHODS)
        or (name.endswith("_") and not name.endswith("__"))
        or bool(node.kwargs.get("inplace"))
        or (len(node.args) > 1 and node.args[-1] is True and name in _WITH_INPLACE)
    )


def _is_mutating(target: object) -> bool:
    """Whether an operator of another library is declared to write into what it is given."""
    if isinstance(target, OpOverload):
        return target.namespace not in ("aten", "prims") and target._schema.is_mutable
    return isinstance(target, OpOverloadPacket) and any(_is_mutating(getattr(target, o)) for o in target.overloads())


def _is_view(node: fx.Node, module: fx.GraphModule) -> bool:
    if node.op == "call_module":
        inner = attribute(module, str(node.target))
        return isinstance(inner, VIEWING_MODULES) or not type(inner).__module__.startswith("torch.nn.")
    if node.target is getattr:
        return node.args[1] in ("T", "mT", "H", "mH", "data", "real", "imag")
    return name_of(node) in VIEWS or _is_mutating(node.target)


class Memory:
    """What is written where in a traced module.

    Attributes:
        written: all nodes of families that are written into.
        unsafe: those that some reader may see in another state than the nodes say.
        lasting: the nodes that write into arguments, which outlive a call.
        attributes: whether parameters or buffers are written into.
        events: for a node of an unsafe family, all that happens to this family, in order.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.position = {node: at for at, node in enumerate(module.graph.nodes)}
        self.writes = {node: found for node in self.position if (found := written_by(node, module))}
        self.written: set[str] = set()
        self.unsafe: set[str] = set()
        self.lasting: list[str] = []
        self.attributes = False
        self.events: dict[str, tuple[object, ...]] = {}
        self.parts: dict[fx.Node, fx.Node] = {}
        """By a slice that is there to be written: what it is a slice of."""
        self.roots: dict[str, str] = {}
        """By a write that makes a new state: the node that made the first."""
        self._states: dict[fx.Node, list[fx.Node]] = {}
        if self.writes:
            self._explore()

    def seen(self, operand: fx.Node, reader: fx.Node) -> fx.Node:
        """The node that makes the state of ``operand`` which ``reader`` sees."""
        states = self._states.get(operand)
        if states is None:
            return operand
        at = self.position[reader]
        return max((s for s in states if self.position[s] < at), key=self.position.__getitem__)

    def whole(self, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """The tensor that a node is a slice of, to be written, and all slices on the way."""
        slices: list[fx.Node] = []
        while node in self.parts:
            slices.append(node)
            node = self.parts[node]
        return node, slices

    def _explore(self) -> None:
        base: dict[fx.Node, object] = {}
        families: dict[object, list[fx.Node]] = {}
        for node in self.position:
            shared = self.writes.get(node) or (_is_view(node, self.module) and node.all_input_nodes)
            if shared:
                base[node] = base[shared[0]]
            elif node.op == "get_attr" and isinstance(held := attribute(self.module, str(node.target)), Tensor):
                base[node] = ("attribute", held.untyped_storage().data_ptr())
            else:
                base[node] = node
            families.setdefault(base[node], []).append(node)
        by_family: dict[object, list[fx.Node]] = {}
        for node, operands in self.writes.items():
            for operand in operands:
                by_family.setdefault(base[operand], []).append(node)
        for key, writes in by_family.items():
            self._enter(families[key], writes)

    def _enter(self, family: list[fx.Node], writes: list[fx.Node]) -> None:
        root = family[0]
        self.written.update(n.name for n in family)
        if root.op == "placeholder":
            self.lasting += [w.name for w in writes]
        self.attributes |= root.op == "get_attr"
        if not any(self._is_read_late(member, write) for write in writes for member in family):
            return
        states = self._stated(family, writes)
        if states is None:
            events = sorted({*family, *(u for n in family for u in n.users)}, key=self.position.__getitem__)
            self.unsafe.update(n.name for n in family)
            self.events.update(dict.fromkeys((n.name for n in events), tuple((e.name, str(e.target)) for e in events)))
            return
        self._states.update(states)
        self.roots.update((w.name, root.name) for w in writes)

    def _is_read_late(self, member: fx.Node, write: fx.Node) -> bool:
        """Whether a node that was there before a write is read after it."""
        at = self.position[write]
        return self.position[member] < at and any(self.position[u] > at for u in member.users)

    def _stated(self, family: list[fx.Node], writes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]] | None:
        """The states that the nodes of a family have, by node; None where they are no whole tensors."""
        root, last = family[0], self.position[writes[-1]]
        whole, parts = {root}, dict[fx.Node, fx.Node]()
        if root.op == "get_attr" or any(len(self.writes[w]) != 1 or "out" in w.kwargs for w in writes):
            return None
        for node in family[1:]:
            if node in self.writes:
                (target,) = self.writes[node]
                if name_of(node) in RESHAPING or not (target in whole or target in parts):
                    return None
                if target in parts or node.target is operator.setitem:
                    if node.users:
                        return None
                else:
                    whole.add(node)
            elif self._is_part(node) and (node.args[0] in whole or node.args[0] in parts):
                parts[node] = node.args[0]  # pyright: ignore[reportArgumentType]
            elif self.position[node] < last:
                return None
        self.parts.update(parts)
        states = [root, *writes]
        return dict.fromkeys(whole, states)

    def _is_part(self, node: fx.Node) -> bool:
        """Whether a node is a slice, or one of several of one another, that is copied into at once, and not read."""
        while node.target is operator.getitem or (node.op == "call_function" and name_of(node) == "slice"):
            if len(node.users) != 1:
                return False
            (user,) = node.users
            if user.args[0] is not node:
                return False
            if name_of(user) == "copy_":
                return True
            node = user
        return False
