"""Training runs: what is measured, what survives being killed, and what is refused."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
import fastvit_zoo.torchvision_operators  # noqa: F401

pytest.importorskip("timm")

import numpy as np
import onnx
import torch
from PIL import Image
from timm.data import auto_augment
from timm.utils.cuda import NativeScaler

import reparamc
from fastvit_zoo import create_model, load_checkpoint
from fastvit_zoo.__main__ import main
from fastvit_zoo.checkpoint import save
from fastvit_zoo.train.data import readable
from fastvit_zoo.train.finish import train
from fastvit_zoo.train.recipe import DIGITS, RECIPES, Recipe, recipe
from fastvit_zoo.train.run import Options, Run, Saver, Source, Teacher
from fastvit_zoo.train.step import Stepper

# timm's reader of images leaves them to the garbage collector to close.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")

TINY = replace(DIGITS, epochs=2, warmup=0, batch=8, accumulate=2, clip=1.0, cutmix=1.0, augment="rand-m5")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, dark and light: eight images of each to train on, four of each to validate."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.RandomState(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, low in (("dark", 0), ("light", 128)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.randint(low, low + 128, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    """A run of two epochs with all that a recipe can turn on, and a teacher."""
    output = tmp_path_factory.mktemp("run") / "whole"
    return output, train("fastvit_digits", TINY, Source(images), options(output))


def options(output: Path, **changes: Any) -> Options:
    weights = output.parent / "teacher.pt"
    torch.manual_seed(0)
    torch.save(create_model("fastvit_digits", num_classes=2).state_dict(), weights)
    return Options(output, teacher=Teacher("fastvit_digits", weights), **changes)


def test_every_epoch_has_both_accuracies_and_what_is_written_is_fused_or_loads(
    whole: tuple[Path, list[dict[str, float]]],
) -> None:
    """One test of one run: two processes would each train for their half of the tests."""
    output, epochs = whole
    assert [e["epoch"] for e in epochs] == [0, 1]
    for found in epochs:
        assert found["images"] == 8
        assert found["top1"] == found["top1_fused"]
        assert found["differing"] == 0
    lines = (output / "summary.csv").read_text().splitlines()
    assert len(lines) == 3
    assert "eval_top1,eval_top5,eval_top1_fused" in lines[0]
    kinds = {node.op_type for node in onnx.load(output / "model.onnx").graph.node}
    assert "Conv" in kinds
    assert "BatchNormalization" not in kinds
    load_checkpoint(create_model("fastvit_digits", num_classes=2), output / "model_best.pth.tar")
    other = create_model("fastvit_digits", num_classes=5)
    load_checkpoint(other, output / "last.pth.tar", classifier=False)


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    whole: tuple[Path, list[dict[str, float]]], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "killed"
    epoch: Callable[[Run, int], float] = Run._epoch
    monkeypatch.setattr(reparamc, "Fuser", lambda model, _: lambda: model)  # fusing takes longest, and no part in this

    def killed(self: Run, number: int) -> float:
        if number == 1:
            raise KeyboardInterrupt
        return epoch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            list(Run("fastvit_digits", TINY, Source(images), options(output)).epochs())
    (found,) = Run("fastvit_digits", TINY, Source(images), options(output, resume=True)).epochs()
    assert found["epoch"] == 1
    assert found["loss"] == whole[1][1]["loss"]
    states = [torch.load(folder / "last.pth.tar", weights_only=True) for folder in (output, whole[0])]
    for kind in "state_dict", "state_dict_ema":
        for name, value in states[0][kind].items():
            torch.testing.assert_close(value, states[1][kind][name], rtol=0, atol=0)


def test_checkpoints_are_there_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(1, 1)
    saver = Saver(layer, torch.optim.SGD(layer.parameters()), checkpoint_dir=str(tmp_path), max_history=1)
    saver.save_checkpoint(0, 1.0)
    calls: list[str] = []

    def watch(name: str, function: Callable[..., Any]) -> None:
        def watched(*arguments: Any) -> None:
            function(*arguments)
            calls.append(name)
            for kept in "last.pth.tar", "model_best.pth.tar":
                torch.load(tmp_path / kept, weights_only=True)

        monkeypatch.setattr(os, name, watched)

    for name in "unlink", "remove", "link", "replace":
        watch(name, getattr(os, name))
    saver.save_checkpoint(1, 2.0)
    assert {"replace", "link"} <= set(calls)
    assert torch.load(tmp_path / "model_best.pth.tar", weights_only=True)["epoch"] == 1


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    layer = torch.nn.Linear(1, 1)
    saver = Saver(layer, torch.optim.SGD(layer.parameters()), checkpoint_dir=str(tmp_path / "none"))
    with pytest.raises(OSError, match=r"none/tmp\.pth\.tar cannot be written: "):
        saver.save_checkpoint(0, 1.0)
    with pytest.raises(OSError, match=r"none/last\.pt cannot be written: "):
        save({"a": 1}, tmp_path / "none" / "last.pt")
    save({"a": 1}, tmp_path / "last.pt")
    with pytest.raises(TypeError, match="pickle"):
        save({"a": (i for i in ())}, tmp_path / "last.pt")
    assert torch.load(tmp_path / "last.pt") == {"a": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_loss_that_is_no_number_stops_half_precision_as_well() -> None:
    layer = torch.nn.Linear(1, 1)
    stepper = Stepper(torch.optim.SGD(layer.parameters()), torch.device("cpu"), True)
    stepper.scaler = NativeScaler("cpu")
    before = layer.weight.item()
    stepper.step(layer(torch.ones(1)).sum(), layer)
    assert layer.weight.item() != before
    with pytest.raises(ValueError, match="the loss is nan: give a smaller --lr"):
        stepper.step(torch.tensor(float("nan")), layer)


def test_the_digits_are_split_once() -> None:
    pytest.importorskip("sklearn")
    training, validation, names = Source(kind="digits").halves()
    assert (len(training), len(validation), names) == (1437, 360, [str(i) for i in range(10)])
    image, label = training[0]
    assert (image.size, image.mode, names[label]) == ((8, 8), "RGB", str(training.targets[0]))


def test_data_sets_of_other_libraries(images: Path, tmp_path: Path) -> None:
    training, validation, names = Source(images, "torch/image_folder").halves()
    assert (len(training), len(validation), names) == (16, 8, ["dark", "light"])
    with pytest.raises(ValueError, match="Dataset not found"):
        Source(images, "torch/cifar10").halves()
    datasets = pytest.importorskip("datasets")
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])}
    table = {"image": [Image.new("RGB", (9, 9))] * 4, "label": [0, 1, 0, 1]}
    made = datasets.Dataset.from_dict(table, features=datasets.Features(kinds))
    for split in "train", "validation":
        made.to_parquet(str(tmp_path / f"{split}-0.parquet"))
    training, validation, names = Source(tmp_path, "hfds").halves()
    assert (len(training), len(validation), names) == (4, 4, ["dark", "light"])
    assert training[1][1] == 1


def test_the_strongest_augmentation_of_the_paper() -> None:
    strongest = auto_augment.AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)
    assert strongest(Image.new("RGB", (2, 2), "white")).getcolors() == [(4, (0, 0, 0))]
    weaker = auto_augment.AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=5)
    assert weaker(Image.new("RGB", (2, 2), "white")).getcolors() == [(4, (192, 192, 192))]


def test_images_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").write_text("no image")
    images = Source(tmp_path).split(True)
    images.transform = lambda image: image
    with pytest.raises(ValueError, match="images cannot be read: Failed to load"):
        list(readable(torch.utils.data.DataLoader(images)))


def test_recipes_of_the_paper() -> None:
    assert recipe("paper", "fastvit_t8") == Recipe()
    assert (recipe("paper", "fastvit_ma36").drop_path, recipe("paper", "fastvit_ma36").mixup) == (0.35, 0.8)
    distilled = recipe("paper", "fastvit_ma36", distilled=True, epochs=3)
    assert (distilled.drop_path, distilled.epochs) == (0.2, 3)
    assert (RECIPES["paper-384"].size, RECIPES["paper-384"].lr) == (384, 5e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "none"], "none is not a folder"),
        (["--data", "flat"], "flat has no classes"),
        (["--data", "empty"], "empty has no folder train"),
        (["--data", "images", "--batch", "64"], "16 images for training are too few for an update of 64"),
        (["--data", "images", "--batch", "3"], "--batch 3 is odd"),
        (["--data", "images", "--checkpoint", "t8.pt", "--batch", "4"], "does not fit the model"),
        (["--data", "images", "--resume", "--batch", "4"], "nothing to resume in new"),
        (["--data", "images", "--batch", "4", "--output", "old"], "old has a run already"),
        (["--data", "images", "--batch", "4", "--output", "old", "--resume"], "run.json has another lr: 1.0, not 0.00"),
        (["--data", "images", "--teacher", "resnet18"], "belong together"),
        (
            ["--data", "images", "--batch", "4", "--teacher", "resnet18", "--teacher-checkpoint", "none.pt"],
            "the teacher's weights none.pt do not exist",
        ),
        (["--data", "images", "--batch", "0"], "--batch must be above 0, not 0"),
        (["--data", "images", "--layer-scale", "inf"], "--layer-scale must be a number, not inf"),
        (["--data", "images", "--epochs", "-1"], "--epochs must be above 0, not -1"),
        (["--data", "images", "--ema", "2"], "--ema must be from 0 to 1, not 2.0"),
        (["--data", "images", "--batch", "4", "--optimizer", "none"], "Optimizer none not found"),
        (["--data", "images", "--batch", "4", "--augment", "none"], "--augment none: Unknown AA policy none"),
        (["--data", "images", "--batch", "4", "--dataset", "none"], "unknown data set 'none'"),
        (
            ["--data", "images", "--batch", "4", "--teacher", "resnet18", "--teacher-checkpoint", "list.pt"],
            "not fit res",
        ),
        (["--data", "images", "--batch", "4", "--device", "cuda:99"], "there is no device 'cuda:99' here"),
        (["--recipe", "mine"], "unknown recipe 'mine'; known recipes: paper"),
        (["--data", "images", "--model", "fastvit_t9", "--batch", "4"], "unknown model 'fastvit_t9'"),
    ],
)
def test_bad_input_is_one_line(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images").symlink_to(images)
    for split in "train", "val":
        Path("flat", split).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(Path("flat", split, "a.png"))
    Path("empty").mkdir()
    torch.save([1], "list.pt")
    Path("old").mkdir()
    kept = {"model": "fastvit_t8", "classes": ["dark", "light"], "recipe": {"epochs": 8, "warmup": 1, "cooldown": 0}}
    kept["recipe"] |= {"batch": 4, "accumulate": 1, "optimizer": "adamw", "lr": 1.0}
    Path("old", "run.json").write_text(json.dumps(kept))
    with torch.device("meta"):
        weights = create_model("fastvit_t8", num_classes=2).state_dict()
    torch.save({name: torch.zeros(value.shape) for name, value in weights.items()}, "t8.pt")
    model = [] if "--model" in arguments else ["--model", "fastvit_t8" if "old" in arguments else "fastvit_digits"]
    given = ["--recipe", "digits"] if "--recipe" not in arguments else []
    assert main(["train", "--output", "new", *given, *model, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert not Path("new").exists()
