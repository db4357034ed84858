"""A few steps of training, and the fused network that would be deployed: `python examples/03_guard/train.py`.

The data are synthetic: which of five stripes of a noisy image is the brightest.
"""

import torch
from tiny_net import TinyNet
from torch import Tensor
from torch.nn import functional as F

import reparamc


def batch(generator: torch.Generator, size: int = 64) -> tuple[Tensor, Tensor]:
    labels = torch.randint(5, (size,), generator=generator)
    images = torch.randn(size, 3, 20, 20, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[label % 3, 4 * label : 4 * label + 4] += 2
    return images, labels


def main(steps: int = 30) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net = TinyNet()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for step in range(steps):
        images, labels = batch(generator)
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1:>3}   loss {loss.item():.3f}")
    images, labels = batch(generator, 256)
    fused = reparamc.fuse_fx(net.eval(), images)
    with torch.no_grad():
        right = (fused(images).argmax(1) == labels).double().mean().item()
    counts = fused.meta["reparamc"]
    print(f"fused      {counts.before.ops} operators became {counts.after.ops}, accuracy {right:.2f}")


if __name__ == "__main__":
    main()
