"""Train the multi-branch form, validate the fused form: `python examples/02_validate_while_training.py`.

After every epoch the network is fused into a copy. The copy is what will be deployed, and it validates
faster; the network itself stays as it is and goes on training. The data are synthetic: which quarter of
a noisy image is the brightest.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reparamc


class Block(nn.Module):
    """conv 3x3 + conv 1x1 + skip connection, each with its own BatchNorm, as in RepVGG."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv3 = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))
        self.conv1 = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(x) + self.conv1(x)
        if self.skip is not None:
            y = y + self.skip(x)
        return F.relu(y)


def network() -> nn.Module:
    return nn.Sequential(
        Block(1, 16, 2), Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip


def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(4, (size,), generator=generator)
    images = torch.randn(size, 1, 32, 32, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = 16 * (label // 2), 16 * (label % 2)
        image[:, top : top + 16, left : left + 16] += 0.3
    return images, labels


def main() -> None:
    torch.manual_seed(0)
    data = torch.Generator().manual_seed(1)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, labels = batch(256, data)
    accuracy = 0.0
    for epoch in range(3):
        model.train()
        for _ in range(10):
            x, y = batch(32, data)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        model.eval()
        fused = reparamc.fuse_fx(model, images[:2])  # also runs both on these images and compares them
        with torch.no_grad():
            scores, expected = fused(images), model(images)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
        accuracy = (scores.argmax(1) == labels).float().mean().item()
        report = fused.meta["reparamc"]
        print(
            f"epoch {epoch}: accuracy {accuracy:.2f}; {report.before.ops} operators fused into {report.after.ops}, "
            f"largest difference {(scores - expected).abs().max():.1e}"
        )
        assert (report.after.conv, report.after.batchnorm) == (4, 0)
    assert accuracy > 0.5


if __name__ == "__main__":
    main()
