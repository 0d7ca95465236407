"""Every controller under fire, with CPUs that go, come back and die.

The same as ``shmipi stress --controller C --onoff-interval ... --kill-interval ...``;
about a second for each, SHMIPI_STRESS=<seconds> makes each run that long.
"""

import os
import time

import pytest

from shmipi.irq.chips import CHIPS
from shmipi.stress import PRIMITIVES, Options, run
from shmipi.stress.report import Report

pytestmark = pytest.mark.stress

SECONDS = float(os.environ.get("SHMIPI_STRESS") or 0)


@pytest.fixture(autouse=True)
def time_enough(request: pytest.FixtureRequest) -> None:
    if SECONDS:
        request.node.add_marker(pytest.mark.timeout(120 + 3 * SECONDS))


def fire(controller: str, interval: str) -> Report:
    """Run it and require that nothing was wrong: what happened."""
    said: list[str] = []
    report = run(
        Options(
            duration=SECONDS or 1.2,
            stutter=0,
            machine={"ncpus": 4, "controller": controller, "idle": "halt"},
            **{interval: {"onoff_interval": 0.02, "kill_interval": 0.1}[interval]},
        ),
        line=said.append,
    )
    told = "\n".join([*said, *report.explain()])
    assert report.verdict == "SUCCESS", told
    assert (report.lost, report.duplicated, report.errors) == (0, 0, 0), told
    assert report.calls == sum(report.by_primitive.values())
    return report


@pytest.mark.parametrize("interval", ["onoff_interval", "kill_interval"])
@pytest.mark.parametrize("controller", CHIPS)
def test_stress(controller: str, interval: str) -> None:
    """All calls were used, and a few CPUs went under them: in one more run perhaps.

    That is where others keep the computer busy.
    """
    used: set[str] = set()
    end = time.monotonic() + 30
    while True:
        report = fire(controller, interval)
        used.update(name for name in PRIMITIVES if report.by_primitive[name])
        hotplug = report.hotplug
        if interval == "kill_interval":
            enough = hotplug.kills > 1
        else:
            enough = hotplug.offline > 1 and hotplug.online > 1
        if (enough and used == set(PRIMITIVES)) or time.monotonic() > end:
            break
    assert used == set(PRIMITIVES)
    assert enough, hotplug
