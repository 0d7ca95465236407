"""``python -m shmipi`` is the ``shmipi`` command."""

import sys

from shmipi.cli import main

if __name__ == "__main__":
    sys.exit(main())
