"""What the image's size consists of, and what is left out of it.

    sudo .venv/bin/python -m bench.image                      the CPU image that .ci/image built
    sudo .venv/bin/python -m bench.image --cuda FOLDER        and requirements.lock, installed there
                                                              with `pip install --target`

writes bench/results/image.md. The CUDA image itself takes a machine with its base image.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from image.packages import unused
from tests.image.podman import IMAGE, STORE, command, podman

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "image.md"
MB = 1e6
SMALL = 12 * MB  # packages below this are counted together

# Run in the image: bytes of each part, and of each package by what its RECORD lists.
LOOK = """
import json, os, sysconfig
def size(top, skip=()):
    total = 0
    for folder, folders, files in os.walk(top):
        folders[:] = [f for f in folders if os.path.join(folder, f) not in skip]
        total += sum(os.lstat(os.path.join(folder, f)).st_size for f in files)
    return total
site = sysconfig.get_path("purelib")
app = "/opt/lorajob"
parts = {
    "llama.cpp": size(app + "/llama.cpp"), "demo": size(app + "/examples"),
    "lorajob": size(app, (app + "/llama.cpp", app + "/examples", app + "/venv")),
    "system": size("/", ("/proc", "/sys", "/dev", app)),
}
code = sum(os.lstat(os.path.join(t, f)).st_size for t, _, fs in os.walk(site) for f in fs if f.endswith(".pyc"))
from importlib.metadata import distributions
found = {}
for each in distributions(path=[site]):
    files = [str(each.locate_file(f)) for f in each.files or []]
    found[each.name] = sum(os.lstat(f).st_size for f in files if os.path.exists(f) and not f.endswith(".pyc"))
