"""What several folders of tests share."""

from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """The package timm; tests that ask for it are skipped where it is not installed."""
    pytest.importorskip("torch")
    import fastvit_zoo.torchvision_operators  # noqa: F401

    return pytest.importorskip("timm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="write the verdicts of the golden cases anew")
