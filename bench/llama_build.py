"""What building llama.cpp costs: lorajob's way beside the ordinary ones.

    .venv/bin/python -m bench.llama_build     writes bench/results/llama_build.md

Every way compiles the same source with the same compiler on all cores; run it on an idle machine.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from jobs.export.llama import build

RESULT = Path(__file__).parent / "results" / "llama_build.md"
QUIET = [
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DGGML_NATIVE=OFF",
]
O2 = ["-DCMAKE_C_FLAGS_RELEASE=-O2 -DNDEBUG", "-DCMAKE_CXX_FLAGS_RELEASE=-O2 -DNDEBUG"]
OURS = [f"-D{key}={value}" for key, value in build.CMAKE_FLAGS.items()]


def timed(source: Path, folder: Path, flags: list[str], targets: list[str]) -> float:
    start = time.monotonic()
    cmake, ninja = build._program("cmake"), build._program("ninja")
    for command in (
        [cmake, "-S", str(source), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
         "-DCMAKE_BUILD_TYPE=Release", *flags],
        [cmake, "--build", str(folder), "--target", *targets],
    ):  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        build._NEEDED = re.compile("")  # the whole archive: the ordinary ways need it
        llama = build._unpack(build._sdist(work), work / "source") / "vendor" / "llama.cpp"
        recipe = Path(build.__file__).parent
        ways = [
            (
                "**lorajob: libllama, -O2, headers precompiled**",
                recipe,
                [*OURS, f"-DLLAMA_CPP_SOURCE={llama}"],
                ["llama"],
            ),
            ("libllama, -O2", llama, [*QUIET, *O2, "-DLLAMA_BUILD_COMMON=OFF"], ["llama"]),
            ("libllama, -O3 (the default)", llama, [*QUIET, "-DLLAMA_BUILD_COMMON=OFF"], ["llama"]),
            (
                "llama-quantize and llama-simple, -O2",
                llama,
                [*QUIET, *O2],
                ["llama-quantize", "llama-simple"],
            ),
        ]
        rows = [
            (what, timed(source, work / str(i), flags, targets))
            for i, (what, source, flags, targets) in enumerate(ways)
        ]
    ours = rows[0][1]
    lines = [
        "# Building llama.cpp",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, "
        f"{build.PACKAGE} {build.VERSION} (llama.cpp {build.LLAMA_CPP_COMMIT}): `python -m bench.llama_build`",
        "",
        "| what is built | seconds | against lorajob's |",
        "| --- | --- | --- |",
        *(f"| {what} | {seconds:.0f} | {seconds / ours:.1f} x |" for what, seconds in rows),
        "",
        "libllama has the function behind `llama-quantize` (`llama_model_quantize`), and tokenizing and",
        "generating; `common`, which the programs need on top, is nothing but their command lines.",
        "",
    ]
    RESULT.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
