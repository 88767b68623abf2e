"""One writer at a time, in folders and in buckets, whatever happens to the one who writes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobs.errors import AccessError, ServiceError
from jobs.spec import S3
from jobs.store import lease as lease_module
from jobs.store.base import Store
from jobs.store.lease import Lease, held_lease
from jobs.store.local import LocalStore
from jobs.store.places import S3Place
from jobs.store.retry import Retries
from jobs.store.s3 import S3Store
from tests.servers.faults import running_proxy
from tests.servers.fixtures import ceph, moto  # noqa: F401
from tests.servers.s3 import S3Server

ROOT = Path(__file__).parent.parent.parent

# A run in a process of its own: holds the lease of a place, says so in a file that all share, and
# does what it is told there. Its output is for the test.
CHILD = """
import os, sys, time
from pathlib import Path
from jobs.errors import LorajobError
from jobs.spec import S3
from jobs.store.connect import Connections
from jobs.store.lease import held_lease

place, name, ttl, wait, hold, shared = sys.argv[1:]
store = Connections(S3()).target(place)

def say(text):
    with open(shared, "ab", buffering=0) as file:
        file.write(f"{name} {text}\\n".encode())

say("started")
try:
    with held_lease(store, name, lambda text: None, lambda why: say("lost"), float(ttl), float(wait)) as lease:
        say("enter")
        until = time.monotonic() + float(hold)
        while time.monotonic() < until:
            time.sleep(0.02)
            lease.require()
            say("writes")
        say("leave")
except LorajobError as error:
    say(f"error {error.exit_code} {error.message}")
