"""The ``shmipi`` program, and ``python -m shmipi``: Ctrl-C gets an answer from here on.

What the command line needs is imported in ``main``: an import takes time, and Ctrl-C
that comes meanwhile is answered as one that comes later.
"""

import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line of this process and return its status."""
    try:
        from shmipi.cli import main as run

        return run()
    except KeyboardInterrupt:
        exec("")  # as in cli.main
        sys.stderr.write("shmipi: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
