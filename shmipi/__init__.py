"""shmipi: a machine made of processes that interrupt each other.

Each emulated CPU is a pinned process; an interrupt is a write into shared memory and a
doorbell. ``Cluster`` boots one, ``smp`` has the kernel's cross calls, ``atomic`` real
atomics on ``shared`` and ``percpu`` arrays.
"""

from __future__ import annotations

from shmipi._version import __version__

TYPE_CHECKING = False  # typing's, whose import is a third of that of this package
if TYPE_CHECKING:
    from shmipi import atomic, irq, smp
    from shmipi.cluster import Cluster, Cpu
    from shmipi.cpumask import CpuMask
    from shmipi.errors import (
        AddressSpaceError,
        AffinityError,
        ArenaFullError,
        AttachError,
        BootError,
        ClusterStateError,
        ControllerError,
        CpuDiedError,
        CpuOfflineError,
        CpusFailedError,
        CsdBusyError,
        DeviceTreeError,
        FunctionTableFullError,
        HotplugError,
        ImportBootError,
        IpiDeadlockError,
        IpiStallError,
        IpiTimeoutError,
        IrqError,
        LayoutError,
        MachineDiedError,
        NoMachineError,
        NoTaskError,
        PageFaultError,
        RemoteCallError,
        ShmipiError,
        ShmipiWarning,
        SteeringError,
        TaskCancelledError,
        TaskInterrupt,
        TraceFormatError,
        TracefsError,
        UnknownCpuError,
    )
    from shmipi.machine.arrays import SharedArray, percpu, shared
    from shmipi.smp import CallSingleData, NativeHandler
    from shmipi.task import Task, Tasks
    from shmipi.trace import TraceEvent

__all__ = [
    "AddressSpaceError",
    "AffinityError",
    "ArenaFullError",
    "AttachError",
    "BootError",
    "CallSingleData",
    "Cluster",
    "ClusterStateError",
    "ControllerError",
    "Cpu",
    "CpuDiedError",
    "CpuMask",
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
    "NativeHandler",
    "NoMachineError",
    "NoTaskError",
    "PageFaultError",
    "RemoteCallError",
    "SharedArray",
    "ShmipiError",
    "ShmipiWarning",
    "SteeringError",
    "Task",
    "TaskCancelledError",
    "TaskInterrupt",
    "Tasks",
    "TraceEvent",
    "TraceFormatError",
    "TracefsError",
    "UnknownCpuError",
    "__version__",
    "atomic",
    "irq",
    "percpu",
    "shared",
    "smp",
]


def __getattr__(name: str) -> object:
    # Late: `shmipi --help` must not pay for numpy and the core. And not `from shmipi
    # import`: that would ask this function for the name.
    import shmipi._lazy as _lazy

    return _lazy.load(name, __name__)


def __dir__() -> list[str]:
    # What is not imported yet is there all the same: for completion.
    return sorted({*globals(), *__all__})
