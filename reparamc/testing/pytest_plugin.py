"""The pytest plugin: the fixture ``fuse_guard`` and the marker of the same name.

pytest loads this file at every start, so it imports nothing but pytest; the rest comes when the fixture is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

MARKER = "fuse_guard"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"{MARKER}(**options): what the fixture fuse_guard is to ask for, such as max_conv=12; nearer markers and "
        "arguments of the call win",
    )


@pytest.fixture(name="fuse_guard")
def fixture(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`reparamc.testing.fuse_guard`, with the options of the markers of this test as defaults."""
    defaults: dict[str, Any] = {}
    for marker in reversed(list(request.node.iter_markers(MARKER))):
        if marker.args:
            raise pytest.UsageError(f"{MARKER} takes options by name only, such as max_conv=12")
        defaults |= marker.kwargs
    if defaults:
        from reparamc.errors import InputTypeError
        from reparamc.testing.guard import check_options

        try:
            check_options(defaults, who=f"the marker {MARKER}")
        except InputTypeError as error:
            raise pytest.UsageError(str(error)) from None

    def guard(model: Any, example_inputs: Any = None, **options: Any) -> Any:
        __tracebackhide__ = True
        from reparamc.testing.guard import check_options, fuse_guard

        check_options(options)
        return fuse_guard(model, example_inputs, **(defaults | options))

    return guard
