"""A command that a command runs: its signals, and its end."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, Final

from shmipi.errors import CommandError

__all__ = ["Program"]

_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Program:
    """Within it, signals that would end this process end the program, and this after.

    Before it has begun, and once it has ended, they raise ``KeyboardInterrupt``.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = False
        self._pending: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Program:
        # Who ignores it would not be told the status.
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in _ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        process = self._process
        if self._starting:
            self._pending = number
        elif process is None or process.returncode is not None:
            raise KeyboardInterrupt
        elif number != signal.SIGINT:  # which the terminal has sent to it as well
            process.send_signal(number)

    def run(
        self, words: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> int:
        """Run it to its end; return its status, as a shell has it.

        Raises ``CommandError`` with status 127 when there is no such program.
        """
        self._starting = True
        try:
            self._process = process = subprocess.Popen(words, env=environment)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise CommandError(f"{words[0]}: {why}", status=127) from None
        finally:
            self._starting = False
        if self._pending not in (None, signal.SIGINT):
            process.send_signal(self._pending)
        status = process.wait()
        return 128 - status if status < 0 else status
