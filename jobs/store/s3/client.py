"""S3's client and what its errors mean."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import boto3
from botocore import exceptions as sdk
from botocore.config import Config
from urllib3 import exceptions as http

from jobs.errors import AccessError, LorajobError, ServiceError
from jobs.secrets import remember
from jobs.spec import S3Options
from jobs.store.local import FULL, disk_error
from jobs.store.retry import Again, Judge
from jobs.store.s3.direct import Direct, send_unasked

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

THREADS = 10  # transfers at a time
RENEWAL = 60.0  # seconds that credentials which ran out are given to be renewed

# Error codes that pass, by AWS's list of S3 errors and its SDKs' list of throttling codes.
PASSING = {
    "SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "RequestTimeoutException",
    "Throttling", "ThrottlingException", "ThrottledException", "TooManyRequests", "RequestLimitExceeded",
    "BandwidthLimitExceeded", "PriorRequestNotComplete", "OperationAborted", "ConditionalRequestConflict",
    "ConcurrentModification",
    # What arrived was not what was sent.
    "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch",
}  # fmt: skip
EXPIRED = {
    "400",  # of a HEAD request, whose answer has no body to say more
    "ExpiredToken",
    "ExpiredTokenException",
    "RequestExpired",
    "TokenRefreshRequired",
}
WRONG_REGION = {"PermanentRedirect", "IllegalLocationConstraintException", "AuthorizationHeaderMalformed"}  # fmt: skip
UNKNOWN_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidSecurity"}  # fmt: skip

CONNECTION = (
    sdk.HTTPClientError,
    sdk.ConnectionError,
    sdk.IncompleteReadError,
    sdk.FlexibleChecksumError,
    http.HTTPError,
    ConnectionError,
    TimeoutError,
)


class Client:
    """A boto3 client that can be made anew where its credentials have run out."""

    def __init__(self, bucket: str, options: S3Options) -> None:
        self.bucket = bucket
        self.options = options
        self._lock = threading.Lock()
        self._made: S3Client | None = None
        self._direct: Direct | None = None
        self._key, self._fixed = "", False  # of the client that was dropped last
        self._expired: dict[str, float] = {}  # access keys, and when they were first refused

    @property
    def s3(self) -> S3Client:
        with self._lock:
            if self._made is None:
                self._made = self._make()
                self._direct = Direct(self._made)
            return self._made

    @property
    def direct(self) -> Direct:
        """The quicker way for small objects, through the connections of `s3`."""
        self.s3  # noqa: B018 - makes both
        assert self._direct
        return self._direct

    def _make(self) -> S3Client:
        options = self.options
        try:
            session = boto3.session.Session(profile_name=options.profile)
            when: Literal["when_supported", "when_required"] = (
                "when_supported" if options.checksums else "when_required"
            )
            made: S3Client = session.client(
                "s3",
                endpoint_url=options.endpoint,
                region_name=options.region or session.region_name or "us-east-1",
                config=Config(
                    # Retrying is `jobs.store.retry`'s: one policy, counted, for every store.
                    retries={"total_max_attempts": 1, "mode": "standard"},
                    connect_timeout=10,
                    read_timeout=60,
                    tcp_keepalive=True,
                    max_pool_connections=2 * THREADS,
                    request_checksum_calculation="when_required",  # ours are made once, by Upload
                    response_checksum_validation=when,
                    s3={"addressing_style": "path" if options.path_style else "auto"},
                    user_agent_extra="lorajob",
                ),
            )
        except (sdk.BotoCoreError, ValueError) as error:
            meant = meaning(error, f"s3://{self.bucket}")
            raise meant if isinstance(meant, LorajobError) else error from None
        credentials = session.get_credentials()
        if credentials:
            # A role's stand in no variable: only here it is known what must never be shown.
            frozen = credentials.get_frozen_credentials()
            remember(frozen.secret_key or "", frozen.token or "")
        own_endpoint = "amazonaws.com" not in made.meta.endpoint_url
        if own_endpoint and options.path_style is None:
            # Ceph and MinIO answer to host names of buckets only where their DNS was set up so.
            self.options = options.model_copy(update={"path_style": True})
            return self._make()
        made.meta.events.register("before-call.s3", send_unasked)
        return made

    @property
    def crc(self) -> bool:
        """Whether what is sent needs a CRC-32 for the server to check.

        Over plain http every body's SHA-256 is part of the request's signature, and the server
        refuses what does not match it: a second checksum would guard the same bytes on the same way.
        """
        return self.options.checksums and self.s3.meta.endpoint_url.startswith("https:")

    def judge(self, what: str) -> Judge:
        """What an error of a call on `what` means."""

        def judged(error: BaseException) -> Again | LorajobError | None:
            code = code_of(error)
            if code in EXPIRED and self._renewed():
                return Again("the credentials had expired")
            return meaning(error, what)

        return judged

    def _renewed(self) -> bool:
        """Drop the client whose credentials have run out; whether new ones may be found.

        A role's or a file's are read again, for a while, because what renews them may be late.
        Those of the environment stay what they are.
        """
        with self._lock:
            made, self._made = self._made, None
            if made is not None:
                credentials = made._request_signer._credentials  # type: ignore[attr-defined]
                self._key, self._fixed = credentials.access_key, credentials.method == "env"
            since = self._expired.setdefault(self._key, time.monotonic())
        return not self._fixed and time.monotonic() - since < RENEWAL


def code_of(error: BaseException) -> str:
    """S3's code of an error, "" where it is none of S3's."""
    if isinstance(error, sdk.ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return ""


def status_of(error: BaseException) -> int:
    if isinstance(error, sdk.ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return 0


def meaning(error: BaseException, what: str) -> Again | LorajobError | None:
    """What an error of boto3 means: see `jobs.store.retry.Judge`."""
    if isinstance(error, sdk.ClientError):
        return _refusal(error, what)
    if isinstance(error, sdk.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return AccessError(
            f"{what}: the server's certificate cannot be verified",
            "mount the certificate authority and name it in AWS_CA_BUNDLE",
        )
    if isinstance(error, CONNECTION):
        return Again(_connection(error))
    if isinstance(error, (sdk.NoCredentialsError, sdk.PartialCredentialsError)):
        return AccessError(
            f"{what}: there are no credentials for S3",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a profile in s3.profile, or give "
            "the pod's service account or the machine a role",
        )
    if isinstance(error, (sdk.MetadataRetrievalError, sdk.CredentialRetrievalError)):
        return Again("the credentials could not be fetched")
    if isinstance(error, OSError):
        if error.errno in FULL:
            return disk_error(error, Path(str(error.filename or ".")))
        return Again(_connection(error)) if error.filename is None else None
    if isinstance(error, (sdk.BotoCoreError, ValueError)):
        return AccessError(f"{what}: {_one_line(error)}", "look at the spec's s3 section")
    return None


def _connection(error: BaseException) -> str:
    name = type(error).__name__
    known = {
        "EndpointConnectionError": "the server could not be reached",
        "ConnectTimeoutError": "the server did not answer",
        "ReadTimeoutError": "the server stopped answering",
        "ConnectionClosedError": "the server closed the connection",
        "IncompleteReadError": "the answer broke off",
        "ResponseStreamingError": "the answer broke off",
        "FlexibleChecksumError": "what arrived was not what was sent",
    }
    return known.get(name, f"the connection failed ({name})")


def _refusal(error: sdk.ClientError, what: str) -> Again | LorajobError:
    code, status = code_of(error), status_of(error)
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if status in (429, 500, 502, 503, 504) or code in PASSING:
        return Again(
            f"{status} {code}" if code else str(status), _seconds(headers.get("retry-after"))
        )
    said = _one_line(error.response.get("Error", {}).get("Message") or code)
    if code in EXPIRED:
        return AccessError(
            f"{what}: the credentials have expired", "renew them and start the same run again"
        )
    if code in UNKNOWN_CREDENTIALS:
        return AccessError(
            f"{what}: S3 does not accept the credentials ({code})",
            "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile; and that they are "
            "this server's (s3.endpoint)",
        )
    if code == "RequestTimeTooSkewed":
        return AccessError(f"{what}: this machine's clock is wrong", "set it")
    if code in WRONG_REGION or status in (301, 307):
        region = headers.get("x-amz-bucket-region") or "another one than set"
        return AccessError(f"{what}: the bucket is in the region {region}", "set s3.region")
    if code == "NoSuchBucket":
        return AccessError(f"{what}: there is no such bucket", "create it, or mend its name")
    if code == "NoSuchUpload":
        return ServiceError(
            f"{what}: somebody else ended the upload", "start the same run again, once"
        )
    if code in ("PreconditionFailed", "412"):
        return ServiceError(f"{what}: it was changed at the same time", "start the same run again")
    if code in ("NoSuchKey", "404", "NotFound"):
        return AccessError(f"{what} is not there", "check the address")
    if status == 403:
        return AccessError(
            f"{what}: S3 refuses ({said})",
            "the credentials need s3:ListBucket on the bucket, and s3:GetObject, s3:PutObject, "
            "s3:DeleteObject and s3:AbortMultipartUpload below the prefix",
        )
    hint = "look at the spec's s3 section"
    if "checksum" in said.lower() or status == 501:
        hint = "if the server is an older one, set s3.checksums to false"
    return AccessError(f"{what}: S3 says {code} ({said})", hint)


def _seconds(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:300]
