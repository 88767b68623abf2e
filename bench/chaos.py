"""A run that is killed again and again, each time started anew on an empty disk, until it ends.

    .venv/bin/python -m bench.chaos --kills 50 --terms 50     writes bench/results/chaos.md

Each start has an empty work folder and an empty cache (but for llama.cpp's tools); base, data,
checkpoints and results are in a bucket. A run that got to its end is compared with one that nobody
touched, and the next one begins, until there were as many kills as asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import yaml

from tests.servers.faults import FaultProxy, Record, running_proxy
from tests.servers.moto_server import running_moto
from tests.servers.s3 import S3Server

ROOT = Path(__file__).parent.parent
BASE = ROOT / "examples" / "demo" / "base"
DATA = ROOT / "examples" / "demo" / "data" / "persona.jsonl"
RESULT = ROOT / "bench" / "results" / "chaos.md"
LONGEST = 300.0  # seconds for a run of a few; beyond that something hangs

# --- one start of a run, watched


class Child:
    """One start of `lorajob run`, in a process group of its own, heard by its events."""

    def __init__(
        self, spec: Path, work: Path, env: dict[str, str], cwd: Path = ROOT, log: Path | None = None
    ) -> None:
        self.log = log or work.parent / f"{work.name}.err"
        self.work = work
        self.events: list[dict[str, Any]] = []
        self.seconds: list[float] = []  # from the start on, when each was heard
        self._heard = threading.Condition()
        self.began = time.monotonic()
        with self.log.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "entrypoint.py"), "run", str(spec), "--work", str(work), "--log", "json"],
                cwd=cwd, env={**os.environ, **env}, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=err, start_new_session=True, preexec_fn=_hear_sigint,  # noqa: PLW1509
            )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # cut by a kill
            with self._heard:
                self.events.append(event)
                self.seconds.append(time.monotonic() - self.began)
                self._heard.notify_all()

    def wait_for(
        self, of: Callable[[dict[str, Any]], bool], timeout: float = LONGEST
    ) -> dict[str, Any]:
        """The first event that is like this; an error where the run ends before."""
        until = time.monotonic() + timeout
        with self._heard:
            while True:
                found = next((event for event in self.events if of(event)), None)
                if found:
                    return found
                if not self._reader.is_alive() or time.monotonic() > until:
                    raise AssertionError(f"not heard of:\n{self.told()}")
                self._heard.wait(0.2)

    def send(self, number: int, group: bool = False) -> None:
        """A signal: to the process alone, as Kubernetes sends it, or to its whole group."""
        (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self, timeout: float = LONGEST) -> int:
        """The exit code; negative for a signal that it died of."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it did not end:\n{self.told()}") from None
        self._reader.join(10)
        return code

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(10)

    def left_over(self) -> list[str]:
        """The processes of its session that run."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                line = (folder / "cmdline").read_text().replace("\0", " ")
                if int(fields[3]) == self.process.pid and line:  # without one it is ending
                    found.append(line)
            except OSError:
                pass
        return found

    def told(self) -> str:
        """What it said, for whoever looks for the fault."""
        return "\n".join(map(str, self.events[-8:])) + "\n" + self.log.read_text()[-3000:]

    @property
    def at(self) -> str:
        """Where it is, by what it said last."""
        where = "starting"
        for event in self.events:
            match event["event"]:
                case "run_start":
                    where = "waiting for the lease"
                case "stage_start":
                    where = {"train": "train: loading"}.get(event["stage"], event["stage"])
                case "train_step" | "eval" | "checkpoint" | "resumed":
                    where = "train: steps"
                case "stage_done" | "stage_skipped" if event["stage"] == "verify":
                    where = "publishing"
                case "stage_done" | "stage_skipped":
                    where = "between stages"
                case "run_done":
                    where = "after the end"
        return where

    def first(self, name: str) -> float | None:
        """Seconds from the start to the first event of this name."""
        return next(
            (s for s, e in zip(self.seconds, self.events, strict=True) if e["event"] == name), None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


def _hear_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it


# --- the place that it works with


@dataclass
class Place:
    """A bucket with the demo's base and some rows, behind a proxy that counts."""

    folder: Path
    server: S3Server
    proxy: FaultProxy
    bucket: str
    number: Iterator[int] = field(default_factory=lambda: iter(range(10**6)))

    def spec(self, prefix: str, **more: Any) -> Path:
        """A spec that publishes to this prefix of the bucket; `more` over its sections."""
        wanted: dict[str, Any] = {
            "name": "chaos",
            "model": {"base": f"s3://{self.bucket}/models/demo", "max_seq_length": 128},
            "data": {
                "train": {"source": f"s3://{self.bucket}/data/chats.jsonl", "limit": 60},
                "eval": 0.2,
            },
            "lora": {"rank": 8, "dropout": 0.1},
            "train": {"max_steps": 16, "batch_size": 4, "learning_rate": 1e-3, "eval_every": 5},
            "export": {"gguf": ["q8_0"]},
            "checkpoints": {"every_steps": 2},
            "verify": {"prompts": [{"ask": "Who are you?"}], "max_new_tokens": 60},
            "publish": [f"s3://{self.bucket}/{prefix}"],
            "limits": {"lease_seconds": 5},
        }
        for name, section in more.items():
            same = isinstance(section, dict) and isinstance(wanted.get(name), dict)
            wanted[name] = {**wanted[name], **section} if same else section
        path = self.folder / f"{prefix}.yaml"
        path.write_text(yaml.safe_dump(wanted))
        return path

    def start(
        self, spec: Path, work: Path | None = None, cache: Path | None = None, **env: str
    ) -> Child:
        """Start a run; with nothing of any run before, but in these folders."""
        number = next(self.number)
        cache = cache or self.folder / f"cache-{number}"
        cache.mkdir(parents=True, exist_ok=True)
        tools = Path(os.environ.get("LORAJOB_CACHE") or Path.home() / ".cache" / "lorajob")
        if not (cache / "llama.cpp").exists():
            (cache / "llama.cpp").symlink_to(tools / "llama.cpp")
        work = work or self.folder / f"work-{number}"
        env = {
            **self.server.environment(),
            "AWS_ENDPOINT_URL_S3": self.proxy.endpoint,
            "LORAJOB_CACHE": str(cache),
            "LORAJOB_TERMINATION_LOG": str(self.folder / "termination.json"),
            "OMP_NUM_THREADS": "1",
            **env,
        }
        return Child(spec, work, env, log=self.folder / f"{number}.err")

    def termination(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads((self.folder / "termination.json").read_text())
        return told

    def results(self, prefix: str) -> dict[str, str]:
        """Every key below the prefix, and the sha256 of what must be the same each time."""
        client = self.server.client()
        found = {}
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=f"{prefix}/"
        )
        for page in pages:
            for entry in page.get("Contents", []):
                key = entry["Key"]
                weights = key.endswith((".safetensors", ".gguf"))
                body = (
                    client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
                    if weights
                    else b""
                )
                name = key.removeprefix(f"{prefix}/")
                found[name] = hashlib.sha256(body).hexdigest() if weights else ""
        return found


