"""Drawing structures: by hypothesis for tests, or from a seed for long runs.

The first of all choices is always the plainest, numbers of things come before the things, and weights are a seed. So
the simplest example is the smallest graph, and hypothesis reports a test that fails with a few operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reparamc.testing.structure import (
    ACTIVATIONS,
    BATCHNORM_KINDS,
    Ints,
    Step,
    Structure,
    Value,
    result_of,
    same_padding,
)

Choice = Callable[[int, int], int]
"""A whole number from the first to the second, both included; the first is the simplest."""

AXES = (2, 1, 3, 0, -1)
WIDTHS = (2, 4, 6, 1)
SEEDS = 2**16
_EPSILONS = (2.0**-17, 2.0**-10)
"""About 1e-5 and 1e-3, and exact in float32, which is how ONNX keeps them."""


class _Sketch:
    """A structure under construction."""

    def __init__(self, choice: Choice, channels: int, axes: int) -> None:
        self.choice, self.channels, self.axes = choice, channels, axes
        self.steps: list[Step] = []
        self.values = list(Structure(channels, axes, ()).values)

    def add(self, op: str, *inputs: int, **at: Any) -> int:
        if spelling := self.choice(0, 5):
            at["spelling"] = spelling
        step = Step(op, inputs, **at)
        self.values.append(result_of(step, [self.values[n] for n in inputs]))
        self.steps.append(step)
        return len(self.steps)

    def one_in(self, count: int) -> bool:
        """A choice that is usually, and in the simplest example always, no."""
        return self.choice(0, count - 1) == count - 1

    def choose(self, options: Sequence[Any]) -> Any:
        return options[self.choice(0, len(options) - 1)]

    def ints(self, count: int, low: int, high: int) -> Ints:
        return tuple(self.choice(low, high) for _ in range(count))

    def groups(self, inputs: int, outputs: int) -> int:
        return self.choose([g for g in (1, 2, 3, 4, 6) if inputs % g == 0 and outputs % g == 0])

    def finish(self, extra: int | None = None) -> Structure:
        return Structure(self.channels, self.axes, tuple(self.steps), self.choice(0, SEEDS), extra)


# One operator


def _conv(s: _Sketch, x: int, out: int, stride: Ints, grid: bool) -> int:
    """A convolution; on the ``grid`` it keeps sizes up to its stride, and may have the weights of an earlier one."""
    axes, inputs = s.values[x].frame, s.values[x].channels
    twins = [
        n
        for n, step in enumerate(s.steps, 1)
        if step.op == "conv"
        and (step["out"], step["stride"]) == (out, stride)
        and tuple(map(sum, zip(step["begin"], step["end"], strict=True)))
        == same_padding(step["kernel"], step["dilation"])
        and s.values[step.inputs[0]] == s.values[x]
        and "like" not in step.at
    ]
    if grid and twins and s.one_in(3):
        twin = s.choose(twins)
        shared = {k: v for k, v in s.steps[twin - 1].at.items() if k != "spelling"}
        return s.add("conv", x, **shared, like=twin)
    kernel = s.ints(axes, 1, 3)
    dilation = s.ints(axes, 1, 2) if s.one_in(4) else (1,) * axes
    reach = same_padding(kernel, dilation)
    begin = tuple(s.choose([r // 2, 0, r]) for r in reach)
    end = tuple(r - b for r, b in zip(reach, begin, strict=True))
    match "same" if grid else s.choose(["same", "none", "any"]):
        case "none":
            begin = end = (0,) * axes
        case "any":
            end = s.ints(axes, 0, 1)
    return s.add(
        "conv", x, out=out, kernel=kernel, stride=stride, dilation=dilation, begin=begin, end=end,
        groups=s.groups(inputs, out), bias=not s.one_in(3), computed=s.one_in(20),
    )  # fmt: skip


def _transposed(s: _Sketch, x: int, out: int) -> int:
    axes, inputs = s.values[x].frame, s.values[x].channels
    kernel, stride = s.ints(axes, 1, 3), s.ints(axes, 1, 2)
    pad = tuple(s.choose([0, 1]) if k > 2 else 0 for k in kernel)
    extra = tuple(s.choose([0, 1]) if n > 1 else 0 for n in stride)
    return s.add(
        "transposed", x, out=out, kernel=kernel, stride=stride, dilation=(1,) * axes, pad=pad, extra=extra,
        groups=s.groups(inputs, out), bias=not s.one_in(3),
    )  # fmt: skip


def _linear(s: _Sketch, x: int, out: int) -> int:
    return s.add("linear", x, out=out, bias=not s.one_in(3))


def _matrix(s: _Sketch, x: int, out: int) -> int:
    """What mixes channels and nothing else."""
    axes = s.values[x].frame
    return _pointwise(s, x, out, 1) if axes else _linear(s, x, out)


def _pointwise(s: _Sketch, x: int, out: int, groups: int, largest: int = 1) -> int:
    """A convolution of stride 1 that keeps the sizes, of an odd kernel of ``largest`` at most."""
    axes = s.values[x].frame
    kernel = tuple(s.choose(range(1, largest + 1, 2)) for _ in range(axes))
    pad = tuple(k // 2 for k in kernel)
    ones = (1,) * axes
    return s.add(
        "conv", x, out=out, kernel=kernel, stride=ones, dilation=ones, begin=pad, end=pad, groups=groups,
        bias=not s.one_in(3), computed=False,
    )  # fmt: skip


def _batchnorm(s: _Sketch, x: int) -> int:
    return s.add("batchnorm", x, state=s.choose(BATCHNORM_KINDS), eps=s.choose(_EPSILONS))


def _affine(s: _Sketch, x: int) -> int:
    """What treats each channel separately."""
    kinds = ["batchnorm"] if _takes_batchnorm(s.values[x]) else []
    kind = s.choose([*kinds, "scale", "shift", "number", "negate", "complement", "identity"])
    return _batchnorm(s, x) if kind == "batchnorm" else s.add(kind, x)


def _activation(s: _Sketch, x: int) -> int:
    return s.add("activation", x, kind=s.choose(ACTIVATIONS))


def _takes_batchnorm(value: Value) -> bool:
    """Both frameworks normalise axis 1 only."""
    return value.axis == 1


def _some_channels(s: _Sketch, x: int) -> int:
    every = range(s.values[x].channels)
    half = len(every) // 2
    index = s.choose([every[: len(every) - half], every[half:], every[::-1], [*every[1:], 0]])
    return s.add("select", x, index=tuple(index))


# Several operators


def _branch(s: _Sketch, x: int, out: int, stride: Ints, depth: int) -> int:
    """A branch from ``x`` to ``out`` channels on the grid of ``stride``, a few operators long."""
    value = s.values[x]
    keeps = out == value.channels
    still = keeps and all(n == 1 for n in stride)
    kinds = ["grid"] + ["skip"] * still + ["pool"] * (keeps and value.frame > 0) + ["sum"] * (depth > 0)
    if not still and s.one_in(5) and _takes_batchnorm(value):
        x = _batchnorm(s, x)  # before the convolution
    match s.choose(kinds):
        case "skip":
            y = x
        case "pool":
            pad = s.ints(value.frame, 0, 1)
            y = _pool(s, x, tuple(2 * p + 1 for p in pad), stride, pad)
        case "sum":
            y = _sum(s, x, out, stride, depth - 1)
        case _:
            y = _conv(s, x, out, stride, grid=True) if value.frame else _linear(s, x, out)
    if s.one_in(2):
        y = _affine(s, y)
    if s.one_in(5):
        y = _matrix(s, y, out)
    return y


def _pool(s: _Sketch, x: int, kernel: Ints, stride: Ints, pad: Ints) -> int:
    return s.add("pool", x, kernel=kernel, stride=stride, pad=pad, counted=not s.one_in(4))


def _sum(s: _Sketch, x: int, out: int, stride: Ints, depth: int) -> int:
    """Two branches or more, added one by one, all at once, or subtracted."""
    terms = [_branch(s, x, out, stride, depth) for _ in range(2)]
    while len(terms) < 4 and s.one_in(3):
        terms.append(s.choose(terms) if s.one_in(3) else _branch(s, x, out, stride, depth))
    return _total(s, terms)


def _total(s: _Sketch, terms: list[int]) -> int:
    if len(terms) == 2:
        return s.add(s.choose(["add", "subtract"]), *terms)
    if s.one_in(2):
        return s.add("add", *terms)
    y = terms[0]
    for term in terms[1:]:
        y = s.add("add", y, term)
    return y


def _mixer(s: _Sketch, x: int) -> int:
    """x + scale (mixer(x) - norm(x)), the mixer a sum of depthwise branches."""
    width = s.values[x].channels
    norms = [_batchnorm(s, y) for y in (x, _pointwise(s, x, width, width, 3), _pointwise(s, x, width, width))]
    y = s.add("subtract", _total(s, norms), _batchnorm(s, x))
    return s.add("add", x, s.add("scale", y))


def _twice(s: _Sketch, x: int, activations: bool) -> int:
    """One operator, applied to one value at two places."""
    value = s.values[x]
    first = _conv(s, x, s.choose(WIDTHS), _strides(s, value.frame), grid=True)
    owner = s.steps[first - 1].at.get("like", first)
    again = s.add("conv", x, **{k: v for k, v in s.steps[first - 1].at.items() if k != "spelling"} | {"like": owner})
    return s.add("add", *(_activation(s, y) if activations else y for y in (first, again)))


def _parts(s: _Sketch, x: int, activations: bool) -> int:
    """The channels in two parts that may overlap, each treated separately, and put together."""
    width = s.values[x].channels
    cut = s.choice(1, width - 1)
    first = s.add("part", x, sizes=(cut, width - cut), which=0)
    if overlap := int(cut > 1 and s.one_in(5)):
        second = s.add("select", x, index=tuple(range(cut - overlap, width)))
    else:
        second = s.add("part", x, sizes=(cut, width - cut), which=1)
    parts: list[int] = []
    for part in (first, second):
        y = _branch(s, part, s.values[part].channels, (1,) * s.values[x].frame, 0) if s.one_in(2) else _affine(s, part)
        parts.append(_activation(s, y) if activations and s.one_in(2) else y)
    return s.add("concat", *(parts if s.one_in(2) else parts[::-1]))


def _attention(s: _Sketch, x: int, activations: bool) -> int:
    """A linear layer over tokens, its channels cut into q, k, v and into heads; some are scaled."""
    heads, parts, each = s.choose([2, 1, 3]), s.choose([3, 1, 2]), s.choose([2, 1, 4])
    y = _linear(s, x, heads * parts * each)
    terms: list[int] = []
    for which in range(parts):
        term = s.add("heads", y, heads=heads, parts=parts, which=which)
        if s.one_in(2):
            term = s.add(s.choose(["number", "scale", "shift"]), term)
        terms.append(_activation(s, term) if activations and s.one_in(2) else term)
    return s.add("merge", terms[0] if parts == 1 else _total(s, terms), heads=heads)


def _block(s: _Sketch, x: int, activations: bool) -> int:
    """One operator, or a group of operators around which a network is built."""
    value, width = s.values[x], s.values[x].channels
    images = ["pool", "pad", "crop", "transposed", "transposed", "to_last", "mixer", "twice"] if value.frame else []
    first = ["batchnorm", "shuffle"] if _takes_batchnorm(value) else []
    tokens = ["attention"] * 3 if value.rank == 3 and not value.frame else []
    kinds = ["linear", "linear", *first, "scale", "sum", "sum", "sum", "concat", "split", "select", *images, *tokens]
    match s.choose(kinds + ["activation"] * 2 * activations):
        case "linear" if value.frame:
            return _conv(s, x, s.choose(WIDTHS), s.ints(value.frame, 1, 2), grid=False)
        case "linear":
            return _linear(s, x, s.choose(WIDTHS))
        case "batchnorm":
            return _batchnorm(s, x)
        case "scale":
            return _affine(s, x)
        case "sum":
            return _sum(s, x, s.choose([width, *WIDTHS]), _strides(s, value.frame), 1)
        case "concat":
            stride = _strides(s, value.frame)
            return s.add("concat", *(_branch(s, x, s.choose(WIDTHS), stride, 0) for _ in range(s.choose([2, 3]))))
        case "split" if width > 1:
            return _parts(s, x, activations)
        case "select" | "split":
            return _some_channels(s, x)
        case "shuffle":
            return s.add("shuffle", x, groups=s.groups(width, width))
        case "attention":
            return _attention(s, x, activations)
        case "activation":
            return _activation(s, x)
        case "twice":
            return _twice(s, x, activations)
        case kind:
            return _on_images(s, kind, x)


def _on_images(s: _Sketch, kind: str, x: int) -> int:
    frame = s.values[x].frame
    match kind:
        case "pool":
            kernel = s.ints(frame, 1, 3)
            pad = tuple(s.choose([0, 1]) if k > 1 else 0 for k in kernel)
            return _pool(s, x, kernel, s.ints(frame, 1, 2), pad)
        case "pad":
            begin, end = s.ints(frame, 0, 2), s.ints(frame, 0, 2)
            return s.add("pad", x, begin=begin, end=end, value=s.choose([0.0, 0.0, 0.0, 0.5]))
        case "crop":
            return s.add("crop", x, begin=s.ints(frame, 0, 1), end=s.ints(frame, 0, 1))
        case "transposed":
            return _transposed(s, x, s.choose(WIDTHS))
        case "mixer":
            return _mixer(s, x)
        case _:
            y = _linear(s, s.add("to_last", x), s.choose(WIDTHS))
            return s.add("to_first", s.add("scale", y) if s.one_in(2) else y)


def _strides(s: _Sketch, axes: int) -> Ints:
    return s.ints(axes, 1, 2) if s.one_in(3) else (1,) * axes


def _head(s: _Sketch, x: int) -> int:
    """A classifier, or the way into tokens."""
    kind = s.choose(["mean", "tokens", "pooled map"])
    x = s.add("tokens", x) if kind == "tokens" else s.add("mean", x, keep=kind == "pooled map")
    if _takes_batchnorm(s.values[x]) and s.one_in(2):
        x = _batchnorm(s, x)
    if kind == "tokens" and s.one_in(2):
        return _sum(s, x, s.choose(WIDTHS), (), 1)
    return _matrix(s, x, s.choose(WIDTHS))


def sketched(choice: Choice, axes: Sequence[int], activations: bool, blocks: int) -> Structure:
    """A network of at most so many blocks, each a single operator or a group of them; a head may follow."""
    s = _Sketch(choice, WIDTHS[choice(0, len(WIDTHS) - 1)], axes[choice(0, len(axes) - 1)])
    x = _block(s, 0, activations)
    for _ in range(blocks - 1):
        if choice(0, 3) == 0:
            break
        if s.one_in(8):
            x = s.choose(range(len(s.values)))  # an older value is read again
        x = _block(s, x, activations)
    if s.values[x].frame and s.one_in(3):
        x = _head(s, x)
    extra = choice(1, len(s.steps) - 1) if len(s.steps) > 1 and s.one_in(6) else None
    return s.finish(extra)


def sketched_branches(choice: Choice, channels: int, out: int, stride: int, count: int, axes: int) -> Structure:
    """Parallel branches of one input that are added up, and nothing else."""
    s = _Sketch(choice, channels, axes)
    _total(s, [_branch(s, 0, out, (stride,) * axes, 0) for _ in range(count)])
    return s.finish()


def random_structure(
    seed: Sequence[int], axes: Sequence[int] = AXES, activations: bool = True, blocks: int = 5
) -> Structure:
    """The structure of a seed; the same one each time."""
    rng = np.random.default_rng(list(seed))
    return sketched(lambda low, high: int(rng.integers(low, high, endpoint=True)), axes, activations, blocks)
