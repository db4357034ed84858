"""Windows of one form are proven side by side: each is found equal or different as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, numpy_helper
from onnx_models import PAD, batchnorm, model, node, norm, rand

from reparamc.certificate import proof
from reparamc.certificate.onnx import certify_onnx
from reparamc.certificate.proof import Certificate
from reparamc.onnx.fuse import fuse_model

BLOCKS = 5
Block = tuple[list[NodeProto], dict[str, np.ndarray]]


def branches(x: str, y: str, n: int) -> Block:
    nodes = [
        node("Conv", f"{x} {y}w3", f"{y}c3", **PAD),
        batchnorm(f"{y}c3", f"{y}n3", f"{y}b3"),
        node("Conv", f"{x} {y}w1", f"{y}c1"),
        batchnorm(f"{y}c1", f"{y}n1", f"{y}b1"),
        batchnorm(x, f"{y}n0", f"{y}b0"),
        node("Add", f"{y}b3 {y}b1", f"{y}a"),
        node("Add", f"{y}b0 {y}a", f"{y}s"),
    ]
    norms = [norm(f"{y}n{k}", 6, 10 * n + k) for k in (3, 1, 0)]
    weights = {f"{y}w3": rand(6, 6, 3, 3, seed=n), f"{y}w1": rand(6, 6, 1, 1, seed=n)}
    return nodes, weights | norms[0] | norms[1] | norms[2]


def depthwise(x: str, y: str, n: int) -> Block:
    nodes = [
        node("Conv", f"{x} {y}w {y}v", f"{y}c", group=3, dilations=[2, 1], pads=[2, 1, 2, 1]),
        batchnorm(f"{y}c", f"{y}n", f"{y}s"),
    ]
    return nodes, {f"{y}w": rand(6, 2, 3, 3, seed=n), f"{y}v": rand(6, seed=n), **norm(f"{y}n", 6, n)}


def layer_scale(x: str, y: str, n: int) -> Block:
    nodes = [
        node("Conv", f"{x} {y}w", f"{y}c", **PAD),
        node("Mul", f"{y}c {y}g", f"{y}m"),
        node("Sub", f"{y}h {y}m", f"{y}d"),
        node("Add", f"{x} {y}d", f"{y}s"),
    ]
    shapes = {"w": (6, 6, 3, 3), "g": (6, 1, 1), "h": (1, 6, 1, 1)}
    return nodes, {f"{y}{k}": rand(*shape, seed=n) for k, shape in shapes.items()}


def two_kernels(x: str, y: str, n: int) -> Block:
    nodes = [
        node("Conv", f"{x} {y}w", f"{y}c"),
        batchnorm(f"{y}c", f"{y}n", f"{y}b"),
        node("Conv", f"{y}b {y}k", f"{y}e", group=9, pads=[1, 0, 1, 0]),
        batchnorm(f"{y}e", f"{y}o", f"{y}f"),
        node("Conv", f"{y}f {y}u", f"{y}s"),
    ]
    shapes = {"w": (9, 6, 1, 1), "k": (9, 1, 3, 1), "u": (6, 9, 1, 1)}
    weights = {f"{y}{k}": rand(*shape, seed=n) for k, shape in shapes.items()}
    return nodes, weights | norm(f"{y}n", 9, n) | norm(f"{y}o", 9, n + 50)


KINDS = [branches, depthwise, layer_scale, two_kernels]
SHAPES = [("N", 6, "H", "W"), (3, 6, 7, 9)]


def network(block: Callable[[str, str, int], Block], shape: tuple[int | str, ...] = SHAPES[0]) -> ModelProto:
    """Blocks of one kind in a row, ReLU between them; the result of each is called B1s, B2s and so on."""
    nodes, parameters, x = [], dict[str, np.ndarray](), "x"
    for n in range(1, BLOCKS + 1):
        of_block, own = block(x, f"B{n}", n)
        x = "y" if n == BLOCKS else f"B{n}r"
        nodes += [*of_block, node("Relu", f"B{n}s", x)]
        parameters |= own
    return model(nodes, parameters, shape)


def fused(original: ModelProto) -> ModelProto:
    return fuse_model(original, verify="off")[0]


def told(found: Certificate) -> list[tuple[str, str, int, int]]:
    return [(w.where, w.verdict, w.before, w.after) for w in found.windows]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModelProto, ModelProto], Certificate]:
    """The proof that compares each window alone."""

    def certify(original: ModelProto, result: ModelProto) -> Certificate:
        with monkeypatch.context() as patch:
            patch.setattr(proof, "MOST_BESIDE", -1)
            return certify_onnx(original, result)

    return certify


Alone = Callable[[ModelProto, ModelProto], Certificate]


@pytest.mark.parametrize("shape", SHAPES, ids=["open", "fixed"])
@pytest.mark.parametrize("block", KINDS)
def test_blocks_of_one_form_are_proven_together(
    block: Callable[[str, str, int], Block], shape: tuple[int | str, ...], alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = network(block, shape)
    result = fused(original)
    one_by_one = alone(original, result)
    looked_at: list[str] = []
    jointed = proof._Proof._jointed

    def counted(self: proof._Proof, before: str, after: str, precision: proof.Precision) -> proof.Window | None:
        looked_at.append(before)
        return jointed(self, before, after, precision)

    monkeypatch.setattr(proof._Proof, "_jointed", counted)
    found = certify_onnx(original, result)
    assert found.holds
    assert found.equal >= BLOCKS
    assert len(looked_at) <= found.equal // BLOCKS
    assert told(found) == told(one_by_one)
    assert (found.units, found.bound) == pytest.approx((one_by_one.units, one_by_one.bound))


@pytest.mark.parametrize("block", KINDS)
def test_a_fault_in_one_of_them_is_found_in_that_one(block: Callable[[str, str, int], Block], alone: Alone) -> None:
    """In the first or last entry of each parameter of two blocks, by its sign or a thousandth."""
    original = network(block)
    result = fused(original)
    for tensor in result.graph.initializer:
        if not tensor.name.startswith(("B3", "B5")):
            continue
        right = numpy_helper.to_array(tensor)
        for at, factor in ((0, -1.0), (right.size - 1, 1.001)):
            wrong = np.array(right)
            wrong.reshape(-1)[at] *= np.float32(factor)
            tensor.CopyFrom(numpy_helper.from_array(wrong, tensor.name))
            found = certify_onnx(original, result)
            assert found.different, (tensor.name, factor)
            assert {w.where[:2] for w in found.windows if w.verdict != "equal"} == {tensor.name[:2]}
            assert told(found) == told(alone(original, result))
        tensor.CopyFrom(numpy_helper.from_array(right, tensor.name))
    assert certify_onnx(original, result).holds


@pytest.mark.parametrize("block", KINDS)
def test_blocks_that_have_the_parameters_of_one_another_differ(block: Callable[[str, str, int], Block]) -> None:
    original = network(block)
    result = fused(original)
    stored = {t.name: t for t in result.graph.initializer}
    kernel = max((n for n in stored if n.startswith("B2")), key=lambda n: prod(stored[n].dims))
    second, fourth = stored[kernel], stored[kernel.replace("B2", "B4")]
    second.raw_data, fourth.raw_data = fourth.raw_data, second.raw_data
    assert {w.where[:2] for w in certify_onnx(original, result).windows if w.verdict != "equal"} == {"B2", "B4"}


def test_other_attributes_and_other_operands_are_other_forms() -> None:
    original = network(branches)
    for change in (
        lambda n: next(a for a in n.attribute if a.name == "pads").ints.__setitem__(slice(None), [2, 1, 0, 1]),
        lambda n: n.input.__setitem__(0, "B1r"),
    ):
        result = fused(original)
        change(next(n for n in result.graph.node if n.output[0] == "B3s"))  # pyright: ignore
        found = certify_onnx(original, result)
        assert {w.where for w in found.windows if w.verdict != "equal"} == {"B3s"}


def twice(x: str, y: str, n: int) -> Block:
    """Two kernels side by side, which are one and the same in the first block."""
    second = f"{y}{'w' if n == 1 else 'v'}"
    nodes = [
        node("Conv", f"{x} {y}w", f"{y}c", **PAD),
        node("Conv", f"{x} {second}", f"{y}d", **PAD),
        node("Add", f"{y}c {y}d", f"{y}s"),
    ]
    return nodes, {f"{y}w": rand(6, 6, 3, 3, seed=n), second: rand(6, 6, 3, 3, seed=n + (n > 1))}


def test_what_one_block_shares_others_need_not() -> None:
    original = network(twice)
    nodes, weights = [], {}
    stored = {t.name: numpy_helper.to_array(t) for t in original.graph.initializer}
    for n in range(1, BLOCKS + 1):
        x = "x" if n == 1 else f"B{n - 1}r"
        nodes += [node("Conv", f"{x} B{n}t", f"B{n}s", **PAD), node("Relu", f"B{n}s", f"B{n}r" if n < BLOCKS else "y")]
        weights[f"B{n}t"] = stored[f"B{n}w"] + stored[f"B{n}w" if n == 1 else f"B{n}v"]
    assert certify_onnx(original, model(nodes, weights)).holds
    weights["B4t"] = 2 * stored["B4w"]  # as if it shared them, too
    assert [w.where for w in certify_onnx(original, model(nodes, weights)).windows if w.verdict != "equal"] == ["B4s"]


def plain(x: str, y: str, n: int) -> Block:
    nodes = [node("Conv", f"{x} {y}w", f"{y}c", **PAD), batchnorm(f"{y}c", f"{y}n", f"{y}s")]
    return nodes, {f"{y}w": rand(6, 6, 3, 3, seed=n), **norm(f"{y}n", 6, n)}


def test_blocks_that_lose_channels_are_looked_at_by_themselves(alone: Alone) -> None:
    original = network(plain)
    kernel = next(t for t in original.graph.initializer if t.name == "B2w")
    weight = rand(6, 6, 3, 3, seed=2)
    weight[2] = 0  # a channel that is constant
    kernel.CopyFrom(numpy_helper.from_array(weight, "B2w"))
    result = fused(original)
    assert [5 in t.dims for t in result.graph.initializer if t.name == "B2s.weight"] == [True]
    found = certify_onnx(original, result)
    assert found.holds
    assert told(found) == told(alone(original, result))


def shifted_before(which: int) -> tuple[ModelProto, ModelProto]:
    """Two convolutions of one form; before that of block ``which``, the models have different operators."""
    nodes, made = [], []
    for n in (0, 1):
        nodes += [
            node("Sub" if n == which else "Add", "x p", f"a{n}"),
            node("Conv", f"a{n} w{n}", f"c{n}"),
            node("Mul", f"c{n} g{n}", f"y{n}"),
        ]
        made += [node("Add", "x p", f"a{n}"), node("Conv", f"a{n} v{n}", f"y{n}")]
    whole = {f"{k}{n}": rand(6, *rest, seed=n) for n in (0, 1) for k, rest in (("w", (6, 1, 1)), ("g", (1, 1)))}
    folded = {f"v{n}": whole[f"w{n}"] * whole[f"g{n}"][..., None] for n in (0, 1)}
    p, x = rand(1, 6, 7, 7), (1, 6, 7, 7)
    return (
        model(nodes, {**whole, "p": p}, x, outputs="y0 y1"),
        model(made, {**folded, "p": p}, x, outputs="y0 y1"),
    )


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_before_the_windows_may_differ(which: int, alone: Alone) -> None:
    original, result = shifted_before(which)
    found = certify_onnx(original, result)
    assert not found.holds
    assert ("y0", "equal", 2, 1) in told(found)
    assert told(found) == told(alone(original, result))
