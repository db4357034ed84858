"""Storage types, values at the edge of their range, and what the checks must catch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from expression_models import operators, run
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper
from onnx_models import (
    BN,
    CONV,
    PAD,
    W1,
    W3,
    N,
    assert_equal_outputs,
    assert_folds,
    assert_left,
    batchnorm,
    conv_bn,
    fuse,
    model,
    node,
    norm,
    rand,
    reasons,
)

from reparamc.algebra.expr import BatchNorm, Conv, Expr, Sum
from reparamc.algebra.kernels import coefficients, scale_outputs
from reparamc.algebra.rewrite import Pass
from reparamc.certificate.proof import Certificate
from reparamc.errors import InputError, VerificationError
from reparamc.onnx.emit import OnnxEdit
from reparamc.onnx.fuse import fuse_model
from reparamc.onnx.values import FLOATS
from reparamc.verify.search import verify_onnx
from reparamc_passes import PASSES


def in_type(made: ModelProto, kind: int) -> ModelProto:
    """``made`` with every float turned into ``kind``."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for tensor in made.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for info in (*made.graph.input, *made.graph.output):
        info.type.tensor_type.elem_type = kind
    return made


# Types


def test_half() -> None:
    fused = assert_folds(in_type(conv_bn(), TensorProto.FLOAT16), 5e-3, Conv=1)
    assert {t.data_type for t in fused.graph.initializer} == {TensorProto.FLOAT16}


def test_half_whose_folded_weight_overflows() -> None:
    parameters = N | {"n.v": np.full(6, 1e-7, np.float32), "n.m": np.zeros(6, np.float32)}
    made = in_type(conv_bn(parameters, 300 * W3), TensorProto.FLOAT16)
    fused, report = fuse_model(made, verify="region")
    assert fused.SerializeToString() == made.SerializeToString()
    assert any("exceeds the range of float16" in reason for reason in reasons(report))


def test_half_whose_folded_weight_falls_below_the_range() -> None:
    parameters = N | {"n.g": np.full(6, 1e-4, np.float32)}
    made = in_type(conv_bn(parameters, W3 * np.float32(1e-3)), TensorProto.FLOAT16)
    fused, report = fuse_model(made, verify="region")
    assert fused.SerializeToString() == made.SerializeToString()
    assert any("below the range" in reason for reason in reasons(report))


def test_bfloat16() -> None:
    made = in_type(conv_bn(), TensorProto.BFLOAT16)
    fused, report = fuse_model(made)
    assert report.end_to_end[0].in_float32
    assert operators(fused) == {"Conv": 1}
    assert {t.data_type for t in fused.graph.initializer} == {TensorProto.BFLOAT16}
    weight = numpy_helper.to_array(fused.graph.initializer[0])
    assert weight.dtype == ml_dtypes.bfloat16


def test_double_linear() -> None:
    nodes = [node("MatMul", "x g", "c"), node("Mul", "c s", "y")]
    made = in_type(model(nodes, {"g": rand(6, 6), "s": rand(6)}, ("N", 5, 6)), TensorProto.DOUBLE)
    fused, _ = fuse(made, 1e-15)
    assert operators(fused) == {"MatMul": 1}
    assert {t.data_type for t in fused.graph.initializer} == {TensorProto.DOUBLE}


def test_double_conv_is_exact_to_the_last_digits() -> None:
    made = in_type(conv_bn(), TensorProto.DOUBLE)
    fused, _ = fuse_model(made, verify="region")
    assert operators(fused) == {"Conv": 1}
    gamma, beta, mean, var = (numpy_helper.to_array(t) for t in made.graph.initializer[1:5])
    scale = gamma / np.sqrt(var + np.float32(1e-5))
    weight, bias = (numpy_helper.to_array(t) for t in fused.graph.initializer)
    np.testing.assert_allclose(
        weight, numpy_helper.to_array(made.graph.initializer[0]) * scale[:, None, None, None], rtol=1e-14
    )
    np.testing.assert_allclose(bias, beta - mean * scale, rtol=1e-13)


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.BFLOAT16])
def test_types_for_which_the_runtime_has_no_operators(kind: int) -> None:
    """Both models run in float32; what is stored is proven and checked in its own type."""
    cast = [node("Cast", "y", "t", to=kind), node("If", "k", "z", then_branch=_body("Neg"), else_branch=_body("Relu"))]
    made = in_type(model([CONV, BN, *cast], {"w": W3, **N, "k": np.array(True)}, outputs="z"), kind)
    fused, report = fuse_model(made)
    assert operators(fused) == {"Conv": 1, "Cast": 1, "Neg": 1}, operators(fused)
    assert report.end_to_end[0].in_float32
    assert verify_onnx(made, fused, seconds=0.1).equal
    (bias,) = (t for t in fused.graph.initializer if len(t.dims) == 1)
    off = numpy_helper.to_array(bias).astype(np.float64) + 1
    bias.CopyFrom(numpy_helper.from_array(off.astype(FLOATS[kind]), bias.name))
    found = verify_onnx(made, fused, seconds=0.1)
    assert found.doubt or not found.equal


