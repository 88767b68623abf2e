"""The tests of this folder without pytest: `python3 -m tests.gpu.run [PART OF A NAME]`."""

from __future__ import annotations

import sys
import time
import traceback

from tests.gpu import test_engines, test_fused, test_options

MODULES = (test_engines, test_fused, test_options)


def main(wanted: str) -> int:
    reason = test_engines.why_not()
    if reason:
        print(f"nothing is tested: {reason}")
        return 1
    failed = 0
    for module in MODULES:
        for name, function in sorted(vars(module).items()):
            if not name.startswith("test_") or wanted not in f"{module.__name__}.{name}":
                continue
            began = time.monotonic()
            try:
                function()
                verdict = "passed"
            except Exception:
                traceback.print_exc()
                verdict = "FAILED"
                failed += 1
            print(f"{verdict} {name} ({time.monotonic() - began:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
