"""Every feature that an emulator of IPIs has is proven by a test that names its row.

A row is named in the docstring of a test (``row 59``, ``rows 13, 14 and 16``) that
fails when the feature is not there. The table is that of the survey of kernels,
hypervisors and their tests from which shmipi was made; M: it must be there, N: it is
nice to have, B: beyond what is asked for.
"""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
README = TESTS.parent / "README.md"

ROWS = {
    1: ("M", "run a function on one CPU, wait"),
    2: ("M", "run on one CPU, no wait, an internal request"),
    3: ("M", "a request of the caller's, never blocks, -EBUSY while pending"),
    4: ("M", "-ENXIO for an invalid or offline target, the request unlocked"),
    5: ("M", "a call of oneself runs inline with interrupts off, no doorbell"),
    6: ("N", "call any CPU of a mask, nearest first"),
    7: ("M", "call a mask without oneself"),
    8: ("M", "call all others"),
    9: ("M", "call a mask with oneself, the local run beside the remote ones"),
    10: ("M", "a predicate for each CPU when it is sent"),
    11: ("M", "offline CPUs silently skipped in calls of several"),
    12: ("M", "requests of each sender, reuse waits"),
    13: ("M", "a lock-free queue of each CPU, pushed by all"),
    14: ("M", "a doorbell only when the queue was empty"),
    15: ("M", "one doorbell of several targets after all is queued"),
    16: ("M", "take all, reverse to first in first out"),
    17: ("M", "SYNC before ASYNC and irq_work before TTWU"),
    18: ("M", "SYNC unlocks after the function, ASYNC before it"),
    19: ("M", "what a handler stored is seen when its call has returned"),
    20: ("M", "what was stored before a call is seen by its handler"),
    21: ("M", "acknowledge the doorbell before the queue is drained"),
    22: ("M", "a sender with interrupts off or in an interrupt is warned"),
    23: ("N", "exempt from that: an offline sender, oops, early boot"),
    24: ("M", "an unlock of what is not locked is found"),
    25: ("M", "kick_all_cpus_sync"),
    26: ("N", "wake idle CPUs only"),
    27: ("N", "look whether an IPI is pending"),
    28: ("N", "a call on a CPU that may sleep and returns a value"),
    29: ("M", "the queue drained from the idle loop"),
    30: ("M", "no doorbell for a CPU that polls"),
    31: ("M", "the last look before sleep: no wake-up lost"),
    32: ("M", "reschedule: a flag and an IPI"),
    33: ("N", "reschedules collapse by the flag; lazily without an IPI"),
    34: ("N", "a warning for the reschedule of an offline CPU"),
    35: ("N", "the wake list of a remote CPU"),
    36: ("M", "kinds of message over one doorbell"),
    37: ("M", "virtual IPIs with mask and unmask, none lost"),
    38: ("M", "the demux goes on until nothing is left"),
    39: ("N", "a fixed priority among kinds of message"),
    40: ("M", "an unknown message is reported"),
    41: ("N", "reserve, destroy, verify IPIs, with errnos"),
    42: ("N", "vectors with priority classes"),
    43: ("N", "one pending, one in service, EOI"),
    44: ("N", "delivery modes fixed, NMI, INIT, STARTUP"),
    45: ("B", "destination modes physical, logical flat and cluster"),
    46: ("M", "shorthands: self, all, all but self"),
    47: ("N", "broadcasts only when all CPUs have booted"),
    48: ("M", "interrupts masked softly, with pending bits and replay"),
    49: ("M", "enable and disable nest by saved flags"),
    50: ("M", "an NMI that the soft mask does not hold"),
    51: ("N", "a normal IPI where there is no NMI"),
    52: ("M", "backtraces of other CPUs, one request at a time, 10 s"),
    53: ("M", "stop all: an IPI for 1 s, then an NMI for 10 ms"),
    54: ("N", "stop at a crash, with state saved"),
    55: ("N", "a function in an NMI of others, with a time-out for entry"),
    56: ("M", "stop_machine's states"),
    57: ("N", "stop one CPU, stop two, -ENOENT"),
    58: ("M", "offline and online with the queue drained"),
    59: ("M", "a warning, and run all the same, on an offline CPU"),
    60: ("M", "offline is kept out between check and enqueue"),
    61: ("M", "a late doorbell finds an empty queue"),
    62: ("N", "a CPU that dies may send one last call"),
    63: ("M", "a CPU that comes up drains its queue once it is active"),
    64: ("M", "the sudden death of a CPU's process"),
    65: ("N", "irq_work: from an NMI, again while it runs"),
    66: ("N", "irq_work of a remote CPU by the same queue; lazy"),
    67: ("N", "tick broadcast"),
    68: ("M", "TLB shootdown: generations, lazy skipped, in part and in full"),
    69: ("N", "unmaps flushed in a batch"),
    70: ("B", "broadcast of TLB invalidations by hardware"),
    71: ("N", "membarrier private and global, registration, -EPERM"),
    72: ("N", "expedited RCU, -ENXIO tried again"),
    73: ("N", "RPS: a guarded csd, IPIs in a batch at the end"),
    74: ("M", "a bounded ring and a wake-up"),
    75: ("M", "what happens when a ring is full"),
    76: ("N", "messages without a doorbell"),
    77: ("M", "who waits serves its own queue"),
    78: ("N", "rendezvous: setup, action, teardown"),
    79: ("N", "sends put off until a schedule point"),
    80: ("B", "put off for isolated CPUs until they enter the kernel"),
    81: ("M", "stalls: watched, backed off, kicked again, given up if asked"),
    82: ("M", "what the target runs now"),
    83: ("N", "a stall is injected"),
    84: ("M", "trace: queue, entry, exit, send, mask, elided"),
    85: ("M", "counters by CPU and kind"),
    86: ("M", "torture: eight kinds of call, memory order, hotplug, stutter"),
    87: ("M", "bench: dry, self, normal, broadcast, broadcast with a lock"),
    88: ("M", "storm: all to all by offset, mask, list"),
    89: ("M", "conformance: missing, extra, unexpected; a halted target wakes"),
    90: ("B", "posted interrupts, multicast by the hypervisor"),
}

