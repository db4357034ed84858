"""Faults in the algebra of kernels, in the rules, in regions and layouts: they show through both adapters."""

from __future__ import annotations

from typing import Any

import numpy as np
from fault_models import (
    CONV_NORM,
    CONV_NORM_PLAIN,
    NORM_POINTWISE,
    PAIR,
    REPMIXER,
    STACKED,
    STRIDED_PAIR,
    TRANSPOSED,
    TRANSPOSED_ONCE,
    TWO,
    F,
    conv,
    net,
    nn,
    node,
    numbers,
    onnx_model,
    statistics,
    torch,
)
from planting import fault

KERNEL, ABSORB = "reparamc.algebra.kernels:", "reparamc_passes.absorb:"

ALGEBRA = [
    fault(
        "epsilon left out", f"{KERNEL}coefficients", "e.var + e.eps", "e.var",
        onnx=lambda: onnx_model(
            [conv("x", "c", pads=[1] * 4), node("BatchNormalization", "c g b m v", "y", epsilon=1e-2)],
            {"w": numbers(4, 4, 3, 3), **statistics(variance=1e-2)},
        ),
        fx=lambda: net(lambda x, c, n: n(c(x)), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, eps=0.1)),
    ),
    fault(
        "mean added instead of subtracted", f"{KERNEL}coefficients",
        "e.beta - e.mean * scale", "e.beta + e.mean * scale", text=CONV_NORM,
    ),
    fault("mean not scaled", f"{KERNEL}coefficients", "e.beta - e.mean * scale", "e.beta - e.mean", text=CONV_NORM),
    fault(
        "shift lost where the convolution has no bias", f"{KERNEL}scale_outputs",
        "if conv.bias is None and not np.any(shift):", "if conv.bias is None:", text=CONV_NORM_PLAIN,
    ),
    fault(
        "bias not scaled", f"{KERNEL}scale_outputs",
        "rows * conv.bias_or_zero + shift", "conv.bias_or_zero + shift", text=CONV_NORM,
    ),
    fault(
        "outputs scaled along the input axis", f"{KERNEL}scale_outputs",
        "rows.reshape(-1, *[1] * (conv.weight.ndim - 1))", "rows.reshape(1, -1, *[1] * (conv.weight.ndim - 2))",
        text=CONV_NORM,
    ),
    fault(
        "folded in float32", f"{KERNEL}scale_outputs", "conv.weight * rows.reshape(",
        "conv.weight.astype(np.float32) * rows.astype(np.float32).reshape(", least=1e-9,
        onnx=lambda: onnx_model(
            [node("Gemm", "x w", "h", transB=1), node("Mul", "h s", "y")],
            {"w": numbers(5, 4).astype(np.float64) / 3, "s": numbers(5).astype(np.float64) / 3}, ("N", 4),
        ),
        fx=lambda: net(lambda x, c, n: n(c(x)), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    ),
    fault(
        "order of groups", f"{KERNEL}scale_inputs",
        "return per_channel.reshape(conv.groups, 1,",
        "return per_channel.reshape(per_group, conv.groups).T.reshape(conv.groups, 1,",
        text=NORM_POINTWISE.replace("bias", "g=2 bias"),
    ),
    fault("shifts averaged, not summed", f"{KERNEL}scale_inputs", ".sum(axis=1)", ".mean(axis=1)", text=NORM_POINTWISE),
    fault(
        "shift in front of zero padding", f"{ABSORB}into_consumer",
        "if np.any(shift) and conv.reads_padding:", "if False:", text=NORM_POINTWISE.replace("1x1", "3x3 p=1"),
    ),
    fault(
        "shift in front of zero padding, through a concatenation", f"{ABSORB}_columns",
        "if np.any(found[1]) and conv.reads_padding:", "if False:",
        text="""%x = source c=4 axis=-3
%0 = batchnorm %x c=4 axis=-3
%z = conv %x 4->2 k=1x1
%1 = concat %0, %z c=4,2 axis=-3
%2 = conv %1 6->4 k=3x3 p=1""",
    ),
    fault(
        "an axis that an operator on the way treats as another", f"{ABSORB}through_layouts",
        "axis = axis_in if axis == e.axis else None", "axis = axis_in",
        onnx=lambda: onnx_model(
            [
                conv("x", "c"), node("Transpose", "c", "t", perm=[0, 2, 1, 3]),
                node("AveragePool", "t", "p", kernel_shape=[2, 2]), node("BatchNormalization", "p g b m v", "y"),
            ],
            {"w": numbers(8, 4, 1, 1), **statistics(8)}, ("N", 4, 8, 8),
        ),
    ),
    fault(
        "shift in front of an operator that pads", f"{ABSORB}through_layouts",
        "not (shifted and e.reads_padding)", "True",
        onnx=lambda: onnx_model(
            [
                node("BatchNormalization", "x g b m v", "n"), node("Pad", "n p", "q"),
                node("Conv", "q w", "y"),
            ],
            {"w": numbers(4, 4, 3, 3), **statistics(), "p": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
        ),
        fx=lambda: net(
            lambda x, n, c: c(F.pad(n(x), (1, 1, 1, 1))), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        ),
    ),
    fault("inner bias lost", f"{KERNEL}compose", "if inner.bias is not None:", "if False:", text=PAIR),
    fault(
        "matrices composed in the wrong order", f"{KERNEL}compose",
        "np.matmul(rows, blocks[1][(..., *t)])", "np.matmul(blocks[1][(..., *t)], rows)", text=PAIR,
    ),
    fault(
        "outer taps not spread by the inner stride", f"{KERNEL}compose",
        "(da * a + s * db * b) // d", "(da * a + db * b) // d", text=STRIDED_PAIR,
    ),
    fault(
        "outer extent not spread by the inner stride", f"{KERNEL}composed_shape",
        "a + s * b for a, s, b in zip(inner.delta", "a + b for a, s, b in zip(inner.delta", text=STRIDED_PAIR,
    ),
    fault(
        "composed across padding", f"{KERNEL}cannot_compose", "if not outer.reads_padding:", "if True:",
        text="""%x = source c=6 axis=-3
%0 = conv %x 6->6 k=2x2 p=1:0 g=6 bias
%1 = conv %0 6->6 k=2x2 p=1:0 g=6""",
    ),
    fault(
        "inner bias in front of padding", f"{KERNEL}cannot_compose",
        "return None if inner.bias is None or not np.any(inner.bias) else BIAS_MEETS_PADDING", "return None",
        text=PAIR.replace("3x3", "3x3 p=1"),
    ),
    fault(
        "bias in front of a transposed convolution", f"{KERNEL}cannot_compose",
        "(None if inner.bias is None else VARYING)", "None",
        text="""%x = source c=4 axis=-3
%0 = conv %x 4->4 k=1x1 bias
%1 = conv %0 4->4 k=3x3 s=2 p=1 transposed bias""",
    ),
    fault(
        "shift of a skip connection lost", f"{KERNEL}pointwise", "if np.any(shift) else None", "if False else None",
        text="""%x = source c=4 axis=-3
%0 = conv %x 4->4 k=3x3 p=1
%1 = batchnorm %x c=4 axis=-3
%2 = sum %0, %1""",
    ),
    fault(
        "kernels merged at their first taps", f"{KERNEL}merge",
        "slice((a - a0) // d0, (r - a0) // d0 + 1,", "slice(0, (r - a) // d0 + 1,", text=TWO,
    ),
    fault(
        "identity in the middle of an asymmetric kernel", f"{KERNEL}merge",
        "slice((a - a0) // d0, (r - a0) // d0 + 1,",
        "slice(*(((a - a0) // d0, (r - a0) // d0 + 1) if a != r else (shape.kernel[0] // 2, shape.kernel[0] // 2 + 1)"
        "),",
        text="""%x = source c=4 axis=-3
%0 = conv %x 4->4 k=3x3 p=2:0
%1 = sum %0, %x""",
    ),
    fault(
        "dilated taps side by side", f"{KERNEL}merge",
        "(r - a0) // d0 + 1, max(1, d // d0))", "(a - a0) // d0 + (r - a) // d + 1)",
        text="""%x = source c=6 axis=-3
%0 = conv %x 6->6 k=3x3 s=1 d=2 p=2
%1 = conv %x 6->6 k=5x5 s=1 p=2
%2 = sum %0, %1""",
    ),
    fault("only the first bias merged", f"{KERNEL}merge", "sum(biased[1:], biased[0])", "biased[0]", text=TWO),
    fault(
        "groups off the diagonal", f"{KERNEL}regroup", "weight[:, r, :, r] =", "weight[:, r, :, ratio - 1 - r] =",
        text=TWO.replace("k=3x3 p=1", "k=3x3 p=1 g=2"),
    ),
    fault(
        "stride lost in merging", f"{KERNEL}merged_shape",
        "first, weight=weight,", "first, stride=(1,) * first.spatial, weight=weight,",
        text=TWO.replace("k=3x3", "k=3x3 s=2").replace("k=1x1", "k=1x1 s=2"),
    ),
    fault(
        "branches of different inputs merged", "reparamc_passes.branch_merging:parallel_convs",
        "branches.setdefault(term.x, {})", "branches.setdefault(kernels[0].x, {})",
        text="""%x = source c=4 axis=-3
%z = source c=4 axis=-3
%0 = conv %x 4->4 k=3x3 p=1
%1 = conv %z 4->4 k=3x3 p=1
%2 = sum %0, %1""",
    ),
    fault(
        "groups of transposed convolutions interleaved", f"{KERNEL}swap_sides",
        "weight.reshape(groups, first // groups, second, *kernel)",
        "weight.reshape(first // groups, groups, second, *kernel).swapaxes(0, 1)", text=TRANSPOSED,
    ),
    fault(
        "transposed kernel of stride 1 not flipped", f"{KERNEL}transposed",
        "weight[(..., *(slice(None, None, -1),) * len(stride))]", "weight", text=TRANSPOSED_ONCE,
    ),
    fault(
        "transposed kernel off by one", f"{KERNEL}transposed",
        "offset = tuple(-b for b in begin)", "offset = tuple(min(1 - b, 0) for b in begin)",
        text=TRANSPOSED.replace("p=1", "p=2"),
    ),
    fault(
        "rows stacked in the wrong order", f"{KERNEL}stack",
        "[c.weight for c in spread]", "[c.weight for c in reversed(spread)]", text=STACKED,
    ),
    fault(
        "bias of the first branch for all", f"{KERNEL}stack",
        "[c.bias_or_zero for c in convs]", "[convs[0].bias_or_zero for c in convs]", text=STACKED,
    ),
    fault(
        "branches of different inputs stacked", "reparamc_passes.channel_moving:_grid",
        "return e.x, grid(e)", "return grid(e)",
        text="""%x = source c=4 axis=-3
%z = source c=4 axis=-3
%0 = conv %x 4->3 k=3x3 p=1
%1 = conv %z 4->3 k=3x3 p=1
%2 = concat %0, %1 c=3,3 axis=-3""",
    ),
    fault(
        "bias not selected", f"{KERNEL}select_outputs", "conv.bias[rows]", "conv.bias[: len(rows)]",
        text="""%x = source c=4 axis=-3
%0 = conv %x 4->4 k=3x3 p=1 bias
%1 = select %0 1:3 of 4 axis=-3""",
    ),
    fault(
        "permutation instead of its inverse", "reparamc_passes.channel_moving:shuffled",
        "np.argsort(index)", "index",
        text="""%x = source c=4 axis=-3
%0 = select %x 2,0,3,1 of 4 axis=-3
%1 = conv %0 4->4 k=1x1""",
        fx=lambda: net(
            lambda x, a, c: c(F.channel_shuffle(a(x).relu(), 2)), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 1)
        ),
    ),
    fault(
        "the first channels of a term instead of those selected", "reparamc_passes.channel_moving:_select_terms",
        "inside.append(e.index[used] - at)", "inside.append(len(inside))",
        text="""%x = source c=4 axis=-3
%z = source c=4 axis=-3
%0 = conv %x 4->3 k=1x1
%1 = conv %z 4->5 k=1x1
%2 = concat %0, %1 c=3,5 axis=-3
%3 = select %2 5:8 of 8 axis=-3""",
    ),
    fault(
        "selection of a selection", "reparamc_passes.channel_moving:selected",
        "index=tuple(inner.index[i] for i in e.index)", "index=e.index",
        text="""%x = source c=4 axis=-3
%0 = select %x 1,3,2 of 4 axis=-3
%1 = select %0 2,0 of 3 axis=-3
%2 = conv %1 2->4 k=1x1""",
        fx=lambda: net(lambda x, a: a(x).relu()[:, 1:4][:, 1:3], nn.Conv2d(4, 4, 1)),
    ),
    fault(
        "scales of other channels behind a selection", f"{ABSORB}into_consumer",
        "v[index] if v.ndim else v", "v[: len(index)] if v.ndim else v",
        text="""%x = source c=4 axis=-3
%0 = batchnorm %x c=4 axis=-3
%1 = select %0 1:3 of 4 axis=-3
%2 = conv %1 2->4 k=1x1""",
    ),
    fault(
        "shift added to every term", f"{ABSORB}_share_out", "t = ZERO", "pass",
        text="""%x = source c=4 axis=-3
%z = source c=4 axis=-3
%0 = conv %x 4->4 k=3x3 p=1
%1 = conv %z 4->4 k=3x3 p=1
%2 = sum %0, %1
%3 = batchnorm %2 c=4 axis=-3""",
    ),
    fault(
        "slices of a scale behind a concatenation", f"{ABSORB}_share_out", "at += e.sizes[place]", "at += 0",
        text="""%x = source c=4 axis=-3
%0 = conv %x 4->2 k=3x3 p=1 g=2
%1 = conv %x 4->2 k=3x3 p=1 g=2
%2 = concat %0, %1 c=2,2 axis=-3
%3 = batchnorm %2 c=4 axis=-3""",
    ),
    fault(
        "shift of the inner scale", "reparamc_passes.scale_folding:of_scale", "s * t0 + t", "t0 + t",
        text="""%x = source c=4 axis=-3
%0 = scale %x c=4 axis=-3 shift
%1 = scale %0 c=4 axis=-3 shift""",
    ),
    fault(
        "factor of a skip connection taken for one", "reparamc_passes.identity_to_conv:_as_conv",
        "term.axis, coefficients(term)", "term.axis, (np.ones(()), np.zeros(()))",
        text="""%x = source c=4 axis=-3
%0 = conv %x 4->4 k=3x3 p=1
%1 = scale %x c=4 axis=-3
%2 = sum %0, %1""",
    ),
    fault(
        "like terms: the plain one lost", "reparamc_passes.like_terms:collected",
        "* (len(group) - len(scaled))", "* 0",
        text="""%x = source c=4 axis=-3
%0 = batchnorm %x c=4 axis=-3
%1 = sum %0, %x""",
    ),
    fault(
        "bias of a branch of zeros lost", "reparamc_passes.like_terms:dropped",
        "return Scale(rest, ONE, added, term.axis if added.ndim else None) if np.any(added) else rest", "return rest",
        text="""%x = source c=6 axis=-3
%z = source c=6 axis=-3
%0 = conv %x 6->6 k=7x7 s=1 p=3
%1 = scale=0 %0 c=6 axis=-3 shift
%2 = sum %1, %x, %z""",
    ),
    fault(
        "skip connection of the token mixer lost", "reparamc_passes.repmixer:_kernel",
        "return pointwise(x, ONE, ZERO,", "return pointwise(x, ZERO, ZERO,", text=REPMIXER,
    ),
    fault(
        "two permutations cancelled that are no inverses", "reparamc_passes.layout_cancelling:inverse_pair",
        "all(inner[axis] == i for i, axis in enumerate(outer))", "len(inner) == len(outer)",
        text="""%x = source c=4 axis=-3
%0 = conv %x 4->4 k=1x1
%1 = permute %0 axes=0,2,3,1 axis=-3->-1
%2 = permute %1 axes=0,2,3,1 axis=-1->-2""",
    ),
    fault(
        "channel axis behind a permutation", "reparamc.algebra.expr:axis_through",
        "op.axes.index(axis)", "op.axes[axis]",
        text="""%x = source c=4 axis=-3 shape=[2,4,5,4]
%0 = conv %x 4->4 k=1x1
%1 = permute %0 axes=0,2,3,1 axis=-3->-1
%2 = scale %1 c=4 axis=-2""",
    ),
    fault(
        "channel axis behind a mean", "reparamc.algebra.expr:axis_through", "sum(a < axis for a in op.axes)", "0",
        text="""%x = source c=4 axis=-3 shape=[2,4,4,5]
%0 = conv %x 4->4 k=1x1
%1 = mean %0 axes=0 of 4 axis=-3->-3
%2 = scale %1 c=4 axis=-2""",
    ),
    fault(
        "channel axis found by its extent alone", "reparamc.algebra.shape:axis_through_reshape",
        "if left == size(before[:axis]) and dim == before[axis]:", "if dim == before[axis]:",
        text="""%x = source c=4 axis=-2 shape=[2,4,6]
%0 = conv %x 4->4 k=1
%1 = reshape %0 [2,4,6]->[4,2,6] axis=-2->-2
%2 = scale %1 c=4 axis=-3""",
    ),
    fault(
        "duplicates compared by their text", "reparamc.compiler.duplicates:_equal", "return False", "continue",
        onnx=lambda: onnx_model(
            [
                conv("x", "a"), node("Relu", "a", "p"), conv("x", "b", "w2"), node("Sigmoid", "b", "q"),
                node("Mul", "p q", "y"),
            ],
            {"w": numbers(4, 4, 3, 3), "w2": numbers(4, 4, 3, 3, seed=1)},
        ),
        fx=lambda: net(lambda x, a, b: a(x).relu() * b(x).sigmoid(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)),
    ),
    fault(
        "a parameter beyond the range of float16", "reparamc.compiler.decide:rounding_obstacle",
        "if np.abs(array).max(initial=0.0) > float(info.max):", "if False:", least=0.1,
        fx=lambda: scaled_up(
            *net(lambda x, c, n: n(c((x * 1e-3).tanh())), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), dtype=torch.half)
        ),
    ),
]  # fmt: skip


def scaled_up(model: Any, inputs: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Half precision: weights of 100 times factors of 1000 are no half floats; the values themselves are."""
    with torch.no_grad():
        model.part0.weight.mul_(100)
        model.part1.weight.fill_(1000)
        model.part1.running_var.fill_(1)
    return model, inputs