print(json.dumps({"parts": parts, "bytecode": code, "packages": found}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuda", type=Path, help="requirements.lock, as pip installed it")
    arguments = parser.parse_args()
    look = podman("run", "--rm", "--network", "none", "--entrypoint", "python", IMAGE, "-c", LOOK)
    found = json.loads(look.out)
    lines = [
        "# The image",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, 2 cores, x86_64, buildah and podman of Debian 12: `python -m bench.image`",
        "",
        *times(),
        "",
        "## The CPU image, in MB",
        "",
        *table(cpu_rows(found)),
        "",
        f"Packed with gzip, as a registry holds it: {packed() / MB:.0f} MB.",
    ]
    if arguments.cuda:
        lines += ["", *cuda(arguments.cuda)]
    RESULT.write_text("\n".join(lines) + "\n")
    print(RESULT.read_text())


def cpu_rows(found: dict[str, Any]) -> list[tuple[str, float, str]]:
    parts = found["parts"]
    return [
        ("Debian with Python", parts["system"], "the C library, Python 3.11, certificates"),
        *package_rows(found["packages"], found["bytecode"]),
        ("llama.cpp", parts["llama.cpp"], "libllama, the converter, the bindings"),
        ("the demo", parts["demo"], "a model of 4 million parameters and its data: proves a node offline"),
        ("lorajob", parts["lorajob"], "with bytecode, and the list of packages"),
    ]  # fmt: skip


# Why the large ones are there.
WHY = {
    "torch": "",
    "pyarrow": "datasets reads and keeps rows with it",
    "transformers": "",
    "pandas": "datasets asks for it",
    "sympy": "torch asks for it",
    "numpy": "",
    "botocore": "S3",
    "networkx": "torch asks for it",
    "tokenizers": "",
    "bitsandbytes": "4-bit weights; of its builds the one for this CUDA",
    "triton": "compiles kernels at run time",
    "nvidia-cublas": "matrix products",
    "nvidia-cudnn-cu13": "torch loads it",
    "nvidia-cufft": "torch is linked with it",
    "nvidia-cusparselt-cu13": "torch is linked with it",
    "nvidia-nccl-cu13": "torch is linked with it",
    "nvidia-cusparse": "torch is linked with it",
    "nvidia-cusolver": "torch is linked with it",
    "nvidia-curand": "torch is linked with it",
    "nvidia-cuda-nvrtc": "torch is linked with it",
    "nvidia-nvjitlink": "cuSPARSE and cuSOLVER are linked with it",
    "nvidia-nvshmem-cu13": "torch is linked with it",
    "diffusers": "unsloth-zoo asks for it",
    "torchvision": "unsloth asks for it",
    "torchao": "unsloth-zoo asks for it",
    "pillow": "torchvision asks for it",
}


def package_rows(packages: dict[str, int], bytecode: int) -> list[tuple[str, float, str]]:
    large = {name: size for name, size in packages.items() if size >= SMALL}
    rest = {name: size for name, size in packages.items() if size < SMALL}
    return [
        *((name, size, WHY.get(name, "")) for name, size in sorted(large.items(), key=lambda x: -x[1])),
        (f"{len(rest)} smaller packages", sum(rest.values()), ""),
        ("their bytecode", bytecode, "without it a start takes 10 s longer"),
    ]  # fmt: skip


def table(rows: list[tuple[str, float, str]]) -> list[str]:
    total = sum(size for _, size, _ in rows)
    return [
        "| part | MB | |", "| --- | --- | --- |",
        *(f"| {name} | {size / MB:.0f} | {why} |" for name, size, why in rows),
        f"| **together** | **{total / MB:.0f}** | |",
    ]  # fmt: skip


def left_out(site: Path, variant: str) -> list[tuple[str, int]]:
    """What is removed of the installed packages, by what it is."""
    seen: set[Path] = set()
    found: dict[str, int] = {}
    for top, what in unused(site, variant):
        for path in [top] if top.is_file() else top.rglob("*"):
            if path.is_file() and path not in seen and path.suffix != ".pyc":
                seen.add(path)
                found[what] = found.get(what, 0) + path.lstat().st_size
    return sorted(found.items(), key=lambda item: -item[1])


def cuda(site: Path) -> list[str]:
    """The Python packages of the CUDA image, as they were installed with their hashes."""
    gone = {
        path
        for top, _ in unused(site, "cuda")
        for path in ([top] if top.is_file() else top.rglob("*"))
    }
    packages = {}
    for each in distributions(path=[str(site)]):
        files = {Path(str(each.locate_file(file))) for file in each.files or []}
        packages[each.name] = sum(
            path.lstat().st_size
            for path in files - gone
            if path.suffix != ".pyc" and path.is_file()
        )
    removed = left_out(site, "cuda")
    kept = sum(packages.values())
    return [
        "## The CUDA image's Python packages, in MB",
        "",
        "Installed from requirements.lock with `--require-hashes` for Python 3.12; the base image, gcc and",
        "the bytecode (about 250 MB) come on top.",
        "",
        *table(package_rows(packages, 0)[:-1]),
        "",
        f"## Left out of them: {sum(size for _, size in removed) / MB:.0f} of "
        f"{(kept + sum(size for _, size in removed)) / MB:.0f} MB",
        "",
        *table([(what, size, "") for what, size in removed if size >= MB]),
    ]


def packed() -> int:
    """The image's layers, as gzip packs them."""
    with (
        subprocess.Popen(
            command("save", IMAGE), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as save,
        subprocess.Popen(["gzip", "-6", "-c"], stdin=save.stdout, stdout=subprocess.PIPE) as gzip,
    ):
        packed = gzip.stdout
        assert packed
        return sum(len(block) for block in iter(lambda: packed.read(2**20), b""))


def times() -> list[str]:
    def best(*arguments: str) -> float:
        took = []
        for _ in range(3):
            start = time.monotonic()
            assert podman("run", "--rm", "--network", "none", *arguments).code == 0
            took.append(time.monotonic() - start)
        return min(took)

    def built() -> float:
        start = time.monotonic()
        subprocess.run([str(ROOT / ".ci" / "image"), str(STORE)], check=True, capture_output=True)
        return time.monotonic() - start

    bare = best("--entrypoint", "true", IMAGE)
    check = best("--tmpfs", "/work:mode=1777", "--tmpfs", "/cache:mode=1777", "--user", "0", IMAGE,
                 "check", "/opt/lorajob/examples/demo.yaml")  # fmt: skip
    built()
    return [
        "| | seconds |", "| --- | --- |",
        f"| building it when nothing is new | {built():.1f} |",
        f"| starting a container | {bare:.1f} |",
        f"| `check` of the demo in it, besides | {check - bare:.1f} |",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
