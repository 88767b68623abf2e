"""What a container was not given is told before anything else."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import startup
from jobs.errors import AccessError, DoesNotFitError, LorajobError
from tests.conftest import ROOT, hear_signals, lorajob


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a driver and two GPUs, both given to the container."""
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    version = tmp_path / "proc" / "driver" / "nvidia" / "version"
    version.parent.mkdir(parents=True)
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Release Build\n")
    monkeypatch.setattr(startup, "driver_knows", lambda: 13000)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def told(root: Path) -> str:
    found = list(startup.gpu_missing(root))
    assert len(found) == 1, found
    assert isinstance(found[0], AccessError)
    assert found[0].hint
    return str(found[0])


def test_a_machine_with_its_gpus_is_fine(root: Path) -> None:
    assert list(startup.gpu_missing(root)) == []
    (root / "dev" / "nvidia0").unlink()  # one of two
    assert list(startup.gpu_missing(root)) == []


def test_no_driver(root: Path) -> None:
    for path in [*(root / "dev").iterdir(), root / "proc" / "driver" / "nvidia" / "version"]:
        path.unlink()
    text = told(root)
    assert "this machine has no NVIDIA driver" in text
    assert "install driver 580 or newer" in text


def test_a_driver_but_no_gpu(root: Path) -> None:
    for path in (root / "dev").glob("nvidia[0-9]"):
        path.unlink()
    text = told(root)
    assert "the container was given no GPU" in text
    assert "docker run --gpus all" in text
    assert "nvidia.com/gpu: 1" in text


def test_windows_has_a_driver_of_its_own(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in [*(root / "dev").iterdir(), root / "proc" / "driver" / "nvidia" / "version"]:
        path.unlink()
    (root / "dev" / "dxg").touch()
    assert list(startup.gpu_missing(root)) == []
    monkeypatch.setattr(startup, "driver_knows", lambda: 12080)
    assert "the NVIDIA driver is too old" in told(root)


def test_a_driver_that_is_too_old_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "driver_knows", lambda: 12080)
    text = told(root)
    assert "the NVIDIA driver 570.86.15 is too old: it knows CUDA 12.8" in text
    assert "install driver 580 or newer" in text


def test_a_gpu_without_the_drivers_library(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "driver_knows", lambda: None)
    assert "libcuda.so.1" in told(root)


def test_gpus_that_are_hidden(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert "CUDA_VISIBLE_DEVICES hides every GPU" in told(root)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert list(startup.gpu_missing(root)) == []


def test_gpus_that_the_user_may_not_open(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    text = told(root)
    assert f"user {os.getuid()} may not open the GPU" in text
    assert "/dev/nvidia" in text


def test_the_driver_is_asked_through_its_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(str(tmp_path / name)))
    assert startup.driver_knows() is None
    source, library = tmp_path / "cuda.c", tmp_path / "libcuda.so.1"
    source.write_text("int cuDriverGetVersion(int *v) { *v = 12040; return 0; }\n")
    subprocess.run(["c++", "-x", "c", "-shared", "-fPIC", "-o", library, source], check=True)
    assert startup.driver_knows() == 12040


def test_the_driver_that_is_needed_is_the_locks_cuda() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    runtime = re.search(r"^cuda-toolkit==(\d+)\.(\d+)\.", lock, re.MULTILINE)
    assert runtime
    assert int(runtime[1]) * 1000 + int(runtime[2]) * 10 == startup.CUDA


def disk(monkeypatch: pytest.MonkeyPatch, **free: int) -> None:
    """So many bytes are free in the folders whose name is given."""
    monkeypatch.setattr(
        "shutil.disk_usage",
        lambda path: SimpleNamespace(free=free.get(Path(path).name, 2**40)),
    )


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(startup.shared_memory_missing(tmp_path)) == []
    (none,) = startup.shared_memory_missing(tmp_path / "none")
    assert isinstance(none, AccessError)
    assert "--shm-size" in str(none)
    disk(monkeypatch, **{tmp_path.name: 2**20})
    (little,) = startup.shared_memory_missing(tmp_path)
    assert isinstance(little, DoesNotFitError)
    assert "has 1 MiB free" in str(little)


def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[LorajobError]:
    for name in ("work", "cache", "tmp"):
        (tmp_path / name).mkdir(exist_ok=True)
    monkeypatch.setenv("LORAJOB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    return list(startup.folders_missing(tmp_path / "work" / "runs"))


def test_folders_that_can_be_written_to_are_left_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert folders(tmp_path, monkeypatch) == []
    assert [path for path in tmp_path.rglob("*") if path.name not in ("work", "cache", "tmp")] == []


@pytest.mark.parametrize(
    ("name", "give"), [("work", "/work"), ("cache", "/cache"), ("tmp", "--tmpfs /tmp")]
)
def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, give: str
) -> None:
    real = startup._can_write
    monkeypatch.setattr(startup, "_can_write", lambda path: path.name != name and real(path))
    (found,) = folders(tmp_path, monkeypatch)
    assert isinstance(found, AccessError)
    assert f"cannot write to {tmp_path / name}" in str(found)
    assert give in str(found)
    assert "fsGroup" in str(found)


@pytest.mark.parametrize(("name", "free"), [("work", 255), ("cache", 255), ("tmp", 15)])
def test_a_disk_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, free: int
) -> None:
    disk(monkeypatch, **{name: free * 2**20})
    (found,) = folders(tmp_path, monkeypatch)
    assert isinstance(found, DoesNotFitError)
    assert f"{free} MiB free, and a run needs {free + 1} MiB" in str(found)
    disk(monkeypatch, **{name: (free + 1) * 2**20})
    assert folders(tmp_path, monkeypatch) == []


