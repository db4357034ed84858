"""The readable form of expressions, for reports and golden cases, and its parser.

One node a line, operands first, the last line is the result. All that can be said::

    %x = source c=8 axis=-3                                  # c channels, along that axis
    %y = source c=6 axis=-3 shape=[N,6,H,2*W]                # sizes are numbers, symbols, and products of these
    %t = source c=27 axis=-3 taps                            # what an operator multiplies by its weight
    %0 = conv %x 8->6 k=3x3 s=2 p=0:1 g=2 bias               # kernel, stride, padding before and after, groups
    %1 = conv %x 8->6 k=3x3 s=1,2 d=2 p=0:1,1 transposed     # a comma between axes that differ; d: dilation
    %2 = conv %y 6->4                                        # no kernel: a linear layer
    %p = conv %x 8->8 k=2x2 s=2 p=0 g=8 average              # all taps are equal and add up to one: a pooling
    %3 = batchnorm %x c=8 axis=-3
    %4 = scale %x c=8 axis=-3 shift                          # a factor for each channel, and with "shift" a summand
    %5 = scale=-1 %x                                         # one factor for all
    %6 = sum %3, %4
    %7 = concat %x, %y c=8,6 axis=-3                         # the channels of both
    %8 = select %x 0:4,7 of 8 axis=-3                        # channels 0 to 3 and 7 of eight
    %9 = permute %y axes=0,2,3,1 axis=-3->-1                 # the channel axis before, and after
    %10 = reshape %y [N,6,H,2*W]->[N,6,2*H*W] axis=-3->-2
    %11 = mean %y axes=2,3 of 4 axis=-3->-3 keep             # over two of four axes, which stay with size 1
    %12 = reshape %y [N,6,H,W]->[N,2,3,H,W] axis=-3->?       # the channel axis is split
    %13 = take %12 0 along 1 of 5 axis=?->?                  # the first position of axis 1, which goes
    %14 = resize %y 2x1/2 of 4 linear half_pixel axis=-3->-3 # two times as many rows, half the columns

Weights are not part of the text: the parser draws them from a seed, so a text states structure and its reader checks
numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np

from reparamc.algebra.arrays import Array, count, is_all, values
from reparamc.algebra.expr import (
    BatchNorm,
    Concat,
    Conv,
    Expr,
    Ints,
    Layout,
    Mean,
    Permute,
    Reshape,
    Resize,
    Scale,
    Select,
    Source,
    Spread,
    Sum,
    Take,
    walk,
)
from reparamc.algebra.resample import MODES, OTHER, PLACES, ROUNDINGS
from reparamc.algebra.shape import Dim, Shape, shape_of, size
from reparamc.errors import InputError


def show(root: Expr) -> str:
    """``root`` as text."""
    names: dict[Expr, str] = {}
    lines: list[str] = []
    inner = 0
    for e in walk(root):
        if isinstance(e, Source):
            name = _source_name(str(e.key), names.values())
        else:
            name, inner = str(inner), inner + 1
        names[e] = f"%{name}"
        lines.append(f"%{name} = {_describe(e, names)}")
    return "\n".join(lines)


def _source_name(key: str, taken: Iterable[str]) -> str:
    """``key`` without the signs that mean something in the text, and apart from the numbers of other nodes."""
    name = re.sub(r"[\s,=#%]", "_", key) or "_"
    name = f"_{name}" if name.isdigit() else name
    used = set(taken)
    while f"%{name}" in used:
        name += "_"
    return name


def _describe(e: Expr, names: dict[Expr, str]) -> str:
    match e:
        case Source():
            facts = [("c", e.channels), ("axis", e.axis), ("shape", e.shape and _shape(e.shape))]
            return " ".join(["source", *(f"{k}={v}" for k, v in facts if v is not None), *["taps"] * e.taps])
        case Conv():
            return _describe_conv(e, names[e.x])
        case Scale():
            number = "" if e.scale.ndim else f"={float(values(e.scale)):g}"
            channels = "" if e.is_scalar else f" c={count(e.scale if e.scale.ndim else e.shift)} axis={e.axis}"
            return f"scale{number} {names[e.x]}{channels}" + ("" if is_all(e.shift, 0) else " shift")
        case BatchNorm():
            return f"batchnorm {names[e.x]} c={count(e.gamma)} axis={e.axis}"
        case Sum():
            return "sum " + ", ".join(names[t] for t in e.terms)
        case Concat():
            sizes = ",".join(map(str, e.sizes))
            return "concat " + ", ".join(names[t] for t in e.terms) + f" c={sizes} axis={e.axis}"
        case Select():
            return f"select {names[e.x]} {_runs(e.index)} of {e.width} axis={e.axis}"
        case Layout():
            return _describe_layout(e, names[e.x])


def _describe_conv(e: Conv, x: str) -> str:
    words = ["conv", x, f"{e.in_channels}->{e.out_channels}"]
    if e.spatial:
        begin, end = e.padding
        pads = [f"{b}" if b == n else f"{b}:{n}" for b, n in zip(begin, end, strict=True)]
        words += [f"k={'x'.join(map(str, e.kernel))}", f"s={_each(e.stride)}"]
        words += [f"d={_each(e.dilation)}"] if any(d != 1 for d in e.dilation) else []
        words += [f"p={pads[0] if len(set(pads)) == 1 else ','.join(pads)}"]
    words += [f"g={e.groups}"] if e.groups != 1 else []
    flags = {"transposed": e.transposed, "average": e.is_weightless, "bias": e.bias is not None}
    return " ".join(words + [word for word, holds in flags.items() if holds])


def _describe_layout(e: Layout, x: str) -> str:
    axes = "axis={}->{}".format(*("?" if a is None else a for a in (e.axis_in, e.axis)))
    match e.op:
        case Permute(axes=order):
            return f"permute {x} axes={','.join(map(str, order))} {axes}"
        case Mean() as op:
            return f"mean {x} axes={','.join(map(str, op.axes))} of {op.rank} {axes}" + (" keep" if op.keep else "")
        case Take() as op:
            return f"take {x} {op.at} along {op.axis} of {op.rank} {axes}"
        case Spread() as op:
            return f"spread {x} {op.block} of {op.rank} {axes}" + (" outer" if op.outer else "")
        case Resize() as op:
            words = [op.mode, op.place, op.rounding] if op.mode == "nearest" else [op.mode, op.place]
            scales = "x".join(map(str, op.scales))
            return f"resize {x} {scales} of {op.rank} {' '.join(words)} {axes}"
        case Reshape() as op:
            return f"reshape {x} {_shape(op.before)}->{_shape(op.after)} {axes}"


def _runs(index: Ints) -> str:
    """``0:4,7`` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for i in index:
        if runs and i == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([i, i + 1])
    return ",".join(f"{a}:{b}" if b - a > 1 else f"{a}" for a, b in runs)


