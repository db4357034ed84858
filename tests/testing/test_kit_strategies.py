"""What the strategies draw is valid, of every kind, the same in both hosts, and shrinks to a few operators."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import numpy as np
import onnx
import pytest
from expression_models import assert_close, run
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from reparamc.algebra.expr import Conv
from reparamc.algebra.rewrite import Declined, Pass
from reparamc.errors import InputError
from reparamc.onnx.fuse import fuse_model
from reparamc.testing import assert_equivalent, batchnorm_states, branches, inputs_for, linear_modules, linear_onnx
from reparamc.testing.onnx_models import OPSETS, build_onnx
from reparamc.testing.strategies import branch_structures, structures
from reparamc.testing.structure import BATCHNORM_KINDS, OPERATORS, Step, Structure
from reparamc_passes import PASSES

torch = pytest.importorskip("torch")

from reparamc import fuse_fx  # noqa: E402
from reparamc.testing.fx_models import build_module  # noqa: E402

QUICK = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
)
ALL_AXES = (2, 1, 3, 0, -1)


def drawn(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    found: list[Any] = []

    @settings(QUICK, max_examples=count)
    @given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    return found


# Coverage


@pytest.fixture(scope="module")
def sample() -> list[Structure]:
    return drawn(structures(activations=True), 500)


def test_every_operator_is_drawn_often(sample: list[Structure]) -> None:
    found = Counter(step.op for structure in sample for step in structure.steps)
    assert set(found) == set(OPERATORS)
    assert min(found.values()) >= 5, found


CONVOLUTIONS: dict[str, Callable[[Step, int], bool]] = {
    "even kernel": lambda c, n: any(k % 2 == 0 for k in c["kernel"]),
    "unequal kernel": lambda c, n: len(set(c["kernel"])) > 1,
    "strided": lambda c, n: max(c["stride"]) > 1,
    "dilated": lambda c, n: any(d > 1 and k > 1 for d, k in zip(c["dilation"], c["kernel"], strict=True)),
    "asymmetric padding": lambda c, n: c["begin"] != c["end"],
    "no padding": lambda c, n: max(c["kernel"]) > 1 and not any((*c["begin"], *c["end"])),
    "grouped": lambda c, n: 1 < c["groups"] < n,
    "depthwise": lambda c, n: c["groups"] == n > 1,
    "without bias": lambda c, n: not c["bias"],
    "of shared weights": lambda c, n: "like" in c.at,
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_every_kind_of_convolution_is_drawn(sample: list[Structure], kind: str) -> None:
    found = [
        CONVOLUTIONS[kind](step, s.values[step.inputs[0]].channels)
        for s in sample
        for step in s.steps
        if step.op == "conv"
    ]
    assert sum(found) >= 5


def test_every_form_of_a_graph_is_drawn(sample: list[Structure]) -> None:
    assert {s.axes for s in sample} == set(ALL_AXES)
    assert {step["state"] for s in sample for step in s.steps if step.op == "batchnorm"} == set(BATCHNORM_KINDS)
    assert sum(s.extra is not None for s in sample) >= 8
    assert sum(len(step.inputs) > len(set(step.inputs)) for s in sample for step in s.steps) >= 4, "one value twice"
    readers = [Counter(n for step in s.steps for n in step.inputs) for s in sample]
    assert sum(max(r.values()) > 2 for r in readers) >= 20, "several readers"
    norms = [(s, step) for s in sample for step in s.steps if step.op == "batchnorm"]
    before = sum(any(o.op == "conv" and s.steps.index(n) + 1 in o.inputs for o in s.steps) for s, n in norms)
    after = sum(n.inputs[0] > 0 and s.steps[n.inputs[0] - 1].op == "conv" for s, n in norms)
    assert min(before, after) >= 8, "BatchNorm before and after a convolution"


def test_without_activations_all_is_linear() -> None:
    assert all(step.op != "activation" for s in drawn(structures(), 60) for step in s.steps)


def test_axes_and_blocks_are_limits() -> None:
    sample = drawn(structures(axes=(1,), blocks=1), 40)
    assert {s.axes for s in sample} == {1}
    assert any(len(s.steps) == 1 for s in sample)


# Validity


@settings(QUICK, max_examples=60)
@given(structures(activations=True), st.sampled_from(OPSETS), st.booleans(), st.booleans())
def test_both_builders_give_one_function(s: Structure, opset: int, symbolic: bool, constants: bool) -> None:
    model = build_onnx(s, "float32", opset, symbolic, constants)
    onnx.checker.check_model(model, full_check=True)
    module, inputs = build_module(s)
    assert not any(m.training for m in module.modules())
    with torch.no_grad():
        expected = module(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for a, b in zip(expected, run(model, {"x": inputs[0].numpy()}), strict=True):
        assert_close(a.numpy(), b, 2e-5)


@settings(QUICK, max_examples=12)
@given(structures(axes=(0, -1)))
def test_double_runs_where_the_runtime_can(s: Structure) -> None:
    module, inputs = build_module(s, "float64")
    assert_equivalent(module, build_onnx(s, "float64"), inputs, tolerance=1e-12)


@settings(QUICK, max_examples=12)
@given(linear_onnx(dtypes=("float16",)))
def test_half_runs(model: onnx.ModelProto) -> None:
    assert {o.type.tensor_type.elem_type for o in model.graph.output} == {onnx.TensorProto.FLOAT16}
    onnx.checker.check_model(model, full_check=True)
    fused, _ = fuse_model(model, verify="region")
    assert_equivalent(model, fused, examples=2)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_modules_of_other_dtypes(dtype: str) -> None:
    for module, (x,) in drawn(linear_modules(dtype=dtype), 10):
        kind = getattr(torch, dtype)
        assert {t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()} <= {kind}
        result = module(x)
        assert (result[0] if isinstance(result, tuple) else result).dtype == kind


def test_constants_and_sizes_are_drawn() -> None:
    models = drawn(linear_onnx(), 40)
    assert {bool(m.graph.input[0].type.tensor_type.shape.dim[0].dim_param) for m in models} == {True, False}
    assert {any(n.op_type == "Constant" for n in m.graph.node) for m in models} == {True, False}
    assert {m.opset_import[0].version for m in models} == set(OPSETS)
    gemms = [n for m in drawn(linear_onnx(axes=(0,)), 40) for n in m.graph.node if n.op_type == "Gemm"]
    assert {tuple(sorted(a.name for a in n.attribute)) for n in gemms} == {(), ("transB",), ("alpha", "beta", "transB")}


def test_a_structure_can_be_made_again_from_its_text() -> None:
    for s in drawn(structures(activations=True), 20):
        again = eval(repr(s), {"Structure": Structure, "Step": Step})
        assert repr(again) == repr(s)
        assert build_onnx(again).SerializeToString() == build_onnx(s).SerializeToString()


@pytest.mark.parametrize("host", ["torch", "onnx"])
def test_branches(host: str) -> None:
    for model in drawn(branches(6, out=4, stride=2, count=3, host=host), 10):
        if host == "torch":
            module, (x,) = model
            assert module(x).shape[:2] == (2, 4)
            structure = module.structure
            assert structure.steps[-1].op in ("add", "subtract")
            assert all(set(s["stride"]) <= {1, 2} for s in structure.steps if s.op in ("conv", "pool"))
            assert_equivalent(module, fuse_fx(module, (x,)), (x,))
        else:
            assert_equivalent(model, fuse_model(model)[0], examples=2)


def test_branches_refuse_another_host() -> None:
    with pytest.raises(InputError, match="'torch' or 'onnx', not 'jax'"):
        branches(host="jax")


def test_states_of_batchnorms() -> None:
    states = drawn(batchnorm_states(8), 60)
    assert all(v.shape == (8,) and v.dtype == np.float64 for s in states for v in s.values())
    norm = torch.nn.BatchNorm2d(8)
    norm.load_state_dict({k: torch.from_numpy(v) for k, v in states[0].items()}, strict=False)
    assert norm.running_var.min() > 0
    assert any((s["weight"] == 0).any() for s in states)
    assert any((s["weight"] < 0).any() for s in states)
    assert any(s["running_var"].min() < 0.01 for s in states)
    assert any(np.abs(s["running_mean"]).max() > 5 for s in states)


# The compiler


@settings(QUICK, max_examples=15)
@given(linear_modules(activations=True), st.integers(0, 3))
def test_modules_are_fused_right(example: tuple[Any, Any], seed: int) -> None:
    module, inputs = example
    assert_equivalent(module, fuse_fx(module, inputs, verify="region"), inputs, seed=seed)


@settings(QUICK, max_examples=25)
@given(linear_onnx(activations=True))
def test_models_are_fused_right(model: onnx.ModelProto) -> None:
    assert_equivalent(model, fuse_model(model, verify="region")[0], examples=2)


# Shrinking


def without_bias(faulty: str) -> tuple[Pass, ...]:
    """The passes, one of which forgets the bias of every convolution that it makes."""

    def broken(rule: Any) -> Any:
        @wraps(rule)
        def forgetful(*arguments: Any) -> Any:
            result = rule(*arguments)
            if isinstance(result, Declined) or not isinstance(result, Conv):
                return result
            return replace(result, bias=None)

        return forgetful

    def breaking(p: Pass) -> Pass:
        return replace(p, rules=tuple(map(broken, p.rules)), priced=tuple(map(broken, p.priced)))

    return tuple(breaking(p) if p.name == faulty else p for p in PASSES)


def differs(a: Any, b: Any, inputs: Any = None) -> bool:
    try:
        assert_equivalent(a, b, inputs, tolerance=1e-3, examples=1)
    except AssertionError:
        return True
    return False


FIND = settings(QUICK, max_examples=300, phases=(Phase.generate, Phase.shrink))


def test_a_planted_bug_shrinks_to_a_few_operators() -> None:
    passes = without_bias("bn-folding")

    def wrong(model: onnx.ModelProto) -> bool:
        return differs(model, fuse_model(model, pass_table=passes, verify="off")[0])

    smallest = find(linear_onnx(axes=(2,)), wrong, settings=FIND)
    linear = [n.op_type for n in smallest.graph.node if n.op_type not in ("Constant", "Identity")]
    assert len(linear) <= 4, linear


def test_a_planted_bug_shrinks_in_torch_and_its_report_can_be_pasted() -> None:
    passes = without_bias("branch-merging")

    @settings(FIND)
    @given(linear_modules(axes=(2,), blocks=2))
    def holds(example: tuple[Any, Any]) -> None:
        module, inputs = example
        fused = fuse_fx(module, inputs, pass_table=passes, verify=False)
        assert_equivalent(module, fused, inputs)

    with pytest.raises(AssertionError) as caught:
        holds()
    text = "\n".join(getattr(caught.value, "__notes__", []))
    structure = re.search(r"Structure\(.*?extra=None\)", text, re.DOTALL)
    assert structure, text
    assert text.count("Step(") <= 3, text
    module, inputs = build_module(eval(structure[0], {"Structure": Structure, "Step": Step}))
    assert differs(module, fuse_fx(module, inputs, pass_table=passes, verify=False), inputs)


def test_the_simplest_structures_are_the_smallest() -> None:
    assert len(find(structures(), lambda s: True, settings=FIND).steps) == 1
    assert len(find(branch_structures(4, 4, 1, 2, 2), lambda s: True, settings=FIND).steps) <= 3


# Inputs


def test_inputs_of_every_size_and_kind() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    sample = drawn(inputs_for(module), 80)
    shapes = {tuple(x.shape) for (x,) in sample}
    assert {s[1] for s in shapes} == {3}
    assert {s[0] for s in shapes} == {1, 2, 3}
    assert {n % 2 for s in shapes for n in s[2:]} == {0, 1}
    assert min(s[2] for s in shapes) == 3, "the smallest that the kernel takes"
    assert any(s[2] != s[3] for s in shapes)
    assert any(not x.any() for (x,) in sample)
    assert any((x != 0).sum() == 1 for (x,) in sample)
    assert any(x.abs().max() > 100 for (x,) in sample)
    assert any(x.abs().max() < 0.1 and x.any() for (x,) in sample)
    border = [
        x for (x,) in sample if x[..., 1:-1, 1:-1].numel() and not x[..., 1:-1, 1:-1].any() and (x != 0).sum() > 9
    ]
    assert border


# Packages that may be missing


@pytest.mark.parametrize(
    ("name", "missing", "extra"),
    [
        ("linear_onnx", "hypothesis", "testing"),
        ("branches", "hypothesis", "testing"),
        ("linear_modules", "torch", "torch"),
        ("reparamc.fuse_fx", "torch", "torch"),
        ("reparamc.Fuser", "torch", "torch"),
    ],
)
def test_a_missing_package_is_one_clear_line(name: str, missing: str, extra: str) -> None:
    home, _, name = name.rpartition(".") if "." in name else ("reparamc.testing", "", name)
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "{missing}":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import {home}
try:
    {home}.{name}()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{home}.{name} needs {missing}; install it with: pip install 'reparamc[{extra}]'"


def test_strategies_for_onnx_need_no_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
from hypothesis import given, settings
from reparamc.testing import assert_equivalent, branches, fuse_guard, inputs_for, linear_onnx
@settings(max_examples=3, database=None, deadline=None)
@given(linear_onnx(), branches(host="onnx"))
def test(model, branch):
    inputs_for(branch)
    assert_equivalent(branch, branch, examples=2)
    fuse_guard(model, no_batchnorm=False, examples=1)
test()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
