"""How long a stranger waits: `make demo` from a fresh clone, cold and again, and `check`.

    .venv/bin/python -m bench.demo        writes bench/results/demo.md

Cold means: no .venv, no llama.cpp build, an empty pip cache. Run it on an idle machine.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "bench" / "results" / "demo.md"


def timed(command: list[str], cwd: Path, env: dict[str, str], code: int = 0) -> float:
    start = time.monotonic()
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    if done.returncode != code:
        raise SystemExit(
            f"{command} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return seconds


def sha256s(clone: Path) -> tuple[str, str]:
    run = clone / "runs" / "demo"
    files = ("adapter/adapter_model.safetensors", "merged/model.safetensors")
    first, second = (hashlib.sha256((run / name).read_bytes()).hexdigest() for name in files)
    return first, second


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        clone, cache = Path(name) / "lorajob", Path(name) / "cache"
        env = {**os.environ, "LORAJOB_CACHE": str(cache), "PIP_CACHE_DIR": str(Path(name) / "pip")}
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        rows.append(("`make setup`, cold", timed(["make", "setup"], clone, env)))
        rows.append(
            ("`make tools`, cold (llama.cpp from source)", timed(["make", "tools"], clone, env))
        )
        rows.append(("`make demo`, the run itself", timed(["make", "demo"], clone, env)))
        cold = sum(seconds for _, seconds in rows)
        first = sha256s(clone)
        again = timed(["make", "demo"], clone, env)
        subprocess.run(["rm", "-rf", str(clone / "runs")], check=True)
        fresh = timed(["make", "demo"], clone, env)
        same = sha256s(clone) == first
        wrong = clone / "wrong.yaml"
        wrong.write_text("name: x\nmodle: {base: y}\n")
        python = str(clone / ".venv" / "bin" / "python")
        bad = min(
            timed([python, "entrypoint.py", "check", "wrong.yaml"], clone, env, 2) for _ in range(5)
        )
        good = min(
            timed([python, "entrypoint.py", "check", "examples/demo.yaml"], clone, env)
            for _ in range(5)
        )
    rows += [
        ("**`make demo` cold, all of it**", cold),
        ("**`make demo` again, everything from scratch but setup and tools**", fresh),
        ("`make demo` again, every stage taken as it is", again),
        ("**`check` of a wrong spec** (best of 5)", bad),
        ("`check` of the demo's spec (best of 5)", good),
    ]
    lines = [
        "# The demo's times",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, "
        f"Python {platform.python_version()}: `python -m bench.demo`",
        "",
        "| what | seconds |",
        "| --- | --- |",
        *(f"| {what} | {seconds:.2f} |" for what, seconds in rows),
        "",
        f"Adapter and merged weights of both runs from scratch: {'the same sha256' if same else 'DIFFERENT'} "
        f"(`{first[0][:16]}`, `{first[1][:16]}`).",
        "",
    ]
    RESULT.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
