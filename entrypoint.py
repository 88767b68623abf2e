#!/usr/bin/env python3
"""The image's entrypoint: `python entrypoint.py [run|check|schema|...]`, see `--help`.

Only the version check lives here, in words that any Python understands.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - this is what it is for
    sys.stderr.write(
        "lorajob needs Python 3.11 or newer; this is %d.%d (%s).\n"  # noqa: UP031 - old Pythons
        "  -> run it with a newer interpreter, or set PYTHON=python3.12 for make\n"
        % (sys.version_info[0], sys.version_info[1], sys.executable)
    )
    sys.exit(4)

from jobs.cli import main

if __name__ == "__main__":
    sys.exit(main())
