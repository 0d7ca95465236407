"""A crash: from panic() until the file with all that the CPUs have saved is there."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from shmipi.bench.user_rows.base import Took, UserRow

if TYPE_CHECKING:
    from shmipi.bench.runner import Rig

_LOOK_S = 0.0002
_TIMEOUT_S = 10.0


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Let what this process says to standard error be lost, and who it starts too."""
    kept, nobody = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nobody, 2)
        with contextlib.redirect_stderr(None):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nobody)


class Crash(UserRow):
    """A machine of its own ends each time."""

    what = "panic(), until the crash dump is complete"
    flavour = "python"
    raw = "broadcast"
    at_most = None
    most_ns = 1e9
    share = 0.001

    def __init__(self, ncpus: int) -> None:
        self.ncpus = ncpus

    def block(self, rig: Rig, calls: int, warmup: int, gap_ns: int) -> Took:
        """Boot, and panic: what the firmware and the log say of it is for nobody."""
        with unheard():
            return [self._crash(rig) for _ in range(calls)]

    def _crash(self, rig: Rig) -> float:
        from shmipi.cluster import Cluster  # not on the CPUs, which import this

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "crash.json")
            with Cluster(
                self.ncpus, cores=rig.cores, idle="halt", crash=file
            ) as cluster:
                begun = time.perf_counter_ns()
                cluster.users.crash.panic("bench users")
                while not file.exists():
                    time.sleep(_LOOK_S)
                    if time.perf_counter_ns() - begun > _TIMEOUT_S * 1e9:
                        raise RuntimeError(f"no crash dump in {_TIMEOUT_S:g} s")
                return float(time.perf_counter_ns() - begun)


def rows() -> list[UserRow]:
    """Return the rows."""
    return [Crash(2), Crash(64)]