#: Rows that are not there, and the words with which the README says so.
OUT = {
    59: "Nothing arrives at a CPU that is offline",
}

#: Of those, what a kernel must have and what cannot happen here.
CANNOT_HAPPEN = {59}

#: Rows that are still without a test. This only ever gets shorter.
LEFT: set[int] = set()

_NAMED = re.compile(r"\b[Rr]ows? (\d+(?:(?:, | and )\d+)*)")


def docstrings():
    """Where a test is, and its docstring, of all that have one."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                text = ast.get_docstring(node)
                if text:
                    yield f"{path.relative_to(TESTS)}::{node.name}", text


#: A comment of native tests right above the function that it is of.
_C_COMMENT = re.compile(
    r"/\*((?:[^*]|\*(?!/))*)\*/\nstatic [\w *]+?(\w+)\([^;{)]*\)\n\{"
)


def comments():
    """The same of native tests; functions that are called by no main() do not count."""
    for path in sorted(TESTS.rglob("test_*.c")):
        text = path.read_text()
        main = text[text.index("\nint main(") :]
        for comment, name in _C_COMMENT.findall(text):
            if re.search(rf"\b{name}\(", main):
                yield f"{path.relative_to(TESTS)}: {name}", comment


def named(text):
    """The rows that a docstring names."""
    return {int(n) for found in _NAMED.findall(text) for n in re.findall(r"\d+", found)}


def test_rows_are_found_in_docstrings():
    assert named("As in the kernel (row 4).") == {4}
    assert named("Proves rows 13, 14 and 16.\n\nAnd row 9: both.") == {9, 13, 14, 16}
    assert named("Row 7.") == {7}
    assert named("A row of 12 tests, rowing 3, in 7 rows.") == set()


def test_the_table_has_every_row_once():
    assert list(ROWS) == list(range(1, 91))
    assert {kind for kind, _ in ROWS.values()} == {"M", "N", "B"}


def test_every_row_is_proven_or_said_to_be_out():
    proven: dict[int, list[str]] = {}
    for where, text in (*docstrings(), *comments()):
        for row in named(text):
            proven.setdefault(row, []).append(where)
    assert not proven.keys() - ROWS.keys(), "there are no such rows"
    left = {row for row, (kind, _) in ROWS.items() if kind != "B"} - proven.keys()
    left -= LEFT
    told = "\n".join(f"row {n} ({ROWS[n][0]}): {ROWS[n][1]}" for n in sorted(left))
    assert not left - OUT.keys(), f"no test names these rows:\n{told}"
    assert not OUT.keys() - left, "a test names it now: take it out of OUT"


def test_the_readme_says_what_is_out():
    text = " ".join(README.read_text().split())
    for row, words in OUT.items():
        assert words in text, f"row {row}"
        assert ROWS[row][0] == "N" or row in CANNOT_HAPPEN, "it must be there"
