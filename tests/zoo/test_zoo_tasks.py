"""Dense tasks: scenes, readers, networks, figures. Training itself is tried by hand; the pages say with what result."""

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch")
import fastvit_zoo.torchvision_operators  # noqa: F401

pytest.importorskip("timm")

import numpy as np
import torch
from PIL import Image

import reparamc
from fastvit_zoo.__main__ import main
from fastvit_zoo.model import FeatureInfo
from fastvit_zoo.options import Options
from fastvit_zoo.tasks import mano, segmentation
from fastvit_zoo.tasks.fit import backbone, difference, fit, source
from fastvit_zoo.tasks.hands import HandNet, Images, aligned_error, rotations
from fastvit_zoo.tasks.mano import load_hand, stand_in
from fastvit_zoo.tasks.pyramid import Pyramid
from fastvit_zoo.tasks.scenes import Scene, write_ade, write_coco
from fastvit_zoo.tasks.segmentation import UNLABELLED, Folders, SemanticFPN, mean_iou
from fastvit_zoo.tasks.steps import Steps
from reparamc.testing import randomize_batchnorm


@pytest.fixture
def scenes() -> list[Scene]:
    """Two scenes of one rectangle each, without scikit-learn."""
    made = []
    for i in range(2):
        mask = np.zeros((32, 32), bool)
        mask[4 : 12 + i, 8:20] = True
        image = np.where(mask[..., None], 200, 10).astype(np.uint8).repeat(3, 2)
        made.append(Scene(image, [3 + i], [(8, 4, 12, 8 + i)], [mask]))
    return made


def test_composed_scenes_say_where_the_digits_are() -> None:
    pytest.importorskip("sklearn")
    from fastvit_zoo.tasks.scenes import compose

    made = compose(3, 48, seed=1)
    assert np.array_equal(made[0].image, compose(1, 48, seed=1)[0].image)
    for scene in made:
        assert scene.labels
        assert np.sum(scene.masks, 0).max() == 1
        for (x, y, width, height), mask in zip(scene.boxes, scene.masks, strict=True):
            assert mask[y : y + height, x : x + width].sum() == mask.sum()
            assert scene.image[mask].mean() > 2 * scene.image[~np.any(scene.masks, 0)].mean()


def test_folders_of_ade(scenes: list[Scene], tmp_path: Path) -> None:
    write_ade(scenes, tmp_path)
    image, labels = Folders(tmp_path, False, 32, 11)[1]
    assert image.shape == (3, 32, 32)
    assert (labels == 5).sum() == scenes[1].masks[0].sum()
    assert (labels == 0).sum() == (~scenes[1].masks[0]).sum()
    torch.manual_seed(3)
    image, labels = Folders(tmp_path, True, 48, 11, augment=True)[0]
    assert image.shape == (3, 48, 48)
    assert set(labels.unique().tolist()) <= {0, 4, UNLABELLED}


