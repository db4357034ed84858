"""Certificates of traced torch modules: how each operator is read as an affine map, from torch's documentation alone.

See `reparamc.certify` for what is proven, and `reparamc.normal_form` for the algebra. Modules are read by their exact
type, functions and methods by what they are; all else is an atom. Nodes keep their names where nothing is rewritten;
what replaces a node says in its metadata which one (`STANDS_FOR`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import reparamc.normal_form as nf
from reparamc.agreement import Precision
from reparamc.certify import Certificate, Window, certify
from reparamc.normal_form import Array, Kernel, Value
from reparamc.views import Extent, Unrepresentable

STANDS_FOR = "stands_for"
"""The key in the metadata of a node under which stands the name of the node that it replaces."""

PRECISIONS = {
    torch.float64: Precision(2.0**-53, 2.0**-1075),
    torch.float32: Precision(2.0**-24, 2.0**-150),
    torch.float16: Precision(2.0**-11, 2.0**-25),
    torch.bfloat16: Precision(2.0**-8, 2.0**-134),
}

Shapes = Mapping[str, tuple[Extent, ...]]


def certify_fx(
    original: fx.GraphModule, result: fx.GraphModule, shapes: Shapes | None = None, dtype: torch.dtype | None = None
) -> Certificate:
    """Prove that ``result`` computes what ``original`` does, for every input size.

    Args:
        original, result: traced modules; ``original`` as it was before anything was rewritten.
        shapes: of the nodes of ``original``, by name; see `shapes_of`. Without them the operators alone tell ranks.
        dtype: in which parameters are stored; by default that of the first of them.
    """
    stored = dtype or next((p.dtype for p in result.parameters() if p.is_floating_point()), torch.float32)
    precision = PRECISIONS.get(stored, PRECISIONS[torch.float32])
    before = _Side(original, dict(shapes or {}))
    after = _Side(result, {})
    computed = {*before.order, *before.inputs}
    stands_for = {name: name for name in (*after.order, *after.inputs) if name in computed}
    for node in result.graph.nodes:
        meant = node.meta.get(STANDS_FOR)
        if meant in computed and node.name in after.positions and node.name not in computed:
            stands_for[node.name] = meant
    after.shapes.update({name: before.shapes[meant] for name, meant in stands_for.items() if meant in before.shapes})
    outside: list[Window] = []
    if [(n.name, n.args) for n in _inputs(original)] != [(n.name, n.args) for n in _inputs(result)]:
        outside.append(Window("input", "different", np.inf, np.inf, "the arguments differ"))
    returned = [_returned(m) for m in (original, result)]
    if returned[0][1] != returned[1][1]:
        outside.append(Window("output", "different", np.inf, np.inf, "the structure that is returned differs"))
        return certify(before, after, [], stands_for, lambda _: precision, outside)
    outputs = list(zip(returned[0][0], returned[1][0], strict=True))
    return certify(before, after, outputs, stands_for, lambda _: precision, outside)


def _inputs(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def _returned(module: fx.GraphModule) -> tuple[list[str], Any]:
    """The names of the nodes that are returned, and the structure around them."""
    (output,) = module.graph.find_nodes(op="output")
    leaves, spec = pytree.tree_flatten(_plain(output.args))
    names = [leaf.name for leaf in leaves if isinstance(leaf, fx.Node)]
    return names, (spec, [None if isinstance(leaf, fx.Node) else leaf for leaf in leaves])


def _plain(value: Any) -> Any:
    """``value`` with torch.fx's own containers as Python's."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(v) for v in value) if type(value) in (list, tuple) else [_plain(v) for v in value]
    return value


# Shapes


def shapes_of(module: fx.GraphModule, args: Sequence[Any]) -> dict[str, tuple[Extent, ...]]:
    """The shapes of all nodes of a traced module, from runs on ``args`` and on others of another size.

    An extent that is the same in both is known, what varies is a symbol. All are known if no other size is taken.
    """
    first = _recorded(module, args)
    second: dict[str, tuple[int, ...]] = {}
    for spatial, batch in ((32, 1), (0, 1)):
        try:
            second = _recorded(module, [_resized(a, spatial, batch) for a in args])
        except Exception:  # whatever a module raises that knows one size only
            continue
        if second.keys() == first.keys() and all(len(second[n]) == len(first[n]) for n in first):
            break
        second = {}
    found = {}
    for name, shape in first.items():
        other = second.get(name, shape)
        found[name] = tuple(
            Extent(m) if m == n else Extent(1, (f"{m}|{n}",)) for m, n in zip(shape, other, strict=True)
        )
    return found


def _resized(value: Any, spatial: int, batch: int) -> Any:
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    shape = [value.shape[0] + batch, value.shape[1], *(n + spatial for n in value.shape[2:])]
    return value.new_ones(shape) if not value.is_floating_point() else torch.randn(shape).to(value)


def _recorded(module: fx.GraphModule, args: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    recorder = _Recorder(module)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        recorder.run(*(a.clone() if isinstance(a, Tensor) else a for a in args))
    return recorder.found


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n.name] = tuple(value.shape)
        return value


# Nodes


VIEWS = {
    "reshape", "view", "flatten", "permute", "transpose", "t", "squeeze", "unsqueeze", "unflatten", "getitem", "narrow",
    "split", "chunk", "detach", "expand", "contiguous", "identity", "select", "slice", "view_as", "reshape_as",
}  # fmt: skip
"""Operators whose result may share memory with their operand."""

