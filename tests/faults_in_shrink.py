"""Faults in leaving out what is known: channels (`compiler.liveness`, `algebra.channels`), activations (`ranges`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from fault_models import F, net, nn, node, numbers, onnx_model
from onnx import ModelProto, NodeProto
from planting import Fault, fault, given, result

CHANNELS, LIVENESS = "reparamc.algebra.channels:", "reparamc.compiler.liveness:"


def filters(*gone: int) -> np.ndarray:
    made = numbers(6, 4, 1, 1)
    made[list(gone)] = 0
    return made


FIRST = {"w": filters(1, 3, 4), "b": np.abs(numbers(6)) + 1, "last": numbers(4, 6, 3, 3, seed=2)}


def between(*nodes: NodeProto, pads: int = 0, **parameters: Any) -> Callable[[], ModelProto]:
    """A convolution with three filters of zeros, of which ``nodes`` make r, and another one that reads that."""
    ends = node("Conv", "x w b", "c"), node("Conv", "r last", "y", pads=[pads] * 4)
    return lambda: onnx_model([ends[0], *nodes, ends[1]], {**FIRST, **parameters})


def torch_net(run: Callable[..., Any], pads: int = 0) -> Callable[[], tuple[Any, tuple[Any, ...]]]:
    def make() -> tuple[Any, tuple[Any, ...]]:
        model, inputs = net(run, nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 3, padding=pads))
        weight, bias = model.part0.weight.detach(), model.part0.bias.detach()
        weight[[1, 3, 4]] = 0
        bias.copy_(bias.abs() + 1)
        return model, inputs

    return make


SIGMOID = node("Sigmoid", "c", "r")


def activated(x: Any, c: Any, d: Any) -> Any:
    return d(c(x).sigmoid())


def in_two_ways(x: Any, c: Any, d: Any) -> Any:
    y = c(x).sigmoid()
    return d(y * F.softplus(y))


def constants_of_the_operand(original: Any) -> Any:
    return lambda self, value, separate, operands, width, *more: np.broadcast_to(operands[0].known, width)


def the_next_rows(e: Any, x: Any, out: Any, *more: Any) -> tuple[Any, ...]:
    return e, x, (np.asarray(out) + 1) % 6 if getattr(e, "out_channels", 0) == 6 else out, *more


def activations(*nodes: NodeProto) -> Callable[[], ModelProto]:
    """``nodes`` from a convolution, c, to y."""
    return lambda: onnx_model([node("Conv", "x w", "c"), *nodes], {"w": numbers(4, 4, 1, 1)})


def summed(x: Any, c: Any) -> Any:
    return F.relu(c(x).relu() + c(x))


def written(x: Any, c: Any) -> Any:
    y = c(x).sigmoid()
    y.sub_(0.6)
    return y.relu()


RANGES: list[Fault] = [
    fault(
        "every sum taken for positive", "reparamc.compiler.ranges:_sign", lambda original: lambda parts: (0.0, np.inf),
        onnx=activations(node("Relu", "c", "r"), node("Add", "c r", "a"), node("Relu", "a", "y")),
        fx=lambda: net(summed, nn.Conv2d(4, 4, 1)),
    ),
    fault(
        "an activation outside of its interval", "reparamc.compiler.ranges:_is_identity",
        lambda original: lambda bounded, found: bounded.keeps is not None,
        onnx=activations(node("LeakyRelu", "c", "y", alpha=0.5)),
        fx=lambda: net(lambda x, c: F.leaky_relu(c(x), 0.5), nn.Conv2d(4, 4, 1)),
    ),
    fault(
        "an interval before a write in place", "reparamc.fx.graph:FxGraph.is_written",
        lambda original: lambda *_, **__: False, fx=lambda: net(written, nn.Conv2d(4, 4, 1)),
    ),
]  # fmt: skip


def equal(factor: float = 1.0, bias: float = 1.0) -> dict[str, Any]:
    """Filters of which 1, 3 and 4 are those before them, times a factor."""
    w, b = numbers(6, 4, 1, 1), numbers(6)
    w[[1, 3, 4]], b[[1, 3, 4]] = factor * w[[0, 2, 5]], bias * b[[0, 2, 5]]
    return {"w": w, "b": b}


def equal_of_torch(factor: float = 1.0, bias: float = 1.0) -> Callable[[], tuple[Any, tuple[Any, ...]]]:
    def make() -> tuple[Any, tuple[Any, ...]]:
        model, inputs = net(activated, nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 3))
        for p, by in ((model.part0.weight.detach(), factor), (model.part0.bias.detach(), bias)):
            p[[1, 3, 4]] = by * p[[0, 2, 5]]
        return model, inputs

    return make


EQUAL: list[Fault] = [
    fault(
        "columns of equal channels lost", f"{CHANNELS}_narrowed_conv",
        given(lambda conv, x, out, read, known, merged, least: (
            conv, x, out, read, known, (np.arange(len(known)), merged[1]), least)),
        onnx=between(SIGMOID, **equal()), fx=equal_of_torch(),
    ),
    fault(
        "a factor that an activation does not pass", f"{LIVENESS}Liveness._alike_after",
        given(lambda self, separate, operands, width: (self, replace(separate, homogeneous=True), operands, width)),
        onnx=between(SIGMOID, **equal(2.0, 2.0)), fx=equal_of_torch(2.0, 2.0),
    ),
    fault(
        "a bias that is overlooked", "reparamc.algebra.alike:multiples",
        given(lambda start, of, parts: (start, of, parts[:1])),
        onnx=between(SIGMOID, **equal(1.0, 3.0)), fx=equal_of_torch(1.0, 3.0),
    ),
]  # fmt: skip

SHRINK: list[Fault] = [
    *RANGES, *EQUAL,
    fault(
        "constants of channels lost", f"{CHANNELS}_narrowed_conv",
        given(lambda conv, x, out, read, known, *more: (conv, x, out, read, known * 0, *more)),
        onnx=between(SIGMOID), fx=torch_net(activated),
    ),
    fault(
        "a constant that meets a border", f"{CHANNELS}takes_constants",
        lambda original: lambda conv, known: ~np.isnan(known),
        onnx=between(SIGMOID, pads=1), fx=torch_net(activated, 1),
    ),
    fault(
        "constants before the activation", f"{LIVENESS}Liveness._computed", constants_of_the_operand,
        onnx=between(SIGMOID), fx=torch_net(activated),
    ),
    fault(
        "other rows than those of the channels", f"{CHANNELS}narrowed", given(the_next_rows),
        onnx=between(SIGMOID), fx=torch_net(activated),
    ),
    fault(
        "what is read taken for unread", f"{CHANNELS}uses", result(lambda mask: mask & (np.arange(mask.shape[2]) > 0)),
        onnx=between(SIGMOID), fx=torch_net(activated),
    ),
    fault(
        "a product of constants and a channel", f"{LIVENESS}Liveness._follow_separate",
        given(lambda self, value, separate: (self, value, _of_the_first(separate))),
        onnx=between(node("Sigmoid", "c", "s"), node("Softplus", "s", "t"), node("Mul", "s t", "r")),
        fx=torch_net(in_two_ways),
    ),
]  # fmt: skip


def _of_the_first(separate: Any) -> Any:
    """A product that is what its first operand is."""
    return replace(separate, computes=False) if separate.multiplies else separate
