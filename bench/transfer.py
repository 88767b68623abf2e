"""To S3 and back, beside others: one file of 2 GB and 2,000 small ones, to a Ceph on loopback.

    .venv/bin/python -m bench.transfer --peers PYTHON...     writes bench/results/transfer.md

PYTHON: interpreters of environments that have peers in them (their botocores do not go together):
pip install awscli boto3 minio obstore, and in another one: pip install s3fs. Each contender does each
thing in a process of its own; the clock runs from after its imports to the last byte on disk.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Imported by interpreters that have neither lorajob nor the test servers' packages: nothing else here.

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "bench" / "results" / "transfer.md"
LARGE = 2_000_000_000  # bytes
SMALL = (2000, 20_000)  # files, bytes of each
MEMORY = 2 * LARGE  # what a file takes of it here, and at the server
THREADS = 10  # what `aws s3 cp` has, for those who do not choose for themselves
BUCKET = "bench"

Work = Callable[[], None]
Contender = Callable[[str, Path, str], Work]  # "up" or "down", a folder, a prefix -> what is timed


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def in_threads(do: Callable[[Any], Any], what: list[Any]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(do, what):
            pass


# --- the contenders: each as its users write it


def ours(way: str, folder: Path, prefix: str) -> Work:
    from jobs.spec import S3
    from jobs.store.base import no_advance
    from jobs.store.places import S3Place
    from jobs.store.retry import Retries
    from jobs.store.s3 import S3Store

    store = S3Store(S3Place(BUCKET, prefix), S3(), Retries())
    store.client.s3  # noqa: B018 - made before the clock runs, as boto3's and minio-py's are
    # As in a run: the hashes that the manifest has are there before anything is sent.
    hashes = json.loads((folder.parent / f"{folder.name}.json").read_text()) if way == "up" else []

    def up() -> None:
        store.put(folder, hashes, no_advance)

    def down() -> None:
        store.fetch(store.entries(), folder, no_advance)

    return up if way == "up" else down


def aws(way: str, folder: Path, prefix: str) -> Work:
    from awscli.clidriver import create_clidriver  # type: ignore[import-not-found]

    driver = create_clidriver()
    places = [str(folder), f"s3://{BUCKET}/{prefix}/"]
    if way == "down":
        places.reverse()

    def copy() -> None:
        code = driver.main(["s3", "cp", "--recursive", "--only-show-errors", *places])
        if code:
            raise SystemExit(code)

    return copy


def boto3(way: str, folder: Path, prefix: str) -> Work:
    import boto3 as sdk
    from botocore.config import Config

    s3 = sdk.client("s3", config=Config(max_pool_connections=THREADS))

    def up() -> None:
        in_threads(lambda path: s3.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder)}"), files_below(folder))  # fmt: skip

    def down() -> None:
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        keys = [found["Key"] for page in pages for found in page["Contents"]]
        in_threads(
            lambda key: s3.download_file(BUCKET, key, str(folder / key.removeprefix(f"{prefix}/"))),
            keys,
        )

    return up if way == "up" else down


def s3fs(way: str, folder: Path, prefix: str) -> Work:
    from s3fs import S3FileSystem  # type: ignore[import-not-found]

    fs = S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"])

    def up() -> None:
        fs.put(f"{folder}/", f"{BUCKET}/{prefix}/", recursive=True)

    def down() -> None:
        fs.get(f"{BUCKET}/{prefix}/", f"{folder}/", recursive=True)

    return up if way == "up" else down


def minio(way: str, folder: Path, prefix: str) -> Work:
    import urllib3
    from minio import Minio  # type: ignore[import-not-found]

    client = Minio(
        os.environ["AWS_ENDPOINT_URL_S3"].removeprefix("http://"),
        access_key=os.environ["AWS_ACCESS_KEY_ID"],
        secret_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        region=os.environ["AWS_REGION"],
        secure=False,
        http_client=urllib3.PoolManager(maxsize=2 * THREADS),
    )

    def send(path: Path) -> None:
        name = f"{prefix}/{path.relative_to(folder)}"
        client.fput_object(BUCKET, name, str(path), part_size=8 << 20, num_parallel_uploads=THREADS)

    def up() -> None:
        in_threads(send, files_below(folder))

    def down() -> None:
        found = client.list_objects(BUCKET, f"{prefix}/", recursive=True)
        keys = [each.object_name for each in found]
        in_threads(
            lambda key: client.fget_object(BUCKET, key, str(folder / key.removeprefix(f"{prefix}/"))),
            keys,
        )  # fmt: skip

    return up if way == "up" else down


def minio_checked(way: str, folder: Path, prefix: str) -> Work:
    """minio-py with what it leaves out, and a run's manifest needs: the sha256 of what has come."""
    move = minio(way, folder, prefix)

    def digest(path: Path) -> None:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")

    def down() -> None:
        move()
        in_threads(digest, files_below(folder))

    return move if way == "up" else down


