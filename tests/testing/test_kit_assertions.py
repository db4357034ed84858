"""`assert_equivalent` of every pair of hosts, and each kind of difference with what its message says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from reparamc.errors import InputError, InputTypeError
from reparamc.testing import assert_equivalent, inputs_for

torch = pytest.importorskip("torch")
nn = torch.nn

WEIGHT = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
BIAS = np.random.default_rng(1).standard_normal(4).astype(np.float32)


def conv(weight: np.ndarray = WEIGHT, bias: np.ndarray = BIAS) -> Any:
    layer = nn.Conv2d(3, 4, 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    return layer.eval()


def graph(x: str = "x", weight: np.ndarray = WEIGHT, shape: tuple[Any, ...] = ("N", 3, "H", "W")) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)]
    tensors = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(BIAS, "b")]
    nodes = [helper.make_node("Conv", [x, "w", "b"], ["y"], pads=[1, 1, 1, 1])]
    made = helper.make_graph(nodes, "conv", infos, outputs, tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def function(x: Any) -> Any:
    """The same convolution, tap by tap, of arrays or tensors."""
    array = isinstance(x, np.ndarray)
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = x.shape[2:]
    y = np.zeros((x.shape[0], 4, height, width)) + BIAS[:, None, None]
    for i in range(3):
        for j in range(3):
            y += np.einsum("oc,nchw->nohw", WEIGHT[:, :, i, j], padded[:, :, i : i + height, j : j + width])
    return y.astype(np.float32) if array else torch.from_numpy(y.astype(np.float32))


@pytest.fixture
def hosts(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "conv.onnx"
    onnx.save(graph(), path)
    return {
        "module": conv(),
        "graph module": torch.fx.symbolic_trace(nn.Sequential(conv())).eval(),
        "model": graph(),
        "path": path,
        "name of a file": str(path),
        "function": function,
    }


HOSTS = ["module", "graph module", "model", "path", "name of a file", "function"]


@pytest.mark.parametrize("a", HOSTS)
@pytest.mark.parametrize("b", HOSTS)
def test_every_pair(hosts: dict[str, Any], a: str, b: str) -> None:
    x = np.random.default_rng(2).standard_normal((1, 3, 5, 6)).astype(np.float32)
    assert_equivalent(hosts[a], hosts[b], None if {a, b} != {"function"} else x, examples=3)
    assert_equivalent(hosts[a], hosts[b], torch.from_numpy(x))


@pytest.mark.parametrize("a", HOSTS)
def test_every_host_can_differ(hosts: dict[str, Any], a: str) -> None:
    wrong = WEIGHT.copy()
    wrong[1, 2, 0, 1] += 0.01
    with pytest.raises(AssertionError, match="b differs from a"):
        assert_equivalent(hosts[a], conv(wrong))
    with pytest.raises(AssertionError, match="b differs from a"):
        assert_equivalent(graph(weight=wrong), hosts[a])


# Arguments


class Two(nn.Module):
    def forward(self, left: Any, right: Any) -> Any:
        return left - 2 * right


def two(names: tuple[str, str]) -> onnx.ModelProto:
    """left - 2 right, its inputs declared in the order of ``names``."""
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 2]) for n in names]
    left, right = ("left", "right") if "left" in names else names
    nodes = [helper.make_node("Add", [right, right], ["d"]), helper.make_node("Sub", [left, "d"], ["y"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])]
    made = helper.make_graph(nodes, "two", infos, outputs)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


PAIR = (torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.ones(3, 2))


@pytest.mark.parametrize("names", [("left", "right"), ("right", "left"), ("a", "b")])
def test_arguments_go_by_name_where_they_can(names: tuple[str, str]) -> None:
    assert_equivalent(Two(), two(names), PAIR)
    assert_equivalent(Two(), two(names), {"left": PAIR[0], "right": PAIR[1]})
    assert_equivalent(two(names), Two(), dict(zip(names, PAIR, strict=True)))
    with pytest.raises(AssertionError):
        assert_equivalent(two(("a", "b")), two(("b", "a")), {"a": PAIR[0], "b": PAIR[1]})


def test_unknown_names_are_an_error() -> None:
    with pytest.raises(InputError, match="no side has inputs named 'up'"):
        assert_equivalent(Two(), two(("a", "b")), {"up": PAIR[0]})


def test_lists_and_strategies_are_many_inputs() -> None:
    seen: list[tuple[int, ...]] = []

    def counted(x: Any) -> Any:
        seen.append(tuple(x.shape))
        return function(x)

    assert_equivalent(counted, conv(), [torch.ones(1, 3, 2, 2), torch.ones(2, 3, 4, 1)], tolerance=1e-4)
    assert seen == [(1, 3, 2, 2), (2, 3, 4, 1)]
    seen.clear()
    assert_equivalent(counted, conv(), inputs_for(conv()), tolerance=1e-4, examples=10)
    assert len(set(seen)) > 3
    with pytest.raises(AssertionError, match="number 2 of 2"):
        assert_equivalent(lambda x: x, lambda x: x.abs(), [torch.ones(2), -torch.ones(2)])
    with pytest.raises(AssertionError, match="b differs from a"):
        assert_equivalent(np.negative, np.abs, st.just((np.ones(2),)))
    with pytest.raises(InputError, match="empty list"):
        assert_equivalent(conv(), conv(), [])


def test_what_cannot_be_compared_is_an_error() -> None:
    with pytest.raises(InputError, match="neither of two functions"):
        assert_equivalent(function, function)
    with pytest.raises(InputTypeError, match="not int"):
        assert_equivalent(conv(), 3)
    with pytest.raises(InputError, match=r"a, Conv2d .*does not run on float32"):
        assert_equivalent(conv(), conv(), torch.ones(1, 2, 4, 4))
    with pytest.raises(InputError, match="give example_inputs"):
        assert_equivalent(nn.ReLU(), nn.ReLU())


NO_ARRAYS = {
    "float8_e4m3fn": lambda x: x.to(torch.float8_e4m3fn),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "meta device": lambda x: x.to("meta"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*quantize")
@pytest.mark.parametrize("name", NO_ARRAYS)
def test_results_without_plain_values_are_called_what_they_are(name: str) -> None:
    """Both models ran: that is not the reason."""
    x, f = torch.ones(2, 3), NO_ARRAYS[name]
    for side, pair in (("a", (f, f)), ("b", (torch.sin, f))):
        with pytest.raises(InputError, match=f"^{side}, function .*, returns a .*{name}.* compare") as raised:
            assert_equivalent(*pair, x)
        assert "run" not in str(raised.value)


@pytest.mark.parametrize("tolerance", [-1.0, -1e-9, float("nan")])
def test_a_tolerance_below_zero_is_an_error(tolerance: float) -> None:
    with pytest.raises(InputError, match=r"a tolerance cannot be .*: give 0 or more"):
        assert_equivalent(conv(), conv(), tolerance=tolerance)
    assert_equivalent(conv(), conv(), tolerance=0)


# Differences


def message(a: Any, b: Any, *inputs: Any, **options: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        assert_equivalent(a, b, inputs, **options)
    return str(caught.value)


X = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(3))


def changed(at: tuple[int, ...], value: float) -> Any:
    def run(x: Any) -> Any:
        y = x * 1
        y[at] = value
        return y

    return run


def test_a_wrong_value() -> None:
    text = message(lambda x: x * 1, changed((1, 2, 3, 4), 7.0), X)
    assert "float32[2, 3, 7, 8]" in text
    assert "worst at   [1, 2, 3, 4]" in text
    assert f"a has {X[1, 2, 3, 4]:.9g}, b has 7" in text
    gap, size = abs(float(X[1, 2, 3, 4].double()) - 7), float(X.abs().max())
    assert f"{gap:.3g} absolute, {gap / size:.3g} of the largest value" in text
    assert "times what rounding explains" in text
    assert "1 of 336 elements: 0 at the border of axes 2, 3, 1 in the interior" in text


def test_units_in_the_last_place() -> None:
    text = message(np.copy, lambda x: x + 2.0**-20, np.full(3, 1.5, np.float32), tolerance=0.0)
    assert " 8 ULP" in text
    assert "allowed    0 of" in text
    assert "inf times the tolerance given" in text
    half = np.array([1.0, 2.0, 3.0], np.float16)
    assert " 512 ULP" in message(np.copy, lambda x: x + np.float16(0.5), half[:1])


@pytest.mark.parametrize("at", [(0, 1, 0, 3), (0, 1, 6, 3), (0, 1, 3, 7)])
def test_one_wrong_element_at_the_border(at: tuple[int, ...]) -> None:
    text = message(lambda x: x * 1, changed(at, float(X[at]) * (1 + 1e-3) + 1e-3), X)
    assert f"worst at   {list(at)}" in text
    assert "1 of 336 elements: 1 at the border of axes 2, 3, 0 in the interior" in text


def test_other_nan_and_infinities() -> None:
    nan = message(lambda x: x * 1, changed((0, 0, 1, 1), float("nan")), X)
    assert "a has 0 NaN and 0 infinities, b has 1 and 0" in nan
    assert "first at   [0, 0, 1, 1]" in nan
    assert "0 NaN and 1 infinities, b has 0 and 1" in message(
        changed((0, 0, 0, 0), float("inf")), changed((0, 0, 0, 0), float("-inf")), X
    )
    assert_equivalent(changed((0, 0, 0, 0), float("nan")), changed((0, 0, 0, 0), float("nan")), X)
    assert_equivalent(changed((0, 0, 0, 0), float("inf")), changed((0, 0, 0, 0), float("inf")), X)


def test_other_shape_dtype_and_structure() -> None:
    assert "shape      a has [2, 3, 7, 8], b has [2, 3, 56]" in message(lambda x: x, lambda x: x.flatten(2), X)
    assert "dtype      a has float32, b has float64" in message(lambda x: x, lambda x: x.double(), X)
    assert_equivalent(lambda x: x, lambda x: x.double(), X, check_dtype=False)
    assert "a returns  1: output\n  b returns  2: output[0], output[1]" in message(lambda x: x, lambda x: (x, x), X)
    assert "output['p']" in message(lambda x: {"p": x}, lambda x: {"q": x}, X)
    assert "output[1] None" in message(lambda x: (x, None), lambda x: (x, 2), X)
    assert "first at   [1]: a has 1, b has 3" in message(np.copy, lambda x: x * (1 + 2 * x), np.array([0, 1, 0]))
    assert_equivalent(lambda x: (x, None), lambda x: [x, None], X)


def test_the_second_output_is_named() -> None:
    text = message(lambda x: (x, {"logits": x}), lambda x: (x, {"logits": x * 1.01}), X)
    assert "output[1]['logits'] float32[2, 3, 7, 8]" in text


def test_the_other_side_must_run() -> None:
    text = message(lambda x: x, lambda x: x @ x, X)
    assert text.startswith("b does not run where a does")
    assert "error" in text


def test_the_tolerance_is_the_noise_of_the_first() -> None:
    def steep(x: Any) -> Any:
        return (x - 1) * 1e4

    near = 1 + torch.rand(50, generator=torch.Generator().manual_seed(0)) * 1e-4
    assert_equivalent(steep, lambda x: x * 1e4 - 1e4, near)
    with pytest.raises(AssertionError):
        assert_equivalent(lambda x: x * 1e4, lambda x: x * 1e4 * (1 + 5e-4), near)


# What stays as it is


def test_both_sides_and_the_random_state_stay() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(7)
    np.random.seed(7)
    expected = torch.rand(2), np.random.rand(2)
    torch.manual_seed(7)
    np.random.seed(7)
    assert_equivalent(model, model, X)
    assert torch.equal(torch.rand(2), expected[0])
    np.testing.assert_array_equal(np.random.rand(2), expected[1])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert "Sequential (torch, in training mode)" in message(copy.deepcopy(model).eval(), model, X)


def test_inputs_are_not_written_to() -> None:
    x = X.clone()
    assert_equivalent(lambda x: x.mul_(2), lambda x: x.add_(x), x)
    assert torch.equal(x, X)


# What inputs are derived


def test_sizes_of_a_fixed_model_are_kept() -> None:
    seen = [x["x"].shape for x in inputs_of(graph(shape=(1, 3, 5, 6)))]
    assert set(seen) == {(1, 3, 5, 6)}


def inputs_of(model: Any, example: Any = None) -> list[Any]:
    from reparamc.testing.inputs import domain_of

    return list(domain_of(model, example).some(12))


def test_named_sizes_vary_together() -> None:
    shapes = [(x["left"].shape, x["right"].shape) for x in inputs_of(two(("left", "right")))]
    assert all(a == b and a[1] == 2 for a, b in shapes)
    assert len(set(shapes)) == 3


def test_sizes_that_do_not_run_are_left_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 4 * 5, 3)).eval()
    shapes = {tuple(x.shape) for (x,) in inputs_of(model, torch.ones(2, 3, 6, 7))}
    assert {s[1:] for s in shapes} == {(3, 6, 7)}
    assert {s[0] for s in shapes} == {1, 2, 3}


def test_one_channel_is_no_size_though_it_is_broadcast() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * torch.ones(3, 1, 1)

    assert {x.shape[1] for (x,) in inputs_of(Scaled(), torch.ones(1, 3, 4, 4))} == {3}


def test_whole_numbers_stay_within_the_example() -> None:
    model = nn.Embedding(5, 2)
    values = torch.cat([x.flatten() for (x,) in inputs_of(model, torch.tensor([[1, 4], [2, 3]]))])
    assert set(values.tolist()) == {1, 2, 3, 4}


def test_a_mask_without_holes_stays_one() -> None:
    class Masked(nn.Module):
        def forward(self, x: Any, mask: Any) -> Any:
            return x.masked_fill(~mask, float("-inf")).softmax(-1)

    found = inputs_of(Masked(), (torch.ones(2, 5), torch.ones(2, 5, dtype=torch.bool)))
    assert all(mask.all() for _, mask in found)
    assert len({tuple(x.shape) for x, _ in found}) > 2


def test_windows_larger_than_the_map_are_no_inputs() -> None:
    """ONNX Runtime makes one result of them; torch, and every rewrite, makes none."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, "H"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, None])
    node = helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[3], strides=[2])
    made = helper.make_graph([node], "pool", [x], [y])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert min(v["x"].shape[2] for v in inputs_of(model)) == 3


def test_mappings_are_keyword_arguments() -> None:
    found = inputs_of(Two(), {"left": PAIR[0], "right": PAIR[1]})
    assert {tuple(x) for x in found} == {("left", "right")}
    assert_equivalent(Two(), copy.deepcopy(Two()), found)