def _body(op: str) -> GraphProto:
    return helper.make_graph([node(op, "t", "r")], op, [], [helper.make_empty_tensor_value_info("r")])


def test_a_double_that_float32_does_not_hold() -> None:
    made = in_type(
        model([CONV, BN, node("Relu", "y", "r"), node("Mul", "r k", "z")], {"w": W3, **N, "k": rand(1)}, outputs="z"),
        TensorProto.DOUBLE,
    )
    made.graph.initializer[-1].CopyFrom(numpy_helper.from_array(np.full(1, 1e200), "k"))
    with pytest.raises(InputError, match="--verify region"):
        fuse_model(made)
    assert operators(fuse_model(made, verify="region")[0]) == {"Conv": 1, "Relu": 1, "Mul": 1}


def test_mixed_types() -> None:
    """Since opset 15 statistics may be float32 where values are float16; new parameters are of the values' type."""
    made = in_type(conv_bn(opset=17), TensorProto.FLOAT16)
    for tensor in made.graph.initializer:
        if tensor.name in ("n.m", "n.v"):
            tensor.CopyFrom(numpy_helper.from_array(N[tensor.name], tensor.name))
    fused, _ = fuse_model(made, verify="region")
    assert {t.data_type for t in fused.graph.initializer if t.name not in N} <= {TensorProto.FLOAT16}


# Values


def test_large_values_that_cancel() -> None:
    """A bias of 1e4 less a mean of 1e4 keeps its digits only in more than float32."""
    bias = np.float32(1e4) + rand(6)
    parameters = N | {"n.m": bias + rand(6, seed=3), "b": bias}
    nodes = [node("Conv", "x w b", "c", **PAD), batchnorm("c", "n", "y")]
    fused, _ = fuse_model(model(nodes, {"w": W3, **parameters}))
    scale = parameters["n.g"].astype(float) / np.sqrt(parameters["n.v"].astype(float) + np.float32(1e-5))
    exact = (bias.astype(float) - parameters["n.m"]) * scale + parameters["n.b"]
    found = next(numpy_helper.to_array(t) for t in fused.graph.initializer if t.dims == [6])
    np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_variance_zero_with_epsilon() -> None:
    assert_folds(conv_bn(N | {"n.v": np.zeros(6, np.float32)}), Conv=1)


@pytest.mark.parametrize("variance", [0.0, -1.0])
def test_variance_that_makes_no_number(variance: float) -> None:
    nodes = [node("Conv", "x w", "c", **PAD), batchnorm("c", "n", "y", epsilon=0.0)]
    made = model(nodes, {"w": W3, **N, "n.v": np.full(6, variance, np.float32)})
    fused, report = fuse_model(made, verify="region")
    assert fused.SerializeToString() == made.SerializeToString()
    assert any("NaN or infinite" in reason for reason in reasons(report))


def test_gamma_zero() -> None:
    assert_folds(conv_bn(N | {"n.g": np.zeros(6, np.float32)}), Conv=1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e37, 3e38])
def test_weight_that_is_no_number_or_overflows(value: float) -> None:
    weight = W3.copy()
    weight[0, 0, 0, 0] = value
    report = assert_left(conv_bn(weight=weight))
    assert any("NaN, infinite, or too large" in reason for reason in reasons(report))


