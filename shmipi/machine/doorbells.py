"""What wakes a halted CPU: a class for each doorbell, with all but how it is rung.

It is rung and slept on in C (``_core/irq/db_NAME.c``). Here is what surrounds that: who
makes the object of each CPU, how others come by it, who removes it, what of the system
limits it, and the words for people.

A doorbell is either nothing beside the machine's memory (``futex``, ``signal``), or a
descriptor of each CPU that the host makes and every process inherits (``make``), or an
object with a name, which the firmware makes (``create``) and which loses its name as
soon as every process has it open.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from shmipi.machine.limits import limit_text

__all__ = ["BY_NAME", "SYSCTLS", "Doorbell", "Limits", "Need", "named", "unlink"]


@dataclass(frozen=True)
class Need:
    """A limit of the system that stands against a doorbell, or does not.

    ``advice`` is None where a machine of the size asked about has enough of it.
    """

    name: str
    value: str
    why: str
    advice: str | None


@dataclass(frozen=True)
class Limits:
    """What the system allows: soft and hard limits, and the ``sysctls`` that it has."""

    rlimits: Mapping[str, tuple[int | None, int | None]]
    sysctls: Mapping[str, int]


class Doorbell:
    """A doorbell of a machine. What it does not say is as for ``futex``: nothing."""

    name: ClassVar[str]
    #: What it is, for people.
    about: ClassVar[str]
    #: What rings it, and what a halted CPU then returns from (``shmipi explain``).
    rings: ClassVar[str]
    sleeps: ClassVar[str]
    #: Its raw round trip of ``bench limits``, and what that is.
    limit: ClassVar[str]
    limit_about: ClassVar[str]

    #: That raw round trip makes no object of its own: it is over a machine's doorbells.
    limit_borrows: ClassVar[bool] = False

    #: It is the kick signal: also with kick=False signals are queued.
    by_signal: ClassVar[bool] = False
    #: The host makes a descriptor of each CPU's, which all others inherit.
    is_inherited: ClassVar[bool] = False
    #: Every process of the machine has a descriptor of each CPU's.
    is_descriptor: ClassVar[bool] = False
    #: An attached host, which comes late, is handed a descriptor of each CPU's.
    is_handed: ClassVar[bool] = False
    #: What to do when there is none for each CPU, beside what its errno says.
    remedy: ClassVar[str] = ""
    #: Files of /proc/sys that ``needs`` wants to know.
    sysctls: ClassVar[tuple[str, ...]] = ()

    #: Where its objects have names: PREFIX and the machine's full name and the CPU.
    folder: ClassVar[Path | None] = None
    prefix: ClassVar[str] = ""
    #: That folder is of a file system that need not be mounted.
    folder_may_hide: ClassVar[bool] = False

    def make(self) -> int:
        """In the host, where it is inherited: make one CPU's. ``OSError``."""
        raise NotImplementedError

    def create(self, name: str) -> None:
        """In the firmware: make one CPU's that bears a name. ``OSError``."""

    def unlink(self, name: str) -> None:
        """Take the name away. ``OSError``."""

    def keep(self, name: str) -> int:
        """In the firmware: open one to hand, where there is none. ``OSError``."""
        raise NotImplementedError

    def needs(self, limits: Limits, ncpus: int) -> Iterator[Need]:
        """Judge what limits it, for a machine of ``ncpus`` CPUs."""
        return iter(())


class Futex(Doorbell):
    """A word of the machine's memory."""

    name = "futex"
    about = "a futex on its state word"
    rings = "FUTEX_WAKE"
    sleeps = "FUTEX_WAIT"
    limit = "futex"
    limit_about = "FUTEX_WAKE to a sleeper, the sender spins for the answer"


