"""Robustness: corruptions, the mean corruption error, and data sets of some of the classes."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
import fastvit_zoo.torchvision_operators  # noqa: F401

pytest.importorskip("timm")

import numpy as np
import torch
from PIL import Image

import reparamc
from fastvit_zoo import create_model
from fastvit_zoo.__main__ import main
from fastvit_zoo.train.evaluate import ALEXNET, Corrupted, evaluate, indices_of, mean_corruption_error, names_of
from fastvit_zoo.train.validate import Agreement

# timm's reader of images leaves them to the garbage collector to close.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A checkpoint of three classes, and images of two of them."""
    torch.manual_seed(0)
    torch.save(create_model("fastvit_digits", num_classes=3).state_dict(), tmp_path / "weights.pt")
    (tmp_path / "run.json").write_text(json.dumps({"classes": ["a", "b", "c"]}))
    random = np.random.RandomState(0)
    for name in "ac":
        folder = tmp_path / "val" / name
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(random.randint(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path


def test_both_forms_choose_among_the_classes_of_the_data(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Negated(torch.nn.Module):
        """A "fused" form that errs, so that a test that compares one form with itself would fail."""

        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return -self.model(image)

    monkeypatch.setattr(reparamc, "fuse_fx", lambda model, images: Negated(model))
    found = evaluate("fastvit_digits", run / "weights.pt", run, size=32, batch=4)["clean"]
    assert isinstance(found, Agreement)
    assert (found.images, found.differing) == (6, 6)
    assert found.top1 + found.top1_fused == pytest.approx(100)


def test_classes_by_name(run: Path, tmp_path: Path) -> None:
    assert names_of(run / "weights.pt") == ["a", "b", "c"]
    known = names_of(tmp_path / "nowhere" / "weights.pt")
    assert len(known) == 1000
    assert indices_of(["n01440764", "n15075141"], known) == [0, 999]
    with pytest.raises(ValueError, match="does not know the class 'n00000000'"):
        indices_of(["n00000000"], known)


def test_mean_corruption_error() -> None:
    assert len(ALEXNET) == 15
    assert mean_corruption_error({kind: [error] * 5 for kind, error in ALEXNET.items()}) == pytest.approx(100)
    assert mean_corruption_error({"fog": [0, ALEXNET["fog"]], "snow": [0, 0]}) == pytest.approx(25)


@pytest.mark.filterwarnings("ignore")
def test_corruptions_are_drawn_from_the_image() -> None:
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (48, 40, 3), dtype=np.uint8))
    for kind in set(ALEXNET) - {"glass_blur", "zoom_blur"}:  # which take long, the first to be compiled
        np.random.seed(7)
        made = [np.asarray(Corrupted(kind, severity)(image)) for severity in (3, 3, 5)]
        assert np.random.rand() == np.random.RandomState(7).rand()
        assert made[0].shape == (48, 40, 3)
        assert np.array_equal(made[0], made[1])
        assert not np.array_equal(made[0], np.asarray(image))
        assert not np.array_equal(made[0], made[2])


@pytest.mark.filterwarnings("ignore")
def test_every_corruption_changes_no_prediction(run: Path) -> None:
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    kinds = ["impulse_noise", "frost", "pixelate"]
    found = evaluate("fastvit_digits", run / "weights.pt", run, size=32, corruptions=kinds, severities=(1, 5))
    assert len(found) == 1 + 2 * 3 + 2
    assert found["mCE"] == found["mCE fused"]
    assert not any(value.differing for value in found.values() if isinstance(value, Agreement))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "none"], "none is not a folder"),
        (["--data", "other"], "the model does not know the class 'z'"),
        (["--data", "empty"], "empty: Found 0 images"),
        (["--data", ".", "--model", "fastvit_t8"], "does not fit the model"),
        (["--data", "flat"], "flat has no classes: images of each class belong in a folder"),
        (["--data", ".", "--corruptions", "smog"], "unknown corruption 'smog'"),
        (["--data", ".", "--corruptions", "fog", "--size", "16"], "--size 16 is too small"),
        (["--data", ".", "--workers", "-1"], "--workers must be 0 or more, not -1"),
        (["--data", ".", "--device", "abacus"], "there is no device 'abacus' here"),
        (["--data", ".", "--crop", "0"], "--crop must be above 0 and at most 1"),
        (["--data", ".", "--checkpoint", "cut.pt"], "cut.pt: damaged or not written by torch.save"),
        (["--data", ".", "--checkpoint", "tasks/weights.pt"], "has no names of classes: it is not that of a classif"),
    ],
)
def test_bad_input_is_one_line(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(run)
    Path("empty").mkdir()
    Path("other", "z").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(Path("other", "z", "0.png"))
    Path("flat").mkdir()
    Image.new("RGB", (8, 8)).save(Path("flat", "0.png"))
    Path("cut.pt").write_bytes(Path("weights.pt").read_bytes()[:50000])
    Path("tasks").mkdir()
    Path("tasks", "run.json").write_text(json.dumps({"task": "segment", "classes": 11}))
    model = [] if "--model" in arguments else ["--model", "fastvit_digits"]
    assert main(["evaluate", "--checkpoint", "weights.pt", *model, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err