def test_annotations_of_coco(scenes: list[Scene], tmp_path: Path) -> None:
    write_coco(scenes, tmp_path)
    content = json.loads((tmp_path / "annotations" / "instances_val2017.json").read_text())
    lengths = content["annotations"][1]["segmentation"]["counts"]
    mask = np.repeat(np.arange(len(lengths)) % 2, lengths).reshape(32, 32).T
    assert np.array_equal(mask, scenes[1].masks[0])
    pytest.importorskip("pycocotools")
    from fastvit_zoo.tasks.detection import Coco, average_precision

    dataset = Coco(tmp_path, False)
    image, target = dataset[1]
    assert (image.shape, target["boxes"].tolist(), target["labels"].tolist()) == ((3, 32, 32), [[8, 4, 20, 13]], [5])

    class Oracle(torch.nn.Conv2d):
        def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:  # pyright: ignore
            (which,) = [i for i in range(2) if torch.equal(images[0], dataset[i][0])]
            known = dataset[which][1]
            masks = known["masks"][:, None].float()
            return [{"boxes": known["boxes"], "labels": known["labels"], "scores": torch.ones(1), "masks": masks}]

    figures = average_precision(Oracle(1, 1, 1), dataset)  # pyright: ignore[reportArgumentType]
    assert all(value == pytest.approx(100) for value in figures.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": None}, "has no list 'annotations'"),
        ({"images": [{"id": 1}]}, "'file_name' of 'images' is 'missing'"),
        ({"file_name": None}, "'file_name' of 'images' is None"),
        ({"image_id": []}, r"'image_id' of 'annotations' is \[\]"),
        ({"area": "x"}, "'area' of 'annotations' is 'x'"),
        ({"segmentation": {"size": [32, 32], "counts": [-5, 1029]}}, "no mask of the size of its image, 32 x 32"),
        ({"segmentation": [[None] * 6]}, "no mask of the size of its image, 32 x 32"),
        ({"images": [], "annotations": []}, None),
        ({"categories": []}, "annotation 1 is of an image or a category that is not listed"),
        ({"categories": [{"id": 0}], "category_id": 0}, "the category 0 should be a number above 0"),
        ({"image_id": 99}, "annotation 1 is of an image or a category that is not listed"),
        ({"bbox": [1, 2]}, r"annotation 1 has the box \[1, 2\]"),
        ({"segmentation": {"size": [9, 9], "counts": [81]}}, "no mask of the size of its image, 32 x 32"),
        ({"segmentation": [[1, 2]]}, "no mask of the size of its image, 32 x 32"),
        ({"segmentation": "junk"}, "no mask of the size of its image, 32 x 32"),
        ({"width": 33}, "no mask of the size of its image, 33 x 32"),
        ({"file_name": "none.png"}, "No such file"),
    ],
)
def test_annotations_of_another_layout(
    change: dict[str, Any], message: str | None, scenes: list[Scene], tmp_path: Path
) -> None:
    pytest.importorskip("torchvision")
    from fastvit_zoo.tasks.detection import check_annotations

    write_coco(scenes, tmp_path)
    file = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    check_annotations(file, tmp_path / "val2017")
    parts = content, content["images"][0], content["annotations"][0]
    for key, value in change.items():
        for part in parts:
            if key in part:
                part[key] = value
                break
    file.write_text(json.dumps(content))
    if message is None:
        check_annotations(file, tmp_path / "val2017")
        return
    with pytest.raises((ValueError, OSError), match=message):
        check_annotations(file, tmp_path / "val2017")
    file.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        check_annotations(file, tmp_path / "val2017")


def test_mean_iou_counts_what_is_labelled() -> None:
    labels = torch.tensor([[0, 0, 1, 1], [1, 1, UNLABELLED, UNLABELLED]])
    found = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 2]])
    network = torch.nn.Conv2d(3, 3, 1, bias=False)
    torch.nn.init.dirac_(network.weight)
    scores = torch.nn.functional.one_hot(found, 3).permute(2, 0, 1).float()
    assert mean_iou(network, [(scores, labels)], 3) == pytest.approx(100 * (1 / 2 + 4 / 5) / 2)


class Maps(torch.nn.Module):
    """As small as a backbone can be."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 4, 4)
        self.stages = torch.nn.ModuleList(torch.nn.Conv2d(4, 4, 2, 2) for _ in range(3))
        self.feature_info = FeatureInfo([{"num_chs": 4}] * 4, range(4))

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        maps = [self.stem(image).relu()]
        for stage in self.stages:
            maps.append(stage(maps[-1]).relu())
        return maps


def test_a_segmenter_fuses_as_a_whole() -> None:
    torch.manual_seed(0)
    network = SemanticFPN(Maps(), 5, 8, 4)  # pyright: ignore[reportArgumentType]
    image = torch.randn(2, 3, 64, 32)
    randomize_batchnorm(network, 0, image)
    fused = reparamc.fuse_fx(network.eval(), image)
    assert not [m for m in fused.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        expected = network(image)
        assert expected.shape == (2, 5, 64, 32)
        assert difference([fused(image)], [expected]) < 1e-4


def test_differences() -> None:
    nothing, some, other = np.zeros((0, 4)), [1.0, -4.0], [1.0, -3.0]
    assert difference([nothing, other], [nothing, some]) == 0.25
    assert difference([nothing], [np.zeros((1, 4))]) == float("inf")


def test_a_pyramid_has_strides() -> None:
    with torch.device("meta"):
        maps = Pyramid(backbone("fastvit_digits", None), 8, extra=True)(torch.empty(1, 3, 64, 64))
    assert [tuple(one.shape[1:]) for one in maps] == [(8, side, side) for side in (16, 8, 4, 2, 1)]


STEPS = Steps(updates=60, batch=2, lr=0.2, weight_decay=0)
DATA = [torch.tensor([float(i)]) for i in range(5)]


class Line(torch.nn.Linear):
    """A network of one weight; `loss` is least where it is 3."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(1, 1, bias=False)
        self.seen: list[float] = []

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += [*x[:, 0].tolist(), torch.rand(()).item()]
        return (self(x) - 3 * x).square().mean()


