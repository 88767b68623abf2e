#!/usr/bin/env python3
"""Which of a lock's packages an image has, and whether it has exactly those.

    packages.py list cuda           the lines of the lock, with their hashes, for pip
    packages.py slim SITE cuda      remove from a site-packages what no run uses
    packages.py verify SITE LIST    compare what is installed with such lines

The locks hold more than an image needs: tools for development, and what builds llama.cpp. Both are
told apart by the locks' own notes of who asked for what. Runs before anything is installed, so it
takes nothing but Python.
"""

from __future__ import annotations

import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOCKS = {
    "cuda": "requirements.lock",
    "cpu": "requirements-cpu.lock",
    "tools": "requirements-cpu.lock",
}
PYTHON = {"cuda": (3, 12), "cpu": (3, 11)}

# Packages that only build llama.cpp: an image brings it built.
BUILDERS = {"cmake", "ninja", "scikit-build-core"}
# What `entrypoint.py tools` imports besides, to say how far it is.
TELLERS = {"rich", "structlog"}

# What is installed along and used by no run. `cuda` and `cpu` say in which image.
UNUSED: list[tuple[str, str, str]] = [
    ("cuda cpu", "**/tests", "the packages' own tests"),
    ("cuda cpu", "torch/test", "C++ tests of torch"),
    ("cuda cpu", "torch/bin/*", "programs for those who compile torch"),
    ("cuda cpu", "torch/share", "CMake files"),
    ("cuda cpu", "torch/include", "C++ headers; Triton's kernels need none of them"),
    ("cuda cpu", "pyarrow/include", "C++ headers"),
    ("cuda cpu", "numpy/_core/include", "C headers"),
    ("cuda cpu", "**/*.a", "static libraries"),
    ("cuda cpu", "pyarrow/*flight*.so*", "a network protocol that datasets do not use"),
    ("cuda cpu", "bitsandbytes/libbitsandbytes_[!c]*.so", "other makers' cards"),
    ("cpu", "bitsandbytes/libbitsandbytes_cuda*.so", "GPUs"),
    ("cuda", "bitsandbytes/libbitsandbytes_cuda1[!3]*.so", "CUDA 11 and 12"),
    ("cuda", "bitsandbytes/libbitsandbytes_cuda13[!0]*.so", "CUDA after 13.0"),
    # No library of the image names these; `readelf -d` and `strings` tell.
    ("cuda", "nvidia/cu13/lib/libcusolverMg.so*", "linear algebra over several GPUs"),
    ("cuda", "nvidia/cu13/lib/libnvrtc*.alt.so*", "a second build of the same compiler"),
    ("cuda", "nvidia/cu13/lib/libnvperf_*.so*", "hardware counters, for profilers"),
    ("cuda", "nvidia/cu13/lib/libnvblas.so*", "BLAS for programs that know no CUDA"),
    ("cuda", "nvidia/nvshmem/lib/*.bc", "to compile kernels that span several machines"),
    ("cuda", "nvidia/**/include", "CUDA's C headers; Triton has its own"),
    ("cuda", "triton/backends/nvidia/lib/cupti", "Triton's profiler"),
    ("cuda", "triton/instrumentation", "examples of compiler plug-ins"),
    ("cuda", "studio", "unsloth's web interface"),
    ("cuda", "unsloth_cli", "unsloth's command line"),
]
KEPT = {"torch/bin/torch_shm_manager"}  # processes that share tensors start it


@dataclass
class Locked:
    name: str
    version: str
    marker: str
    hashes: list[str]
    asked_by: set[str] = field(default_factory=set)

    @property
    def requirement(self) -> str:
        marker = f" ; {self.marker}" if self.marker else ""
        hashes = "".join(f" \\\n    --hash={value}" for value in self.hashes)
        return f"{self.name}=={self.version}{marker}{hashes}"


