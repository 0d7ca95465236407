"""Which limit of the system an error stands for, by its name, and what to do."""

from __future__ import annotations

import errno
import os
import resource
import threading

from shmipi.errors import BootError

__all__ = ["explain", "limit_text", "no_address_space", "start_thread", "why"]


def explain(code: int | None) -> str:
    """Return a sentence about an errno: what it says, the limit, the remedy."""
    text = os.strerror(code) if code else "no reason given"
    return f"{text}{_reason(code)}"


def _reason(code: int | None) -> str:
    if code == errno.EMFILE:
        return (
            f": this process may have {_soft(resource.RLIMIT_NOFILE)} files open"
            " (RLIMIT_NOFILE): raise it with ulimit -n"
        )
    if code == errno.ENFILE:
        return ": the system's limit of open files is reached (sysctl fs.file-max)"
    if code == errno.EAGAIN:
        return (
            ": no process or thread more: the limits are RLIMIT_NPROC (ulimit -u, here"
            f" {_soft(resource.RLIMIT_NPROC)}), the cgroup's pids.max and"
            " kernel.pid_max; `shmipi doctor` shows them"
        )
    if code == errno.ENOMEM:
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            return f": address space is limited to {_size(limit)}: {_RAISE_AS}"
        return (
            ": memory is short, or may not be overcommitted (sysctl"
            " vm.overcommit_memory)"
        )
    if code == errno.EFBIG:
        return (
            f": a file may have {_size(resource.getrlimit(resource.RLIMIT_FSIZE)[0])}"
            " (RLIMIT_FSIZE): raise it with ulimit -f"
        )
    if code == errno.ENOSPC:
        return (
            ": /dev/shm is full or too small for this machine: make it larger"
            " (mount -o remount,size=1g /dev/shm, docker run --shm-size=1g) or boot"
            " fewer CPUs"
        )
    if code in (errno.ENOSYS, errno.EPERM, errno.EACCES):
        return (
            "; it needs pidfd_open (Linux 5.3), eventfd, sockets, pipes, and to pin"
            " itself (sched_setaffinity): is a sandbox (seccomp) in the way?"
        )
    return ""


_RAISE_AS = "raise it with ulimit -v (RLIMIT_AS), ulimit -v unlimited is best"


def no_address_space(needed: int) -> str | None:
    """Return what is wrong when ``needed`` bytes cannot be mapped, None if they can."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or needed <= limit:
        return None
    return (
        f"a machine maps {_size(needed)} of address space, of which it uses little, and"
        f" the limit is {_size(limit)}: {_RAISE_AS}"
    )


def why(text: str, code: int | None) -> str:
    """Return ``text`` with the limit that its errno stands for, where it is one."""
    limited = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
    if code in limited and "RLIMIT" not in text:  # it may have said it already
        text += f" ({explain(code)})"
    return text


def limit_text(limit: tuple[int | None, int | None]) -> str:
    """Return a soft and a hard limit as text; None is none."""
    soft, hard = ("unlimited" if value is None else str(value) for value in limit)
    return soft if soft == hard else f"{soft}, can be raised to {hard}"


def start_thread(thread: threading.Thread) -> None:
    """Start a thread. ``BootError`` (EAGAIN) when the system gives none."""
    try:
        thread.start()
    except RuntimeError as error:  # "can't start new thread", and no errno
        why = explain(errno.EAGAIN)
        if "shutdown" in str(error):  # Python 3.12: "... at interpreter shutdown"
            why = "the interpreter is shutting down; do it before the main thread ends"
        raise BootError(
            f"no thread can be started: {why}", errno=errno.EAGAIN
        ) from None


def _soft(which: int) -> str:
    limit = resource.getrlimit(which)[0]
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def _size(count: int) -> str:
    if count == resource.RLIM_INFINITY:
        return "unlimited size"
    for unit in ("bytes", "KiB", "MiB"):
        if count < 10240:
            return f"{count} {unit}"
        count //= 1024
    return f"{count} GiB" if count < 10240 else f"{count // 1024} TiB"
