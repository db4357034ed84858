"""The fuse guard: what passes, what each failure says, and the plugin in suites of its own."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from reparamc.errors import InputError, InputTypeError
from reparamc.testing import fuse_guard
from reparamc.testing.onnx_models import build_onnx
from reparamc.testing.structure import Step, Structure

torch = pytest.importorskip("torch")
nn = torch.nn

pytest_plugins = ["pytester"]


class Block(nn.Module):
    """conv 3x3 beside conv 1x1, each with a BatchNorm; an activation in the wrong place if ``broken``."""

    def __init__(self, channels: int = 4, broken: bool = False) -> None:
        super().__init__()
        self.large = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        middle = [nn.ReLU()] if broken else []
        self.small = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), *middle, nn.BatchNorm2d(channels))

    def forward(self, x: Any) -> Any:
        return torch.relu(self.large(x) + self.small(x))


def net(*broken: bool) -> Any:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), *(Block(broken=b) for b in broken))


IMAGE = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))


def failure(*arguments: Any, **options: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        fuse_guard(*arguments, **options)
    return str(caught.value)


def test_what_fuses_passes_and_stays_as_it_is() -> None:
    model = net(False, False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for example in (IMAGE, (IMAGE,), {"input": IMAGE}, None):
        fused = fuse_guard(model, example, max_conv=3, fused=["0", "2", "3"])
    assert fused.meta["reparamc"].after.conv == 3
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_block_that_no_longer_fuses_is_named_with_the_reason() -> None:
    text = failure(net(False, True), IMAGE, fused=["2", "3"])
    assert "3 no longer fuses" in text
    assert "2 no longer fuses" not in text
    assert "BatchNorm left: in add_1, among 3.large.1, 3.small.2" in text
    assert "2 convolutions or linear layers left, 1 allowed" in text
    fuse_guard(net(False, True), IMAGE, fused="2", no_batchnorm=False)


def test_reasons_come_from_the_report() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))
    text = failure(model, IMAGE)
    assert "1 BatchNorm left, none allowed" in text
    assert "1: its shift meets the zero padding of the next convolution (bn-folding)" in text


def test_numbers_of_convolutions() -> None:
    assert "3 convolutions left, 2 allowed" in failure(net(False, False), IMAGE, max_conv=2)
    fuse_guard(net(False, False), IMAGE, fused={"": 3, "2": 1})
    assert "3 convolutions or linear layers left, 2 allowed" in failure(net(False, False), IMAGE, fused={"": 2})
    assert "2 convolutions or linear layers left, 1 allowed" in failure(
        net(False), IMAGE, fused=["2"], skip=["branch-merging"]
    )


def test_unknown_parts_and_what_cannot_run_are_errors() -> None:
    with pytest.raises(InputError, match="a part called 'stage3'"):
        fuse_guard(net(False), IMAGE, fused=["stage3"])
    with pytest.raises(InputError, match="give example_inputs"):
        fuse_guard(nn.ReLU())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_convs": 1}, "fuse_guard has no option 'max_convs'; did you mean 'max_conv'?"),
        ({"no_batchnorms": True}, "did you mean 'no_batchnorm'?"),
        ({"verify": False}, "fuse_guard has no option 'verify'; the options are max_conv, no_batchnorm, fused, "),
    ],
)
def test_a_misspelt_option_is_told(options: dict[str, Any], message: str) -> None:
    for one in (net(False), model()):
        with pytest.raises(InputTypeError) as caught:
            fuse_guard(one, IMAGE, **options)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("thing", "name"), [(42, "int"), (None, "NoneType"), (Block, "the class Block"), (net, "func")]
)
def test_what_is_no_model(thing: Any, name: str) -> None:
    with pytest.raises(InputTypeError, match=f"a torch module, an onnx.ModelProto or the path of one, not {name}"):
        fuse_guard(thing, IMAGE)


@pytest.mark.parametrize("tolerance", [-1e-9, float("nan")])
def test_a_tolerance_below_zero(tolerance: float) -> None:
    with pytest.raises(InputError, match="a tolerance cannot be"):
        fuse_guard(net(False), IMAGE, tolerance=tolerance)


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import reparamc.fx.fuse

    right = reparamc.fx.fuse.fuse_fx

    def wrong(model: Any, *arguments: Any, **options: Any) -> Any:
        fused = right(model, *arguments, **options)
        with torch.no_grad():
            next(p for p in fused.parameters() if p.ndim == 4)[0, 0, 0, 0] += 0.01
        return fused

    monkeypatch.setattr(reparamc.fx.fuse, "fuse_fx", wrong)
    assert "b differs from a" in failure(net(False), IMAGE)


def test_models_that_torch_fx_cannot_follow_are_fused_in_parts() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(3)

        def forward(self, x: Any) -> Any:
            return self.block(x) if x.shape[2] > x.shape[3] else -self.block(x)

    fused = fuse_guard(Branching(), IMAGE, max_conv=1)
    assert type(fused) is Branching


def model() -> onnx.ModelProto:
    at = {"stride": (1, 1), "dilation": (1, 1), "groups": 1, "bias": True, "out": 4}
    steps = (
        Step("conv", (0,), kernel=(3, 3), begin=(1, 1), end=(1, 1), **at),
        Step("batchnorm", (1,), state="ordinary", eps=2.0**-10),
        Step("conv", (0,), kernel=(1, 1), begin=(0, 0), end=(0, 0), **at),
        Step("add", (2, 3)),
    )
    return build_onnx(Structure(4, 2, steps), symbolic=True)


def test_onnx(tmp_path: Path) -> None:
    path = tmp_path / "block.onnx"
    onnx.save(model(), path)
    before = path.read_bytes()
    for given in (model(), path, str(path)):
        fused = fuse_guard(given, max_conv=1, fused=["Conv_v1"])
        assert [n.op_type for n in fused.graph.node] == ["Conv"]
    assert path.read_bytes() == before
    text = failure(path, skip=["bn-folding"], fused=["BatchNormalization_v2"])
    assert "block.onnx does not fuse as it should" in text
    assert "BatchNormalization_v2 no longer fuses: BatchNorm left: BatchNormalization_v2" in text


# The plugin

INSTALLED = bool(importlib.metadata.entry_points(group="pytest11", name="reparamc"))
PLUGIN = [] if INSTALLED else ["-p", "reparamc.testing.pytest_plugin"]
SUITE = """
import pytest, torch
from torch import nn

