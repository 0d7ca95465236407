"""Machines under fire: every call accounted for, whatever happens to the CPUs.

A second or a few each; SHMIPI_STRESS=<seconds> makes each run that long instead.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import shmipi
from shmipi import errors
from shmipi.cli import main
from shmipi.names import DOORBELLS
from shmipi.stress import PRIMITIVES, Options, run

pytestmark = pytest.mark.stress

SECONDS = float(os.environ.get("SHMIPI_STRESS") or 0)


@pytest.fixture(autouse=True)
def time_enough(request: pytest.FixtureRequest) -> None:
    if SECONDS:
        request.node.add_marker(pytest.mark.timeout(120 + 3 * SECONDS))


def torture(ncpus: int, seconds: float, *, machine=(), **options):
    """Run it and require that nothing was wrong: the report."""
    said: list[str] = []
    report = run(
        Options(
            duration=SECONDS or seconds,
            machine={"ncpus": ncpus, **dict(machine)},
            **options,
        ),
        line=said.append,
    )
    told = "\n".join([*said, *report.explain()])
    assert report.verdict == "SUCCESS", told
    assert (report.lost, report.duplicated, report.errors) == (0, 0, 0), told
    assert report.calls == sum(report.by_primitive.values())
    return report


def torture_until(seen, ncpus: int, seconds: float, **options):
    """For longer where a busy computer gave it no time to do what is looked for."""
    for times in (1, 4, 16):
        report = torture(ncpus, seconds * times, **options)
        if seen(report):
            break
    return report


@pytest.mark.parametrize("doorbell", DOORBELLS)
@pytest.mark.parametrize("ncpus", [2, 5])
def test_calls_of_every_kind(ncpus: int, doorbell: str) -> None:
    """Proves rows 19, 20 and 86."""
    report = torture_until(
        lambda report: all(report.by_primitive[name] for name in PRIMITIVES),
        *(ncpus, 0.8),
        machine={"doorbell": doorbell, "idle": "halt"},
        stutter=0,
    )
    assert all(report.by_primitive[name] for name in PRIMITIVES), report.by_primitive
    assert report.executions > 0
    assert report.in_flight_at_death == 0


@pytest.mark.parametrize("handler", ["python", "native"])
def test_one_kind_of_handler(handler: str) -> None:
    torture(3, 1, handler=handler)


@pytest.mark.parametrize("idle", ["poll", "haltpoll"])
def test_spinning_cpus(idle: str) -> None:
    torture(2, 1, machine={"idle": idle}, nthreads=1)


def test_cooperative_cpus() -> None:
    torture(3, 1, machine={"kick": False})


def test_long_handlers() -> None:
    torture(2, 3, longwait=1, handler="python", stutter=0)


@pytest.mark.parametrize("doorbell", ["futex", "signal"])
def test_hotplug_under_fire(doorbell: str) -> None:
    """Proves rows 58 and 86."""
    report = torture_until(
        lambda report: (
            min(report.hotplug.offline, report.hotplug.online) > 1
            and sum(report.offline.values())
        ),
        *(4, 2),
        onoff_interval=0.02,
        machine={"doorbell": doorbell},
    )
    assert report.hotplug.offline > 1
    assert report.hotplug.online > 1
    assert sum(report.offline.values())
    assert report.in_flight_at_death == 0


def test_kills_under_fire() -> None:
    report = torture_until(lambda r: r.hotplug.kills > 3, 4, 3, kill_interval=0.2)
    assert report.hotplug.kills > 3


def test_hotplug_and_kills_under_fire() -> None:
    report = torture(6, 4, kill_interval=0.1, onoff_interval=0.05)
    assert report.hotplug.kills
    assert report.hotplug.offline


@pytest.mark.long
@pytest.mark.timeout(200)
def test_two_hundred_kills_at_random_moments() -> None:
    begun = time.monotonic()
    report = run(
        Options(
            duration=max(150.0, SECONDS),
            kill_interval=0.02,
            kills=200,
            machine={"ncpus": 4},
        ),
        line=(said := []).append,
    )
    told = "\n".join([*said, *report.explain()])
    assert report.hotplug.kills == 200, f"in {time.monotonic() - begun:.0f} s: {told}"
    assert report.verdict == "SUCCESS", told
    assert report.lost == report.duplicated == 0
    assert report.in_flight_at_death > 0  # else none was killed with a call in hand


@pytest.mark.alone
def test_far_more_cpus_than_cores() -> None:
    report = torture(112, 1.5, stutter=0)
    assert report.calls > 112


def test_a_machine_that_is_up_is_left_as_it_was() -> None:
    with shmipi.Cluster(3) as cluster:
        first = run(Options(duration=0.5, seed=7), cluster=cluster)
        again = run(Options(duration=0.5, onoff_interval=0.02), cluster=cluster)
        assert first.verdict == again.verdict == "SUCCESS"
        assert str(cluster.online_mask) == "0-2"
        assert cluster.run(os.getpid) == [cpu.pid for cpu in cluster.cpus]


# ---- a machine that misbehaves must be found -----------------------------------------


def test_a_cpu_that_dies_by_itself_is_an_error() -> None:
    with shmipi.Cluster(3) as cluster:
        victim = cluster.cpus[1].pid
        once = []

        def progress(seconds: float) -> None:
            if seconds > 0.4 and not once:
                once.append(os.kill(victim, signal.SIGKILL))

        report = run(Options(duration=2), cluster=cluster, progress=progress)
        assert once
        assert report.verdict == "FAILURE"
        assert report.error_counts["died"] >= 1
        # Lost is what was sent to it before anybody knew.
        assert report.duplicated == 0


def test_the_firmwares_death_ends_it() -> None:
    cluster = shmipi.Cluster(3)
    firmware = cluster._machine.firmware_pid

    def progress(seconds: float) -> None:
        if seconds > 0.4:
            os.kill(firmware, signal.SIGKILL)

    begun = time.monotonic()
    with cluster, pytest.raises(errors.MachineDiedError):
        run(Options(duration=20), cluster=cluster, progress=progress)
    assert time.monotonic() - begun < 10


# ---- the command ---------------------------------------------------------------------


def shmipi_stress(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "shmipi", "stress", *arguments]


def test_the_command_and_its_json() -> None:
    done = subprocess.run(
        shmipi_stress("--cpus", "3", "--duration", "1", "--json", "-", "--seed", "5"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "shmipi.stress/1"
    assert document["verdict"] == "SUCCESS"
    assert document["seed"] == 5
    assert document["calls"] == sum(document["by_primitive"].values()) > 0
    assert document["lost"] == document["duplicated"] == document["errors"] == 0
    assert "--- End of test: SUCCESS: cpus=3" in done.stderr


def test_ctrl_c_ends_in_order() -> None:
    with subprocess.Popen(
        shmipi_stress("--cpus", "3", "--duration", "60", "--stat-interval", "200ms"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if " ver: " in line:
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert " VER: " in out
    assert "--- End of test: SUCCESS" in out
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--weight-single", "-2"], "too small"),
        ([f"--weight-{name.replace('_', '-')}=0" for name in PRIMITIVES], "all zero"),
        (["--cpus", "2", "--nthreads", "3"], "nthreads is 3"),
        (["--duration", "soon"], "not a duration"),
        (["--stat-interval", "0"], "'0' is no time"),
        (["--cpus", "100000"], "ncpus is 100000"),
    ],
)
def test_nonsense_is_one_line_and_status_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stress", *arguments]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
