"""Every exception and warning of shmipi.

Each error is also the builtin that a caller who never heard of shmipi would catch:
an ``OSError`` carrying the kernel's errno, a ``TimeoutError``, a ``ValueError``.
Where an error concerns a CPU it carries ``cpu`` (its number, or ``None``).
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any


class ShmipiError(Exception):
    """The base of everything that shmipi raises on purpose.

    ``results``: of an error that ``Cluster.run`` raises, what the tasks that ended well
    returned, by CPU; else ``None``.
    """

    cpu: int | None = None
    results: Mapping[int, Any] | None = None


class ShmipiWarning(RuntimeWarning):
    """Given once where the kernel has a ``WARN_ON_ONCE``; the call goes on."""


class ShmipiOSError(ShmipiError, OSError):
    """A refusal with an errno: the kernel's own, or the operating system's.

    ``errno`` and ``strerror`` are those of ``OSError``; ``cpu`` is the CPU concerned.
    """

    default_errno = errno.EIO

    def __init__(
        self, message: str, *, cpu: int | None = None, errno: int | None = None
    ) -> None:
        super().__init__(self.default_errno if errno is None else errno, message)
        self.cpu = cpu

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.strerror, self.cpu, self.errno)


def _rebuild(
    kind: type[ShmipiOSError], message: str, cpu: int | None, errno: int
) -> ShmipiOSError:
    return kind(message, cpu=cpu, errno=errno)


class CpuOfflineError(ShmipiOSError):
    """ENXIO: the CPU does not exist, is offline or is dead. Nothing was queued."""

    default_errno = errno.ENXIO


class UnknownCpuError(CpuOfflineError, ValueError):
    """ENXIO: this machine has no CPU of that number; the text says which it has."""


class CpuDiedError(ShmipiOSError):
    """EOWNERDEAD: the CPU died with the call in hand: it may or may not have run.

    Or it has run, and its result died with the CPU: then the text says so.
    """

    default_errno = errno.EOWNERDEAD


class MachineDiedError(ShmipiOSError):
    """EOWNERDEAD: the machine's firmware is gone, and every CPU with it."""

    default_errno = errno.EOWNERDEAD


class CsdBusyError(ShmipiOSError, BlockingIOError):
    """EBUSY: the call_single_data is still in use by an earlier call."""

    default_errno = errno.EBUSY


class IpiDeadlockError(ShmipiOSError):
    """EDEADLK: CPUs wait for each other in a circle, all with interrupts off."""

    default_errno = errno.EDEADLK


class IpiTimeoutError(ShmipiOSError, TimeoutError):
    """ETIMEDOUT: no answer in time. The call stays queued and may still run."""

    default_errno = errno.ETIMEDOUT


class IpiStallError(IpiTimeoutError):
    """ETIMEDOUT: a wait for a CPU was given up, after ``panic_on_ipistall``.

    ``cpu`` has not answered, ``function`` is the name of what it was asked for, or
    None. The call stays queued and may still run.
    """

    def __init__(
        self,
        message: str,
        *,
        cpu: int | None = None,
        errno: int | None = None,
        function: str | None = None,
    ) -> None:
        super().__init__(message, cpu=cpu, errno=errno)
        self.function = function

    def __reduce__(self) -> tuple[object, ...]:
        what = (self.strerror, self.cpu, self.errno, self.function)
        return _rebuild_stall, (type(self), *what)


def _rebuild_stall(
    kind: type[IpiStallError],
    message: str,
    cpu: int | None,
    errno: int,
    function: str | None,
) -> IpiStallError:
    return kind(message, cpu=cpu, errno=errno, function=function)


class TaskCancelledError(ShmipiOSError, CancelledError):
    """ECANCELED: the task was cancelled. It never began, was interrupted, or killed."""

    default_errno = errno.ECANCELED


class TaskInterrupt(KeyboardInterrupt):
    """Raised in a task that is cancelled, wherever it is; no ``Exception``.

    A task that lets it through ends as cancelled. One that catches it and returns has
    ended well, and what it returns is its result.
    """

    def __init__(self, message: str = "this task was cancelled") -> None:
        super().__init__(message)


class CpusFailedError(ExceptionGroup[Exception]):
    """What several CPUs failed with, one error each, as they would come alone.

    ``results``: what the tasks that ended well returned, by CPU; ``None`` where there
    are no results (``on_each_cpu``).
    """

    results: Mapping[int, Any] | None = None

    def derive(self, excs: Sequence[Any], /) -> Any:
        """Make the group that ``except*`` splits off: with the same ``results``."""
        part = CpusFailedError(self.message, excs)
        part.results = self.results
        return part


class NoTaskError(ShmipiOSError, ProcessLookupError):
    """ESRCH: the scheduler has no such task: it has ended, or never was."""

    default_errno = errno.ESRCH


class AffinityError(ShmipiOSError, ValueError):
    """EINVAL: no CPU that is online is among those that a task may run on.

    EBUSY: the task has begun on a CPU that is not among them, and cannot leave it.
    """

    default_errno = errno.EINVAL


class ArenaFullError(ShmipiOSError):
    """ENOBUFS, E2BIG or ENOSPC: an argument or result does not fit the arena.

    As a ``RemoteCallError``'s cause, or with "has run" in its text: the result's.
    """

    default_errno = errno.ENOBUFS


