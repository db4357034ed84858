"""Faults in folding scales into pieces of a convolution that several regions share (`compiler.pieces`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from fault_models import net, nn, node, norm_of, numbers, onnx_model, statistics
from onnx import ModelProto, NodeProto
from planting import Fault, Make, fault, given, result

from reparamc.algebra.expr import Permute, Take

PIECES_OF, ROUTE = "reparamc.compiler.pieces:", "reparamc.algebra.channel_map:"
CONV = node("Conv", "x w bias", "c", kernel_shape=[1, 1])
PARAMETERS = {"w": numbers(8, 4, 1, 1), "bias": numbers(8), **statistics()}
HALVES = node("Split", "c", "q k", axis=1)
RELU = node("Relu", "k", "z")


def pieces(*nodes: NodeProto, shape: Sequence[int | str] = ("N", 4, "H", "W"), **parameters: Any) -> ModelProto:
    """A convolution of eight channels, and what reads it; the results are y and z."""
    return onnx_model([CONV, *nodes], {**PARAMETERS, **parameters}, shape, outputs="y z", opset=11)


def halves(*nodes: NodeProto, **parameters: Any) -> Callable[[], ModelProto]:
    return lambda: pieces(HALVES, *nodes, **parameters)


def cut(name: str, first: int, last: int) -> tuple[NodeProto, dict[str, Any]]:
    bounds = {f"{name}{n}": np.array([value]) for n, value in zip("fea", (first, last, 1), strict=True)}
    return node("Slice", f"c {name}f {name}e {name}a", name), bounds


def overlapping() -> ModelProto:
    (a, first), (b, second) = cut("q", 0, 4), cut("k", 2, 7)
    return pieces(a, b, norm_of("q"), RELU, **first, **second)


def rows() -> ModelProto:
    """A scaled piece of the channels, and some rows of every channel."""
    a, first = cut("q", 0, 4)
    picked = node("Gather", "c i", "k", axis=2)
    return pieces(a, picked, norm_of("q"), RELU, shape=("N", 4, 8, "W"), i=np.array([7, 5]), **first)


def projection(run: Callable[..., Any], *more: Any) -> Callable[[], tuple[Any, tuple[Any, ...]]]:
    return lambda: net(run, nn.Conv2d(4, 8, 1), nn.BatchNorm2d(4), *(make() for make in more))


def halved(x: Any, c: Any, n: Any) -> Any:
    q, k = c(x).chunk(2, 1)
    return n(q), k.relu()


def both(x: Any, c: Any, n: Any, m: Any) -> Any:
    q, k = c(x).chunk(2, 1)
    return n(q).sigmoid(), m(k).relu()


def in_a_row(x: Any, c: Any, n: Any, m: Any) -> Any:
    q, k = c(x).chunk(2, 1)
    return m(n(q)), k.relu()


def heads(scaled: str, **parameters: Any) -> Callable[[], ModelProto]:
    """q and k of two heads of four channels, or of four heads, each a matrix of 4 by 4; one of them is multiplied."""
    nodes = [
        node("MatMul", "x w", "c"), node("Reshape", "c s", "r"), node("Transpose", "r", "t", perm=[2, 0, 3, 1, 4]),
        node("Gather", "t i0", "q", axis=0), node("Gather", "t i1", "k", axis=0),
        node("Mul", f"{scaled} f", "m"), node("Relu", "k" if scaled == "q" else "q", "z"), node("Relu", "m", "y"),
    ]  # fmt: skip
    tensors = {"w": numbers(6, 32), "s": np.array([0, 0, 2, 4, 4]), "i0": np.array(0), "i1": np.array(1)}
    return lambda: onnx_model(nodes, {**tensors, **parameters}, ("N", "L", 6), outputs="y z", opset=11)


def attention(x: Any, q: Any, k: Any) -> Any:
    a, b = k(q(x)).reshape(x.shape[0], -1, 2, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
    return (a * 0.5).relu(), b.relu()


def norm() -> Any:
    return nn.BatchNorm2d(4)


SECOND = {f"{name}2": value for name, value in statistics(seed=9).items()}


def second(x: str, y: str) -> NodeProto:
    return node("BatchNormalization", f"{x} g2 b2 m2 v2", y)


def only_scaled(piece: Any) -> Any:
    """A piece that nothing scales reads no channels, so that no other piece shares them with it."""
    return piece if piece.scales else replace(piece, channels=[])


def cut_to_nothing(original: Any) -> Any:
    """Positions along an axis that is no axis of channels: taken for channels, none of which are left."""

    def select(self: Any, axis: int, index: Any) -> Any:
        return original(self, axis, index) if axis in self.axes else replace(self, channels=self.channels[..., :0])

    return select


def all_pieces(change: Callable[[Any], Any]) -> Make:
    """For `_in_front`: other pieces than those that are scaled."""
    return given(lambda e, pieces: (e, change(pieces)))


def each_piece(change: Callable[[Any], Any]) -> Make:
    return all_pieces(lambda pieces: [change(piece) for piece in pieces])


def scales_as(change: Callable[[list[Any]], Any]) -> Make:
    """For `_in_front`: the scales of each piece in another order, or only some."""
    return each_piece(lambda piece: replace(piece, scales=dict(change([*piece.scales.items()]))))


def along_the_first(original: Any) -> Any:
    def along(self: Any, vector: Any, axis: int | None) -> Any:
        return original(self, vector, self.axes[0] - self.rank if vector.ndim else axis)

    return along


def in_order(original: Any) -> Any:
    """The digits of a channel in the order of the axes along which they are."""

    def through(self: Any, e: Any) -> Any:
        found = original(self, e)
        if found is None or not isinstance(getattr(e, "op", None), Permute):
            return found
        return replace(found, axes=tuple(sorted(found.axes)))

    return through


def first_position(x: Any, op: Any, *more: Any) -> tuple[Any, ...]:
    return (x, replace(op, at=0) if isinstance(op, Take) else op, *more)


def first_written(emitter: Any, e: Any, top: bool) -> tuple[Any, Any, bool]:
    return emitter, replace(e, op=replace(e.op, at=0)) if isinstance(getattr(e, "op", None), Take) else e, top


PIECES: list[Fault] = [
    fault(
        "a piece that another selection reads as well", f"{PIECES_OF}_piece", result(only_scaled), onnx=overlapping,
        fx=projection(lambda x, c, n: (n((y := c(x))[:, :4]), y[:, 2:7].relu())),
    ),
    fault("pieces along different axes", f"{ROUTE}ChannelMap._select", cut_to_nothing, onnx=rows),
    fault(
        "shift of a piece lost", f"{PIECES_OF}_in_front",
        scales_as(lambda scales: [(e, (s, 0 * t)) for e, (s, t) in scales]),
        onnx=halves(norm_of("q"), RELU), fx=projection(halved),
    ),
    fault(
        "the first piece for every piece", f"{PIECES_OF}_in_front",
        all_pieces(lambda pieces: [replace(piece, channels=pieces[0].channels) for piece in pieces]),
        onnx=halves(norm_of("q", "s"), second("k", "t"), node("Sigmoid", "s", "y"), node("Relu", "t", "z"), **SECOND),
        fx=projection(both, norm),
    ),
    fault(
        "rows in the order of the channels", f"{PIECES_OF}_in_front",
        each_piece(lambda piece: replace(piece, channels=sorted(piece.channels))),
        onnx=lambda: pieces(
            node("Gather", "c i", "q", axis=1), node("Gather", "c j", "k", axis=1), norm_of("q"), RELU,
            i=np.array([6, 1, 4, 3]), j=np.array([0, 2, 5, 7]),
        ),
    ),
    fault(
        "two scales in a row in the wrong order", f"{PIECES_OF}_in_front", scales_as(reversed),
        onnx=halves(norm_of("q", "s"), second("s", "y"), RELU, **SECOND), fx=projection(in_a_row, norm),
    ),
    fault(
        "only the first of two scales in a row", f"{PIECES_OF}_in_front", scales_as(lambda scales: scales[:1]),
        onnx=halves(norm_of("q", "s"), second("s", "y"), RELU, **SECOND), fx=projection(in_a_row, norm),
    ),
    fault(
        "the scale left after the piece as well", f"{PIECES_OF}_over",
        given(lambda form, new, without: (form, new, () if new else without)),
        onnx=halves(norm_of("q"), RELU), fx=projection(halved),
    ),
    fault(
        "a factor of each channel of a head for one of each head", f"{ROUTE}ChannelMap.along", along_the_first,
        onnx=heads("k", f=numbers(4)),
    ),
    fault(
        "heads in the order of the axes", f"{ROUTE}ChannelMap.through", in_order,
        onnx=lambda: onnx_model(
            [
                node("MatMul", "x w", "c"), node("Reshape", "c s", "r"), node("Transpose", "r", "t", perm=[0, 1, 3, 2]),
                node("Gather", "t i0", "q", axis=2), node("Gather", "t i1", "k", axis=2),
                node("Mul", "q f", "y"), node("Relu", "k", "z"),
            ],
            {
                "w": numbers(6, 4), "s": np.array([0, 0, 2, 2]), "i0": np.array(0), "i1": np.array(1),
                "f": np.array(0.5, np.float32),
            },
            ("N", "L", 6), outputs="y z", opset=11,
        ),
    ),
    fault(
        "always the first of q and k, as read", "reparamc.compiler.readings:moved", given(first_position),
        onnx=lambda: onnx_model(
            [
                node("MatMul", "x w", "c"), node("Reshape", "c s", "r"), node("Gather", "r one", "q", axis=2),
                node("Slice", "r two three two", "k"), node("Mul", "q f", "y"), node("Relu", "k", "z"),
            ],
            {
                "w": numbers(6, 12), "s": np.array([0, 0, 3, 4]), "f": np.array(0.5, np.float32), "one": np.array(1),
                "two": np.array([2]), "three": np.array([3]),
            },
            ("N", "L", 6), outputs="y z", opset=11,
        ),
    ),
    fault(
        "always the first of q and k, as written", "reparamc.fx.emit:Emitter._emit", given(first_written),
        fx=lambda: net(attention, nn.Flatten(2), nn.Linear(42, 8)),
    ),
]  # fmt: skip
