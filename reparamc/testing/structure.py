"""Linear structure without a host: a list of steps from which a torch module and an ONNX model are made alike.

A `Structure` says what is computed and holds no arrays. Its parameters follow from its seed, so that an
example which fails can be printed in a few lines, made again, and shrunk step by step. The two builders
(`fx_models`, `onnx_models`) share nothing but this file, so a structure is also the same function in two forms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Ints = tuple[int, ...]
Arrays = dict[str, np.ndarray]

ACTIVATIONS = ("relu", "sigmoid", "tanh")
BATCHNORM_KINDS = ("ordinary", "zero gain", "small variance", "large mean")


class Step:
    """One operator.

    Attributes:
        op: its kind, a key of `OPERATORS`.
        inputs: the values it reads: 0 is the input, n the result of the n-th step.
        at: its attributes; sizes, kernels and paddings have one entry per spatial axis.
    """

    def __init__(self, op: str, inputs: Ints, **at: Any) -> None:
        self.op, self.inputs, self.at = op, inputs, at

    def __repr__(self) -> str:
        return f"Step({', '.join([repr(self.op), repr(self.inputs), *(f'{k}={v!r}' for k, v in self.at.items())])})"

    def __getitem__(self, name: str) -> Any:
        return self.at[name]

    def variant(self, count: int) -> int:
        """Which of ``count`` ways to write this step; 0 is the plainest."""
        return self.at.get("spelling", 0) % count

    @property
    def padded_same(self) -> bool:
        """Whether the padding of this convolution is what frameworks call "same": of stride 1, more at the end."""
        reach = same_padding(self["kernel"], self["dilation"])
        ends = zip(self["begin"], self["end"], reach, strict=True)
        return set(self["stride"]) == {1} and all(b == r // 2 and e == r - b for b, e, r in ends)


OPERATORS: Mapping[str, str] = {
    "conv": "out, kernel, stride, dilation, begin, end, groups, bias, computed (its weight is an operator's result)",
    "transposed": "out, kernel, stride, dilation, pad, extra (output padding), groups, bias",
    "linear": "out, bias; over the last axis",
    "batchnorm": "state (one of `BATCHNORM_KINDS`), eps",
    "scale": "a factor per channel",
    "shift": "a constant per channel",
    "number": "a factor for all channels",
    "negate": "",
    "complement": "a constant per channel minus the value",
    "add": "of two values or more",
    "subtract": "of two values",
    "concat": "along the channels",
    "part": "sizes, which: one part of a split of the channels",
    "select": "index: these channels, in this order",
    "shuffle": "groups",
    "pool": "kernel, stride, pad; average, the zeros of the padding counted or not",
    "pad": "begin, end, value",
    "crop": "begin, end",
    "mean": "keep; over all positions",
    "tokens": "images [N, C, *S] to [N, prod(S), C]",
    "heads": "heads, parts, which: tokens [N, L, parts * heads * C] to one part, [N, heads, L, C]",
    "merge": "heads: [N, heads, L, C] to tokens [N, L, heads * C]",
    "to_last": "the channel axis to the end",
    "to_first": "the channel axis back to its place",
    "identity": "dropout at rest, or nothing at all",
    "activation": "kind (one of `ACTIVATIONS`); the only step that is not linear",
}
"""What there is, and the attributes of each. All take ``spelling``, and those with parameters ``like``: the step
whose parameters they share."""


@dataclass(frozen=True)
class Value:
    """What is known of a value before it has a size.

    Attributes:
        channels: its number of channels.
        rank: its number of axes, that of the batch included.
        frame: axes to the right of the channel axis.
    """

    channels: int
    rank: int
    frame: int

    @property
    def axis(self) -> int:
        """The channel axis."""
        return self.rank - 1 - self.frame

    def column(self, vector: np.ndarray) -> np.ndarray:
        """``vector``, one number per channel, in the shape that broadcasts over this value."""
        return vector.reshape(vector.size, *[1] * self.frame)


@dataclass(frozen=True)
class Structure:
    """A graph of linear operators with one input. Its outputs are the last value, and maybe one in between.

    Attributes:
        channels: of the input.
        axes: spatial axes of the input [N, channels, *sizes]; 0 for [N, channels], -1 for tokens [N, L, channels].
        steps: in order of execution.
        seed: from which parameters are drawn.
        extra: a value that is an output too.
    """

    channels: int
    axes: int
    steps: tuple[Step, ...]
    seed: int = 0
    extra: int | None = None

    @cached_property
    def values(self) -> list[Value]:
        """The input and the result of every step."""
        found = [Value(self.channels, 3, 0) if self.axes < 0 else Value(self.channels, self.axes + 2, self.axes)]
        for step in self.steps:
            found.append(result_of(step, [found[n] for n in step.inputs]))
        return found

    @cached_property
    def parameters(self) -> dict[int, Arrays]:
        """The parameters of each step that has some, by its number (the first step is 1), in float64."""
        return {
            n: drawn
            for n, step in enumerate(self.steps, 1)
            if "like" not in step.at and (drawn := _parameters(step, self.values[step.inputs[0]], [self.seed, n]))
        }

    @property
    def outputs(self) -> Ints:
        return (len(self.steps),) if self.extra is None else (len(self.steps), self.extra)

    def owner(self, number: int) -> int:
        """The step whose parameters step ``number`` uses: itself unless it shares."""
        return self.steps[number - 1].at.get("like", number)

    def users(self, number: int) -> int:
        """How often value ``number`` is used, as an output too."""
        return sum(step.inputs.count(number) for step in self.steps) + self.outputs.count(number)

    def sizes(self, given: Sequence[int]) -> list[Ints | None]:
        """The spatial sizes of every value for an input of these; None where a value has none that matter."""
        sizes: list[Ints | None] = [tuple(given)]
        for step in self.steps:
            size = sizes[step.inputs[0]]
            sizes.append(size and _size_after(step, size))
        return sizes

    def shape(self, batch: int = 2) -> Ints:
        """A shape for the input, with odd and even sizes that differ, just larger than its kernels need."""
        if self.axes < 0:
            return (batch, 5, self.channels)
        sizes = [7, 6, 5][: self.axes]
        while any(size and min(size) < 1 for size in self.sizes(sizes)):
            sizes = [n + 2 for n in sizes]
        return (batch, self.channels, *sizes)

    def count(self, *ops: str) -> int:
        """How many steps are of these kinds; without any, how many are linear and neither shared nor identities."""
        return sum(s.op in ops if ops else s.op not in ("activation", "identity") for s in self.steps)


def result_of(step: Step, operands: Sequence[Value]) -> Value:
    """What is known of the result of ``step``."""
    x = operands[0]
    match step.op:
        case "conv" | "transposed" | "linear":
            return Value(step["out"], x.rank, x.frame)
        case "concat":
            return Value(sum(v.channels for v in operands), x.rank, x.frame)
        case "part":
            return Value(step["sizes"][step["which"]], x.rank, x.frame)
        case "select":
            return Value(len(step["index"]), x.rank, x.frame)
        case "mean":
            return x if step["keep"] else Value(x.channels, x.rank - x.frame, 0)
        case "tokens":
            return Value(x.channels, 3, 0)
        case "heads":
            return Value(x.channels // (step["heads"] * step["parts"]), 4, 0)
        case "merge":
            return Value(x.channels * step["heads"], 3, 0)
        case "to_last":
            return Value(x.channels, x.rank, 0)
        case "to_first":
            return Value(x.channels, x.rank, x.rank - 2)
        case _:
            return x


def _size_after(step: Step, size: Ints) -> Ints | None:
    """Sizes after ``step``; None where there are none any more, or they do not matter."""
    at = step.at
    match step.op:
        case "conv":
            every = zip(size, at["begin"], at["end"], at["dilation"], at["kernel"], at["stride"], strict=True)
            return tuple((n + b + e - d * (k - 1) - 1) // s + 1 for n, b, e, d, k, s in every)
        case "pool":
            every = zip(size, at["pad"], at["kernel"], at["stride"], strict=True)
            # torch wants an input of three axes to be as large as the kernel, whatever the padding.
            return tuple((n + 2 * p - k) // s + 1 if n >= k else 0 for n, p, k, s in every)
        case "transposed":
            every = zip(size, at["stride"], at["dilation"], at["kernel"], at["pad"], at["extra"], strict=True)
            return tuple((n - 1) * s + d * (k - 1) + 1 - 2 * p + e for n, s, d, k, p, e in every)
        case "pad":
            return tuple(n + b + e for n, b, e in zip(size, at["begin"], at["end"], strict=True))
        case "crop":
            return tuple(n - b - e for n, b, e in zip(size, at["begin"], at["end"], strict=True))
        case "mean" if at["keep"]:
            return (1,) * len(size)
        case "mean" | "tokens":
            return None
        case _:
            return size


def _parameters(step: Step, x: Value, seed: list[int]) -> Arrays:
    rng, at = np.random.default_rng(seed), step.at
    match step.op:
        case "conv" | "linear":
            groups, kernel = at.get("groups", 1), at.get("kernel", ())
            drawn = {"weight": _weight(rng, (at["out"], x.channels // groups, *kernel), x.channels // groups)}
        case "transposed":
            each = at["out"] // at["groups"]
            drawn = {"weight": _weight(rng, (x.channels, each, *at["kernel"]), x.channels // at["groups"])}
        case "batchnorm":
            return batchnorm_state(x.channels, at["state"], rng)
        case "scale" | "shift" | "complement":
            return {step.op: _away_from_zero(rng, x.channels)}
        case "number":
            return {"number": _away_from_zero(rng, 1).reshape(())}
        case _:
            return {}
    if at["bias"]:
        drawn["bias"] = rng.uniform(-1, 1, at["out"])
    return drawn


def _weight(rng: np.random.Generator, shape: Ints, inputs: int) -> np.ndarray:
    taps = inputs * int(np.prod(shape[2:]))
    return rng.standard_normal(shape) / np.sqrt(max(taps, 1))


def _away_from_zero(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.uniform(0.4, 1.6, count) * rng.choice([-1.0, 1.0], count)


def batchnorm_state(channels: int, kind: str, rng: np.random.Generator) -> Arrays:
    """Parameters and statistics of a BatchNorm by the names that torch gives them, in float64.

    ``kind`` is one of `BATCHNORM_KINDS`; all have weights of either sign, biases and means away from zero.
    """
    state = {
        "weight": _away_from_zero(rng, channels),
        "bias": rng.uniform(-1, 1, channels),
        "running_mean": rng.uniform(-1, 1, channels),
        "running_var": rng.uniform(0.5, 2, channels),
    }
    some = rng.random(channels) < 0.5
    some[rng.integers(channels)] = True
    if kind == "zero gain":
        state["weight"][some] = 0
    elif kind == "small variance":
        state["running_var"][some] = 1e-3
    elif kind == "large mean":
        state["running_mean"][some] *= 20
    return state


def same_padding(kernel: Iterable[int], dilation: Iterable[int]) -> Ints:
    """How much padding keeps the sizes, both ends together."""
    return tuple(d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