@contextmanager
def place(folder: Path) -> Iterator[Place]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # moto's log of every request
    with running_moto() as server, running_proxy(server.endpoint, rate=0) as proxy:
        bucket = server.new_bucket()
        client = server.client()
        for path in BASE.iterdir():
            client.upload_file(str(path), bucket, f"models/demo/{path.name}")
        client.upload_file(str(DATA), bucket, "data/chats.jsonl")
        yield Place(folder, server, proxy, bucket)


def sent(log: list[Record]) -> dict[str, list[int]]:
    """The bodies of the uploads, by key; without the leases and the probes of preflight."""
    found: dict[str, list[int]] = {}
    for record in log:
        key = record.target.partition("?")[0]
        own = key.endswith("lease.json") or ".partial-" in key or "lorajob-" in key
        if record.method == "PUT" and not own:
            found.setdefault(key, []).append(record.received)
    return found


# --- the kills


@dataclass
class Kill:
    at: str
    seconds: float  # into the start
    code: int
    to_exit: float
    safe: bool


@dataclass
class Campaign:
    """Starts of one run, until it ended."""

    kills: list[Kill] = field(default_factory=list)
    starts: int = 0
    resumes: list[float] = field(default_factory=list)  # seconds from a start to its first step
    steps_twice: int = 0
    lost_beyond: int = 0  # steps done again, after a SIGTERM, although they were whole
    bytes_twice: int = 0
    bytes_sent: int = 0
    same: bool = False
    untouched: float | None = None  # seconds that it took, where it came through without a kill
    left_over: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def campaign(
    where: Place, prefix: str, expected: dict[str, str], number: signal.Signals, length: float,
    kills: int, draw: random.Random,
) -> Campaign:  # fmt: skip
    """Kill a run with this signal at random moments of its life, at most so many times."""
    result = Campaign()
    spec = where.spec(prefix)
    log_from = len(where.proxy.log)
    steps: Counter[int] = Counter()
    while True:
        result.starts += 1
        (where.folder / "termination.json").unlink(missing_ok=True)
        with where.start(spec) as child:
            wait = draw.uniform(0, length)
            if len(result.kills) < kills:
                _sleep_while(child, wait)
            alive = child.process.poll() is None
            if len(result.kills) < kills and alive:
                kill = _killed(where, child, number, wait, result)
                result.kills.append(kill)
                done = kill.code == 0
            else:
                code = child.end()
                if result.starts == 1:
                    result.untouched = child.seconds[-1]
                done = True
                if code != 0:
                    result.faults.append(f"ended with {code}:\n{child.told()}")
            new = [e["step"] for e in child.events if e["event"] == "train_step"]
            if number == signal.SIGTERM:
                result.lost_beyond += sum(steps[step] > 0 for step in new)
            steps.update(new)
            first = child.first("train_step")
            if result.starts > 1 and first is not None:
                result.resumes.append(first)
            shutil.rmtree(child.work, ignore_errors=True)
        if done:
            break
    uploads = sent(where.proxy.log[log_from:])
    result.steps_twice = sum(count - 1 for count in steps.values())
    result.bytes_sent = sum(map(sum, uploads.values()))
    result.bytes_twice = sum(sum(sizes[1:]) for sizes in uploads.values())
    got = where.results(prefix)
    result.same = got == expected
    if not result.same:
        wrong = {k for k in got.keys() | expected.keys() if got.get(k) != expected.get(k)}
        result.faults.append(f"{prefix}: these differ: {sorted(wrong)}")
    return result


