"""The fused form in a runtime: what is written, what is compared, and what is refused."""

from pathlib import Path

import pytest

pytest.importorskip("torch")

import numpy as np
import onnx
import torch

from fastvit_zoo.__main__ import main
from fastvit_zoo.export import deploy as deploying
from fastvit_zoo.export.deploy import TOLERANCE, deploy
from fastvit_zoo.export.targets import TARGETS, Runner, Target


@pytest.fixture
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)
    ).eval()


@pytest.mark.parametrize("name", TARGETS)
def test_a_converted_network_computes_what_torch_does(name: str, network: torch.nn.Module, tmp_path: Path) -> None:
    if TARGETS[name].missing():
        pytest.skip(f"{name} is not installed")
    path = tmp_path / f"model{TARGETS[name].suffix}"
    found = deploy(network, name, path, torch.randn(1, 3, 8, 8))
    assert path.exists()
    if TARGETS[name].load is None:
        assert found.operators["conv"] == 1
    else:
        assert found.error is not None
        assert found.error < TOLERANCE


def test_the_command_fuses_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.onnx"
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    monkeypatch.setattr(deploying, "random_model", lambda name, seed, classes: small)
    assert main(["export", "fastvit_t8", "--to", "onnx", "-o", str(file), "--size", "9"]) == 0
    assert [node.op_type for node in onnx.load(file).graph.node if node.op_type != "Identity"] == ["Conv"]
    assert "converted for onnx, largest error against torch" in capsys.readouterr().out


def wrong(path: Path) -> Runner:
    return lambda image: np.ones((1, 5), np.float32)


def stuck(path: Path) -> Runner:
    raise RuntimeError("an operator of another version")


def broken(network: torch.nn.Module, image: torch.Tensor, path: Path) -> None:
    path.write_text("half")
    raise RuntimeError("no such operator\nand more")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target((), (), ".onnx", TARGETS["onnx"].convert, wrong), "computes something else than torch"),
        (Target((), (), ".onnx", TARGETS["onnx"].convert, stuck), "the runtime of mine failed: an operator of another"),
        (Target((), (), ".onnx", broken, None), "the converter for mine failed: no such operator$"),
        (Target((), (), ".other", broken, None), "a file for mine ends in .other, not model.onnx"),
        (Target(("nowhere",), ("nowhere",), ".onnx", broken, None), "pip install nowhere"),
    ],
)
def test_what_fails_leaves_the_old_file(
    target: Target, message: str, network: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploying, "TARGETS", {"mine": target})
    path = tmp_path / "model.onnx"
    path.write_text("old")
    with pytest.raises(ValueError, match=message):
        deploy(network, "mine", path, torch.randn(1, 3, 8, 8))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_too_little_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def random_model(*_: object) -> None:
        torch.empty(1 << 50)

    monkeypatch.setattr(deploying, "random_model", random_model)
    assert main(["export", "fastvit_t8", "-o", str(tmp_path / "a.onnx")]) == 2
    assert capsys.readouterr().err == "fastvit_zoo: error: out of memory: give a smaller --batch or --size\n"


def test_unknown_targets_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "fastvit_t8", "--to", "abacus", "-o", str(tmp_path / "a.onnx")]) == 2
    assert capsys.readouterr().err.startswith("fastvit_zoo: error: unknown target 'abacus'; known targets: onnx, ")


def test_a_row_of_the_table(network: torch.nn.Module) -> None:
    forms: dict[str, torch.nn.Module] = {"fused": network, "authors": network, "training": network}
    row = deploying._row("onnx", forms, torch.randn(1, 3, 8, 8), 1)
    error, training, authors, fused = (float(cell) for cell in row.split("|"))
    assert error < 1e-4
    assert fused == 1
    assert min(training, authors) > 0


def test_a_form_that_a_runtime_refuses(network: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = torch.nn.Sequential(network)

    def convert(given: torch.nn.Module, image: torch.Tensor, path: Path) -> None:
        (broken if given is refused else TARGETS["onnx"].convert)(given, image, path)

    monkeypatch.setattr(deploying, "TARGETS", {"mine": Target((), (), ".onnx", convert, TARGETS["onnx"].load)})
    forms: dict[str, torch.nn.Module] = {"fused": network, "authors": network, "training": refused}
    cells = deploying._row("mine", forms, torch.randn(1, 3, 8, 8), 1).split(" | ")
    assert cells[1] == "fails"
    assert cells[3] == "1.00"
