"""Which interrupt controller a machine of this process has.

The controllers themselves are of the layer above; what is here lets the firmware hand
the machine's to the CPUs it makes, and anybody find it again by the machine.
"""

from __future__ import annotations

from typing import Any, Protocol, Self

from shmipi import _core

__all__ = ["Controller", "forget", "of", "register"]


class Controller(Protocol):
    """What booting a machine needs of a controller (``shmipi.irq.chips.base.Chip``)."""

    @property
    def name(self) -> str:
        """What it is called."""

    def describe(self, ncpus: int) -> dict[str, Any]:
        """Return what the core is told."""

    def prepare(self, machine: _core.Machine) -> None:
        """Set it up before the first CPU is made."""

    def bind(self, machine: _core.Machine) -> Self:
        """Return it as the controller of ``machine``."""

    def bring_up(self, cpu: int) -> None:
        """Start a secondary CPU that waits for it; called until it is online."""


_known: list[tuple[_core.Machine, Controller]] = []


def register(machine: _core.Machine, controller: Controller) -> Controller:
    """Bind a controller to a machine and remember it; return it bound."""
    bound = controller.bind(machine)
    _known.append((machine, bound))
    return bound


def forget(machine: _core.Machine) -> None:
    """Undo ``register``: the machine has ended."""
    _known[:] = [known for known in _known if known[0] is not machine]


def of(machine: _core.Machine) -> Controller:
    """Return the controller of a machine. ``KeyError`` for one not registered."""
    for known, controller in _known:
        if known is machine:
            return controller
    raise KeyError(machine.name)
