"""The host's side of a stress run of users: workers, what is done to CPUs, the account.

::

    from shmipi.stress.crew import UserOptions, run_users

    report = run_users(UserOptions(users=("tlb",), duration=3, machine={"ncpus": 4}))
    assert report.verdict == "SUCCESS", report.explain()
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from shmipi.cluster import Cluster
from shmipi.errors import (
    CpuDiedError,
    MachineDiedError,
    RemoteCallError,
    ShmipiError,
)
from shmipi.stress import rules, shift
from shmipi.stress.options import check_times
from shmipi.stress.report import Hotplug
from shmipi.stress.tasks import Tasks
from shmipi.stress.unrest import driver_word, facts, taken
from shmipi.stress.users import registry
from shmipi.stress.users.base import Outcome, UserCheck, Worker

__all__ = ["UserOptions", "UsersReport", "run_users"]

_HOST_S: Final = 0.02
_WATCH_S: Final = 0.2
#: Seconds without progress that are too many; fewer with a rule broken, where it is
#: what is looked for.
_PATIENCE_S: Final = 15.0
_BROKEN_PATIENCE_S: Final = 3.0
#: How long a run with a broken rule goes on after its first violation.
_AFTERMATH_S: Final = 0.2
_COMPLAINTS: Final = 20
#: Counters of the machine that must not move, and what it means that they did.
_CLEAN: Final = {
    "corrupt": "damaged queue entries dropped by the machine",
    "unraisable": "a handler raised",
}


@dataclass(frozen=True)
class UserOptions:
    """A stress run of users; times are in seconds.

    ``users`` are those of ``shmipi.stress.users``, ``broken`` the rules
    (``user.rule``) that are switched off: then the run ends at the first violation.
    Without ``users`` they are those that the rules are of. The rest is as in
    ``Options``.
    """

    users: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    duration: float = 10.0
    stat_interval: float = 5.0
    onoff_interval: float = 0.0
    kill_interval: float = 0.0
    stall_interval: float = 0.0
    seed: int | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_times(self)
        known = registry.names()
        for user in self.users:
            if user not in known:
                raise ValueError(
                    f"there is no user {user[:60]!r}: choose from {', '.join(known)},"
                    " or all"
                )
        for rule in rules.chosen(self.broken):
            if rule.user not in self.chosen():
                raise ValueError(
                    f"rule {rule.name} is one of user {rule.user}, which is not among"
                    f" {', '.join(self.chosen())}"
                )
        if not self.chosen():
            raise ValueError("users is empty: name at least one")

    def chosen(self) -> tuple[str, ...]:
        """Return the users that it runs, each once."""
        given = self.users or rules.users_of(rules.chosen(self.broken))
        return tuple(dict.fromkeys(given))


@dataclass
class UsersReport:
    """The account of a run of users.

    ``by_user`` has for each what it did, what its invariant counted and its violations,
    of which ``counted`` is how many there were, those without a text included;
    ``errors`` is what went wrong beside them: a CPU that died by itself, a worker that
    raised, one that does not get on.
    """

    by_user: dict[str, Outcome]
    counted: dict[str, int]
    errors: list[str]
    broken: list[str]
    hotplug: Hotplug
    seed: int
    duration_s: float
    parameters: str
    machine: dict[str, Any]
    interrupted: bool = False

    @property
    def violations(self) -> int:
        """How many violations of an invariant were counted."""
        return sum(self.counted.values())

    @property
    def verdict(self) -> str:
        """SUCCESS or FAILURE."""
        return "FAILURE" if self.violations or self.errors else "SUCCESS"

    def account(self) -> list[str]:
        """Return a line for each user: what was done, and what was counted."""
        lines = []
        for name, outcome in self.by_user.items():
            parts = [
                " ".join(f"{key}: {value}" for key, value in counts.items())
                for counts in (outcome.done, outcome.invariant)
                if counts
            ]
            bad = self.counted[name]
            parts.append(f"violations: {bad}")
            lines.append(f"{'!!! ' if bad else ''}{name}: {'; '.join(parts)}")
        return lines

    def explain(self) -> list[str]:
        """Return a line for each thing that was wrong."""
        lines = [
            f"{name}: {text}"
            for name, outcome in self.by_user.items()
            for text in outcome.violations
        ]
        return lines + self.errors

    def end(self) -> str:
        """Return the last line."""
        return f"shmipi-stress:  --- End of test: {self.verdict}: {self.parameters}"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields of the JSON document."""
        return {
            **asdict(self),
            "violations": self.violations,
            "verdict": self.verdict,
        }