"""


@dataclass
class Told:
    """What a lease said to the run that holds it."""

    texts: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)
    lost: threading.Event = field(default_factory=threading.Event)

    def on_lost(self, why: str) -> None:
        self.losses.append(why)
        self.lost.set()

    def hold(
        self, store: Store, ttl: float = 30.0, wait: float = 30.0, who: str = "pod-a"
    ) -> AbstractContextManager[Lease]:
        return held_lease(store, who, self.texts.append, self.on_lost, ttl, wait)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture(params=["moto", "ceph"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    found: S3Server = request.getfixturevalue(request.param)
    return use(found, monkeypatch)


@pytest.fixture
def simulated(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    return use(moto, monkeypatch)


@pytest.fixture
def real(ceph: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    return use(ceph, monkeypatch)


def use(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return server


def s3_store(bucket: str, prefix: str = "runs/a", **settings: object) -> S3Store:
    retries = Retries(wait=0.01, give_up_after=5)
    return S3Store(S3Place(bucket, prefix), S3.model_validate(settings), retries)


@pytest.fixture(params=["moto", "ceph", "folder"])
def place(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> LocalStore | S3Store:
    if request.param == "folder":
        return LocalStore(tmp_path / "results" / "a")
    return s3_store(use(request.getfixturevalue(request.param), monkeypatch).new_bucket())


@dataclass
class Runs:
    """Processes that want the same lease, and the file where they say what they do."""

    place: str
    shared: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(
        self, name: str, ttl: float = 1, wait: float = 45, hold: float = 90
    ) -> subprocess.Popen[bytes]:
        arguments = [self.place, name, str(ttl), str(wait), str(hold), str(self.shared)]
        process = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], cwd=ROOT)
        self.started.append(process)
        return process

    def said(self) -> list[str]:
        return self.shared.read_text().splitlines() if self.shared.exists() else []

    def until(self, text: str, seconds: float = 60) -> float:
        """Wait until a process has said this; how long it took."""
        start = time.monotonic()
        while text not in self.said():
            assert time.monotonic() - start < seconds, (text, self.said()[-20:])
            time.sleep(0.02)
        return time.monotonic() - start

    def end(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()


@contextmanager
def running(place: str, folder: Path) -> Iterator[Runs]:
    runs = Runs(place, folder / "said")
    try:
        yield runs
    finally:
        runs.end()


@pytest.fixture
def runs_on_s3(real: S3Server, tmp_path: Path) -> Iterator[Runs]:
    with running(f"s3://{real.new_bucket()}/runs/a", tmp_path) as runs:
        yield runs


@pytest.fixture
def runs_in_folder(tmp_path: Path) -> Iterator[Runs]:
    with running(str(tmp_path / "place"), tmp_path) as runs:
        yield runs


def record(store: S3Store) -> dict[str, object]:
    found = store.read_json("lease.json")
    assert isinstance(found, dict)
    return found


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lease"]


# --- who holds it


def test_it_is_held_and_given_back(place: LocalStore | S3Store, told: Told) -> None:
    with told.hold(place) as lease:
        lease.require()
        assert place.entries(), "nothing shows that it is held"
    assert place.entries() == []
    assert threads() == []
    with pytest.raises(ServiceError, match="given back"):
        lease.require()
    assert told.texts == told.losses == []


def test_the_second_waits_for_the_first(place: LocalStore | S3Store, told: Told) -> None:
    other = Told()
    order: list[str] = []
    entered, until = threading.Event(), time.monotonic() + 30

    def first() -> None:
        with told.hold(place, ttl=3, who="node-1 pod-a"):
            entered.set()
            while not other.texts:  # until it waits
                assert time.monotonic() < until
                time.sleep(0.01)
            time.sleep(3.5)  # longer than its ttl: only its renewals hold it
            order.append("first leaves")

    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(30)
    with other.hold(place) as lease:
        order.append("second enters")
        lease.require()
    thread.join()
    assert order == ["first leaves", "second enters"]
    assert len(other.texts) == 1
    assert "in use by another run: node-1 pod-a, since 20" in other.texts[0]
    assert told.losses == []


def test_the_second_leaves_with_a_message(place: LocalStore | S3Store, told: Told) -> None:
    other = Told()
    with told.hold(place, who="node-1 pod-a") as lease:
        start = time.monotonic()
        with pytest.raises(ServiceError) as caught, other.hold(place, wait=1.2):
            raise AssertionError("two have it")
        assert 1 < time.monotonic() - start < 10  # not the other's ttl
        lease.require()
    assert caught.value.exit_code == 10
    assert "in use by another run: node-1 pod-a, since 20" in caught.value.message
    assert "start the same run again" in (caught.value.hint or "")
    assert told.losses == other.losses == []


def test_it_is_given_back_where_the_run_fails(place: LocalStore | S3Store, told: Told) -> None:
    with pytest.raises(KeyboardInterrupt), told.hold(place):
        raise KeyboardInterrupt
    assert place.entries() == []
    assert threads() == []


def test_other_prefixes_are_not_touched(simulated: S3Server, told: Told) -> None:
    bucket = simulated.new_bucket()
    whole = s3_store(bucket, "")
    with told.hold(whole), told.hold(s3_store(bucket, "a")), told.hold(s3_store(bucket, "ab")):
        keys = [entry.key for entry in whole.entries()]
    assert keys == ["a/lease.json", "ab/lease.json", "lease.json"]
    assert whole.entries() == []
    assert told.texts == []


def test_a_store_that_needs_none_gets_one_that_is_never_lost(told: Told) -> None:
    class Elsewhere:
        url = "hf://owner/name"

    with told.hold(Elsewhere()) as lease:  # type: ignore[arg-type]
        assert type(lease) is Lease
        lease.require()


# --- what the record says


def test_the_record_names_the_holder_and_is_renewed(server: S3Server, told: Told) -> None:
    store = s3_store(server.new_bucket(), storage_class="STANDARD_IA")
    with told.hold(store, ttl=3):
        before, start = record(store), time.monotonic()
        renewals = int(str(before["renewals"]))
        while int(str((after := record(store))["renewals"])) < renewals + 3:
            assert time.monotonic() - start < 20
            time.sleep(0.05)
        # Each third of its ttl; the first of them may have been due at once.
        assert time.monotonic() - start > 1.8
        said = store.client.s3.head_object(Bucket=store.bucket, Key="runs/a/lease.json")
    assert set(before) == {"id", "who", "started", "ttl", "renewals"}
    assert before["who"] == "pod-a"
    assert after == {**before, "renewals": after["renewals"]}
    assert "StorageClass" not in said, "rare classes bill a month for each renewal"


def test_a_name_cannot_write_to_the_terminal(simulated: S3Server, told: Told) -> None:
    store = s3_store(simulated.new_bucket())
    with (
        told.hold(store, who="\x1b[31mpod\n" + "x" * 500),
        pytest.raises(ServiceError) as caught,
        told.hold(store, wait=0),
    ):
        pass
    assert "[31mpodxxx" in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400


def test_another_file_of_that_name_is_left_alone(simulated: S3Server, told: Told) -> None:
    store = s3_store(simulated.new_bucket())
    put = store.client.s3.put_object
    put(Bucket=store.bucket, Key="runs/a/lease.json", Body=b'{"rent": 900}')
    with pytest.raises(AccessError, match="is not what a run writes"), told.hold(store):
        pass
    assert store.read_json("lease.json") == {"rent": 900}


# --- a holder that is gone


def test_a_killed_holder_is_followed_after_its_ttl(runs_on_s3: Runs) -> None:
    first = runs_on_s3.start("first", ttl=4)
    runs_on_s3.until("first enter")
    runs_on_s3.start("second", ttl=60)  # it is the holder's ttl that counts
    runs_on_s3.until("second started")
    time.sleep(1)
    first.kill()
    assert 2.0 < runs_on_s3.until("second enter") < 30
    # Nobody writes at the same time.
    said = [line.split()[0] for line in runs_on_s3.said() if line.endswith(("enter", "writes"))]
    assert said == sorted(said)


def test_a_long_dead_holder_is_followed_at_once(real: S3Server, told: Told) -> None:
    """Nobody has to have watched it: the server knows when it was renewed last."""
    store = s3_store(real.new_bucket())
    dead = {"id": "dead", "who": "node-0", "started": "once", "ttl": 0.9, "renewals": 7}
    store.client.s3.put_object(
        Bucket=store.bucket, Key="runs/a/lease.json", Body=json.dumps(dead).encode()
    )
    time.sleep(2.1)
    start = time.monotonic()
    with told.hold(store, ttl=60, wait=0) as lease:
        assert time.monotonic() - start < 10  # nobody waited for its 60 seconds
        lease.require()
        assert record(store)["who"] == "pod-a"
    assert told.texts == []


def test_the_clocks_of_two_machines_are_not_compared(simulated: S3Server, told: Told) -> None:
    """What the holder's clock said is of no account, only how old the server finds the record."""
    store = s3_store(simulated.new_bucket())
    living = {"id": "x", "who": "a", "started": "1999-01-01 00:00:00 UTC", "ttl": 60, "renewals": 1}
    store.client.s3.put_object(
        Bucket=store.bucket, Key="runs/a/lease.json", Body=json.dumps(living).encode()
    )
    with pytest.raises(ServiceError, match="since 1999"), told.hold(store, wait=1.5):
        pass
    assert record(store)["id"] == "x"


