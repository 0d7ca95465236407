"""Where each name of the package's face lives: imported when it is first used."""

from __future__ import annotations

import sys
from importlib import import_module

__all__ = ["load"]

_MODULES = {"atomic": "shmipi.atomic", "irq": "shmipi.irq", "smp": "shmipi.smp"}
_HOMES = {
    "shmipi.cluster": ("Cluster", "Cpu"),
    "shmipi.task": ("Task", "Tasks"),
    "shmipi.cpumask": ("CpuMask",),
    "shmipi.errors": (
        "AddressSpaceError",
        "AffinityError",
        "ArenaFullError",
        "AttachError",
        "BootError",
        "ClusterStateError",
        "ControllerError",
        "CpuDiedError",
        "CpuOfflineError",
        "CpusFailedError",
        "CsdBusyError",
        "DeviceTreeError",
        "FunctionTableFullError",
        "HotplugError",
        "ImportBootError",
        "IpiDeadlockError",
        "IpiStallError",
        "IpiTimeoutError",
        "IrqError",
        "LayoutError",
        "MachineDiedError",
        "NoMachineError",
        "NoTaskError",
        "PageFaultError",
        "RemoteCallError",
        "ShmipiError",
        "ShmipiWarning",
        "SteeringError",
        "TaskCancelledError",
        "TaskInterrupt",
        "TraceFormatError",
        "TracefsError",
        "UnknownCpuError",
    ),
    "shmipi.machine.arrays": ("SharedArray", "percpu", "shared"),
    "shmipi.smp": ("CallSingleData", "NativeHandler"),
    "shmipi.trace": ("TraceEvent",),
}


def load(name: str, package: str) -> object:
    """Return attribute ``name`` of the package and keep it there.

    Raises ``AttributeError`` for a name that the package does not have.
    """
    if name in _MODULES:
        return import_module(_MODULES[name])
    for home, names in _HOMES.items():
        if name in names:
            value: object = getattr(import_module(home), name)
            setattr(sys.modules[package], name, value)
            return value
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
