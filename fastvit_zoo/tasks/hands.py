"""A 3D hand from one image: a regression head on the last map gives a camera, and pose and shape for a hand model."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F

import reparamc
from fastvit_zoo.model import Backbone
from fastvit_zoo.options import Options
from fastvit_zoo.tasks.fit import backbone, deploy, fit, opened, place, source
from fastvit_zoo.tasks.mano import Hand, load_hand
from fastvit_zoo.tasks.steps import Steps

PAPER = Steps(updates=100 * 4070, batch=32, lr=1e-4, schedule="multistep", milestones=(0.5,), size=224)
TINY = Steps(updates=300, batch=8, lr=2e-3, schedule="multistep", milestones=(0.7, 0.9), size=64)
MEAN, STD = np.array((0.485, 0.456, 0.406), np.float32), np.array((0.229, 0.224, 0.225), np.float32)

BONES = tuple((0 if i % 4 == 1 else i - 1, i) for i in range(1, 21))


class HandNet(nn.Module):
    """Images (B, 3, H, W) -> camera (B, 3), pose (B, 16, 6), shape (B, 10).

    The camera is a scale and a shift: a point (x, y, z) is seen at scale * (x, y) + shift, in halves of the image. Each
    of the 16 rotations is given by its first two columns.
    """

    def __init__(self, maps: Backbone, width: int = 1024) -> None:
        super().__init__()
        self.backbone = maps
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(1),
            nn.Linear(maps.feature_info.channels()[-1], width),
            nn.BatchNorm1d(width),
            nn.GELU(),
            nn.Linear(width, 3 + 16 * 6 + 10),
        )
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=0.01)
        with torch.no_grad():
            straight = torch.tensor([1.0, 0, 0, 0, 1, 0]).repeat(16)
            last.bias.copy_(torch.cat([torch.tensor([5.0, 0, 0]), straight, torch.zeros(10)]))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        camera, pose, shape = self.head(self.backbone(image)[-1]).split((3, 96, 10), 1)
        return camera, pose.unflatten(1, (16, 6)), shape


def rotations(columns: Tensor) -> Tensor:
    """Two columns each (..., 6) -> the rotation matrices (..., 3, 3) nearest to them by Gram and Schmidt."""
    first = F.normalize(columns[..., :3], dim=-1)
    second = columns[..., 3:] - (first * columns[..., 3:]).sum(-1, keepdim=True) * first
    second = F.normalize(second, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], -1)


def seen(joints: Tensor, camera: Tensor) -> Tensor:
    """Points (B, N, 3) as they are seen by a weak-perspective camera (B, 3): (B, N, 2), from -1 to 1."""
    return camera[:, None, :1] * joints[..., :2] + camera[:, None, 1:]


def aligned_error(found: Tensor, known: Tensor) -> Tensor:
    """The mean distance of points (B, N, 3) after the best rotation, scale and shift: PA-MPJPE, (B,)."""
    found, known = found - found.mean(1, keepdim=True), known - known.mean(1, keepdim=True)
    left, sizes, right = torch.linalg.svd(found.mT @ known)
    sign = torch.ones_like(sizes)
    sign[:, -1] = torch.det(left @ right).sign()
    scale = (sizes * sign).sum(1) / found.square().sum((1, 2))
    turned = found @ (left * sign[:, None]) @ right * scale[:, None, None]
    return (turned - known).norm(dim=-1).mean(1)


def numbers(file: Path, *shape: int) -> Tensor:
    """What a JSON file has for every hand, (N, *shape). Raises FileNotFoundError or ValueError."""
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: the layout is that of FreiHAND")
    try:
        found = torch.tensor(json.loads(file.read_text()), dtype=torch.float32)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is no list of {shape} numbers: {str(error).splitlines()[0]}") from error
    if found.shape[1:] != shape or not found.isfinite().all():
        raise ValueError(f"{file} has {tuple(found.shape)} numbers, not {shape} for every hand")
    return found


class Images(torch.utils.data.Dataset):
    """A half of FreiHAND: images, joints in metres from the wrist, and where they are seen, from -1 to 1.

    Raises OSError if a file is missing, ValueError if the numbers of images and hands do not fit.
    """

    def __init__(self, root: Path, size: int, split: str = "training") -> None:
        self.joints, self.cameras = numbers(root / f"{split}_xyz.json", 21, 3), numbers(root / f"{split}_K.json", 3, 3)
        self.files = sorted((root / split / "rgb").glob("*.jpg"))
        self.size = size
        if not self.files or len(self.files) % len(self.joints) or len(self.joints) != len(self.cameras):
            counts = f"{len(self.files)} images, {len(self.joints)} hands and {len(self.cameras)} cameras"
            raise ValueError(f"{root} has {counts} for {split}: the layout is that of FreiHAND")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        # The same hands come again with other backgrounds.
        joints, camera = self.joints[index % len(self.joints)], self.cameras[index % len(self.joints)]
        picture = opened(self.files[index]).convert("RGB")
        points = joints @ camera.T
        places = points[:, :2] / points[:, 2:] / torch.tensor(picture.size) * 2 - 1
        pixels = np.asarray(picture.resize((self.size, self.size)), np.float32) / 255
        image = torch.from_numpy(((pixels - MEAN) / STD).transpose(2, 0, 1))
        return image, joints - joints[:1], places


def write_strokes(count: int, folder: Path, size: int, seed: int = 0) -> None:
    """Hands of the stand-in with random fingers, drawn as strokes over digits, in the layout of FreiHAND."""
    from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]

    loaded: Any = load_digits()
    digits, random = loaded.images * 6, np.random.RandomState(seed)
    generator = torch.Generator().manual_seed(seed)
    hand = load_hand(None)
    columns = torch.tensor([1.0, 0, 0, 0, 1, 0]).repeat(count, 16, 1)
    columns = columns + 0.25 * torch.randn(count, 16, 6, generator=generator)
    with torch.no_grad():
        _, joints = hand(rotations(columns), torch.randn(count, 10, generator=generator))
    far, focal = 1.0, 2.2 * size
    joints = joints + torch.tensor([0, -0.08, far])
    camera = [[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]]
    (folder / "training" / "rgb").mkdir(parents=True, exist_ok=True)
    for i, points in enumerate(joints):
        digit = digits[random.randint(len(digits))].astype(np.uint8)
        ground = Image.fromarray(digit).resize((size, size)).convert("RGB")
        draw = ImageDraw.Draw(ground)
        places = (points[:, :2] / points[:, 2:] * focal + size / 2).tolist()
        for a, b in BONES:
            shade = int(230 - 25 * ((b - 1) // 4))
            draw.line([*places[a], *places[b]], fill=(shade, 255 - shade // 2, 60 + 8 * b), width=2)
        ground.save(folder / "training" / "rgb" / f"{i:08}.jpg", quality=95)
    (folder / "training_xyz.json").write_text(json.dumps(joints.tolist()))
    (folder / "training_K.json").write_text(json.dumps([camera] * count))


def measure(network: nn.Module, hand: Hand, dataset: Any) -> float:
    """PA-MPJPE in millimetres."""
    errors, device = [], place(network)
    with torch.no_grad():
        for image, joints, _ in torch.utils.data.DataLoader(dataset, 8):
            _, pose, shape = network(image.to(device))
            errors.append(aligned_error(hand(rotations(pose), shape)[1].cpu(), joints))
    return 1000 * torch.cat(errors).mean().item()


def hands(
    name: str, data: Path | None, options: Options, *, tiny: bool = False, mano: Path | None = None, **changes: Any
) -> dict[str, float]:
    """Train a `HandNet`, measure both forms, and write `model.pt` and the fused `model.onnx`.

    They are measured on the half for evaluation, or if it is not there on the images that were trained on. `tiny`
    over-fits 16 hands of strokes, or `data`, with the stand-in. Raises ValueError or OSError if the data, the
    checkpoint, the hand or the run in the output folder do not fit.
    """
    steps = replace(TINY if tiny else PAPER, **changes)
    if not tiny and mano is None:
        raise ValueError("no model of a hand: give --mano FILE (MANO_RIGHT.pkl), or --recipe tiny")
    if steps.batch < 2:
        raise ValueError("--batch must be 2 or more: the head has a BatchNorm")
    hand = load_hand(mano).to(options.device)
    strokes = partial(write_strokes, 16, size=steps.size) if tiny and data is None else None
    with source(data, strokes) as root:
        training = Images(root, steps.size)
        evaluated = Images(root, steps.size, "evaluation") if (root / "evaluation_xyz.json").exists() else training
        torch.manual_seed(steps.seed)
        network = HandNet(backbone(name, options.checkpoint), 256 if tiny else 1024)

        def loss(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            image, known, places = batch
            camera, pose, shape = (part.float() for part in network(image))
            with torch.autocast(image.device.type, enabled=False):  # millimetres need all digits
                _, found = hand(rotations(pose), shape)
                found = found - found[:, :1]
                away = F.l1_loss(seen(found, camera), places)
                return 20 * F.l1_loss(found, known) + away + 1e-4 * shape.square().mean()

        losses = fit(network, loss, training, steps, options, about={"task": "hands", "model": name})
        images = torch.stack([evaluated[i % len(evaluated)][0] for i in range(2)])
        fused = reparamc.fuse_fx(network, images.to(place(network)))
        found = {"PA-MPJPE mm": network, "PA-MPJPE mm fused": fused}
        figures = {name: measure(form, hand, evaluated) for name, form in found.items()}
    outputs = ("camera", "pose", "shape")
    error = deploy(fused, options.output / "model.onnx", images[:1], outputs)
    return {"loss": losses[-1], **figures, "error in ONNX Runtime": error}