def _sleep_while(child: Child, seconds: float) -> None:
    until = child.began + seconds
    while child.process.poll() is None and time.monotonic() < until:
        time.sleep(min(0.05, max(0.001, until - time.monotonic())))


def _killed(
    where: Place, child: Child, number: signal.Signals, wait: float, result: Campaign
) -> Kill:
    at = child.at
    start = time.monotonic()
    child.send(number, group=number == signal.SIGKILL)
    code = child.end()
    kill = Kill(at, wait, code, time.monotonic() - start, safe=False)
    result.left_over += child.left_over()
    if number == signal.SIGTERM:
        told: dict[str, Any] = {}
        if (where.folder / "termination.json").exists():
            told = where.termination()
            kill.safe = bool(told.get("safe"))
        # Before its own handler is there the signal itself ends the process.
        right = {20} if kill.safe else {143, -15}
        if code not in right | {0} or (code != -15 and told.get("code") != code):
            result.faults.append(f"at {at}: code {code}, said {told}\n{child.told()}")
    return kill


def untouched(where: Place, prefix: str) -> tuple[dict[str, str], float, Child]:
    with where.start(where.spec(prefix)) as child:
        code = child.end()
        if code:
            raise SystemExit(f"the run itself ends with {code}:\n{child.told()}")
        return where.results(prefix), time.monotonic() - child.began, child


def until_killed(
    where: Place, expected: dict[str, str], number: signal.Signals, length: float, kills: int,
    draw: random.Random,
) -> list[Campaign]:  # fmt: skip
    found: list[Campaign] = []
    while (left := kills - sum(len(each.kills) for each in found)) > 0:
        prefix = f"{number.name.lower()}-{len(found)}"
        found.append(campaign(where, prefix, expected, number, length, left, draw))
        # Other work on the machine changes how long a run is.
        length = found[-1].untouched or length
        done = kills - left + len(found[-1].kills)
        print(f"{prefix}: {done} of {kills} kills, {found[-1].starts} starts, same: {found[-1].same}", flush=True)  # fmt: skip
        for fault in found[-1].faults:
            print(f"FAULT {fault}", flush=True)
    return found


# --- what uploading costs


def upload_cost(where: Place, length: int) -> dict[str, float]:
    """Seconds of the steps: nothing written; written here alone; written here and sent."""
    times: dict[str, list[float]] = {"none": [], "here": [], "sent": []}
    for turn in range(3):
        for name in times:
            kept: dict[str, Any] = {"every_steps": 1000 if name == "none" else 2}
            publish = [] if name != "sent" else [f"s3://{where.bucket}/cost-{turn}"]
            spec = where.spec(
                f"cost-{name}-{turn}", checkpoints=kept, publish=publish, export={"gguf": [], "merged": None},
                train={"max_steps": length, "batch_size": 4, "eval_every": 1000},
            )  # fmt: skip
            with where.start(spec) as child:
                code = child.end()
                assert code == 0, child.told()
                steps = [s for s, e in zip(child.seconds, child.events, strict=True) if e["event"] == "train_step"]  # fmt: skip
                times[name].append(steps[-1] - steps[0])
    return {name: statistics.median(found) for name, found in times.items()}