@pytest.fixture
def read_only(tmp_path: Path) -> Path:
    path = tmp_path / "read-only"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "lorajob-test", str(path)],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    return path


def test_a_file_system_that_is_read_only_is_told_to_root_too(
    read_only: Path, tmp_path: Path
) -> None:
    try:
        result = lorajob(
            "run", "--work", str(read_only / "runs"),
            LORAJOB_IMAGE="cpu", LORAJOB_CACHE=str(tmp_path / "cache"),
        )  # fmt: skip
    finally:
        subprocess.run(["umount", "-l", str(read_only)], check=True)
    assert result.code == 4
    assert f"cannot write to {read_only}" in result.err
    assert "securityContext.fsGroup" in result.err


def test_everything_that_is_missing_is_told_at_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAJOB_IMAGE", "cuda")
    monkeypatch.setattr(startup, "gpu_missing", lambda root: [AccessError("no driver", "get one")])
    monkeypatch.setattr(startup, "shared_memory_missing", lambda path: [])
    monkeypatch.setattr(startup, "_can_write", lambda path: False)
    with pytest.raises(AccessError) as raised:
        startup.require_container(root / "runs")
    text = str(raised.value)
    assert "was not given 4 things" in text
    assert text.count("  -> ") == 4
    monkeypatch.setenv("LORAJOB_WITHOUT_GPU", "1")
    with pytest.raises(AccessError, match="3 things"):
        startup.require_container(root / "runs")
    monkeypatch.delenv("LORAJOB_IMAGE")
    startup.require_container(root / "runs")  # nobody's container


def test_it_takes_milliseconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAJOB_IMAGE", "cpu")
    monkeypatch.setenv("LORAJOB_CACHE", str(tmp_path))
    took = []
    for _ in range(5):
        start = time.perf_counter()
        startup.require_container(tmp_path / "runs")
        took.append(time.perf_counter() - start)
    assert min(took) < 0.1
    imported = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import jobs.startup"],
        check=True, cwd=ROOT, capture_output=True, text=True,
    ).stderr  # fmt: skip
    assert not re.search(r"\b(torch|pydantic|transformers|numpy)\b", imported)


# --- the first process of a container


def first_process(*command: str, path: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", sys.executable, *command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def only_child(of: int) -> int:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        children = Path(f"/proc/{of}/task/{of}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.002)
    raise AssertionError("unshare started nothing")


@pytest.mark.skipif(os.geteuid() != 0, reason="a process namespace needs root")
def test_sigterm_is_heard_while_it_is_still_importing(tmp_path: Path) -> None:
    # An import that takes long, in place of the real ones.
    slow = tmp_path / "argparse.py"
    slow.write_text(
        "import pathlib, time\npathlib.Path(__file__ + '.reached').touch()\ntime.sleep(60)\n"
    )
    with first_process(str(ROOT / "entrypoint.py"), "run", "-", path=str(tmp_path)) as process:
        try:
            child = only_child(process.pid)
            until = time.monotonic() + 10
            while not (tmp_path / "argparse.py.reached").exists():
                assert time.monotonic() < until
                time.sleep(0.002)
            os.kill(child, 15)
            assert process.wait(5) == 143
            assert process.stderr
            assert "before it had begun" in process.stderr.read()
        finally:
            process.kill()


def test_elsewhere_python_is_left_to_die_of_it() -> None:
    code = "import runpy, signal, sys; sys.argv = ['x', '--version']\n" + (
        "try: runpy.run_path('entrypoint.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True,
        preexec_fn=hear_signals,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
