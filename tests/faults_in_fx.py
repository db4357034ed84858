"""Faults in the readers and the emitter of torch.fx, and in what they know of a graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
from fault_makers import UNCHECKED_PROBE, call_with, geometry, reading
from fault_models import F, net, nn, torch, vector
from planting import NO_SHRINK, Make, Replace, fault, given, instead, result

from reparamc.algebra.expr import Layout, Permute, Scale, Source, Sum
from reparamc.algebra.shape import Dim

READ, EMIT, SOURCES = "reparamc.fx.readers:_read_", "reparamc.fx.emit:Emitter.", "reparamc.fx.gathering:"


def exchanged_arguments(graph: Any, node: Any, call: Any) -> tuple[Any, ...]:
    return graph, node, replace(call, args={**call.args, "input": call.args["other"], "other": call.args["input"]})


def turned(e: Any) -> Any:
    """``a - b`` as ``b - a``."""
    if not isinstance(e, Sum):
        return e
    a, b = cast("tuple[Any, Scale]", e.terms)
    return Sum((Scale(a, b.scale, b.shift), b.x))


def swapped_axes(e: Any) -> Any:
    begin, end = e.padding
    return geometry(e, begin=begin[::-1], end=end[::-1])


def taken(answer: Any) -> Make:
    """The class that `standardised` makes is taken for one that is sure."""
    return lambda original: lambda kind: answer if kind.__name__ == "Own" else original(kind)


def standardised(weigh: Any) -> Any:
    """A convolution of a class of its own, which changes its weight, and a BatchNorm."""

    class Own(nn.Conv2d):
        def forward(self, x: Any) -> Any:
            return F.conv2d(x, weigh(x, self.weight), self.bias) if x.shape[-1] > 1 else x

    return net(lambda x, c, n: n(c(x)), Own(4, 4, 3), nn.BatchNorm2d(4))


def also_linear(original: Any) -> Any:
    """For `FxGraph.moves`: a ReLU is linear."""

    def moves(self: Any, value: Any) -> Any:
        return tuple(value.all_input_nodes) if "relu" in str(value.target) else original(self, value)

    return moves


FX_READERS = [
    fault(
        "padding 'same' of an even kernel", "reparamc.fx.readers:_padding", result(lambda pads: pads and pads[::-1]),
        fx=lambda: net(lambda x, c, n: n(c(x)), nn.Conv2d(4, 4, 2, padding="same"), nn.BatchNorm2d(4)),
    ),
    fault(
        "bias of a convolution forgotten", f"{READ}conv", reading(lambda e: replace(e, bias=None)),
        fx=lambda: net(lambda x, c, n: n(c(x)), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    ),
    fault(
        "output_padding ignored", f"{READ}conv_transpose", call_with(output_padding=None),
        fx=lambda: net(
            lambda x, c, n: n(c(x)), nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1),
            nn.BatchNorm2d(4),
        ),
    ),
    fault(
        "statistics of the batch", f"{READ}batchnorm", call_with(training=False),
        fx=lambda: net(
            lambda x, c, m, v: F.batch_norm(c(x), m.clone(), v.clone(), training=True),
            nn.Conv2d(4, 4, 3), vector(4), vector(4).abs(),
        ),
    ),
    fault(
        "mean and variance exchanged", f"{READ}batchnorm", reading(lambda e: replace(e, mean=e.var, var=e.mean)),
        fx=lambda: net(
            lambda x, c, m, v: F.batch_norm(c(x), m, v), nn.Conv2d(4, 4, 3), vector(4).abs(), vector(4).abs() + 1
        ),
    ),
    fault(
        "each channel repeated, instead of all of them", f"{READ}repeated",
        reading(lambda e: replace(e, index=tuple(sorted(e.index)))),
        fx=lambda: net(lambda x, c, d: d(c(x).repeat(1, 2, 1, 1)), nn.Conv2d(4, 4, 3), nn.Conv2d(8, 4, 3)),
    ),
    fault(
        "alpha ignored", f"{READ}arithmetic", call_with(alpha=None),
        fx=lambda: net(lambda x, c, d: torch.sub(c(x), d(x), alpha=3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)),
    ),
    fault(
        "c / x read as x / c", f"{READ}arithmetic", given(exchanged_arguments),
        fx=lambda: net(lambda x, c, v: v / c(x), nn.Conv2d(4, 4, 3), vector(4, 1, 1)),
    ),
    fault(
        "a - b read as b - a", f"{READ}sum", reading(turned),
        fx=lambda: net(lambda x, c, d: c(x) - d(x), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)),
    ),
    fault(
        "matrix not transposed", f"{READ}product", reading(lambda e: replace(e, weight=e.weight.T)),
        fx=lambda: net(lambda x, w, v: (x.relu() @ w) * v, vector(4, 4), vector(4), shapes=[(2, 3, 4)]),
    ),
    fault(
        "pooling that leaves the padding out", f"{READ}avg_pool", call_with(count_include_pad=True),
        fx=lambda: net(
            lambda x, c: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) + c(x), nn.Conv2d(4, 4, 3, padding=1),
        ),
    ),
    fault(
        "divisor of a pooling", f"{READ}avg_pool", call_with(divisor_override=None),
        fx=lambda: net(
            lambda x, c: F.avg_pool2d(x, 3, 1, 1, divisor_override=2) + c(x), nn.Conv2d(4, 4, 3, padding=1),
        ),
    ),
    fault(
        "axes of a padding", f"{READ}pad", reading(swapped_axes),
        fx=lambda: net(lambda x, c: c(F.pad(x, (2, 0, 0, 2))), nn.Conv2d(4, 4, 3)),
    ),
    fault(
        "padding with another value than zero", f"{READ}pad", call_with(value=None),
        fx=lambda: net(lambda x, c: c(F.pad(x, (1, 1, 1, 1), value=1.0)), nn.Conv2d(4, 4, 3)),
    ),
    fault(
        "order of a concatenation", f"{READ}cat",
        reading(lambda e: replace(e, terms=e.terms[::-1], sizes=e.sizes[::-1])),
        fx=lambda: net(lambda x, c, d: torch.cat([c(x), d(x)], 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 3, 3)),
    ),
    fault(
        "pieces of a split", "reparamc.fx.readers:_piece",
        reading(lambda e: replace(e, index=tuple(range(len(e.index))))),
        fx=lambda: net(lambda x, c: c(x).split(2, 1)[1], nn.Conv2d(4, 4, 3)),
    ),
    fault(
        "order of a slice", f"{READ}slice", reading(lambda e: replace(e, index=e.index[::-1])),
        fx=lambda: net(lambda x, c: c(x)[:, 1:3], nn.Conv2d(4, 4, 3)),
    ),
    fault(
        "channel shuffle read as nothing", "reparamc.fx.readers:_shuffled", result(sorted),
        fx=lambda: net(
            lambda x, a, c: c(F.channel_shuffle(a(x).relu(), 2)), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 1)
        ),
    ),
    fault(
        "a weight that forward changes read as applied", f"{SOURCES}applies_weight", taken(True),
        fx=lambda: standardised(lambda x, weight: weight / weight.std()),
    ),
    fault(
        "a weight that its operand depends on read as applied, by the certificate as well",
        f"{SOURCES}applies_weight", taken(True),
        Replace("reparamc.certificate.fx_sources:applied_by", taken(nn.Conv2d)),
        fx=lambda: standardised(lambda x, weight: weight * x.mean() * weight.mean()),
    ),
    fault(
        "hooks ignored", "reparamc.fx.calls:is_plain",
        instead(lambda module: type(module).__module__.startswith("torch.nn.modules")),
        fx=lambda: hooked(*net(lambda x, c, n: n(c(x)), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))),
    ),
    fault(
        "writes in place ignored", "reparamc.fx.memory:Memory.writers", instead(lambda self, node: []),
        fx=lambda: net(written_between, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    ),
    fault(
        "writes in place seen and allowed", "reparamc.fx.graph:FxGraph.obstacle", instead(lambda *_: None),
        fx=lambda: net(written_between, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    ),
    fault(
        "duplicates across a write in place", "reparamc.fx.graph:FxGraph.is_written", instead(lambda *_, **__: False),
        fx=lambda: net(written_twice, nn.Conv2d(4, 4, 3)),
    ),
    fault(
        "anything taken for linear", "reparamc.fx.graph:FxGraph.moves", also_linear, *UNCHECKED_PROBE,
        fx=lambda: net(
            lambda x, c, d: d(c(x).relu()), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), shapes=[(2, 4, 19, 18)]
        ),
    ),
]  # fmt: skip


def hooked(model: Any, inputs: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """A convolution with a hook that changes its result."""
    model.part0.register_forward_hook(lambda module, args, result: result * 2)
    return model, inputs


def written_twice(x: Any, c: Any) -> Any:
    """The same convolution of the same value, which is written into in between."""
    u = x.sin()
    y = c(u).tanh()
    u.add_(1)
    return y + c(u).sigmoid()


def written_between(x: Any, c: Any, n: Any) -> Any:
    """The operand of a region is written into before the region ends."""
    u = x.sin()
    y = c(u)
    u.add_(1)
    return n(y) + u.mean()


def called(function: str, change: Any) -> Make:
    """For `Emitter._call`: one of torch's functions is called with other arguments."""
    return given(lambda self, f, *args: (self, f, *(change(*args) if f.__name__ == function else args)))


