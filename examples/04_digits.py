"""Train a small FastViT on handwritten digits, alone or in several processes, and deploy its fused form.

    python examples/04_digits.py
    torchrun --nproc-per-node 2 examples/04_digits.py

DistributedDataParallel, BatchNorm over the batch of all processes, gradient accumulation and an exponential moving
average of the weights. After every epoch each process fuses the averaged network, without a search once the weights
have moved, and validates that: the results are equal. One process and several take the same steps, to rounding. At the
end the first process writes digits.onnx and digits.png, and compares predictions with ONNX Runtime. Needs scikit-learn
for the images, and matplotlib for the plot.
"""

import copy
import os
import sys
from datetime import timedelta
from time import perf_counter
from typing import Any

import onnxruntime
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import reparamc
from fastvit_zoo.model import Config, FastViT

BATCH, ACCUMULATED, DECAY = 64, 2, 0.9
SMALL = Config(depths=(1, 1, 1, 1), dims=(12, 24, 48, 96), mlp_ratio=2, attention=False, layer_scale_init=0.1)
Row = dict[str, float]


class Summed(torch.autograd.Function):
    """A tensor, summed over all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return Summed.apply(gradient)


class SyncedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batch of all processes, of equal sizes. `torch.nn.SyncBatchNorm` does that on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        sums = Summed.apply(torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])) / dist.get_world_size()
        mean, variance = sums[0], sums[1] - sums[0].square()
        count = x[:, 0].numel() * dist.get_world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        factor = self.weight * (variance + self.eps).rsqrt()
        return x * factor[:, None, None] + (self.bias - mean * factor)[:, None, None]


def synced(module: nn.Module) -> nn.Module:
    """``module`` with each BatchNorm synchronised."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            norm = SyncedBatchNorm(child.num_features, child.eps, child.momentum)
            norm.load_state_dict(child.state_dict())
            setattr(module, name, norm)
        else:
            synced(child)
    return module


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    held = load_digits()
    x = torch.tensor(held.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return F.interpolate(x, size=32, mode="bilinear")[order], torch.tensor(held.target)[order]


@torch.no_grad()
def validate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """The accuracy, and the milliseconds per image."""
    start = perf_counter()
    found = model(x).argmax(1)
    return (found == y).float().mean().item(), 1000 * (perf_counter() - start) / len(x)


def train(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, epochs: int = 5) -> tuple[list[Row], nn.Module]:
    """What each epoch measured, and the fused network. Each process takes its part of every batch."""
    many = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
    torch.manual_seed(0)
    network = synced(FastViT(SMALL, num_classes=10, in_channels=x.shape[1]))
    model = DistributedDataParallel(network) if many else network
    average = copy.deepcopy(network).eval()
    fuser = reparamc.Fuser(average, x[:2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    steps = len(x) // (BATCH * ACCUMULATED)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * steps)
    history = []
    for epoch in range(epochs):
        model.train()
        total = torch.zeros(())
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for chosen in order[: steps * ACCUMULATED * BATCH].view(steps, ACCUMULATED, BATCH):
            for number, batch in enumerate(chosen[:, rank::size]):
                if many:
                    model.require_backward_grad_sync = number == ACCUMULATED - 1
                loss = F.cross_entropy(model(x[batch]), y[batch], label_smoothing=0.05) / ACCUMULATED
                loss.backward()
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            with torch.no_grad():
                for kept, new in zip(average.parameters(), network.parameters(), strict=True):
                    kept.lerp_(new, 1 - DECAY)
                for kept, new in zip(average.buffers(), network.buffers(), strict=True):
                    kept.copy_(new)
        if many:
            dist.all_reduce(total)
        accuracy, slow = validate(average, x_test, y_test)
        fused_accuracy, fast = validate(fuser(), x_test, y_test)
        found: list[Any] = [(accuracy, fused_accuracy)] * size
        if many:
            dist.all_gather_object(found, (accuracy, fused_accuracy))
        assert len(set(found)) == 1, f"the processes differ: {found}"
        row = {"loss": total.item() / steps / size, "accuracy": accuracy, "fused accuracy": fused_accuracy,
               "ms": slow, "fused ms": fast, "searches": fuser.searches}  # fmt: skip
        history.append(row)
        if rank == 0:
            print(f"epoch {epoch}: " + ", ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    return history, fuser()


def plot(history: list[Row]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(12, 3.5), layout="tight")
    names = ["loss"], ["accuracy", "fused accuracy"], ["ms", "fused ms"]
    for axes, lines, label in zip(figure.subplots(1, 3), names, ("loss", "accuracy", "ms per image"), strict=True):
        for name in lines:
            axes.plot([row[name] for row in history], label=name)
        axes.set(xlabel="epoch", ylabel=label, ylim=(0, None))
        axes.legend()
    figure.savefig("digits.png")


def deploy(fused: nn.Module, x: Tensor) -> None:
    torch.onnx.export(fused, (x,), "digits.onnx", dynamo=False, input_names=["image"], opset_version=17)
    (scores,) = onnxruntime.InferenceSession("digits.onnx").run(None, {"image": x.numpy()})
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(scores).argmax(1), fused(x).argmax(1))
    print("exported: the same predictions in ONNX Runtime")


def main() -> None:
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(minutes=1))
    x, y = digits()
    try:
        history, fused = train(x[360:], y[360:], x[:360], y[:360])
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        sys.exit(f"process {dist.get_rank()} stops, for another one does not answer: {str(error).splitlines()[0]}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        plot(history)
        deploy(fused, x[:360])
    assert history[-1]["fused accuracy"] > 0.8
    assert history[-1]["searches"] <= 2
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
