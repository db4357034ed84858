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
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from reparamc.algebra.arrays import count, is_all, values
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
from reparamc.algebra.records import record, replace
from reparamc.algebra.shape import Dim, Shape, shape_of, size
from reparamc.errors import InputError

if TYPE_CHECKING:
    from fractions import Fraction

FORMS: dict[type, str] = {
    Source: "source[ c={channels:int}][ axis={axis:int}][ shape={shape:shape}][ taps]",
    Conv: "conv {x:value} {inputs:int}->{outputs:int}[ k={kernel:by}][ s={stride:each}][ d={dilation:each}]"
    "[ p={pads:pads}][ g={groups:int}][ transposed][ average][ bias]",
    Scale: "scale[={number:real}] {x:value}[ c={channels:int} axis={axis:int}][ shift]",
    BatchNorm: "batchnorm {x:value} c={channels:int} axis={axis:int}",
    Sum: "sum {terms:values}",
    Concat: "concat {terms:values} c={sizes:ints} axis={axis:int}",
    Select: "select {x:value} {index:runs} of {width:int} axis={axis:int}",
    Permute: "permute {x:value} axes={axes:ints} axis={start:axis}->{end:axis}",
    Reshape: "reshape {x:value} {before:shape}->{after:shape} axis={start:axis}->{end:axis}",
    Mean: "mean {x:value} axes={axes:ints} of {rank:int} axis={start:axis}->{end:axis}[ keep]",
    Take: "take {x:value} {at:int} along {axis:int} of {rank:int} axis={start:axis}->{end:axis}",
    Spread: "spread {x:value} {block:int} of {rank:int} axis={start:axis}->{end:axis}[ outer][ back]",
    Resize: "resize {x:value} {scales:ratios} of {rank:int} {mode:word} {place:word}[ {rounding:word}]"
    " axis={start:axis}->{end:axis}",
}
"""The line of each kind of operator, to write and to read it: facts by name and spelling, in brackets what may lack."""


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
        form = FORMS[type(e.op) if isinstance(e, Layout) else type(e)]
        lines.append(f"%{name} = {_written(form, _facts(e, [names[c] for c in e.children]))}")
    return "\n".join(lines)


def _source_name(key: str, taken: Iterable[str]) -> str:
    """``key`` without the signs that mean something in the text, and apart from the numbers of other nodes."""
    name = re.sub(r"[\s,=#%]", "_", key) or "_"
    name = f"_{name}" if name.isdigit() else name
    used = set(taken)
    while f"%{name}" in used:
        name += "_"
    return name


def _facts(e: Expr, operands: list[str]) -> dict[str, Any]:
    """What there is to say of ``e``, by the names in its form; None or False where it lacks."""
    facts = _fields(e) | {"terms": operands, "x": "".join(operands[:1])}
    match e:
        case Conv():
            facts |= {"inputs": e.in_channels, "outputs": e.out_channels, "kernel": e.kernel or None}
            facts |= {"stride": e.stride or None, "pads": [*zip(*e.padding, strict=True)] or None}
            facts |= {"dilation": e.dilation if set(e.dilation) - {1} else None}
            facts |= {"groups": e.groups if e.groups != 1 else None}
            facts |= {"average": e.is_weightless, "bias": e.bias is not None}
        case Scale():
            channels = None if e.is_scalar else count(e.scale if e.scale.ndim else e.shift)
            number = None if e.scale.ndim else float(values(e.scale))
            facts |= {"channels": channels, "number": number, "shift": not is_all(e.shift, 0)}
        case BatchNorm():
            facts["channels"] = count(e.gamma)
        case Layout():
            facts |= _fields(e.op) | {"start": e.axis_in, "end": e.axis}
            if isinstance(e.op, Resize) and e.op.mode != "nearest":
                facts["rounding"] = None
        case _:
            pass
    return facts


def _fields(record: object) -> dict[str, Any]:
    return dict(vars(record))


_FACT, _FLAG, _OPTION = re.compile(r"\{(\w+):(\w+)\}"), re.compile(r"\[ (\w+)\]"), re.compile(r"\[([^]]+)\]")
"""In a form: a fact and its spelling, a word that is there or not, and anything that is."""


