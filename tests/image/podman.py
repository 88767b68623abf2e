"""The CPU image, built from the Dockerfile and run as a cluster runs it: with podman, hardened.

`.ci/image STORE` has to have been run before; it needs root and takes minutes the first time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.store.cache import cache_folder
from tests.conftest import ROOT, Result

IMAGE = "localhost/lorajob:cpu"
STORE = cache_folder() / "image"  # before a test sets another cache
PATIENCE = 600.0

Env = Mapping[str, str]
NONE: Env = {}

# What Pod Security's `restricted` asks for, and more: a root that is read-only, and no network.
HARDENED = [
    "--read-only", "--read-only-tmpfs=false", "--user", "1000:1000", "--cap-drop", "ALL",
    "--security-opt", "no-new-privileges", "--network", "none", "--tmpfs", "/tmp:rw,size=512m",
    "--env=OMP_NUM_THREADS=1", "--timeout", "590",  # other tests run beside these; none is left behind
]  # fmt: skip


def command(*arguments: str) -> list[str]:
    return [str(ROOT / ".ci" / "image"), str(STORE), "podman", *arguments]


def podman(*arguments: str, stdin: str = "") -> Result:
    done = subprocess.run(
        command(*arguments),
        check=False, input=stdin, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


def why_not() -> str | None:
    """Why the image cannot be run here, where it can't."""
    if os.geteuid() != 0:
        return "running the image needs root"
    if not shutil.which("podman") or not shutil.which("buildah"):
        return "podman or buildah is not installed: sudo .ci/image STORE installs them"
    if not (STORE / "storage").is_dir() or podman("image", "exists", IMAGE).code != 0:
        return f"there is no image in {STORE}: sudo .ci/image {STORE} builds it"
    return None


@dataclass
class Desk:
    """Folders for one run, owned by the image's user, and the containers that use them."""

    folder: Path
    mounts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.work, self.cache = self.folder / "work", self.folder / "cache"
        for path, at in ((self.work, "/work"), (self.cache, "/cache")):
            path.mkdir()
            os.chown(path, 1000, 1000)
            self.mounts += ["-v", f"{path}:{at}"]

    def arguments(self, *arguments: str, options: Sequence[str] = (), env: Env = NONE) -> list[str]:
        told = [f"--env={name}={value}" for name, value in env.items()]
        return ["run", "--rm", *HARDENED, *self.mounts, *told, *options, IMAGE, *arguments]

    def do(self, *arguments: str, options: Sequence[str] = (), env: Env = NONE) -> Result:
        return podman(*self.arguments(*arguments, options=options, env=env))

    @contextmanager
    def start(self, *arguments: str, env: Env = NONE) -> Iterator[Running]:
        name = f"lorajob-test-{os.getpid()}-{time.monotonic_ns()}"
        told = self.arguments(*arguments, options=("--name", name, "-i"), env=env)
        with (
            (self.folder / f"{name}.out").open("w") as out,
            subprocess.Popen(
                command(*told), stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT
            ) as process,
        ):
            running = Running(name, process, Path(out.name))
            try:
                yield running
            finally:
                if process.poll() is None:
                    podman("kill", "--signal", "KILL", name)


@dataclass
class Running:
    name: str
    process: subprocess.Popen[bytes]
    out: Path

    def told(self) -> str:
        return self.out.read_text()

    def events(self) -> list[dict[str, Any]]:
        lines = [line for line in self.told().splitlines() if line.startswith("{")]
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_for(self, there: Callable[[dict[str, Any]], bool]) -> None:
        until = time.monotonic() + PATIENCE
        while not any(map(there, self.events())):
            assert self.process.poll() is None, self.told()
            assert time.monotonic() < until, self.told()
            time.sleep(0.05)

    def terminate(self) -> tuple[int, float]:
        """SIGTERM, as docker and Kubernetes send it. The exit code, and the seconds it took."""
        start = time.monotonic()
        # One that has just been started is not always found at once.
        while podman("kill", "--signal", "TERM", self.name).code and self.process.poll() is None:
            assert time.monotonic() < start + 10, self.told()
        return self.process.wait(PATIENCE), time.monotonic() - start
