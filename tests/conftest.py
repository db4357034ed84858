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


KNOWN_GAPS = {
    "the rank of the input is fixed by nothing but the caller": [
        "test_fx_layout.py::test_norm_of_a_conv_and_layouts_behind[False-norm behind flatten]",
        "test_fx_layout.py::test_norm_of_a_conv_and_layouts_behind[False-unflatten]",
        "test_cases.py::test_host_graph[bn-folding/behind-through-layouts-fx]",
        "test_cases.py::test_host_graph[bn-folding/front-through-layouts-fx]",
        "test_cases.py::test_host_graph[layout-cancelling/reshape-and-back-fx]",
    ],
    "a chain of writes into a value that something else made is left alone": [
        "test_fx_inplace.py::test_harmless_writes_do_not_hinder[grown]",
    ],
    "one wrong weight is within the rounding of bfloat16": [
        "test_fx_verify.py::test_wrong_splice[one weight doubled-torch.bfloat16]",
    ],
}
"""Folds that are not made yet, and a fault that is not seen yet; no wrong result is among them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for reason, prefixes in KNOWN_GAPS.items():
            if any(prefix in item.nodeid for prefix in prefixes):
                item.add_marker(pytest.mark.xfail(reason=reason, strict="rounding" not in reason))