ON_PARAMETERS = {"conv", "convolution", "conv_transpose", "linear", "matmul", "add", "sub", "mul"}
"""Operators that are linear in parameters, so that they are off by as much as these."""

RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal_", "uniform_", "empty")
"""Parts of names of operators whose result is not decided by their operands."""


class _Size:
    """An extent of a node: what ``x.size(axis)`` and its like read."""

    def __init__(self, node: fx.Node, axis: int) -> None:
        self.node, self.axis = node, axis


class _Computed(NamedTuple):
    """A constant as the module computes it, and as it would be without rounding on the way."""

    stored: Any
    exact: Any


def _called(node: fx.Node, operands: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), operands.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]


def _doubled(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)


class _Side:
    """`certify.Side` over a traced module."""

    def __init__(self, module: fx.GraphModule, shapes: dict[str, tuple[Extent, ...]]) -> None:
        self.module, self.shapes = module, shapes
        self.nodes: dict[str, fx.Node] = {n.name: n for n in module.graph.nodes}
        self.positions = {name: at for at, name in enumerate(self.nodes)}
        self.inputs = [n.name for n in _inputs(module)]
        self.sizes: dict[fx.Node, _Size | None] = {}
        self._computed: dict[str, _Computed] = {}
        self.constants = self._constants()
        for node in self.nodes.values():
            self._note_size(node)
        self.order = [
            n.name
            for n in self.nodes.values()
            if n.op.startswith("call_") and n.name not in self.constants and n not in self.sizes
            if not (self._is_cut_up(n) and all(self._is_piece(u) for u in n.users))
        ]
        self.counts: dict[str, int] = {}
        self.ranks = self._ranks()
        self.unsafe = self._unsafe()

    # Constants

    def _constants(self) -> set[str]:
        found: set[str] = set()
        for node in self.nodes.values():
            if node.op == "get_attr":
                if isinstance(_attribute(self.module, str(node.target)), Tensor):
                    found.add(node.name)
            elif node.op in ("call_function", "call_method") and node.all_input_nodes:
                quiet = not any(word in _name(node) for word in RANDOM) and not _writes(node, self.module)
                if quiet and all(n.name in found for n in node.all_input_nodes):
                    found.add(node.name)
        return found

    def constant(self, name: str) -> Array | None:
        tensor = self.tensor(name)
        return None if tensor is None else _array(tensor)

    def tensor(self, name: str) -> Tensor | None:
        """A constant in its own dtype."""
        if name not in self.constants:
            return None
        stack = [name]
        while stack:
            node = self.nodes[stack[-1]]
            if node.name in self._computed:
                stack.pop()
                continue
            waiting = [n.name for n in node.all_input_nodes if n.name not in self._computed]
            if waiting:
                stack.extend(waiting)
                continue
            self._computed[node.name] = self._compute(node)
        found = self._computed[name].stored
        if not isinstance(found, Tensor):
            raise Unrepresentable(f"the constant {name!r} is no tensor")
        return found

    def _compute(self, node: fx.Node) -> _Computed:
        if node.op == "get_attr":
            tensor = _attribute(self.module, str(node.target))
            return _Computed(tensor, tensor)
        try:
            with torch.no_grad():
                stored = _called(node, {n: self._computed[n.name].stored for n in node.all_input_nodes})
        except Exception as error:
            raise Unrepresentable(f"the constant {node.name!r} cannot be computed") from error
        try:
            with torch.no_grad():
                exact = _called(node, {n: _doubled(self._computed[n.name].exact) for n in node.all_input_nodes})
        except Exception:  # an operator mixes what was made double with what was not
            exact = stored
        return _Computed(stored, exact)

    def magnitude(self, name: str) -> Array | None:
        """What a constant that the module computes was added up from, by what rounding did to it; None for others."""
        if self.nodes[name].op == "get_attr" or self.tensor(name) is None:
            return None
        stored, exact = self._computed[name]
        if not isinstance(exact, Tensor) or not stored.is_floating_point() or stored.shape != exact.shape:
            return None
        wide, error = stored.double(), (stored.double() - exact.double()).abs()
        if error.ndim > 1 and error.numel():  # one element may be exact by chance
            error = error.flatten(1).amax(1).view(-1, *[1] * (error.ndim - 1))
        return _array(torch.maximum(wide.abs(), error / (torch.finfo(stored.dtype).eps / 2)))

    # Sizes, ranks, writes

    def _note_size(self, node: fx.Node) -> None:
        """Note a node that reads extents: all of them (None), or one."""
        args = list(node.args)
        first = args[0] if args else None
        if not isinstance(first, fx.Node):
            return
        name = _name(node)
        whole = node.op == "call_method" and name == "size" and len(args) == 1 and not node.kwargs
        if whole or (node.target is getattr and args[1] == "shape"):
            self.sizes[node] = None
        elif name in ("size", "sym_size") and len(args) == 2 and isinstance(args[1], int):
            self.sizes[node] = _Size(first, args[1])
        elif node.target is operator.getitem and first in self.sizes and isinstance(args[1], int):
            source = first.args[0]
            if self.sizes[first] is None and isinstance(source, fx.Node):
                self.sizes[node] = _Size(source, args[1])

    def _ranks(self) -> dict[str, int]:
        """Ranks that the operators themselves tell: those of kernels, and of what keeps them."""
        found = {name: len(shape) for name, shape in self.shapes.items()}
        nodes = list(self.nodes.values())
        for order in (nodes, reversed(nodes), nodes):
            for node in order:
                call = described(node, self.module)
                if call is None or not node.op.startswith("call_"):
                    continue
                first = call.args.get("input")
                given = first.name if isinstance(first, fx.Node) else None
                self._count(node, call, given)
                if call.axes is not None and call.op in ("conv", "conv_transpose", "batch_norm", "avg_pool"):
                    found.setdefault(node.name, call.axes + 2)
                    if given:
                        found.setdefault(given, call.axes + 2)
                elif call.op in ("add", "sub", "mul", "div", "neg", "identity", "dropout", "pad", "same", "batch_norm"):
                    names = [n.name for n in node.all_input_nodes if n.name not in self.constants]
                    known = [found[n] for n in (node.name, *names) if n in found]
                    if known and (len(names) == 1 or len(set(known)) == 1):
                        for n in (node.name, *names):
                            found.setdefault(n, known[0])
        return found

    def _count(self, node: fx.Node, call: Described, given: str | None) -> None:
        """Note how many channels a kernel or a norm reads and gives, where these lie along axis 1."""
        weight = call.args.get("running_mean" if call.op == "batch_norm" else "weight")
        if call.op not in ("conv", "batch_norm") or not isinstance(weight, Tensor):
            return
        self.counts[node.name] = weight.shape[0]
        if given is not None:
            inside = weight.shape[1] * call.args.get("groups", 1) if call.op == "conv" else weight.shape[0]
            self.counts.setdefault(given, inside)

    def _unsafe(self) -> set[str]:
        """Nodes whose memory is written into while somebody may still read them: they are not one value."""
        found: set[str] = set()
        base: dict[str, str] = {}
        families: dict[str, list[fx.Node]] = {}
        for node in self.nodes.values():
            given = node.all_input_nodes
            shares = given and (_name(node) in VIEWS or _writes(node, self.module))
            base[node.name] = base[given[0].name] if shares else node.name
            families.setdefault(base[node.name], []).append(node)
        for node in self.nodes.values():
            if node.all_input_nodes and _writes(node, self.module):
                family = families[base[node.all_input_nodes[0].name]]
                at = self.positions[node.name]
                for member in family:
                    older = self.positions[member.name] < at
                    if older and any(self.positions[u.name] > at for u in member.users):
                        found.update(n.name for n in family)
        return found

    # The protocol

    def _is_cut_up(self, node: fx.Node) -> bool:
        call = described(node, self.module)
        return call is not None and call.op in ("split", "chunk")

    def _is_piece(self, node: fx.Node) -> bool:
        """Whether a node is one of the results of a split."""
        first, index = (*node.args, None, None)[:2]
        return (
            node.target is operator.getitem
            and isinstance(first, fx.Node)
            and isinstance(index, int)
            and self._is_cut_up(first)
        )

    def operands(self, name: str) -> Sequence[str]:
        """Nodes in the order of the arguments; for an extent, the node that it is read from."""
        if not self.nodes[name].op.startswith("call_"):
            return ()
        return [n.name for n in self._flat(self.nodes[name])[0]]

    def _flat(self, node: fx.Node) -> tuple[list[fx.Node], Hashable]:
        """The nodes among the arguments, and a key of all else."""
        given: list[fx.Node] = []
        whole = node.args[0] if self._is_piece(node) else None

        def key(value: Any) -> Hashable:
            if isinstance(value, fx.Node):
                size = self.sizes.get(value, _NOT_A_SIZE)
                if isinstance(size, _Size):
                    given.append(size.node)
                    return ("size", size.axis)
                if size is None:
                    given.append(value.all_input_nodes[0])
                    return "shape"
                if whole is not None and value is whole:
                    return ("split", str(value.target), key(value.args), key(value.kwargs))
                given.append(value)
                return "node"
            if isinstance(value, slice):
                return ("slice", key(value.start), key(value.stop), key(value.step))
            if isinstance(value, Mapping):
                return tuple((k, key(v)) for k, v in value.items())
            if isinstance(value, list | tuple):
                return tuple(key(v) for v in value)
            return (type(value).__name__, repr(value))

        return given, (key(node.args), key(node.kwargs))

    def kind(self, name: str) -> Hashable:
        node = self.nodes[name]
        if not node.op.startswith("call_"):
            return None
        key = self._flat(node)[1]
        target: Any = node.target
        if node.op == "call_module":
            module = _attribute(self.module, str(node.target))
            target = id(module)  # both graphs hold what nothing replaced
        random = node.name if any(word in _name(node) for word in RANDOM) else ""
        return (node.op, target if isinstance(target, int | str) else id(target), key, random)

    def mixes(self, name: str) -> bool:
        call = described(self.nodes[name], self.module)
        return call is not None and call.op in ("conv", "conv_transpose", "linear", "matmul", "addmm", "avg_pool")

    def leaf(self, name: str, known_as: str) -> Value:
        if name in self.unsafe:
            raise Unrepresentable(f"{name!r} is written in place while others read it")
        shape = self.shapes.get(name)
        if shape is None and name in self.ranks:
            shape = tuple(
                Extent(self.counts[name]) if axis == 1 and name in self.counts else Extent(1, (f"{known_as}[{axis}]",))
                for axis in range(self.ranks[name])
            )
        if shape is None:
            raise Unrepresentable(f"the rank of {name!r} is unknown; give example_inputs")
        return nf.leaf(known_as, shape)

    def value(self, name: str, of: Callable[[str], Value]) -> Value:
        node = self.nodes[name]
        if name in self.unsafe:
            raise Unrepresentable(f"{name!r} is written in place while others read it")
        call = described(node, self.module)
        reader = READERS.get(call.op) if call is not None else None
        if call is None or reader is None or not call.plain:
            raise Unrepresentable(f"{_name(node)} is not affine")
        value = reader(_Read(self, call, of))
        if call.op in ON_PARAMETERS and any(
            isinstance(given, fx.Node) and given.name in self.constants and given.op != "get_attr"
            for given in call.args.values()
        ):
            return nf.computed(value, reader(_Read(self, call, of, magnitudes=True)))
        return value


