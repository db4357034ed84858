"""What every fusion has in common, whatever the host."""

from __future__ import annotations

from reparamc.errors import InputError

LEVELS = ("off", "region", "full")


def level_of(verify: bool | str) -> str:
    """The level that an argument ``verify`` asks for: True stands for "full", and False for "off".

    Raises:
        InputError: there is no such level.
    """
    level = verify if isinstance(verify, str) else "full" if verify else "off"
    if level not in LEVELS:
        raise InputError(f"unknown verification level {level!r}; the levels are {', '.join(LEVELS)}")
    return level