def _each(values: Ints) -> str:
    return str(values[0]) if len(set(values)) == 1 else ",".join(map(str, values))


def _shape(shape: Shape) -> str:
    return f"[{','.join(map(str, shape))}]"


def parse(text: str, seed: int = 0) -> Expr:
    """The expression that ``text`` describes, its weights drawn from ``seed``.

    Raises:
        InputError: a line that is not of the form that `show` writes.
    """
    rng = np.random.default_rng(seed)
    named: dict[str, Expr] = {}
    last: Expr | None = None
    for line in text.strip().splitlines():
        line = line.split("#")[0].strip()
        if not line:
            continue
        try:
            name, rest = (part.strip() for part in line.split("=", 1))
            last = named[name] = _read(name, rest.replace(",  ", ", ").split(" ", 1), named, rng)
        except (KeyError, ValueError, AttributeError, IndexError) as error:
            raise InputError(f"cannot read the expression line {line!r}: {error}") from error
    if last is None:
        raise InputError("an expression needs at least one line")
    return last


@dataclass(frozen=True)
class _Line:
    """A line of the text, taken apart.

    Attributes:
        number: what follows the kind, as in ``scale=-1``.
        rest: what follows that.
    """

    name: str
    number: str
    rest: str
    operands: tuple[Expr, ...]
    options: dict[str, str]
    rng: np.random.Generator

    @property
    def x(self) -> Expr:
        return self.operands[0]

    @property
    def axis(self) -> int | None:
        """The channel axis, that of the operand where there are two."""
        given = self.options.get("axis", "?").partition("->")[0]
        return None if given == "?" else int(given)

    @property
    def channels(self) -> int:
        return int(self.options.get("c", "0").split(",")[0])

    def ints(self, key: str) -> Ints:
        return tuple(map(int, self.options[key].split(",")))

    def draw(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape)


def _read(name: str, words: list[str], named: dict[str, Expr], rng: np.random.Generator) -> Expr:
    kind, _, number = words[0].partition("=")
    rest = words[1] if len(words) > 1 else ""
    operands = tuple(named[n] for n in re.findall(r"%[^\s,]+", rest))
    if kind not in READERS:
        raise ValueError(f"unknown kind {kind!r}")
    if unknown := [word for word in rest.split() if word.isalpha() and word not in WORDS]:
        raise ValueError(f"unknown word {unknown[0]!r}")
    made = READERS[kind](_Line(name, number, rest, operands, dict(re.findall(r"(\w+)=(\S+)", rest)), rng))
    after = re.findall(r" axis=\S+->(\S+)", rest)
    if isinstance(made, Layout) and after and after[0] != (found := "?" if made.axis is None else str(made.axis)):
        raise ValueError(f"the channel axis is {found} afterwards")
    return made