class Sem(Doorbell):
    """A named semaphore: a file in /dev/shm."""

    name = "sem"
    about = "a POSIX semaphore"
    rings = "sem_post"
    sleeps = "sem_wait"
    limit = "sem"
    limit_about = "sem_post to a sleeper, the sender spins"
    is_handed = True
    remedy = "; make /dev/shm larger"
    folder = Path("/dev/shm")
    prefix = "sem."

    def create(self, name: str) -> None:
        import posix_ipc

        _with_os_errors(
            posix_ipc.Semaphore, f"/{name}", posix_ipc.O_CREX, mode=0o600
        ).close()

    def unlink(self, name: str) -> None:
        import posix_ipc

        _with_os_errors(posix_ipc.unlink_semaphore, f"/{name}")

    def keep(self, name: str) -> int:
        assert self.folder is not None
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self.folder / f"{self.prefix}{name}", flags)


class Signal(Doorbell):
    """The kick signal, for which a halted CPU waits."""

    name = "signal"
    about = "the kick signal"
    rings = "a signal"
    sleeps = "sigwaitinfo"
    limit = "sigwait"
    limit_about = "tgkill to a sleeper in sigwaitinfo, the sender spins"
    by_signal = True


class Eventfd(Doorbell):
    """An eventfd, which has no name: the host makes it."""

    name = "eventfd"
    about = "an eventfd"
    rings = "write() to its eventfd"
    sleeps = "read() of its eventfd"
    limit = "eventfd"
    limit_about = "write to a sleeper in read, the sender spins"
    limit_borrows = True
    is_inherited = True
    is_descriptor = True
    is_handed = True

    def make(self) -> int:
        return os.eventfd(0, os.EFD_CLOEXEC)


class Mqueue(Doorbell):
    """A message queue that holds one message."""

    name = "mqueue"
    about = "a POSIX message queue"
    rings = "mq_send"
    sleeps = "mq_receive"
    limit = "mqueue"
    limit_about = "mq_send to a sleeper in mq_receive, the sender spins"
    is_descriptor = True
    is_handed = True
    remedy = "; raise fs.mqueue.queues_max (sysctl) and RLIMIT_MSGQUEUE (ulimit -q)"
    sysctls = ("fs/mqueue/queues_max",)
    folder = Path("/dev/mqueue")
    folder_may_hide = True

    def create(self, name: str) -> None:
        import posix_ipc

        _with_os_errors(
            posix_ipc.MessageQueue,
            f"/{name}",
            posix_ipc.O_CREX,
            mode=0o600,
            max_messages=1,
            max_message_size=8,
        ).close()

    def unlink(self, name: str) -> None:
        import posix_ipc

        _with_os_errors(posix_ipc.unlink_message_queue, f"/{name}")

    def needs(self, limits: Limits, ncpus: int) -> Iterator[Need]:
        why = "the mqueue doorbell is one POSIX message queue for each CPU and the host"
        most = limits.sysctls.get("fs/mqueue/queues_max")
        if most is None:
            yield Need(
                "fs.mqueue",
                "not available",
                why,
                "choose another doorbell: futex, the default, needs nothing",
            )
            return
        yield Need(
            "fs.mqueue",
            f"queues_max {most}",
            why,
            f"for --doorbell mqueue with {ncpus} CPUs: sysctl fs.mqueue.queues_max="
            f"{ncpus + 16}, or choose another doorbell"
            if most < ncpus + 1
            else None,
        )
        limit = limits.rlimits.get("MSGQUEUE", (None, None))
        # For each message that fits a queue the kernel charges its size and about 100
        # bytes of its own (mqueue_get_inode); a doorbell holds one or two short ones.
        need = 256 * (ncpus + 1)
        yield Need(
            "RLIMIT_MSGQUEUE",
            limit_text(limit),
            "it counts the bytes of all your message queues",
            f"for --doorbell mqueue with {ncpus} CPUs: ulimit -q {need}"
            if limit[0] is not None and limit[0] < need
            else None,
        )


