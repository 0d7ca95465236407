"""The interrupt controllers that a machine can be booted with, by name.

To add one: a module here with a class of its name, and its line in
``shmipi.names.CHIPS``. Its class is then also an attribute of this package.
"""

from typing import Any

from shmipi.irq.chips import registry
from shmipi.irq.chips.base import Chip, Line, Row
from shmipi.irq.chips.registry import CHIPS

__all__ = ["CHIPS", "Chip", "Line", "Row"]


def __getattr__(name: str) -> Any:
    return registry.class_of(name)


def __dir__() -> list[str]:
    return [*__all__, *(chip.__name__ for chip in CHIPS.values())]
