"""Faults in the algebra of kernels, in the rules, in regions and layouts: they show through both adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from fault_makers import ones
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
    vector,
)
from planting import NO_SHRINK, Make, fault, given, instead, result

from reparamc.algebra.expr import ONE, ZERO, BatchNorm, Concat, Conv, Layout, Mean, Permute, Scale, Select, Sum
from reparamc.algebra.kernels import coefficients

KERNEL, ABSORB, EXPR = "reparamc.algebra.kernels:", "reparamc_passes.absorb:", "reparamc.algebra.expr:"
MOVING = "reparamc_passes.channel_moving:"
PADS_NOTHING = (f"{EXPR}Conv.reads_padding", instead(lambda conv: False))


def without_bias(conv: Conv) -> Conv:
    return replace(conv, bias=None)


def flipped(weight: Any) -> Any:
    """The taps in the opposite order."""
    return weight[(..., *(slice(None, None, -1),) * (weight.ndim - 2))]


def of_other_groups(original: Any) -> Any:
    """Channels numbered within a group first, instead of group by group."""

    def scale_inputs(conv: Conv, x: Any, *maps: Any) -> Conv:
        return original(conv, x, *(v.reshape(conv.groups, -1).T.ravel() if v.ndim else v for v in maps))

    return scale_inputs


def axis_of_anything(original: Any) -> Any:
    def through_layouts(e: Any, axis: int | None, *, shifted: bool) -> Any:
        chain, x, found = original(e, axis, shifted=shifted)
        return chain, x, getattr(x, "axis", None) if found is None and axis is not None else found

    return through_layouts


def centred(convs: Sequence[Conv]) -> tuple[Sequence[Conv]]:
    """Kernels of one tap moved to the middle of the largest kernel."""
    big = max(convs, key=lambda c: c.weight[0, 0].size)
    middle = tuple(a + d * (k // 2) for a, d, k in zip(big.offset, big.dilation, big.kernel, strict=True))
    return ([replace(c, offset=middle) if c.weight[0, 0].size == 1 else c for c in convs],)


def of_one_input(e: Any, objective: Any) -> tuple[Any, Any]:
    """A sum whose convolutions all read what the first reads."""
    if not isinstance(e, Sum):
        return e, objective
    x = next((t.x for t in e.terms if isinstance(t, Conv)), None)
    return Sum(tuple(replace(t, x=x) if isinstance(t, Conv) else t for t in e.terms)), objective


def interleaved(original: Any) -> Any:
    def swap_sides(weight: Any, groups: int) -> Any:
        w = original(weight, groups)
        return w.reshape(groups, -1, *w.shape[1:]).swapaxes(0, 1).reshape(w.shape)

    return swap_sides


def shifted_taps(x: Any, weight: Any, bias: Any, stride: Any, dilation: Any, begin: Any, end: Any, groups: int) -> Any:
    """One more result dropped at the beginning, one fewer at the end."""
    begin, end = tuple(b + 1 for b in begin), tuple(e - 1 for e in end)
    return x, weight, bias, stride, dilation, begin, end, groups


def by_index(original: Any) -> Any:
    """A selection of a selection: the outer index is asked of the innermost value."""
    return lambda e: replace(e.x, index=e.index) if isinstance(e, Select) and isinstance(e.x, Select) else original(e)


def of_first_channels(original: Any) -> Any:
    """A scale after which channels are selected: those of the first channels are taken."""

    def into_consumer(conv: Conv, kind: Any) -> Any:
        if not isinstance(conv.x, Select):
            return original(conv, kind)
        first = replace(conv.x, index=tuple(range(len(conv.x.index))))
        found = original(replace(conv, x=first), kind)
        moved = isinstance(found, Conv) and isinstance(found.x, Select)
        return replace(found, x=replace(found.x, index=conv.x.index)) if moved else found

    return into_consumer


def inverse_of(e: Any) -> tuple[Any]:
    """A convolution of permuted channels as one of the inverse permutation."""
    if isinstance(e, Conv) and isinstance(e.x, Select):
        e = replace(e, x=replace(e.x, index=tuple(np.argsort(e.x.index).tolist())))
    return (e,)


def backwards(e: Concat) -> Concat:
    return replace(e, terms=e.terms[::-1], sizes=e.sizes[::-1])


def shared_out(of: type, change: Callable[..., tuple[Any, Any]]) -> Make:
    """Terms of a sum or concatenation are given another scale and shift."""
    return given(
        lambda e, scale, shift, *more: (e, *(change(e, scale, shift) if isinstance(e, of) else (scale, shift)), *more)
    )


def unscaled_shift(original: Any) -> Any:
    def of_scale(e: Any) -> Any:
        found = original(e)
        if not isinstance(found, Scale):
            return found
        (_, t), (_, t0) = coefficients(e), coefficients(e.x)
        return replace(found, shift=t + t0)

    return of_scale


def without_skip(original: Any) -> Any:
    """The token mixer's own kernel lacks the identity."""

    def kernel(e: Any, x: Any, *more: Any) -> Any:
        found = original(e, x, *more)
        return replace(found, weight=found.weight * 0) if e is x else found

    return kernel