def read_lock(text: str) -> list[Locked]:
    """The packages of a lock as uv writes it, with who asked for each."""
    found: list[Locked] = []
    for line in text.splitlines():
        if pinned := re.match(r"([a-z0-9-]+)==([^\s;]+)(?: ; (.*?))?(?: \\)?$", line):
            found.append(Locked(pinned[1], pinned[2], pinned[3] or "", []))
        elif hashed := re.match(r"    --hash=(\S+)", line):
            found[-1].hashes.append(hashed[1])
        elif asker := re.match(
            r"    #(?: via |   )([a-z0-9][a-z0-9-]*)(\[\S*\])?( \(.*\))?$", line
        ):
            found[-1].asked_by.add(asker[1])
        elif line.strip() and not line.lstrip().startswith("#"):
            raise SystemExit(f"packages.py: cannot read this line of the lock: {line!r}")
    return found


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s<>=!~;\[]", each, maxsplit=1)[0].lower() for each in requirements}


def wanted(variant: str, folder: Path = HERE.parent) -> list[Locked]:
    """What the variant's image has, of its lock: what lorajob asks for at run time, and what that
    asks for in its turn."""
    project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    locked = read_lock((folder / LOCKS[variant]).read_text("utf-8"))
    always = names_of(project["dependencies"])
    if lost := (BUILDERS | TELLERS) - always:
        raise SystemExit(f"packages.py: pyproject.toml does not ask for {sorted(lost)}")
    if variant == "tools":
        reached = BUILDERS | TELLERS
    else:
        reached = always - BUILDERS | names_of(project["optional-dependencies"][variant])
    grown = True
    while grown:
        more = {each.name for each in locked if each.asked_by & reached} - BUILDERS
        grown = not more <= reached
        reached |= more
    if lost := reached - {each.name for each in locked}:
        raise SystemExit(f"packages.py: {LOCKS[variant]} has no {sorted(lost)}: make lock")
    chosen = [each for each in locked if each.name in reached]
    for each in chosen:
        # `make lock` writes the CPU build's hash first; the others are torch's builds for GPUs,
        # which pip would prefer.
        if variant == "cpu" and each.name == "torch":
            each.hashes = each.hashes[:1]
    return chosen


def unused(site: Path, variant: str) -> Iterator[tuple[Path, str]]:
    """What a run does without, and what it is."""
    for variants, pattern, what in UNUSED:
        if variant in variants.split():
            for path in site.glob(pattern):
                if path.relative_to(site).as_posix() not in KEPT:
                    yield path, what


def slim(site: Path, variant: str) -> None:
    for path, _ in list(unused(site, variant)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.is_symlink() or path.exists():  # a folder above it may be gone
            path.unlink()


def verify(site: Path, listed: Path) -> list[str]:
    """What is installed and what is listed, where they differ."""
    here = {
        re.sub(r"[-_.]+", "-", each.metadata["Name"]).lower(): each.version.partition("+")[0]
        for each in distributions(path=[str(site)])
    }
    there = {e.name: e.version for e in read_lock(listed.read_text("utf-8")) if applies(e.marker)}
    return [
        f"{name}: {here.get(name, 'none')} is installed, {there.get(name, 'none')} is locked"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]


def applies(marker: str) -> bool:
    if not marker:
        return True
    from packaging.markers import Marker

    return Marker(marker).evaluate()


def require_python(variant: str) -> None:
    need = PYTHON.get(variant, sys.version_info[:2])
    if sys.version_info[:2] != need:
        have = "{}.{}".format(*sys.version_info)
        raise SystemExit(
            f"{LOCKS[variant]} is locked for Python {need[0]}.{need[1]}, and this base image has {have}\n"
            "  -> VARIANT=cuda: a base with 3.12, such as ubuntu:24.04; "
            "VARIANT=cpu: one with 3.11, such as debian:bookworm-slim"
        )


def main(arguments: list[str]) -> int:
    match arguments:
        case ["list" | "slim", *_, variant] if variant not in LOCKS:
            raise SystemExit(f"VARIANT is {variant!r}\n  -> it is `cuda` or `cpu`")
        case ["list", variant]:
            require_python(variant)
            print("\n".join(each.requirement for each in wanted(variant)))
        case ["slim", site, variant]:
            slim(Path(site), variant)
        case ["verify", site, listed]:
            if wrong := verify(Path(site), Path(listed)):
                print("\n".join(wrong), file=sys.stderr)
                return 1
        case _:
            raise SystemExit(__doc__)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