def module_with(**attributes: Any) -> Make:
    """For `Emitter._add`: modules that have these attributes get other values; each a function of the right one."""

    def changed(self: Any, module: Any) -> tuple[Any, Any]:
        for name, change in attributes.items():
            if hasattr(module, name):
                setattr(module, name, change(getattr(module, name)))
        return self, module

    return given(changed)


def written_as(change: Any) -> Make:
    """For `Emitter._conv`, `_select` and the like: another expression is written."""
    return given(lambda self, e: (self, change(e)))


def turned_round(original: Any) -> Any:
    """A sum's subtractions are of the sum so far."""

    def write(self: Any, e: Any) -> Any:
        node = original(self, e)
        if getattr(node.target, "__name__", "") == "sub":
            node.args = node.args[::-1]
        return node

    return write


def overwriting(original: Any) -> Any:
    """The first parameter of the region, if it has this shape, is overwritten."""

    def fill(self: Any, module: Any, weight: Any, bias: Any) -> None:
        original(self, module, weight, bias)
        old = dict(self.target.source.named_parameters()).get((self.splice.parameters or ("",))[0])
        if old is not None and old.shape == module.weight.shape:
            old.data.copy_(module.weight.data)

    return fill


def of_old_operand(original: Any) -> Any:
    def reshape(self: Any, x: Any, op: Any) -> Any:
        return original(self, self.target.current(op.native.args[0]), op)

    return reshape