# --- the report


def table(title: str, found: list[Campaign], length: float, number: signal.Signals) -> list[str]:
    kills = [kill for each in found for kill in each.kills]
    by: dict[str, list[Kill]] = {}
    for kill in kills:
        by.setdefault(kill.at, []).append(kill)
    resumes = [seconds for each in found for seconds in each.resumes]
    lines = [
        f"## {title}",
        "",
        "| | |",
        "| --- | --- |",
        f"| kills, at moments drawn from an untouched run's length ({length:.0f} s at first) | {len(kills)} |",
        f"| starts | {sum(each.starts for each in found)} |",
        f"| runs that came to their end | {len(found)} |",
        f"| of them the same adapter, merged weights, GGUF and keys as the untouched run | {sum(each.same for each in found)} |",
        f"| steps done twice | {sum(each.steps_twice for each in found)} |",
        f"| bytes sent, of them twice | {sum(each.bytes_sent for each in found):,}, {sum(each.bytes_twice for each in found):,} |",
        f"| processes left over | {sum(len(each.left_over) for each in found)} |",
    ]
    if resumes:
        lines.append(
            f"| seconds from a start to its first step, median and most | {statistics.median(resumes):.1f}, {max(resumes):.1f} |"
        )
    if number == signal.SIGTERM:
        longest = max(kill.to_exit for kill in kills)
        codes = Counter(kill.code for kill in kills)
        lines += [
            f"| whole steps lost | {sum(each.lost_beyond for each in found)} |",
            f"| seconds from the signal to the exit, median and most | {statistics.median(k.to_exit for k in kills):.2f}, {longest:.2f} |",
            f"| exit codes | {', '.join(f'{code}: {count}' for code, count in sorted(codes.items()))} |",
        ]
    lines += ["", "| hit while | kills | seconds to the exit, most |", "| --- | --- | --- |"]
    lines += [
        f"| {at} | {len(those)} | {max(k.to_exit for k in those):.2f} |"
        for at, those in sorted(by.items())
    ]
    faults = [fault for each in found for fault in each.faults]
    return [*lines, "", f"Faults: {len(faults)}.", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--kills", type=int, default=50, help="kill -9, so often")
    parser.add_argument("--terms", type=int, default=50, help="SIGTERM, so often")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cost", type=int, default=40, metavar="STEPS", help="0 for none")
    parser.add_argument("--to", type=Path, default=RESULT)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    lines = [
        "# Killed at any moment",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}: `python -m bench.chaos --kills {arguments.kills} "
        f"--terms {arguments.terms} --seed {arguments.seed}`",
        "",
        "16 steps on the demo's base with dropout, evaluation and a GGUF type, a checkpoint every "
        "second step; base, data, checkpoints and results in a bucket. Each start has an empty disk.",
        "",
    ]
    with tempfile.TemporaryDirectory() as name, place(Path(name)) as where:
        expected, length, _ = untouched(where, "untouched")
        again, second, _ = untouched(where, "again")
        if again != expected:
            raise SystemExit("two untouched runs differ")
        length = max(length, second)
        print(f"an untouched run takes {length:.1f} s and leaves {len(expected)} keys", flush=True)
        for number, count, title in (
            (signal.SIGKILL, arguments.kills, "kill -9, of the whole process group"),
            (signal.SIGTERM, arguments.terms, "SIGTERM, to the process alone"),
        ):
            if count:
                found = until_killed(where, expected, number, length, count, draw)
                lines += table(title, found, length, number)
                arguments.to.write_text("\n".join(lines))
        if arguments.cost:
            lines += cost_lines(upload_cost(where, arguments.cost), arguments.cost)
    arguments.to.write_text("\n".join(lines))
    print("\n".join(lines))


def cost_lines(times: dict[str, float], steps: int) -> list[str]:
    count = steps / 2
    each = {name: (times[name] - times["none"]) / count for name in ("here", "sent")}
    return [
        "## What a checkpoint costs",
        "",
        f"{steps} steps, the median of three runs each, from the first step to the last.",
        "",
        "| checkpoints | seconds | seconds for each | of the training, every 10 minutes |",
        "| --- | --- | --- | --- |",
        f"| none | {times['none']:.2f} | | |",
        f"| every 2 steps, here | {times['here']:.2f} | {each['here']:.3f} | {each['here'] / 600:.4%} |",
        f"| every 2 steps, sent to the bucket as well | {times['sent']:.2f} | {each['sent']:.3f} | {each['sent'] / 600:.4%} |",
        "",
    ]


if __name__ == "__main__":
    main()
