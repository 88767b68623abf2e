"""What a container must have been given, looked at before anything else: driver and GPU, shared
memory, folders to write to, room on them.

The spec is not needed for it, nothing heavy is imported, and no GPU is touched: it takes some
milliseconds. `check` and the first seconds of `run` find out about the rest.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jobs.errors import AccessError, DoesNotFitError, LorajobError, bullet_list

VARIABLE = "LORAJOB_IMAGE"  # the image says which it is: cuda or cpu
WITHOUT_GPU = "LORAJOB_WITHOUT_GPU"

# CUDA 13 runs on drivers from this one on, which says of itself that it knows CUDA 13.0.
CUDA = 13000
DRIVER = 580

MIB = 2**20
# Below these nothing at all can run; what a spec takes is reckoned from it later.
SHARED_MEMORY = 32 * MIB  # semaphores of the processes that tokenize
ROOM_TO_WORK = 256 * MIB
ROOM_FOR_SMALL_FILES = 16 * MIB


def require_container(work: Path) -> None:
    """Raises what is missing, all of it at once. Does nothing outside of lorajob's image."""
    image = os.environ.get(VARIABLE)
    if not image:
        return
    found: list[LorajobError] = []
    if image == "cuda" and not os.environ.get(WITHOUT_GPU):
        found += gpu_missing(Path("/"))
    found += shared_memory_missing(Path("/dev/shm"))  # noqa: S108 - it is what is looked at
    found += folders_missing(work)
    if len(found) == 1:
        raise found[0]
    if found:
        error = type(found[0])(
            f"this container was not given {len(found)} things that a run needs:\n"
            + bullet_list(str(each).replace("\n", "\n  ") for each in found)
        )
        raise error


def gpu_missing(root: Path) -> Iterator[LorajobError]:
    """At most one: the first thing that is not there explains the others. `root` is where /dev and
    /proc are."""
    hint_cpu = f"or use the CPU image, or set {WITHOUT_GPU}=1 to train on the CPU"
    windows = (root / "dev/dxg").exists()  # Windows' own driver, seen through its Linux
    version = root / "proc/driver/nvidia/version"
    cards = [path for path in (root / "dev").glob("nvidia*") if path.name[6:].isdigit()]
    if not (windows or version.exists() or cards):
        yield AccessError(
            "this machine has no NVIDIA driver",
            f"install driver {DRIVER} or newer on the host, or take a node that has a GPU; {hint_cpu}",
        )
        return
    if not (windows or cards):
        yield AccessError(
            "this machine has an NVIDIA driver, but the container was given no GPU",
            "docker run --gpus all (with the NVIDIA Container Toolkit on the host); in Kubernetes "
            f"resources.limits with nvidia.com/gpu: 1; {hint_cpu}",
        )
        return
    closed = [str(path) for path in cards if not os.access(path, os.R_OK | os.W_OK)]
    if closed and len(closed) == len(cards):
        yield AccessError(
            f"user {os.getuid()} may not open the GPU: {closed[0]} is closed to it",
            "give the host's /dev/nvidia* mode 0666, which is the driver's default "
            "(NVreg_DeviceFileMode), or the container's user the group that owns them",
        )
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        yield AccessError(
            "CUDA_VISIBLE_DEVICES hides every GPU from the run", f"unset it; {hint_cpu}"
        )
        return
    known = driver_knows()
    if known is None:
        yield AccessError(
            "the container has a GPU, but not its driver's library libcuda.so.1",
            "start it with --gpus or the nvidia runtime class rather than --device, and leave "
            "`compute` in NVIDIA_DRIVER_CAPABILITIES",
        )
    elif known < CUDA:
        yield AccessError(
            f"the NVIDIA driver{_number(version)} is too old: it knows CUDA "
            f"{known // 1000}.{known % 1000 // 10}, and this image is made with {CUDA // 1000}.0",
            f"install driver {DRIVER} or newer on the host; {hint_cpu}",
        )


def driver_knows() -> int | None:
    """The CUDA version that the driver knows, 13000 for 13.0; None where its library is missing.

    Asked of the library without starting CUDA, which takes seconds where there are many GPUs.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    value = ctypes.c_int()
    return value.value if library.cuDriverGetVersion(ctypes.byref(value)) == 0 else 0


def _number(version: Path) -> str:
    """The driver's own number, with a space before it, where it is told."""
    try:
        words = version.read_text().split()
    except OSError:
        return ""
    return next((f" {word}" for word in words if word[:1].isdigit() and "." in word), "")


def shared_memory_missing(folder: Path) -> Iterator[LorajobError]:
    hint = "docker run --shm-size 1g; in Kubernetes an emptyDir with medium: Memory at /dev/shm"
    if not folder.is_dir() or not _can_write(folder):
        yield AccessError(f"there is no shared memory: {folder} cannot be written to", hint)
    elif (free := shutil.disk_usage(folder).free) < SHARED_MEMORY:
        yield DoesNotFitError(
            f"there is too little shared memory: {folder} has {free / MIB:.0f} MiB free, and "
            f"{SHARED_MEMORY // MIB} MiB are needed",
            hint,
        )


def folders_missing(work: Path) -> Iterator[LorajobError]:
    """Runs, cache and temporary files: each is on a place that can be written to, with some room."""
    cache = Path(os.environ.get("LORAJOB_CACHE") or Path.home() / ".cache" / "lorajob")
    wanted = [
        (work, "for runs", ROOM_TO_WORK, "a volume at /work"),
        (cache, "for what is fetched ($LORAJOB_CACHE)", ROOM_TO_WORK, "a volume at /cache"),
        (Path(os.environ.get("TMPDIR") or "/tmp"), "for temporary files", ROOM_FOR_SMALL_FILES,  # noqa: S108
         "--tmpfs /tmp, in Kubernetes an emptyDir at /tmp"),
    ]  # fmt: skip
    for folder, purpose, room, give in wanted:
        there = folder
        while not there.exists():
            there = there.parent
        if not _can_write(there):
            yield AccessError(
                f"user {os.getuid()} cannot write to {there}, where {folder} is {purpose}",
                f"mount {give} that user {os.getuid()} may write to (chown it; in Kubernetes "
                f"securityContext.fsGroup: {os.getgid()})",
            )
        elif (free := shutil.disk_usage(there).free) < room:
            yield DoesNotFitError(
                f"the disk of {folder}, {purpose}, is full: {free / MIB:.0f} MiB free, and a run "
                f"needs {room // MIB} MiB at the very least",
                f"free some, or mount {give} that is larger",
            )


def _can_write(folder: Path) -> bool:
    """Tried, not asked: a read-only file system and a network's own rules tell only then."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".lorajob-"):
            return True
    except OSError as error:
        import errno

        return error.errno in (errno.ENOSPC, errno.EDQUOT)  # that is told as a full disk
