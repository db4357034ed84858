"""torch.compile, Lightning and transformers, each with the real package."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fx_checks import ready
from test_fuser import X, block
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastvit_zoo.torchvision_operators  # noqa: F401
from reparamc import Fuser, fuse_fx
from reparamc.training.backend import backend
from reparamc.training.callbacks import lightning_callback, transformers_callback

X32 = X.float()


@pytest.fixture
def model() -> Any:
    return ready(block()).float()


def test_the_backend_fuses_what_is_compiled(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.fx.GraphModule] = []
    monkeypatch.setattr("reparamc.training.backend.fuse_fx", lambda *a, **k: seen.append(fuse_fx(*a, **k)) or seen[-1])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, options={"inner": "eager"})
    with torch.no_grad():
        expected = model(X32)
        torch.testing.assert_close(compiled(X32), expected, rtol=1e-4, atol=1e-5)
    assert seen[0].meta["reparamc"].after.batchnorm == 0
    compiled(X32).sum().backward()  # gradients are recorded: nothing is frozen
    assert model.a[0].weight.grad is not None
    assert len(seen) == 1


def test_what_is_fused_can_be_compiled(model: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(fuse_fx(model, X32), backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(X32), model(X32), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_lightning_validates_the_fused_form(model: Any, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    seen: list[nn.Module] = []

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return self.model(batch[0]).square().mean()

        def validation_step(self, batch: list[Tensor], _: int) -> None:
            seen.append(self.model)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = DataLoader(TensorDataset(X32), batch_size=3)
    callback = lightning_callback(X32)
    trainer = lightning.Trainer(
        max_epochs=2, callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    task = Task()
    trainer.fit(task, data, data)
    assert task.model is model
    assert len({id(m) for m in seen}) == 1
    assert not any(isinstance(m, nn.BatchNorm2d) for m in seen[0].modules())
    with torch.no_grad():
        torch.testing.assert_close(callback.fuser()(X32), copy.deepcopy(model).eval()(X32), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_transformers_saves_the_fused_form(model: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            y = self.model(x)
            return {"loss": y.square().mean(), "logits": y}

    task = Task()
    callback = transformers_callback({"x": X32})
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = [{"x": x, "labels": torch.tensor(0)} for x in X32]
    transformers.Trainer(task, arguments, train_dataset=data, callbacks=[callback]).train()
    assert (tmp_path / "checkpoint-2" / "fused.pt").exists()
    with torch.no_grad():
        expected = copy.deepcopy(task).eval()(X32)["logits"]
        torch.testing.assert_close(callback.fused(x=X32)["logits"], expected, rtol=1e-4, atol=1e-5)


def test_timm_validates_the_averaged_weights(timm: Any) -> None:
    """The steps of its train.py."""
    from timm.optim._optim_factory import create_optimizer_v2
    from timm.utils.model_ema import ModelEmaV3

    network = timm.create_model("test_byobnet", num_classes=5).train()
    average = ModelEmaV3(network, decay=0.5)
    fuser = Fuser(average.module, torch.randn(2, 3, 48, 48), verify="region")
    optimizer = create_optimizer_v2(network, opt="adamw", lr=1e-3, weight_decay=0.05)
    x = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    for step in range(2):
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()
        average.update(network, step=step)
        expected = copy.deepcopy(average.module).eval()
        with torch.no_grad():
            torch.testing.assert_close(fuser()(x), expected(x), rtol=1e-4, atol=1e-5)
    assert fuser.searches <= 2
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fuser().modules())
