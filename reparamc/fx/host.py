"""A torch module on its way through the compiler: traced, rewritten, proven, compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn

from reparamc.certificate.fx import certify_fx
from reparamc.certificate.fx_shapes import shapes_of, sizes_of
from reparamc.certificate.proof import Certificate
from reparamc.compiler.graph import Edit, Graph, Splice
from reparamc.compiler.host import Options, Trial
from reparamc.compiler.pipeline import fuse
from reparamc.compiler.readings import Value
from reparamc.equivalence.difference import Outputs
from reparamc.equivalence.end_to_end import Alone, Region
from reparamc.errors import VerificationError
from reparamc.fx.arguments import examples_of
from reparamc.fx.calls import Call, by_position, operation
from reparamc.fx.copying import tensors
from reparamc.fx.editor import Edited, Editor
from reparamc.fx.end_to_end import Given, epsilon_of, verify_end_to_end
from reparamc.fx.graph import FxGraph
from reparamc.fx.regions_alone import run_alone
from reparamc.fx.runnable import own_randomness, unchanged
from reparamc.report.data import Counts, OutputError

ShapeT = TypeVar("ShapeT")


def fuse_traced(
    traced: fx.GraphModule,
    model: nn.Module,
    calls: Sequence[Given],
    expected: Sequence[Outputs],
    options: Options,
    *,
    exported: bool = False,
    sizes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> fx.GraphModule:
    """A fused form of ``traced``, which shares its other modules with it; the report is in its ``meta``.

    Args:
        traced: ``model`` as a graph. It is not changed.
        model: what the result is compared with.
        calls: arguments of ``model`` and of ``traced``; none where they are not known.
        expected: what ``model`` makes of them; none where the result is not compared end to end.
        exported: whether torch.export made the graph, for inputs of these sizes.
        sizes: of its nodes in the first of ``calls``, where they are known already.

    Raises:
        VerificationError: the result computes something else.
    """
    host = FxHost(traced, model, calls, expected, exported, sizes, is_proven=options.level != "off")
    result, report = fuse(host, options)
    result.module.meta["reparamc"] = report
    return result.module


class FxHost:
    """`reparamc.compiler.host.Host` over a traced module; ``is_proven``: whether `certify` is asked."""

    def __init__(
        self,
        traced: fx.GraphModule,
        original: nn.Module,
        calls: Sequence[Given],
        expected: Sequence[Outputs],
        exported: bool,
        sizes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
        *,
        is_proven: bool = True,
    ) -> None:
        self.traced, self.original, self.calls, self.expected = traced, original, calls, expected
        self.exported, self._is_proven = exported, is_proven
        self._positional = self._by_position(calls[0]) if calls else None
        self._sizes = dict(sizes) or _of_runs(sizes_of, self.original, traced, self._positional)
        examples = examples_of(original, *calls[0]) if calls else {}
        self.graph = FxGraph(traced, examples, self._sizes, exported=exported)
        self._before = _sums(traced) if is_proven else []
        self._nodes = {node.name: node for node in traced.graph.nodes}

    def _by_position(self, call: Given) -> Sequence[Any] | None:
        if self.exported:
            return (*call[0], *call[1].values())
        return by_position(self.traced, *call)

    def carry_out(self, graph: Graph, edits: Iterable[Edit]) -> Edited:
        return Editor(cast(FxGraph, graph)).carry_out([*edits])

    def over(self, result: Edited) -> FxHost:
        return FxHost(result.module, self.original, self.calls, self.expected, self.exported, is_proven=self._is_proven)

    def size(self, result: Edited | None) -> Counts:
        return count(self.traced, self.graph.facts.calls) if result is None else count(result.module)

    def tensor(self, value: Value) -> str:
        return cast(fx.Node, value).name

    def shown(self, edit: Edit, result: Edited) -> Collection[str]:
        """The last node of a splice; where that has become another one, and for what is told a shape, who uses it."""
        root = cast(fx.Node, edit.root)
        found = {root.name}
        if isinstance(edit, Splice):
            freed = [f for m in edit.members if (f := self.graph.sizes.freed.get(cast(fx.Node, m))) is not None]
            stack = [user for f in freed for user in f.users]
            stack += root.users if edit.expr in edit.native else ()
        else:
            stack = list(root.users)
        seen = set(stack)
        while stack:
            node = stack.pop()
            found.add(node.name)
            if node.name not in result.names:
                fresh = [user for user in node.users if user not in seen]
                seen.update(fresh)
                stack += fresh
        return found

    def operands(self, tensor: str) -> Sequence[str] | None:
        node = self._nodes.get(tensor)
        return None if node is None or node.op == "placeholder" else [n.name for n in node.all_input_nodes]

    @cached_property
    def _shapes(self) -> Any:
        return _of_runs(partial(shapes_of, first=self._sizes or None), self.original, self.traced, self._positional)

    def certify(self, result: Edited) -> Certificate:
        if _sums(self.traced) != self._before:  # both graphs hold it, so no proof would see it
            raise VerificationError("a parameter of the original was overwritten. Report this as a bug", where="")
        return certify_fx(self.traced, result.module, self._shapes)

    def trials(self, result: Edited, regions: Sequence[Region]) -> Iterator[Trial]:
        for call in (*self.calls[:1], *self.calls[1:][-1:]):  # of the example, and of another size
            if (seen := self._alone(result, regions, call)) is not None:
                epsilon = epsilon_of(self.original, call)
                yield seen, lambda _, epsilon=epsilon: epsilon

    def _alone(self, result: Edited, regions: Sequence[Region], call: Given) -> Alone | None:
        positional = self._by_position(call)
        if positional is None:
            return None
        places = {region.root: region.root for region in regions}
        places |= {self.tensor(root): name for root, name in result.places.items()}
        return run_alone(self.traced, result.module, regions, places, positional)

    def objections(self, splices: Sequence[Splice], result: Edited, without: Callable[..., Any]) -> Mapping[str, str]:
        return {}

    def check(self, result: Edited) -> None:
        result.module.graph.lint()

    def can_compare(self, changed: bool) -> bool:
        return bool(self.expected)

    def compare(self, result: Edited, regions: Sequence[Region]) -> list[OutputError]:
        trials = list(zip(self.calls, self.expected, strict=True))
        alone = partial(self._alone, result, regions)
        return verify_end_to_end(self.original, result.module, trials, regions, alone)


def _sums(module: nn.Module) -> list[Any]:
    """What tells that a parameter or buffer has been written into."""
    dense = [t for t in tensors(module) if type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided]
    return [_sum(t.detach()) for t in dense if not (t.is_meta or t.is_quantized or t.is_complex())]


def _sum(t: Tensor) -> Any:
    """The sum of its bits, eight bytes at a time, which is exact and quick; where there are fewer, of its values."""
    t = t.contiguous()
    whole = not t.numel() * t.element_size() % 8 and not t.storage_offset() * t.element_size() % 8
    return (t.reshape(-1).view(torch.int64).sum() if whole else t.sum(dtype=torch.float64).view(torch.int64)).item()


def _of_runs(
    ask: Callable[[fx.GraphModule, Sequence[Any]], dict[str, ShapeT]],
    model: nn.Module,
    traced: fx.GraphModule,
    args: Sequence[Any] | None,
) -> dict[str, ShapeT]:
    """What ``ask`` learns from running ``traced``; nothing where it does not run."""
    if args is None:
        return {}
    with unchanged(traced), own_randomness(model), torch.no_grad():
        try:
            return ask(traced, args)
        except Exception:  # whatever the model's forward raises; the comparison will say so
            return {}


def count(module: fx.GraphModule, calls: Mapping[fx.Node, Call | None] | None = None) -> Counts:
    """The size of a traced module: calls, convolutions and BatchNorms (modules or functions), parameters.

    ``calls``: its operators, where they are known already.
    """
    ops = conv = norm = 0
    for node in module.graph.nodes:
        if node.op in ("call_module", "call_function", "call_method"):
            call = operation(node, module) if calls is None else calls[node]
            ops += 1
            conv += call is not None and call.op == "conv"
            norm += call is not None and call.op == "batch_norm"
    return Counts(ops, conv, norm, sum(p.numel() for p in tensors(module, "_parameters")))
