"""Users keep their invariants under fire; with a rule broken, their checks notice.

The second is what the first is worth: a check that cannot fail has seen nothing.
"""

import os
import re
import signal
import threading
from pathlib import Path

import pytest

from shmipi import Cluster
from shmipi.cli import main
from shmipi.stress.crew import UserOptions, run_users
from shmipi.stress.rules import rules
from shmipi.stress.users import registry

pytestmark = pytest.mark.stress

USERS = registry.names()
RULES = rules()
ROOT = Path(__file__).resolve().parents[2]
#: The program that shows what a user does.
SHOWN = {
    "blk": "block_completion.py",
    "cpumap": "cpumap_redirect.py",
    "crash": "crash_dump.py",
    "icache": "icache.py",
    "membarrier": "membarrier.py",
    "nmi": "crash_dump.py",
    "nohz": "nohz_full.py",
    "rcu": "rcu.py",
    "rps": "receive_steering.py",
    "sched": "scheduler.py",
    "softirq": "contexts.py",
    "stop": "stop_machine.py",
    "tick": "tick_broadcast.py",
    "tlb": "tlb_shootdown.py",
}
#: What is done to CPUs beside the users' work.
FIRE = {"onoff_interval": 0.05, "kill_interval": 0.15, "stall_interval": 0.1}
#: A broken rule is noticed in 9 of 10 tries: not in three once in a thousand.
TRIES = 3


def run(users, seconds, ncpus=4, machine=(), **options):
    report = run_users(
        UserOptions(
            users=tuple(users),
            duration=seconds,
            machine={"ncpus": ncpus, **dict(machine)},
            **options,
        ),
        line=(said := []).append,
    )
    return report, "\n".join([*said, *report.explain()])


def check(users, seconds, **options):
    """Run them: all did something, and nothing is wrong."""
    report, told = run(users, seconds, **options)
    assert report.verdict == "SUCCESS", told
    for name in users:
        assert sum(report.by_user[name].done.values()) > 0, told
    return report


@pytest.mark.parametrize("user", USERS)
def test_a_user_alone_under_fire(user: str) -> None:
    for seconds in (1.2, 5, 20):  # longer where a busy computer gave it no time
        did = check([user], seconds, **FIRE).hotplug
        if did.kills + did.offline + did.stalls > 3:
            break
    assert did.kills + did.offline + did.stalls > 3


@pytest.mark.skipif(len(USERS) < 2, reason="there are not two users")
def test_all_users_at_once() -> None:
    check(USERS, 2.0)


@pytest.mark.long
@pytest.mark.skipif(len(USERS) < 2, reason="there are not two users")
def test_all_users_at_once_under_fire() -> None:
    check(USERS, 4.0, **FIRE)


@pytest.mark.parametrize("users", [("cpumap",), ("rps",), USERS], ids=len)
def test_a_cpu_that_had_no_core_for_long_breaks_no_rule(users) -> None:
    with Cluster(4) as cluster:
        pid = cluster.cpus[1].pid
        ends: list[threading.Timer] = []

        def progress(seconds: float) -> None:
            if seconds > 0.5 and not ends:
                os.kill(pid, signal.SIGSTOP)
                ends.append(threading.Timer(1.8, os.kill, (pid, signal.SIGCONT)))
                ends[0].start()

        said: list[str] = []
        report = run_users(
            UserOptions(users=tuple(users), duration=3),
            cluster=cluster,
            line=said.append,
            progress=progress,
        )
        ends[0].join()
    assert report.verdict == "SUCCESS", "\n".join([*said, *report.explain()])


@pytest.mark.parametrize("rule", [r for r in RULES if RULES[r].user in USERS])
def test_a_broken_rule_is_noticed_within_ten_seconds(rule: str) -> None:
    told = []
    for _ in range(TRIES):
        report, text = run((), 9.5, broken=(rule,))
        if report.violations:
            assert report.verdict == "FAILURE"
            assert report.duration_s < 10
            return
        told.append(text)
    pytest.fail("\n".join(told))


def test_each_user_has_two_rules_at_least() -> None:
    """And each is said in words that a reader can look up."""
    count = dict.fromkeys(USERS, 0)
    for rule in RULES.values():
        assert rule.function, rule.name
        assert rule.what, rule.name
        count[rule.user] = count.get(rule.user, 0) + 1
    assert all(n >= 2 for n in count.values()), count


def test_the_user_of_every_rule_can_be_checked_shown_and_read_about() -> None:
    """By a check, a program under scripts/ and a paragraph of the README."""
    readme = (ROOT / "README.md").read_text()
    for user in USERS:
        assert user in {rule.user for rule in RULES.values()}, f"{user}: no rule"
        program = SHOWN[user]
        assert (ROOT / "scripts" / program).is_file(), f"{user}: no program"
        assert f"scripts/{program}`" in readme, f"{user}: its program is not told of"
    for rule in re.findall(r"stress --break (\w+\.\w+)", readme):
        assert rule in RULES


@pytest.mark.skipif(not RULES, reason="there are no rules")
def test_the_rules_are_listed_and_a_broken_one_ends_with_status_1(capsys) -> None:
    assert main(["stress", "--break", "help"]) == 0
    listed = capsys.readouterr().out
    for rule in RULES.values():
        assert rule.name in listed
        assert rule.function in listed
    rule = next((rule for rule in RULES if RULES[rule].user in USERS), None)
    if rule is None:
        pytest.skip("no rule has a check yet")
    assert main(["stress", "--break", rule, "--cpus", "4", "--duration", "9500ms"]) == 1
    printed = capsys.readouterr().out
    assert f"broken: {rule} ({RULES[rule].function})" in printed
    assert "--- End of test: FAILURE" in printed
    other = next(user for user in (*USERS, "") if user != RULES[rule].user)
    if other:
        assert main(["stress", "--users", other, "--break", rule]) == 2
        assert f"rule {rule} is one of user" in capsys.readouterr().err