def test_a_stopped_holder_notices_before_it_writes(runs_on_s3: Runs) -> None:
    first = runs_on_s3.start("first", ttl=1)
    runs_on_s3.until("first writes")
    first.send_signal(signal.SIGSTOP)
    before = runs_on_s3.said().count("first writes")
    runs_on_s3.start("second", ttl=10)
    runs_on_s3.until("second writes")
    first.send_signal(signal.SIGCONT)
    assert first.wait(30) == 0
    # What it was about to say when it was stopped was allowed before that.
    assert runs_on_s3.said().count("first writes") <= before + 1
    assert runs_on_s3.said().count("first lost") == 1
    [error] = [line for line in runs_on_s3.said() if line.startswith("first error")]
    assert error.startswith("first error 10 ") and "taken it over" in error
    assert not [line for line in runs_on_s3.said() if line.startswith("second error")]


def test_a_stopped_holder_that_nobody_followed_goes_on(runs_on_s3: Runs) -> None:
    first = runs_on_s3.start("first", ttl=2, hold=4)
    runs_on_s3.until("first writes")
    first.send_signal(signal.SIGSTOP)
    time.sleep(2.3)
    first.send_signal(signal.SIGCONT)
    runs_on_s3.until("first leave")
    assert first.wait(30) == 0
    assert "first lost" not in runs_on_s3.said()


def test_a_killed_holder_of_a_folder_is_followed_at_once(runs_in_folder: Runs) -> None:
    first = runs_in_folder.start("first")
    runs_in_folder.until("first enter")
    runs_in_folder.start("second")
    runs_in_folder.until("second started")
    first.kill()
    assert runs_in_folder.until("second enter") < 15


