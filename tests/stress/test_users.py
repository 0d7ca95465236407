"""The frame that users of IPIs are stressed in: what they do is counted, what is wrong
is said, whatever happens to the CPUs, and to the check itself."""

import json
import os
import signal
import sys
import threading
import time
import types
from functools import partial

import pytest

import shmipi
from shmipi import atomic, errors, smp
from shmipi.cli import main
from shmipi.stress import crew
from shmipi.stress.crew import UserOptions, run_users
from shmipi.stress.users import nmi, registry
from shmipi.stress.users.base import Beside, Outcome, UserCheck

pytestmark = pytest.mark.stress


def called(info):
    """The handler: counts on the CPU that it runs on."""
    ran, sender = info
    atomic.fetch_add(ran, (smp.smp_processor_id(), sender), 1)


def worker(sent, ran, mode, violations, cpu, seed):
    """Calls its neighbours in turn, and does what is wrong if it is told to."""
    target = seed % len(sent)
    rounds = 0
    while True:
        target = (target + 1) % len(sent)
        try:
            smp.smp_call_function_single(target, called, (ran, cpu))
            sent[cpu, target] += 1
        except (errors.CpuOfflineError, errors.CpuDiedError):
            pass
        rounds += 1
        if mode and cpu == 1 and rounds == 20:
            if mode == "say":
                violations.report("CPU 1 saw what it must not")
            elif mode == "raise":
                raise LookupError("nothing there")
            elif mode == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif mode == "irqs":
                smp.local_irq_disable()
            elif mode == "end":
                return
            elif mode == "hang":
                noticed, end = shmipi.shared("noticed"), time.monotonic() + 20
                while not noticed[0] and time.monotonic() < end:
                    time.sleep(0.001)
        yield


class Check(UserCheck):
    name = "echo"
    mode = ""

    def __init__(self, cluster, seed):
        super().__init__(cluster, seed)
        if self.mode == "make":
            raise ValueError("cannot be made")
        self.sent = self.percpu("sent", "i8", cluster.ncpus)
        self.ran = self.percpu("ran", "i8", cluster.ncpus)
        self.looks, self.deaths, self.dead = 0, 0, 0
        self.beside = Beside(self._beside)

    def _beside(self, ends):
        if self.mode == "beside":
            raise LookupError("nothing beside it")
        ends.wait()

    def work(self):
        return partial(worker, self.sent, self.ran, self.mode, self.violations)

    def begun(self):
        """Have the CPUs got to what the run is about? Its time may be over before."""
        if self.mode == "say":
            return self.violations.count
        return self.sent.any()

    def host(self):
        deadline = time.monotonic() + 20 * (self.looks == 0)
        while not self.begun() and time.monotonic() < deadline:
            time.sleep(0.001)
        self.looks += 1
        if self.beside.ident is None:
            self.beside.start()
        self.beside.look()
        if self.mode == "host":
            raise KeyError("lost")

    def died(self, cpu):
        self.deaths += 1

    def close(self):
        self.beside.end()

    def finish(self):
        self.dead = sum(cpu.state == "dead" for cpu in self.cluster.cpus)
        if self.mode == "finish":
            raise OSError(5, "no end")

    def outcome(self):
        sent, ran = self.sent.T, self.ran
        few = int((ran < sent).sum())
        return Outcome(
            {
                "calls": int(sent.sum()),
                "looks": self.looks,
                "deaths": self.deaths,
                "dead at rest": self.dead,
            },
            {"lost": few},
            ["a call was lost"] if few else [],
        )


class Other(Check):
    name = "other"
    mode = ""


@pytest.fixture(autouse=True)
def users(monkeypatch):
    """Two users for the frame, and `mode`: what the first does wrong."""
    for check in (Check, Other):
        module = types.ModuleType(f"shmipi.stress.users.{check.name}")
        module.Check = check
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(registry, "names", lambda: ("echo", "other"))
    return lambda mode: monkeypatch.setattr(Check, "mode", mode)


@pytest.fixture
def machine(cluster_until_failure):
    with cluster_until_failure(3) as cluster:
        yield cluster


def run(cluster, *names, **options):
    said = []
    options = {"duration": 0.4, **options}
    report = run_users(
        UserOptions(users=names, **options), cluster=cluster, line=said.append
    )
    return report, "\n".join([*said, *report.explain()])


