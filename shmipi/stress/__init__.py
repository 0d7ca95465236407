"""``scftorture`` on processes: calls of every kind at random, each accounted for.

::

    from shmipi.stress import Options, run

    report = run(Options(duration=3, machine={"ncpus": 4}))
    assert report.verdict == "SUCCESS"

Imports nothing heavy: the CPUs of a machine import this package too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from shmipi.stress.options import PRIMITIVES, Options

if TYPE_CHECKING:
    from shmipi.cluster import Cluster
    from shmipi.stress.report import Report

__all__ = ["PRIMITIVES", "Options", "run"]


def run(
    options: Options,
    *,
    cluster: Cluster | None = None,
    line: Callable[[str], None] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Report:
    """Torture a machine as ``options`` say and return the account of it.

    ``cluster`` is a machine that is up already, with every CPU online and idle (it is
    left so); None: one is booted from ``options.machine`` and shut down afterwards.
    ``line`` gets each line of statistics and every complaint, ``progress`` the seconds
    done so far, a few times a second. Ctrl-C ends the run in order: the report says
    ``interrupted``.

    Raises ``ValueError`` for options that make no sense on this machine, what
    ``Cluster`` raises, and ``MachineDiedError`` when the firmware died.
    """
    from shmipi.stress.driver import torture

    return torture(options, cluster, line, progress)
