"""Faults in normalizations that take scales and shifts of their results (readers of norms)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fault_models import net, nn, node, numbers, onnx_model, torch
from onnx import ModelProto
from planting import Fault, Make, Replace, fault, result

from reparamc.algebra.cost import PARAMS
from reparamc.algebra.expr import ZERO, Conv, Source
from reparamc.compiler.readings import Reading

TENSORS = {"g": numbers(4), "h": numbers(4), "s": numbers(4), "t": numbers(4)}


def norms() -> ModelProto:
    """The sum of two normalizations of one value, with different epsilons, the first scaled."""
    nodes = [
        node("LayerNormalization", "x g h", "a"), node("Mul", "a s", "b"),
        node("LayerNormalization", "x t h", "c", epsilon=0.5), node("Add", "b c", "y"),
    ]  # fmt: skip
    return onnx_model(nodes, TENSORS, ("N", 5, 4))


def norms_of_torch() -> tuple[Any, tuple[Any, ...]]:
    def run(x: Any, a: Any, b: Any, m: Any) -> Any:
        return a(x) * m.weight[0] + b(x)

    layers = nn.LayerNorm(4), nn.LayerNorm(4, eps=0.5)
    for n in layers:
        n.weight, n.bias = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
    return net(run, *layers, nn.Linear(4, 2), shapes=((2, 5, 4),))


def read_as(change: Any) -> Make:
    """For a reader: the affine part of the normalization is another one."""
    return result(lambda found: Reading(change(found.template)) if isinstance(found, Reading) else found)


def without_epsilon(e: Conv) -> Conv:
    assert isinstance(e.x, Source)
    key: Any = e.x.key
    return replace(e, x=replace(e.x, key=replace(key, kind=())))


READERS = {"onnx": "reparamc.onnx.taps:read_norm", "fx": "reparamc.fx.readers:_read_norm"}
MODELS: dict[str, dict[str, Any]] = {"onnx": {"onnx": norms}, "fx": {"fx": norms_of_torch}}
CHANGES = {
    "a norm without its bias": lambda e: replace(e, bias=None),
    "norms of different epsilons": without_epsilon,
}
NORMED: list[Fault] = [
    fault(name, READERS[host], read_as(change), **MODELS[host]) for host in READERS for name, change in CHANGES.items()
]


def with_readers() -> ModelProto:
    """A normalization that two linear layers read."""
    nodes = [node("LayerNormalization", "x g h", "a"), node("MatMul", "a v", "p"), node("Add", "p t", "q")]
    nodes += [node("MatMul", "a w", "r"), node("Add", "r s", "e"), node("Mul", "q e", "y")]
    return onnx_model(nodes, {**TENSORS, "v": numbers(4, 4), "w": numbers(4, 4, seed=1)}, ("N", 5, 4))


def with_readers_of_torch() -> tuple[Any, tuple[Any, ...]]:
    norm = nn.LayerNorm(4)
    norm.weight, norm.bias = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
    layers = norm, nn.Linear(4, 4), nn.Linear(4, 4)
    return net(lambda x, n, v, w: v(n(x)) * w(n(x)), *layers, shapes=((2, 5, 4),))


FEW = Replace("reparamc.algebra.cost:objective_of", lambda original: lambda name: PARAMS)
"""Where parameters count."""

FOLDED = "reparamc_passes.norm_folding:"
NORMED += [
    fault(
        "the bias of a norm in no reader", f"{FOLDED}_shift", lambda original: lambda norm: ZERO, FEW,
        onnx=with_readers, fx=with_readers_of_torch,
    ),
]  # fmt: skip
