"""The operators that take the place of torchvision's compiled ones compute what these do."""

import pytest

pytest.importorskip("torch")
import fastvit_zoo.torchvision_operators as operators

pytest.importorskip("torchvision")

import numpy as np
import onnxruntime
import torch
import torchvision
from onnx import TensorProto, helper


def by_onnxruntime(maps: np.ndarray, boxes: np.ndarray, aligned: bool, ratio: int) -> np.ndarray:
    node = helper.make_node(
        "RoiAlign",
        ["maps", "boxes", "images"],
        ["cells"],
        spatial_scale=0.25,
        output_height=4,
        output_width=5,
        sampling_ratio=ratio,
        coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
    )
    inputs = [
        helper.make_tensor_value_info("maps", TensorProto.FLOAT, maps.shape),
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, (len(boxes), 4)),
        helper.make_tensor_value_info("images", TensorProto.INT64, (len(boxes),)),
    ]
    output = helper.make_tensor_value_info("cells", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "boxes", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {"maps": maps, "boxes": boxes[:, 1:], "images": boxes[:, 0].astype(np.int64)}
    return np.asarray(session.run(None, given)[0])


@pytest.mark.parametrize("ratio", [2, 0])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align(aligned: bool, ratio: int) -> None:
    """Boxes inside the image, across its border and outside."""
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 9, 7)
    low = torch.rand(6, 2) * 40 - 10
    boxes = torch.cat([torch.tensor([[0.0], [1], [1], [0], [1], [0]]), low, low + torch.rand(6, 2) * 40], 1)
    found = operators.roi_align(maps, boxes, 0.25, 4, 5, ratio, aligned)
    np.testing.assert_allclose(found, by_onnxruntime(maps.numpy(), boxes.numpy(), aligned, ratio), atol=2e-5)
    assert (found == 0).any()


def test_roi_align_has_gradients() -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 1, 4, 3, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[1.0, 0.3, 0.2, 2.1, 3.4]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: operators.roi_align(m, boxes, 1.0, 2, 2, 1, True), (maps,))


def test_nms_keeps_the_best_of_what_overlaps() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [0, 0, 10, 5], [21, 20, 30, 30]])
    scores = torch.tensor([0.5, 0.9, 0.3, 0.8, 0.4])
    assert operators.nms(boxes, scores, 0.5).tolist() == [1, 3, 4]
    assert torchvision.ops.nms(boxes, scores, 0.5).tolist() == [1, 3, 4]
    assert operators.nms(boxes, scores, 0.99).tolist() == [1, 3, 0, 4, 2]
    assert operators.nms(boxes[:0], scores[:0], 0.5).tolist() == []
