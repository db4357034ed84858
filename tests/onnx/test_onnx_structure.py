"""Who reads what: graph outputs, bodies, shared and overridable parameters, names, and what must survive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from expression_models import operators, run
from onnx import ModelProto, TensorProto, helper, numpy_helper
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

PARAMETERS = {"w": W3, **N}


def test_plain() -> None:
    fused = assert_folds(conv_bn(), Conv=1)
    assert len(fused.graph.initializer) == 2


@pytest.mark.parametrize("shape", [("N", 6, "H", "W"), (2, 6, 7, 9), ("N", "C", "H", "W"), (None, None, None, None)])
def test_known_and_unknown_sizes(shape: tuple[Any, ...]) -> None:
    made = conv_bn(shape=shape)
    fused, _ = fuse(made) if "C" not in shape and None not in shape else fuse_with_channels(made)
    assert operators(fused) == {"Conv": 1}


def fuse_with_channels(made: ModelProto) -> tuple[ModelProto, Any]:
    """The number of channels follows from the weight alone, so no random input can be made for the check."""
    from reparamc.onnx.fuse import fuse_model

    fused, report = fuse_model(made, verify="region")
    x = {"x": rand(2, 6, 7, 9)}
    np.testing.assert_allclose(run(made, x)[0], run(fused, x)[0], atol=1e-4)
    return fused, report


def test_conv_is_an_output_too() -> None:
    assert_left(model([CONV, BN], PARAMETERS, outputs="y c"))


def test_conv_has_a_second_reader() -> None:
    assert_left(model([CONV, BN, node("Relu", "c", "z")], PARAMETERS, outputs="y z"))


def body(nodes: list[Any], output: str, initializers: Any = ()) -> Any:
    info = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    return helper.make_graph(nodes, "body", [], [info], list(initializers))


def branches(then: Any, otherwise: Any, y: str = "y") -> Any:
    return node("If", "flag", y, then_branch=then, else_branch=otherwise)


FLAG = [node("ReduceMax", "x", "top", keepdims=0), node("Cast", "top", "flag", to=TensorProto.BOOL)]


def test_conv_is_read_in_a_body() -> None:
    choice = branches(body([node("Relu", "c", "t")], "t"), body([node("Neg", "c", "e")], "e"), "z")
    assert_left(model([*FLAG, CONV, BN, choice], PARAMETERS, outputs="y z"))


def test_conv_is_read_two_bodies_deep() -> None:
    inner = branches(body([node("Relu", "c", "t2")], "t2"), body([node("Neg", "x", "e2")], "e2"), "t")
    choice = branches(body([inner], "t"), body([node("Identity", "x", "e")], "e"), "z")
    assert_left(model([*FLAG, CONV, BN, choice], PARAMETERS, outputs="y z"))


def test_weight_is_read_in_a_body() -> None:
    choice = branches(body([node("ReduceSum", "w", "t")], "t"), body([node("ReduceMax", "w", "e")], "e"), "z")
    fused, _ = fuse(model([*FLAG, CONV, BN, choice], PARAMETERS, outputs="y z"))
    assert operators(fused) == {"Conv": 1, "If": 1, "ReduceMax": 1, "Cast": 1}
    assert "w" in {t.name for t in fused.graph.initializer}


def test_one_weight_for_two_convs() -> None:
    nodes = [
        CONV, batchnorm("c", "n", "a"), node("Relu", "a", "r"),
        node("Conv", "r w", "d", **PAD), batchnorm("d", "m", "y"),
    ]  # fmt: skip
    assert_folds(model(nodes, PARAMETERS | norm("m", 6, 1)), Conv=2, Relu=1)


def test_one_norm_for_two_convs() -> None:
    nodes = [
        CONV, batchnorm("c", "n", "a"), node("Relu", "a", "r"),
        node("Conv", "r u b", "d", **PAD), batchnorm("d", "n", "y"),
    ]  # fmt: skip
    fused = assert_folds(model(nodes, PARAMETERS | {"u": rand(6, 6, 3, 3, seed=1), "b": rand(6)}), Conv=2, Relu=1)
    assert len(fused.graph.initializer) == 4


def test_weight_is_read_by_another_operator() -> None:
    fused, _ = fuse(
        model(
            [CONV, BN, node("Mul", "x s", "z"), node("ReduceSum", "w", "s2")],
            PARAMETERS | {"s": rand(1, 6, 1, 1)},
            outputs="y z s2",
        ),
        skip=["constant-folding"],
    )
    assert operators(fused) == {"Conv": 1, "Mul": 1, "ReduceSum": 1}


def overridable(made: ModelProto, *names: str) -> ModelProto:
    for tensor in made.graph.initializer:
        if tensor.name in names:
            made.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return made


@pytest.mark.parametrize("name", ["w", "n.g", "n.v"])
def test_overridable_initializer(name: str) -> None:
    report = assert_left(overridable(conv_bn(), name))
    assert any("override" in reason for reason in reasons(report))


SIZES = {"s": np.array([1, 3, 16, 1]), "q": np.array([1, 3, 4, 4]), "w": rand(3, 6, 1, 1), "v": rand(2, 3, 1, 1)}


@pytest.mark.parametrize("verify", ["off", "full"])
def test_sizes_that_a_caller_may_override(verify: str) -> None:
    """Shape inference takes the default of an input for its value."""
    nodes = [node("Conv", "x w", "c"), node("Reshape", "c s", "r"), node("Sigmoid", "r", "g"), node("Shape", "g", "y")]
    back = [node("Reshape", "g q", "b"), node("Conv", "b v", "z")]
    for more, outputs in (([], "y g"), (back, "y z")):
        made = overridable(model([*nodes, *more], SIZES, (1, 6, 4, 4), outputs=outputs), "s")
        fused, _ = fuse(made, verify=verify)
        x = rand(1, 6, 4, 4)
        for feeds in ({"x": x}, {"x": x, "s": np.array([1, 3, 4, 4])}, {"x": x, "s": np.array([3, 1, 16, 1])}):
            for before, after in zip(run(made, feeds), run(fused, feeds), strict=True):
                np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


def test_ir_version_3_lists_every_initializer() -> None:
    made = overridable(conv_bn(opset=8, ir_version=3), *PARAMETERS)
    fused = assert_folds(made, Conv=1)
    tensors = {t.name for t in fused.graph.initializer}
    assert {v.name for v in fused.graph.input} == tensors | {"x"}
    assert not tensors & set(PARAMETERS)


def test_weight_that_is_an_input() -> None:
    parameters = {k: v for k, v in PARAMETERS.items() if k != "w"}
    assert_left(model([CONV, BN], parameters, inputs={"w": (6, 6, 3, 3)}))


def test_weight_in_a_constant_node_after_identities() -> None:
    nodes = [
        node("Constant", "", "k", value=numpy_helper.from_array(W3)), node("Identity", "k", "i"),
        node("Identity", "i", "w"), CONV, BN,
    ]  # fmt: skip
    fused, _ = fuse(model(nodes, norm("n", 6)))
    assert operators(fused) == {"Conv": 1}
    assert [n.op_type for n in fused.graph.node] == ["Conv"]


def test_weight_written_as_operators() -> None:
    nodes = [node("Transpose", "t", "u", perm=[1, 0]), node("Unsqueeze", "u axes", "w"), node("Conv", "x w", "c"), BN]
    parameters = {"t": rand(6, 6), "axes": np.array([2, 3]), **norm("n", 6)}
    assert_folds(model(nodes, parameters), Conv=1)


def test_absent_bias_as_empty_name() -> None:
    assert_folds(model([node("Conv", "x w -", "c", **PAD), BN], PARAMETERS), Conv=1)


def test_attributes_at_their_defaults() -> None:
    nodes = [node("Conv", "x w", "c"), batchnorm("c", "n", "y")]
    small = norm("n", 6) | {"n.v": np.full(6, 1e-6, np.float32)}  # epsilon is 1e-5, not 0
    assert_folds(model(nodes, {"w": W3} | small), Conv=1)


def test_other_epsilon() -> None:
    assert_folds(model([CONV, batchnorm("c", "n", "y", epsilon=0.1)], PARAMETERS), Conv=1)


def test_conv_added_to_itself() -> None:
    fused, _ = fuse(model([CONV, node("Add", "c c", "y")], {"w": W3}))
    assert operators(fused)["Conv"] == 1


@pytest.mark.parametrize("op", ["Add", "Sub"])
def test_input_with_itself(op: str) -> None:
    fuse(model([node(op, "x x", "t"), node("Conv", "t w", "y", **PAD)], {"w": W3}))


def test_two_norms_of_one_conv() -> None:
    nodes = [CONV, batchnorm("c", "n", "a"), batchnorm("c", "m", "b"), node("Add", "a b", "y")]
    fused, _ = fuse(model(nodes, PARAMETERS | norm("m", 6, 1)))
    assert operators(fused)["Conv"] == 1


def test_branch_with_a_further_reader() -> None:
    nodes = [
        CONV, node("Conv", "x p", "d"), node("Add", "c d", "s"), node("Sigmoid", "d", "g"), node("Mul", "s g", "y"),
    ]  # fmt: skip
    assert_left(model(nodes, {"w": W3, "p": W1}))


def test_branches_of_different_inputs() -> None:
    nodes = [CONV, node("Conv", "z p", "d"), node("Add", "c d", "y")]
    assert_left(model(nodes, {"w": W3, "p": W1}, inputs={"z": ("N", 6, "H", "W")}))


def test_sum_of_three() -> None:
    nodes = [CONV, node("Conv", "x p", "d"), node("Sum", "c x d", "y")]
    assert_folds(model(nodes, {"w": W3, "p": W1}), Conv=1)


def test_sum_of_one() -> None:
    assert_folds(model([CONV, node("Sum", "c", "s"), batchnorm("s", "n", "y")], PARAMETERS), Conv=1)


@pytest.mark.parametrize("left", [True, False])
def test_many_branches(left: bool) -> None:
    nodes, parameters = [node("Conv", "x w0", "c0", **PAD)], {"w0": W3}
    for n in range(1, 150):
        nodes += [
            node("Conv", f"x w{n}", f"d{n}"),
            node("Add", f"c{n - 1} d{n}" if left else f"d{n} c{n - 1}", f"c{n}"),
        ]
        parameters[f"w{n}"] = rand(6, 6, 1, 1, seed=n)
    assert_folds(model(nodes, parameters, outputs="c149"), 1e-4, Conv=1)


def test_long_chain() -> None:
    nodes, parameters = [], norm("n", 6) | {"w": W1 / 3}
    for n in range(200):
        nodes += [
            node("Conv", f"{f'r{n}' if n else 'x'} w", f"c{n}"),
            batchnorm(f"c{n}", "n", f"b{n}"),
            node("Tanh", f"b{n}", f"r{n + 1}"),
        ]
    assert_folds(model(nodes, parameters, outputs="r200"), 1e-3, Conv=200, Tanh=200)


def test_long_chain_of_linear_operators() -> None:
    nodes = [node("Add", f"{f'c{n}' if n else 'x'} b", f"c{n + 1}") for n in range(1500)]
    fused, _ = fuse(model(nodes, {"b": rand(1, 6, 1, 1)}, outputs="c1500"), 1e-3)
    assert operators(fused) == {"Add": 1}


def test_dropout_is_an_identity() -> None:
    assert_folds(model([CONV, node("Dropout", "c", "d"), batchnorm("d", "n", "y")], PARAMETERS), Conv=1)


def test_dropout_whose_mask_is_read() -> None:
    made = model(
        [CONV, node("Dropout", "c", "d mask"), batchnorm("d", "n", "y"), node("Cast", "mask", "z", to=1)],
        PARAMETERS,
        outputs="y z",
    )
    report = assert_left(made)
    assert any("mask" in reason for reason in reasons(report))


def test_dropout_in_training() -> None:
    nodes = [CONV, node("Dropout", "c r on", "d"), batchnorm("d", "n", "y")]
    made = model(nodes, PARAMETERS | {"r": np.array(0.5, np.float32), "on": np.array(True)})
    from reparamc.onnx.fuse import fuse_model

    fused, report = fuse_model(made, verify="region")
    assert operators(fused) == operators(made)
    assert any("training" in reason for reason in reasons(report))


def test_operators_of_other_domains() -> None:
    """What is merely named like an operator of ONNX is none."""
    own = helper.make_function(
        "own",
        "BatchNormalization",
        ["a", "g", "b", "m", "v"],
        ["o"],
        [node("Relu", "a", "o")],
        [helper.make_opsetid("", 17)],
    )
    foreign = helper.make_node("BatchNormalization", ["c", "n.g", "n.b", "n.m", "n.v"], ["y"], domain="own")
    made = model([CONV, foreign], PARAMETERS, functions=[own], domains=["own"])
    assert_left(made)


def test_local_functions_survive() -> None:
    inner = [node("Conv", "a k", "t"), node("BatchNormalization", "t g b m v", "o")]
    own = helper.make_function(
        "own", "Block", ["a", "k", "g", "b", "m", "v"], ["o"], inner, [helper.make_opsetid("", 17)]
    )
    call = helper.make_node("Block", ["r", "p", "n.g", "n.b", "n.m", "n.v"], ["y"], domain="own")
    made = model(
        [CONV, batchnorm("c", "n", "a"), node("Relu", "a", "r"), call],
        PARAMETERS | {"p": W1},
        functions=[own],
        domains=["own"],
    )
    fused, _ = fuse(made)
    assert operators(fused) == {"Conv": 1, "Relu": 1, "Block": 1}
    assert fused.functions == made.functions
    assert fused.opset_import == made.opset_import


def test_runtime_operator_between() -> None:
    conv = helper.make_node("FusedConv", ["x", "w"], ["c"], domain="com.microsoft", activation="Relu", **PAD)
    made = model([conv, BN], PARAMETERS, domains=["com.microsoft"])
    from reparamc.onnx.fuse import fuse_model

    fused, _ = fuse_model(made)
    assert fused.SerializeToString() == made.SerializeToString()


def test_domain_alias() -> None:
    made = conv_bn()
    for n in made.graph.node:
        n.domain = "ai.onnx"
    fused, _ = fuse(made)
    assert operators(fused) in ({"Conv": 1}, {"Conv": 1, "BatchNormalization": 1})


def test_nodes_without_names() -> None:
    nodes = [
        node("Conv", "x w", "c", **PAD),
        batchnorm("c", "n", "a"),
        node("Relu", "a", "r"),
        node("Conv", "r w", "y"),
    ]
    assert_folds(model(nodes, PARAMETERS), Conv=2, Relu=1)


def test_nodes_of_one_name() -> None:
    """The checker lets duplicates pass, the runtime does not; so the result is only checked by region."""
    made = conv_bn()
    for n in made.graph.node:
        n.name = "same"
    from reparamc.onnx.fuse import fuse_model

    fused, _ = fuse_model(made, verify="region")
    assert operators(fused) == {"Conv": 1}
    assert_equal_outputs(conv_bn(), fused)


@pytest.mark.parametrize("name", ["a b", "it's", 'q"q', "/stem/conv", "ä→", "0", "%0", "x#1"])
def test_names_of_any_kind(name: str) -> None:
    conv = helper.make_node("Conv", ["x", f"{name}.w"], [name], f"n {name}", **PAD)
    tail = helper.make_node("BatchNormalization", [name, "n.g", "n.b", "n.m", "n.v"], [f"{name}y"], f"m {name}")
    parameters = {f"{name}.w": W3, **norm("n", 6)}
    nodes = [conv, tail, helper.make_node("Relu", [f"{name}y"], ["y"])]
    assert_folds(model(nodes, parameters), Conv=1, Relu=1)


def test_generated_names_that_are_taken() -> None:
    relu = node("Relu", "y.weight", "z", name="y/fused_Conv")
    made = model(
        [CONV, BN, node("Neg", "x", "y.weight", name="y.bias"), relu], PARAMETERS | {"y.bias": rand(6)}, outputs="y z"
    )
    fused, _ = fuse(made)
    assert operators(fused)["Conv"] == 1
    names = [t.name for t in fused.graph.initializer] + [o for n in fused.graph.node for o in n.output]
    assert len(set(names)) == len(names)
    nodes = [n.name for n in fused.graph.node]
    assert len(set(nodes)) == len(nodes)


def test_names_taken_in_a_body() -> None:
    inner = body([node("Relu", "x", "y.weight")], "y.weight")
    choice = branches(inner, body([node("Neg", "x", "y.bias")], "y.bias"), "z")
    fused, _ = fuse(model([*FLAG, CONV, BN, choice], PARAMETERS, outputs="y z"))
    assert {t.name for t in fused.graph.initializer}.isdisjoint({"y.weight", "y.bias"})


def documented(made: ModelProto) -> ModelProto:
    made.doc_string, made.domain, made.model_version = "about", "org.example", 7
    made.producer_name, made.producer_version = "hand", "1"
    made.graph.doc_string = "graph"
    for at, thing in enumerate([made, made.graph, *made.graph.node]):
        thing.metadata_props.add(key="key", value=str(at))
    for thing in (*made.graph.node, *made.graph.input, *made.graph.output):
        thing.doc_string = f"about {thing.name}"
    return made


def test_what_is_said_about_the_model_survives() -> None:
    nodes = [CONV, BN, node("Relu", "y", "r", name="relu"), node("Softmax", "r", "z", name="soft", axis=1)]
    made = documented(model(nodes, PARAMETERS, outputs="y z"))
    fused, _ = fuse(made)
    untouched = {n.name: n.SerializeToString() for n in made.graph.node if n.name in ("relu", "soft")}
    assert untouched == {n.name: n.SerializeToString() for n in fused.graph.node if n.name in untouched}
    assert fused.graph.input == made.graph.input
    assert fused.graph.output == made.graph.output
    for field in ("doc_string", "domain", "model_version", "producer_name", "producer_version", "ir_version"):
        assert getattr(fused, field) == getattr(made, field)
    assert (fused.graph.doc_string, fused.graph.name) == (made.graph.doc_string, made.graph.name)
    assert fused.metadata_props == made.metadata_props
    assert fused.graph.metadata_props == made.graph.metadata_props
    assert fused.opset_import == made.opset_import


def test_declared_sizes_of_outputs_survive() -> None:
    made = conv_bn(shape=(1, 6, 8, 8))
    made.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 6, "rows", 8]))
    from reparamc.onnx.fuse import fuse_model

    assert fuse_model(made)[0].graph.output == made.graph.output


def test_output_that_is_an_input() -> None:
    fused, _ = fuse(model([CONV, BN, node("Identity", "x", "z")], PARAMETERS, outputs="y z"))
    assert operators(fused) == {"Conv": 1}
    assert {o for n in fused.graph.node for o in n.output} == {"y", "z"}


def test_value_info_of_what_is_gone_goes_too() -> None:
    made = conv_bn()
    made.graph.value_info.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, ["N", 6, "H", "W"]))
    fused, _ = fuse(made)
    assert "c" not in {v.name for v in fused.graph.value_info}


def test_wrong_value_info_decides_nothing() -> None:
    made = conv_bn()
    made.graph.value_info.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, ["N", "C", "L"]))
    from reparamc.onnx.fuse import fuse_model

    assert operators(fuse_model(made, verify="region")[0]) == {"Conv": 1}


def test_dead_branches_and_nothing_to_do() -> None:
    assert_left(model([node("Relu", "x", "y"), node("Neg", "x", "dead")], {}))


def test_dead_reader_of_a_conv() -> None:
    """A value nothing reads still reads the convolution; whatever is done, the outputs agree."""
    fuse(model([CONV, BN, node("Relu", "c", "dead")], PARAMETERS))


def test_unused_initializers_stay() -> None:
    fused, _ = fuse(model([CONV, BN], PARAMETERS | {"spare": rand(3)}))
    assert "spare" in {t.name for t in fused.graph.initializer}


def test_fusing_again_changes_nothing() -> None:
    nodes = [CONV, batchnorm("c", "n", "a"), node("Conv", "x p", "d"), node("Sum", "a d x", "y")]
    fused, _ = fuse(model(nodes, PARAMETERS | {"p": W1}))
    again, report = fuse(fused)
    assert again.SerializeToString() == fused.SerializeToString()
    assert not report.changed


def test_a_pooling_that_takes_rows_for_channels() -> None:
    """As many rows as channels: the norm acts on the rows, which the convolution cannot scale."""
    nodes = [node("Conv", "x w", "c", pads=[1, 1, 1, 1]), node("Transpose", "c", "t", perm=[0, 2, 1, 3])]
    nodes += [node("AveragePool", "t", "p", kernel_shape=[2, 2], strides=[1, 1]), batchnorm("p", "n", "y")]
    made = model(nodes, {"w": rand(8, 6, 3, 3), **norm("n", 8)}, shape=("N", 6, 8, 8))
    assert "it acts on another axis than the convolution" in reasons(assert_left(made))