def test_users_work_together_and_alone(machine):
    for names in (("echo",), ("echo", "other"), ("other",)):
        for _ in range(5):  # others may keep the computer busy for as long as a run
            report, told = run(machine, *names, seed=3)
            assert report.verdict == "SUCCESS", told
            assert tuple(report.by_user) == names
            done = [one.done for one in report.by_user.values()]
            if all(one["calls"] > 100 and one["looks"] > 5 for one in done):
                break
        for name, outcome in report.by_user.items():
            assert outcome.done["calls"] > 100
            assert outcome.done["looks"] > 5
            assert f"shmipi-stress: {name}: calls: {outcome.done['calls']}" in told
        assert "seed=3" in report.parameters


def test_hotplug_kills_and_stalls_at_once():
    for seconds in (1.5, 6, 24):  # longer where a busy computer gave it no time
        options = UserOptions(
            users=("echo", "other"),
            duration=seconds,
            onoff_interval=0.02,
            kill_interval=0.1,
            stall_interval=0.05,
            machine={"ncpus": 4},
        )
        report = run_users(options, line=(said := []).append)
        assert report.verdict == "SUCCESS", [*said, *report.explain()]
        did = report.hotplug
        assert [o.done["deaths"] for o in report.by_user.values()] == [did.kills] * 2
        if min(did.offline, did.online, did.kills, did.stalls) >= 1:
            break
    assert min(did.offline, did.online, did.kills, did.stalls) >= 1, did


@pytest.mark.parametrize("kills", [0.0, 0.2])
def test_the_last_cpu_stays_where_the_others_were_killed_meanwhile(
    machine, monkeypatch, kills
):
    """EBUSY is no error then; without kills it is, as there is always another one."""
    real, refused = crew.Cluster.offline, []

    def offline(cluster, cpu, **options):
        if not refused:
            refused.append(cpu)
            raise errors.HotplugError(f"CPU {cpu} is the last one that is online")
        return real(cluster, cpu, **options)

    monkeypatch.setattr(crew.Cluster, "offline", offline)
    for seconds in (0.8, 4, 16):  # longer where a busy computer gave it no time
        refused.clear()
        report, told = run(
            machine,
            "echo",
            duration=seconds,
            onoff_interval=0.03,
            kill_interval=kills,
        )
        if refused and (not kills or report.hotplug.offline):
            break
    assert refused
    if kills:
        assert report.verdict == "SUCCESS", told
        assert report.hotplug.offline >= 1
    else:
        assert any("is the last one" in error for error in report.errors), told


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("raise", "echo: its worker raised LookupError('nothing there')"),
        ("die", "CPU 1 died by itself in the worker of echo"),
        ("irqs", "echo: its worker yielded with interrupts disabled"),
        ("make", "echo: its check cannot be made: ValueError: cannot be made (__init"),
        ("host", "echo: its check failed: KeyError: 'lost' (host, line "),
        ("beside", "echo: its check failed: LookupError: nothing beside it (_beside,"),
        ("finish", "echo: its check failed at the end: OSError: [Errno 5] no end"),
    ],
)
def test_what_goes_wrong_beside_the_invariant_is_an_error_in_a_line(
    machine, users, mode, says
):
    users(mode)
    try:
        seconds = 0.2 if mode == "finish" else 20
        report, told = run(machine, "echo", duration=seconds)
    finally:
        if mode == "die":
            machine.online(1)
    assert report.verdict == "FAILURE"
    assert any(says in error for error in report.errors), told
    assert report.duration_s < 10  # it does not go on as if nothing were
    assert "Traceback" not in "\n".join(report.account())


def test_of_a_cpu_that_dies_by_itself_is_said_how_and_it_is_back_for_the_checks(
    machine, users
):
    """They come to rest on a whole machine: its loss is the one thing that is wrong."""
    users("die")
    report, told = run(machine, "echo", duration=20)
    (error,) = report.errors
    assert error.startswith("died: CPU 1 died by itself in the worker of echo"), told
    assert "SIGKILL" in error
    done = report.by_user["echo"].done
    assert (done["deaths"], done["dead at rest"]) == (1, 0)


