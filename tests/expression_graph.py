"""The smallest host graph: an expression, whose operators are read as themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from expression_models import axes

from reparamc.algebra.evaluate import evaluate
from reparamc.algebra.expr import Expr, Source, rebuild, walk
from reparamc.algebra.infer import channel_axes, channels
from reparamc.algebra.shape import shape_of
from reparamc.algebra.text import show
from reparamc.compiler.graph import Fold, Splice, new_nodes
from reparamc.compiler.plan import make_plan
from reparamc.compiler.readings import Reading
from reparamc_passes import PASSES


class Expressions:
    """`reparamc.compiler.graph.Graph` over an expression: the smallest host there is. Values are its operators.

    Those that are opaque have no reading.
    """

    pools_clamp = False
    stores_ones = True

    def __init__(self, root: Expr, is_opaque: Callable[[Expr], bool] = lambda _: False) -> None:
        self.is_opaque = is_opaque
        self.order = [e for e in walk(root) if not isinstance(e, Source)]
        self.found: dict[Expr, list[Expr | None]] = {root: [None]}
        for e in self.order:
            for c in e.children:
                self.found.setdefault(c, []).append(e)
        self.ranks, self.axes, self.widths = axes(root), channel_axes(root), channels(root)
        self.becomes: dict[Expr, Expr] = {}
        self.made: dict[Expr, Expr] = {}

    def values(self) -> list[Any]:
        return [*self.order]

    def read(self, e: Expr) -> Reading | None:
        if self.is_opaque(e):
            return None
        return Reading(rebuild(e, [Source(c, self.widths[c], self.axes[c]) for c in e.children]))

    def holders(self, parameter: str) -> list[Expr | None]:
        return []

    def users(self, e: Expr) -> list[Expr | None]:
        return self.found[e]

    def source(self, e: Expr) -> Source:
        width, axis, at = self.widths[e] or 0, self.axes[e] or -1, f"v{list(self.found).index(e)}"
        shape: list[int | str] = [f"{at}{n}" for n in range(self.ranks[e])]
        shape[axis] = width
        return Source(e, width, axis, (e.shape if isinstance(e, Source) else None) or shape_of(shape))

    def name(self, e: Expr) -> str:
        return show(e)

    def dtype(self, members: object) -> np.dtype:
        return np.dtype(np.float64)

    def obstacle(self, root: Expr, members: object, sources: object, made: object) -> None:
        return None

    def is_written(self, e: Expr, but: Expr | None = None) -> bool:
        return False

    def moves(self, e: Expr) -> None:
        return None

    def reach(self, e: Expr) -> int:
        raise AssertionError("nothing here is without a reading")

    def run(self, e: Expr, operands: Mapping[Expr, np.ndarray], sizes: Mapping[str, int] = {}) -> np.ndarray:
        sources = {c: self.source(c) for c in e.children}
        alone = rebuild(e, [sources[c] for c in e.children])
        return evaluate(alone, {sources[c]: operands[c] for c in e.children}, sizes)[0]

    def kind(self, e: Expr) -> str:
        return type(e).__name__

    def folded(self, small: int) -> tuple[Expressions, list[Fold]]:
        return self, []

    def splice(self, splice: Splice) -> None:
        done: dict[Expr, Expr] = {e: self.current(cast(Expr, v)) for e, v in splice.native.items()}
        for e in new_nodes(splice):
            done[e] = self.made.setdefault(e, rebuild(e, [done[c] for c in e.children]))
        self.becomes[cast(Expr, splice.root)] = done[splice.expr]

    def current(self, value: Expr) -> Expr:
        """``value``, all splices that were made so far carried out."""
        for e in walk(value, stop=self.becomes.__contains__):
            if e not in self.becomes:
                self.becomes[e] = rebuild(e, [self.becomes[c] for c in e.children])
        return self.becomes[value]


def planned(root: Expr, is_opaque: Callable[[Expr], bool] = lambda _: False) -> Expr:
    """What becomes of ``root`` as a graph, where only regions of it are rewritten."""
    graph = Expressions(root, is_opaque)
    for splice in make_plan(cast(Any, graph), PASSES).splices:
        graph.splice(splice)
    return graph.current(root)
