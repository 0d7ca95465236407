"""The checks by name: every module of this folder but those that all share."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from shmipi.stress.users.base import UserCheck

__all__ = ["load", "modules", "names"]

_SHARED: Final = {"__init__", "base", "registry"}


def names() -> tuple[str, ...]:
    """Return the names of all users that there is a check of, without importing it."""
    files = {path.stem for path in Path(__file__).parent.glob("*.py")}
    return tuple(sorted(files - _SHARED))


def modules(users: Iterable[str]) -> list[str]:
    """Return the modules of users that are of this folder, by their names."""
    folder = Path(__file__).parent
    return [_module(user) for user in users if (folder / f"{user}.py").exists()]


def _module(name: str) -> str:
    return f"{__package__}.{name}"


def load(name: str) -> type[UserCheck]:
    """Return the check of user ``name``."""
    made: Any = import_module(_module(name))
    return cast("type[UserCheck]", made.Check)