def turned_back(original: Any) -> Any:
    """A permutation is written as its inverse."""

    def emit(self: Any, e: Any, top: bool) -> Any:
        op = e.op if isinstance(e, Layout) else None
        return original(self, replace(e, op=Permute(tuple(np.argsort(op.axes)))) if isinstance(op, Permute) else e, top)

    return emit


def exchanged(original: Any) -> Any:
    """The first two operands of a splice in each other's place."""

    def init(self: Any, *args: Any) -> None:
        original(self, *args)
        two = [e for e in self.values if isinstance(e, Source)][:2]
        self.values.update(zip(two, [self.values[e] for e in reversed(two)], strict=True))

    return init


def without_sign(original: Any) -> Any:
    def fold(self: Any, node: Any) -> None:
        self.facts.known[node] = self.facts.known[node].abs()
        original(self, node)

    return fold


FX_WRITERS = [
    fault(
        "a subtraction turned round", f"{EMIT}_sum", turned_round,
        fx=lambda: net(
            lambda x, c, n: n(c(x)) - x.relu(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        ),
    ),
    fault(
        "padding of the wrong axes", f"{EMIT}_conv", written_as(swapped_axes),
        fx=lambda: net(
            lambda x, c, n: n(c(F.pad(x, (2, 0, 0, 2)))), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        ),
    ),
    fault(
        "padding at the end as at the beginning", f"{EMIT}_conv",
        written_as(lambda e: geometry(e, end=e.padding[0]) if e.kernel else e),
        fx=lambda: net(
            lambda x, c, n: n(c(F.pad(x, (2, 0, 0, 2)))), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        ),
    ),
    fault(
        "stride not written", f"{EMIT}_add", module_with(stride=lambda s: (1,) * len(s)),
        fx=lambda: net(lambda x, c, n: n(c(x)), nn.Conv2d(4, 4, 3, stride=2), nn.BatchNorm2d(4)),
    ),
    fault(
        "dilation not written", f"{EMIT}_add", module_with(dilation=lambda d: (1,) * len(d)),
        fx=lambda: net(lambda x, c, n: n(c(x)), nn.Conv2d(4, 4, 3, dilation=2, padding=2), nn.BatchNorm2d(4)),
    ),
    fault(
        "bias not written", f"{EMIT}_fill",
        given(lambda self, module, weight, bias: (self, module, weight, None if bias is None else 0 * bias)),
        fx=lambda: net(lambda x, c, n: n(c(x)), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    ),
    fault(
        "weight of a transposed convolution on the wrong axis", f"{EMIT}_conv_transpose",
        written_as(lambda e: replace(e, weight=e.weight.swapaxes(0, 1))),
        fx=lambda: net(lambda x, c, n: n(c(x)), nn.ConvTranspose2d(4, 4, 3, stride=2), nn.BatchNorm2d(4)),
    ),
    fault(
        "output_padding not written", f"{EMIT}_add", module_with(output_padding=lambda p: (0,) * len(p)),
        fx=lambda: net(
            lambda x, c, n: n(c(x)), nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1),
            nn.BatchNorm2d(4),
        ),
    ),
    fault(
        "a slice that starts at zero", f"{EMIT}_select",
        written_as(lambda e: replace(e, index=tuple(range(len(e.index))))), NO_SHRINK,
        fx=lambda: net(
            lambda x, c: halves(c(x).relu(), slice(1, 2), slice(2, 4)), nn.Conv2d(4, 4, 3)
        ),
    ),
    fault(
        "a selection in order", f"{EMIT}_select", written_as(lambda e: replace(e, index=tuple(sorted(e.index)))),
        fx=lambda: net(lambda x, c: halves(c(x).relu(), slice(2, 4), slice(0, 2)), nn.Conv2d(4, 4, 3)),
    ),
    fault(
        "a scale along another axis", f"{EMIT}_operand", given(lambda self, vector, _: (self, vector, -1)),
        fx=lambda: net(
            lambda x, c, s, t: c(x).relu() * s * t, nn.Conv2d(4, 4, 3, padding=1), vector(4, 1, 1), vector(4, 1, 1),
            shapes=[(2, 4, 4, 4)],
        ),
    ),
    fault(
        "rounded twice", f"{EMIT}_tensor", given(lambda self, a: (self, np.asarray(a, np.float32))), least=1e-9,
        fx=lambda: net(lambda x, c, n: n(c(x)), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    ),
    fault(
        "the old weight overwritten, which another call reads", f"{EMIT}_fill", overwriting,
        fx=lambda: net(lambda x, c, n: c(n(c(x)).relu()), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    ),
    fault(
        "a reshape of the old operand", f"{EMIT}_reshape", of_old_operand,
        fx=lambda: net(lambda x, c, v: c(x).flatten(2) * v, nn.Conv2d(4, 4, 3), vector(4, 1)),
    ),
    fault(
        "a permutation written as its inverse", f"{EMIT}_emit", turned_back,
        fx=lambda: net(lambda x, c, v: c(x).permute(0, 2, 3, 1) * v, nn.Conv2d(4, 4, 3), vector(4)),
    ),
    fault(
        "operands exchanged", f"{EMIT}__init__", exchanged,
        fx=lambda: net(
            lambda x, c, d, n: c(x.relu()) + n(d(x)), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        ),
    ),
    fault(
        "a size asked along another axis", "reparamc.fx.sizes:Mover._read",
        given(lambda self, x, axis: (self, x, axis - 1)),
        fx=lambda: net(lambda x, c, n: like(n(y := c(x)).relu(), y), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
    ),
    fault(
        "factors of a size forgotten", "reparamc.fx.sizes:Mover._product",
        given(lambda self, dim, user: (self, Dim.of(dim.symbols[0]), user)),
        fx=lambda: net(
            lambda x, c, n: tokens(n(x.relu()).flatten(2).transpose(1, 2), c), nn.Linear(4, 4), nn.BatchNorm2d(4)
        ),
    ),
    fault(
        "a tensor that is reshaped in place keeps its shape", "reparamc.fx.memory:Memory.keeps_shape",
        instead(lambda *_: True),
        fx=lambda: net(
            lambda x, n, c: (
                u := x.relu(), y := n(u), z := c(y).relu(), u.unsqueeze_(0), z.reshape(-1, y.shape[1]),
            )[4], nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3),
        ),
    ),
    fault(
        "folded constants without their sign", "reparamc.fx.editor:Editor._fold", without_sign,
        fx=lambda: net(lambda x, w: x * (w - 3).tanh(), nn.Parameter(vector(4, 1, 1))),
    ),
]  # fmt: skip


def halves(x: Any, first: slice, second: slice) -> Any:
    """Two slices of channels, put together again."""
    return torch.cat([x[:, first], x[:, second]], 1)


def like(z: Any, y: Any) -> Any:
    """``z`` in the shape of ``y``, which two numbers tell."""
    return z.reshape(y.size(0), y.size(1), y.size(2), -1)


def tokens(t: Any, c: Any) -> Any:
    """A linear layer over tokens, after which their number is told."""
    return c(t).reshape(-1, t.shape[1], 2, 2).relu()
