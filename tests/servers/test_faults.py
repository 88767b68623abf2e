"""The fault proxy: what it passes on, what it breaks, and that boto3 gets through it."""

from __future__ import annotations

import http.client
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen
from xml.etree import ElementTree

import boto3
import pytest
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import ClientError, HTTPClientError
from moto.server import ThreadedMotoServer

from tests.servers.faults import (
    DEFAULT_FAULTS,
    FAULTS,
    Fault,
    FaultProxy,
    has_ipv6_loopback,
    running_proxy,
)

S3_SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=x, SignedHeaders=host, Signature=0"}
CONTENT = random.Random(0).randbytes(3 << 20)


# --- a small upstream, and a client ------------------------------------------------------------


@dataclass
class Seen:
    """A request as upstream got it."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    whole: bool = False  # whether the body came to its end


@dataclass
class Upstream:
    url: str
    seen: list[Seen] = field(default_factory=list)
    half_came: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    broke_off: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


def handler_for(upstream: Upstream) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/refused":
                self.send_response(403)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"no")
                self.close_connection = True  # with the body unread
                return
            self.take_body()
            kind, _, size = self.path.partition("?")[0][1:].partition("/")
            body = CONTENT[: int(size or 0)]
            if kind in ("204", "304"):
                self.send_response(int(kind))
                self.end_headers()
                return
            self.send_response(200)
            if kind == "chunked":
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for at in range(0, len(body), 1000):
                    piece = body[at : at + 1000]
                    self.wfile.write(b"%x;name=value\r\n%b\r\n" % (len(piece), piece))
                self.wfile.write(b"0\r\nX-Trailer: 1\r\n\r\n")
            elif kind == "endless":
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = True
            else:
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                if kind == "halves":
                    self.wfile.write(body[: len(body) // 2])
                    assert upstream.go_on.wait(5)
                    body = body[len(body) // 2 :]
                self.wfile.write(body)

        do_HEAD = do_PUT = do_POST = do_GET

        def take_body(self) -> None:
            seen = Seen(self.command, self.path, self.headers.items())
            upstream.seen.append(seen)
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                while size := int(self.rfile.readline(), 16):
                    seen.body += self.rfile.read(size + 2)[:-2]
                self.rfile.readline()
            else:
                left = int(self.headers.get("Content-Length", 0))
                while left:
                    piece = self.rfile.read1(min(left, 1 << 16))
                    if not piece:
                        raise ConnectionError("cut")
                    seen.body += piece
                    left -= len(piece)
                    if len(seen.body) >= len(CONTENT) // 2:
                        upstream.half_came.set()
            seen.whole = True

    return Handler


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    result = Upstream("")

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            result.error = sys.exception()  # expected here, and no matter for the output
            result.broke_off.set()

    server = Server(("127.0.0.1", 0), handler_for(result))
    result.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield result
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def proxy(upstream: Upstream) -> Iterator[FaultProxy]:
    """A proxy that breaks only what a test plants."""
    with running_proxy(upstream.url, rate=0) as result:
        yield result


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def ask(
    proxy: FaultProxy,
    method: str = "GET",
    path: str = "/bytes/10",
    body: bytes | Iterator[bytes] | None = None,
    headers: dict[str, str] | None = None,
    timeout: float = 5,
) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=timeout)
    try:
        connection.request(
            method, path, body, headers or {}, encode_chunked=isinstance(body, Iterator)
        )
        answer = connection.getresponse()
        return Answer(answer.status, dict(answer.getheaders()), answer.read())
    finally:
        connection.close()


def faults_of(proxy: FaultProxy) -> list[Fault | None]:
    return [record.fault for record in proxy.log]


def ask_each(proxy: FaultProxy, paths: Sequence[str], threads: int = 1) -> None:
    def one(path: str) -> None:
        with suppress(OSError, http.client.HTTPException):
            ask(proxy, path=path)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, paths))


# --- what passes -------------------------------------------------------------------------------


def test_headers_pass_unchanged_with_host_and_in_their_order(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    headers = [("Host", "bucket.example:9000"), ("X-Amz-Date", "1"), ("x-odd-CASE", "a: b"),
               ("Accept", "*/*"), ("X-Amz-Date", "2"), ("Connection", "close")]  # fmt: skip
    head = "".join(f"{name}: {value}\r\n" for name, value in headers)
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as sock:
        sock.sendall(f"GET /bytes/3?a=%20b&c HTTP/1.1\r\n{head}\r\n".encode())
        answer = b"".join(iter(lambda: sock.recv(1000), b""))
    assert answer.endswith(b"\r\n\r\n" + CONTENT[:3])
    assert upstream.seen[0].headers == headers
    assert upstream.seen[0].path == proxy.log[0].target == "/bytes/3?a=%20b&c"


def test_bodies_of_every_framing_pass_over_one_kept_connection(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=5)
    connection.connect()
    sock = connection.sock

    def exchange(method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        connection.request(method, path, body, encode_chunked=body is not None)
        answer = connection.getresponse()
        return answer.status, answer.read()

    for size in (0, 1, 999, 1000, len(CONTENT)):
        assert exchange("GET", f"/bytes/{size}") == (200, CONTENT[:size])
        assert exchange("GET", f"/chunked/{size}") == (200, CONTENT[:size])
        assert exchange("PUT", "/bytes/0", CONTENT[:size]) == (200, b"")
        assert upstream.seen[-1].body == CONTENT[:size]
        pieces = (CONTENT[at : min(at + 70_001, size)] for at in range(0, size, 70_001))
        assert exchange("PUT", "/bytes/0", pieces) == (200, b"")
        assert upstream.seen[-1].body == CONTENT[:size]
    assert exchange("HEAD", "/bytes/100") == (200, b"")
    assert exchange("GET", "/204") == (204, b"")
    assert exchange("GET", "/304") == (304, b"")
    assert exchange("GET", "/bytes/5") == (200, CONTENT[:5])
    assert connection.sock is sock
    connection.close()
    assert proxy.bytes_up == sum(len(seen.body) for seen in upstream.seen)
    assert proxy.bytes_down == 2 * (0 + 1 + 999 + 1000 + len(CONTENT)) + 5
    assert not proxy.injected


def test_a_message_may_come_in_any_pieces(proxy: FaultProxy, upstream: Upstream) -> None:
    message = (
        b"PUT /bytes/3 HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in message:
            sock.sendall(bytes([byte]))
            time.sleep(0.0005)
        # The first request's end is known although the next one is there already.
        sock.sendall(message + message)
        answers = b""
        while answers.count(CONTENT[:3]) < 3:
            answers += sock.recv(1000)
    assert [seen.body for seen in upstream.seen] == [b"abcd"] * 3
    assert proxy.bytes_up == 12


def test_a_body_that_only_the_close_ends_passes(proxy: FaultProxy) -> None:
    answer = ask(proxy, path="/endless/100000")
    assert answer.body == CONTENT[:100000]
    assert answer.headers["Connection"] == "close"


def test_bodies_are_streamed_both_ways(proxy: FaultProxy, upstream: Upstream) -> None:
    half = len(CONTENT) // 2
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=5)
    connection.putrequest("PUT", f"/halves/{len(CONTENT)}")
    connection.putheader("Content-Length", str(len(CONTENT)))
    connection.endheaders(CONTENT[:half])
    assert upstream.half_came.wait(5), "upstream gets the first half before the second is sent"
    connection.send(CONTENT[half:])
    answer = connection.getresponse()
    assert answer.read(half) == CONTENT[:half]
    upstream.go_on.set()
    assert answer.read() == CONTENT[half:]
    connection.close()


def test_100_continue_is_answered_before_the_body_is_sent(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as sock:
        sock.sendall(
            b"PUT /bytes/0 HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
        )
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"hello")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 OK\r\n")
    assert upstream.seen[0].body == b"hello"
    assert upstream.seen[0].headers == [("Host", "h"), ("Content-Length", "5")]


def test_a_refusal_in_the_middle_of_an_upload_reaches_the_client(proxy: FaultProxy) -> None:
    answer = ask(proxy, "PUT", "/refused", CONTENT * 8)
    assert (answer.status, answer.body) == (403, b"no")


def test_it_listens_on_localhost_too(proxy: FaultProxy) -> None:
    assert proxy.endpoint == f"http://127.0.0.1:{proxy.port}"
    assert proxy.localhost == f"http://localhost:{proxy.port}"
    with urlopen(f"{proxy.localhost}/bytes/3") as answer:
        assert answer.read() == CONTENT[:3]
    if has_ipv6_loopback():  # localhost may mean that
        with urlopen(f"http://[::1]:{proxy.port}/bytes/3") as answer:
            assert answer.read() == CONTENT[:3]


def test_an_upstream_that_is_not_there_is_a_502() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with running_proxy(f"http://127.0.0.1:{port}", rate=0) as proxy:
        assert ask(proxy, "PUT", body=b"x").status == 502
        assert proxy.log[0].fault is None


# --- each fault --------------------------------------------------------------------------------


def test_reset_before(proxy: FaultProxy, upstream: Upstream) -> None:
    proxy.fail("reset_before")
    with pytest.raises(ConnectionResetError) as caught:
        ask(proxy)
    assert caught.type is ConnectionResetError, "a reset and no plain close"
    assert not upstream.seen
    assert proxy.injected == {"reset_before": 1}
    assert ask(proxy).status == 200


def test_reset_after(proxy: FaultProxy, upstream: Upstream) -> None:
    proxy.fail("reset_after")
    with pytest.raises(ConnectionResetError) as caught:
        ask(proxy, "POST", "/bytes/100000", CONTENT)
    assert caught.type is ConnectionResetError, "a reset and no plain close"
    assert upstream.seen[0].body == CONTENT
    assert upstream.seen[0].whole
    record = proxy.log[0]
    assert (record.fault, record.status, record.upstream_status) == ("reset_after", None, 200)
    assert (record.received, record.sent) == (len(CONTENT), 0)


@pytest.mark.parametrize("size", [1025, 100_000, 3 << 20])
def test_truncate_gives_half_of_the_body(proxy: FaultProxy, size: int) -> None:
    proxy.fail("truncate")
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(proxy, path=f"/bytes/{size}")
    assert caught.value.partial == CONTENT[: size // 2]
    assert proxy.log[0].status == 200
    assert proxy.bytes_down == size // 2
    assert ask(proxy, path=f"/bytes/{size}").body == CONTENT[:size]


@pytest.mark.parametrize("kind", ["chunked", "endless"])
def test_truncate_of_a_body_without_a_length_is_noticed(proxy: FaultProxy, kind: str) -> None:
    proxy.fail("truncate")
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        ask(proxy, path=f"/{kind}/100000")
    assert proxy.injected == {"truncate": 1}


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/bytes/1024"), ("GET", "/chunked/1000"), ("HEAD", "/bytes/9999")]
)
def test_truncate_of_a_small_answer_is_a_reset_after(
    proxy: FaultProxy, upstream: Upstream, method: str, path: str
) -> None:
    proxy.fail("truncate")
    with pytest.raises(ConnectionResetError):
        ask(proxy, method, path)
    assert len(upstream.seen) == 1
    assert proxy.injected == {"reset_after": 1}


def test_stall_says_nothing_and_then_closes(proxy: FaultProxy, upstream: Upstream) -> None:
    proxy.stall_s = 0.5
    proxy.fail("stall", times=2)
    with pytest.raises(TimeoutError):
        ask(proxy, "PUT", body=CONTENT, timeout=0.2)
    started = time.monotonic()
    with pytest.raises(http.client.RemoteDisconnected):
        ask(proxy, "PUT", body=CONTENT)
    assert 0.5 <= time.monotonic() - started < 3
    assert not upstream.seen
    assert proxy.injected == {"stall": 2}


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("status_429", 429, "TooManyRequests"),
        ("status_500", 500, "InternalError"),
        ("status_503", 503, "SlowDown"),
        ("status_504", 504, None),
        ("expired", 400, "ExpiredToken"),
    ],
)
@pytest.mark.parametrize("signed_in", ["header", "query"])
def test_errors_for_s3(
    proxy: FaultProxy, upstream: Upstream, fault: Fault, status: int, code: str, signed_in: str
) -> None:
    proxy.fail(fault)
    if signed_in == "header":
        answer = ask(proxy, "PUT", "/b/k", CONTENT, S3_SIGNED)
    else:
        answer = ask(proxy, "PUT", "/b/k?X-Amz-Expires=9&X-Amz-Signature=0", CONTENT)
    assert answer.status == status == proxy.log[0].status
    if code:
        assert ElementTree.fromstring(answer.body).findtext("Code") == code
    else:
        assert answer.headers["Content-Type"] == "text/plain"
    assert proxy.bytes_up == len(CONTENT)
    assert not upstream.seen


@pytest.mark.parametrize(
    ("fault", "status"),
    [("status_429", 429), ("status_500", 500), ("status_503", 503), ("status_504", 504), ("expired", 401)],
)  # fmt: skip
def test_errors_for_others_leave_the_connection_usable(
    proxy: FaultProxy, fault: Fault, status: int
) -> None:
    proxy.fail(fault, times=2)
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=5)
    connection.connect()
    sock = connection.sock
    for method, expected in (("POST", status), ("HEAD", status), ("POST", 200)):
        connection.request(method, "/bytes/0", b"body")
        answer = connection.getresponse()
        assert answer.status == expected
        assert b"<Error>" not in answer.read()
    assert connection.sock is sock
    connection.close()


def test_429_says_when_to_come_back(upstream: Upstream) -> None:
    with running_proxy(upstream.url, rate=1, kinds=["status_429"]) as proxy:
        waits = {ask(proxy, path=f"/bytes/{n}").headers["Retry-After"] for n in range(20)}
    assert waits == {"0", "1"}


def test_an_error_comes_instead_of_100_continue(proxy: FaultProxy, upstream: Upstream) -> None:
    proxy.fail("status_503")
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as sock:
        sock.sendall(
            b"PUT / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
        )
        answer = b"".join(iter(lambda: sock.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nConnection: close\r\n" in answer
    assert not upstream.seen


@pytest.mark.parametrize("framing", ["sized", "chunked"])
def test_upload_cut(proxy: FaultProxy, upstream: Upstream, framing: str) -> None:
    proxy.fail("upload_cut")
    assert ask(proxy).status == 200, "a request without a body is not what it waits for"
    body = CONTENT if framing == "sized" else iter([CONTENT[:1000], CONTENT[1000:]])
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        ask(proxy, "PUT", "/bytes/0", body)
    assert proxy.injected == {"upload_cut": 1}
    assert upstream.broke_off.wait(5)
    assert isinstance(upstream.error, ConnectionResetError)
    cut = upstream.seen[1]
    assert not cut.whole
    assert len(cut.body) <= len(CONTENT) // 2
    if framing == "sized":
        assert proxy.bytes_up == len(CONTENT) // 2
    assert ask(proxy, "PUT", "/bytes/0", CONTENT).status == 200
    assert upstream.seen[2].body == CONTENT


# --- which requests ----------------------------------------------------------------------------


PATHS = [f"/bytes/{n % 40}?part={n % 7}" for n in range(200)]


def test_the_same_seed_gives_the_same_faults(upstream: Upstream) -> None:
    runs = []
    for seed in (1, 1, 2):
        with running_proxy(upstream.url, seed=seed) as proxy:
            proxy.stall_s = 0.01
            ask_each(proxy, PATHS)
            runs.append(faults_of(proxy))
            assert sum(proxy.injected.values()) == len(PATHS) - runs[-1].count(None)
    assert runs[0] == runs[1] != runs[2]
    assert 0.1 < 1 - runs[0].count(None) / len(PATHS) < 0.3


def test_threads_do_not_change_who_is_hit(upstream: Upstream) -> None:
    hits = []
    for threads, paths in ((1, PATHS), (8, PATHS[::-1])):
        with running_proxy(upstream.url, rate=0.3, seed=3, kinds=["reset_before"]) as proxy:
            ask_each(proxy, paths, threads)
            hits.append(sorted(record.target for record in proxy.log if record.fault))
    assert hits[0] == hits[1] != []


def test_ids_that_a_server_makes_up_do_not_change_who_is_hit(upstream: Upstream) -> None:
    hits = []
    for made_up in ("uploadId=a&X-Amz-Date=1", "uploadId=b&X-Amz-Date=2"):
        with running_proxy(upstream.url, rate=0.5, kinds=["reset_before"]) as proxy:
            ask_each(proxy, [f"/bytes/1?partNumber={n}&{made_up}" for n in range(50)])
            hits.append(faults_of(proxy))
    assert hits[0] == hits[1]
    assert set(hits[0]) == {None, "reset_before"}


def test_a_request_asked_again_has_another_fate(upstream: Upstream) -> None:
    with running_proxy(upstream.url, rate=0.5, kinds=["reset_before"]) as proxy:
        proxy.max_consecutive = 100
        ask_each(proxy, ["/bytes/1"] * 60)
        assert 15 < faults_of(proxy).count(None) < 45


def test_never_more_than_max_consecutive_in_a_row(upstream: Upstream) -> None:
    with running_proxy(upstream.url, rate=1, kinds=["reset_before"]) as proxy:
        proxy.max_consecutive = 2
        # Two in turns: each has a count of its own, although the other one passes in between.
        ask_each(proxy, ["/bytes/1", "/bytes/2", "/bytes/1", "/bytes/1", "/bytes/2", "/bytes/1"])
        assert faults_of(proxy) == [
            "reset_before", "reset_before", "reset_before", None, "reset_before", "reset_before",
        ]  # fmt: skip


def test_ranges_of_one_file_are_requests_of_their_own(upstream: Upstream) -> None:
    with running_proxy(upstream.url, rate=1, kinds=["status_503"]) as proxy:
        proxy.max_consecutive = 1
        statuses = [ask(proxy, headers={"Range": f"bytes={at}-"}).status for at in (0, 5, 0, 5)]
    assert statuses == [503, 503, 200, 200]


def test_match_limits_the_faults(upstream: Upstream) -> None:
    with running_proxy(upstream.url, rate=1, kinds=["status_500"]) as proxy:
        proxy.match = r"^PUT .*part=2"
        assert ask(proxy, "PUT", "/bytes/0?part=2").status == 500
        assert ask(proxy, "GET", "/bytes/0?part=2").status == 200
        assert ask(proxy, "PUT", "/bytes/0?part=1").status == 200


def test_pause_and_resume(upstream: Upstream) -> None:
    with running_proxy(upstream.url, rate=1, kinds=["status_500"]) as proxy:
        proxy.fail("status_504")
        proxy.pause()
        assert ask(proxy).status == 200
        proxy.resume()
        assert [ask(proxy).status for _ in range(2)] == [504, 500]


def test_planted_faults_come_in_order_and_keep_to_their_match(proxy: FaultProxy) -> None:
    proxy.fail("status_500", match="^PUT", times=2)
    proxy.fail("status_429")
    proxy.fail("status_503")
    methods = ["GET", "PUT", "PUT", "PUT", "PUT"]
    assert [ask(proxy, method, "/bytes/0", b"x").status for method in methods] == [
        429, 500, 500, 503, 200,
    ]  # fmt: skip
    assert proxy.injected == {"status_500": 2, "status_429": 1, "status_503": 1}


def test_expired_is_only_on_request() -> None:
    assert set(FAULTS) - set(DEFAULT_FAULTS) == {"expired"}


# --- boto3 -------------------------------------------------------------------------------------


@contextmanager
def running_s3() -> Iterator[str]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    with running_s3() as url:
        s3_client(url).create_bucket(Bucket="models")
        yield url


def s3_client(url: str, read_timeout: float = 10) -> Any:
    return boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1",
        aws_access_key_id="key", aws_secret_access_key="secret",
        config=Config(
            retries={"mode": "standard", "max_attempts": 10},
            read_timeout=read_timeout, connect_timeout=read_timeout,
        ),
    )  # fmt: skip


def whole_object(client: Any, key: str) -> bytes:
    """boto3 does not repeat a read of a body that has begun: that is left to its callers."""
    for _ in range(5):
        with suppress(HTTPClientError):
            return bytes(client.get_object(Bucket="models", Key=key)["Body"].read())
    raise AssertionError(f"{key} was cut five times")


def test_boto3_gets_through_the_default_faults(s3_server: str) -> None:
    with running_proxy(s3_server, rate=0.2, seed=5) as proxy:
        proxy.stall_s = 1.5
        client = s3_client(proxy.endpoint, read_timeout=1)
        contents = {f"k{n}": random.Random(n).randbytes((2 << 20) + n) for n in range(12)}
        for key, content in contents.items():
            client.put_object(Bucket="models", Key=key, Body=content)
        assert {key: whole_object(client, key) for key in contents} == contents
        assert len(proxy.injected) >= 3, proxy.injected
        assert proxy.bytes_down >= sum(map(len, contents.values()))


def test_boto3s_transfers_in_parts_get_through(s3_server: str, tmp_path: Path) -> None:
    parts = TransferConfig(
        multipart_threshold=5 << 20, multipart_chunksize=5 << 20, max_concurrency=4
    )
    content = random.Random(9).randbytes(21 << 20)
    (tmp_path / "up").write_bytes(content)
    kinds: list[Fault] = ["reset_before", "truncate", "upload_cut", "status_500", "status_503"]
    with running_proxy(s3_server, rate=0.4, seed=2, kinds=kinds) as proxy:
        proxy.match = "partNumber=|^GET"
        client = s3_client(proxy.endpoint)
        client.upload_file(str(tmp_path / "up"), "models", "big", Config=parts)
        client.download_file("models", "big", str(tmp_path / "down"), Config=parts)
        assert (tmp_path / "down").read_bytes() == content
        assert sum(proxy.injected.values()) >= 3, proxy.injected


def test_boto3_retries_what_it_should_and_no_more(s3_server: str) -> None:
    with running_proxy(s3_server, rate=0) as proxy:
        client = s3_client(proxy.endpoint)
        for fault in ("reset_before", "reset_after", "upload_cut", "status_500", "status_504"):
            proxy.fail(fault, "^PUT")
            answer = client.put_object(Bucket="models", Key="one", Body=CONTENT)
            assert answer["ResponseMetadata"]["RetryAttempts"] == 1, fault
            assert whole_object(client, "one") == CONTENT
        assert all(count == 1 for count in proxy.injected.values())
        proxy.fail("expired", "^GET")
        with pytest.raises(ClientError) as caught:
            client.get_object(Bucket="models", Key="one")
        assert caught.value.response["Error"]["Code"] == "ExpiredToken"
        assert proxy.log[-1].fault == "expired", "it is not tried again"