def constant_second(original: Any) -> Any:
    return lambda op, c, constant_first, factor=1.0: original(op, c, False, factor)


SCALED = {"w": numbers(4, 4, 3, 3), "s": numbers(4, 1, 1)}

ALGEBRA = [
    fault(
        "epsilon left out", f"{KERNEL}coefficients",
        given(lambda e: (replace(e, eps=0.0) if isinstance(e, BatchNorm) else e,)),
        onnx=lambda: onnx_model(
            [conv("x", "c", pads=[1] * 4), node("BatchNormalization", "c g b m v", "y", epsilon=1e-2)],
            {"w": numbers(4, 4, 3, 3), **statistics(variance=1e-2)},
        ),
        fx=lambda: net(lambda x, c, n: n(c(x)), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, eps=0.1)),
    ),
    fault(
        "mean added instead of subtracted", f"{KERNEL}coefficients",
        given(lambda e: (replace(e, mean=-e.mean) if isinstance(e, BatchNorm) else e,)), text=CONV_NORM,
    ),
    fault(
        "shift lost if the convolution has no bias", f"{KERNEL}scale_outputs",
        given(lambda conv, scale, shift: (conv, scale, ZERO if conv.bias is None else shift)), text=CONV_NORM_PLAIN,
    ),
    fault(
        "bias not scaled", f"{KERNEL}scale_outputs",
        lambda original: lambda c, s, t: replace(original(c, s, t), bias=c.bias_or_zero + t), text=CONV_NORM,
    ),
    fault(
        "outputs scaled along the input axis", f"{KERNEL}scale_outputs",
        lambda original: lambda c, s, t: replace(
            original(c, s, t), weight=c.weight * s.reshape(1, -1, *ones(c))
        ),
        text=CONV_NORM,
    ),
    fault(
        "folded in float32", f"{KERNEL}scale_outputs",
        result(lambda c: replace(c, weight=c.weight.astype(np.float32).astype(np.float64))), least=1e-9,
        onnx=lambda: onnx_model(
            [node("Gemm", "x w", "h", transB=1), node("Mul", "h s", "y")],
            {"w": numbers(5, 4).astype(np.float64) / 3, "s": numbers(5).astype(np.float64) / 3}, ("N", 4),
        ),
        fx=lambda: net(lambda x, c, n: n(c(x)), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    ),
    fault(
        "order of groups", f"{KERNEL}scale_inputs", of_other_groups, text=NORM_POINTWISE.replace("bias", "g=2 bias"),
    ),
    fault(
        "shifts averaged, not summed", f"{KERNEL}scale_inputs",
        given(lambda conv, x, scale, shift: (conv, x, scale, shift / conv.in_channels)), text=NORM_POINTWISE,
    ),
    fault("shift before zero padding", *PADS_NOTHING, text=NORM_POINTWISE.replace("1x1", "3x3 p=1")),
    fault(
        "shift before zero padding, through a concatenation", *PADS_NOTHING,
        text="""%x = source c=4 axis=-3
%0 = batchnorm %x c=4 axis=-3
%z = conv %x 4->2 k=1x1
%1 = concat %0, %z c=4,2 axis=-3
%2 = conv %1 6->4 k=3x3 p=1""",
    ),
    fault(
        "shift before an operator that pads", *PADS_NOTHING,
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
    fault(
        "composed across padding", *PADS_NOTHING,
        text="""%x = source c=6 axis=-3
%0 = conv %x 6->6 k=2x2 p=1:0 g=6 bias
%1 = conv %0 6->6 k=2x2 p=1:0 g=6""",
    ),
    fault(
        "an axis that an operator on the way treats as another", f"{ABSORB}through_layouts", axis_of_anything,
        onnx=lambda: onnx_model(
            [
                conv("x", "c"), node("Transpose", "c", "t", perm=[0, 2, 1, 3]),
                node("AveragePool", "t", "p", kernel_shape=[2, 2]), node("BatchNormalization", "p g b m v", "y"),
            ],
            {"w": numbers(8, 4, 1, 1), **statistics(8)}, ("N", 4, 8, 8),
        ),
    ),
    fault(
        "inner bias lost", f"{KERNEL}compose", given(lambda outer, inner: (outer, without_bias(inner))), text=PAIR,
    ),
    fault(
        "matrix transposed in a composition", f"{KERNEL}compose",
        given(lambda outer, inner: (replace(outer, weight=outer.weight.swapaxes(0, 1)), inner)), text=PAIR,
    ),
    fault(
        "outer size not spread by the inner stride", f"{KERNEL}composed_shape",
        lambda original: lambda outer, inner: replace(
            original(outer, inner), delta=tuple(a + b for a, b in zip(inner.delta, outer.delta, strict=True))
        ),
        text=STRIDED_PAIR,
    ),
    fault(
        "inner bias before padding", f"{KERNEL}cannot_compose",
        given(lambda outer, inner: (outer, without_bias(inner))), text=PAIR.replace("3x3", "3x3 p=1"),
    ),
    fault(
        "bias before a transposed convolution", f"{KERNEL}cannot_compose",
        given(lambda outer, inner: (outer, without_bias(inner))),
        text="""%x = source c=4 axis=-3
%0 = conv %x 4->4 k=1x1 bias
%1 = conv %0 4->4 k=3x3 s=2 p=1 transposed bias""",
    ),
    fault(
        "shift of a skip connection lost", f"{KERNEL}pointwise",
        given(lambda x, scale, shift, *more: (x, scale, ZERO, *more)),
        text="""%x = source c=4 axis=-3
%0 = conv %x 4->4 k=3x3 p=1
%1 = batchnorm %x c=4 axis=-3
%2 = sum %0, %1""",
    ),
    fault(
        "factor of a skip connection taken for one", f"{KERNEL}pointwise",
        given(lambda x, scale, *more: (x, ONE, *more)),
        text="""%x = source c=4 axis=-3
%0 = conv %x 4->4 k=3x3 p=1
%1 = scale %x c=4 axis=-3
%2 = sum %0, %1""",
    ),
    fault(
        "kernels merged at their first taps", f"{KERNEL}merge",
        given(lambda convs: ([replace(c, offset=convs[0].offset) for c in convs],)), text=TWO,
    ),
    fault(
        "identity in the middle of an asymmetric kernel", f"{KERNEL}merge", given(centred),
        text="""%x = source c=4 axis=-3
%0 = conv %x 4->4 k=3x3 p=2:0
%1 = sum %0, %x""",
    ),
    fault(
        "dilated taps side by side", f"{KERNEL}merge",
        given(lambda convs: ([replace(c, dilation=ones(c)) for c in convs],)),
        text="""%x = source c=6 axis=-3
%0 = conv %x 6->6 k=3x3 s=1 d=2 p=2
%1 = conv %x 6->6 k=5x5 s=1 p=2
%2 = sum %0, %1""",
    ),
    fault(
        "only the first bias merged", f"{KERNEL}merge",
        given(lambda convs: ([convs[0], *map(without_bias, convs[1:])],)), text=TWO,
    ),
    fault(
        "groups off the diagonal", f"{KERNEL}regroup",
        lambda original: lambda c, groups: (
            original(c, groups) if c.groups == groups else np.flip(original(c, groups), 1)
        ),
        text=TWO.replace("k=3x3 p=1", "k=3x3 p=1 g=2"),
    ),
    fault(
        "stride lost in merging", f"{KERNEL}merged_shape", result(lambda c: replace(c, stride=ones(c))),
        text=TWO.replace("k=3x3", "k=3x3 s=2").replace("k=1x1", "k=1x1 s=2"),
    ),
    fault(
        "branches of different inputs merged", "reparamc_passes.branch_merging:parallel_convs", given(of_one_input),
        text="""%x = source c=4 axis=-3
%z = source c=4 axis=-3
%0 = conv %x 4->4 k=3x3 p=1
%1 = conv %z 4->4 k=3x3 p=1
%2 = sum %0, %1""",
    ),
    fault("groups of transposed convolutions interleaved", f"{KERNEL}swap_sides", interleaved, text=TRANSPOSED),
    fault(
        "transposed kernel of stride 1 not flipped", f"{KERNEL}transposed",
        given(lambda x, weight, *more: (x, flipped(weight), *more)), text=TRANSPOSED_ONCE,
    ),
    fault(
        "transposed kernel off by one", f"{KERNEL}transposed", given(shifted_taps),
        text=TRANSPOSED.replace("p=1", "p=2"),
    ),
    fault("rows stacked in the wrong order", f"{KERNEL}stack", given(lambda convs: (convs[::-1],)), text=STACKED),
    fault(
        "bias of the first branch for all", f"{KERNEL}stack",
        given(lambda convs: ([replace(c, bias=convs[0].bias) for c in convs],)), text=STACKED,
    ),
    fault(
        "branches of different inputs stacked", f"{MOVING}_grid", result(lambda key: key and key[1:]),
        text="""%x = source c=4 axis=-3
%z = source c=4 axis=-3
%0 = conv %x 4->3 k=3x3 p=1
%1 = conv %z 4->3 k=3x3 p=1
%2 = concat %0, %1 c=3,3 axis=-3""",
    ),
    fault(
        "bias not selected", f"{KERNEL}select_outputs",
        lambda original: lambda c, index: replace(
            original(c, index), bias=None if c.bias is None else c.bias[: len(index)]
        ),
        NO_SHRINK,
        text="""%x = source c=4 axis=-3
%0 = conv %x 4->4 k=3x3 p=1 bias
%1 = select %0 1:3 of 4 axis=-3""",
    ),
    fault(
        "permutation instead of its inverse", f"{MOVING}gathered", given(inverse_of),
        text="""%x = source c=4 axis=-3
%0 = select %x 2,0,3,1 of 4 axis=-3
%1 = conv %0 4->4 k=1x1""",
        fx=lambda: net(
            lambda x, a, c: c(F.channel_shuffle(a(x).relu(), 2)), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 1)
        ),
    ),
    fault(
        "the first channels of a term instead of those selected", f"{MOVING}_select_terms",
        result(lambda e: replace(e, index=tuple(range(len(e.index)))) if isinstance(e, Select) else e),
        NO_SHRINK,
        text="""%x = source c=4 axis=-3
%z = source c=4 axis=-3
%0 = conv %x 4->3 k=1x1
%1 = conv %z 4->5 k=1x1
%2 = concat %0, %1 c=3,5 axis=-3
%3 = select %2 5:8 of 8 axis=-3""",
    ),
    fault(
        "columns of a repeated channel not added up", f"{KERNEL}gather_inputs",
        instead(lambda c, x, index: replace(c, x=x, weight=c.weight[:, [*map(index.index, range(max(index) + 1))]])),
        text="""%x = source c=3 axis=-3
%0 = select %x 2,0,2,1 of 3 axis=-3
%1 = conv %0 4->3 k=3x3 p=1""",
        fx=lambda: net(lambda x, a, c: c(a(x).relu().repeat(1, 2, 1, 1)), nn.Conv2d(4, 3, 1), nn.Conv2d(6, 3, 3)),
    ),
    fault(
        "terms of a concatenation in the opposite order", f"{MOVING}gathered",
        given(lambda e: (replace(e, x=backwards(e.x)) if isinstance(getattr(e, "x", None), Concat) else e,)),
        text="""%x = source c=3 axis=-3
%z = source c=3 axis=-3
%0 = concat %x, %x, %z c=3,3,3 axis=-3
%1 = conv %0 9->3 k=3x3 p=1""",
        fx=lambda: net(
            lambda x, a, b, c: c(torch.cat([y := a(x).relu(), y, b(x).relu()], 1)),
            nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(9, 3, 3),
        ),
    ),
    fault(
        "selection of a selection", f"{MOVING}selected", by_index, NO_SHRINK,
        text="""%x = source c=4 axis=-3
%0 = select %x 1,3,2 of 4 axis=-3
%1 = select %0 2,0 of 3 axis=-3
%2 = conv %1 2->4 k=1x1""",
        fx=lambda: net(lambda x, a: a(x).relu()[:, 1:4][:, 1:3], nn.Conv2d(4, 4, 1)),
    ),
    fault(
        "scales of other channels before a selection", f"{ABSORB}into_consumer", of_first_channels,
        text="""%x = source c=4 axis=-3
%0 = batchnorm %x c=4 axis=-3
%1 = select %0 1:3 of 4 axis=-3
%2 = conv %1 2->4 k=1x1""",
    ),
    fault(
        "shift added to every term", f"{ABSORB}_share_out",
        shared_out(Sum, lambda e, scale, shift: (scale, shift * len(e.terms))),
        text="""%x = source c=4 axis=-3
%z = source c=4 axis=-3
%0 = conv %x 4->4 k=3x3 p=1
%1 = conv %z 4->4 k=3x3 p=1
%2 = sum %0, %1
%3 = batchnorm %2 c=4 axis=-3""",
    ),
    fault(
        "slices of a scale after a concatenation", f"{ABSORB}_share_out",
        shared_out(
            Concat, lambda e, scale, shift: tuple(np.roll(v, e.sizes[0]) if v.ndim else v for v in (scale, shift))
        ),
        text="""%x = source c=4 axis=-3
%0 = conv %x 4->2 k=3x3 p=1 g=2
%1 = conv %x 4->2 k=3x3 p=1 g=2
%2 = concat %0, %1 c=2,2 axis=-3
%3 = batchnorm %2 c=4 axis=-3""",
    ),
    fault(
        "shift of the inner scale", "reparamc_passes.scale_folding:of_scale", unscaled_shift,
        text="""%x = source c=4 axis=-3
%0 = scale %x c=4 axis=-3 shift
%1 = scale %0 c=4 axis=-3 shift""",
    ),
    fault(
        "like terms: the plain one lost", "reparamc_passes.like_terms:collected",
        result(lambda e: replace(e, scale=e.scale - 1) if isinstance(e, Scale) else e),
        text="""%x = source c=4 axis=-3
%0 = batchnorm %x c=4 axis=-3
%1 = sum %0, %x""",
    ),
    fault(
        "bias of a branch of zeros lost", "reparamc_passes.like_terms:dropped",
        result(lambda e: e.x if isinstance(e, Scale) else e),
        text="""%x = source c=6 axis=-3
%z = source c=6 axis=-3
%0 = conv %x 6->6 k=7x7 s=1 p=3
%1 = scale=0 %0 c=6 axis=-3 shift
%2 = sum %1, %x, %z""",
    ),
    fault("skip connection of the token mixer lost", "reparamc_passes.repmixer:_kernel", without_skip, text=REPMIXER),
    fault(
        "two permutations cancelled that are no inverses", "reparamc_passes.layout_cancelling:inverse_pair",
        lambda original: lambda e: (
            e.x.x if all(isinstance(p, Layout) and isinstance(p.op, Permute) for p in (e, getattr(e, "x", None)))
            else original(e)
        ),
        text="""%x = source c=4 axis=-3
%0 = conv %x 4->4 k=1x1
%1 = permute %0 axes=0,2,3,1 axis=-3->-1
%2 = permute %1 axes=0,2,3,1 axis=-1->-2""",
    ),
    fault(
        "channel axis after a permutation", f"{EXPR}axis_through",
        lambda original: lambda op, axis: op.axes[axis] if isinstance(op, Permute) else original(op, axis),
        text="""%x = source c=4 axis=-3 shape=[2,4,5,4]
%0 = conv %x 4->4 k=1x1
%1 = permute %0 axes=0,2,3,1 axis=-3->-1
%2 = scale %1 c=4 axis=-2""",
    ),
    fault(
        "channel axis after a mean", f"{EXPR}axis_through",
        given(lambda op, axis: (replace(op, keep=True) if isinstance(op, Mean) else op, axis)),
        text="""%x = source c=4 axis=-3 shape=[2,4,4,5]
%0 = conv %x 4->4 k=1x1
%1 = mean %0 axes=0 of 4 axis=-3->-3
%2 = scale %1 c=4 axis=-2""",
    ),
    fault(
        "channel axis found by its size alone", "reparamc.algebra.shape:axis_through_reshape",
        instead(lambda before, after, axis: after.index(before[axis]) if before[axis] in after else None),
        text="""%x = source c=4 axis=-2 shape=[2,4,6]
%0 = conv %x 4->4 k=1
%1 = reshape %0 [2,4,6]->[4,2,6] axis=-2->?
%2 = scale %1 c=4 axis=-3""",
    ),
    fault(
        "c - x read as x - c", f"{KERNEL}arithmetic", constant_second,
        onnx=lambda: onnx_model([conv("x", "c"), node("Sub", "s c", "y")], SCALED),
        fx=lambda: net(lambda x, c, v: v - c(x), nn.Conv2d(4, 4, 3), vector(4, 1, 1)),
    ),
    fault(
        "x / c read as x * c", f"{KERNEL}arithmetic",
        given(lambda op, *more: ("mul" if op == "div" else op, *more)),
        onnx=lambda: onnx_model([conv("x", "c"), node("Div", "c s", "y")], SCALED),
        fx=lambda: net(lambda x, c, v: c(x) / v, nn.Conv2d(4, 4, 3), vector(4, 1, 1)),
    ),
    fault(
        "a constant along W taken for one per channel", "reparamc.compiler.readings:axis_of_constant",
        instead(lambda dims, size: -3 if any(d != 1 for d in dims) else None),
        onnx=lambda: onnx_model(
            [conv("x", "c", pads=[1] * 4), node("Mul", "c s", "y")],
            {"w": numbers(4, 4, 3, 3), "s": numbers(4)}, ("N", 4, 5, 4),
        ),
        fx=lambda: net(lambda x, c, v: c(x) * v, nn.Conv2d(4, 4, 3, padding=1), vector(4), shapes=[(2, 4, 5, 4)]),
    ),
    fault(
        "duplicates compared by their text", "reparamc.compiler.duplicates:_equal", instead(lambda a, b: True),
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
        "a parameter beyond the range of float16", "reparamc.compiler.consider:rounding_obstacle",
        instead(lambda *_: None), least=0.1,
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
