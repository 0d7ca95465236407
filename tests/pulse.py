"""When the computer stood still: what a test says that ran meanwhile proves nothing.

A guest may be kept from its cores for seconds, by the host or by its neighbours, and
nothing in it can tell but by looking at the clock. One process looks, twenty times a
second on every core, with a priority that no test has, and writes down when it was not
run. A test that fails across such a time is run once more (tests/conftest.py), one that
fails otherwise is not.
"""

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

PERIOD_S = 0.05
#: What is noticed. Whoever has the highest real-time priority waits for nobody here;
#: where that is not permitted, the tests' own load may keep it waiting for a while.
REAL_TIME_S, NORMAL_S = 0.25, 3.0
#: A core of which the host took so much of a second stood still for that second.
STOLEN = 0.5
#: In the environment of the tests: the file that it is written to.
BOOK = "SHMIPI_TESTS_PULSE"


def stood_still(begin: float, end: float) -> float:
    """Return for how many seconds of this time (``time.monotonic()``) cores did."""
    lost = 0.0
    with contextlib.suppress(KeyError, OSError):
        for line in Path(os.environ[BOOK]).read_text().splitlines():
            with contextlib.suppress(ValueError):  # it is just being written
                since, until = map(float, line.split())
                lost += max(0.0, min(end, until) - max(begin, since))
    return lost


def _real_time() -> bool:
    top = os.sched_param(os.sched_get_priority_max(os.SCHED_FIFO))
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, top)
    except OSError:
        return False
    return True


def _note(book: int, begin: float, end: float) -> None:
    os.write(book, f"{begin:.3f} {end:.3f}\n".encode())


def _watch(core: int, book: int) -> None:
    """Of a thread: its own core."""
    os.sched_setaffinity(0, {core})
    least = REAL_TIME_S if _real_time() else NORMAL_S
    stolen, second = _stolen(core), time.monotonic()
    while True:
        before = time.monotonic()
        time.sleep(PERIOD_S)
        now = time.monotonic()
        if now - before - PERIOD_S > least:
            _note(book, before, now)
        if now - second > 1.0:
            taken, stolen = _stolen(core) - stolen, _stolen(core)
            if taken > STOLEN * (now - second):
                _note(book, second, now)
            second = now


def _stolen(core: int) -> float:
    """Return the seconds that the host had for others while this core had work."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith(f"cpu{core} "):
            return int(line.split()[8]) / os.sysconf("SC_CLK_TCK")
    return 0.0


def main(book: str) -> None:
    """Write to ``book`` until standard input ends, with whoever started this."""
    file = os.open(book, os.O_WRONLY | os.O_APPEND)
    for core in os.sched_getaffinity(0):
        threading.Thread(target=_watch, args=(core, file), daemon=True).start()
    sys.stdin.read()
    os.unlink(book)


if __name__ == "__main__":
    main(sys.argv[1])