class Pipe(Doorbell):
    """A pipe of one page, which has no name: the host makes it."""

    name = "pipe"
    about = "a pipe of one page"
    rings = "write() to its pipe"
    sleeps = "ppoll() of its pipe"
    limit = "pipe"
    limit_about = "write to a sleeper in ppoll, who then reads, the sender spins"
    is_inherited = True
    is_descriptor = True
    is_handed = True
    remedy = "; raise fs.pipe-user-pages-hard (sysctl), if there is such a limit"
    sysctls = ("fs/pipe-user-pages-soft", "fs/pipe-user-pages-hard")

    def make(self) -> int:
        # One descriptor for both directions: whoever rings is a reader too (db_pipe.c).
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        ends = zip(os.pipe2(flags), ("rb", "wb"), strict=True)
        with contextlib.ExitStack() as stack:
            end, _ = [stack.enter_context(io.FileIO(fd, mode)) for fd, mode in ends]
            # Down to the page that it needs, which the kernel always allows: there are
            # as many as CPUs, and a user's pipes have a limit of pages.
            fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, 1)
            return os.open(f"/proc/self/fd/{end.fileno()}", os.O_RDWR | flags)

    def needs(self, limits: Limits, ncpus: int) -> Iterator[Need]:
        for kind, why in (
            ("soft", "above it all your programs' pipes are of two pages"),
            (
                "hard",
                "above it there are none, and no machine with them boots",
            ),
        ):
            most = limits.sysctls.get(f"fs/pipe-user-pages-{kind}")
            if most is None:
                continue
            need = ncpus + 16  # while one is made it has more
            yield Need(
                f"fs.pipe-user-pages-{kind}",
                str(most or "unlimited"),
                f"the pipe doorbell is a page of pipes for each CPU; {why}",
                f"for --doorbell pipe with {ncpus} CPUs: sysctl"
                f" fs.pipe-user-pages-{kind}={need + 16384}, or choose another doorbell"
                if most and most < need
                else None,
            )


#: Every doorbell, in the order of their numbers.
BY_NAME: Final[Mapping[str, Doorbell]] = {
    bell.name: bell for bell in (Futex(), Sem(), Signal(), Eventfd(), Mqueue(), Pipe())
}
#: The files of /proc/sys that they want to know.
SYSCTLS: Final = tuple(file for bell in BY_NAME.values() for file in bell.sysctls)


def named(full: str = r"shmipi\.\d+\.[^.]+") -> Iterator[tuple[str, Path]]:
    """Yield what bears the name of a machine's doorbell: that full name, and the file.

    ``full`` is a regular expression of full names.
    """
    for bell, machine, path in _found(full):
        del bell
        yield machine, path


def _found(full: str) -> Iterator[tuple[Doorbell, str, Path]]:
    for bell in BY_NAME.values():
        if bell.folder is None:
            continue
        pattern = re.compile(rf"{re.escape(bell.prefix)}({full})\.\d+")
        with contextlib.suppress(OSError):
            for path in bell.folder.iterdir():
                match = pattern.fullmatch(path.name)
                if match:
                    yield bell, match[1], path


def unlink(full: str, ncpus: int = 0) -> int:
    """Unlink what bears a machine's full name; return how many there were.

    They are found in their folders; where a folder may not be there to look into, the
    names of CPUs 0 to ``ncpus`` - 1 are tried.
    """
    done = 0
    doomed: dict[tuple[Doorbell, str], None] = {
        (bell, path.name.removeprefix(bell.prefix)): None
        for bell, _, path in _found(re.escape(full))
    }
    for bell in BY_NAME.values():
        if bell.folder_may_hide:
            doomed.update(((bell, f"{full}.{cpu}"), None) for cpu in range(ncpus))
    for bell, name in doomed:
        with contextlib.suppress(OSError):
            bell.unlink(name)
            done += 1
    return done


def _with_os_errors(func: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call it; the errors of posix_ipc become what they are: ``OSError``."""
    import posix_ipc

    try:
        return func(*args, **options)
    except posix_ipc.Error as error:
        code = getattr(error, "errno", None)
        text = getattr(error, "strerror", None) or str(error)
    # Not from within: as its context that error's frames would keep the host's Cluster.
    raise OSError(code, text)
