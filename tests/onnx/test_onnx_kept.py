"""What a file says beside what it computes stays, and speaks of nothing that is gone."""

from __future__ import annotations

from expression_models import operators
from onnx import ModelProto, TensorProto, helper
from onnx_models import W1, assert_left, batchnorm, conv_bn, fuse, node


def annotated(made: ModelProto, tensor: str, scale: str) -> ModelProto:
    annotation = made.graph.quantization_annotation.add(tensor_name=tensor)
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=scale)
    return made


def test_everything_beside_the_nodes() -> None:
    made = conv_bn(domains=["com.microsoft"], producer_name="me", doc_string="a model", ir_version=10)
    made.metadata_props.add(key="a", value="b")
    made.graph.metadata_props.add(key="c", value="d")
    made.graph.doc_string = made.graph.input[0].doc_string = made.graph.output[0].doc_string = "a note"
    made.graph.value_info.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, ["N", 6, "H", "W"]))
    fused, _ = fuse(made)
    for part in (fused, made):
        for group in (part.graph.node, part.graph.initializer, part.graph.value_info):
            del group[:]
    assert fused == made


def test_a_new_node_says_where_it_is_from() -> None:
    made = conv_bn(ir_version=10)
    for inner, scope in zip(made.graph.node, ("net/conv", "net/norm"), strict=True):
        inner.metadata_props.add(key="namespace", value=scope)
        inner.doc_string = f"line of {scope}"
    fused, _ = fuse(made)
    (left,) = fused.graph.node
    assert [(e.key, e.value) for e in left.metadata_props] == [("namespace", "net/conv")]
    assert left.doc_string.splitlines() == ["reparamc: bn-folding", "line of net/conv"]


def test_annotations_of_what_is_left_stay_with_what_they_name() -> None:
    made = annotated(annotated(annotated(conv_bn(), "c", "n.g"), "y", "n.b"), "w", "n.v")
    fused, _ = fuse(made)
    assert [a.tensor_name for a in fused.graph.quantization_annotation] == ["y"]
    assert "n.b" in {t.name for t in fused.graph.initializer}
    assert "n.v" not in {t.name for t in fused.graph.initializer}


def test_a_weight_that_training_replaces_stays() -> None:
    made = conv_bn()
    made.training_info.add().update_binding.add(key="w", value="w_new")
    assert_left(made)


def test_what_a_training_graph_reads_stays() -> None:
    made = conv_bn()
    made.graph.node.append(node("Conv", "x v", "z"))
    made.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["a", "b", "c", "d"]))
    made.graph.initializer.append(helper.make_tensor("v", TensorProto.FLOAT, W1.shape, W1.ravel()))
    info = made.training_info.add()
    info.algorithm.node.append(node("ReduceSum", "n.g", "loss"))
    fused, _ = fuse(made)
    assert operators(fused) == {"Conv": 2}
    assert "n.g" in {t.name for t in fused.graph.initializer}


def test_a_node_on_a_device_of_its_own_stays() -> None:
    made = conv_bn(ir_version=11)
    made.graph.node[1].device_configurations.add(configuration_id="two")
    made.configuration.add(name="two", num_devices=2)
    fused, report = fuse(made)
    assert not report.changed
    assert operators(fused)["BatchNormalization"] == 1


def test_calls_of_functions_stay() -> None:
    own = helper.make_function("own", "Act", ["a"], ["b"], [node("Relu", "a", "b")], [helper.make_opsetid("", 17)])
    made = conv_bn(functions=[own], domains=["own"])
    made.graph.node.append(helper.make_node("Act", ["y"], ["z"], domain="own"))
    made.graph.node.append(batchnorm("z", "n", "end"))
    made.graph.output[0].name = "end"
    fused, _ = fuse(made)
    assert fused.functions == made.functions
    assert {o.domain for o in fused.opset_import} == {"", "own"}
