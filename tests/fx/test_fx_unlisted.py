"""Duplicates, kernels of unlisted operators and constants, where writes in place and the batch get in the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("torch")

import torch
from fx_checks import check, report
from torch import Tensor, nn


class Net(nn.Module):
    """Two convolutions of equal weights, another, a BatchNorm, and a function of them."""

    def __init__(self, body: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=p) for p in (1, 1, 0))
        self.b.load_state_dict(self.a.state_dict())
        self.n = nn.BatchNorm2d(4)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def written_between(m: Net, x: Tensor) -> Tensor:
    h = x * x
    first = m.a(h)
    h.relu_()
    return torch.tanh(first) * m.b(h)


def written_result(m: Net, x: Tensor) -> Tensor:
    first = m.a(x)
    first.relu_()
    return first * torch.tanh(m.b(x))


def halved_double(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    z = (y + y) * 0.5
    y.add_(1.0)
    return torch.sin(z) + torch.cos(y)


def written_view(m: Net, x: Tensor) -> Tensor:
    y = m.n(x)
    y[..., 1:].add_(1.0)
    return torch.roll(y, 1, 1).sin()


BODIES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "operand written between": written_between,
    "result written": written_result,
    "scale of one": halved_double,
    "written view": written_view,
    "roll along the batch": lambda m, x: m.c(torch.roll(m.a(x), 1, 0)),
    "flip along the batch": lambda m, x: m.c(torch.flip(m.a(x), (0,))),
    "sum along the batch": lambda m, x: m.c(torch.cumsum(m.a(x), 0)),
    "first of the batch": lambda m, x: m.c(m.a(x)[:1]),
    "deviation from the batch": lambda m, x: m.c(m.a(x) - m.a(x).mean(0, keepdim=True)),
    "roll along a map": lambda m, x: m.c(torch.roll(m.a(x), 1, 2)),
}


@pytest.mark.parametrize("name", BODIES)
def test_what_is_no_kernel_keeps_its_value(name: str) -> None:
    check(Net(BODIES[name]), (3, 4, 9, 8), (1, 4, 8, 9), verify="off")


def test_equal_convolutions_are_computed_once() -> None:
    fused = check(Net(lambda m, x: torch.relu(m.n(m.a(x))) + torch.sigmoid(m.n(m.b(x)))), specialize=True)
    assert report(fused).after.conv == 1
    assert report(fused).passes["duplicate-removal"] == 1


def test_channels_that_are_rolled_are_columns() -> None:
    fused = check(Net(lambda m, x: m.c(torch.roll(torch.relu(m.a(x)), 1, 1))))
    assert not any(n.target is torch.roll for n in fused.graph.nodes)


def test_constants_that_forward_computes_are_kept() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        weight = m.a.weight - m.a.weight.mean((1, 2, 3), keepdim=True)
        return torch.relu(nn.functional.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True)))

    fused = check(Net(body))
    assert sum(n.op.startswith("call_") for n in fused.graph.nodes) == 2


@torch.library.custom_op("reparamc_tests::add_one", mutates_args=("x",))
def add_one(x: Tensor) -> None:
    x.add_(1)


@torch.library.custom_op("reparamc_tests::add_one_to_all", mutates_args=("xs",))
def add_one_to_all(xs: list[Tensor]) -> None:
    for x in xs:
        x.add_(1)


@torch.library.custom_op("reparamc_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


WRITING: dict[str, Callable[[Tensor], object]] = {
    "a custom operator": add_one,
    "by its namespace": lambda y: torch.ops.reparamc_tests.add_one(y),
    "an overload": lambda y: torch.ops.reparamc_tests.add_one.default(y),
    "a list": lambda y: add_one_to_all([y]),
    "a view": lambda y: add_one(y.flatten(2)),
}


@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("name", WRITING)
def test_operators_of_other_libraries_that_write(name: str, examples: bool) -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        y = m.n(m.a(x))
        before = m.a(y)
        WRITING[name](y)
        return m.b(y) + before

    check(Net(body), (2, 4, 7, 6), (1, 4, 5, 8), examples=examples)


def test_operators_of_other_libraries_that_write_nothing() -> None:
    fused = check(Net(lambda m, x: doubled(m.n(m.a(x)))), (2, 4, 7, 6))
    assert report(fused).after.batchnorm == 0