@pytest.mark.parametrize("which", ["w", "b"])
@pytest.mark.parametrize("value", [np.inf, 3e38])
def test_what_overflows_does_not_leave_with_a_channel_that_nobody_reads(value: float, which: str) -> None:
    """Zero times infinity is NaN, which is what the original gives."""
    held = {"w": W3.copy(), "b": rand(6), "k": W1.copy()}
    held[which][3] = value
    held["k"][:, 3] = 0.0
    assert_left(model([node("Conv", "x w b", "c", **PAD), node("Relu", "c", "r"), node("Conv", "r k", "y")], held))


def test_infinite_branch_stays() -> None:
    nodes = [node("Conv", "x w", "c", **PAD), node("Conv", "x k", "d"), node("Add", "c d", "y")]
    weight = W1.copy()
    weight[2, 3] = np.inf
    assert_left(model(nodes, {"w": W3, "k": weight}))


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("which", ["n.g", "n.v"])
def test_parameters_of_a_wrong_length(length: int, which: str) -> None:
    """NumPy would broadcast a length of one without a word."""
    made = conv_bn()
    for tensor in made.graph.initializer:
        if tensor.name == which:
            tensor.CopyFrom(numpy_helper.from_array(rand(length), which))
    try:
        fused, _ = fuse_model(made, verify="region")
    except InputError:
        return
    assert fused.SerializeToString() == made.SerializeToString()


@pytest.mark.parametrize("length", [1, 5])
def test_bias_of_a_wrong_length(length: int) -> None:
    nodes = [node("Conv", "x w b", "c", **PAD), batchnorm("c", "n", "y")]
    made = model(nodes, {"w": W3, **N, "b": np.ones(6, np.float32)})
    made.graph.initializer[-1].CopyFrom(numpy_helper.from_array(rand(length), "b"))
    try:
        fused, _ = fuse_model(made, verify="region")
    except InputError:
        return
    assert fused.SerializeToString() == made.SerializeToString()


def test_weight_that_does_not_fit_its_input() -> None:
    made = conv_bn()
    made.graph.initializer[0].CopyFrom(numpy_helper.from_array(rand(6, 4, 3, 3), "w"))
    try:
        fused, _ = fuse_model(made, verify="region")
    except InputError:
        return
    assert fused.SerializeToString() == made.SerializeToString()


@pytest.mark.parametrize("columns", [2, 3])
def test_weights_that_do_not_fit_one_another(columns: int) -> None:
    """A model that no runtime accepts is refused, at every level."""
    nodes = [node("Gemm", "x w", "a", transB=1), node("Gemm", "a v", "y", transB=1)]
    made = model(nodes, {"w": rand(4, 6), "v": rand(5, columns)}, ("N", 6))
    with pytest.raises(InputError, match=rf"Dimension mismatch in unification between (4 and )?{columns}( and 4)?"):
        fuse_model(made, verify="off")


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, object], ids=["int32", "bool", "string"])
def test_weight_that_is_no_floating_number(dtype: Any) -> None:
    """The checker does not look at the types of operands."""
    made = conv_bn()
    made.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((6, 6, 3, 3), "1").astype(dtype), "w"))
    with pytest.raises(InputError, match=r"'w' is of type (int32|bool|string), where a floating type is needed"):
        fuse_model(made, verify="off")


def test_data_that_is_too_short() -> None:
    made = conv_bn()
    made.graph.initializer[0].raw_data = made.graph.initializer[0].raw_data[:-4]
    with pytest.raises(InputError, match=r"\bw\b"):
        fuse_model(made)


@pytest.mark.parametrize("kind", ["Conv", "BatchNormalization", "MatMul", "Gemm"])
def test_an_open_size_that_an_operator_demands(kind: str) -> None:
    """Inputs for the comparison of whole models have as many channels as the first operator takes."""
    parameters = N | {"w": W3, "m": rand(6, 6)}
    nodes = {
        "Conv": [node("Conv", "x w", "c", **PAD), batchnorm("c", "n", "y")],
        "BatchNormalization": [batchnorm("x", "n", "b"), node("Conv", "b w", "y")],
        "MatMul": [node("MatMul", "x m", "b"), node("MatMul", "b m", "y")],
        "Gemm": [node("Gemm", "x m", "b"), node("Gemm", "b m", "y")],
    }[kind]
    shape = {"MatMul": ("N", "T", "C"), "Gemm": ("N", "C")}.get(kind, ("N", "C", "H", "W"))
    _, report = fuse_model(model(nodes, parameters, shape))
    assert report.changed
    assert report.end_to_end


