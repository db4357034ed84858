"""The smallest models on which faults show: ONNX models by hand, torch modules by hand, expressions for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

torch: Any
nn: Any
F: Any
try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:  # then only ONNX is asked
    torch = nn = F = None


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def node(op: str, inputs: str, output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op, inputs.split(), output.split(), **attributes)


def onnx_model(
    nodes: Sequence[NodeProto],
    parameters: Mapping[str, Any],
    shape: Sequence[int | str] = ("N", 4, "H", "W"),
    *,
    outputs: str = "y",
    opset: int = 17,
    overridable: Sequence[str] = (),
) -> ModelProto:
    """A model of the input ``x``; its dtype is that of the first parameter."""
    tensors = [numpy_helper.from_array(np.asarray(a, order="C"), name) for name, a in parameters.items()]
    kind = tensors[0].data_type if tensors else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors if t.name in overridable]
    results = [helper.make_empty_tensor_value_info(name) for name in outputs.split()]
    graph = helper.make_graph(list(nodes), "small", inputs, results, tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in shape_inference.infer_shapes(made).graph.output}
    for output in made.graph.output:
        output.type.tensor_type.elem_type = kind
        output.type.tensor_type.shape.SetInParent()
        for _ in range(ranks[output.name]):
            output.type.tensor_type.shape.dim.add()
    return made


def statistics(channels: int = 4, variance: float = 1.0, seed: int = 0) -> dict[str, np.ndarray]:
    """The parameters of a BatchNormalization as the operands g, b, m and v."""
    drawn = {name: numbers(channels, seed=seed + n) for n, name in enumerate("gbm")}
    return {**drawn, "v": np.float32(variance) * (np.abs(numbers(channels, seed=seed + 3)) + np.float32(0.3))}


def with_norm(node_in_front: NodeProto, parameters: Mapping[str, Any], **options: Any) -> ModelProto:
    """An operator and a BatchNormalization after it."""
    channels = options.pop("channels", 4)
    norm = node("BatchNormalization", f"{node_in_front.output[0]} g b m v", "y")
    return onnx_model([node_in_front, norm], {**parameters, **statistics(channels)}, **options)


def conv(x: str, y: str, w: str = "w", **attributes: Any) -> NodeProto:
    return node("Conv", f"{x} {w}", y, **attributes)


def net(
    run: Callable[..., Any], *parts: Any, shapes: Sequence[Sequence[int]] = ((2, 4, 7, 6),), dtype: Any = None
) -> tuple[Any, tuple[Any, ...]]:
    """A module in eval mode that runs ``run(x, *parts)``, with BatchNorms that do something, and inputs for it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for at, part in enumerate(parts):
                if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                    self.register_buffer(f"part{at}", part.double())
                else:
                    setattr(self, f"part{at}", part)

    names = ", ".join(f"x{n}" for n in range(len(shapes)))
    own = "".join(f", self.part{n}" for n in range(len(parts)))
    scope: dict[str, Any] = {"run": run}
    exec(f"def forward(self, {names}): return run({names}{own})", scope)
    Net.forward = scope["forward"]
    model = Net().double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.3, 2, generator=generator)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    dtype = dtype or torch.float64
    return model.to(dtype).eval(), tuple(x.to(dtype) for x in inputs)


def vector(*shape: int) -> Any:
    return torch.from_numpy(numbers(*shape, seed=5)).double() + 2


def norm_of(x: str = "x", y: str = "y") -> NodeProto:
    return node("BatchNormalization", f"{x} g b m v", y)


def square(seed: int = 0) -> dict[str, np.ndarray]:
    return {"w": numbers(4, 4, 3, 3, seed=seed)}


MATRIX = {"w": numbers(4, 4)}
ROWS = ("N", 4)
TOKENS = ("N", 3, 4)


# Expressions

CONV_NORM = """%x = source c=4 axis=-3
%0 = conv %x 4->4 k=3x3 p=1 bias
%1 = batchnorm %0 c=4 axis=-3"""
CONV_NORM_PLAIN = CONV_NORM.replace(" bias", "")
NORM_POINTWISE = """%x = source c=4 axis=-3
%0 = batchnorm %x c=4 axis=-3
%1 = conv %0 4->4 k=1x1 bias"""
TWO = """%x = source c=4 axis=-3
%0 = conv %x 4->4 k=3x3 p=1 bias
%1 = conv %x 4->4 k=1x1 bias
%2 = sum %0, %1"""
PAIR = """%x = source c=4 axis=-3
%0 = conv %x 4->4 k=1x1 bias
%1 = conv %0 4->4 k=3x3 bias"""
STRIDED_PAIR = """%x = source c=3 axis=-3
%0 = conv %x 3->4 k=2x2 s=2
%1 = conv %0 4->3 k=2x2 s=2 p=0 bias"""
TRANSPOSED = """%x = source c=4 axis=-3
%0 = conv %x 4->4 k=3x3 s=2 p=1 g=2 transposed bias
%1 = batchnorm %0 c=4 axis=-3"""
TRANSPOSED_ONCE = """%x = source c=4 axis=-3
%0 = conv %x 4->4 k=3x2 p=1,0 transposed bias
%1 = batchnorm %0 c=4 axis=-3"""
STACKED = """%x = source c=4 axis=-3
%0 = conv %x 4->3 k=3x3 p=1 bias
%1 = conv %x 4->3 k=3x3 p=1 bias
%2 = concat %0, %1 c=3,3 axis=-3"""
REPMIXER = """%x = source c=6 axis=-3
%norm = batchnorm %x c=6 axis=-3
%0 = conv %x 6->6 k=3x3 s=1 p=1 g=6
%1 = batchnorm %0 c=6 axis=-3
%c = batchnorm %x c=6 axis=-3
%mixer = sum %1, %c
%3 = scale=-1 %norm
%4 = sum %mixer, %3
%5 = scale %4 c=6 axis=-3
%6 = sum %x, %5"""
