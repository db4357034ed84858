"""Random small networks; `fuzz_onnx` makes ONNX models of them, and `fuzz_torch` torch modules.

A `Program` is a list of steps over numbered values, drawn by `draw` from a seed. It is made of blocks that give the
rewrites something to do (branches of one input, token mixers, chains of convolutions, equal convolutions, linear
layers over tokens, shuffles, borders that are written) and of single operators put anywhere, with non-linear ones in
between, values that are read again later, weights used twice, and several outputs. Sizes are odd and small, so that
borders count, and branches may agree in size by accident.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

WIDTHS = (1, 2, 3, 4, 6)
STATIC, OPEN_BATCH, OPEN = "static", "open batch", "open"
DTYPES = {"onnx": ("float32",), "fx": ("float64", "float64", "float32", "float32", "float16", "bfloat16")}
NONLINEAR = ("relu", "sigmoid", "tanh")


@dataclass(frozen=True)
class Step:
    """One operator: what it reads, its settings, and the names of its parameters by role."""

    op: str
    inputs: tuple[int, ...]
    settings: dict[str, Any]
    params: dict[str, str]


@dataclass
class Program:
    """Steps in order; the values are the inputs of the network and then one per step.

    Attributes:
        inputs: the shape of each input.
        openness: which extents of the inputs a model leaves open.
        shapes: the shape of every value, for inputs of those shapes.
    """

    inputs: list[tuple[int, ...]]
    openness: str
    dtype: str
    steps: list[Step] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    params: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: list[int] = field(default_factory=list)


class Unfit(Exception):
    """What was drawn does not fit the value it was drawn for; another is drawn instead."""


def draw(seed: Sequence[int], way: str) -> Program:
    """The program of a seed. ``way`` says whether operators may be drawn that only torch has ("fx")."""
    rng = np.random.default_rng(list(seed))
    return _Draw(rng, way).run()


class _Draw:
    def __init__(self, rng: np.random.Generator, way: str) -> None:
        self.rng, self.way = rng, way
        frame = int(rng.choice([1, 2, 2, 2, 2, 3]))
        width = int(rng.choice(WIDTHS[1:]))
        extents = tuple(int(n) for n in rng.integers(4, 10 if frame < 3 else 7, frame))
        shape = (int(rng.integers(1, 4)), width, *extents)
        count = 2 if rng.random() < 0.15 else 1
        openness = str(rng.choice([STATIC, OPEN_BATCH, OPEN, OPEN]))
        self.p = Program([shape] * count, openness, str(rng.choice(DTYPES[way])))
        self.p.shapes = [shape] * count

    def run(self) -> Program:
        x = 0
        if len(self.p.inputs) > 1 and self.chance(0.7):
            x = self.add(str(self.rng.choice(["plus", "minus"])), [0, 1])
        for _ in range(int(self.rng.integers(1, 5))):
            try:
                x = self.block(x)
            except Unfit:
                continue
            if self.chance(0.55):
                x = self.nonlinear(x)
            if self.chance(0.12):
                x = int(self.rng.integers(0, len(self.p.shapes)))  # an older value is read again
        if not self.p.steps:
            x = self.nonlinear(x)
        self.p.outputs = [len(self.p.shapes) - 1]
        if self.chance(0.25):
            others = range(len(self.p.inputs), len(self.p.shapes) - 1)
            self.p.outputs += [int(n) for n in self.rng.choice(others, 1)] if len(others) else []
        return self.p

    # Small things

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def pick(self, of: Sequence[Any]) -> Any:
        return of[int(self.rng.integers(len(of)))]

    def ints(self, low: int, high: int, n: int) -> tuple[int, ...]:
        return tuple(int(v) for v in self.rng.integers(low, high + 1, n))

    def shape(self, x: int) -> tuple[int, ...]:
        return self.p.shapes[x]

    def numbers(self, *shape: int, positive: bool = False) -> str:
        """A new parameter; now and then an old one of the same shape and use."""
        old = [k for k, v in self.p.params.items() if v.shape == shape and k.endswith("+" if positive else "-")]
        if old and self.chance(0.06):
            return self.pick(old)
        values = self.rng.standard_normal(shape) / max(1.0, prod(shape[1:])) ** 0.5
        values = np.abs(values) + 0.2 if positive else values
        name = f"p{len(self.p.params)}{'+' if positive else '-'}"
        rounded = values.astype(np.float16 if self.p.dtype == "float16" else np.float32)
        self.p.params[name] = np.asarray(rounded, np.float64)
        return name

    def add(self, op: str, inputs: Sequence[int], shape: Sequence[int] | None = None, /, **settings: Any) -> int:
        params = settings.pop("params", {})
        shape = self.shape(inputs[0]) if shape is None else tuple(shape)
        if min(shape, default=1) < 1 or prod(shape) > 20000:
            raise Unfit
        self.p.steps.append(Step(op, tuple(inputs), settings, params))
        self.p.shapes.append(tuple(int(n) for n in shape))
        return len(self.p.shapes) - 1

    # Operators

    def nonlinear(self, x: int) -> int:
        return self.add(self.pick(NONLINEAR), [x], inplace=self.way == "fx" and self.chance(0.15))

    def is_map(self, x: int) -> bool:
        return len(self.shape(x)) >= 3

    def conv(
        self, x: int, out: int | None = None, stride: Sequence[int] | None = None, delta: Sequence[int] | None = None,
        largest: int = 3, groups: int | None = None,
    ) -> int:  # fmt: skip
        """A convolution; its extent shrinks by ``delta`` where that is given."""
        if not self.is_map(x):
            raise Unfit
        n, width, *extents = self.shape(x)
        frame = len(extents)
        out = out or int(self.rng.choice(WIDTHS))
        kernel, dilation = self.ints(1, largest, frame), self.pick([(1,) * frame, (1,) * frame, self.ints(1, 2, frame)])
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        delta = tuple(delta) if delta is not None else self.ints(0, 2, frame)
        room = [max(r - d, 0) for r, d in zip(reach, delta, strict=True)]
        begin = tuple(int(self.rng.integers(0, r + 1)) if self.chance(0.4) else r // 2 for r in room)
        end = tuple(r - d - b for r, d, b in zip(reach, delta, begin, strict=True))
        if min(end) < 0:
            raise Unfit
        stride = tuple(stride) if stride else self.pick([(1,) * frame, (1,) * frame, self.ints(1, 2, frame)])
        outs = [(e - 1 - d) // s + 1 for e, d, s in zip(extents, delta, stride, strict=True)]
        if min(e - d for e, d in zip(extents, delta, strict=True)) < 1:
            raise Unfit
        groups = groups or self.pick([g for g in (1, 1, 2, 3, width) if width % g == 0 and out % g == 0])
        params = {"weight": self.numbers(out, width // groups, *kernel)}
        params |= {"bias": self.numbers(out)} if self.chance(0.5) else {}
        return self.add(
            "conv", [x], (n, out, *outs), params=params, stride=stride, dilation=dilation, begin=begin, end=end,
            groups=groups, computed=self.chance(0.05),
        )  # fmt: skip

    def transposed(self, x: int) -> int:
        if not self.is_map(x) or len(self.shape(x)) > 4:
            raise Unfit
        n, width, *extents = self.shape(x)
        frame = len(extents)
        out = int(self.rng.choice(WIDTHS))
        groups = self.pick([g for g in (1, 1, 2, 3) if width % g == 0 and out % g == 0])
        kernel, stride = self.ints(1, 3, frame), self.ints(1, 2, frame)
        pads = tuple(int(self.rng.integers(0, (k + 1) // 2)) for k in kernel)
        more = tuple(int(self.rng.integers(0, s)) for s in stride)
        sizes = zip(extents, stride, kernel, pads, more, strict=True)
        outs = [(e - 1) * s + k - 2 * p + m for e, s, k, p, m in sizes]
        params = {"weight": self.numbers(width, out // groups, *kernel)}
        params |= {"bias": self.numbers(out)} if self.chance(0.5) else {}
        settings = {"stride": stride, "padding": pads, "more": more, "groups": groups}
        return self.add("conv_transpose", [x], (n, out, *outs), params=params, **settings)

    def norm(self, x: int) -> int:
        width = self.shape(x)[1]
        names = {key: self.numbers(width, positive=key == "var") for key in ("gamma", "beta", "mean", "var")}
        return self.add("norm", [x], params=names, eps=float(self.pick([1e-5, 1e-3, 0.1])))

    def constant(self, x: int) -> int:
        """Arithmetic with a number, with a vector along the channels, or along the last axis."""
        shape, frame = self.shape(x), len(self.shape(x)) - 2
        dims = self.pick([(shape[1], *[1] * frame)] * 3 + [(), (shape[-1],)])
        op = self.pick(["add", "sub", "rsub", "mul", "mul", "div"])
        inplace = self.way == "fx" and op in ("add", "mul") and self.chance(0.15)
        return self.add("constant", [x], kind=op, params={"value": self.numbers(*dims, positive=True)}, inplace=inplace)

    def affine(self, x: int) -> int:
        match self.pick(["norm", "norm", "constant", "neg", "none", "none"]):
            case "norm":
                return self.norm(x)
            case "constant":
                shape = self.shape(x)
                value = self.numbers(shape[1], *[1] * (len(shape) - 2), positive=True)
                return self.add("constant", [x], kind=self.pick(["add", "sub", "rsub", "mul"]), params={"value": value})
            case "neg":
                return self.add("neg", [x])
            case _:
                return x

    def pool(self, x: int, delta: Sequence[int] | None = None, stride: Sequence[int] | None = None) -> int:
        if not self.is_map(x):
            raise Unfit
        n, width, *extents = self.shape(x)
        frame = len(extents)
        kernel = (self.pick([1, 3]),) * frame if delta is not None else self.ints(1, 3, frame)
        pads = (
            tuple((k - 1) // 2 for k in kernel)
            if delta is not None
            else tuple((k // 2) * self.chance(0.5) for k in kernel)
        )
        stride = tuple(stride) if stride else self.ints(1, 2, frame)
        outs = [(e + 2 * p - k) // s + 1 for e, k, p, s in zip(extents, kernel, pads, stride, strict=True)]
        if any(e + 2 * p < k for e, k, p in zip(extents, kernel, pads, strict=True)):
            raise Unfit
        return self.add(
            "pool", [x], (n, width, *outs), kernel=kernel, stride=stride, pads=pads, counted=self.chance(0.7)
        )

    def pad(self, x: int) -> int:
        if not self.is_map(x):
            raise Unfit
        n, width, *extents = self.shape(x)
        begin, end = self.ints(0, 2, len(extents)), self.ints(0, 2, len(extents))
        outs = [b + e + f for b, e, f in zip(begin, extents, end, strict=True)]
        return self.add("pad", [x], (n, width, *outs), begin=begin, end=end, value=float(self.pick([0, 0, 0, 0.5])))

    def crop(self, x: int) -> int:
        if not self.is_map(x):
            raise Unfit
        n, width, *extents = self.shape(x)
        begin, end = self.ints(0, 1, len(extents)), self.ints(0, 1, len(extents))
        outs = [e - b - f for b, e, f in zip(begin, extents, end, strict=True)]
        return self.add("crop", [x], (n, width, *outs), begin=begin, end=end)

    def channels(self, x: int) -> int:
        """Some channels: neighbours, or any in any order."""
        n, width, *rest = self.shape(x)
        start = int(self.rng.integers(0, width))
        stop = int(self.rng.integers(start + 1, width + 1))
        if self.chance(0.6):
            return self.add("slice", [x], (n, stop - start, *rest), start=start, stop=stop)
        index = [int(i) for i in self.rng.integers(0, width, int(self.rng.integers(1, width + 1)))]
        index = index if self.chance(0.5) else [int(i) for i in self.rng.permutation(width)]
        return self.add("gather", [x], (n, len(index), *rest), index=index)

    def shuffle(self, x: int) -> int:
        groups = [g for g in (2, 3) if self.shape(x)[1] % g == 0]
        if not groups or (self.p.openness != STATIC and self.way == "onnx") or not self.is_map(x):
            raise Unfit
        return self.add("shuffle", [x], groups=self.pick(groups))

    def sum(self, terms: Sequence[int]) -> int:
        """A tree of additions and subtractions."""
        terms = list(terms)
        while len(terms) > 1:
            at = int(self.rng.integers(0, len(terms) - 1))
            pair = [terms.pop(at), terms.pop(at)]
            terms.insert(at, self.add("minus" if self.chance(0.25) else "plus", pair))
        return terms[0]

    def linear(self, x: int, out: int | None = None) -> int:
        """Over the last axis."""
        *lead, width = self.shape(x)
        out = out or int(self.rng.choice(WIDTHS[1:]))
        params = {"weight": self.numbers(out, width)} | ({"bias": self.numbers(out)} if self.chance(0.6) else {})
        return self.add("linear", [x], (*lead, out), params=params, turned=self.chance(0.5))

    # Blocks

    def block(self, x: int) -> int:
        if not self.is_map(x):
            return self.vector(x)
        blocks: list[Callable[[int], int]] = [
            self.one, self.one, self.branches, self.branches, self.branches, self.mixer, self.chain, self.chain,
            self.twice, self.tokens, self.heads, self.pieces, self.projection, self.border, self.head, self.alike,
            self.in_front,
        ]  # fmt: skip
        return self.pick(blocks)(x)

    def one(self, x: int) -> int:
        ops = [self.conv, self.conv, self.norm, self.constant, self.pool, self.pad, self.crop, self.channels]
        return self.pick([*ops, self.shuffle, self.transposed, lambda x: self.add("neg", [x])])(x)

    def grid(self, x: int) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
        """(stride, delta) of branches, and whether a skip connection fits beside them."""
        frame = len(self.shape(x)) - 2
        if self.chance(0.6):
            return (1,) * frame, (0,) * frame, True
        return self.ints(1, 2, frame), self.pick([(0,) * frame, self.ints(0, 1, frame)]), False

    def branches(self, x: int) -> int:
        stride, delta, keeps = self.grid(x)
        width = self.shape(x)[1]
        out = width if keeps else int(self.rng.choice(WIDTHS))
        alike = self.pick([None, None, 1, width]) if out == width else None
        terms: list[int] = []
        for _ in range(int(self.rng.integers(2, 5))):
            try:
                terms.append(self.branch(x, out, stride, delta, keeps, alike))
            except Unfit:
                continue
        if keeps and self.chance(0.3):
            terms.append(x)
        terms = [t for t in terms if self.shape(t) == self.shape(terms[0])]
        if len(terms) < 2:
            raise Unfit
        if self.chance(0.2):
            return self.affine(self.concat(terms))
        return self.affine(self.sum(terms))

    def branch(
        self, x: int, out: int, stride: tuple[int, ...], delta: tuple[int, ...], keeps: bool, groups: int | None
    ) -> int:
        kinds = ["conv"] * 5 + ["pair", "pool"] + ["norm", "sum"] * keeps
        match self.pick(kinds):
            case "norm":
                return self.affine(self.norm(x))
            case "pair":
                inner = self.conv(x, self.pick([out, 2]), (1,) * len(stride), (0,) * len(delta), 1, None)
                return self.affine(self.conv(inner, out, stride, delta))
            case "pool" if out == self.shape(x)[1] and not any(delta):
                return self.affine(self.pool(x, delta, stride))
            case "sum":
                both = [self.branch(x, out, stride, delta, keeps, groups) for _ in range(2)]
                return self.affine(self.sum(both))
            case _:
                return self.affine(self.conv(x, out, stride, delta, groups=groups))

    def concat(self, terms: Sequence[int]) -> int:
        n, _, *rest = self.shape(terms[0])
        return self.add("concat", terms, (n, sum(self.shape(t)[1] for t in terms), *rest))

    def mixer(self, x: int) -> int:
        """x + s (mixer(x) - norm(x))"""
        frame, width = len(self.shape(x)) - 2, self.shape(x)[1]
        terms = [self.norm(x)]
        for largest in (3, 1):
            terms.append(self.norm(self.conv(x, width, (1,) * frame, (0,) * frame, largest, width)))
        y = self.add("minus", [self.sum(terms), self.norm(x)])
        if self.chance(0.8):
            y = self.add("constant", [y], kind="mul", params={"value": self.numbers(width, *[1] * frame)})
        return self.add("plus", [x, y])

    def chain(self, x: int) -> int:
        """Convolutions of convolutions, narrow or wide in between."""
        frame, width = len(self.shape(x)) - 2, self.shape(x)[1]
        for _ in range(int(self.rng.integers(2, 4))):
            largest = self.pick([1, 1, 3])
            groups = width if self.chance(0.2) and width == self.shape(x)[1] else None
            x = self.conv(x, width if groups else None, None, self.pick([None, (0,) * frame]), largest, groups)
            x = self.affine(x) if self.chance(0.3) else x
            x = self.transposed(x) if self.chance(0.1) else x
        return x

    def twice(self, x: int) -> int:
        """One operator, applied to one value at two places: a duplicate."""
        y = self.conv(x)
        again, shape = self.p.steps[-1], self.shape(y)
        first = self.nonlinear(y)
        z = self.nonlinear(self.add(again.op, [x], shape, params=again.params, **again.settings))
        return self.add("plus", [first, z])

    def alike(self, x: int) -> int:
        """Like terms: skip connections, scaled and not, taken several times."""
        terms = [
            x if self.chance(0.4) else self.pick([self.norm, self.affine])(x)
            for _ in range(int(self.rng.integers(2, 4)))
        ]
        return self.sum(terms)

    def in_front(self, x: int) -> int:
        """A scale in front of one or several readers."""
        y = self.pick([self.norm, self.affine])(x)
        terms = [
            self.conv(y, 3, None, self.pick([None, (0,) * (len(self.shape(x)) - 2)]))
            for _ in range(self.pick([1, 2, 3]))
        ]
        terms = [self.nonlinear(t) if self.chance(0.5) else t for t in terms if self.shape(t) == self.shape(terms[0])]
        return self.sum(terms)

    def tokens(self, x: int) -> int:
        """Positions in a row, channels last, a linear layer or two, and back where extents are known."""
        shape = self.shape(x)
        n, width, length = shape[0], shape[1], prod(shape[2:])
        y = self.add("reshape", [x], (n, width, length), target=(0, width, -1))
        y = self.add("permute", [y], (n, length, width), axes=(0, 2, 1))
        out = self.pick([width, None])
        for _ in range(self.pick([1, 2])):
            y = self.linear(y, out)
            if self.chance(0.4):
                dims = (self.shape(y)[-1],)
                y = self.add("constant", [y], kind=self.pick(["mul", "add"]), params={"value": self.numbers(*dims)})
        width = self.shape(y)[-1]
        if self.chance(0.3):  # a BatchNorm over flattened tokens
            flat = self.add("reshape", [y], (n * length, width), target=(-1, width))
            flat = self.norm(flat)
            if self.p.openness != OPEN:
                y = self.add("reshape", [flat], (n, length, width), target=(-1, length, width))
        y = self.add("permute", [y], (n, width, length), axes=(0, 2, 1)) if self.chance(0.8) else y
        if (
            self.p.openness == OPEN
            or len(self.shape(y)) != 3
            or self.shape(y)[1] != width
            or self.shape(y)[2] != length
        ):
            return y
        return self.add("reshape", [y], (n, width, *shape[2:]), target=(-1, width, *shape[2:]))

    def heads(self, x: int) -> int:
        """A linear layer over tokens whose channels are split into heads, and into q, k and v; some are scaled."""
        shape = self.shape(x)
        n, width, length = shape[0], shape[1], prod(shape[2:])
        y = self.add("reshape", [x], (n, width, length), target=(0, width, -1))
        y = self.add("permute", [y], (n, length, width), axes=(0, 2, 1))
        parts, heads, each = self.pick([1, 2, 3, 3]), self.pick([1, 2, 3]), self.pick([1, 2, 4])
        y = self.linear(y, parts * heads * each)
        axis, split = (3, (heads, parts, each)) if self.chance(0.3) else (2, (parts, heads, each))
        y = self.add("reshape", [y], (n, length, *split), target=(0, 0, *split))
        y = self.nonlinear(y) if self.chance(0.05) else y
        if self.chance(0.6):
            axes = (axis, 0, 5 - axis, 1, 4)
            y, axis = self.add("permute", [y], [self.shape(y)[a] for a in axes], axes=axes), 0
        rest = [e for a, e in enumerate(self.shape(y)) if a != axis]
        terms: list[int] = []
        for at in range(parts) if self.chance(0.9) else [0, *range(parts)]:
            part = self.add("take", [y], rest, axis=axis, at=at, unbound=self.chance(0.5))
            dims = self.pick([(), (), (), (1,), (rest[-1],), (rest[1], 1, 1)])
            if self.chance(0.6):
                kind = self.pick(["mul", "mul", "div", "add", "rsub"])
                part = self.add("constant", [part], kind=kind, params={"value": self.numbers(*dims, positive=True)})
            terms.append(self.nonlinear(part) if self.chance(0.7) else part)
        return self.sum(terms)

    def pieces(self, x: int) -> int:
        """Slices of channels, treated apart, and put together in the same order or another."""
        n, width, *rest = self.shape(x)
        if self.chance(0.5):
            x = self.conv(x, 6)
            n, width, *rest = self.shape(x)
        if width < 2:
            raise Unfit
        cut = int(self.rng.integers(1, width))
        parts = [self.add("slice", [x], (n, b - a, *rest), start=a, stop=b) for a, b in ((0, cut), (cut, width))]
        frame = len(rest)
        for place in range(2):
            if self.chance(0.4):
                parts[place] = self.affine(self.conv(parts[place], None, (1,) * frame, (0,) * frame))
            elif self.chance(0.3):
                parts[place] = self.nonlinear(parts[place])
        y = self.concat(parts if self.chance(0.6) else parts[::-1])
        return self.pick([lambda y: y, self.channels, self.shuffle, self.norm, self.conv])(y)

    def projection(self, x: int) -> int:
        """A convolution in pieces, scaled or not; some overlap, and now and then something else reads it as well."""
        y = self.conv(x, 6)
        n, width, *rest = self.shape(y)
        cut = int(self.rng.integers(1, width))
        parts: list[int] = []
        for a, b in ((0, cut), (cut - int(self.chance(0.2) and cut > 1), width)):
            part = self.add("slice", [y], (n, b - a, *rest), start=a, stop=b)
            part = self.pick([self.norm, self.affine, self.nonlinear])(part)
            parts.append(self.nonlinear(part) if self.chance(0.5) else part)
        if self.chance(0.15):
            parts.append(self.nonlinear(y))
        return self.concat(parts)

    def border(self, x: int) -> int:
        """Padding, crops and shifts around a convolution: exact as a whole or not at all."""
        frame = len(self.shape(x)) - 2
        y = self.affine(self.conv(x, None, (1,) * frame, (0,) * frame, 1)) if self.chance(0.5) else self.norm(x)
        y = self.pick([self.pad, self.pad, self.crop])(y)
        return self.conv(y, None, (1,) * frame, None, 3)

    def head(self, x: int) -> int:
        """The mean over all positions, and a classifier."""
        n, width, *rest = self.shape(x)
        axes = tuple(range(2, 2 + len(rest)))
        if self.chance(0.5):
            y = self.add("mean", [x], (n, width), axes=axes, keep=False)
        else:
            y = self.add("mean", [x], (n, width, *[1] * len(rest)), axes=axes, keep=True)
            y = self.add("reshape", [y], (n, width), target=(0, -1) if self.p.openness == STATIC else (-1, width))
        return self.vector(self.norm(y) if self.chance(0.4) else y)

    def vector(self, x: int) -> int:
        if len(self.shape(x)) != 2:
            raise Unfit
        for _ in range(self.pick([1, 2])):
            x = self.linear(x)
            x = self.norm(x) if self.chance(0.5) else x
        return x


def inputs_of(p: Program, seed: int = 0, grown: int = 0) -> list[np.ndarray]:
    """Random float64 inputs; where extents are open they are ``grown`` larger, and so is the batch."""
    rng = np.random.default_rng(seed)

    def is_open(axis: int) -> bool:
        return axis == 0 if p.openness == OPEN_BATCH else axis != 1 and p.openness == OPEN

    shapes = [tuple(n + grown * is_open(axis) for axis, n in enumerate(shape)) for shape in p.inputs]
    return [rng.standard_normal(shape).astype(np.float32).astype(np.float64) for shape in shapes]
