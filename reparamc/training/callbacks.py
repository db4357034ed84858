"""Callbacks for training frameworks, which are imported when one is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from reparamc.training.fuser import Fuser


def lightning_callback(example_inputs: Any, attribute: str = "model", **options: Any) -> Any:
    """A callback of Lightning that validates and tests the fused form.

    Args:
        example_inputs: as for `Fuser`.
        attribute: where the LightningModule holds the network that its ``validation_step`` calls.
        options: those of `Fuser`.
    """
    from lightning import Callback  # pyright: ignore[reportMissingImports]

    class FusedValidation(Callback):
        fuser: Fuser | None = None
        trained: nn.Module | None = None

        def put(self, trainer: Any, module: Any) -> None:
            trained: nn.Module = getattr(module, attribute)
            self.trained, self.fuser = trained, self.fuser or Fuser(trained, example_inputs, **options)
            setattr(module, attribute, self.fuser())

        def take_back(self, trainer: Any, module: Any, error: Any = None) -> None:
            if self.trained is not None:
                setattr(module, attribute, self.trained)
                self.trained = None

        on_validation_start = on_test_start = put
        on_validation_end = on_test_end = on_exception = take_back

    return FusedValidation()


def transformers_callback(example_inputs: Any, **options: Any) -> Any:
    """A ``TrainerCallback`` of Hugging Face: each checkpoint gets ``fused.pt``, the weights of the fused form.

    ``callback.fused`` is the fused form as of the last evaluation or checkpoint.
    """
    from transformers import TrainerCallback  # pyright: ignore[reportMissingImports]

    class FusedCheckpoints(TrainerCallback):
        fuser: Fuser | None = None
        fused: nn.Module | None = None

        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.fuser = self.fuser or Fuser(model, example_inputs, **options)
            self.fused = self.fuser()

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.on_evaluate(args, state, control, model)
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if state.is_world_process_zero and self.fused is not None:
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(self.fused.state_dict(), folder / "fused.pt")

    return FusedCheckpoints()
