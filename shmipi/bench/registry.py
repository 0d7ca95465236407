"""The benches by name: what each module has, imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from shmipi.report.cells import Table

__all__ = ["Bench", "load"]


class Bench(Protocol):
    """What a module of ``shmipi.names.BENCHES`` has."""

    #: What it measures, and how.
    HELP: str
    #: One or more command lines that work as they stand.
    EXAMPLE: str
    #: A frozen dataclass with a default for every field (see ``option``).
    Options: type[Any]

    def run(
        self, options: Any, progress: Callable[[str], None] | None = None
    ) -> dict[str, Any]:
        """Measure and return the document, without its schema."""

    def table(self, result: dict[str, Any]) -> Table:
        """Return a document as a table for people."""


def load(name: str) -> Bench:
    """Return the module of the bench of this name."""
    return cast(Bench, import_module(f"shmipi.bench.{name}"))
