"""Every new parameter of a fused model names the original ones that it is made from."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from reparamc.onnx.fuse import fuse_model


def two_blocks() -> Any:
    """relu(bn(conv(x))) twice, and a layer after them that nothing folds into."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], {}, "x"
    for block in "ab":
        weights[f"{block}.weight"] = rng.standard_normal((4, 4, 3, 3))
        for name in ("gamma", "beta", "mean", "var"):
            weights[f"{block}.{name}"] = rng.uniform(0.5, 2, 4)
        norm = [f"{block}.{name}" for name in ("gamma", "beta", "mean", "var")]
        nodes += [
            helper.make_node("Conv", [value, f"{block}.weight"], [f"{block}.c"], pads=[1] * 4),
            helper.make_node("BatchNormalization", [f"{block}.c", *norm], [f"{block}.n"]),
            helper.make_node("Relu", [f"{block}.n"], [f"{block}.y"]),
        ]
        value = f"{block}.y"
    weights["last"] = rng.standard_normal((2, 4, 1, 1))
    nodes.append(helper.make_node("Conv", [value, "last"], ["y"]))
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", c, 8, 8]) for n, c in (("x", 4), ("y", 2)))
    held = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in weights.items()]
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], held), opset_imports=[helper.make_opsetid("", 17)])


def test_onnx() -> None:
    fused, report = fuse_model(two_blocks())
    new = {t.name for t in fused.graph.initializer} - {"last"}
    assert len(new) == 4
    assert set(report.provenance) == new
    assert sorted(report.provenance.values()) == sorted(
        2 * [tuple(f"{block}.{name}" for name in ("weight", "gamma", "beta", "mean", "var")) for block in "ab"]
    )
    assert sorted(name for r in report.rewrites for name in r.tensors) == sorted(new)
    for r in report.rewrites:
        assert all(report.provenance[name] == r.parameters for name in r.tensors)


@pytest.mark.parametrize("whole", [True, False], ids=["one graph", "in parts"])
def test_torch(whole: bool) -> None:
    torch: Any = pytest.importorskip("torch")
    fuse_fx = import_module("reparamc.fx.fuse").fuse_fx
    nn = torch.nn

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
            self.b = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x: Any) -> Any:
            y = self.a(x)
            if not whole and y.sum() > 1e9:
                y = y + 1
            return self.b(y)

    torch.manual_seed(0)
    model = Outer().eval()
    fused = fuse_fx(model, (torch.randn(1, 4, 9, 9),))
    report = fused.meta["reparamc"] if hasattr(fused, "meta") else fused.reparamc
    held = {name for name, t in (*fused.named_parameters(), *fused.named_buffers()) if t.is_floating_point()}
    assert set(report.provenance) == held
    original = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for name, of in report.provenance.items():
        block = name.split(".")[0].split("_")[0]
        assert of
        assert set(of) <= original
        assert all(p.startswith(f"{block}.") for p in of), (name, of)
    assert sorted(n for r in report.rewrites for n in r.tensors) == sorted(held)