def test_a_forked_child_does_not_hold_a_folder_for_its_dead_parent(
    tmp_path: Path, told: Told
) -> None:
    script = """
import os, sys, time
from jobs.store.lease import held_lease
from jobs.store.local import LocalStore
with held_lease(LocalStore(sys.argv[1]), "a", print, print):
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    print("held", flush=True)
    time.sleep(20)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        time.sleep(0.2)  # for the child to be there
        process.kill()
        process.wait()
        with told.hold(LocalStore(tmp_path), wait=0):
            pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_lock_on_a_file_that_was_just_removed_is_none(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before gave it back between our opening of the file and our locking of it."""
    path, flock = tmp_path / ".lease", fcntl.flock

    def removed_before(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(lease_module.fcntl, "flock", flock)  # type: ignore[attr-defined]
        path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(lease_module.fcntl, "flock", removed_before)  # type: ignore[attr-defined]
    with told.hold(LocalStore(tmp_path)):
        assert path.exists()
        with pytest.raises(ServiceError, match="in use"), told.hold(LocalStore(tmp_path), wait=0):
            raise AssertionError("two have it")


@pytest.mark.parametrize("kind", ["s3", "folder"])
def test_of_eight_at_once_never_two_are_inside(kind: str, request: pytest.FixtureRequest) -> None:
    runs: Runs = request.getfixturevalue(f"runs_{'on_s3' if kind == 's3' else 'in_folder'}")
    names = [f"run{number}" for number in range(8)]
    for name in names:
        runs.start(name, ttl=5, wait=90, hold=0.05)
    for process in runs.started:
        assert process.wait(100) == 0
    inside, done = "", []
    for line in runs.said():
        name, what = line.split(maxsplit=1)
        if what == "enter":
            assert not inside, f"{name} entered while {inside} was inside"
            inside = name
        elif what == "writes":
            assert inside == name
        elif what == "leave":
            assert inside == name
            inside = ""
            done.append(name)
        else:
            assert what == "started", line
    assert sorted(done) == names


# --- a network that fails


def test_failing_requests_do_not_lose_it(
    real: S3Server, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = "lease-faults"  # which request fails hangs on its name too
    real.client().create_bucket(Bucket=bucket)
    with running_proxy(real.endpoint, rate=0.3, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        store = s3_store(bucket)
        with told.hold(store, ttl=5) as lease:
            until = time.monotonic() + 60
            while proxy.injected.total() < 4:
                assert time.monotonic() < until
                lease.require()
                time.sleep(0.05)
            time.sleep(1)  # for the last of them to be made good
            lease.require()
        proxy.pause()
        assert store.entries() == []
    assert told.losses == told.texts == []


def test_no_single_failure_loses_it(
    real: S3Server, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_proxy(real.endpoint, rate=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        store = s3_store(real.new_bucket())
        write = "PUT .*lease.json"
        # It was made and not answered: it has to be known again, and not waited for.
        proxy.fail("reset_after", write)
        with told.hold(store, ttl=6, wait=0) as lease:
            # Each try has a content of its own: a repeated one would not show that it is alive.
            assert int(str(record(store)["renewals"])) >= 3
            for kind in ("reset_after", "stall", "status_503", "upload_cut"):
                failed, before = proxy.injected.total(), int(str(record(store)["renewals"]))
                proxy.fail(kind, write)
                until = time.monotonic() + 20
                # The one that failed, and one that came after it.
                while proxy.injected.total() == failed or int(str(record(store)["renewals"])) < before + 2:  # fmt: skip
                    assert time.monotonic() < until
                    lease.require()
                    time.sleep(0.05)
            proxy.fail("reset_after", "DELETE .*lease.json")
        assert store.entries() == []
    assert told.losses == told.texts == []


def test_a_network_that_is_away_for_longer_than_the_ttl_loses_it(
    real: S3Server, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_proxy(real.endpoint, rate=0) as proxy:
        bucket = real.new_bucket()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        with told.hold(s3_store(bucket), ttl=4) as lease:
            lease.require()
            proxy.fail("reset_before", times=10_000)
            gone = time.monotonic()
            assert told.lost.wait(20)
            # Before anybody else may take it over.
            assert 1.8 < time.monotonic() - gone < 4
            with pytest.raises(ServiceError, match="could not be renewed"):
                lease.require()
            proxy.pause()
            time.sleep(1)  # the network is back, but it stays lost
            with pytest.raises(ServiceError):
                lease.require()
        assert len(told.losses) == 1
        assert "could not be renewed (the server closed the connection" in told.losses[0]
        # It was not certain whose it was: what stands there is left for the ttl to end.
        assert [entry.key for entry in s3_store(bucket).entries()] == ["lease.json"]
    assert threads() == []


def test_a_network_that_hangs_keeps_nobody(
    real: S3Server, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_proxy(real.endpoint, rate=0) as proxy:
        proxy.stall_s = 30
        bucket = real.new_bucket()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        with told.hold(s3_store(bucket), ttl=3) as lease:
            proxy.fail("stall", times=10_000)
            time.sleep(2.6)
            start = time.monotonic()
            with pytest.raises(ServiceError):
                lease.require()
            assert time.monotonic() - start < 5
        assert time.monotonic() - start < 10
    assert len(told.losses) == 1


def test_a_lease_that_somebody_removed_is_lost(simulated: S3Server, told: Told) -> None:
    store = s3_store(simulated.new_bucket())
    with told.hold(store, ttl=1) as lease:
        store.delete({"lease.json"})
        assert told.lost.wait(20)
        with pytest.raises(ServiceError, match="removed"):
            lease.require()
    assert len(told.losses) == 1
    assert store.entries() == []


def test_a_folder_that_somebody_removed_is_lost(tmp_path: Path, told: Told) -> None:
    with told.hold(LocalStore(tmp_path)) as lease:
        (tmp_path / ".lease").unlink()
        with told.hold(LocalStore(tmp_path)) as other:
            other.require()
            with pytest.raises(ServiceError, match="removed"):
                lease.require()
    assert list(tmp_path.iterdir()) == []


# --- places that cannot guard it


class Simple(ThreadingHTTPServer):
    """An S3 server that knows nothing of conditions: it ignores or refuses them."""

    daemon_threads = True

    def __init__(self, refuses: bool) -> None:
        super().__init__(("127.0.0.1", 0), SimpleAnswers)
        self.refuses = refuses
        self.objects: dict[str, bytes] = {}
        self.requests = 0


class SimpleAnswers(BaseHTTPRequestHandler):
    server: Simple
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.server.objects.get(self.path)
        self.answer(200, body) if body is not None else self.answer(404, error("NoSuchKey"))

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.refuses():
            return
        self.server.objects[self.path] = body
        self.answer(200)

    def do_DELETE(self) -> None:
        if self.refuses():
            return
        self.server.objects.pop(self.path, None)
        self.answer(204)

    def refuses(self) -> bool:
        conditional = "if-match" in self.headers or "if-none-match" in self.headers
        if conditional and self.server.refuses:
            self.answer(501, error("NotImplemented"))
            return True
        return False

    def answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"same"')
        self.send_header("Last-Modified", self.date_time_string())
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()


@pytest.mark.parametrize("refuses", [True, False], ids=["refuses", "ignores"])
def test_a_server_without_conditions_is_gone_on_with(
    refuses: bool, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Simple(refuses) as simple:
        threading.Thread(target=simple.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{simple.server_port}"
        use(S3Server(endpoint, "test", "test", "us-east-1"), monkeypatch)
        with told.hold(s3_store("bucket")) as lease:
            lease.require()
            assert simple.objects == {}
            assert threads() == []
        simple.shutdown()
    assert told.losses == []
    [warning] = told.texts
    assert "two runs at the same time cannot be told apart" in warning


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_gone_on_with(
    code: int, tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lease_module.fcntl, "flock", no_locks)  # type: ignore[attr-defined]
    with told.hold(LocalStore(tmp_path)) as lease:
        lease.require()
    [warning] = told.texts
    assert "its file system has no locks" in warning


def test_a_folder_that_cannot_be_made_is_an_access_error(tmp_path: Path, told: Told) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AccessError), told.hold(LocalStore(tmp_path / "file" / "a")):
        pass


def test_the_lock_is_the_kernels(tmp_path: Path, told: Told) -> None:
    """Any other program can ask for it in the same way."""
    with told.hold(LocalStore(tmp_path)), (tmp_path / ".lease").open() as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert json.loads(file.read())["who"] == "pod-a"