def _written(form: str, facts: dict[str, Any]) -> str:
    made = ""
    for template, spelled, needed in _parts(form):
        if not [name for name in needed if facts[name] is None or facts[name] is False]:
            made += template.format(*[show(facts[name]) for name, show in spelled])
    return made


@cache
def _parts(form: str) -> list[tuple[str, list[tuple[str, Callable[[Any], str]]], list[str]]]:
    """The parts of a form, as templates: the facts in each, with their spellings, and those without which it lacks."""
    parts: list[tuple[str, list[tuple[str, Callable[[Any], str]]], list[str]]] = []
    for at, text in enumerate(_OPTION.split(form)):
        spelled = _FACT.findall(text)
        needed = [name for name, _ in spelled] or [text.strip()] if at % 2 else []
        shown = [(name, SPELLINGS[spelling].show) for name, spelling in spelled]
        parts.append((_FACT.sub("{}", text), shown, needed))
    return parts


@record
class _Spelling:
    """How a fact is written: what matches it, and both ways."""

    pattern: str
    show: Callable[[Any], str] = str
    read: Callable[[str], Any] = str


def _ints(text: str) -> Ints:
    return tuple(map(int, text.split(",")))


def _ratios(text: str) -> tuple[Fraction, ...]:
    from fractions import Fraction

    return tuple(map(Fraction, text.split("x")))


def _list(items: Iterable[object]) -> str:
    return ",".join(map(str, items))


def _each(items: Iterable[object]) -> str:
    """One for all axes, where they are alike."""
    texts = [*map(str, items)]
    return texts[0] if len(set(texts)) == 1 else ",".join(texts)


def _pairs(text: str) -> tuple[Ints, ...]:
    """``1:2,3`` as (1, 2) and (3, 3)."""
    parts = [part.split(":") for part in text.split(",")]
    return tuple((int(part[0]), int(part[-1])) for part in parts)


