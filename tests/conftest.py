"""What several folders of tests share."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Operators last only as long as the library object that declared them.
_declared: list[Any] = []


def _declare_torchvision_operators() -> None:
    """Declare the two operators without which torchvision cannot be imported.

    They come with its compiled library, whose CUDA builds do not load beside a CPU build of PyTorch. None
    of the models tested here calls them.
    """
    import torch

    torchvision = importlib.util.find_spec("torchvision")
    if _declared or torchvision is None or torchvision.origin is None:
        return
    for compiled in Path(torchvision.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(compiled)
        except OSError:
            continue
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """The package timm; tests that ask for it are skipped where it is not installed."""
    pytest.importorskip("torch")
    _declare_torchvision_operators()
    return pytest.importorskip("timm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="write the verdicts of the golden cases anew")