class FunctionTableFullError(ArenaFullError):
    """EMFILE: this process has sent as many functions as it can, and all still exist.

    A function counts until the object is gone: a lambda made for each call, for
    example, until nothing refers to it any more.
    """

    default_errno = errno.EMFILE


class HotplugError(ShmipiOSError):
    """A CPU stays as it is: online, or offline; and its callbacks' states were undone.

    EBUSY: it is the last that is online. Else what a callback returned, or (EIO) what
    it raised: then that is its ``__cause__``.
    """

    default_errno = errno.EBUSY


class IrqError(ShmipiOSError):
    """A refusal of the irq layer, with the kernel's errno (EINVAL, EBUSY, ENOMEM ...).

    ``irq`` is the virq concerned, ``domain`` the name of the irq domain or controller;
    ``None`` where there is none.
    """

    default_errno = errno.EINVAL

    def __init__(
        self,
        message: str,
        *,
        cpu: int | None = None,
        errno: int | None = None,
        irq: int | None = None,
        domain: str | None = None,
    ) -> None:
        super().__init__(message, cpu=cpu, errno=errno)
        self.irq = irq
        self.domain = domain

    def __reduce__(self) -> tuple[object, ...]:
        what = (self.strerror, self.cpu, self.errno, self.irq, self.domain)
        return _rebuild_irq, (type(self), *what)


def _rebuild_irq(
    kind: type[IrqError],
    message: str,
    cpu: int | None,
    errno: int,
    irq: int | None,
    domain: str | None,
) -> IrqError:
    return kind(message, cpu=cpu, errno=errno, irq=irq, domain=domain)


class SteeringError(ShmipiOSError, ValueError):
    """A refusal of RPS, cpumap or the block layer, with the kernel's errno.

    E2BIG, EEXIST, EOVERFLOW, ENODEV (``cpu_map_update_elem``), EINVAL, EALREADY ...
    """

    default_errno = errno.EINVAL


class ControllerError(IrqError, ValueError):
    """EINVAL: there is no such controller, or it cannot address so many CPUs.

    ``domain`` is the controller, ``cpu`` the first CPU that it has no address for.
    """


class AddressSpaceError(ShmipiOSError):
    """A refusal of mmap(), munmap() and the like, or of membarrier(), with their errno.

    EINVAL, ENOMEM, EEXIST, EPERM (not registered), EBUSY (in use), ESRCH (it is gone).
    """

    default_errno = errno.EINVAL


class PageFaultError(AddressSpaceError):
    """EFAULT: an access to memory that is not mapped, or not for such an access.

    ``address``; ``access``: "read" or "write"; ``si_code``: what SIGSEGV would say,
    SEGV_MAPERR (1): nothing is mapped there, SEGV_ACCERR (2): it is, but not for this.
    """

    default_errno = errno.EFAULT
    address: int = 0
    access: str = "read"
    si_code: int = 1

    def __reduce__(self) -> tuple[object, ...]:
        return (*super().__reduce__(), vars(self).copy())


class DeviceTreeError(ShmipiError, ValueError):
    """A description of irq domains that cannot be. ``node`` is the node's name."""

    def __init__(self, message: str, *, node: str | None = None) -> None:
        super().__init__(message)
        self.node = node


class BootError(ShmipiOSError):
    """The machine could not be booted; errno says why, the text what to do."""


class AttachError(ShmipiOSError):
    """A running machine could not be attached to; errno says why, the text what to do.

    ENOENT: there is none of that name; EOWNERDEAD: it is dead; EAGAIN: as many hosts as
    can be are attached; ECONNREFUSED, EOPNOTSUPP: it is in another container.
    """

    default_errno = errno.ENOENT


class LayoutError(ShmipiError, ValueError):
    """A segment that is not a machine of this version, or whose content is damaged."""


class TraceFormatError(ShmipiError, ValueError):
    """A file is no trace of a kernel; ``line``: the first one that is not, from 1."""

    def __init__(self, message: str, *, line: int | None) -> None:
        super().__init__(message)
        self.line = line

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_trace_error, (self.args[0], self.line)


def _rebuild_trace_error(message: str, line: int | None) -> TraceFormatError:
    return TraceFormatError(message, line=line)


class TracefsError(ShmipiOSError):
    """The kernel's own events cannot be recorded; errno says why, the text what to do.

    EPERM, EACCES: it takes root; ENODEV: this kernel has no tracefs.
    """

    default_errno = errno.EPERM


class ClusterStateError(ShmipiError, RuntimeError):
    """The cluster is closed, or belongs to another process (after a fork)."""


class ImportBootError(ClusterStateError):
    """A module that is imported on a CPU makes a Cluster at its top level.

    What boots a machine belongs under ``if __name__ == "__main__":``.
    """


class NoMachineError(ShmipiError, RuntimeError):
    """``shmipi.smp`` has no machine to act on here; use ``cluster.smp``."""


class RemoteCallError(ShmipiError, RuntimeError):
    """A remote function raised. The text holds the remote traceback.

    ``__cause__`` is the original exception, or ``None`` where it could not be
    pickled: ``remote_repr`` is its repr in either case.
    """

    def __init__(
        self, message: str, *, cpu: int | None = None, remote_repr: str = ""
    ) -> None:
        super().__init__(message)
        self.cpu = cpu
        self.remote_repr = remote_repr


class CommandError(ShmipiError):
    """A command cannot go on: the message is for a person, the status for a shell."""

    def __init__(self, message: str, *, status: int = 1) -> None:
        super().__init__(message)
        self.status = status
