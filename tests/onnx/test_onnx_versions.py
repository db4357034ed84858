"""Every operator set and file version that is read, and every rank: what folds in one folds in all."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from expression_models import operators, run
from onnx import TensorProto, helper
from onnx_models import W1, W3, N, batchnorm, conv_bn, fuse, model, node, norm, rand

from reparamc.onnx.fuse import fuse_model

NEWEST = onnx.defs.onnx_opset_version()


def runs(opset: int, ir_version: int) -> bool:
    """Whether ONNX Runtime knows such files."""
    try:
        run(model([node("Relu", "x", "y")], {}, opset=opset, ir_version=ir_version), {"x": rand(1, 6, 2, 2)})
    except Exception:  # ONNX Runtime's exceptions share no base class
        return False
    return True


@pytest.mark.parametrize("opset", range(7, NEWEST + 1))
def test_operator_sets(opset: int) -> None:
    nodes = [node("Conv", "x w", "c", pads=[1] * 4), batchnorm("c", "n", "b"), node("Add", "b k", "y")]
    made = model(nodes, {"w": W3, **N, "k": rand(6, 1, 1)}, opset=opset, ir_version=8)
    fused, report = fuse_model(made, verify="full" if runs(opset, 8) else "region")
    assert operators(fused) == {"Conv": 1}, report.kept


@pytest.mark.parametrize("ir_version", range(3, onnx.IR_VERSION + 1))
def test_file_versions(ir_version: int) -> None:
    made = conv_bn(ir_version=ir_version)
    if ir_version == 3:
        made.graph.input.extend(helper.make_tensor_value_info(t.name, 1, t.dims) for t in made.graph.initializer)
    fused, _ = fuse_model(made, verify="full" if runs(17, ir_version) else "region")
    assert operators(fused) == {"Conv": 1}
    assert fused.ir_version == ir_version
    listed = {v.name for v in fused.graph.input} - {"x"}
    assert listed == ({t.name for t in fused.graph.initializer} if ir_version == 3 else set())


@pytest.mark.parametrize("rank", range(3, 6))
def test_kernels_of_every_rank(rank: int) -> None:
    spatial = rank - 2
    nodes = [node("Conv", "x w", "c", pads=[1] * 2 * spatial), batchnorm("c", "n", "y")]
    made = model(nodes, {"w": rand(6, 6, *[3] * spatial), **N}, ("N", 6, *"HWD"[:spatial]))
    assert operators(fuse(made)[0]) == {"Conv": 1}


@pytest.mark.parametrize("level", ["off", "region", "full"])
@pytest.mark.parametrize("size", range(4))
@pytest.mark.parametrize("rank", range(7))
def test_arithmetic_of_every_rank_and_size(rank: int, size: int, level: str) -> None:
    """Sizes from 0 to 3 along every axis, of numbers and of maps: nothing raises, and nothing changes."""
    nodes = [
        node("Mul", "x s", "p"), node("Add", "p x", "q"), node("Neg", "q", "r"), node("Sub", "r p", "y"),
    ]  # fmt: skip
    made = model(nodes, {"s": np.array(2, np.float32)}, [size] * rank)
    fused, report = fuse_model(made, verify=level)
    assert not report.failed
    x = {"x": rand(*[size] * rank)}
    np.testing.assert_allclose(run(fused, x)[0], run(made, x)[0], rtol=1e-5)


NAMES = {
    "blanks": "a b", "quotes": "it's \"a\"", "slashes": "/net/1/x", "other letters": "Größe-尺寸", "long": "n" * 300,
    "those that are made": "y.weight",
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_names(case: str) -> None:
    name = NAMES[case]
    made = model(
        [
            helper.make_node("Conv", ["x", "w"], [name], name, pads=[1] * 4),
            helper.make_node("BatchNormalization", [name, *(f"n.{k}" for k in "gbmv")], ["y"]),
            helper.make_node("Relu", ["y"], ["z"], "y/fused_Conv"),
            helper.make_node("Conv", ["z", "y.bias"], ["e"]),
        ],
        {"w": W3, **N, "y.bias": W1},
        outputs="e",
    )
    fused, _ = fuse(made)
    assert operators(fused) == {"Conv": 2, "Relu": 1}
    stored = [t.name for t in fused.graph.initializer]
    assert len(set(stored)) == len(stored) == 3


def test_an_absent_bias_and_defaults_of_the_standard() -> None:
    bare = node("BatchNormalization", "c n.g n.b n.m n.v", "y")
    made = model([helper.make_node("Conv", ["x", "w", ""], ["c"]), bare], {"w": W1, **N})
    made.graph.node[1].domain = made.graph.node[0].domain = "ai.onnx"
    assert len(fuse(made)[0].graph.node) == 1


def test_a_sparse_weight() -> None:
    dense = W1.ravel().copy()
    dense[::2] = 0
    at = np.flatnonzero(dense)
    values = helper.make_tensor("w", TensorProto.FLOAT, at.shape, dense[at])
    made = model([node("Conv", "x w", "c"), batchnorm("c", "n", "y")], {"w": W1, **norm("n", 6)})
    del made.graph.initializer[0]
    indices = helper.make_tensor("", TensorProto.INT64, at.shape, at)
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, W1.shape))
    fused, _ = fuse(made)
    assert operators(fused) == {"Conv": 1}
    assert not fused.graph.sparse_initializer or fused.graph.sparse_initializer[0].values.name == "w"
