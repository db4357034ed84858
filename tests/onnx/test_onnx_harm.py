"""What ONNX Runtime fuses on its own is still there for it to fuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from itertools import combinations
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto
from onnx_models import batchnorm, fuse, model, node, norm, operators

from reparamc.onnx import operators as onnx_readers
from reparamc.onnx.fuse import fuse_model
from reparamc.onnx.runtime_fusions import fused_by_runtime, harmful, protected, reason

RNG = np.random.default_rng(0)
HIDES_GELU = "it would hide a Gelu that ONNX Runtime fuses"


def weight(*shape: int) -> np.ndarray:
    return (0.3 * RNG.standard_normal(shape)).astype(np.float32)


def gelu(x: str, y: str) -> list[NodeProto]:
    return [
        node("Div", f"{x} root", f"{y}.d"),
        node("Erf", f"{y}.d", f"{y}.e"),
        node("Add", f"{y}.e one", f"{y}.p"),
        node("Mul", f"{x} {y}.p", f"{y}.m"),
        node("Mul", f"{y}.m half", y),
    ]


NUMBERS = {name: np.array(v, np.float32) for name, v in {"root": np.sqrt(2), "one": 1.0, "half": 0.5}.items()}


def gelu_model(blocks: int = 2) -> ModelProto:
    """Per block: conv, norm (innocent); GELU, conv (its 0.5 could go into the conv), ReLU; conv, norm (innocent)."""
    nodes, parameters, x = [], dict(NUMBERS), "x"
    for i in range(blocks):
        for j, kernel in enumerate((3, 1, 3)):
            parameters[f"w{i}{j}"] = weight(5, 5, kernel, kernel)
        parameters |= norm(f"n{i}", 5, 2 * i) | norm(f"m{i}", 5, 2 * i + 1)
        nodes += [
            node("Conv", f"{x} w{i}0", f"c{i}", pads=[1, 1, 1, 1]),
            batchnorm(f"c{i}", f"n{i}", f"b{i}"),
            *gelu(f"b{i}", f"g{i}"),
            node("Conv", f"g{i} w{i}1", f"p{i}"),
            node("Relu", f"p{i}", f"r{i}"),
            node("Conv", f"r{i} w{i}2", f"q{i}", pads=[1, 1, 1, 1]),
            batchnorm(f"q{i}", f"m{i}", f"s{i}"),
            node("Relu", f"s{i}", x := f"y{i}" if i < blocks - 1 else "y"),
        ]
    return model(nodes, parameters, ("N", 5, "H", "W"))


@pytest.fixture
def unprotected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_readers, "_protected", lambda *_, **__: None)


def test_what_the_runtime_fuses() -> None:
    assert fused_by_runtime(gelu_model(3)) == dict.fromkeys(["g0", "g1", "g2"], "Gelu")
    plain = model([node("Relu", "x", "y")], {})
    assert fused_by_runtime(plain) == {}
    written = model([node("LayerNormalization", "x s", "y", axis=-1)], {"s": weight(7)}, ("N", 6, 7))
    assert protected(written) == {"y": "LayerNormalization"}
    assert fused_by_runtime(written) == {}, "the file itself says so"
    foreign = model([node("Strange", "x", "y", domain="elsewhere")], {}, domains=["elsewhere"])
    assert fused_by_runtime(foreign) is None


def test_the_readers_alone_keep_them() -> None:
    fused, report = fuse(gelu_model())
    assert fused_by_runtime(fused) == {"g0": "Gelu", "g1": "Gelu"}
    assert not any(kept.reason == HIDES_GELU for kept in report.kept)
    assert report.passes["bn-folding"] == 4


@pytest.mark.usefixtures("unprotected")
def test_a_rewrite_that_hides_a_gelu_is_undone() -> None:
    original = gelu_model()
    harm, _ = fuse(original, verify="region")
    assert fused_by_runtime(harm) == {}, "nothing is broken, so that nothing is tested"
    fused, report = fuse(original, verify="full")
    assert fused_by_runtime(fused) == {"g0": "Gelu", "g1": "Gelu"}
    guilty = [kept for kept in report.kept if kept.reason == HIDES_GELU]
    assert [(kept.where, kept.name) for kept in guilty] == [("p0", "scale-folding"), ("p1", "scale-folding")]
    assert [r.where for r in report.rewrites] == ["b0", "s0", "b1", "s1"]
    assert (report.passes["bn-folding"], report.passes["scale-folding"]) == (4, 0)
    assert operators(fused)["BatchNormalization"] == 0
    assert (report.after.ops, report.after.conv) == (20, 6)
    assert report.end_to_end


def test_a_gelu_that_nothing_reads_any_more_is_no_loss() -> None:
    """It is in a branch that ends in a convolution of zeros."""
    parameters = {**NUMBERS, "w": weight(5, 5, 1, 1), "z": np.zeros((5, 5, 1, 1), np.float32)}
    nodes = [node("Relu", "x", "r"), node("Conv", "r w", "c"), *gelu("c", "g"), node("Conv", "g z", "d")]
    nodes += [*gelu("r", "h"), node("Conv", "h w", "e"), node("Add", "d e", "y")]
    original = model(nodes, parameters, ("N", 5, 9, 7))
    assert fused_by_runtime(original) == {"g": "Gelu", "h": "Gelu"}
    fused, report = fuse(original)
    assert fused_by_runtime(fused) == {"h": "Gelu"}
    assert operators(fused)["Conv"] == 1
    assert report.certificate is not None
    assert not report.certificate.undecided


@pytest.mark.usefixtures("unprotected")
def test_where_all_is_undone_the_model_is_as_it_was() -> None:
    parameters = {**NUMBERS, "w": weight(5, 5, 1, 1)}
    original = model([*gelu("x", "g"), node("Conv", "g w", "y")], parameters, ("N", 5, "H", "W"))
    fused, report = fuse(original)
    assert fused.SerializeToString() == original.SerializeToString()
    assert not report.changed
    assert [kept.reason for kept in report.kept if kept.name != "region"] == [HIDES_GELU]


@pytest.mark.usefixtures("unprotected")
def test_a_layer_norm_is_protected_too() -> None:
    """Its scale and shift could go into the linear layer after it."""
    parameters = {"two": np.array(2, np.float32), "eps": np.array(1e-5, np.float32)}
    parameters |= {"s": 1 + weight(7), "t": weight(7), "w": weight(7, 7)}
    nodes = [
        node("ReduceMean", "x", "mean", axes=[-1]),
        node("Sub", "x mean", "d"),
        node("Pow", "d two", "d2"),
        node("ReduceMean", "d2", "var", axes=[-1]),
        node("Add", "var eps", "ve"),
        node("Sqrt", "ve", "std"),
        node("Div", "d std", "n"),
        node("Mul", "n s", "ns"),
        node("Add", "ns t", "nst"),
        node("MatMul", "nst w", "y"),
    ]
    original = model(nodes, parameters, ("N", 6, 7))
    assert fused_by_runtime(original) == {"nst": "LayerNormalization"}
    harm, _ = fuse_model(original, verify="region")
    assert fused_by_runtime(harm) == {}
    fused, report = fuse_model(original)
    assert fused_by_runtime(fused) == {"nst": "LayerNormalization"}
    assert "it would hide a LayerNormalization that ONNX Runtime fuses" in [kept.reason for kept in report.kept]


def counting(monkeypatch: pytest.MonkeyPatch) -> list[ModelProto]:
    seen: list[ModelProto] = []

    def count(m: ModelProto) -> dict[str, str] | None:
        seen.append(m)
        return fused_by_runtime(m)

    monkeypatch.setattr("reparamc.onnx.runtime_fusions.fused_by_runtime", count)
    return seen


def conv_norm(*tail: NodeProto, **options: object) -> ModelProto:
    nodes = [node("Conv", "x w", "c"), batchnorm("c", "n", "b"), *(tail or [node("Relu", "b", "y")])]
    return model(nodes, {"w": weight(6, 6, 1, 1), **norm("n", 6)}, **options)  # type: ignore[arg-type]


def test_it_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counting(monkeypatch)
    fuse_model(conv_norm())
    assert len(seen) == 1, "nothing to protect: the result need not be optimised"
    seen.clear()
    fuse_model(gelu_model())
    assert len(seen) == 2
    seen.clear()
    fuse_model(gelu_model(), verify="region")
    fuse_model(model([node("Relu", "x", "y")], {}))
    assert not seen


def test_a_model_that_cannot_be_optimised_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reparamc.onnx.runtime_fusions.fused_by_runtime", lambda m: None)
    _, report = fuse_model(gelu_model())
    assert report.passes["bn-folding"] == 4


def test_a_torch_block() -> None:
    torch: Any = pytest.importorskip("torch")
    nn = torch.nn
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise, self.norm = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)
            self.layer_norm, self.wide, self.narrow = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)
            self.gamma = nn.Parameter(torch.randn(6))

        def forward(self, x: Any) -> Any:
            y = self.norm(self.depthwise(x)).permute(0, 2, 3, 1)
            y = self.narrow(nn.functional.gelu(self.wide(self.layer_norm(y))))
            return x + (self.gamma * y).permute(0, 3, 1, 2)

    file = BytesIO()
    net = nn.Sequential(Block(), Block()).eval()
    # Opset 16 has neither Gelu nor LayerNormalization.
    torch.onnx.export(net, (torch.randn(1, 6, 9, 11),), file, opset_version=16, dynamo=False)
    original = onnx.load_from_string(file.getvalue())
    wanted = fused_by_runtime(original)
    assert wanted is not None
    # Which of the two normalisations it becomes is the runtime's affair.
    kinds = Counter(wanted.values())
    assert (kinds["Gelu"], kinds.total()) == (2, 4)
    fused, report = fuse_model(original)
    assert report.changed
    assert Counter((fused_by_runtime(fused) or {}).values()) == kinds
    assert not any("would hide" in kept.reason for kept in report.kept)


# The search


def test_the_guilty_are_found_and_no_others() -> None:
    items = list(range(7))
    for size in range(4):
        for guilty in combinations(items, size):

            def counts(chosen: Sequence[int], guilty: tuple[int, ...] = guilty) -> Counter[str]:
                return Counter(Gelu=5 - len({*chosen} & {*guilty}), Attention=1)

            assert harmful(items, Counter(Gelu=5, Attention=1), counts) == dict.fromkeys(guilty, "Gelu")


def test_each_is_blamed_for_its_own_kind() -> None:
    def counts(chosen: Sequence[str]) -> Counter[str]:
        return Counter(Gelu="b" not in chosen, Attention="d" not in chosen)

    assert harmful("abcde", Counter(Gelu=1, Attention=1), counts) == {"b": "Gelu", "d": "Attention"}


@pytest.mark.parametrize(("pair", "blamed"), [("ab", "b"), ("ae", "e"), ("bd", "d"), ("de", "e")])
def test_of_two_that_do_harm_together_the_last_is_left_out(pair: str, blamed: str) -> None:
    def counts(chosen: Sequence[str]) -> Counter[str]:
        assert list(chosen) == sorted(chosen)
        return Counter(Gelu=not {*pair} <= {*chosen})

    assert harmful("abcde", Counter(Gelu=1), counts) == {blamed: "Gelu"}


def test_what_is_lost_anyway_is_nobodys_fault() -> None:
    assert harmful("abc", Counter(Gelu=2), lambda chosen: Counter(Gelu=1)) == {}
    assert harmful("abc", Counter(Gelu=2), lambda chosen: None) == {}
    assert harmful("abc", Counter(Gelu=2), lambda chosen: Counter(Gelu=1 - ("b" in chosen))) == {"b": "Gelu"}


def test_one_guilty_of_many_costs_few_rounds() -> None:
    rounds = 0

    def counts(chosen: Sequence[int]) -> Counter[str]:
        nonlocal rounds
        rounds += 1
        return Counter(Gelu=300 not in chosen)

    assert harmful(range(1000), Counter(Gelu=1), counts) == {300: "Gelu"}
    assert rounds <= 25


def test_many_guilty_cost_no_more_than_a_bound() -> None:
    rounds = 0

    def counts(chosen: Sequence[int]) -> Counter[str]:
        nonlocal rounds
        rounds += 1
        return Counter(Gelu=1000 - len(chosen))

    assert harmful(range(1000), Counter(Gelu=1000), counts) == dict.fromkeys(range(1000), "Gelu")
    assert rounds <= 60


def test_the_reason_is_english() -> None:
    assert reason("Gelu") == HIDES_GELU
    assert reason("Attention") == "it would hide an Attention that ONNX Runtime fuses"