def _dims(text: str) -> Shape:
    return shape_of([_dim(d) for d in text.split(",")])


def _dim(text: str) -> Dim:
    return size([Dim.of(int(part) if part.isdigit() else part) for part in text.split("*")])


def _read_source(line: _Line) -> Source:
    shape = _dims(line.options["shape"][1:-1]) if "shape" in line.options else None
    return Source(line.name[1:], line.channels or None, line.axis, shape, "taps" in line.rest.split())


def _read_conv(line: _Line) -> Conv:
    rest, options = line.rest, line.options
    inputs, outputs = map(int, re.findall(r"(\d+)->(\d+)", rest)[0])
    kernel = tuple(map(int, options["k"].split("x"))) if "k" in options else ()
    groups = int(options.get("g", 1))

    def each(key: str) -> list[str]:
        given = options.get(key, "0" if key == "p" else "1").split(",")
        return given * len(kernel) if len(given) == 1 else given

    stride, dilation = (tuple(map(int, each(key)))[: len(kernel)] for key in "sd")
    pads = [tuple(map(int, p.split(":"))) for p in each("p")][: len(kernel)]
    dims = (outputs, inputs // groups, *kernel)
    weight = np.full(dims, 1 / prod(kernel)) if "average" in rest.split() else line.draw(*dims)
    bias = line.draw(outputs) if "bias" in rest.split() else None
    begin, end = tuple(p[0] for p in pads), tuple(p[-1] for p in pads)
    conv = Conv.padded(line.x, weight, bias, stride, dilation, begin, end, groups)
    return replace(conv, transposed=True) if "transposed" in rest.split() else conv


def _read_scale(line: _Line) -> Scale:
    shift = line.draw(*[line.channels] * bool(line.channels)) if "shift" in line.rest.split() else np.zeros(())
    scale = np.array(float(line.number)) if line.number else line.draw(line.channels)
    return Scale(line.x, scale, shift, line.axis)


def _read_batchnorm(line: _Line) -> BatchNorm:
    n = line.channels
    gamma, beta, mean = line.draw(n), line.draw(n), line.draw(n)
    return BatchNorm(line.x, gamma, beta, mean, line.rng.uniform(0.5, 2, n), 1e-5, int(line.options["axis"]))


def _read_select(line: _Line) -> Select:
    _, index, _, width, _ = line.rest.split()
    runs = [[int(n) for n in run.split(":")] for run in index.split(",")]
    channels = [i for run in runs for i in range(run[0], run[-1] + (len(run) == 1))]
    return Select(line.x, tuple(channels), int(width), int(line.options["axis"]))


def _read_take(line: _Line) -> Layout:
    _, at, _, along, _, rank, _ = line.rest.split()
    return Layout(line.x, Take(int(rank), int(along), int(at)), line.axis)


def _read_mean(line: _Line) -> Layout:
    rank = int(re.findall(r" of (\d+)", line.rest)[0])
    return Layout(line.x, Mean(rank, line.ints("axes"), "keep" in line.rest.split()), line.axis)


def _read_resize(line: _Line) -> Layout:
    _, scales, _, rank, *words, _ = line.rest.split()
    given: Any = words
    return Layout(line.x, Resize(int(rank), tuple(map(Fraction, scales.split("x"))), *given), line.axis)


def _read_spread(line: _Line) -> Layout:
    _, block, _, rank, *words = line.rest.split()
    return Layout(line.x, Spread(int(rank), int(block), "outer" in words), line.axis)


def _read_reshape(line: _Line) -> Layout:
    before, after = map(_dims, re.findall(r"\[([^]]*)\]", line.rest))
    return Layout(line.x, Reshape(before, after), line.axis)


WORDS = ("along", "average", "bias", "keep", "of", "shift", "taps", "transposed", *MODES, OTHER, *PLACES, *ROUNDINGS)
"""All that a line may hold besides operands, numbers and options."""

READERS: dict[str, Callable[[_Line], Expr]] = {
    "source": _read_source,
    "conv": _read_conv,
    "scale": _read_scale,
    "batchnorm": _read_batchnorm,
    "sum": lambda line: Sum(line.operands),
    "concat": lambda line: Concat(line.operands, line.ints("c"), int(line.options["axis"])),
    "select": _read_select,
    "permute": lambda line: Layout(line.x, Permute(line.ints("axes")), line.axis),
    "take": _read_take,
    "mean": _read_mean,
    "reshape": _read_reshape,
    "resize": _read_resize,
    "spread": _read_spread,
}
"""What reads a line of each kind."""
