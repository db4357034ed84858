"""A fused ONNX file with new weights: through its record, from a checkpoint, or from a fused module."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fx_checks import ready
from onnx import numpy_helper
from test_fuser import X, block, changed
from torch import nn

from reparamc import Fuser, InputError, fuse_onnx
from reparamc.__main__ import main
from reparamc.onnx.record import KEY, STRUCTURE, records
from reparamc.testing import assert_equivalent

X32 = X.float()


def export(model: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (X32,), str(path), dynamo=False, input_names=["x"], do_constant_folding=False, opset_version=17,
            training=torch.onnx.TrainingMode.PRESERVE,
        )  # fmt: skip
    return path


@pytest.fixture
def model() -> Any:
    return ready(block()).float()


@pytest.fixture
def fused(model: Any, tmp_path: Path) -> Path:
    return Path(fuse_onnx(export(model, tmp_path / "model.onnx"), output=tmp_path / "fused.onnx"))


def saved(model: nn.Module, path: Path) -> Path:
    """The weights of ``model`` in a file of the kind that the name tells."""
    state = model.state_dict()
    if path.suffix == ".npz":
        np.savez(path, **{n: t.numpy() for n, t in state.items()})  # type: ignore[arg-type]
    elif path.suffix == ".onnx":
        export(model, path)
    elif path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    elif path.stem == "nested":
        torch.save({"epoch": 3, "state_dict": {f"module.{n}": t for n, t in state.items()}}, path)
    elif path.stem == "deep":
        torch.save({"optimizer": {"state": {0: {"step": torch.ones(1)}}}, "net": {"weights": state}}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["new.pth", "nested.pth", "deep.pth", "new.npz", "new.safetensors", "new.onnx"])
def test_from_a_checkpoint(name: str, model: Any, fused: Path, tmp_path: Path) -> None:
    checkpoint, target = saved(changed(model), tmp_path / name), tmp_path / "out.onnx"
    before = fused.read_bytes()
    assert main(["refresh", str(fused), "--checkpoint", str(checkpoint), "-o", str(target), "-q"]) == 0
    assert fused.read_bytes() == before
    old, new = onnx.load(fused), onnx.load(target)
    assert old.graph.node == new.graph.node
    assert [(t.name, t.dims) for t in old.graph.initializer] == [(t.name, t.dims) for t in new.graph.initializer]
    assert_equivalent(model, target, X32)
    assert [e.key for e in new.metadata_props] == [f"{STRUCTURE}1", f"{KEY}1"]
    assert main(["audit", str(target), "--against", str(export(model, tmp_path / "again.onnx"))]) in (0, 1)


def test_the_result_is_that_of_a_fusion(model: Any, fused: Path, tmp_path: Path) -> None:
    checkpoint = saved(changed(model), tmp_path / "new.npz")
    main(["refresh", str(fused), "--checkpoint", str(checkpoint), "-o", str(fused), "-q"])
    anew = fuse_onnx(onnx.load(export(model, tmp_path / "model.onnx")))
    for a, b in zip(onnx.load(fused).graph.initializer, anew.graph.initializer, strict=True):
        assert numpy_helper.to_array(a).tobytes() == numpy_helper.to_array(b).tobytes()
    assert records(onnx.load(fused))[0]["result"] == records(anew)[0]["result"]


def test_twice_fused(model: Any, fused: Path, tmp_path: Path) -> None:
    """A file that was fused by some passes, and then by all."""
    first = fuse_onnx(tmp_path / "model.onnx", output=tmp_path / "first.onnx", passes=["bn-folding"])
    second = fuse_onnx(first, output=tmp_path / "second.onnx")
    checkpoint = saved(changed(model), tmp_path / "new.npz")
    assert main(["refresh", str(second), "--checkpoint", str(checkpoint), "-o", str(second), "-q"]) == 0
    assert_equivalent(model, second, X32)


def without(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {n: t for n, t in state.items() if n != name}


WRONG = {
    "missing": (lambda s: without(s, "b.1.running_var"), r"does not fit: it has no 'b.1.running_var', which is \[4\]"),
    "size": (
        lambda s: s | {"last.bias": torch.zeros(7)},
        r"does not fit: 'last.bias' is \[7\] there, \[3\] in the",
    ),
    "not numbers": (lambda s: s | {"last.bias": torch.full((3,), torch.nan)}, r"holds NaN in 'last.bias'; take"),
    "whole": (lambda s: s | {"last.bias": torch.zeros(3, dtype=torch.int8)}, r"'last.bias' is int8 there, float32 in"),
    "unknown": (
        lambda s: s | {"last.bias": torch.zeros(3).to(torch.float8_e4m3fn)},
        r"'last.bias' is torch.float8_e4m3fn on cpu, which cannot be read; save it as float",
    ),
    "numbered": (lambda s: {1: torch.zeros(1)}, r"new.pth holds no state_dict; save that of the model"),
    "two": (lambda s: {"a": s, "b": s}, r"new.pth holds several state_dicts: a, b; save one of them alone"),
    "module": (lambda s: nn.Linear(2, 2), r"holds more than tensors, and no code is run; save the state_dict of"),
    "other": (lambda s: {"x": torch.zeros(1)}, r"does not fit: it has no '[ab].0.weight'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_checkpoint_that_does_not_fit(
    name: str, model: Any, fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = WRONG[name]
    torch.save(change(model.state_dict()), tmp_path / "new.pth")
    target = tmp_path / "out.onnx"
    arguments = ["refresh", str(fused), "--checkpoint", str(tmp_path / "new.pth"), "-o", str(target)]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not target.exists()


DAMAGED = "it is empty, cut short, or no "


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors", ".st"])
@pytest.mark.parametrize(
    ("held", "message"),
    [(None, ": no such file"), (b"", DAMAGED), (b"hello", DAMAGED), (b"PK\x03\x04", DAMAGED), (b"\x80\x04.", DAMAGED)],
)
def test_a_checkpoint_that_cannot_be_read(
    suffix: str, held: bytes | None, message: str, fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"wrong{suffix}"
    if held is not None:
        path.write_bytes(held)
    assert main(["refresh", str(fused), "--checkpoint", str(path), "-o", str(tmp_path / "out.onnx")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert message in line


def test_a_file_without_a_structure(
    model: Any, fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["refresh", str(tmp_path / "model.onnx"), "--checkpoint", str(saved(model, tmp_path / "new.npz"))]
    assert main([*arguments, "-o", str(tmp_path / "out.onnx")]) == 2
    assert "it holds no structure of its original" in capsys.readouterr().err


def test_weights_that_lead_to_another_graph(model: Any, tmp_path: Path) -> None:
    """A branch of zeros is left out, until it is none."""
    with torch.no_grad():
        model.b[0].weight.zero_()
    fused = Path(fuse_onnx(export(model, tmp_path / "model.onnx"), output=tmp_path / "fused.onnx"))
    before = fused.read_bytes()
    with torch.no_grad():
        model.b[0].weight += 1
    fuser = Fuser(model, X32)
    try:
        fuser.refresh_onnx(fused)
    except InputError as error:
        assert "takes another form" in str(error)  # noqa: PT017
        assert fused.read_bytes() == before
    else:
        assert_equivalent(model, fused, X32)


def test_parameters_that_were_equal_when_they_were_exported(tmp_path: Path) -> None:
    """Of new BatchNorms the exporter writes one set of parameters; trained, they differ."""
    model = block().float().eval()
    fused = Path(fuse_onnx(export(model, tmp_path / "model.onnx"), output=tmp_path / "fused.onnx"))
    before = fused.read_bytes()
    fuser = Fuser(model, X32)
    fuser.refresh_onnx(fused)
    assert_equivalent(model, fused, X32)
    changed(ready(model))
    before = fused.read_bytes()
    with pytest.raises(InputError, match=r"one parameter for '[^']*' and perhaps '[^']*', for exporters merge"):
        fuser.refresh_onnx(fused)
    assert fused.read_bytes() == before


def test_through_a_fuser(model: Any, fused: Path, tmp_path: Path) -> None:
    fuser = Fuser(model, X32)
    plain = export(fuser(), tmp_path / "plain.onnx")
    changed(model)
    model.train()
    fuser.refresh_onnx(fused)
    fuser.refresh_onnx(plain, tmp_path / "other.onnx")
    assert model.training
    model.eval()
    assert_equivalent(model, fused, X32)
    assert_equivalent(model, tmp_path / "other.onnx", X32)
    with pytest.raises(InputError, match=r"the fused model does not fit: it has no 'a.0.weight'"):
        fuser.refresh_onnx(tmp_path / "model.onnx")


def test_without_torch(fused: Path, model: Any, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from reparamc.__main__ import main\n"
        "sys.exit(main(['refresh', sys.argv[1], '--checkpoint', sys.argv[2], '-o', sys.argv[3], '-q']))"
    )
    for name, expected in (("new.npz", 0), ("new.pth", 2)):
        path = saved(model, tmp_path / name)
        command = [sys.executable, "-c", code, str(fused), str(path), str(tmp_path / "out.onnx")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == expected, done.stderr
    assert "which is not installed" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_structure_is_small(fused: Path) -> None:
    entries = {e.key: e.value for e in onnx.load(fused).metadata_props}
    assert len(entries[f"{STRUCTURE}1"]) < 2000
    assert "structure" not in json.loads(entries[f"{KEY}1"])