_NOT_A_SIZE = object()


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _array(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.contiguous().numpy()


def _name(node: fx.Node) -> str:
    """The name of a function, a method or an ATen operator, without its overload; the path of a module."""
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.partition("::")[2]
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", "")


IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem, operator.ifloordiv, operator.imod,
    operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.ilshift, operator.irshift,
}  # fmt: skip


def _writes(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether a node may write into its first operand."""
    if node.op == "call_module":
        return bool(getattr(_attribute(module, str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = _name(node)
    return (
        node.target in IN_PLACE
        or (name.endswith("_") and not name.endswith("__"))
        or "out" in node.kwargs
        or bool(node.kwargs.get("inplace"))
        or (
            len(node.args) > 2
            and node.args[-1] is True
            and name in ("relu", "silu", "dropout", "hardswish", "leaky_relu")
        )
    )


# One form for every call


class Described:
    """An operator and its arguments by name. ``plain``: nothing but torch's own forward runs."""

    def __init__(self, op: str, args: dict[str, Any], axes: int | None = None, plain: bool = True) -> None:
        self.op, self.args, self.axes, self.plain = op, args, axes, plain


SIGNATURES: dict[str, tuple[str, ...]] = {
    "conv": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose": ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    "convolution": (
        "input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups",
    ),
    "linear": ("input", "weight", "bias"),
    "matmul": ("input", "other"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    **dict.fromkeys(("add", "sub", "mul", "div"), ("input", "other")),
    "neg": ("input",),
    "identity": ("input",),
    "dropout": ("input", "p", "training", "inplace"),
    "reshape": ("input", "shape"),
    "reshape_as": ("input", "other"),
    "view_as": ("input", "other"),
    "permute": ("input", "dims"),
    "transpose": ("input", "dim0", "dim1"),
    "flatten": ("input", "start_dim", "end_dim"),
    "squeeze": ("input", "dim"),
    "unsqueeze": ("input", "dim"),
    "mean": ("input", "dim", "keepdim"),
    "avg_pool": ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    "adaptive_avg_pool": ("input", "output_size"),
    "pad": ("input", "pad", "mode", "value"),
    "cat": ("tensors", "dim"),
    "narrow": ("input", "dim", "start", "length"),
    "index_select": ("input", "dim", "index"),
    "slice": ("input", "dim", "start", "end", "step"),
    "getitem": ("input", "index"),
    "split": ("input", "sizes", "dim"),
    "chunk": ("input", "chunks", "dim"),
    "channel_shuffle": ("input", "groups"),
}  # fmt: skip

_SPELLINGS = {
    **{name: (name, None) for name in SIGNATURES if name not in ("conv", "conv_transpose", "avg_pool")},
    **{f"conv{n}d": ("conv", n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": ("conv_transpose", n) for n in (1, 2, 3)},
    **{f"avg_pool{n}d": ("avg_pool", n) for n in (1, 2, 3)},
    **{f"adaptive_avg_pool{n}d": ("adaptive_avg_pool", n) for n in (1, 2, 3)},
    "truediv": ("div", None), "iadd": ("add", None), "isub": ("sub", None), "imul": ("mul", None),
    "itruediv": ("div", None), "view": ("reshape", None), "_unsafe_view": ("reshape", None), "concat": ("cat", None),
    "contiguous": ("identity", None), "clone": ("identity", None), "detach": ("identity", None),
    "alias": ("identity", None), "mm": ("matmul", None), "split_with_sizes": ("split", None),
    "constant_pad_nd": ("pad", None), "swapaxes": ("transpose", None),
    "_native_batch_norm_legit_no_training": ("batch_norm", None),
}  # fmt: skip
_RENAMED = {
    "self": "input", "axis": "dim", "size": "shape", "split_size_or_sections": "sizes", "split_size": "sizes",
    "split_sizes": "sizes", "train": "training", "mat2": "other", "dim_": "dim",
}  # fmt: skip
_OF_TORCH = {
    f: name
    for home in (torch, F, operator)
    for name in _SPELLINGS
    if callable(f := getattr(home, name, None))
    and not (home is torch and name in ("batch_norm", "pad", "dropout", "convolution", "constant_pad_nd"))
}


def described(node: fx.Node, module: fx.GraphModule) -> Described | None:
    """What a node calls, in one form; None where that is none of the operators known here."""
    if node.op == "call_module":
        return _of_module(node, _attribute(module, str(node.target)))
    if node.op == "call_method":
        name = str(node.target)
        name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        plain = _SPELLINGS.get(name)
        return None if plain is None else _bound(node, *plain)
    if node.op != "call_function":
        return None
    if isinstance(node.target, OpOverload):
        name = _name(node)
        name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        if node.target.namespace != "aten" or name not in _SPELLINGS:
            return None
        op, axes = _SPELLINGS[name]
        names = [a.name for a in node.target._schema.arguments]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        args = {_RENAMED.get(k, k): v for k, v in given.items()}
        if name == "constant_pad_nd":
            args["mode"] = "constant"
        return Described(op, args, axes)
    name = _OF_TORCH.get(node.target) if callable(node.target) else None
    return None if name is None else _bound(node, *_SPELLINGS[name])


def _bound(node: fx.Node, op: str, axes: int | None) -> Described | None:
    names, given = SIGNATURES[op], node.args
    if op in ("reshape", "permute") and len(given) > 2:
        given = (given[0], given[1:])
    if len(given) > len(names):
        return None
    named = {_RENAMED.get(k, k): v for k, v in node.kwargs.items()}
    return Described(op, {**dict(zip(names, given, strict=False)), **named}, axes)


_POOLS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
_ADAPTIVE = {nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3}
_CONVS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_TRANSPOSED = {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
_NORMS = {nn.BatchNorm1d: None, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: None}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)


def _of_module(node: fx.Node, module: Any) -> Described | None:
    kind = type(module)
    if len(node.args) != 1 or node.kwargs:
        return None
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    plain = not any(getattr(module, hook, None) for hook in hooks) and "forward" not in vars(module)
    args: dict[str, Any] = {"input": node.args[0]}

    def take(*names: str) -> None:
        args.update({name: getattr(module, name) for name in names})

    if kind in _CONVS:
        take("weight", "bias", "stride", "padding", "dilation", "groups", "padding_mode")
        return Described("conv", args, _CONVS[kind], plain)
    if kind in _TRANSPOSED:
        take("weight", "bias", "stride", "padding", "output_padding", "dilation", "groups", "padding_mode")
        return Described("conv_transpose", args, _TRANSPOSED[kind], plain)
    if kind is nn.Linear:
        take("weight", "bias")
        return Described("linear", args, None, plain)
    if kind in _NORMS:
        take("weight", "bias", "running_mean", "running_var", "training", "eps")
        return Described("batch_norm", args, _NORMS[kind], plain)
    if kind in _POOLS:
        take(*SIGNATURES["avg_pool"][1:5], "count_include_pad")
        args["divisor_override"] = getattr(module, "divisor_override", None)
        return Described("avg_pool", args, _POOLS[kind], plain)
    if kind in _ADAPTIVE:
        take("output_size")
        return Described("adaptive_avg_pool", args, _ADAPTIVE[kind], plain)
    if kind in _DROPOUTS:
        take("training")
        return Described("dropout", args, None, plain)
    if kind is nn.Identity:
        return Described("identity", args, None, plain)
    if kind is nn.Flatten:
        take("start_dim", "end_dim")
        return Described("flatten", args, None, plain)
    if kind is nn.ChannelShuffle:
        take("groups")
        return Described("channel_shuffle", args, None, plain)
    if kind in _PADS:
        return Described("pad", {**args, "pad": module.padding, "value": module.value}, None, plain)
    return None


# Readers


class _Read:
    """A described call, with its operands as values or constants.

    With ``magnitudes``, constants that the module computes are what they were added up from.
    """

    def __init__(self, side: _Side, call: Described, of: Callable[[str], Value], magnitudes: bool = False) -> None:
        self.side, self.call, self._of, self.magnitudes = side, call, of, magnitudes

    def get(self, name: str, default: Any = None) -> Any:
        value = self.call.args.get(name)
        return default if value is None else value

    def is_value(self, given: Any) -> bool:
        return isinstance(given, fx.Node) and given.name not in self.side.constants

    def value(self, given: Any) -> Value:
        if not self.is_value(given):
            raise Unrepresentable("a constant stands where a value is read")
        return self._of(given.name)

    @property
    def x(self) -> Value:
        return self.value(self.call.args.get("input"))

    def array(self, given: Any) -> Array | None:
        """A parameter; None where there is none."""
        if given is None:
            return None
        if isinstance(given, fx.Node):
            name, given = given.name, self.side.tensor(given.name)
            if self.magnitudes and (found := self.side.magnitude(name)) is not None:
                return found
        if not isinstance(given, Tensor):
            raise Unrepresentable("a parameter is computed at run time")
        return _array(given)

    def parameter(self, name: str) -> Array:
        found = self.array(self.call.args.get(name))
        if found is None:
            raise Unrepresentable(f"there is no {name}")
        return found

    def extent(self, given: Any) -> Extent | None:
        """An argument that is an extent; None for -1."""
        if isinstance(given, int):
            return None if given == -1 else Extent(given)
        size = self.side.sizes.get(given) if isinstance(given, fx.Node) else None
        if size is None:
            raise Unrepresentable("an extent is computed at run time")
        return self._of(size.node.name).extents[size.axis]

    def integers(self, name: str, n: int, default: int) -> tuple[int, ...]:
        given = self.get(name, default)
        if isinstance(given, int):
            return (given,) * n
        if isinstance(given, list | tuple) and all(isinstance(v, int) for v in given):
            return tuple(given) * n if len(given) == 1 else tuple(given)
        raise Unrepresentable(f"{name} is computed at run time")

    def axis(self, name: str, x: Value, default: int = 0) -> int:
        given = self.get(name, default)
        if not isinstance(given, int):
            raise Unrepresentable("an axis is computed at run time")
        return given % x.rank


def _kernel_axes(call: _Read, x: Value, n: int) -> tuple[int, tuple[int, ...]]:
    """The axis of the channels, and those of a kernel over ``n`` axes."""
    if x.rank not in (n + 1, n + 2):
        raise Unrepresentable("a kernel over other axes than its operand has")
    return x.rank - n - 1, tuple(range(x.rank - n, x.rank))


def _convolution(
    call: _Read, x: Value, weight: Array, groups: int, stride: Sequence[int], dilation: Sequence[int],
    begin: Sequence[int], end: Sequence[int], rounded: int = 1,
) -> Value:  # fmt: skip
    size = weight.shape[2:]
    channel, axes = _kernel_axes(call, x, len(size))
    offsets = tuple(product(*(range(-b, -b + d * k, d) for b, d, k in zip(begin, dilation, size, strict=True))))
    delta = tuple(d * (k - 1) - b - e for k, d, b, e in zip(size, dilation, begin, end, strict=True))
    first = nf.grouped_first(weight.shape[0], weight.shape[1], groups)
    flat = weight.reshape(*weight.shape[:2], -1)
    return nf.convolved(x, Kernel(flat, first, offsets, axes, tuple(stride), delta, rounded), channel)


def _read_conv(call: _Read) -> Value:
    if call.call.op == "convolution" and call.get("transposed", False):
        return _read_conv_transpose(call)
    if call.get("padding_mode", "zeros") != "zeros":
        raise Unrepresentable("a padding repeats what stands at the border")
    x, weight, bias = call.x, call.parameter("weight"), call.array(call.call.args.get("bias"))
    n = weight.ndim - 2
    stride, dilation = call.integers("stride", n, 1), call.integers("dilation", n, 1)
    if isinstance(padding := call.get("padding", 0), str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        begin = [t // 2 for t in total]
        end = [t - b for t, b in zip(total, begin, strict=True)]
    else:
        begin = end = call.integers("padding", n, 0)
    y = _convolution(call, x, weight, call.get("groups", 1), stride, dilation, begin, end)
    return y if bias is None else nf.shifted(y, bias, y.rank - n - 1)


def _read_conv_transpose(call: _Read) -> Value:
    x, weight, bias = call.x, call.parameter("weight"), call.array(call.call.args.get("bias"))
    n, groups = weight.ndim - 2, call.get("groups", 1)
    channel, axes = _kernel_axes(call, x, n)
    size = weight.shape[2:]
    stride, dilation = call.integers("stride", n, 1), call.integers("dilation", n, 1)
    pads, extra = call.integers("padding", n, 0), call.integers("output_padding", n, 0)
    if any(s > 1 for s in stride):
        x = nf.spread(x, axes, stride)
    # What is written at offset o of an input position is read at offset -o of an output position.
    offsets = tuple(product(*(range(p, p - d * k, -d) for p, d, k in zip(pads, dilation, size, strict=True))))
    delta = tuple(2 * p - o - d * (k - 1) for p, o, d, k in zip(pads, extra, dilation, size, strict=True))
    inside = weight.shape[0] // groups
    turned = weight.reshape(groups, inside, weight.shape[1], -1).swapaxes(1, 2).reshape(-1, inside, prod(size))
    first = nf.grouped_first(len(turned), inside, groups)
    y = nf.convolved(x, Kernel(turned, first, offsets, axes, (1,) * n, delta), channel)
    return y if bias is None else nf.shifted(y, bias, channel)


def _read_avg_pool(call: _Read) -> Value:
    x, n = call.x, call.call.axes or 2
    size = call.integers("kernel_size", n, 1)
    given = call.get("stride")
    stride = size if given is None or given in ([], ()) else call.integers("stride", n, 1)
    padding = call.integers("padding", n, 0)
    if call.get("ceil_mode", False) or call.get("divisor_override") is not None:
        raise Unrepresentable("the last window of a pooling may hang over, or its divisor is given")
    if any(padding) and not call.get("count_include_pad", True):
        raise Unrepresentable("a pooling divides by fewer elements at the border")
    channels = x.extents[_kernel_axes(call, x, n)[0]].known
    if channels is None:
        raise Unrepresentable("the number of channels is unknown")
    weight = np.full((channels, 1, *size), 1 / prod(size))
    return _convolution(call, x, weight, channels, stride, (1,) * n, padding, padding, 0)


def _read_adaptive_avg_pool(call: _Read) -> Value:
    x, n = call.x, call.call.axes or 2
    if call.integers("output_size", n, 0) != (1,) * n:
        raise Unrepresentable("an adaptive pooling to more than one element")
    return nf.averaged(x, range(x.rank - n, x.rank), keep=True)


def _read_linear(call: _Read) -> Value:
    x, weight, bias = call.x, call.parameter("weight"), call.array(call.call.args.get("bias"))
    y = nf.mixed(x, weight, x.rank - 1)
    return y if bias is None else nf.shifted(y, bias, y.rank - 1)


def _read_matmul(call: _Read) -> Value:
    a, b = call.call.args["input"], call.call.args["other"]
    if call.is_value(a):
        x, weight = call.value(a), call.array(b)
        axis, weight = x.rank - 1, None if weight is None else weight.T
    else:
        x, weight = call.value(b), call.array(a)
        axis = x.rank - 2
    if weight is None or weight.ndim != 2 or axis < 0:
        raise Unrepresentable("a stack of matrices")
    return nf.mixed(x, weight, axis)


def _read_batch_norm(call: _Read) -> Value:
    if call.get("training", False):
        raise Unrepresentable("BatchNorm in training mode")
    x = call.x
    mean, var = (call.parameter(name).astype(np.float64) for name in ("running_mean", "running_var"))
    gamma, beta = (call.array(call.call.args.get(name)) for name in ("weight", "bias"))
    eps = float(call.get("eps", 1e-5))
    with np.errstate(all="ignore"):
        factor = 1 / np.sqrt(var + eps) if gamma is None else gamma.astype(np.float64) / np.sqrt(var + eps)
        moved = mean * factor
    shift = np.zeros_like(mean) if beta is None else beta.astype(np.float64)
    axis = 1 if x.rank > 1 else 0
    return nf.shifted(nf.scaled(x, factor, axis), shift - moved, axis, np.abs(shift) + np.abs(moved))


def _read_arithmetic(call: _Read) -> Value:
    op, a, b = call.call.op, call.call.args["input"], call.call.args["other"]
    if set(call.call.args) - {"input", "other"}:
        raise Unrepresentable("an addition with a factor, or a division that rounds")
    if call.is_value(a) and call.is_value(b):
        if op not in ("add", "sub"):
            raise Unrepresentable("a product of two values")
        second = call.value(b)
        return nf.added([call.value(a), nf.scaled(second, -1.0) if op == "sub" else second])
    reverse = not call.is_value(a)
    x, other = call.value(b if reverse else a), a if reverse else b
    if isinstance(other, bool | complex):
        raise Unrepresentable("arithmetic with a truth value")
    given = np.asarray(float(other)) if isinstance(other, int | float) else call.array(other)
    if given is None:
        raise Unrepresentable("a parameter is computed at run time")
    constant = given.astype(np.float64)
    axis = _along(constant, x)
    with np.errstate(all="ignore"):
        if op == "mul":
            return nf.scaled(x, constant, axis)
        if op == "div":
            if reverse:
                raise Unrepresentable("a division by a value")
            return nf.scaled(x, 1 / constant, axis)
        if op == "sub" and reverse:
            x = nf.scaled(x, -1.0)
        return nf.shifted(x, -constant if op == "sub" and not reverse else constant, axis)


def _along(constant: Array, x: Value) -> int | None:
    """The axis of ``x`` that a constant varies along; None for one number."""
    wide = [i for i, d in enumerate(constant.shape) if d != 1]
    if constant.ndim > x.rank or len(wide) > 1:
        raise Unrepresentable("a constant varies along several axes, or raises the rank")
    if not wide:
        return None
    axis = x.rank - constant.ndim + wide[0]
    known = x.extents[axis].known
    if known != constant.shape[wide[0]]:
        raise Unrepresentable("a constant may repeat its operand along an axis")
    return axis


def _read_neg(call: _Read) -> Value:
    return nf.scaled(call.x, -1.0)


def _read_identity(call: _Read) -> Value:
    return call.x


def _read_dropout(call: _Read) -> Value:
    if call.get("training", True):
        raise Unrepresentable("Dropout in training mode")
    return call.x


def _read_pad(call: _Read) -> Value:
    x, amounts = call.x, call.call.args["pad"]
    if call.get("mode", "constant") != "constant" or not all(isinstance(p, int) for p in amounts):
        raise Unrepresentable("a padding repeats what stands at the border, or is computed")
    pairs = [(x.rank - 1 - i, *amounts[2 * i : 2 * i + 2]) for i in range(len(amounts) // 2)]
    pairs = [p for p in pairs if p[1:] != (0, 0)]
    if not pairs:
        return x
    axes, begin, end = ([p[i] for p in pairs] for i in range(3))
    if min(axes) < 2:
        raise Unrepresentable("a padding adds channels or images")
    return nf.padded(x, axes, begin, end, float(call.get("value", 0.0)), 1)


def _read_cat(call: _Read) -> Value:
    terms = [call.value(t) for t in call.call.args["tensors"]]
    return nf.stacked(terms, call.axis("dim", terms[0]))


def _read_narrow(call: _Read) -> Value:
    x, start, length = call.x, call.get("start", 0), call.call.args["length"]
    if not isinstance(start, int) or not isinstance(length, int):
        raise Unrepresentable("a slice that is computed at run time")
    end = start + length
    return nf.sliced(x, call.axis("dim", x), start, nf.WHOLE if start < 0 and end == 0 else end, 1)


def _read_slice(call: _Read) -> Value:
    x, start, end, step = call.x, call.get("start", 0), call.get("end", 2**62), call.get("step", 1)
    if not all(isinstance(v, int) for v in (start, end, step)):
        raise Unrepresentable("a slice that is computed at run time")
    return nf.sliced(x, call.axis("dim", x), start, end, step)


def _read_index_select(call: _Read) -> Value:
    x, index = call.x, call.parameter("index")
    return nf.selected(x, [int(i) for i in index.reshape(-1)], call.axis("dim", x))


def _read_getitem(call: _Read) -> Value:
    given, index = call.call.args["input"], call.call.args["index"]
    inner = described(given, call.side.module) if isinstance(given, fx.Node) else None
    if inner is not None and inner.op in ("split", "chunk") and isinstance(index, int):
        return _piece(call, inner, index)
    x = call.x
    items = index if isinstance(index, tuple | list) else (index,)
    if any(i is Ellipsis for i in items):
        at = [i is Ellipsis for i in items].index(True)
        items = (*items[:at], *[slice(None)] * (x.rank - len(items) + 1), *items[at + 1 :])
    if not all(isinstance(i, slice) for i in items):
        raise Unrepresentable("an index that drops or adds an axis")
    for axis, s in enumerate(items):
        bounds = (s.start or 0, 2**62 if s.stop is None else s.stop, s.step or 1)
        if not all(isinstance(b, int) for b in bounds):
            raise Unrepresentable("a slice that is computed at run time")
        x = nf.sliced(x, axis, *bounds)
    return x


def _piece(call: _Read, split: Described, index: int) -> Value:
    x = _Read(call.side, split, call._of).x
    axis = _Read(call.side, split, call._of).axis("dim", x)
    width = x.extents[axis].known
    if width is None:
        raise Unrepresentable("the extent that is split is unknown")
    sizes: Any = split.args.get("sizes")
    if split.op == "chunk":
        sizes = -(-width // int(split.args["chunks"]))
    if isinstance(sizes, int):
        sizes = [min(sizes, width - start) for start in range(0, width, sizes)]
    start = sum(sizes[: index % len(sizes)])
    return nf.sliced(x, axis, start, start + sizes[index % len(sizes)], 1)


def _read_channel_shuffle(call: _Read) -> Value:
    x, groups = call.x, call.call.args["groups"]
    width = x.extents[1].known
    if width is None:
        raise Unrepresentable("the number of channels is unknown")
    return nf.selected(x, np.arange(width).reshape(groups, -1).T.reshape(-1).tolist(), 1)


def _read_mean(call: _Read) -> Value:
    x, dims = call.x, call.call.args.get("dim")
    if dims is None or set(call.call.args) - {"input", "dim", "keepdim"}:
        raise Unrepresentable("a mean over all axes, or in another dtype")
    axes = [dims] if isinstance(dims, int) else list(dims)
    return nf.averaged(x, [a % x.rank for a in axes], bool(call.get("keepdim", False)))


def _read_reshape(call: _Read) -> Value:
    shape = call.call.args["shape"]
    shape = shape if isinstance(shape, list | tuple) else [shape]
    return nf.regrouped(call.x, [call.extent(s) for s in shape])


def _read_reshape_as(call: _Read) -> Value:
    return nf.regrouped(call.x, call.value(call.call.args["other"]).extents)


def _read_permute(call: _Read) -> Value:
    x, dims = call.x, call.call.args["dims"]
    return nf.permuted(x, [d % x.rank for d in dims])


def _read_transpose(call: _Read) -> Value:
    x = call.x
    axes = list(range(x.rank))
    a, b = call.axis("dim0", x), call.axis("dim1", x)
    axes[a], axes[b] = axes[b], axes[a]
    return nf.permuted(x, axes)


def _read_flatten(call: _Read) -> Value:
    x = call.x
    start, end = call.axis("start_dim", x, 0), call.axis("end_dim", x, -1)
    merged = Extent()
    for e in x.extents[start : end + 1]:
        merged = merged.times(e)
    return nf.regrouped(x, [*x.extents[:start], merged, *x.extents[end + 1 :]])


def _read_squeeze(call: _Read) -> Value:
    x, dims = call.x, call.call.args.get("dim")
    if dims is None:
        raise Unrepresentable("a squeeze of all axes of extent 1")
    gone = {d % x.rank for d in ([dims] if isinstance(dims, int) else dims)}
    if any(x.extents[a].known is None for a in gone):
        raise Unrepresentable("a squeeze of an unknown extent")
    return nf.regrouped(x, [e for i, e in enumerate(x.extents) if i not in gone or e != Extent()])


def _read_unsqueeze(call: _Read) -> Value:
    x = call.x
    axis = call.call.args["dim"] % (x.rank + 1)
    return nf.regrouped(x, [*x.extents[:axis], Extent(), *x.extents[axis:]])


READERS: dict[str, Callable[[_Read], Value]] = {
    "conv": _read_conv,
    "convolution": _read_conv,
    "conv_transpose": _read_conv_transpose,
    "avg_pool": _read_avg_pool,
    "adaptive_avg_pool": _read_adaptive_avg_pool,
    "linear": _read_linear,
    "matmul": _read_matmul,
    "batch_norm": _read_batch_norm,
    **dict.fromkeys(("add", "sub", "mul", "div"), _read_arithmetic),
    "neg": _read_neg,
    "identity": _read_identity,
    "dropout": _read_dropout,
    "pad": _read_pad,
    "cat": _read_cat,
    "narrow": _read_narrow,
    "slice": _read_slice,
    "index_select": _read_index_select,
    "getitem": _read_getitem,
    "channel_shuffle": _read_channel_shuffle,
    "mean": _read_mean,
    "reshape": _read_reshape,
    **dict.fromkeys(("reshape_as", "view_as"), _read_reshape_as),
    "permute": _read_permute,
    "transpose": _read_transpose,
    "flatten": _read_flatten,
    "squeeze": _read_squeeze,
    "unsqueeze": _read_unsqueeze,
}