@pytest.mark.parametrize(
    ("state", "ms", "blamed"),
    [("R", 5, False), ("R", 40, True), ("S", 5, True), ("T", 40, False)],
    ids=["starved", "had its core", "asleep", "stopped"],
)
def test_who_had_no_core_is_not_blamed_for_an_nmi_and_who_had_one_is(
    machine, state, ms, blamed
):
    """However long it took: by time on a core, of all rounds since it last answered."""
    check = nmi.Check(machine, 1)
    text, had = "NMI backtrace for cpu 1: it did not answer in 9 s\n", [10**9]
    said = {0: "here", 1: text}
    check.users = types.SimpleNamespace(backtraces=lambda cpus, timeout: dict(said))
    check._others = types.SimpleNamespace(ident=1, look=lambda: None)
    check.core_time = lambda cpu: ("R", had[0])
    check.host()
    assert check.violations.count == 0  # none of its core since
    had[0] += ms * 1_000_000
    check.core_time = lambda cpu: (state, had[0])
    check.host()
    assert check.violations.count == blamed
    said[1] = "here"
    check.host()
    assert not check.silent
    assert check.answers == 1 + 1 + 2


@pytest.mark.parametrize(
    "how", ["starved", "had its core", "stops late", "stops", "nobody waits"]
)
def test_who_had_no_core_is_not_blamed_for_not_stopping_and_who_had_is(
    monkeypatch, how
):
    """The NMI behind the line has 10 ms, as in the kernel: less than a turn."""
    clock = types.SimpleNamespace(now=0.0, sent=False)
    clock.monotonic = lambda: clock.now

    def sleep(seconds):
        clock.now += seconds

    def smp_send_stop():
        clock.now += 1.01
        clock.sent = True
        return [] if how in ("stops", "nobody waits") else [1]

    def ran(pid):
        share = {"starved": 0.001}.get(how, 0.3)
        return "R", int(share * clock.now * 1e9) if clock.sent else 0

    class Cpu:
        @property
        def state(self):
            dead = {"stops": 1.0, "stops late": 1.05}.get(how, 99.0)
            return "dead" if clock.now > dead else "running"

    clock.sleep = sleep
    monkeypatch.setattr(nmi, "time", clock)
    monkeypatch.setattr(nmi, "core_time", ran)
    stop = types.SimpleNamespace(smp_send_stop=smp_send_stop)
    other = types.SimpleNamespace(
        users=types.SimpleNamespace(stop=stop), cpus=[None, Cpu()]
    )
    assert nmi._stop(other, 1) is (how != "had its core")
    assert clock.now < (12 if how == "starved" else 3)


def test_what_nmis_are_given_grows_with_the_cpus_on_a_core(machine):
    check = nmi.Check(machine, 1)
    cores = len({cpu.core for cpu in machine.cpus})
    assert check.answer_s[1] == pytest.approx(1 + 0.01 * (machine.ncpus / cores - 1))


def test_a_worker_that_does_not_get_on_is_named(machine, users, monkeypatch):
    users("hang")
    # Longer than a busy computer keeps the others from it.
    monkeypatch.setattr(crew, "_PATIENCE_S", 1.5)
    noticed, said = machine.shared("noticed", "i8", 1), []
    noticed[0] = 0

    def line(text):
        said.append(text)
        noticed[0] |= "no progress in" in text

    options = UserOptions(users=("other", "echo"), duration=4)
    report = run_users(options, cluster=machine, line=line)
    told = "\n".join([*said, *report.explain()])
    assert noticed[0], told
    (stuck,) = [error for error in report.errors if "no progress in" in error]
    assert "CPU 1 (" in stuck, told
    assert "is in the worker of echo" in stuck, told


def test_a_worker_may_end_by_itself(machine, users):
    users("end")
    report, told = run(machine, "echo", "other")
    assert report.verdict == "SUCCESS", told


def test_a_violation_is_told_with_its_words_and_counted(machine, users):
    users("say")
    report, told = run(machine, "echo", "other")
    assert report.verdict == "FAILURE"
    assert report.by_user["echo"].violations == ["CPU 1 saw what it must not"]
    assert report.counted == {"echo": 1, "other": 0}
    assert report.violations == 1
    assert not report.errors
    assert "!!! echo: calls: " in told
    assert "echo: CPU 1 saw what it must not" in told
    users("")
    report, told = run(machine, "echo", "other")  # what was said then is not said now
    assert report.verdict == "SUCCESS", told


