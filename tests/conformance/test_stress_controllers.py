"""Every controller under fire, with CPUs that go, come back and die.

The same as ``shmipi stress --controller C --onoff-interval ... --kill-interval ...``;
about a second for each, SHMIPI_STRESS=<seconds> makes each run that long.
"""

import os

import pytest

from shmipi.irq.chips import CHIPS
from shmipi.stress import PRIMITIVES, Options, run
from shmipi.stress.report import Hotplug

pytestmark = pytest.mark.stress

SECONDS = float(os.environ.get("SHMIPI_STRESS") or 0)


@pytest.fixture(autouse=True)
def time_enough(request: pytest.FixtureRequest) -> None:
    if SECONDS:
        request.node.add_marker(pytest.mark.timeout(120 + 3 * SECONDS))


def fire(controller: str, interval: str) -> Hotplug:
    """Run it and require that nothing was wrong: which CPUs went and came."""
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
    assert all(report.by_primitive[name] for name in PRIMITIVES), report.by_primitive
    return report.hotplug


@pytest.mark.parametrize("interval", ["onoff_interval", "kill_interval"])
@pytest.mark.parametrize("controller", CHIPS)
def test_stress(controller: str, interval: str) -> None:
    """A few CPUs went under it; where others keep the computer busy, in another run."""
    for _ in range(3):
        hotplug = fire(controller, interval)
        if interval == "kill_interval":
            enough = hotplug.kills > 1
        else:
            enough = hotplug.offline > 1 and hotplug.online > 1
        if enough:
            break
    assert enough, hotplug
