"""Casts that do nothing are no obstacle, and all others stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from fx_checks import CHANNELS, Net, check, conv_bn, counts, images, ready, relative_error, run
from torch import Tensor, nn
from torch.nn import functional as F

from reparamc import fuse_fx


def _low_rank(m: Any, x: Tensor) -> Tensor:
    """As adapters are written: nothing is cast where the dtypes agree."""
    y = m.c(x)
    inner = x if x.dtype == m.a.weight.dtype else x.to(m.a.weight.dtype)
    return m.n((y + m.b(m.a(inner)) * 2.0).to(y.dtype))


NOTHING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "to the dtype of its operand": lambda m, x: m.n(m.c(x).to(x.dtype)),
    "like another value": lambda m, x: m.n(m.c(x).type_as(x)),
    "of a constant": lambda m, x: m.n(m.c(x) * m.gain.to(x.dtype)),
    "through an activation": lambda m, x: m.n(m.b(F.relu(m.a(x)).to(m.b.weight.dtype))).type(x.dtype),
    "beside": _low_rank,
    "a part of a constant, to the device of its operand": lambda m, x: (
        lambda y: m.n((y + F.conv2d(x, m.wide[:, :CHANNELS].to(x.device))).to(y.dtype))
    )(m.c(x)),
}


def _parts(run: Callable[[Any, Tensor], Any]) -> Any:
    a, b, c = nn.Conv2d(CHANNELS, 2, 1), nn.Conv2d(2, CHANNELS, 1), nn.Conv2d(CHANNELS, CHANNELS, 1)
    return Net(
        run,
        a=a,
        b=b,
        c=c,
        n=nn.BatchNorm2d(CHANNELS),
        gain=nn.Buffer(torch.rand(CHANNELS, 1, 1) + 0.5),
        wide=nn.Buffer(torch.rand(CHANNELS, 9, 1, 1)),
    )


@pytest.mark.parametrize("name", NOTHING)
def test_a_cast_to_the_dtype_that_is_there_is_nothing(name: str) -> None:
    fused = check(_parts(NOTHING[name]))
    assert counts(fused) == (2 if "activation" in name else 1, 0)
    after_a_norm = ("operand", "like another value", "activation")  # such a cast is seen under autocast
    assert name.endswith(after_a_norm) or not any(n.target in ("to", "type_as") for n in fused.graph.nodes)


def test_a_named_dtype_that_is_there_is_nothing() -> None:
    model = ready(_parts(lambda m, x: m.n(m.c(x).float().to(dtype=torch.float32)).float()))
    (x,) = images((2, CHANNELS, 4, 6), dtype=torch.float32)
    fused = fuse_fx(model, x)
    assert counts(fused) == (1, 0)
    assert (
        len(fused.graph.find_nodes(op="call_method", target="float")) == 1
    )  # what is returned has it under autocast, too
    assert not fused.graph.find_nodes(op="call_method", target="to")
    assert relative_error(run(fused, x), run(model, x)) < 1e-5


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.c(x.to(m.c.weight.dtype)),
        lambda m, x: m.c(x.float()),
    ],
)
def test_an_argument_of_another_dtype_is_cast_as_before(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model = ready(_parts(lambda m, x: m.n(forward(m, x))))
    fused = fuse_fx(model, images((2, CHANNELS, 4, 6), dtype=torch.float32)[0])
    for dtype in (torch.float32, torch.float64, torch.float16):
        (x,) = images((1, CHANNELS, 5, 4), dtype=dtype)
        assert relative_error(run(fused, x), run(model, x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, torch.float64])
def test_a_cast_that_rounds_stays(dtype: torch.dtype) -> None:
    model = ready(Net(lambda m, x: m.part[1](m.part[0](x).mul(9).to(dtype).to(x.dtype)), part=conv_bn()))
    (x,) = images((2, CHANNELS, 5, 6), dtype=torch.float32)
    for level in ("off", "region", "full"):
        fused = fuse_fx(model, x, verify=level)
        assert counts(fused) == (1, 1)
        assert relative_error(run(fused, x), run(model, x)) < 1e-2


def test_a_copy_in_half_precision_casts_to_that() -> None:
    model = ready(_parts(_low_rank))
    (x,) = images((2, CHANNELS, 4, 6), dtype=torch.float32)
    fused = fuse_fx(model, x).to(torch.bfloat16)
    assert run(fused, x.to(torch.bfloat16)).dtype == torch.bfloat16
    assert relative_error(run(fused, x.to(torch.bfloat16)).float(), run(model, x)) < 0.05


SEEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "before softmax": lambda m, x: torch.softmax(m.n(m.c(x)).float(), 1),
    "times a number": lambda m, x: m.n(m.c(x)).float() * 2,
    "times a weight": lambda m, x: m.n(m.c(x)).float() * m.gain,
    "between conv and BatchNorm": lambda m, x: m.n(m.c(x).float()),
    "like the input, between conv and BatchNorm": lambda m, x: m.n(m.c(x).type_as(x)),
    "to the dtype of a weight": lambda m, x: m.n(m.c(x)).to(m.a.weight.dtype),
    "like a weight": lambda m, x: m.n(m.c(x)).to(m.a.weight),
    "like the input": lambda m, x: m.n(m.c(x)).type_as(x),
    "like what was computed": lambda m, x: (lambda y: m.n((y + m.b(m.a(x))).to(y.dtype)))(m.c(x)),
    "before a convolution": lambda m, x: m.n(m.b(m.a(x).to(m.b.weight.dtype))),
}


@pytest.mark.parametrize("name", SEEN)
def test_a_copy_gives_the_dtypes_of_the_original_wherever_it_runs(name: str) -> None:
    model = ready(_parts(SEEN[name])).float()
    (x,) = images((1, CHANNELS, 4, 5), dtype=torch.float32)
    fused = fuse_fx(model, x)
    assert counts(fused) == (1, 0)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = run(model, x), run(fused, x)
    assert actual.dtype == expected.dtype
    assert relative_error(actual.float(), expected.float()) < 0.05
    for dtype in (torch.bfloat16, torch.float64):
        try:
            expected = run(copy.deepcopy(model).to(dtype), x.to(dtype))
        except RuntimeError:  # BatchNorm refuses float32 with other weights
            continue
        assert run(copy.deepcopy(fused).to(dtype), x.to(dtype)).dtype == expected.dtype
