"""The lease of a prefix: one small object, changed by nothing but conditional requests.

The holder writes it anew every third of its ttl, under the condition that nobody else has. Another
run takes it over, under the same condition, when it was not renewed for a whole ttl: by the
server's clock alone (its Date against its own Last-Modified), or by having watched it for so long.
The clocks of two machines are never compared.

A holder that could not renew stops to believe in its lease at 0.8 of the ttl, counted from when it
sent its last renewal: that is before anybody else may take it over.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
from botocore import exceptions as sdk
from botocore.config import Config

from jobs.errors import AccessError, LorajobError, ServiceError
from jobs.secrets import remember
from jobs.store.lease import Lease, Record, Tell, in_use, parse_record, pause, unguarded, waiting
from jobs.store.retry import Again
from jobs.store.s3 import S3Store
from jobs.store.s3.client import code_of, status_of

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

T = TypeVar("T")

KEY = "lease.json"
SURE = 0.8  # of its ttl, a lease is believed in without a renewal
# Of its ttl, a request may take: three in a row may hang, and the fourth is still in time.
REQUEST = 0.1
RELEASE = 5.0  # seconds to give it back in; whoever waits for it has to wait for the ttl otherwise
NOBODY = '"00000000000000000000000000000000"'  # an ETag that no object has

# Counts on while the machine sleeps, and nobody sets it.
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now() -> float:
    return time.clock_gettime(CLOCK)


class Unconditional(Exception):
    """The server does not know conditional requests."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The object as it was read."""

    etag: str
    record: Record | None  # None for one that is no lease
    age: float | None  # seconds since it was written, by the server's clock, to a second or so


class LeaseObject:
    """The requests, each sent once. A condition that does not hold is an answer, not an error."""

    def __init__(self, store: S3Store, ttl: float) -> None:
        self.url = f"{store.url}/{KEY}"
        self.timeout = max(0.3, min(REQUEST * ttl, 10.0))
        self._store = store
        self._ttl = ttl
        self._where: dict[str, Any] = {"Bucket": store.bucket, "Key": store.prefix + KEY}
        # Not with the storage class of the results: the rare ones bill a month for each renewal.
        self._extra = {k: v for k, v in store.extra().items() if k != "StorageClass"}
        self._lock = threading.Lock()
        self._of: S3Client | None = None  # the store's client that the one below was made after
        self._made: S3Client | None = None

    @property
    def _s3(self) -> S3Client:
        """The store's client with short timeouts, and with connections of its own: a renewal must
        not wait behind a transfer."""
        with self._lock:
            of = self._store.client.s3
            if self._made is None or self._of is not of:
                self._of, self._made = of, self._derived(of)
            return self._made

    def _derived(self, of: S3Client) -> S3Client:
        session = boto3.session.Session(profile_name=self._store.client.options.profile)
        short = Config(
            connect_timeout=self.timeout, read_timeout=self.timeout, max_pool_connections=2
        )
        made: S3Client = session.client(
            "s3",
            endpoint_url=of.meta.endpoint_url,
            region_name=of.meta.region_name,
            config=of.meta.config.merge(short),
        )
        if credentials := session.get_credentials():
            frozen = credentials.get_frozen_credentials()
            remember(frozen.secret_key or "", frozen.token or "")
        made.meta.events.register("before-call.s3", _send_unasked)
        return made

    def read(self) -> Seen | None:
        try:
            answer = self._s3.get_object(**self._where)
        except sdk.ClientError as error:
            if code_of(error) in ("NoSuchKey", "404"):
                return None
            raise
        record = parse_record(answer["Body"].read(), self._ttl)
        age = None
        with suppress(KeyError, TypeError, ValueError):
            date = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
            age = (date - answer["LastModified"]).total_seconds()
        return Seen(answer["ETag"], record, age)

    def write(self, record: Record, over: str | None) -> str | None:
        """Write where the object has the ETag `over` (None: where there is none). Its new ETag, or
        None where that is not so."""
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if over is None else {"IfMatch": over}
        arguments = {**self._where, **self._extra, **condition}
        try:
            answer = self._s3.put_object(
                Body=record.encode(), ContentType="application/json", **arguments
            )
        except sdk.ClientError as error:
            if _refused(error) or _is_absent(error):
                return None
            raise
        return answer["ETag"]

    def delete(self, etag: str) -> bool:
        """Whether it is gone; False where its ETag is another one."""
        try:
            self._s3.delete_object(**self._where, IfMatch=etag)
        except sdk.ClientError as error:
            if _is_absent(error):
                return True
            if _refused(error):
                return False
            raise
        return True

    def delete_anyhow(self) -> None:
        self._s3.delete_object(**self._where)

    def call(self, do: Callable[[], T]) -> T:
        """One of these requests, again and again where its error may pass, as the store does it."""
        return self._store.retries.call(self.url, do, self._store.client.judge(self.url))

    def meaning(self, error: Exception) -> Again | LorajobError | None:
        return self._store.client.judge(self.url)(error)


