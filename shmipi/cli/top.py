"""``shmipi top``: what each CPU of a running machine does, live."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Final

from shmipi.cli.interrupts import interval, opened
from shmipi.cli.options import add_json_option, document, human_stream, write_json
from shmipi.report.table import Listing, can_redraw, columns_of, write

if TYPE_CHECKING:
    from shmipi.machine.inspect import Glance, Inspector
    from shmipi.report.live import Heading, Line, Rates, View

HELP = """\
Shows, live, what each CPU of a running machine does: its state, the task and the
handler that it runs, and a second: interrupts in by kind; calls, reschedules and NMIs
sent, what was rung for them, and what needed none (elided: the target polled;
coalesced: its queue was not empty). While the machine is traced (shmipi trace start
NAME) also how long the newest 256 calls to each CPU waited from their queueing until
their function began (P50, P99): what is not traced is not stamped. It only reads the
machine's memory: nobody is interrupted or kept waiting. Keys: q quits, s sorts by the
next column, r reverses, f or space freezes, j, k and the arrows choose a CPU, enter
shows all that it counts. On a pipe, and with --json, it looks once, for an interval."""
EXAMPLE = """\
shmipi top mymachine
shmipi top mymachine --interval 1s
shmipi top mymachine --json -"""

_WAITS_S: Final = 0.5  # between two looks at how long calls wait, at least
_SLICE_S: Final = 0.25  # how soon a new size of the terminal and the machine's end are
_KEYS: Final = {
    b"\x1b[A": "up",
    b"\x1bOA": "up",
    b"k": "up",
    b"\x1b[B": "down",
    b"\x1bOB": "down",
    b"j": "down",
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
    b"\r": "open",
    b"\n": "open",
    b"\x1b": "back",
    b"s": "sort",
    b"r": "reverse",
    b"f": "freeze",
    b" ": "freeze",
    b"q": "quit",
}


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "name", metavar="NAME", help="the machine, as `shmipi ps` lists it"
    )
    parser.add_argument(
        "--interval",
        type=interval,
        default=0.25,
        metavar="TIME",
        help="between two looks, such as 500ms (default: 250ms)",
    )
    parser.add_argument(
        "--sort",
        choices=("cpu", "in", "out", "elided", "coalesced", "state"),
        default="cpu",
        help="what the lines are sorted by (default: cpu)",
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Show it until q, Ctrl-C or the machine's end; none of them is an error."""
    with opened(args.name) as inspector:
        if args.json is not None or not can_redraw(sys.stdout):
            _once(inspector, args)
            return 0
        with contextlib.suppress(KeyboardInterrupt), _Terminal() as terminal:
            _Top(inspector, args, terminal).run()
        ended = not inspector.alive
    if ended:
        print(f"machine {args.name} ended", file=sys.stderr)
    return 0


# ---- once ----------------------------------------------------------------------------


def _once(inspector: Inspector, args: argparse.Namespace) -> None:
    from shmipi.report import live
    from shmipi.trace.waits import Waits

    waits = Waits(inspector)
    before, _ = inspector.glance(), waits.look()
    time.sleep(args.interval)
    rates = live.Rates.between(before, inspector.glance(), waits.look())
    if args.json != "-":
        stream = human_stream(args)
        header, rows = live.table(rates)
        listing = Listing(
            header,
            right=[name for name in header if name not in ("STATE", "DOING")],
            keys=1,
        )
        for cpu in live.View(args.sort).order(rates):
            listing.add_row(*rows[cpu])
        write(listing.lines(columns_of(stream)), stream)
        if rates.waits is None:
            hint = live.untraced(args.name)
            print(f"P50, P99: calls are not traced there ({hint})", file=sys.stderr)
    write_json(
        args.json,
        document(
            "top",
            name=args.name,
            seconds=round(rates.seconds, 4),
            traced=rates.waits is not None,
            cpus=rates.as_json(),
        ),
    )


# ---- live ----------------------------------------------------------------------------


