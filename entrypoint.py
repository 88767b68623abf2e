#!/usr/bin/env python3
"""The image's entrypoint: `python entrypoint.py [run|check|schema|...]`, see `--help`.

Only what comes before all imports lives here: the version check, in words that any Python
understands, and hearing SIGTERM.
"""

import os
import signal
import sys

if sys.version_info < (3, 11):  # noqa: UP036 - this is what it is for
    sys.stderr.write(
        "lorajob needs Python 3.11 or newer; this is %d.%d (%s).\n"  # noqa: UP031 - old Pythons
        "  -> run it with a newer interpreter, or set PYTHON=python3.12 for make\n"
        % (sys.version_info[0], sys.version_info[1], sys.executable)
    )
    sys.exit(4)


def _stop(number, frame):  # type: ignore[no-untyped-def] # any Python understands it
    os.write(2, b"lorajob: stopped by SIGTERM before it had begun\n")
    os._exit(128 + number)


# A container's first process does not hear signals that it has no handler for. A run has its own,
# once it is imported; until then, and in other commands, there is nothing to keep.
if os.getpid() == 1:
    signal.signal(signal.SIGTERM, _stop)

from jobs.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