def obstore(way: str, folder: Path, prefix: str) -> Work:
    import obstore as obs  # type: ignore[import-not-found]
    from obstore.store import S3Store  # type: ignore[import-not-found]

    store = S3Store(
        BUCKET,
        prefix=prefix,
        endpoint=os.environ["AWS_ENDPOINT_URL_S3"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )

    def up() -> None:
        in_threads(
            lambda path: obs.put(store, str(path.relative_to(folder)), path, chunk_size=8 << 20),
            files_below(folder),
        )

    def receive(key: str) -> None:
        with (folder / key).open("wb") as file:
            for chunk in obs.get(store, key).stream(min_chunk_size=1 << 20):
                file.write(chunk)

    def down() -> None:
        keys = [found["path"] for page in obs.list(store) for found in page]
        in_threads(receive, keys)

    return up if way == "up" else down


CONTENDERS: dict[str, Contender] = {
    "ours": ours, "aws": aws, "boto3": boto3, "minio": minio,
    "minio-checked": minio_checked, "s3fs": s3fs, "obstore": obstore,
}  # fmt: skip
PACKAGES = {"aws": "awscli", "minio-checked": "minio"}  # where it is not the contender's own name
TITLES = {
    "ours": "**`jobs.store.s3`**",
    "aws": "`aws s3 cp --recursive`",
    "boto3": "boto3, `upload_file`, `download_file`",
    "minio": "minio-py, `fput_object`, `fget_object`",
    "minio-checked": "minio-py, then `hashlib` over what came",
    "s3fs": "s3fs, `put`, `get`",
    "obstore": "obstore, `put`, `get` (Rust; not Python)",
}
# What each does beside moving bytes, as used here: by its documentation and its source.
DOES = {
    "ours": ("sha256 by the signature; CRC-32 over https", "sha256 of every file", "both ways"),
    "aws": (
        "sha256 by the signature; CRC-32",
        "by the checksum of S3's own, where the object has one",
        "no",
    ),
    "boto3": (
        "sha256 by the signature; CRC-32",
        "by the checksum of S3's own, where the object has one",
        "no",
    ),
    "minio": ("sha256 by the signature", "no", "downloads, where its temporary file is there"),
    "minio-checked": ("sha256 by the signature", "sha256 of every file", "as minio-py's"),
    "s3fs": ("sha256 by the signature; CRC-32", "no", "no"),
    "obstore": ("sha256 by the signature", "no", "no"),
}


# --- one contender's process


def processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def peak_mb() -> float:
    """The most memory this process has had so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e6


def contend(name: str, way: str, folder: Path, prefix: str) -> None:
    """What the process of a contender does; the last line it prints is the result."""
    work = CONTENDERS[name](way, folder, prefix)
    start, used = time.perf_counter(), processor_seconds()
    work()
    seconds = time.perf_counter() - start
    result = {"seconds": seconds, "processor": processor_seconds() - used, "peak": peak_mb()}
    print(json.dumps(result))


# --- taking the measures


def interpreters(pythons: list[str]) -> dict[str, tuple[str, str]]:
    """Who is there: name -> interpreter and version."""
    found = {"ours": (sys.executable, "")}
    for name in CONTENDERS:
        package = PACKAGES.get(name, name)
        code = f"from importlib.metadata import version; print(version({package!r}))"
        for python in pythons:
            said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
            if name != "ours" and not said.returncode:
                found.setdefault(name, (python, f"{package} {said.stdout.strip()}"))
    return found


def make(folder: Path, count: int, size: int) -> None:
    """Random bytes, which nothing can compress, and beside them what the manifest would say."""
    folder.mkdir()
    hashes = []
    for number in range(count):
        path, hash, left = folder / f"file-{number:04}", hashlib.sha256(), size
        with path.open("wb") as file:
            while left:
                piece = os.urandom(min(left, 1 << 22))
                hash.update(piece)
                left -= file.write(piece)
        hashes.append({"path": path.name, "size": size, "sha256": hash.hexdigest()})
    (folder.parent / f"{folder.name}.json").write_text(json.dumps(hashes))


def check(folder: Path, hashes: Path) -> None:
    """What came back is what was sent. Not timed."""
    for file in json.loads(hashes.read_text()):
        with (folder / file["path"]).open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != file["sha256"]:
                raise SystemExit(f"{file['path']} came back as something else")


def quiet(most: float = 0.5, patience: float = 2) -> float:
    """Wait until others leave the processors alone; the share of them that is busy, in cores."""
    end = time.monotonic() + patience
    while True:
        before = _busy()
        time.sleep(0.5)
        load = (_busy() - before) / 0.5
        if load <= most or time.monotonic() > end:
            return load


def _busy() -> float:
    user, nice, system, _, _, irq, soft, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def have_memory(size: int) -> None:
    """Take so much memory and give it back: in a virtual machine the first who takes what was free for
    a while waits for the host to find it, up to three seconds for 2 GB, and the others do not."""
    with mmap.mmap(-1, size) as taken:
        piece = bytes(1 << 20)
        for _ in range(size // len(piece)):
            taken.write(piece)


class Bench:
    def __init__(self, folder: Path, server: Any, found: dict[str, tuple[str, str]]) -> None:
        self.folder, self.server, self.found = folder, server, found
        self.s3 = server.client()
        self.busiest = 0.0

    def run(self, name: str, way: str, folder: Path, prefix: str) -> dict[str, float]:
        os.sync()
        if folder.name == "large":
            have_memory(MEMORY)
        self.busiest = max(self.busiest, quiet())
        environment = {**os.environ, **self.server.environment(), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [self.found[name][0], "-m", "bench.transfer", "--contender", name, way, str(folder), prefix],
            cwd=self.folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:8}{way:5}{folder.name:7}", json.dumps(result), flush=True)
        return result

    def empty(self, prefix: str) -> None:
        while keys := self.s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents"):
            names = [{"Key": found["Key"]} for found in keys]
            self.s3.delete_objects(Bucket=BUCKET, Delete={"Objects": names})
        if prefix.startswith("large"):
            time.sleep(6)  # the server frees a deleted object's memory some seconds later

    def round(self, what: str, number: int) -> Iterator[tuple[str, str, dict[str, float]]]:
        """Each begins once."""
        source, target = self.folder / what, self.folder / "in" / what
        names = list(self.found)
        turn = number % len(names)
        names = names[turn:] + names[:turn]
        for name in names:
            yield name, "up", self.run(name, "up", source, f"{what}-{name}")
            if name != "ours":
                self.empty(f"{what}-{name}")
        for name in names:
            target.mkdir(parents=True)
            # All fetch what ours has sent: the same objects, with the same checksums.
            yield name, "down", self.run(name, "down", target, f"{what}-ours")
            if number == 0:
                check(target, self.folder / f"{what}.json")
            shutil.rmtree(target)
        self.empty(f"{what}-ours")


@contextlib.contextmanager
def server_in(folder: Path) -> Iterator[Any]:
    from tests.servers.ceph import running_ceph

    with running_ceph(folder, size_gb=6) as server:
        server.client().create_bucket(Bucket=BUCKET)
        yield server


def hashing(size: int) -> str:
    piece, count = os.urandom(1 << 18), 500
    hash, used = hashlib.sha256(), time.process_time()
    for _ in range(count):
        hash.update(piece)
    seconds = (time.process_time() - used) * size / (count * len(piece))
    return (
        f"The sha256 of {size / 1e9:g} GB alone takes {seconds:.1f} CPU seconds here. Ours is the only one "
        "that spends them on what it fetches, while the server needs the same processors."
    )


Runs = dict[tuple[str, str, str], list[dict[str, float]]]  # (large or small, way, name)


def table(runs: Runs, what: str, way: str, amount: float, unit: str, names: list[str]) -> list[str]:
    """One of the four things, with the best run of each, and the median one beside it."""
    best = {n: min(runs[what, way, n], key=lambda r: r["seconds"]) for n in names}
    peak = {n: max(run["peak"] for run in runs[what, way, n]) for n in names}
    middle = {n: statistics.median(run["seconds"] for run in runs[what, way, n]) for n in names}
    lines = [
        f"| who | seconds | {unit} | its CPU seconds | peak memory | ours is as fast, times | by the medians |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        seconds = best[name]["seconds"]
        times = (
            f"**{seconds / best['ours']['seconds']:.2f}**",
            f"{middle[name] / middle['ours']:.2f}",
        )
        lines.append(
            f"| {TITLES[name]} | {seconds:.2f} | {amount / seconds:,.0f} | {best[name]['processor']:.2f} "
            f"| {peak[name]:.0f} MB | {' | '.join(['', ''] if name == 'ours' else times)} |"
        )
    return lines


def report(
    runs: Runs, found: dict[str, tuple[str, str]], large: int, rounds: int, others: str
) -> list[str]:
    names = list(found)
    lines = [
        "# To S3 and back",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}, {', '.join(v for _, v in found.values() if v)}: "
        "`python -m bench.transfer --peers PYTHON...`",
        "",
        f"A Ceph RADOS gateway that keeps everything in memory, on loopback over plain http, on the same "
        f"{os.cpu_count()} cores as the client: the client's CPU seconds are missing to the server. Random "
        f"bytes, sources in the page cache, {f'the best of {rounds} rounds, taken in turns' if rounds > 1 else 'one round'}, those with the large file after the memory that it takes was touched; peak "
        f"memory (VmHWM) is the highest of all rounds. All fetch the same objects. {others}",
    ]
    titles = {"large": f"One file of {large / 1e9:g} GB", "small": f"{SMALL[0]:,} files of {SMALL[1] // 1000} KB"}  # fmt: skip
    for what, title in titles.items():
        amount, unit = (large / 1e6, "MB a second") if what == "large" else (SMALL[0], "files a second")  # fmt: skip
        for way in ("up", "down"):
            lines += ["", f"## {title}, {way}", "", *table(runs, what, way, amount, unit, names)]
            if (what, way) == ("large", "down"):
                lines += ["", hashing(large)]
    lines += [
        "",
        "## What they do beside it",
        "",
        "| who | the server checks what arrives | what was fetched is checked | a transfer that broke off continues |",
        "| --- | --- | --- | --- |",
        *(f"| {TITLES[name]} | {' | '.join(DOES[name])} |" for name in names),
        "",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", nargs="*", default=[sys.executable], metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, help="write no result")
    parser.add_argument("--large", type=int, default=LARGE, help=argparse.SUPPRESS)
    parser.add_argument("--contender", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        name, way, folder, prefix = arguments.contender
        contend(name, way, Path(folder), prefix)
        return
    found = interpreters(arguments.peers)
    if arguments.only:
        found = {name: of for name, of in found.items() if name in ("ours", *arguments.only)}
    runs: Runs = {}
    with tempfile.TemporaryDirectory() as at, tempfile.TemporaryDirectory() as ceph:
        folder = Path(at)
        make(folder / "large", 1, arguments.large)
        make(folder / "small", *SMALL)
        with server_in(Path(ceph)) as server:
            bench = Bench(folder, server, found)
            for number in range(arguments.rounds):
                for what in ("large", "small"):
                    for name, way, result in bench.round(what, number):
                        runs.setdefault((what, way, name), []).append(result)
    lines = report(
        runs,
        found,
        arguments.large,
        arguments.rounds,
        f"Before a run at most {bench.busiest:.1f} cores were busy with something else.",
    )
    print("\n".join(lines))
    if not arguments.only and arguments.large == LARGE:
        RESULT.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