class _Terminal:
    """The terminal while it is ours: given back as it was, whatever happens.

    SIGTERM and a terminal that goes away are a Ctrl-C; Ctrl-Z gives it back meanwhile.
    """

    def __init__(self) -> None:
        self._out = sys.stdout.fileno()
        self._in = sys.stdin.fileno() if sys.stdin.isatty() else -1
        self._before: list[object] | None = None
        self._shown: list[Line] = []
        self._size = (0, 0)
        self._typed = b""

    def __enter__(self) -> _Terminal:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        signal.signal(signal.SIGTSTP, self._stopped)
        try:
            self._take()
        except BaseException:
            self._give_back()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # Nothing cuts this short: it takes no time.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
            signal.signal(number, signal.SIG_IGN)
        self._give_back()

    def _take(self) -> None:
        if self._in >= 0:
            self._before = termios.tcgetattr(self._in)
            tty.setcbreak(self._in)
        self._shown = []
        self._write("\x1b[?1049h\x1b[?25l\x1b[2J")

    def _give_back(self) -> None:
        with contextlib.suppress(OSError):  # it may be gone
            self._write("\x1b[0m\x1b[?25h\x1b[?1049l")
        if self._before is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._in, termios.TCSADRAIN, self._before)  # type: ignore[arg-type]
            self._before = None

    def _stopped(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._give_back()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.signal(number, self._stopped)  # goes on here after `fg`
        self._take()

    def _write(self, text: str) -> None:
        data = text.encode("utf-8", "replace")
        while data:
            data = data[os.write(self._out, data) :]

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines, now."""
        try:
            columns, lines = os.get_terminal_size(self._out)
        except OSError:
            columns, lines = 0, 0
        return columns or 80, lines or 24

    def show(self, lines: list[Line], size: tuple[int, int]) -> None:
        """Write those lines that are not there already."""
        parts = []
        if size != self._size:
            self._size, self._shown = size, []
            parts.append("\x1b[2J")
        shown = self._shown
        for at, line in enumerate(lines):
            if at < len(shown) and shown[at] == line:
                continue
            text, loud = line
            styled = f"\x1b[7m{text}\x1b[0m" if loud else text
            parts.append(f"\x1b[{at + 1};1H{styled}\x1b[K")
        self._shown = lines
        if parts:
            self._write("".join(parts))

    def keys(self, seconds: float) -> Iterator[str]:
        """Wait so long, at most, and yield what was typed meanwhile."""
        if self._in < 0:
            time.sleep(seconds)
            return
        ready, _, _ = select.select([self._in], [], [], seconds)
        if not ready:
            return
        typed = os.read(self._in, 256)
        if not typed:  # nobody types there any more
            raise KeyboardInterrupt
        while typed:
            for code in sorted(_KEYS, key=len, reverse=True):
                if typed.startswith(code):
                    yield _KEYS[code]
                    typed = typed[len(code) :]
                    break
            else:
                typed = typed[1:]


class _Top:
    """The loop: look, draw what changed, take keys."""

    def __init__(
        self, inspector: Inspector, args: argparse.Namespace, terminal: _Terminal
    ) -> None:
        from shmipi.report import live
        from shmipi.trace.waits import Waits

        self._live = live
        self._inspector, self._terminal = inspector, terminal
        self._interval = float(args.interval)
        self._view: View = live.View(sort=args.sort)
        seen = inspector.view()
        self._heading: Heading = live.Heading(
            live.clean(seen.name),
            f"idle={seen.idle}, doorbell={seen.doorbell}, {seen.controller}",
        )
        self._waits = Waits(inspector)
        self._waited, self._waits_due = self._waits.look(), 0.0
        self._before: Glance = inspector.glance()
        self._rates: Rates = live.Rates.between(
            self._before, self._before, self._waited
        )

    def run(self) -> None:
        """Show it until `q` or the machine's end; Ctrl-C is an exception."""
        due = time.monotonic() + self._interval
        self._draw()
        while True:
            left = due - time.monotonic()
            if left <= 0:
                if not self._inspector.alive:
                    return
                self._look()
                due = max(due + self._interval, time.monotonic())
                self._draw()
                continue
            for key in self._terminal.keys(min(left, _SLICE_S)):
                if key == "quit":
                    return
                self._press(key)
                self._draw()
            if self._terminal.size != self._drawn:
                self._draw()

    def _look(self) -> None:
        now = self._inspector.glance()
        # What is read of the rings costs more than all the rest of a look.
        if now.at >= self._waits_due:
            self._waited, self._waits_due = self._waits.look(), now.at + _WAITS_S
        if not self._view.frozen:
            self._rates = self._live.Rates.between(self._before, now, self._waited)
        self._before = now

    def _draw(self) -> None:
        size = self._drawn = self._terminal.size
        # A larger terminal shows what was scrolled away, a smaller one the chosen.
        self._view = self._view.moved(0, self._cpus, self._live.room(size[1]))
        lines = self._live.picture(self._heading, self._rates, self._view, *size)
        self._terminal.show(lines, size)

    @property
    def _cpus(self) -> int:
        return len(self._rates.glance.states)

    def _press(self, key: str) -> None:
        view, room = self._view, self._live.room(self._terminal.size[1])
        moves = {"up": -1, "down": 1, "page up": -room, "page down": room}
        if key in moves:
            self._view = view.moved(moves[key], self._cpus, room)
        elif key == "sort":
            sorts = self._live.SORTS
            after = sorts[(sorts.index(view.sort) + 1) % len(sorts)]
            self._view = replace(view, sort=after)
        elif key == "reverse":
            self._view = replace(view, backwards=not view.backwards)
        elif key == "freeze":
            self._view = replace(view, frozen=not view.frozen)
        elif key == "open" and view.open is None:
            self._view = replace(view, open=view.order(self._rates)[view.chosen])
        elif key in ("open", "back"):
            self._view = replace(view, open=None)
