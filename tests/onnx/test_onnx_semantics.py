"""What the operators of ONNX mean, where a fold that looks right is wrong, and where one is right all the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from expression_models import operators, run
from onnx import ModelProto, helper, numpy_helper
from onnx_models import assert_close, assert_folds, assert_left, batchnorm, fuse, model, node, norm, rand, reasons

from reparamc.onnx.fuse import fuse_model

W3, W1 = rand(6, 6, 3, 3), rand(6, 6, 1, 1)
D3 = rand(6, 1, 3, 3)
PAD = {"pads": [1, 1, 1, 1]}
N = norm("n", 6)
CONV = node("Conv", "x w", "c", **PAD)


def tail(nodes: list[Any], parameters: dict[str, np.ndarray], **rest: Any) -> ModelProto:
    return model(nodes, {"w": W3, **parameters}, **rest)


# BatchNorm before


@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [1, 1, 1, 1]},
        {"pads": [0, 0, 0, 1]},
        {"auto_pad": "SAME_UPPER"},
        {"auto_pad": "SAME_LOWER"},
    ],
    ids=str,
)
def test_norm_before_padding(attributes: dict[str, Any]) -> None:
    assert_left(tail([batchnorm("x", "n", "b"), node("Conv", "b w", "y", **attributes)], N))


def test_norm_before_padded_pointwise() -> None:
    assert_left(model([batchnorm("x", "n", "b"), node("Conv", "b w", "y", **PAD)], {"w": W1, **N}))


@pytest.mark.parametrize("attributes", [{}, {"auto_pad": "VALID"}, {"strides": [2, 2]}], ids=str)
def test_norm_in_front_without_padding(attributes: dict[str, Any]) -> None:
    assert_folds(tail([batchnorm("x", "n", "b"), node("Conv", "b w", "y", **attributes)], N), Conv=1)


def test_norm_without_shift_before_padding() -> None:
    centred = N | {"n.b": np.zeros(6, np.float32), "n.m": np.zeros(6, np.float32)}
    assert_folds(tail([batchnorm("x", "n", "b"), node("Conv", "b w", "y", **PAD)], centred), Conv=1)


def test_norm_before_grouped() -> None:
    nodes = [batchnorm("x", "n", "b"), node("Conv", "b k", "y", group=2)]
    assert_folds(model(nodes, {"k": rand(4, 3, 3, 3), **N}), Conv=1)


@pytest.mark.parametrize("op", ["Tile", "Expand"])
def test_a_grey_image_before_a_stem_for_colours(op: str) -> None:
    nodes = [node(op, "x t", "e"), node("Conv", "e k", "y", **PAD)]
    fused = assert_folds(model(nodes, {"t": np.array([1, 3, 1, 1]), "k": rand(4, 3, 3, 3)}, ("N", 1, "H", "W")), Conv=1)
    assert [*fused.graph.initializer[0].dims] == [4, 1, 3, 3]


def test_norm_after_pad() -> None:
    nodes = [node("Pad", "x p", "q"), batchnorm("q", "n", "b"), node("Conv", "b w", "y")]
    assert_folds(tail(nodes, {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1]), **N}), Conv=1)


def test_pad_between_norm_and_conv() -> None:
    nodes = [batchnorm("x", "n", "b"), node("Pad", "b p", "q"), node("Conv", "q w", "y")]
    fused, _ = fuse(tail(nodes, {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1]), **N}))
    assert operators(fused)["BatchNormalization"] == 1


def test_norm_before_transposed_conv() -> None:
    assert_left(model([batchnorm("x", "n", "b"), node("ConvTranspose", "b t", "y", strides=[2, 2])], {"t": W3, **N}))


def test_norm_pool_conv() -> None:
    nodes = [batchnorm("x", "n", "b"), node("MaxPool", "b", "p", kernel_shape=[2, 2]), node("Conv", "p w", "y")]
    assert_left(tail(nodes, N))


def test_norm_after_transposed_conv_keeps_the_value() -> None:
    """Its weight is [in, out / groups, ...]; with in = out the wrong axis has the right length."""
    fuse(model([node("ConvTranspose", "x t", "c"), batchnorm("c", "n", "y")], {"t": W3, **N}))


# Linear layers

G = rand(6, 6)


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("bias", [None, (), (1,), (6,), (1, 6), (1, 1)], ids=str)
def test_gemm(trans: int, bias: tuple[int, ...] | None) -> None:
    gemm = node("Gemm", "x g" + (" b" if bias is not None else ""), "c", transB=trans, alpha=0.5, beta=2.0)
    parameters = {"g": G, **N} | ({"b": rand(*bias)} if bias is not None else {})
    assert_folds(model([gemm, batchnorm("c", "n", "y")], parameters, ("N", 6)), Gemm=1)


def test_gemm_with_a_bias_per_sample() -> None:
    nodes = [node("Gemm", "x g b", "c"), batchnorm("c", "n", "y")]
    assert_left(model(nodes, {"g": G, "b": rand(6, 1), **N}, (6, 6)))
    assert_left(model(nodes, {"g": G, "b": rand(6, 6), **N}, (6, 6)))


def test_gemm_of_a_transposed_input() -> None:
    assert_left(model([node("Gemm", "x g", "c", transA=1), batchnorm("c", "n", "y")], {"g": G, **N}, (6, 6)))


def test_norm_before_gemm() -> None:
    assert_folds(model([batchnorm("x", "n", "b"), node("Gemm", "b g", "y")], {"g": rand(6, 4), **N}, ("N", 6)), Gemm=1)


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17])
def test_linear_layers_of_old_opsets(opset: int) -> None:
    """Until opset 11 the bias of Gemm could not be left out."""
    nodes = [node("MatMul", "x g", "c"), node("Mul", "c s", "y")]
    fused, _ = fuse(model(nodes, {"g": G, "s": rand(6)}, (3, 6), opset=opset))
    assert operators(fused).total() == 1


@pytest.mark.parametrize("opset", [8, 9, 13, 14, 15, 22])
def test_norm_of_every_opset(opset: int) -> None:
    assert_folds(tail([CONV, batchnorm("c", "n", "y")], N, opset=opset), Conv=1)


@pytest.mark.parametrize("first", ["MatMul", "BatchNormalization"])
def test_norm_over_tokens(first: str) -> None:
    """[N, L, C] with L = C: lengths agree, axes do not."""
    product, n = ("x", "c"), ("c", "y")
    if first == "BatchNormalization":
        n, product = product, n
    nodes = [node("MatMul", f"{product[0]} g", product[1]), batchnorm(n[0], "n", n[1])]
    assert_left(model(nodes if first == "MatMul" else nodes[::-1], {"g": G, **N}, ("N", 6, 6)))


def test_layer_scale_of_tokens() -> None:
    nodes = [node("MatMul", "x g", "c"), node("Add", "c b", "d"), node("Mul", "d s", "y")]
    assert_folds(model(nodes, {"g": G, "b": rand(6), "s": rand(6, seed=1)}, ("N", 6, 6)), MatMul=1, Add=1)


def test_product_with_a_constant_on_the_left() -> None:
    assert_left(model([node("MatMul", "g x", "c"), node("Mul", "c s", "y")], {"g": G, "s": rand(6)}, (6, 6)))


def test_flatten_of_a_map() -> None:
    """One channel of the norm covers twelve columns of the matrix."""
    nodes = [batchnorm("x", "n", "b"), node("Flatten", "b", "f"), node("Gemm", "f g", "y")]
    assert_left(model(nodes, {"g": rand(72, 5), **N}, ("N", 6, 3, 4)))


def test_flatten_of_one_position() -> None:
    nodes = [
        node("GlobalAveragePool", "x", "p"),
        batchnorm("p", "n", "b"),
        node("Flatten", "b", "f"),
        node("Gemm", "f g", "y"),
    ]
    assert_folds(model(nodes, {"g": rand(6, 5), **N}), GlobalAveragePool=1, Flatten=1, Gemm=1)


@pytest.mark.parametrize("sizes", [("N", 5, 6), ("N", "L", 6), (2, 5, 6)], ids=str)
@pytest.mark.parametrize("axis", [2, -1, None], ids=str)
def test_tokens_merged_with_the_batch_before_a_norm(sizes: tuple[int | str, ...], axis: int | None) -> None:
    """The channels stay whole, whatever the number of rows: what is -1 or merged follows from the other sizes."""
    merge = node("Reshape", "c s", "f") if axis is None else node("Flatten", "c", "f", axis=axis)
    nodes = [node("MatMul", "x w", "c"), merge, batchnorm("f", "n", "y")]
    parameters = {"w": rand(6, 6), **N} | ({"s": np.array([-1, 6])} if axis is None else {})
    assert_folds(model(nodes, parameters, sizes), MatMul=1, Add=1, **{merge.op_type: 1})


def test_tokens_merged_otherwise_before_a_norm() -> None:
    """Rows of two tokens, and the channels merged with the tokens: a channel of the norm is none of the product."""
    for width, nodes in ((12, [node("Reshape", "c s", "f")]), (30, [node("Flatten", "c", "f")])):
        made = [node("MatMul", "x w", "c"), *nodes, batchnorm("f", "n", "y")]
        parameters = {"w": rand(6, 6), **norm("n", width)} | ({"s": np.array([-1, 12])} if width == 12 else {})
        assert_left(model(made, parameters, (2 if width == 12 else "N", 4 if width == 12 else 5, 6)))


def test_squeeze_and_unsqueeze() -> None:
    nodes = [
        node("GlobalAveragePool", "x", "p"), batchnorm("p", "n", "b"), node("Squeeze", "b a", "f"),
        node("Gemm", "f g", "c"), node("Unsqueeze", "c a", "u"), node("Mul", "u s", "y"),
    ]  # fmt: skip
    made = model(nodes, {"g": rand(6, 5), "a": np.array([2, 3]), "s": rand(1, 5, 1, 1), **N})
    assert_folds(made, GlobalAveragePool=1, Squeeze=1, Gemm=1, Unsqueeze=1)


@pytest.mark.parametrize("between", ["transpose", "reshape"])
def test_layout_that_takes_the_channels_apart(between: str) -> None:
    move = {
        "transpose": node("Transpose", "c", "d", perm=[0, 2, 1, 3]),
        "reshape": node("Reshape", "c r", "d"),
    }[between]
    channels = {"transpose": 8, "reshape": 16}[between]
    nodes = [node("Conv", "x k", "c", **PAD), move, batchnorm("d", "m", "y")]
    parameters = {"k": rand(8, 6, 3, 3), "r": np.array([2, 16, 4, 8]), **norm("m", channels)}
    made = model(nodes, parameters, (2, 6, 8, 8))
    fused, _ = fuse(made)
    assert operators(fused) == operators(made)


UNFOLD = {"CRD": [0, 1, 4, 2, 5, 3], "DCR": [0, 3, 4, 1, 5, 2]}


@pytest.mark.parametrize("shape", [("N", 6, "H", "W"), (2, 6, 5, 4)])
@pytest.mark.parametrize("mode", ["CRD", "DCR"])
@pytest.mark.parametrize("kernel", ["Conv", "ConvTranspose"])
def test_a_batchnorm_after_channels_as_positions(kernel: str, mode: str, shape: tuple[int | str, ...]) -> None:
    ops = [
        node(kernel, "x k", "c", strides=[2, 2]),
        node("DepthToSpace", "c", "d", blocksize=2, mode=mode),
        batchnorm("d", "m", "y"),
    ]
    weight = {"k": rand(12, 6, 3, 3) if kernel == "Conv" else rand(6, 12, 3, 3), **norm("m", 3)}
    assert_folds(model(ops, weight, shape), **{kernel: 1, "DepthToSpace": 1})
    apart = {"CRD": [3, 2, 2], "DCR": [2, 2, 3]}[mode]
    if isinstance(shape[2], int):
        h, w = (2, 1) if kernel == "Conv" else (11, 9)
        ops[1:2] = [node("Reshape", "c a", "r"), node("Transpose", "r", "t", perm=UNFOLD[mode]),
                    node("Reshape", "t b", "d")]  # fmt: skip
        sizes = {"a": np.array([2, *apart, h, w]), "b": np.array([2, 3, 2 * h, 2 * w])}
        made = model(ops, {**weight, **sizes}, shape)
        fused, report = fuse(made)
        assert operators(fused)["BatchNormalization"] == 0, report.kept


@pytest.mark.parametrize("opset", [9, 21])
def test_channels_as_positions_of_old_and_new_operator_sets(opset: int) -> None:
    nodes = [node("Conv", "x k", "c"), node("DepthToSpace", "c", "d", blocksize=2), batchnorm("d", "m", "y")]
    assert_folds(model(nodes, {"k": rand(12, 6, 3, 3), **norm("m", 3)}, opset=opset), Conv=1, DepthToSpace=1)
    left = model(nodes[1:2], {}, ("N", 12, "H", "W"), outputs="d", opset=opset)
    left.graph.node[0].input[0] = "x"
    assert fuse(left)[0].graph.node == left.graph.node


@pytest.mark.parametrize("after", ["BatchNormalization", "Mul"])
def test_a_scale_after_a_channel_shuffle(after: str) -> None:
    last = batchnorm("d", "n", "y") if after == "BatchNormalization" else node("Mul", "d s", "y")
    nodes = [CONV, node("Reshape", "c a", "r"), node("Transpose", "r", "t", perm=[0, 2, 1, 3, 4]),
             node("Reshape", "t b", "d"), last]  # fmt: skip
    sizes = {"a": np.array([0, 2, 3, 8, 7]), "b": np.array([0, 6, 8, 7]), "s": rand(6, 1, 1)}
    parameters = {"w": W3, **sizes, **N}
    read = {n for step in nodes for n in step.input}
    made = model(nodes, {k: a for k, a in parameters.items() if k in read}, ("N", 6, 8, 7))
    assert_folds(made, Conv=1)


def test_a_batchnorm_after_group_normalizations() -> None:
    """Their types are not inferred by onnx."""
    nodes = [node("GroupNormalization", "x s b", "f", num_groups=2), node("Conv", "f w", "c"),
             node("GroupNormalization", "c s b", "g", num_groups=3), batchnorm("g", "n", "y")]  # fmt: skip
    made = model(nodes, {"s": rand(6), "b": rand(6, seed=1), "w": W3, **N}, opset=21)
    assert_folds(made, GroupNormalization=2, Conv=1)


def test_channels_last() -> None:
    nodes = [CONV, node("Transpose", "c", "t", perm=[0, 2, 3, 1]), node("Mul", "t s", "m"), node("MatMul", "m g", "y")]
    assert_folds(tail(nodes, {"s": rand(6), "g": rand(6, 9)}), Conv=1, Transpose=1)


# Constants that broadcast


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        ((6,), (2, 6, 4, 6)),  # along the width, of which there are as many
        ((6, 1), (2, 6, 6, 4)),
        ((6, 1, 1, 1), (6, 6, 4, 4)),
        ((1, 1, 1, 1, 1), (2, 6, 4, 4)),  # raises the rank
        ((1, 1, 6, 1, 1), (2, 6, 4, 4)),
        ((1, 6, 4, 5), (2, 6, 4, 5)),
        ((6, 4, 1), (2, 6, 4, 5)),
        ((2, 1, 1, 1), (1, 6, 4, 5)),  # expands the batch
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_constant_along_another_axis(op: str, dims: tuple[int, ...], shape: tuple[int, ...]) -> None:
    assert_left(tail([CONV, node(op, "c s", "y")], {"s": rand(*dims)}, shape=shape))


def test_constant_that_expands_the_channels() -> None:
    assert_left(model([node("Conv", "x k", "c"), node("Mul", "c s", "y")], {"k": rand(1, 6, 1, 1), "s": rand(6, 1, 1)}))


def test_constant_that_expands_the_map() -> None:
    nodes = [node("GlobalAveragePool", "x", "p"), node("Conv", "p k", "c"), node("Mul", "c s", "y")]
    assert_left(model(nodes, {"k": W1, "s": rand(1, 6, 3, 3)}))


@pytest.mark.parametrize("dims", [(6, 1, 1), (1, 6, 1, 1), (1, 1, 1), (1,), ()], ids=str)
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("constant_first", [False, True])
def test_constant_along_channels(op: str, dims: tuple[int, ...], constant_first: bool) -> None:
    made = tail([CONV, node(op, "s c" if constant_first else "c s", "y")], {"s": rand(*dims) + np.float32(3)})
    if op == "Div" and constant_first:
        assert_left(made)
    else:
        assert_folds(made, Conv=1)


def test_division_by_zero_keeps_its_infinities() -> None:
    zero = np.array([1, 2, 0, 3, 4, 5], np.float32).reshape(6, 1, 1)
    assert_left(tail([CONV, node("Div", "c s", "y")], {"s": zero}))


# Skip connections


@pytest.mark.parametrize("attributes", [{}, {"strides": [2, 2], **PAD}], ids=["unpadded", "stride"])
def test_skip_that_broadcasts_by_accident(attributes: dict[str, Any]) -> None:
    """A map of one position is added to all."""
    size = 3 if not attributes else 2
    made = tail([node("Conv", "x w", "c", **attributes), node("Add", "c x", "y")], {}, shape=(2, 6, size, size))
    assert_left(made)


def test_skip_beside_stride_of_unknown_size() -> None:
    made = tail([node("Conv", "x w", "c", strides=[2, 2], **PAD), node("Add", "c x", "y")], {})
    fused, _ = fuse_model(made, verify="region")
    assert fused.SerializeToString() == made.SerializeToString()


def test_skip_of_one_channel() -> None:
    """It is added to every channel, which is a column of ones: no rule says so, but the impulse response does."""
    assert_folds(
        model([node("Conv", "x k", "c", **PAD), node("Add", "c x", "y")], {"k": rand(6, 1, 3, 3)}, ("N", 1, "H", "W")),
        Conv=1,
    )


def test_branches_of_one_and_six_channels() -> None:
    nodes = [CONV, node("Conv", "x k", "d", **PAD), node("Add", "c d", "y")]
    assert_folds(tail(nodes, {"k": rand(1, 6, 3, 3)}), Conv=1)


def test_skip_of_a_grouped_conv() -> None:
    nodes = [node("Conv", "x k", "c", group=3, **PAD), node("Add", "x c", "y")]
    assert_folds(model(nodes, {"k": rand(6, 2, 3, 3)}), Conv=1)


def test_pooled_branch_is_added_to_every_position() -> None:
    """Both operands have unknown sizes, and one of them is a single position."""
    nodes = [
        CONV,
        batchnorm("c", "n", "b"),
        node("GlobalAveragePool", "x", "p"),
        node("Conv", "p k", "d"),
        node("Add", "b d", "y"),
    ]
    fused, _ = fuse(tail(nodes, {"k": W1, **N}))
    assert operators(fused)["Conv"] == 2


def test_source_that_is_broadcast() -> None:
    nodes = [node("GlobalAveragePool", "x", "p"), node("Conv", "x k", "c"), node("Sum", "p c p", "y")]
    fuse(model(nodes, {"k": W1}))


# Grids


def test_sizes_that_agree_for_even_sizes_alone() -> None:
    nodes = [
        node("Conv", "x w", "c", strides=[2, 2], **PAD),
        node("Conv", "x k", "d", strides=[2, 2]),
        node("Add", "c d", "y"),
    ]
    made = tail(nodes, {"k": rand(6, 6, 2, 2)})
    fused, _ = fuse_model(made)
    assert operators(fused) == operators(made)
    x = {"x": rand(1, 6, 3, 3)}  # 2 + 1 positions: the sum broadcasts
    assert_close(run(made, x)[0], run(fused, x)[0], 0.0)


@pytest.mark.parametrize(
    ("sizes", "left"), [((8, 8), 1), ((4, 6), 1), ((3, 3), 2), ((8, 3), 2), ((8, "W"), 2)], ids=str
)
def test_sizes_that_agree_because_they_are_fixed(sizes: tuple[Any, ...], left: int) -> None:
    nodes = [
        node("Conv", "x w", "c", strides=[2, 2], **PAD),
        node("Conv", "x k", "d", strides=[2, 2]),
        node("Add", "c d", "y"),
    ]
    made = tail(nodes, {"k": rand(6, 6, 2, 2)}, shape=(2, 6, *sizes))
    fused, _ = fuse(made) if sizes[1] != "W" else fuse_model(made)
    assert operators(fused)["Conv"] == left + operators(made)["Conv"] - 2


def test_strides_whose_sizes_agree_by_luck() -> None:
    nodes = [node("Conv", "x w", "c", strides=[2, 2], **PAD), node("Conv", "x k", "d"), node("Add", "c d", "y")]
    assert_left(tail(nodes, {"k": rand(6, 6, 5, 5)}, shape=(2, 6, 8, 8)))


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("sizes", [(7, 7), (8, 8), (7, 8), ("H", "W")], ids=str)
def test_same_padding_with_stride(mode: str, sizes: tuple[Any, ...]) -> None:
    """The tap of the 1x1 depends on the parity of the size; where that is unknown nothing may be done."""
    same = {"auto_pad": mode, "strides": [2, 2]}
    nodes = [node("Conv", "x w", "c", **same), node("Conv", "x k", "d", **same), node("Add", "c d", "y")]
    made = tail(nodes, {"k": W1}, shape=(2, 6, *sizes))
    if "H" in sizes:
        assert_left(made)
    else:
        assert_folds(made, Conv=1)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("kernel", [(2, 2), (4, 3), (3, 3), (1, 2)], ids=str)
def test_same_padding_of_even_kernels(mode: str, kernel: tuple[int, int]) -> None:
    same = {"auto_pad": mode}
    nodes = [node("Conv", "x k", "c", **same), node("Conv", "x w", "d", **same), node("Sum", "c d x", "y")]
    assert_folds(tail(nodes, {"k": rand(6, 6, *kernel)}), Conv=1)


def test_same_padding_where_the_stride_leaves_gaps() -> None:
    """A 1x1 kernel of stride 2 needs no padding, and no negative one either."""
    nodes = [node("Conv", "x k", "c", auto_pad="SAME_UPPER", strides=[3, 3]), batchnorm("c", "n", "y")]
    assert_folds(tail(nodes, {"k": W1, **N}, shape=(2, 6, 8, 7)), Conv=1)


@pytest.mark.parametrize("pads", [[2, 0, 0, 2], [0, 0, 2, 2], [2, 2, 0, 0]], ids=str)
def test_one_sided_padding(pads: list[int]) -> None:
    nodes = [node("Conv", "x w", "c", pads=pads), node("Conv", "x k", "d"), node("Add", "c d", "y")]
    assert_folds(tail(nodes, {"k": W1}), Conv=1)


@pytest.mark.parametrize(("groups", "total"), [((2, 4), 2), ((2, 3), 1), ((1, 12), 1), ((12, 12), 12)], ids=str)
def test_groups_of_branches(groups: tuple[int, int], total: int) -> None:
    nodes = [node("Conv", f"x {k}", f"{k}c", group=g, **PAD) for k, g in zip("ab", groups, strict=True)]
    parameters = {k: rand(12, 12 // g, 3, 3) for k, g in zip("ab", groups, strict=True)}
    fused = assert_folds(model([*nodes, node("Add", "ac bc", "y")], parameters, ("N", 12, "H", "W")), Conv=1)
    assert helper.get_attribute_value(next(a for a in fused.graph.node[0].attribute if a.name == "group")) == total


def test_large_depthwise_beside_pointwise() -> None:
    nodes = [node("Conv", "x k", "c", group=64, pads=[3] * 4), node("Conv", "x w", "d"), node("Add", "c d", "y")]
    report = assert_left(model(nodes, {"k": rand(64, 1, 7, 7), "w": rand(64, 64, 1, 1)}, ("N", 64, "H", "W")))
    assert any("multiply-adds" in reason for reason in reasons(report))


def test_pointwise_with_bias_before_padding() -> None:
    assert_left(model([node("Conv", "x k b", "c"), node("Conv", "c w", "y", **PAD)], {"k": W1, "b": rand(6), "w": W3}))


# Blocks


@pytest.mark.parametrize("order", ["mixer norm", "norm mixer"])
@pytest.mark.parametrize("scale", ["none", "constant", "computed"])
def test_repmixer(order: str, scale: str) -> None:
    nodes = [
        batchnorm("x", "n", "norm"), node("Conv", "x k", "c", group=6, **PAD), batchnorm("c", "m", "mixer"),
        node("Sub", order, "d"),
    ]  # fmt: skip
    parameters = {"k": D3, "s": rand(6, 1, 1), **N, **norm("m", 6, 1)}
    if scale == "computed":
        nodes += [node("GlobalAveragePool", "x", "s1"), node("Mul", "d s1", "e"), node("Add", "x e", "y")]
        fused, _ = fuse(model(nodes, parameters))
        assert operators(fused)["Conv"] == operators(fused)["Mul"] == 1
        return
    nodes += [node("Mul", "s d", "e")] if scale == "constant" else []
    nodes += [node("Add", f"x {'e' if scale == 'constant' else 'd'}", "y")]
    fused = assert_folds(model(nodes, parameters), Conv=1)
    assert fused.graph.initializer[-2].dims[1] == 1 or any(t.dims == [6, 1, 3, 3] for t in fused.graph.initializer)


def test_layer_scale_with_a_residual_from_elsewhere() -> None:
    nodes = [CONV, node("Mul", "c s", "m"), node("Add", "m z", "y")]
    assert_folds(tail(nodes, {"s": rand(6, 1, 1)}, inputs={"z": ("N", 6, "H", "W")}), Conv=1, Add=1)


def test_concat_after_convs() -> None:
    nodes = [CONV, node("Conv", "x k", "d"), node("Concat", "c d", "e", axis=1), batchnorm("e", "m", "y")]
    fuse(tail(nodes, {"k": W1, **norm("m", 12)}))


def test_average_pool_leaves_its_border_alone() -> None:
    nodes = [CONV, node("AveragePool", "x", "p", kernel_shape=[3, 3], **PAD), node("Add", "c p", "y")]
    fused, _ = fuse(tail(nodes, {}))
    assert operators(fused)["AveragePool"] == 1


def test_a_last_window_that_hangs_over_stays() -> None:
    """With ceil_mode the divisor of the last window depends on the size, which is open."""
    nodes = [
        node("Conv", "x k", "c", strides=[2, 2]),
        node("AveragePool", "x", "p", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
        node("Add", "c p", "y"),
    ]
    assert_left(tail(nodes, {"k": W1}))


ZEROS = [0, 0, 1, 1, 0, 0, 1, 1]


def padded(amounts: list[int], *more: str, **mode: Any) -> tuple[list[Any], dict[str, np.ndarray]]:
    """A convolution of a padded map; ``more`` names the operands of Pad after the amounts."""
    pad = helper.make_node("Pad", ["x", "p", *more], ["q"], "pad", **mode)
    return [pad, node("Conv", "q w", "y")], {"p": np.array(amounts)}


@pytest.mark.parametrize(
    ("amounts", "more", "mode"),
    [
        (ZEROS, (), {"mode": "reflect"}),
        (ZEROS, (), {"mode": "edge"}),
        (ZEROS, ("one",), {}),
        ([0, 0, -1, -1, 0, 0, -1, 0], (), {}),
        ([1, 0, 1, 1, 0, 0, 1, 1], (), {}),
    ],
    ids=["reflect", "edge", "with ones", "crops", "images"],
)
def test_pads_that_are_no_zeros_around_a_map(amounts: list[int], more: tuple[str, ...], mode: dict[str, Any]) -> None:
    nodes, parameters = padded(amounts, *more, **mode)
    fused, _ = fuse(tail(nodes, {**parameters, "one": np.ones((), np.float32)}))
    assert operators(fused) == {"Pad": 1, "Conv": 1}


@pytest.mark.parametrize(
    ("amounts", "more"), [(ZEROS, ()), (ZEROS, ("zero",)), ([1, 0, 1, 2], ("", "axes"))], ids=["plain", "zero", "axes"]
)
def test_zeros_around_a_map_are_padding(amounts: list[int], more: tuple[str, ...]) -> None:
    nodes, parameters = padded(amounts, *more)
    parameters |= {"zero": np.zeros((), np.float32), "axes": np.array([2, 3])}
    assert_folds(tail(nodes, parameters, opset=18), Conv=1)


def test_channels_of_zeros_are_columns_that_go() -> None:
    nodes, parameters = padded([0, 1, 1, 1, 0, 2, 1, 1])
    assert_folds(model(nodes, {**parameters, "w": rand(6, 9, 3, 3)}), Conv=1)


# Live statistics, casts, quantisation


def test_norm_in_training() -> None:
    made = tail([CONV, batchnorm("c", "n", "y", training_mode=1)], N)
    made.graph.node[1].output.extend(["mean", "var"])
    fused, report = fuse_model(made, verify="region")
    assert fused.SerializeToString() == made.SerializeToString()
    assert any("training" in reason for reason in reasons(report))


def test_cast_between() -> None:
    nodes = [CONV, node("Cast", "c", "h", to=10), node("Cast", "h", "f", to=1), batchnorm("f", "n", "y")]
    assert_left(tail(nodes, N))


def test_quantised_weight() -> None:
    nodes = [node("DequantizeLinear", "q s z", "w", axis=0), node("Conv", "x w", "c", **PAD), batchnorm("c", "n", "y")]
    q = np.random.default_rng(0).integers(-127, 128, (6, 6, 3, 3)).astype(np.int8)
    made = model(nodes, {"q": q, "s": np.full(6, 0.02, np.float32), "z": np.zeros(6, np.int8), **N})
    fused = assert_folds(made, DequantizeLinear=1, Conv=1)
    np.testing.assert_array_equal(next(numpy_helper.to_array(t) for t in fused.graph.initializer if t.name == "q"), q)


def test_quantised_branch() -> None:
    nodes = [
        CONV, node("QuantizeLinear", "c s z", "q"), node("DequantizeLinear", "q s z", "d"), batchnorm("d", "n", "y"),
    ]  # fmt: skip
    made = tail(nodes, {"s": np.array(0.05, np.float32), "z": np.array(0, np.int8), **N})
    fused, _ = fuse_model(made)
    assert fused.SerializeToString() == made.SerializeToString()


# Patterns that runtimes fuse by themselves


def gelu(x: str, y: str, form: int) -> list[Any]:
    inner = [node("Div", f"{x} r2", f"{y}1"), node("Erf", f"{y}1", f"{y}2"), node("Add", f"{y}2 one", f"{y}3")]
    return [
        *inner,
        *(
            [node("Mul", f"{x} {y}3", f"{y}4"), node("Mul", f"{y}4 half", y)],
            [node("Mul", f"{x} half", f"{y}4"), node("Mul", f"{y}4 {y}3", y)],
            [node("Mul", f"{y}3 half", f"{y}4"), node("Mul", f"{x} {y}4", y)],
        )[form],
    ]


GELU = {
    "r2": np.array(2**0.5, np.float32),
    "one": np.array(1, np.float32),
    "half": np.array(0.5, np.float32),
}


@pytest.mark.parametrize("form", [0, 1, 2])
@pytest.mark.parametrize("normed", [False, True])
def test_gelu_between_convs(form: int, normed: bool) -> None:
    nodes = [CONV, *([batchnorm("c", "n", "b")] if normed else [])]
    nodes += [*gelu("b" if normed else "c", "a", form), node("Conv", "a k", "y")]
    made = tail(nodes, {"k": W1, **GELU, **(N if normed else {})})
    fused, _ = fuse(made)
    kept = {n.SerializeToString() for n in fused.graph.node}
    assert all(n.SerializeToString() in kept for n in made.graph.node if n.op_type in ("Mul", "Div", "Erf", "Add"))
    assert operators(fused)["BatchNormalization"] == 0


@pytest.mark.parametrize("activation", ["silu", "hardswish", "quick"])
def test_other_activations_between_convs(activation: str) -> None:
    nodes = {
        "silu": [node("Sigmoid", "c", "s"), node("Mul", "c s", "a")],
        "quick": [node("Mul", "c k1", "t"), node("Sigmoid", "t", "s"), node("Mul", "c s", "a")],
        "hardswish": [
            node("Add", "c three", "t"), node("Clip", "t zero six", "s"), node("Mul", "c s", "u"),
            node("Div", "u six", "a"),
        ],
    }[activation]  # fmt: skip
    constants = {"k1": 1.702, "three": 3.0, "zero": 0.0, "six": 6.0}
    parameters = {name: np.array(v, np.float32) for name, v in constants.items()}
    made = tail([CONV, *nodes, node("Conv", "a k", "y")], {"k": W1, **parameters})
    assert operators(fuse(made)[0]) == operators(made)


@pytest.mark.parametrize("form", ["div", "mul", "rms"])
def test_layer_norm_before_a_linear_layer(form: str) -> None:
    two, eps = np.array(2, np.float32), np.array(1e-6, np.float32)
    nodes = [] if form == "rms" else [node("ReduceMean", "x", "m", axes=[-1]), node("Sub", "x m", "d")]
    d = "x" if form == "rms" else "d"
    nodes += [
        node("Pow", f"{d} two", "p"), node("ReduceMean", "p", "v", axes=[-1]), node("Add", "v eps", "e"),
        node("Sqrt", "e", "q"),
    ]  # fmt: skip
    nodes += (
        [node("Div", f"{d} q", "n0")] if form != "mul" else [node("Reciprocal", "q", "i"), node("Mul", f"{d} i", "n0")]
    )
    nodes += [node("Mul", "n0 s", "n1")]
    nodes += [node("Add", "n1 t", "n2")] if form != "rms" else []
    nodes += [node("MatMul", f"{'n1' if form == 'rms' else 'n2'} g", "y")]
    made = model(nodes, {"two": two, "eps": eps, "s": rand(6), "t": rand(6, seed=1), "g": G}, ("N", 5, 6))
    assert_left(made)


def test_scale_inside_attention() -> None:
    """The scale of the scores stays with them."""
    nodes = [
        node("MatMul", "x g", "q"), node("Transpose", "x", "k", perm=[0, 2, 1]), node("MatMul", "q k", "s"),
        node("Mul", "s half", "h"), node("Softmax", "h", "p", axis=-1), node("MatMul", "p x", "y"),
    ]  # fmt: skip
    assert_left(model(nodes, {"g": G, "half": GELU["half"]}, ("N", 5, 6)))


# One and three axes


@pytest.mark.parametrize("axes", [1, 3])
def test_blocks_of_other_ranks(axes: int) -> None:
    kernel, ones = (3,) * axes, (1,) * axes
    nodes = [
        node("Conv", "x a", "c", pads=[1] * 2 * axes), batchnorm("c", "n", "d"), node("Conv", "x b", "e"),
        batchnorm("x", "m", "f"), node("Sum", "d e f", "y"),
    ]  # fmt: skip
    parameters = {"a": rand(6, 6, *kernel), "b": rand(6, 6, *ones), **N, **norm("m", 6, 1)}
    assert_folds(model(nodes, parameters, ("N", 6, *"DHW"[:axes])), Conv=1)


def test_unknown_channels_of_a_skip_connection() -> None:
    """How many channels there are follows from the weight."""
    made = tail([CONV, node("Add", "c x", "y")], {}, shape=("N", "C", "H", "W"))
    fused, _ = fuse_model(made, verify="region")
    assert operators(fused) in ({"Conv": 1}, {"Conv": 1, "Add": 1})
    x = {"x": rand(2, 6, 5, 6)}
    assert_close(run(made, x)[0], run(fused, x)[0], 1e-5)


def test_constants_may_be_of_any_storage() -> None:
    made = tail([CONV, batchnorm("c", "n", "y")], N)
    for tensor in made.graph.initializer:
        values = numpy_helper.to_array(tensor)
        tensor.ClearField("raw_data")
        tensor.float_data.extend(values.ravel().tolist())
    assert_folds(made, Conv=1)
