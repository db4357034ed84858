"""Studies of latency: what is compared, and how it is told."""

from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from fastvit_zoo.__main__ import main
from fastvit_zoo.export import study as studies
from fastvit_zoo.export.study import BASE, Pooling, Row, line, networks, plot, study


def test_what_is_compared() -> None:
    with torch.device("meta"):
        made = networks()
        assert made["attention in stages 3 and 4"](torch.empty(1, 3, 64, 64)).shape == (1, 1000)
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in made.items()}
    assert counts[BASE] == 9_428_712
    assert counts[BASE] - counts["pooling"] == 10 * (2 * 64 + 2 * 128 + 6 * 256 + 2 * 512)
    assert counts["attention in stage 4"] == 11_545_320
    large = 2 * 64 + 2 * 128 + 6 * 256 + 2 * 512 + 128 + 256 + 512  # in the feed-forward networks and between stages
    assert counts[BASE] - counts["kernels of 3 for 7"] == (49 - 9) * large


def test_pooling_keeps_the_mean() -> None:
    torch.testing.assert_close(Pooling()(torch.full((1, 2, 4, 5), 3.0)), torch.full((1, 2, 4, 5), 3.0))


def test_ratios(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = {BASE: torch.nn.Conv2d(3, 1, 1), "other": torch.nn.Conv2d(3, 8, 3)}
    monkeypatch.setattr(studies, "networks", lambda: small)
    monkeypatch.setattr(studies, "milliseconds", lambda calls, rounds: [float(call().shape[1]) for call in calls])
    found = list(study([8, 9], ["torch", "onnx"], 1))
    assert [row[:2] for row in found] == [("torch", 8), ("torch", 9), ("onnx", 8), ("onnx", 9)]
    assert all(row[2] == {BASE: 1.0, "other": 8.0} for row in found)
    assert main(["study", "--sizes", "8", "--runtimes", "torch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["| runtime | size | RepMixer | other |", "|---|---|---|---|", "| torch | 8 | 1.00 | 8.00 |"]


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows: list[Row] = [("onnx", size, {BASE: 1.0, "pooling": size / 200}) for size in (224, 384)]
    assert line(rows[0]) == "| onnx | 224 | 1.00 | 1.12 |"
    plot(rows, tmp_path / "ratios.svg")
    assert "onnx" in (tmp_path / "ratios.svg").read_text()


def test_unknown_runtimes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--runtimes", "abacus"]) == 2
    assert "unknown target 'abacus'" in capsys.readouterr().err