def _runs(index: Ints) -> str:
    """``0:4,7`` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for i in index:
        if runs and i == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([i, i + 1])
    return ",".join(f"{a}:{b}" if b - a > 1 else f"{a}" for a, b in runs)


def _indices(text: str) -> Ints:
    runs = [[int(n) for n in run.split(":")] for run in text.split(",")]
    return tuple(i for run in runs for i in range(run[0], run[-1] + (len(run) == 1)))


def _shape(text: str) -> Shape:
    sizes = [[Dim.of(int(n) if n.isdigit() else n) for n in part.split("*")] for part in text[1:-1].split(",")]
    return shape_of([size(parts) for parts in sizes])


_VALUE, _INTS = r"%[^\s,]+", r"-?\d+(?:,-?\d+)*"
SPELLINGS = {
    "value": _Spelling(_VALUE),
    "values": _Spelling(rf"{_VALUE}(?:, {_VALUE})*", ", ".join, lambda text: text.split(", ")),
    "word": _Spelling(r"\w+"),
    "int": _Spelling(r"-?\d+", str, int),
    "real": _Spelling(r"\S+", lambda number: f"{number:g}", float),
    "axis": _Spelling(
        r"-?\d+|\?", lambda axis: "?" if axis is None else str(axis), lambda t: None if t == "?" else int(t)
    ),
    "ints": _Spelling(_INTS, _list, _ints),
    "each": _Spelling(_INTS, _each, _ints),
    "pads": _Spelling(r"[-\d:,]+", lambda pads: _each(f"{b}" if b == e else f"{b}:{e}" for b, e in pads), _pairs),
    "by": _Spelling(r"\d+(?:x\d+)*", lambda sizes: "x".join(map(str, sizes)), lambda t: tuple(map(int, t.split("x")))),
    "ratios": _Spelling(r"[\d/x]+", lambda f: "x".join(map(str, f)), lambda t: _ratios(t)),
    "runs": _Spelling(r"[\d:,]+", _runs, _indices),
    "shape": _Spelling(r"\[[^]]*\]", lambda shape: f"[{_list(shape)}]", _shape),
}
"""How facts are written."""


def _pattern(form: str) -> re.Pattern[str]:
    """What matches the lines of a form, with a group for each fact and each word."""
    optional = _OPTION.sub(r"(?:\1)?", _FLAG.sub(r"(?: (?P<\1>\1))?", form))
    return re.compile(_FACT.sub(lambda m: f"(?P<{m[1]}>{SPELLINGS[m[2]].pattern})", optional))


@cache
def _readers() -> dict[str, tuple[type, dict[str, str], re.Pattern[str]]]:
    """By the first word of a line: the kind, the spelling of each fact, and what matches it."""
    first = re.compile(r"\W")
    return {first.split(form)[0]: (kind, dict(_FACT.findall(form)), _pattern(form)) for kind, form in FORMS.items()}


def parse(text: str, seed: int = 0) -> Expr:
    """The expression that ``text`` describes, its weights drawn from ``seed``.

    Raises:
        InputError: a line that is not of the form that `show` writes.
    """
    rng = np.random.default_rng(seed)
    named: dict[str, Expr] = {}
    last: Expr | None = None
    for line in text.strip().splitlines():
        line = " ".join(line.split("#")[0].split())
        if not line:
            continue
        try:
            name, rest = (part.strip() for part in line.split("=", 1))
            last = named[name] = _read(name, rest, named, rng)
        except (KeyError, ValueError) as error:
            raise InputError(f"cannot read the expression line {line!r}: {error}") from error
    if last is None:
        raise InputError("an expression needs at least one line")
    return last


def _read(name: str, line: str, named: dict[str, Expr], rng: np.random.Generator) -> Expr:
    word = re.split(r"\W", line)[0]
    if word not in _readers():
        raise ValueError(f"unknown kind {word!r}")
    kind, spelled, pattern = _readers()[word]
    found = pattern.fullmatch(line)
    if found is None:
        raise ValueError(f"its form is {FORMS[kind]!r}")
    given = {key: text for key, text in found.groupdict().items() if text is not None}
    facts: dict[str, Any] = {
        key: SPELLINGS[spelled[key]].read(text) if key in spelled else True for key, text in given.items()
    }
    if "x" in facts:
        facts["x"] = named[facts["x"]]
    if "terms" in facts:
        facts["terms"] = tuple(named[term] for term in facts["terms"])
    if kind is Source:
        return Source(name[1:], **facts)
    if kind in (Sum, Concat, Select):
        return kind(**facts)
    return DRAWN[kind](facts, rng) if kind in DRAWN else _layout(kind, **facts)


def _layout(kind: type[Any], x: Expr, start: int | None, end: int | None, **facts: Any) -> Layout:
    made = Layout(x, kind(**facts), start)
    if made.axis != end:
        raise ValueError(f"the channel axis is {SPELLINGS['axis'].show(made.axis)} afterwards")
    return made


def _conv(facts: dict[str, Any], rng: np.random.Generator) -> Conv:
    kernel, groups, outputs = facts.get("kernel", ()), facts.get("groups", 1), facts["outputs"]

    def each(name: str, default: Any) -> tuple[Any, ...]:
        given = facts.get(name, (default,))
        return given * len(kernel) if len(given) == 1 else given

    dims = (outputs, facts["inputs"] // groups, *kernel)
    weight = np.full(dims, 1 / prod(kernel)) if "average" in facts else rng.standard_normal(dims)
    bias = rng.standard_normal((outputs,)) if "bias" in facts else None
    begin, end = (tuple(pair[side] for pair in each("pads", (0, 0))) for side in (0, 1))
    conv = Conv.padded(facts["x"], weight, bias, each("stride", 1), each("dilation", 1), begin, end, groups)
    return replace(conv, transposed=True) if "transposed" in facts else conv


def _scale(facts: dict[str, Any], rng: np.random.Generator) -> Scale:
    shape = (facts["channels"],) if "channels" in facts else ()
    shift = rng.standard_normal(shape) if "shift" in facts else np.zeros(())
    scale = np.array(facts["number"]) if "number" in facts else rng.standard_normal(shape)
    return Scale(facts["x"], np.asarray(scale), np.asarray(shift), facts.get("axis"))


def _batchnorm(facts: dict[str, Any], rng: np.random.Generator) -> BatchNorm:
    n = facts["channels"]
    gamma, beta, mean = (rng.standard_normal((n,)) for _ in range(3))
    return BatchNorm(facts["x"], gamma, beta, mean, rng.uniform(0.5, 2, (n,)), 1e-5, facts["axis"])


DRAWN: dict[type, Callable[[dict[str, Any], np.random.Generator], Expr]] = {
    Conv: _conv,
    Scale: _scale,
    BatchNorm: _batchnorm,
}
"""The kinds with parameters."""