def test_fitting_moves_the_weights_to_what_lowers_the_loss(tmp_path: Path) -> None:
    layer = Line()
    losses = fit(layer, layer.loss, DATA, STEPS, Options(tmp_path), about={})
    assert len(losses) == 60
    assert abs(layer.weight.item() - 3) < 0.2
    assert not layer.training
    assert torch.load(tmp_path / "model.pt", weights_only=True)["weight"] == layer.weight
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "model.pt", "run.json"]
    with pytest.raises(ValueError, match="5 images are too few for a batch of 9"):
        fit(layer, layer.loss, DATA, Steps(updates=1, batch=9, lr=1.0), Options(tmp_path), about={})


@pytest.mark.parametrize("amp", [False, True])
def test_a_killed_task_goes_on_as_if_it_had_not_been(tmp_path: Path, amp: bool) -> None:
    whole, killed, resumed = Line(), Line(), Line()
    expected = fit(whole, whole.loss, DATA, STEPS, Options(tmp_path / "whole", amp=amp), about={"task": "line"})

    def dies(x: torch.Tensor) -> torch.Tensor:
        if len(killed.seen) > 90:
            raise KeyboardInterrupt
        return killed.loss(x)

    with pytest.raises(KeyboardInterrupt):
        fit(killed, dies, DATA, STEPS, Options(tmp_path / "killed", amp=amp), about={"task": "line"})
    again = Options(tmp_path / "killed", amp=amp, resume=True)
    assert fit(resumed, resumed.loss, DATA, STEPS, again, about={"task": "line"}) == expected
    assert resumed.weight == whole.weight
    assert 0 < len(resumed.seen) < len(whole.seen)
    assert whole.seen[-len(resumed.seen) :] == resumed.seen
    with pytest.raises(ValueError, match="has another lr"):
        fit(resumed, resumed.loss, DATA, replace(STEPS, lr=0.1), again, about={"task": "line"})
    with pytest.raises(ValueError, match="has a run already"):
        fit(resumed, resumed.loss, DATA, STEPS, replace(again, resume=False), about={"task": "line"})
    (again.output / "last.pt").write_bytes((again.output / "last.pt").read_bytes()[:99])
    with pytest.raises(ValueError, match=r"last\.pt: damaged"):
        fit(resumed, resumed.loss, DATA, STEPS, again, about={"task": "line"})


def test_half_precision_is_used_where_it_is_asked_for(tmp_path: Path) -> None:
    layer, kinds = Line(), set()

    def loss(x: torch.Tensor) -> torch.Tensor:
        kinds.add(layer(x).dtype)
        return layer.loss(x)

    fit(layer, loss, DATA, STEPS, Options(tmp_path, amp=True), about={})
    assert kinds == {torch.bfloat16}
    assert layer.weight.dtype == torch.float32
    assert abs(layer.weight.item() - 3) < 0.2


def test_an_infinite_loss_stops_the_run(tmp_path: Path) -> None:
    layer = Line()
    with pytest.raises(ValueError, match="the loss is inf: give a smaller --lr"):
        fit(layer, lambda x: layer.loss(x) / 0, DATA[1:], STEPS, Options(tmp_path), about={})