def run_users(
    options: UserOptions,
    *,
    cluster: Cluster | None = None,
    line: Callable[[str], None] | None = None,
    progress: Callable[[float], None] | None = None,
) -> UsersReport:
    """Run users against their invariants as ``options`` say: the account of it.

    ``cluster``, ``line``, ``progress`` and what is raised are as of
    ``shmipi.stress.run``.
    """
    # Else each CPU, and each that is booted anew, imports them, many at a time.
    modules = [shift.__name__, *registry.modules(options.chosen())]
    options_of = {"preload": modules, **options.machine}
    with taken(cluster, options_of, _PATIENCE_S) as machine:
        return _Crew(options, machine, line, progress).run()


class _Crew(Tasks):
    noun = "task"

    def __init__(
        self,
        options: UserOptions,
        cluster: Cluster,
        line: Callable[[str], None] | None,
        progress: Callable[[float], None] | None,
    ) -> None:
        super().__init__(cluster, options, options.seed, line, progress)
        self.options = options
        self.broken = rules.chosen(options.broken)
        self.control = cluster.shared(shift.CONTROL, "u8", shift.CONTROL_WORDS)
        self.board = cluster.percpu(shift.BOARD, "u8", shift.BOARD_WORDS)
        self.control[...] = self.board[...] = 0
        self.control[shift.K_DRIVER] = driver_word(cluster)
        self.checks: list[UserCheck] = []
        self.names = options.chosen()
        self.workers: dict[str, Worker] = {}
        self.counted: dict[str, int] = {}
        self.errors: list[str] = []
        self.errors_more = 0
        self.over = False  # by itself: there is nothing more to learn
        self.turn = threading.Lock()  # whose turn it is with the checks
        self.lost: list[int] = []  # CPUs that have died by themselves

    # ---- the run ---------------------------------------------------------------------

    def run(self) -> UsersReport:
        try:
            return self._run()
        finally:
            for check in self.checks:
                with contextlib.suppress(ShmipiError):
                    check.close()

    def _run(self) -> UsersReport:
        before = self.cluster.counters()
        self.line(f"shmipi-stress: --- Start of test: {self.parameters()}")
        for rule in self.broken:
            self.line(
                f"shmipi-stress: broken: {rule.name} ({rule.function}): {rule.what}"
            )
        interrupted, begun = False, time.monotonic()
        try:
            try:
                if self.prepare():
                    self.machine.set_broken(rules.mask(self.broken))
                    for cpu in range(self.cluster.ncpus):
                        self.start(cpu)
                    self.await_ready()
                    begun = time.monotonic()
                    self.control[shift.K_GO] = 1
                    self.unrest.start()
                    self.serve(begun)
            except KeyboardInterrupt:
                interrupted = True
            finally:
                # First: what is done to a CPU just now waits for all that work still.
                self.control[shift.K_STOP] = 1
                self.unrest.end()
            if self.unrest.failure is not None:
                raise self.unrest.failure
            ended = time.monotonic()
            at_rest = self.end_workers()
        finally:
            with contextlib.suppress(ShmipiError):
                self.machine.set_broken(0)
        by_user = self.judge(at_rest)
        self.compare(before)
        report = UsersReport(
            by_user=by_user,
            counted=self.counted,
            errors=self.all_errors(),
            broken=[rule.name for rule in self.broken],
            hotplug=self.unrest.hotplug,
            seed=self.seed,
            duration_s=round(ended - begun, 3),
            parameters=self.parameters(),
            machine=facts(self.cluster),
            interrupted=interrupted,
        )
        for text in report.account():
            self.line(f"shmipi-stress: {text}")
        self.line(f"shmipi-stress: {report.hotplug}")
        self.line(report.end())
        return report

    def parameters(self) -> str:
        """Return the run's parameters in one line."""
        options, cluster = self.options, self.cluster
        words = [
            f"cpus={cluster.ncpus}",
            f"idle={cluster.idle}",
            f"doorbell={cluster.doorbell}",
            f"controller={cluster.controller}",
            f"duration={options.duration:g}",
            f"stat_interval={options.stat_interval:g}",
            f"onoff_interval={options.onoff_interval:g}",
            f"kill_interval={options.kill_interval:g}",
            f"stall_interval={options.stall_interval:g}",
            f"seed={self.seed}",
            f"users={','.join(self.names)}",
        ]
        if self.broken:
            words.append(f"broken={','.join(rule.name for rule in self.broken)}")
        return " ".join(words)

    def prepare(self) -> bool:
        """Make the checks and their workers; False: one cannot be made."""
        for name in self.names:
            with self.reporting(f"{name}: its check cannot be made"):
                check = registry.load(name)(self.cluster, self.seed)
                self.checks.append(check)
                self.workers[name] = check.work()
        return not self.errors

    @contextlib.contextmanager
    def reporting(self, what: str) -> Iterator[None]:
        """Make what a check raises an error of the run, never a traceback of it."""
        try:
            yield
        except MachineDiedError:
            raise
        except Exception as error:
            where = ""
            frame = error.__traceback__
            while frame is not None:  # the last frame says more than the message
                where = f" ({frame.tb_frame.f_code.co_name}, line {frame.tb_lineno})"
                frame = frame.tb_next
            self.error("raised", f"{what}: {type(error).__name__}: {error}{where}")
            self.over = True

    def serve(self, begun: float) -> None:
        """Let the checks act, watch and print until the time is over."""
        options = self.options
        deadline = begun + options.duration
        next_line = begun + options.stat_interval
        next_watch = begun + _WATCH_S
        while (now := time.monotonic()) < deadline:
            if self.over or self.unrest.failure is not None:
                return
            with self.turn:
                for check in self.checks:
                    with self.reporting(f"{check.name}: its check failed"):
                        check.host()
            if self.broken and any(check.violations.count for check in self.checks):
                deadline = min(deadline, now + _AFTERMATH_S)
            if now >= next_watch:
                next_watch = now + _WATCH_S
                self.watch(now)
                self.progress(now - begun)
            if now >= next_line:
                next_line += options.stat_interval
                self.line(f"shmipi-stress: {self.so_far(now - begun)}")
            time.sleep(max(0.0, min(_HOST_S, deadline - now)))
        self.progress(options.duration)

    def so_far(self, seconds: float) -> str:
        """Return the line of statistics."""
        seen = {check.name: check.violations.count for check in self.checks}
        rounds = int(self.board[:, shift.B_BEAT].sum())
        bad = " ".join(f"{name}: {count}" for name, count in seen.items() if count)
        return (
            f"{'!!! ' if bad else ''}{seconds:.0f} s: rounds: {rounds}"
            f" {self.unrest.hotplug} violations: {bad or 0}"
        )

    # ---- the workers' tasks ----------------------------------------------------------

    def task_of(self, incarnation: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return shift.work, (self.workers, self.seed, incarnation)

    def await_ready(self) -> None:
        """Wait until every CPU has its workers."""
        deadline = time.monotonic() + self.patience() + 0.3 * self.cluster.ncpus
        while self.control[shift.K_READY] < self.cluster.ncpus and not self.over:
            self.cluster._check()
            now = time.monotonic()
            if now > deadline:
                self.error("stalled", "the workers have not all started")
                self.over = True
            self.watch(now)
            time.sleep(0.002)

    def by_itself(self, cpu: int, error: CpuDiedError) -> None:
        self.error("died", f"CPU {cpu} died by itself{self.in_turn(cpu)}: {error}")
        self.over = True
        self.lost.append(cpu)

    def failed(self, cpu: int, error: RemoteCallError) -> None:
        self.error("raised", f"CPU {cpu}: {error}")
        self.over = True

    def beat(self, cpu: int) -> int:
        return int(self.board[cpu, shift.B_BEAT])

    def excused(self, cpu: int) -> bool:
        """It has not begun, is being taken away, or is not online."""
        return (
            not self.control[shift.K_GO]
            or self.state(cpu) == "offline"
            or self.unrest.has(cpu)
        )

    def stuck(self, cpu: int) -> None:
        self.over = bool(self.broken)

    def error(self, kind: str, text: str) -> None:
        """Keep what went wrong."""
        with self.lock:
            if len(self.errors) < _COMPLAINTS:
                self.errors.append(f"{kind}: {text}")
            else:
                self.errors_more += 1
        self.line(f"shmipi-stress: !!! {text}")

    def all_errors(self) -> list[str]:
        """Return what went wrong, and how much more did."""
        more = [f"and {self.errors_more} more"] if self.errors_more else []
        return self.errors + more

    def patience(self) -> float:
        """Return after how many seconds a CPU does not get on."""
        least = _BROKEN_PATIENCE_S if self.broken else _PATIENCE_S
        return least + 0.1 * self.cluster.ncpus

    def in_turn(self, cpu: int) -> str:
        """Say whose worker a CPU was in."""
        place = int(self.board[cpu, shift.B_DOING])
        return f" in the worker of {self.names[place - 1]}" if place else ""

    def who(self, cpu: int) -> str:
        """Say what a CPU does."""
        return f"CPU {cpu} ({self.state(cpu)}) is{self.in_turn(cpu) or ' in none'}"

    # ---- what is done to CPUs, as told by Unrest -------------------------------------

    def booted(self, cpu: int) -> None:
        """Tell the checks; then it gets new workers."""
        with self.turn:
            for check in self.checks:
                with self.reporting(f"{check.name}: its check failed"):
                    check.died(cpu)
        super().booted(cpu)

    # ---- the end ---------------------------------------------------------------------

    def end_workers(self) -> bool:
        """End the workers; did all end?"""
        self.control[shift.K_STOP] = 1
        left = self.end_all(self.patience())
        self.find_lost()
        return not left

    def find_lost(self) -> None:
        """Boot what has died by itself: checks come to rest on a whole machine.

        Else what waits for a CPU that is not there were violations, and beside them
        the error were one of many.
        """
        for cpu in self.lost:
            try:
                self.cluster.online(cpu)
            except MachineDiedError:
                raise
            except ShmipiError as error:
                self.error("hotplug", f"CPU {cpu} is not back: {error}")
                continue
            with self.turn:
                for check in self.checks:
                    with self.reporting(f"{check.name}: its check failed"):
                        check.died(cpu)

    def judge(self, at_rest: bool) -> dict[str, Outcome]:
        """Let every user come to rest, and give its account."""
        by_user = {}
        for check in self.checks:
            outcome = Outcome()
            with self.reporting(f"{check.name}: its check failed at the end"):
                if at_rest and self.control[shift.K_GO]:
                    check.finish()
            with self.reporting(f"{check.name}: its check gives no account"):
                outcome = check.outcome()
            told = len(outcome.violations)
            self.counted[check.name] = check.violations.count + told
            outcome.violations = check.violations.texts() + outcome.violations
            by_user[check.name] = outcome
        return by_user

    def compare(self, before: dict[str, Any]) -> None:
        """Look at the machine's own counters of what must not happen."""
        after = self.cluster.counters()
        for name, what in _CLEAN.items():
            grown = int((after[name] - before[name]).sum())
            if grown:
                self.error("counters", f"{what}: {name} grew by {grown}")
