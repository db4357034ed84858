"""Faults in the readers and the emitter of torch.fx, and in what they know of a graph."""

from __future__ import annotations

from typing import Any

from fault_models import F, net, nn, torch, vector
from planting import Edit, fault

READ, EMIT = "reparamc.fx.operators:_read_", "reparamc.fx.emit:Emitter."

FX_READERS = [
    fault(
        "padding 'same' of an even kernel", "reparamc.fx.operators:_padding", "t // 2 for t in totals",
        "t - t // 2 for t in totals",
        fx=lambda: net(lambda x, c, n: n(c(x)), nn.Conv2d(4, 4, 2, padding="same"), nn.BatchNorm2d(4)),
    ),
    fault(
        "bias of a convolution forgotten", f"{READ}conv", "None if bias is None else array(bias)", "None",
        fx=lambda: net(lambda x, c, n: n(c(x)), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    ),
    fault(
        "groups ignored", f"{READ}conv_transpose", "swap_sides(array(weight), groups)",
        "swap_sides(array(weight), 1).reshape(-1, weight.shape[0] // groups, *weight.shape[2:])",
        fx=lambda: net(
            lambda x, c, n: n(c(x)), nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2), nn.BatchNorm2d(4)
        ),
    ),
    fault(
        "output_padding ignored", f"{READ}conv_transpose", "b - m for b, m", "b for b, m",
        fx=lambda: net(
            lambda x, c, n: n(c(x)), nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1),
            nn.BatchNorm2d(4),
        ),
    ),
    fault(
        "statistics of the batch", f"{READ}batchnorm", 'call.get("training", False) is not False or ', "",
        fx=lambda: net(
            lambda x, c, m, v: F.batch_norm(c(x), m.clone(), v.clone(), training=True),
            nn.Conv2d(4, 4, 3), vector(4), vector(4).abs(),
        ),
    ),
    fault(
        "mean and variance exchanged", f"{READ}batchnorm", '"running_mean", "running_var")]',
        '"running_var", "running_mean")]',
        fx=lambda: net(
            lambda x, c, m, v: F.batch_norm(c(x), m, v), nn.Conv2d(4, 4, 3), vector(4).abs(), vector(4).abs() + 1
        ),
    ),
    fault(
        "c - x read as x - c", "reparamc.algebra.kernels:arithmetic",
        "(sign, c) if constant_first else (ONE, sign * c)", "(ONE, sign * c)",
        fx=lambda: net(lambda x, c, v: v - c(x), nn.Conv2d(4, 4, 3), vector(4, 1, 1)),
    ),
    fault(
        "alpha ignored", f"{READ}arithmetic", 'call.get("alpha", 1)', "1",
        fx=lambda: net(lambda x, c, d: torch.sub(c(x), d(x), alpha=3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)),
    ),
    fault(
        "c / x read as x / c", f"{READ}arithmetic", '(op == "div" and side == 0)', "False",
        fx=lambda: net(lambda x, c, v: v / c(x), nn.Conv2d(4, 4, 3), vector(4, 1, 1)),
    ),
    fault(
        "x / c read as x * c", "reparamc.algebra.kernels:arithmetic", "1 / c, ZERO", "c, ZERO",
        fx=lambda: net(lambda x, c, v: c(x) / v, nn.Conv2d(4, 4, 3), vector(4, 1, 1)),
    ),
    fault(
        "a - b read as b - a", f"{READ}sum", "a, b = operands", "b, a = operands",
        fx=lambda: net(lambda x, c, d: c(x) - d(x), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)),
    ),
    fault(
        "a constant along W taken for one per channel", "reparamc.fx.operators:_along_one_axis",
        "return axis_of_constant(dims, extent)", "return 1 - rank if dims else None",
        fx=lambda: net(lambda x, c, v: c(x) * v, nn.Conv2d(4, 4, 3, padding=1), vector(4), shapes=[(2, 4, 5, 4)]),
    ),
    fault(
        "matrix not transposed", f"{READ}product", "np.ascontiguousarray(array(weight).T)", "array(weight)",
        fx=lambda: net(lambda x, w, v: (x.relu() @ w) * v, vector(4, 4), vector(4), shapes=[(2, 3, 4)]),
    ),
    fault(
        "pooling that leaves the padding out", f"{READ}avg_pool", "any(pads) and not", "False and not",
        fx=lambda: net(
            lambda x, c: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) + c(x), nn.Conv2d(4, 4, 3, padding=1),
        ),
    ),
    fault(
        "divisor of a pooling", f"{READ}avg_pool", 'call.args.get("divisor_override") is not None', "False",
        fx=lambda: net(
            lambda x, c: F.avg_pool2d(x, 3, 1, 1, divisor_override=2) + c(x), nn.Conv2d(4, 4, 3, padding=1),
        ),
    ),
    fault(
        "axes of a padding", f"{READ}pad", "tuple(reversed(numbers[0::2]))", "tuple(numbers[0::2])",
        fx=lambda: net(lambda x, c: c(F.pad(x, (2, 0, 0, 2))), nn.Conv2d(4, 4, 3)),
    ),
    fault(
        "padding with another value than zero", f"{READ}pad", ' or call.get("value", 0) != 0', "",
        fx=lambda: net(lambda x, c: c(F.pad(x, (1, 1, 1, 1), value=1.0)), nn.Conv2d(4, 4, 3)),
    ),
    fault(
        "order of a concatenation", f"{READ}cat", "Concat(tuple(o), counts, axis)",
        "Concat(tuple(o)[::-1], counts[::-1], axis)",
        fx=lambda: net(lambda x, c, d: torch.cat([c(x), d(x)], 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 3, 3)),
    ),
    fault(
        "pieces of a split", "reparamc.fx.operators:_piece", "start = sum(parts[:index])", "start = 0",
        fx=lambda: net(lambda x, c: c(x).split(2, 1)[1], nn.Conv2d(4, 4, 3)),
    ),
    fault(
        "order of a slice", f"{READ}slice", "list(found[1])", "list(found[1])[::-1]",
        fx=lambda: net(lambda x, c: c(x)[:, 1:3], nn.Conv2d(4, 4, 3)),
    ),
    fault(
        "channel shuffle read as nothing", "reparamc.fx.operators:_shuffled", ".T.reshape(-1)", ".reshape(-1)",
        fx=lambda: net(
            lambda x, a, c: c(F.channel_shuffle(a(x).relu(), 2)), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 1)
        ),
    ),
    fault(
        "hooks ignored", "reparamc.fx.calls:is_plain", "and not hooked and", "and",
        fx=lambda: hooked(*net(lambda x, c, n: n(c(x)), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))),
    ),
    fault(
        "writes in place ignored", "reparamc.fx.memory:Memory.writers",
        "return self._writers.get(self._base(node), [])", "return []",
        fx=lambda: net(written_between, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    ),
    fault(
        "writes in place seen and allowed", "reparamc.fx.graph:FxGraph.obstacle", "if visible:", "if False:",
        fx=lambda: net(written_between, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    ),
    fault(
        "duplicates across a write in place", "reparamc.compiler.duplicates:find_duplicates",
        "not any(graph.is_written(v) for v in values)", "True",
        fx=lambda: net(written_twice, nn.Conv2d(4, 4, 3)),
    ),
    fault(
        "anything taken for linear", "reparamc.fx.graph:FxGraph.moves",
        "op not in _LINEAR_KINDS", 'op not in (*_LINEAR_KINDS, "same")',
        Edit("reparamc.algebra.probe:find_kernel", "if not _follows(", "if False and not _follows("),
        Edit("reparamc.algebra.probe:find_kernel", "if error <= slack else", "if True else"),
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


FX_WRITERS = [
    fault(
        "a subtraction turned round", f"{EMIT}_sum", "operator.sub, (y, self._value(t.x))",
        "operator.sub, (self._value(t.x), y)",
        fx=lambda: net(
            lambda x, c, n: n(c(x)) - x.relu(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        ),
    ),
    fault(
        "padding of the wrong axes", f"{EMIT}_conv", "reversed(list(zip(begin, end, strict=True)))",
        "list(zip(begin, end, strict=True))",
        fx=lambda: net(
            lambda x, c, n: n(c(F.pad(x, (2, 0, 0, 2)))), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        ),
    ),
    fault(
        "padding as in front behind", f"{EMIT}_conv", "if begin != end or min(begin) < 0:", "if min(begin) < 0:",
        fx=lambda: net(
            lambda x, c, n: n(c(F.pad(x, (2, 0, 0, 2)))), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        ),
    ),
    fault(
        "stride not written", f"{EMIT}_conv", "stride=e.stride", "stride=1",
        fx=lambda: net(lambda x, c, n: n(c(x)), nn.Conv2d(4, 4, 3, stride=2), nn.BatchNorm2d(4)),
    ),
    fault(
        "dilation not written", f"{EMIT}_conv", "dilation=e.dilation", "dilation=1",
        fx=lambda: net(lambda x, c, n: n(c(x)), nn.Conv2d(4, 4, 3, dilation=2, padding=2), nn.BatchNorm2d(4)),
    ),
    fault(
        "bias not written", f"{EMIT}_fill", "self._tensor(bias)", "self._tensor(bias * 0)",
        fx=lambda: net(lambda x, c, n: n(c(x)), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    ),
    fault(
        "weight of a transposed convolution on the wrong axis", f"{EMIT}_conv_transpose",
        "swap_sides(weight, e.groups)", "weight",
        fx=lambda: net(lambda x, c, n: n(c(x)), nn.ConvTranspose2d(4, 4, 3, stride=2), nn.BatchNorm2d(4)),
    ),
    fault(
        "output_padding not written", f"{EMIT}_conv_transpose", "output_padding=tuple(grown)", "output_padding=0",
        fx=lambda: net(
            lambda x, c, n: n(c(x)), nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1),
            nn.BatchNorm2d(4),
        ),
    ),
    fault(
        "a slice that starts at zero", f"{EMIT}_select", "x, axis, first, len(e.index)", "x, axis, 0, len(e.index)",
        fx=lambda: net(
            lambda x, c: halves(c(x).relu(), slice(1, 2), slice(2, 4)), nn.Conv2d(4, 4, 3)
        ),
    ),
    fault(
        "a selection in order", f"{EMIT}_select", "torch.tensor(e.index,", "torch.tensor(sorted(e.index),",
        fx=lambda: net(lambda x, c: halves(c(x).relu(), slice(2, 4), slice(0, 2)), nn.Conv2d(4, 4, 3)),
    ),
    fault(
        "a scale along another axis", f"{EMIT}_operand", "vector.reshape(-1, *[1] * (-1 - axis))", "vector",
        fx=lambda: net(
            lambda x, c, s, t: c(x).relu() * s * t, nn.Conv2d(4, 4, 3, padding=1), vector(4, 1, 1), vector(4, 1, 1),
            shapes=[(2, 4, 4, 4)],
        ),
    ),
    fault(
        "rounded twice", f"{EMIT}_tensor", "dtype=np.float64", "dtype=np.float32", least=1e-9,
        fx=lambda: net(lambda x, c, n: n(c(x)), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    ),
    fault(
        "the old weight overwritten, which another call reads", f"{EMIT}_fill",
        "tensor = self._tensor(weight)",
        "tensor = self._tensor(weight)\n"
        "    old = dict(self.graph.module.named_parameters()).get((self.splice.parameters or ('',))[0])\n"
        "    if old is not None and old.shape == tensor.shape:\n"
        "        old.data.copy_(tensor)",
        fx=lambda: net(lambda x, c, n: c(n(c(x)).relu()), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    ),
    fault(
        "a copied operator keeps its operand", f"{EMIT}_copy",
        "self._value(x) if n is moved else self.graph.current(n)",
        "(self._value(x), self.graph.current(n))[1]",
        fx=lambda: net(lambda x, c, v: c(x).permute(0, 2, 3, 1) * v, nn.Conv2d(4, 4, 3), vector(4)),
    ),
    fault(
        "operands exchanged", f"{EMIT}__init__",
        "self.values: dict[Expr, fx.Node] = {e: graph.current(v) for e, v in splice.native.items()}",
        "self.values = {e: graph.current(v) for e, v in splice.native.items()}\n"
        "    two = [e for e in self.values if type(e).__name__ == 'Source'][:2]\n"
        "    self.values.update(zip(two, [self.values[e] for e in reversed(two)]))",
        fx=lambda: net(
            lambda x, c, d, n: c(x.relu()) + n(d(x)), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        ),
    ),
    fault(
        "an extent asked along another axis", "reparamc.fx.sizes:_Sizes._read",
        '"size", (x, axis)', '"size", (x, axis - 1)',
        fx=lambda: net(lambda x, c, n: like(n(y := c(x)).relu(), y), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
    ),
    fault(
        "factors of an extent forgotten", "reparamc.fx.sizes:_Sizes._product",
        "(*(self._ask(s, user) for s in symbols), *[dim.factor] * (dim.factor != 1))", "[self._ask(symbols[0], user)]",
        fx=lambda: net(lambda x, c: tokens(x.relu().flatten(2).transpose(1, 2), c), nn.Linear(4, 4)),
    ),
    fault(
        "a tensor that is reshaped in place keeps its shape", "reparamc.fx.memory:Memory.keeps_shape",
        "self._base(node) not in self._reshaped", "True",
        fx=lambda: net(
            lambda x, n: (y := n(x.relu()), y.unsqueeze_(0), y.reshape(y.shape[1], -1))[2], nn.BatchNorm2d(4)
        ),
    ),
    fault(
        "folded constants without their sign", "reparamc.fx.graph:FxGraph.fold_constants",
        "value.detach().clone()", "value.detach().abs()",
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
    """A linear layer over tokens, in front of which their number is told."""
    return c(t.reshape(-1, t.shape[1], 4)).relu()