def test_scenes_are_there_while_they_are_needed(tmp_path: Path) -> None:
    with source(None, lambda folder: (folder / "a").touch()) as root:
        assert (root / "a").exists()
    assert not root.exists()
    with source(tmp_path, None) as root:
        assert root == tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["segment"], "no images: give --data DIR, or --recipe tiny"),
        (["segment", "--data", "none"], "none is not a folder"),
        (["segment", "--data", "half"], "0.png is missing: every image has an annotation of its name"),
        (["hands"], "no model of a hand: give --mano FILE"),
        (["hands", "--recipe", "tiny", "--data", "half"], "training_xyz.json does not exist: the layout is that of Fr"),
        (["detect"], "no images: give --data DIR, or --recipe tiny"),
        (["detect", "--data", "half"], "instances_train2017.json does not exist: the layout is that of COCO"),
        (["segment", "--data", "ade", "--size", "0"], "--size must be above 0, not 0"),
        (["segment", "--data", "ade", "--lr", "nan"], "--lr must be a number, not nan"),
        (["segment", "--data", "ade", "--size", "33"], "--size must be a multiple of 32, not 33"),
        (["segment", "--data", "ade", "--classes", "1"], "--classes must be 2 or more, not 1"),
        (["segment", "--data", "ade", "--classes", "2"], "0.png has the class 5: --classes 2 is too few"),
        (["segment", "--data", "ade", "--batch", "9"], "2 images are too few for a batch of 9: lower --batch"),
        (["segment", "--data", "ade", "--model", "fastvit_t9"], "unknown model 'fastvit_t9'"),
        (["segment", "--data", "ade", "--checkpoint", "cut.pt"], "cut.pt: damaged or not written by torch.save"),
        (["segment", "--data", "ade", "--checkpoint", "list.pt"], "list.pt: holds a list where named tensors"),
        (["segment", "--data", "ade", "--batch", "2", "--resume"], "nothing to resume in new"),
        (["segment", "--data", "ade", "--batch", "2", "--output", "cut.pt"], "cut.pt is a file, not a folder"),
        (["segment", "--data", "ade", "--device", "abacus"], "there is no device 'abacus' here"),
        (["segment", "--data", "other"], "1.png ((16, 32), L) is no map of classes for an image of (32, 32)"),
        (["hands", "--recipe", "tiny", "--batch", "1"], "--batch must be 2 or more: the head has a BatchNorm"),
        (["hands", "--recipe", "tiny", "--mano", "none.pkl"], "none.pkl does not exist"),
        (["hands", "--recipe", "tiny", "--workers", "-1"], "--workers must be 0 or more, not -1"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    scenes: list[Scene],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ade", "other":
        write_ade(scenes, Path(name))
    Image.new("L", (16, 32)).save("other/annotations/training/0001.png")
    torch.save([1], "list.pt")
    Path("cut.pt").write_bytes(Path("list.pt").read_bytes()[:-99])
    folder = Path("half/images/training")
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    command, *options = arguments
    assert main([command, "--output", "new", "--model", "fastvit_digits", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not Path("new").exists()
    assert segmentation.PAPER.updates == 40_000


@pytest.mark.parametrize("command", ["segment --recipe tiny", "train --recipe digits"])
def test_a_missing_package_is_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "sklearn", "sklearn.datasets":
        monkeypatch.setitem(sys.modules, name, None)
    assert main([*command.split(), "--output", str(tmp_path / "new")]) == 2
    captured = capsys.readouterr().err
    assert "sklearn" in captured
    assert captured.endswith(": pip install 'reparamc[zoo]' brings what this needs\n")
    assert not (tmp_path / "new").exists()


def test_a_task_runs_in_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["segment", "--output", "new", "--recipe", "tiny"]) == 2
    assert capsys.readouterr().err == "fastvit_zoo: error: segment runs in one process: start it without torchrun\n"


def test_the_hand_turns_about_its_joints() -> None:
    hand = load_hand(None)
    straight = torch.eye(3).repeat(1, 16, 1, 1)
    vertices, joints = hand(straight, torch.zeros(1, 10))
    torch.testing.assert_close(vertices[0], hand.template)
    torch.testing.assert_close(joints[0, 0], torch.zeros(3))
    bent = straight.clone()
    bent[0, 2] = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # the middle joint of the index finger
    _, moved = hand(bent, torch.zeros(1, 10))
    changed = (moved - joints)[0].norm(dim=1) > 1e-6
    assert changed.nonzero()[:, 0].tolist() == [7, 8]
    torch.testing.assert_close((moved[0, 8] - moved[0, 6]).norm(), (joints[0, 8] - joints[0, 6]).norm())
    torch.testing.assert_close((moved[0, 8] - moved[0, 6]) @ (joints[0, 8] - joints[0, 6]), torch.tensor(0.0))
    _, longer = hand(straight, torch.eye(10)[:1] * 2)
    torch.testing.assert_close(longer, 1.2 * joints)


class Chumpy:
    """Pickled as an array of the package chumpy is."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x


def test_the_file_of_mano(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = stand_in()
    np.savez(tmp_path / "hand.npz", **arrays)  # pyright: ignore[reportArgumentType]
    module = ModuleType("chumpy.ch")
    monkeypatch.setitem(sys.modules, "chumpy", module)
    monkeypatch.setitem(sys.modules, "chumpy.ch", module)
    monkeypatch.setattr(Chumpy, "__module__", "chumpy.ch")
    module.Chumpy = Chumpy  # pyright: ignore[reportAttributeAccessIssue]
    content = {**arrays, "shapedirs": Chumpy(arrays["shapedirs"])}
    (tmp_path / "hand.pkl").write_bytes(pickle.dumps(content, protocol=2))
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"v_template": Path.unlink}))
    monkeypatch.setattr(mano, "TIPS", (16, 17, 18, 19, 20))
    for name in "hand.npz", "hand.pkl":
        torch.testing.assert_close(load_hand(tmp_path / name).shapes, load_hand(None).shapes)
    with pytest.raises(ValueError, match=r"evil\.pkl is not a file of MANO: .* is no array"):
        load_hand(tmp_path / "evil.pkl")
    with pytest.raises(ValueError, match=r"not a model of a hand: posedirs is missing, not \(21, 3, 135\)"):
        mano.Hand({**{k: v for k, v in arrays.items() if k != "posedirs"}})
    with pytest.raises(FileNotFoundError, match="comes from the authors of MANO"):
        load_hand(tmp_path / "none.pkl")


def test_aligned_errors_forget_rotation_scale_and_shift() -> None:
    torch.manual_seed(0)
    known = torch.randn(2, 21, 3, dtype=torch.float64)
    turn = rotations(torch.randn(2, 6, dtype=torch.float64))
    assert aligned_error(0.3 * known @ turn + 5, known).max() < 1e-9
    mirrored = known * torch.tensor([-1.0, 1, 1], dtype=torch.float64)
    assert aligned_error(mirrored, known).min() > 0.1
    noisy = known + torch.randn_like(known)
    assert (aligned_error(noisy, known) < (noisy - known).norm(dim=2).mean(1)).all()


def test_hands_of_freihand(tmp_path: Path) -> None:
    joints = torch.zeros(2, 21, 3)
    joints[:, :, 2] = 0.5
    joints[1, 4, 0] = 0.1
    (tmp_path / "training" / "rgb").mkdir(parents=True)
    (tmp_path / "training_xyz.json").write_text(json.dumps(joints.tolist()))
    (tmp_path / "training_K.json").write_text(json.dumps([[[100, 0, 20], [0, 100, 20], [0, 0, 1]]] * 2))
    for i in range(4):
        Image.new("RGB", (40, 40)).save(tmp_path / "training" / "rgb" / f"{i:08}.jpg")
    dataset = Images(tmp_path, 32)
    image, known, places = dataset[3]
    assert (len(dataset), tuple(image.shape)) == (4, (3, 32, 32))
    torch.testing.assert_close(known[4], torch.tensor([0.1, 0, 0]))
    torch.testing.assert_close(places[[0, 4]], torch.tensor([[0.0, 0], [1, 0]]))


def test_a_hand_net_fuses_as_a_whole() -> None:
    torch.manual_seed(0)
    network = HandNet(Maps(), 8).eval()  # pyright: ignore[reportArgumentType]
    image = torch.randn(2, 3, 64, 64)
    randomize_batchnorm(network, 0, image)
    fused = reparamc.fuse_fx(network, image)
    assert not [m for m in fused.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    with torch.no_grad():
        assert difference(fused(image), network(image)) < 1e-4
