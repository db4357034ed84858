"""The ONNX files of the training form, and the command line that writes them."""

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("torch")

import numpy as np
import onnx
import onnxruntime
import torch

from fastvit_zoo import create_model
from fastvit_zoo.__main__ import main
from fastvit_zoo.onnx_export import export_onnx


def operators(file: Path) -> Counter[str]:
    nodes = onnx.load(file).graph.node
    return Counter(node.op_type for node in nodes if node.op_type not in ("Constant", "Identity"))


# timm's implementation exports to 317 and 445 operators with as many convolutions and BatchNorms.
@pytest.mark.parametrize(
    ("name", "total", "convolutions", "norms"),
    [("fastvit_t8", 310, 68, 70), ("fastvit_sa12", 434, 75, 74)],
)
def test_operator_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, total: int, convolutions: int, norms: int
) -> None:
    file = tmp_path / "model.onnx"
    assert main(["export", name, "-o", str(file), "--size", "64"]) == 0
    counts = operators(file)
    assert (counts.total(), counts["Conv"], counts["BatchNormalization"]) == (total, convolutions, norms)
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{file}: ")
    assert captured.out.endswith(f" MiB, {total} operators, {convolutions} Conv, {norms} BatchNormalization\n")
    assert captured.out.count("\n") == 1
    assert captured.err == ""
    assert list(tmp_path.iterdir()) == [file]


def test_file_format(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    assert main(["export", "fastvit_t8", "-o", str(file), "--size", "96", "--batch", "3"]) == 0
    model = onnx.load(file)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, logits.name) == ("image", "logits")
    assert [d.dim_value for d in image.type.tensor_type.shape.dim] == [3, 3, 96, 96]
    assert [d.dim_value for d in logits.type.tensor_type.shape.dim] == [3, 1000]


def test_random_weights_have_spread_and_depend_on_the_seed(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.onnx" for i in range(3)]
    for file, seed in zip(files, ("0", "0", "1"), strict=True):
        assert main(["export", "fastvit_t8", "-o", str(file), "--size", "32", "--seed", seed]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != files[2].read_bytes()
    values = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(files[0]).graph.initializer}
    assert 0.3 < values["stages.2.blocks.0.token_mixer.layer_scale"].std() < 0.7
    norm = "stages.2.blocks.0.token_mixer.norm."
    assert values[norm + "running_var"].std() > 0.01
    assert values[norm + "running_mean"].std() > 0.01
    assert values[norm + "weight"].min() < 0 < values[norm + "weight"].max()


@pytest.mark.parametrize("name", ["fastvit_t8", "fastvit_sa12"])
def test_dynamic_file_computes_what_the_model_does(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=6, in_channels=4, layer_scale_init=0.5).train()
    model.stem.eval()
    modes = [module.training for module in model.modules()]
    file = tmp_path / "model.onnx"
    export_onnx(model, file, size=64, dynamic=True)
    assert [module.training for module in model.modules()] == modes
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    model.eval()
    for shape in (1, 4, 64, 64), (3, 4, 97, 70):
        image = torch.randn(shape)
        (actual,) = session.run(["logits"], {"image": image.numpy()})
        with torch.no_grad():
            expected = model(image).numpy()
        assert np.abs(np.asarray(actual) - expected).max() < 1e-4 * np.abs(expected).max()


def test_checkpoint(tmp_path: Path) -> None:
    original = create_model("fastvit_t8")
    weights, file = tmp_path / "weights.pt", tmp_path / "model.onnx"
    torch.save({"state_dict": original.state_dict()}, weights)
    arguments = ["export", "fastvit_t8", "-o", str(file), "--size", "32", "--checkpoint", str(weights)]
    assert main([*arguments, "--seed", "9"]) == 0
    values = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer}
    np.testing.assert_array_equal(values["head.weight"], original.state_dict()["head.weight"])


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[0].split()[:2] == ["fastvit_t8", "4,026,232"]
    assert "43,984,632 deployed" in lines[6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fastvit_t9", "-o", "new.onnx"], "unknown model 'fastvit_t9'; known models: fastvit_t8, "),
        (["fastvit_t8", "-o", "none/new.onnx"], "the folder none does not exist"),
        (["fastvit_t8", "-o", "folder"], "folder is a folder, not a file"),
        (["fastvit_t8", "-o", "new.onnx", "--checkpoint", "none.pt"], "No such file or directory: 'none.pt'"),
        (["fastvit_t8", "-o", "new.onnx", "--checkpoint", "text.pt"], "text.pt: not a torch.save file"),
        (["fastvit_t8", "-o", "new.onnx", "--checkpoint", "fused.pt"], "with deployed=True"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.pt").write_text("no weights here")
    torch.save(create_model("fastvit_t8", deployed=True).state_dict(), "fused.pt")
    assert main(["export", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastvit_zoo: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.glob("**/*new.onnx*"))


@pytest.mark.parametrize("size", ["0", "-5", "wide"])
def test_sizes_are_positive(capsys: pytest.CaptureFixture[str], size: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["export", "fastvit_t8", "-o", "new.onnx", "--size", size])
    assert "--size" in capsys.readouterr().err


def test_failure_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.onnx"
    file.write_text("old")

    def fail(model: object, arguments: object, partial: Path, **_: object) -> None:
        Path(partial).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(torch.onnx, "export", fail)
    assert main(["export", "fastvit_t8", "-o", str(file), "--size", "32"]) == 2
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