def test_empty_model() -> None:
    with pytest.raises(InputError):
        fuse_model(ModelProto())


def test_a_branch_of_zeros_stays_with_a_reason() -> None:
    """The sizes of the other branch are not known to be the same."""
    half = {"kernel_shape": [1, 1], "strides": [2, 2]}
    nodes = [node("Relu", "x", "a"), node("Conv", "a w", "b", **half), node("MaxPool", "x", "p", **half)]
    zeros = {"w": np.zeros((6, 6, 1, 1), np.float32)}
    report = assert_left(model([*nodes, node("Add", "b p", "y")], zeros, ("N", 6, "H", "W")))
    assert any("its weights are all zero" in reason for reason in reasons(report))


# What the checks catch


def forgets_the_shift(e: Expr) -> Expr | None:
    """BatchNorm after a convolution, its shift left out."""
    if isinstance(e, BatchNorm) and isinstance(e.x, Conv):
        return scale_outputs(e.x, coefficients(e)[0], np.zeros(()))
    return None


def ignores_the_border(e: Expr) -> Expr | None:
    """A padded convolution read as one whose padding lies on the other side."""
    if isinstance(e, Sum) and isinstance(e.terms[0], Conv):
        conv = e.terms[0]
        return replace(conv, offset=tuple(a - 1 for a in conv.offset))
    return None


@pytest.mark.parametrize("rule", [forgets_the_shift, ignores_the_border])
@pytest.mark.parametrize("verify", ["region", "full"])
def test_a_wrong_rule_is_caught_by_the_region_check(rule: Any, verify: str) -> None:
    nodes = [
        node("Conv", "x w", "c", name="conv", **PAD), batchnorm("c", "n", "b", name="norm"),
        node("Conv", "x k", "d"), node("Relu", "b", "r"), node("Conv", "r w", "e", **PAD), node("Relu", "d", "s"),
        node("Conv", "r k", "f"), node("Add", "e f", "y", name="join"), node("Add", "y s", "z"),
    ]  # fmt: skip
    made = model(nodes, {"w": W3, "k": W1, **N}, outputs="y s")
    where = "norm" if rule is forgets_the_shift else "join"
    fused, report = fuse_model(made, verify=verify, pass_table=(Pass("wrong", "", "", (rule,)),))
    (failed,) = report.failed
    assert (failed.where, failed.check, failed.passes) == (where, "rewrite", ("wrong",))
    assert fused == made


def test_a_wrong_rule_without_the_region_check_goes_through() -> None:
    """So the check above is what catches it."""
    table = (Pass("wrong", "", "", (forgets_the_shift,)),)
    fused, _ = fuse_model(conv_bn(), verify="off", pass_table=table)
    assert operators(fused) == {"Conv": 1}
    with pytest.raises(AssertionError):
        assert_equal_outputs(conv_bn(), fused)


