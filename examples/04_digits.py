"""Train a small FastViT on handwritten digits, alone or in several processes, and deploy its fused form.

    python examples/04_digits.py
    torchrun --nproc-per-node 2 examples/04_digits.py

DistributedDataParallel, gradient accumulation and an exponential moving average of the weights. After every epoch each
process fuses the averaged network, without a search from the second time on, and validates that: the results are
equal. The first process exports the fused form at last, and compares its predictions in ONNX Runtime. On GPUs, convert
BatchNorms by `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, which has no CPU form: there, the statistics are those of
the first process, which DistributedDataParallel hands to all. Needs scikit-learn, for the images.
"""

import copy
import os
import tempfile
from pathlib import Path
from time import perf_counter

import onnxruntime
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import reparamc
from fastvit_zoo.model import Config, FastViT

EPOCHS, BATCH, ACCUMULATED, DECAY = 5, 64, 2, 0.9
SMALL = Config(depths=(1, 1, 1, 1), dims=(12, 24, 48, 96), mlp_ratio=2, attention=False, layer_scale_init=0.1)


def images() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return F.interpolate(x, size=32, mode="bilinear")[order], torch.tensor(digits.target)[order]


def seconds(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        model(x)
        start = perf_counter()
        model(x)
        return perf_counter() - start


def main() -> None:
    many = "WORLD_SIZE" in os.environ
    if many:
        dist.init_process_group("gloo")
    rank, size = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = images()
    x_test, y_test, x, y = x[:360], y[:360], x[360 + rank :: size], y[360 + rank :: size]
    network = FastViT(SMALL, num_classes=10, in_channels=1)
    model = DistributedDataParallel(network) if many else network
    average = copy.deepcopy(network)
    fuser = reparamc.Fuser(average, x[:2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    steps = min(len(part) for part in torch.arange(360, 1797).chunk(size)) // (BATCH // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, EPOCHS * (steps // ACCUMULATED) + EPOCHS)
    accuracy = 0.0
    for epoch in range(EPOCHS):
        model.train()
        losses = []
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for step in range(steps // ACCUMULATED):
            for part in range(ACCUMULATED):
                at = (step * ACCUMULATED + part) * (BATCH // size)
                chosen = order[at : at + BATCH // size]
                if many:
                    model.require_backward_grad_sync = part == ACCUMULATED - 1
                loss = F.cross_entropy(model(x[chosen]), y[chosen], label_smoothing=0.05) / ACCUMULATED
                loss.backward()
                losses.append(loss.item() * ACCUMULATED)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            with torch.no_grad():
                for kept, new in zip(average.parameters(), network.parameters(), strict=True):
                    kept.lerp_(new, 1 - DECAY)
                for kept, new in zip(average.buffers(), network.buffers(), strict=True):
                    kept.copy_(new)
        if many:  # the statistics of the first process, as DistributedDataParallel hands them out before a forward pass
            for buffer in average.buffers():
                dist.broadcast(buffer, 0)
        fused = fuser()
        with torch.no_grad():
            accuracy = (fused(x_test).argmax(1) == y_test).float().mean().item()
        if many:
            found: list[float] = [0.0] * size
            dist.all_gather_object(found, accuracy)
            assert len(set(found)) == 1, found
        if rank == 0:
            slow, fast = seconds(average.eval(), x_test), seconds(fused, x_test)
            print(
                f"epoch {epoch}: loss {sum(losses) / len(losses):.3f} {'#' * int(20 * sum(losses) / len(losses))}\n"
                f"         accuracy {accuracy:.3f}; {1000 * slow:.0f} ms unfused, {1000 * fast:.0f} ms fused; "
                f"searched {fuser.searches} times",
                flush=True,
            )
    if rank == 0:
        deploy(fuser(), x_test)
    assert accuracy > 0.8
    assert fuser.searches <= 2
    if many:
        dist.destroy_process_group()


def deploy(fused: nn.Module, x: Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.onnx"
        torch.onnx.export(fused, (x,), str(path), dynamo=False, input_names=["image"], opset_version=17)
        (scores,) = onnxruntime.InferenceSession(str(path)).run(None, {"image": x.numpy()})
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(scores).argmax(1), fused(x).argmax(1))
    print("exported: the same predictions in ONNX Runtime")


if __name__ == "__main__":
    main()