class Broken(nn.Sequential):
    pass

def model(*middle):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *middle, nn.BatchNorm2d(4))

pytestmark = pytest.mark.fuse_guard(max_conv=0)

def test_marker_of_the_module(fuse_guard):
    fuse_guard(model(), torch.ones(1, 3, 5, 5))

@pytest.mark.fuse_guard(max_conv=1)
def test_nearer_marker(fuse_guard):
    fused = fuse_guard(model(), torch.ones(1, 3, 5, 5))
    assert fused.meta["reparamc"].after.conv == 1

def test_call(fuse_guard):
    fuse_guard(model(), torch.ones(1, 3, 5, 5), max_conv=1)

def test_broken(fuse_guard):
    fuse_guard(model(nn.ReLU()), torch.ones(1, 3, 5, 5), max_conv=1)

@pytest.mark.fuse_guard(3)
def test_positional(fuse_guard):
    pass

@pytest.mark.fuse_guard(max_convs=3)
def test_misspelt(fuse_guard):
    pass

def test_misspelt_call(fuse_guard):
    fuse_guard(model(), torch.ones(1, 3, 5, 5), max_con=1)
"""


def test_fixture_and_marker(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE)
    result = pytester.runpytest_inprocess(*PLUGIN, "--strict-markers", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, failed=3, errors=2)
    result.stdout.fnmatch_lines(
        [
            "*1 convolutions left, 0 allowed*",
            "*1 BatchNorm left, none allowed*",
            "*2: there is no convolution or linear layer beside it*",
        ]
    )
    for line in (
        "fuse_guard takes options by name only",
        "the marker fuse_guard has no option 'max_convs'; did you mean 'max_conv'?",
        "fuse_guard has no option 'max_con'; did you mean 'max_conv'?",
    ):
        assert line in result.stdout.str()


def test_the_marker_is_documented(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess(*PLUGIN, "--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.fuse_guard(**options)*"])


def test_the_plugin_loads_nothing() -> None:
    code = (
        "import sys, pytest; before = set(sys.modules); import reparamc.testing.pytest_plugin; "
        "print(sorted(n for n in set(sys.modules) - before if not n.startswith('reparamc')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_layer_called_twice_and_folded_once_is_noticed() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(3)

        def forward(self, x: Any) -> Any:
            return self.block(x) + torch.sigmoid(self.block.large[0](x))

    assert "2 convolutions or linear layers left, 1 allowed" in failure(Twice(), IMAGE, fused=["block"])


def test_layers_below_a_hook_fuse() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), Block(3))
    model[2].register_forward_hook(lambda module, inputs, output: output)
    fuse_guard(model, IMAGE, fused=["0", "2"])
