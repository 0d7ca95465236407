"""The controllers by name, each imported when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from shmipi import names
from shmipi.irq.chips.base import Chip

__all__ = ["CHIPS", "class_of"]


class _Chips(Mapping[str, type[Chip]]):
    """Each class is imported when it is asked for."""

    def __getitem__(self, name: str) -> type[Chip]:
        module = import_module(f"shmipi.irq.chips.{names.CHIPS[name]}")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, Chip)
                and vars(value).get("name") == name
            ):
                return value
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in names.CHIPS

    def __iter__(self) -> Iterator[str]:
        return iter(names.CHIPS)

    def __len__(self) -> int:
        return len(names.CHIPS)

    def __repr__(self) -> str:
        return f"<controllers: {', '.join(self)}>"


#: By the name that ``Cluster(controller=...)`` takes.
CHIPS: Mapping[str, type[Chip]] = _Chips()


def class_of(class_name: str) -> type[Chip]:
    """Return a controller's class by the class's name. ``AttributeError``."""
    # An import asks for __path__ and its like, and for modules before they are there.
    if class_name[:1].isupper():
        for chip in CHIPS.values():
            if chip.__name__ == class_name:
                return chip
    raise AttributeError(f"module 'shmipi.irq.chips' has no attribute {class_name!r}")