@pytest.mark.parametrize("factor", [1 + 1e-2, -1.0, np.nan])
def test_a_wrong_splice_is_caught_end_to_end(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    add = OnnxEdit.add_initializer

    def perturbed(self: OnnxEdit, wanted: str, array: np.ndarray, dtype: np.dtype) -> str:
        return add(self, wanted, array * factor, dtype)

    monkeypatch.setattr(OnnxEdit, "add_initializer", perturbed)
    kept, report = fuse_model(conv_bn())
    assert kept == conv_bn()  # the certificate sees it
    assert [k.name for k in report.kept] == ["certificate"]
    assert report.certificate is not None
    assert report.certificate.rolled_back == 1
    assert [f.check for f in report.failed] == ["certificate"]
    monkeypatch.setattr("reparamc.certificate.onnx.certify_onnx", lambda *_: Certificate((), 0, 0.0))
    with pytest.raises(VerificationError, match="region 'bn' of the fused model") as caught:
        fuse_model(conv_bn())
    assert caught.value.where == "bn"
    assert "batchnorm" in caught.value.before.lower()
    assert caught.value.after
    fuse_model(conv_bn(), verify="region")  # which cannot see it


def test_one_wrong_weight_of_many_is_caught_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    add = OnnxEdit.add_initializer

    def perturbed(self: OnnxEdit, wanted: str, array: np.ndarray, dtype: np.dtype) -> str:
        array = array.copy()
        array.flat[-1] += 0.01 * np.abs(array).max()
        return add(self, wanted, array, dtype)

    monkeypatch.setattr(OnnxEdit, "add_initializer", perturbed)
    monkeypatch.setattr("reparamc.certificate.onnx.certify_onnx", lambda *_: Certificate((), 0, 0.0))
    with pytest.raises(VerificationError):
        fuse_model(conv_bn())


@pytest.mark.parametrize("name", [p.name for p in PASSES])
def test_a_pass_can_be_left_out(name: str) -> None:
    nodes = [
        node("Conv", "x w", "c", **PAD),
        batchnorm("c", "n", "b"),
        node("Mul", "b s", "m"),
        node("Sum", "m x", "y"),
    ]
    made = model(nodes, {"w": W3, "s": rand(6, 1, 1), **N})
    _, report = fuse(made, skip=[name])
    assert name not in report.passes
    _, report = fuse(made, passes=[name])
    assert list(report.passes) == [name]


def test_an_unknown_pass_is_named() -> None:
    with pytest.raises(InputError, match=r"'bn'.*bn-folding"):
        fuse_model(conv_bn(), skip=["bn"])
    with pytest.raises(InputError, match="'some'"):
        fuse_model(conv_bn(), verify="some")


def test_the_report_counts_what_happened() -> None:
    nodes = [
        node("Conv", "x w", "c", **PAD),
        batchnorm("c", "n", "b"),
        node("Conv", "x k", "d"),
        node("Add", "b d", "y", name="join"),
    ]
    _, report = fuse(model(nodes, {"w": W3, "k": W1, **N}))
    assert (report.before.ops, report.before.conv, report.before.batchnorm) == (4, 2, 1)
    assert (report.after.ops, report.after.conv, report.after.batchnorm) == (1, 1, 0)
    assert report.passes["bn-folding"] == report.passes["branch-merging"] == 1
    (rewrite,) = report.rewrites
    assert rewrite.where == "join"
    assert set(rewrite.parameters) == {"w", "k", *N}
    assert rewrite.error is not None
    assert rewrite.error < 1e-12
    (output,) = report.end_to_end
    assert output.output == "y"
    assert output.tolerance is not None
    assert output.max_rel <= output.tolerance < 1e-3
    x = {"x": rand(1, 6, 9, 9)}
    assert run(model(nodes, {"w": W3, "k": W1, **N}), x)[0].shape == (1, 6, 9, 9)


@pytest.mark.parametrize("wrong", [{"passes": 3}, {"skip": None}, {"passes": "bn-folding"}, {"skip": [3]}])
def test_names_of_passes_that_are_none(wrong: Any) -> None:
    with pytest.raises(InputError, match="takes the names of passes"):
        fuse_model(conv_bn(), **wrong)


@pytest.mark.parametrize("seed", range(4))
def test_float16_between_inputs_and_outputs_of_float32(seed: int) -> None:
    """As tools convert models that keep their inputs and outputs: what the output rounds is not what it is made of."""
    made = in_type(conv_bn(norm("n", 6, seed)), TensorProto.FLOAT16)
    x, y = made.graph.input[0], made.graph.output[0]
    made.graph.node.insert(0, node("Cast", x.name, "half", to=TensorProto.FLOAT16))
    made.graph.node[1].input[0] = "half"
    made.graph.node[-1].output[0] = "wide"
    made.graph.node.append(node("Tanh", "wide", "last"))
    made.graph.node.append(node("Cast", "last", y.name, to=TensorProto.FLOAT))
    x.type.tensor_type.elem_type = y.type.tensor_type.elem_type = TensorProto.FLOAT
    fused, report = fuse_model(made, verify="full")
    assert operators(fused) == {"Conv": 1, "Tanh": 1, "Cast": 2}
    assert not report.failed