def _send_unasked(params: dict[str, Any], **rest: Any) -> None:
    """The record goes along with its request: botocore would wait a second for leave to send it,
    whatever the timeouts are."""
    params["headers"].pop("Expect", None)


def _refused(error: sdk.ClientError) -> bool:
    """Whether the condition did not hold, or another write under a condition was under way."""
    if status_of(error) == 501 or code_of(error) == "NotImplemented":
        raise Unconditional
    return status_of(error) in (409, 412)


def _is_absent(error: sdk.ClientError) -> bool:
    return code_of(error) in ("NoSuchKey", "404")


class PrefixLease(Lease):
    def __init__(
        self, store: S3Store, record: Record, tell: Tell, lost: Callable[[str], None]
    ) -> None:
        self.url = store.url
        self.ttl = record.ttl
        self._object = LeaseObject(store, record.ttl)
        self._record = record
        self._tell = tell
        self._lost = lost
        self._etag: str | None = None  # of our last write that was answered
        self._attempted = False  # whether anything was written, answered or not
        self._watched = ("", 0.0)  # an ETag of another holder, and when it was seen first
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._changed = threading.Condition()
        # All below are guarded by it.
        self._sure_until = 0.0
        self._over = ""  # why it is not ours any more
        self._stopping = False
        self._hurry = False

    # --- to get it

    def acquire(self, wait: float) -> None:
        """Raises ServiceError where another holds it for longer than `wait` seconds, Unconditional
        where the server cannot guard it."""
        deadline = now() + wait
        told = False
        while True:
            seen = self._look()
            if seen is None or self._is_ours(seen) or self._is_stale(seen):
                if self._take(seen) and self._is_guarded() and self._certain():
                    break
                seen = self._look()
            if seen and self._is_ours(seen):  # the answer to our own write got lost, or was late
                if now() >= deadline + self.ttl:
                    raise self._in_use(seen)
                continue
            if seen and not told and wait > 0:
                self._tell(waiting(self.url, seen.record, wait))
                told = True
            left = deadline - now()
            if left <= 0:
                raise self._in_use(seen)
            pause(left)
        self._thread.start()

    def _look(self) -> Seen | None:
        seen = self._object.call(self._object.read)
        if seen and seen.record is None:
            raise AccessError(
                f"{self._object.url} is not what a run writes there",
                "move it away, or give this run a prefix of its own",
            )
        if seen and self._watched[0] != seen.etag:
            self._watched = (seen.etag, now())
        return seen

    def _is_ours(self, seen: Seen) -> bool:
        return seen.record is not None and seen.record.id == self._record.id

    def _is_stale(self, seen: Seen) -> bool:
        ttl = seen.record.ttl if seen.record else self.ttl
        # Both of the server's times are cut to whole seconds: one second may be none.
        if seen.age is not None and seen.age - 1 >= ttl:
            return True
        return now() - self._watched[1] >= ttl

    def _take(self, seen: Seen | None) -> bool:
        """Write our record in the place of what was seen; False where another was quicker."""
        self._attempted = True
        return self._object.call(lambda: self._write(seen.etag if seen else None))

    def _is_guarded(self) -> bool:
        """Raises Unconditional where the server takes writes whose condition does not hold.

        There are servers that know nothing of conditions and say nothing of it.
        """
        for wrong in (None, NOBODY):
            # What is written is what stands there already, so that nothing is spoilt.
            write = partial(self._object.write, self._record, wrong)
            if self._object.call(write) is None:
                continue
            if self._certain():
                raise Unconditional
            return False  # it took so long that it may have been true
        return True

    def _in_use(self, seen: Seen | None) -> ServiceError:
        if seen is None or self._is_ours(seen):
            return ServiceError(
                f"{self._object.url} could not be written in time",
                "start the same run again; if it happens again, look at the S3 server",
            )
        ago = max(seen.age or 0.0, now() - self._watched[1])
        ttl = seen.record.ttl if seen.record else self.ttl
        return ServiceError(
            f"{in_use(self.url, seen.record)}, last seen {ago:.0f} s ago",
            "wait until it has ended, or stop it, and start the same run again (one that was killed "
            f"holds it for {ttl:.0f} s more); or give this run a prefix of its own",
        )

    # --- to keep it

    def require(self) -> None:
        with self._changed:
            if not self._over and not self._certain():
                # A process that was stopped for a while may still hold it: the renewal shows.
                self._hurry = True
                self._changed.notify_all()
                self._changed.wait_for(
                    lambda: self._over or self._certain(), 2 * self._object.timeout
                )
            why = self._over
            if not why and not self._certain():
                why = "it could not be renewed in time"
        if why:
            raise ServiceError(
                f"this run does not hold {self.url} any more: {why}",
                "look whether another run writes there; if none does, start the same run again",
            )

    def _certain(self) -> bool:
        return now() < self._sure_until

    def _write(self, over: str | None) -> bool:
        """Write our record; what is certain then counts from when it was sent."""
        # Each try is another object, also where the answer to the one before got lost: who watches
        # counts from the last change, and we do too.
        self._record = replace(self._record, renewals=self._record.renewals + 1)
        sent = now()
        etag = self._object.write(self._record, over)
        if etag is None:
            return False
        with self._changed:
            self._etag = etag
            self._sure_until = sent + SURE * self.ttl
            self._changed.notify_all()
        return True

    def _keep(self) -> None:
        """Renew it until it is released or lost."""
        after, why = self.ttl / 3, ""
        while not self._stopped_within(after):
            # After a failure there is a limit. A process that only was stopped for too long tries:
            # the condition says whether anybody has taken it over.
            if not (why and not self._certain()):
                why = self._renew()
            if why and not self._certain():
                self._lose(why)
            after = self.ttl / 30 if why else self.ttl / 3

    def _stopped_within(self, seconds: float) -> bool:
        until = now() + seconds
        with self._changed:
            while not (self._stopping or self._over or self._hurry) and now() < until:
                self._changed.wait(until - now())
            self._hurry = False
            return self._stopping or bool(self._over)

    def _renew(self) -> str:
        """Why it could not be renewed, or an empty string."""
        try:
            for _ in range(2):
                if self._write(self._etag):
                    return ""
                seen = self._object.read()
                if seen is None:
                    self._lose(f"its {KEY} was removed")
                    return ""
                if not self._is_ours(seen):
                    who = seen.record.who if seen.record else "somebody"
                    self._lose(f"{who} has taken it over")
                    return ""
                # It was our own write whose answer got lost.
                self._etag = seen.etag
            return "its renewal was not answered"
        except Exception as error:
            meaning = None
            with suppress(Exception):
                meaning = self._object.meaning(error)
            match meaning:
                case Again(why):
                    pass
                case LorajobError():
                    why = meaning.message
                case _:
                    why = type(error).__name__
            return f"it could not be renewed ({why})"

    def _lose(self, why: str) -> None:
        with self._changed:
            if self._stopping or self._over:
                return
            self._over = why
            self._changed.notify_all()
        self._lost(f"{self.url}: {why}")

    # --- to give it back

    def release(self) -> None:
        with self._changed:
            was_ours = not self._over
            self._stopping = True
            self._over = self._over or "it was given back"
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(RELEASE)
        if was_ours and self._attempted and not self._removed():
            self._tell(
                f"{self._object.url} could not be removed: "
                f"the next run there waits for up to {self.ttl:.0f} s"
            )

    def _removed(self) -> bool:
        """Remove our record; whether it is gone. Another's is left alone."""
        until = now() + RELEASE
        etag = self._etag
        while True:
            try:
                if etag and self._object.delete(etag):
                    return True
                seen = self._object.read()
                if seen is None or not self._is_ours(seen):
                    return True
                etag = seen.etag
            except Unconditional:
                return self._removed_anyhow()
            except Exception as error:
                if not isinstance(self._object.meaning(error), Again):
                    return False
            if now() >= until:
                return False
            time.sleep(random.uniform(0.1, 0.3))  # noqa: S311

    def _removed_anyhow(self) -> bool:
        """The same on a server that knows no conditions for it: as sure as a look before can make."""
        try:
            seen = self._object.read()
            if seen and self._is_ours(seen):
                self._object.delete_anyhow()
        except Exception:
            return False
        return True


@contextmanager
def held_prefix(
    store: S3Store, record: Record, tell: Tell, lost: Callable[[str], None], wait: float
) -> Iterator[Lease]:
    """See `jobs.store.lease.held_lease`."""
    lease = PrefixLease(store, record, tell, lost)
    guarded = True
    try:
        try:
            lease.acquire(wait)
        except Unconditional:
            guarded = False
        if guarded:
            yield lease
    finally:
        lease.release()
    if not guarded:
        tell(unguarded(store.url, "its server knows no conditional writes (If-None-Match)"))
        yield Lease()
