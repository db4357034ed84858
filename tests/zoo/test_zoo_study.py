"""Studies of latency: what is compared, and how it is told."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from fastvit_zoo.__main__ import main
from fastvit_zoo.export import study as studies
from fastvit_zoo.export.study import BASE, Pooling, Row, line, mixers, plot, read_table, study, variants, write_table
from fastvit_zoo.model import list_models


def test_what_is_compared() -> None:
    with torch.device("meta"):
        made = mixers()
        assert made["attention in stages 3 and 4"].eval()(torch.empty(1, 3, 64, 64)).shape == (1, 1000)
        assert list(variants()) == list_models()
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in made.items()}
    mixing = 2 * 64 + 2 * 128 + 6 * 256 + 2 * 512
    assert counts[BASE] - counts["pooling"] == (9 + 1 + 4 * 2 + 1) * mixing  # two kernels, four norms, a scale
    large = 2 * 64 + 2 * 128 + 6 * 256 + 2 * 512 + 128 + 256 + 512  # in the feed-forward networks and between stages
    assert counts[BASE] - counts["kernels of 3 for 7"] == (49 - 9) * large
    assert counts["attention in stages 3 and 4"] > counts["attention in stage 4"] > counts[BASE]


def test_pooling_keeps_the_mean() -> None:
    torch.testing.assert_close(Pooling()(torch.full((1, 2, 4, 5), 3.0)), torch.full((1, 2, 4, 5), 3.0))


def test_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    block = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    small = {BASE: torch.nn.Conv2d(3, 2, 1), "other": block}
    monkeypatch.setitem(studies.NETWORKS, "mixers", lambda: small)  # pyright: ignore[reportArgumentType]
    asked: list[tuple[int, ...]] = []

    def ratios(calls: list[Any], rounds: int) -> list[float]:
        asked.append(tuple(call().shape[1] for call in calls))
        return [(shape + i) / asked[-1][0] for i, shape in enumerate(asked[-1])]

    monkeypatch.setattr(studies, "ratios", ratios)
    found = list(study([8, 9], ["torch", "onnx"], 1))
    assert [row[:2] for row in found] == [("torch", 8), ("torch", 9), ("onnx", 8), ("onnx", 9)]
    assert asked == [(2, 2, 2), (2, 4, 4)] * 4
    assert all(row[2] == {BASE: (1.0, 2.0), "other": (2.5, 3.0)} for row in found)
    file = tmp_path / "table.json"
    write_table(file, found[1:2])
    assert main(["study", "--sizes", "8", "--runtimes", "torch", "--table", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert list(read_table(file, list(small)).values()) == [found[1], found[0]]
    with pytest.raises(ValueError, match=r"table\.json is of other networks: RepMixer, other"):
        read_table(file, ["another"])
    file.write_text("[1]")
    with pytest.raises(ValueError, match=r"table\.json is no table of a study"):
        read_table(file, ["another"])
    assert lines == [
        "| runtime | size | RepMixer | other |", "|---|---|---|---|", "| torch | 8 | 1.00 (2.00) | 2.50 (3.00) |"
    ]  # fmt: skip


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows: list[Row] = [("onnx", size, {BASE: (1.0, 1.2), "pooling": (size / 200, 1.3)}) for size in (224, 384)]
    assert line(rows[0]) == "| onnx | 224 | 1.00 (1.20) | 1.12 (1.30) |"
    plot(rows, tmp_path / "ratios.svg")
    assert "onnx" in (tmp_path / "ratios.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runtimes", "abacus"], "unknown target 'abacus'"),
        (["--table", "none/table.json"], "should be a file in a folder that exists"),
        (["--plot", "none/ratios.png"], "should be a PNG or SVG file in a folder that exists"),
        (["--plot", "ratios.doc"], "should be a PNG or SVG file in a folder that exists"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
