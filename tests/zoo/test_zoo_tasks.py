"""Dense tasks: scenes, readers, networks, figures. Training itself is tried by hand; the pages say with what result."""

import json
import pickle
import sys
from pathlib import Path
from types import ModuleType

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
from fastvit_zoo.tasks import mano, segmentation
from fastvit_zoo.tasks.fit import Steps, backbone, difference, fit, forever
from fastvit_zoo.tasks.hands import HandNet, Images, aligned_error, rotations
from fastvit_zoo.tasks.mano import load_hand, stand_in
from fastvit_zoo.tasks.pyramid import Pyramid
from fastvit_zoo.tasks.scenes import Scene, write_ade, write_coco
from fastvit_zoo.tasks.segmentation import UNLABELLED, Folders, SemanticFPN, mean_iou
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
    image, labels = Folders(tmp_path, False, 32)[1]
    assert image.shape == (3, 32, 32)
    assert (labels == 5).sum() == scenes[1].masks[0].sum()
    assert (labels == 0).sum() == (~scenes[1].masks[0]).sum()
    torch.manual_seed(3)
    image, labels = Folders(tmp_path, True, 48)[0]
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

    def oracle(images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        (which,) = [i for i in range(2) if torch.equal(images[0], dataset[i][0])]
        known = dataset[which][1]
        masks = known["masks"][:, None].float()
        return [{"boxes": known["boxes"], "labels": known["labels"], "scores": torch.ones(1), "masks": masks}]

    figures = average_precision(oracle, dataset)  # pyright: ignore[reportArgumentType]
    assert all(value == pytest.approx(100) for value in figures.values())


def test_mean_iou_counts_what_is_labelled() -> None:
    labels = torch.tensor([[0, 0, 1, 1], [1, 1, UNLABELLED, UNLABELLED]])
    found = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 2]])
    network = torch.nn.Identity()
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


def test_a_pyramid_has_strides() -> None:
    with torch.device("meta"):
        maps = Pyramid(backbone("fastvit_digits", None), 8, extra=True)(torch.empty(1, 3, 64, 64))
    assert [tuple(one.shape[1:]) for one in maps] == [(8, side, side) for side in (16, 8, 4, 2, 1)]


def test_fitting_moves_the_weights_to_what_lowers_the_loss() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    steps = Steps(updates=100, batch=2, lr=0.2, weight_decay=0)
    data = [torch.tensor([float(i)]) for i in range(4)]
    losses = fit(layer, lambda x: (layer(x) - 3 * x).square().mean(), forever(data, steps), steps)
    assert len(losses) == 100
    assert abs(layer.weight.item() - 3) < 0.1
    assert not layer.training
    with pytest.raises(ValueError, match="4 images are too few for a batch of 9"):
        next(forever(data, Steps(updates=1, batch=9, lr=1.0)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["segment"], "no images: give --data DIR, or --recipe tiny"),
        (["segment", "--data", "none"], "none/images/training has no images"),
        (["segment", "--data", "half"], "0.png is missing: every image has an annotation of its name"),
        (["hands"], "no model of a hand: give --mano FILE"),
        (["hands", "--recipe", "tiny", "--data", "half"], "training_xyz.json does not exist: the layout is that of Fr"),
        (["detect"], "no images: give --data DIR, or --recipe tiny"),
        (["detect", "--data", "half"], "instances_train2017.json does not exist: the layout is that of COCO"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("half/images/training")
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    assert main([*arguments, "--output", "new"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not Path("new").exists()
    assert segmentation.PAPER.updates == 40_000


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
