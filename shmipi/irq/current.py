"""The controller of the machine that this process is part of."""

from __future__ import annotations

from typing import cast

from shmipi import _core
from shmipi.irq.chips.base import Chip
from shmipi.machine import controller

__all__ = ["chip"]


def chip() -> Chip:
    """Return the interrupt controller of this machine, bound to it.

    On a CPU that of its machine; in the host that of the only open ``Cluster``, else
    ``NoMachineError``: use ``cluster.chip``.
    """
    return cast(Chip, controller.of(_core.current_machine()))