def test_more_violations_than_are_kept_are_counted(machine):
    check = Check(machine, 0)
    for number in range(20):
        check.violations.report(f"{number} " + "ä" * 600)
    texts = check.violations.texts()
    assert check.violations.count == 20
    assert [text.split()[0] for text in texts[:-1]] == [str(n) for n in range(16)]
    assert texts[-1] == "and 4 more"


# ---- the command ---------------------------------------------------------------------


def test_the_command_its_json_and_its_status(users, capsys):
    arguments = ["stress", "--users", "all", "--cpus", "2", "--duration", "300ms"]
    assert main([*arguments, "--json", "-"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["verdict"] == "SUCCESS"
    assert list(document["by_user"]) == ["echo", "other"]
    for account in document["by_user"].values():
        assert account["done"]["calls"] > 0
        assert account["invariant"] == {"lost": 0}
        assert account["violations"] == []
    assert "--- End of test: SUCCESS: cpus=2" in printed.err
    users("say")
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert "shmipi-stress: echo: CPU 1 saw what it must not\n" in printed.out
    assert "Traceback" not in printed.out + printed.err


def test_ctrl_c_ends_in_order(machine, users):
    once = []

    def progress(seconds):
        if not once:
            once.append(os.kill(os.getpid(), signal.SIGINT))

    report = run_users(
        UserOptions(users=("echo",), duration=20), cluster=machine, progress=progress
    )
    assert report.interrupted
    assert report.verdict == "SUCCESS", report.explain()
    assert report.duration_s < 10


def test_what_checks_do_beside_a_machine_ends_when_it_dies(boot):
    """Nothing goes on behind the error, to fail when the interpreter ends."""
    cluster = boot(2)

    once = []

    def progress(seconds):  # it may be called again before the death is noticed
        if not once:
            once.append(os.kill(cluster._machine.firmware_pid, signal.SIGKILL))

    options = UserOptions(users=("echo", "other"), duration=20)
    with pytest.raises(errors.MachineDiedError):
        run_users(options, cluster=cluster, progress=progress)
    assert not [seen for seen in threading.enumerate() if isinstance(seen, Beside)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--users", "ecko"], "'ecko' is not one of echo, other, or all"),
        (["--users", "all,nobody"], "'nobody' is not one of echo, other, or all"),
        (["--break", "echo.nothing"], "there is no rule 'echo.nothing'"),
        (["--users", "echo", "--nthreads", "1"], "--nthreads is for calls"),
        (["--users", "echo", "--weight-all", "1"], "--weight-all is for calls"),
        (["--users", "echo", "--cpus", "100000"], "ncpus is 100000"),
        (["--users", ""], "'' is not one of"),
    ],
)
def test_nonsense_is_one_line_and_status_2(arguments, says, capsys):
    assert main(["stress", *arguments]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_a_softirq_that_its_cpus_death_ended_is_under_no_other(boot, eventually):
    """Others raise softirqs there as soon as the CPU is back: no check hears before."""
    from shmipi.stress.users import softirq

    cluster = boot(2, idle="halt")
    check = softirq.Check(cluster, 1)
    tally = check.tally
    ran = softirq._HI

    def has_run(times):  # and has left it: it takes its depth back after it has counted
        return tally[1, ran] == times and tally[1, softirq._DEPTH] == 0

    cluster.call(1, softirq.raise_hi, None)
    eventually(lambda: has_run(1))
    tally[1, softirq._DEPTH] = 1  # in its midst
    os.kill(cluster.cpus[1].pid, signal.SIGKILL)
    eventually(lambda: cluster.cpus[1].state == "dead")
    cluster.online(1)
    cluster.call(1, softirq.raise_hi, None)
    eventually(lambda: has_run(2))
    assert not check.violations.count
    tally[1, softirq._DEPTH] = 1  # in the midst of one that is alive
    cluster.call(1, softirq.raise_hi, None)
    eventually(lambda: tally[1, ran] == 3)
    assert check.violations.count == 1
