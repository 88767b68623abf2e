"""Up to S3 and down again through a network that fails, and uploads that are killed.

    .venv/bin/python -m bench.transfer_faults      writes bench/results/transfer_faults.md

One request in five is failed in one of the ways of tests/servers/faults.py, while somebody looks on
for a manifest whose files are not all there. Ceph where it can run, else moto.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from bench.transfer import peak_mb
from jobs.spec import S3
from jobs.store.base import no_advance
from jobs.store.hashing import FileEntry, file_entries, sha256_of
from jobs.store.manifest import NAME
from jobs.store.places import S3Place
from jobs.store.publish import publish
from jobs.store.retry import Retries
from jobs.store.s3 import S3Store
from jobs.store.s3 import upload as s3_upload
from tests.servers.ceph import running_ceph, why_not
from tests.servers.faults import FAULTS, FaultProxy, running_proxy
from tests.servers.moto_server import running_moto
from tests.servers.s3 import S3Server

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "bench" / "results" / "transfer_faults.md"
PART = 5 << 20  # the least that S3 takes for a part that is not the last
SIZES = {"merged/model": 2 * PART + 12_345, "gguf/model": 300_000, "adapter/weights": 90_000,
         "adapter/config": 700, "report/report": 20_000, "empty": 0}  # fmt: skip
AT_A_TIME = 2  # runs; each has its own eight threads
RATE = 0.2


def make(folder: Path, seed: str) -> list[FileEntry]:
    """What a run leaves: files, and the manifest that lists them. Other sizes for another seed."""
    draw = random.Random(seed)
    for name, size in SIZES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw.randbytes(size and size + draw.randrange(1000)))
    (folder / NAME).unlink(missing_ok=True)
    files = file_entries(folder)
    (folder / NAME).write_text(json.dumps({"files": files}))
    return files


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- what the processes do that talk to the server


def one_run(bucket: str, folder: Path, number: int) -> dict[str, Any]:
    """Publish one version and then another to the same place, each fetched again."""
    retries = Retries(wait=0.01)
    store = S3Store(S3Place(bucket, f"runs/{number}"), S3(), retries)
    start, wrong, sent = time.monotonic(), 0, 0
    for version in ("one", "two"):
        source, target = folder / f"{number}-out", folder / f"{number}-in-{version}"
        files = make(source, f"{number} {version}")
        publish(source, files, store, no_advance)
        sent += total(source)
        store.fetch(store.entries(), target, no_advance)
        expected = {**{f["path"]: f["sha256"] for f in files}, NAME: sha256_of(source / NAME)}
        got = {path.relative_to(target).as_posix(): sha256_of(path)
               for path in target.rglob("*") if path.is_file()}  # fmt: skip
        wrong += expected != got
        subprocess.run(["rm", "-r", source, target], check=True)
    return {
        "wrong": wrong, "sent": sent, "seconds": time.monotonic() - start,
        "retries": retries.count, "reasons": retries.reasons,
    }  # fmt: skip


def all_runs(bucket: str, folder: Path, count: int) -> None:
    s3_upload.PART = PART
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for result in pool.map(lambda number: one_run(bucket, folder, number), range(count)):
            print(json.dumps(result), flush=True)
    print(json.dumps({"peak": peak_mb()}), flush=True)


def forge(bucket: str, folder: Path) -> None:
    """For each line read, fork a process that publishes `folder` to the prefix that it names.

    So that one is at its work in a moment: what it needs has been imported already.
    """
    s3_upload.PART = PART
    files = [file for file in file_entries(folder) if file["path"] != NAME]
    for line in sys.stdin:
        child = os.fork()
        if not child:
            store = S3Store(S3Place(bucket, line.strip()), S3(), Retries())
            publish(folder, files, store, no_advance)
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print("done" if status == 0 else f"ended by {status}", flush=True)


@contextlib.contextmanager
def process(what: str, server: S3Server, endpoint: str, *arguments: object) -> Iterator[Any]:
    environment = {**os.environ, **server.environment(), "AWS_ENDPOINT_URL_S3": endpoint}
    with subprocess.Popen(
        [sys.executable, "-m", "bench.transfer_faults", "--process", what, *map(str, arguments)],
        cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as started:  # fmt: skip
        try:
            yield started
        finally:
            started.kill()


# --- who looks on


class Observer(threading.Thread):
    """Asks the server itself, again and again, for a manifest with a file missing."""

    def __init__(self, server: S3Server, bucket: str, prefixes: list[str]) -> None:
        super().__init__(daemon=True)
        self.s3, self.bucket, self.prefixes = server.client(), bucket, prefixes
        self.looked = self.seen = 0
        self.broken: list[str] = []
        self.error: Exception | None = None
        self.over = threading.Event()

    def run(self) -> None:
        try:
            while not self.over.is_set():
                for prefix in self.prefixes:
                    self.look(prefix)
        except Exception as error:
            self.error = error

    def manifest(self, prefix: str) -> bytes | None:
        try:
            return self.s3.get_object(Bucket=self.bucket, Key=f"{prefix}/{NAME}")["Body"].read()
        except self.s3.exceptions.NoSuchKey:
            return None

    def look(self, prefix: str) -> None:
        """A manifest that is the same before and after the look had to be true in between."""
        self.looked += 1
        said = self.manifest(prefix)
        if said is None:
            return
        listed = self.s3.list_objects_v2(Bucket=self.bucket, Prefix=f"{prefix}/").get(
            "Contents", []
        )
        there = {found["Key"].removeprefix(f"{prefix}/"): found["Size"] for found in listed}
        if self.manifest(prefix) != said:
            return
        self.seen += 1
        for file in json.loads(said)["files"]:
            if there.get(file["path"]) != file["size"]:
                self.broken.append(f"{prefix}/{file['path']}")

    def end(self) -> None:
        self.over.set()
        self.join()
        for prefix in self.prefixes:
            self.look(prefix)
        if self.error:
            raise self.error


# --- the two things that are proven


def faults(server: S3Server, folder: Path, count: int) -> list[str]:
    bucket = server.new_bucket()
    places = count // 2  # each is published to twice
    observer = Observer(server, bucket, [f"runs/{number}" for number in range(places)])
    observer.start()
    start = time.monotonic()
    with running_proxy(server.endpoint, rate=RATE) as proxy:
        proxy.stall_s = 0.3
        with process("runs", server, proxy.endpoint, bucket, folder, places) as running:
            results = [json.loads(line) for line in running.stdout]
        seconds = time.monotonic() - start
        log, injected = proxy.log, proxy.injected
    observer.end()
    *runs, last = results
    if len(runs) != places or "peak" not in last:
        raise SystemExit(f"only {len(runs)} of {places} ended")
    wrong = sum(run["wrong"] for run in runs)
    reasons: Counter[str] = Counter()
    for run in runs:
        reasons.update(run["reasons"])
    needed = sum(run["sent"] for run in runs)
    up, down = sum(r.received for r in log), sum(r.sent for r in log)
    lines = [
        f"{count} times up and down, {AT_A_TIME} at a time, {len(SIZES)} files and the manifest, one in "
        f"{-(-SIZES['merged/model'] // PART)} parts; every second time over an earlier version. "
        f"{len(log):,} requests, of which {sum(injected.values()):,} "
        f"({100 * sum(injected.values()) / len(log):.0f} %) were failed.",
        "",
        "| | |", "| --- | --- |",
        f"| files that came back missing or with another sha256 | **{wrong}** |",
        f"| manifests seen with a file missing, in {observer.looked:,} looks, {observer.seen:,} of them at a manifest | **{len(observer.broken)}** |",
        f"| runs that ended with an error | **{count - 2 * len(runs)}** |",
        f"| retries | {sum(run['retries'] for run in runs):,} |",
        f"| seconds, all; the longest of two versions | {seconds:.0f}; {max(run['seconds'] for run in runs):.1f} |",
        f"| bytes that had to be sent; sent beyond them | {needed / 1e6:,.0f} MB; {(up - needed) / 1e6:,.0f} MB |",
        f"| bytes that had to be fetched; fetched beyond them | {needed / 1e6:,.0f} MB; {(down - needed) / 1e6:,.0f} MB |",
        f"| peak memory of the process with {AT_A_TIME} runs in it (VmHWM) | {last['peak']:.0f} MB |",
        "",
        "| fault | times |", "| --- | --- |",
        *(f"| {fault} | {injected[fault]:,} |" for fault in FAULTS if fault != "expired"),
        "",
        "| what a retry was told to be for | times |", "| --- | --- |",
        *(f"| {reason} | {times:,} |" for reason, times in reasons.most_common()),
    ]  # fmt: skip
    if wrong or observer.broken:
        raise SystemExit("\n".join([*lines, *observer.broken]))
    return lines


def settled(proxy: FaultProxy) -> None:
    """Wait until what was on its way to the server has arrived there, or never will."""
    while True:
        before = proxy.bytes_up, sum(r.upstream_status is not None for r in proxy.log)
        time.sleep(0.1)
        if before == (proxy.bytes_up, sum(r.upstream_status is not None for r in proxy.log)):
            return


def killed(server: S3Server, folder: Path, count: int) -> list[str]:
    bucket = server.new_bucket()
    source = folder / "out"
    files = make(source, "killed")
    needed = total(source)
    draw = random.Random(1)
    kills = beyond = twice = unfinished = broken = 0
    start = time.monotonic()
    with (
        running_proxy(server.endpoint, rate=0) as proxy,
        process("forge", server, proxy.endpoint, bucket, source) as forging,
    ):
        publish_once(forging, "killed/warm")
        longest = publish_once(forging, "killed/undisturbed")[1]
        for number in range(count):
            prefix = f"killed/{number}"
            observer = Observer(server, bucket, [prefix])
            first = len(proxy.log)
            tries = 0
            while True:
                # Three are killed at most; then it may end.
                wait = draw.uniform(0, longest) if tries < 3 else None
                said, _ = publish_once(forging, prefix, wait)
                tries += 1
                settled(proxy)
                observer.look(prefix)
                if said == "done":
                    break
                kills += 1
            log = proxy.log[first:]
            arrived = Counter(part_of(r.target) for r in log if r.method == "PUT" and r.upstream_status == 200)  # fmt: skip
            twice += sum(times > 1 for times in arrived.values())
            beyond += sum(r.received for r in log if r.method == "PUT") - needed
            broken += len(observer.broken)
            store = server.client()
            for file in files:
                body = store.get_object(Bucket=bucket, Key=f"{prefix}/{file['path']}")[
                    "Body"
                ].read()
                came = folder / "came"
                came.write_bytes(body)
                broken += sha256_of(came) != file["sha256"]
            unfinished += len(store.list_multipart_uploads(Bucket=bucket).get("Uploads", []))
    seconds = time.monotonic() - start
    lines = [
        f"{count} times the same files to a new place; the process was ended with SIGKILL after a random "
        f"time of up to {longest:.2f} s (what one takes undisturbed), up to three times, and started "
        "again until done, by what the service has.",
        "",
        "| | |", "| --- | --- |",
        f"| kills | {kills} |",
        f"| files or parts that had arrived whole and were sent again | **{twice}** |",
        f"| files missing or with another sha256 at the end, or under a manifest before it | **{broken}** |",
        f"| unfinished uploads left behind | **{unfinished}** |",
        f"| bytes that had to be sent; sent beyond them (in requests that a kill cut off) | {count * needed / 1e6:,.0f} MB; {beyond / 1e6:,.1f} MB |",
        f"| seconds | {seconds:.0f} |",
    ]  # fmt: skip
    if twice or broken or unfinished:
        raise SystemExit("\n".join(lines))
    return lines


def part_of(target: str) -> str:
    """A file, or a part of one, whichever upload it belongs to."""
    path, _, query = target.partition("?")
    return path + "".join(p for p in query.split("&") if p.startswith("partNumber"))


def publish_once(forging: Any, prefix: str, kill_after: float | None = None) -> tuple[str, float]:
    """How it ended, and after how many seconds."""
    stdin: IO[str] = forging.stdin
    start = time.monotonic()
    print(prefix, file=stdin, flush=True)
    child = int(forging.stdout.readline())
    timer = threading.Timer(kill_after, os.kill, (child, signal.SIGKILL)) if kill_after is not None else None  # fmt: skip
    if timer:
        timer.start()
    said = forging.stdout.readline().strip()
    if timer:
        timer.cancel()
    if said not in ("done", f"ended by {int(signal.SIGKILL)}"):
        raise SystemExit(f"{prefix}: {said}")
    return said, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--process", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        what, bucket, folder, *rest = arguments.process
        if what == "runs":
            all_runs(bucket, Path(folder), int(rest[0]))
        else:
            forge(bucket, Path(folder))
        return
    ceph = why_not() is None
    with tempfile.TemporaryDirectory() as at, tempfile.TemporaryDirectory() as ceph_at:
        folder = Path(at)
        with running_ceph(Path(ceph_at), size_gb=4) if ceph else running_moto() as server:
            (folder / "faults").mkdir()
            (folder / "kills").mkdir()
            failed = faults(server, folder / "faults", arguments.runs)
            print("\n".join(failed), flush=True)
            ended = killed(server, folder / "kills", arguments.kills)
    lines = [
        "# S3 through a network that fails",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}, {'Ceph RGW' if ceph else 'moto'} on loopback: "
        "`python -m bench.transfer_faults`",
        "",
        "## One request in five fails",
        "",
        *failed,
        "",
        "## Killed at random moments",
        "",
        *ended,
        "",
    ]
    print("\n".join(lines))
    if (arguments.runs, arguments.kills) == (200, 50):
        RESULT.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
