"""Requests that move bytes, without what boto3 does around each.

boto3 takes more than a millisecond of Python for a request, which for thousands of small files is
longer than the server takes, and it copies a large body in pieces of 16 KB. Its connections, its
signatures and its parser of errors are used here as they are. Where the bucket is and for which region
its requests are signed is learned from a request that boto3 has made.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import threading
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from botocore import parsers
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSPreparedRequest, AWSRequest
from botocore.exceptions import ClientError

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

# Bytes of a body that is sent without asking first whether it is wanted: what fits the buffers
# between here and the server costs nothing where it is refused, and asking costs a round trip.
UNASKED = 128 << 10
UNSIGNED = "UNSIGNED-PAYLOAD"
CRC32 = "x-amz-checksum-crc32"
SIGNED = re.compile(r"AWS4-HMAC-SHA256 Credential=[^,]+/([^/,]+)/s3/aws4_request,")


class Direct:
    """Sends requests for objects of one bucket, once boto3 has made one."""

    def __init__(self, made: S3Client) -> None:
        self._made = made
        self._credentials = made._request_signer._credentials  # type: ignore[attr-defined]
        self._session = made._endpoint.http_session  # type: ignore[attr-defined]
        self._parser = parsers.create_parser("rest-xml")
        self._asked = threading.local()
        self._place: tuple[str, str] | None = (
            None  # what stands before a key in its URL, the region
        )
        self.unchecked = (
            False  # objects here do not say their sha256: boto3 then checks what they say
        )
        made.meta.events.register("before-send.s3", self._learn)

    @contextlib.contextmanager
    def learning(self, key: str) -> Any:
        """Around a request for an object that boto3 makes. Its last try, which succeeds, counts:
        boto3 may find out first that the bucket is in another region."""
        self._asked.key, self._asked.place = quote(key, safe="/~"), None
        try:
            yield
            self._place = self._place or self._asked.place
        finally:
            self._asked.key = None

    def _learn(self, request: Any, **rest: Any) -> None:
        key = getattr(self._asked, "key", None)
        if self._place or not key:
            return
        said = request.headers.get("Authorization", "")
        signed = SIGNED.match(said.decode() if isinstance(said, bytes) else said)
        url = request.url.partition("?")[0]
        if signed and url.endswith(f"/{key}"):
            self._asked.place = url.removesuffix(key), signed[1]

    @property
    def ready(self) -> bool:
        return self._place is not None

    def put(
        self, key: str, body: bytes | memoryview, headers: dict[str, str], query: str = ""
    ) -> Any:
        """Send an object, or with the query that says so a part of one. The answer's headers."""
        if len(body) > UNASKED:
            headers = {**headers, "Expect": "100-continue"}
        return self._send("PutObject", "PUT", key, headers, body, query)[0]

    def get(self, key: str, headers: dict[str, str]) -> tuple[Any, bytes]:
        """The answer's headers and its body."""
        return self._send("GetObject", "GET", key, headers)

    def _send(
        self,
        operation: str,
        method: str,
        key: str,
        headers: dict[str, str],
        body: bytes | memoryview = b"",
        query: str = "",
    ) -> tuple[Any, bytes]:
        """One request; raises what boto3 would raise for its answer."""
        assert self._place
        base, region = self._place
        url = f"{base}{quote(key, safe='/~')}{query}"
        # Over https nothing can change the body on its way unseen, and the server checks its CRC-32.
        unsigned = CRC32 in headers and url.startswith("https:")
        headers = {
            **headers,
            "User-Agent": self._made.meta.config.user_agent,  # type: ignore[attr-defined]
        }
        payload = UNSIGNED if unsigned else hashlib.sha256(body).hexdigest()
        credentials = self._credentials.get_frozen_credentials()
        headers = sign(method, url, headers, credentials, region, payload)
        answer = self._session.send(AWSPreparedRequest(method, url, headers, body, True))  # type: ignore[arg-type]
        hurry(answer.raw)
        data = answer.content
        if answer.status_code >= 300:
            model = self._made.meta.service_model.operation_model(operation)
            said = {"status_code": answer.status_code, "headers": answer.headers, "body": data}
            raise ClientError(self._parser.parse(said, model.output_shape), operation)  # type: ignore[arg-type]
        return answer.headers, data


class _Signer(S3SigV4Auth):
    """boto3's, told what the body's sha256 is, or that it is not signed."""

    def __init__(self, credentials: Any, region: str, payload: str) -> None:
        super().__init__(credentials, "s3", region)
        self._payload = payload

    def payload(self, request: AWSRequest) -> str:
        return self._payload


def sign(
    method: str, url: str, headers: dict[str, str], credentials: Any, region: str, payload: str
) -> dict[str, str]:
    """The headers, with those that sign the request. The URL has to be quoted as S3 does it."""
    request = AWSRequest(method, url, headers)
    _Signer(credentials, region, payload).add_auth(request)
    return {name.lower(): value for name, value in request.headers.items()}


def send_unasked(params: dict[str, Any], **rest: Any) -> None:
    """For boto3's `before-call`: small bodies go along with their request."""
    body = params["body"]
    if "Expect" in params["headers"] and len(body.getbuffer()) <= UNASKED:
        del params["headers"]["Expect"]


def hurry(raw: Any) -> None:
    """Have what has arrived of an answer acknowledged at once (where the system can; else nothing).

    A server that gathers small writes (Ceph does, by default) sends the body of a small object only
    when its headers were acknowledged, and the kernel takes 40 ms for that where nothing is sent.
    """
    option = getattr(socket, "TCP_QUICKACK", None)
    sock = getattr(getattr(raw, "_connection", None), "sock", None)
    if option is not None and sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, 1)


def read_into(body: Any, buffer: memoryview) -> int:
    """Fill the buffer with what comes next of boto3's body of an answer; 0 at its end.

    Straight from the socket into the buffer: boto3 and urllib3 would copy each byte twice more. An
    answer that breaks off ends as one that is complete: who reads has to count.
    """
    try:
        count: int = body._raw_stream._fp.readinto(buffer)
    except HTTPException:
        return 0
    return count


def end_reading(body: Any) -> None:
    """Give the connection back for the next request, where all of the answer was read."""
    raw = body._raw_stream
    if raw._fp.isclosed():
        raw.release_conn()
    else:
        raw.close()
