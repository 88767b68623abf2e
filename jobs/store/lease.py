"""One writer at a time: who writes to a place holds its lease.

Two runs on one place happen without anybody's fault: a node that was thought dead comes back while
its pod already runs elsewhere. The second one waits, or leaves with a message that names the first.

A folder is held with the kernel's lock (here), a prefix of a bucket with an object that only
conditional requests change (`jobs.store.s3.lease`). A repository on the Hub needs neither: whatever
is committed there is whole, and nothing in it is gone on with.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs.errors import ServiceError
from jobs.store.base import Store
from jobs.store.local import LocalStore, disk_error

Tell = Callable[[str], None]

NAME = ".lease"
POLL = 1.0  # seconds between two looks at a lease that another run holds; never less
LONGEST_TTL = 3600.0  # seconds; what a record asks for beyond it is not believed

# What flock says on a file system that has no locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class Lease:
    """The right to write to a place. This one, for places that need none, is never lost."""

    def require(self) -> None:
        """Raises ServiceError where it is not certain any more that the lease is ours.

        To be called right before every write that others would trust.
        """


@dataclass(frozen=True, slots=True)
class Record:
    """What a lease says about its holder."""

    id: str  # made up for each hold, so that a holder knows its own record again
    who: str
    started: str  # by the holder's own clock: for people, never for comparing
    ttl: float
    renewals: int = 0

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def new_record(who: str, ttl: float) -> Record:
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return Record(uuid.uuid4().hex, who, started, ttl)


def parse_record(text: bytes, ttl: float) -> Record | None:
    """The record that somebody wrote, fit to be shown; None for what is none.

    `ttl` stands in where the record names none that makes sense.
    """
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("id"), str):
        return None
    said = found.get("ttl")
    if not isinstance(said, int | float) or not 0 < said <= LONGEST_TTL:
        said = ttl
    renewals = found.get("renewals")
    return Record(
        id=found["id"],
        who=_shown(found.get("who")),
        started=_shown(found.get("started")),
        ttl=float(said),
        renewals=renewals if isinstance(renewals, int) else 0,
    )


def _shown(value: object) -> str:
    text = "".join(c for c in str(value) if c.isprintable())
    return text[:200] or "unknown"


def in_use(url: str, holder: Record | None) -> str:
    who = f"{holder.who}, since {holder.started}" if holder else "it does not say which"
    return f"{url} is in use by another run: {who}"


def waiting(url: str, holder: Record | None, wait: float) -> str:
    return f"{in_use(url, holder)}; waiting up to {wait:.0f} s for it to end"


def unguarded(url: str, why: str) -> str:
    return (
        f"{url}: {why}, so two runs at the same time cannot be told apart there; "
        "see to it that only one writes"
    )


def pause(longest: float) -> None:
    """Wait for a lease's holder: for a moment that is not the same for all who wait."""
    time.sleep(max(0.01, min(random.uniform(POLL, 1.3 * POLL), longest)))  # noqa: S311


@contextmanager
def held_lease(
    store: Store,
    who: str,
    tell: Tell,
    lost: Callable[[str], None],
    ttl: float = 60.0,
    wait: float = 90.0,
) -> Iterator[Lease]:
    """Hold the lease of a store's place.

    `who` is what other runs are told about this one. Where another run holds the lease, `tell` says
    so and up to `wait` seconds are waited for it; then ServiceError. A holder of which nothing was
    seen for `ttl` seconds is taken for dead. `lost` is called with the reason, once and from another
    thread, when the lease is not ours any more: nothing may be written from then on.
    """
    if isinstance(store, LocalStore):
        with _held_folder(store, new_record(who, ttl), tell, wait) as lease:
            yield lease
    elif store.url.startswith("s3://"):
        # boto3 takes a third of a second to import: only who needs it does.
        from jobs.store.s3 import S3Store
        from jobs.store.s3.lease import held_prefix

        if not isinstance(store, S3Store):
            raise TypeError(f"{store.url} is no S3Store")
        with held_prefix(store, new_record(who, ttl), tell, lost, wait) as lease:
            yield lease
    else:
        yield Lease()


# --- a folder

# The locks of this process. A forked child (a data worker) must not keep one when its parent is
# killed: the kernel gives it back only when the last process with it open has closed it.
_held: set[int] = set()


def _let_go_in_child() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


class _NoLocks(Exception):
    pass


class _FolderLease(Lease):
    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self._released = False

    def require(self) -> None:
        if self._released or not _is_at(self.descriptor, self.path):
            why = "it was given back" if self._released else f"{self.path} was removed"
            raise ServiceError(
                f"this run does not hold {self.path.parent} any more: {why}",
                "leave the folder alone while a run writes to it, and start the same run again",
            )

    def release(self) -> None:
        # Removed while it is still ours: who waits on it sees then that it is not the right one.
        if not self._released and _is_at(self.descriptor, self.path):
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._released = True
        _held.discard(self.descriptor)
        with contextlib.suppress(OSError):
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)


@contextmanager
def _held_folder(store: LocalStore, record: Record, tell: Tell, wait: float) -> Iterator[Lease]:
    try:
        lease = _acquired_folder(store, record, tell, wait)
    except _NoLocks:
        tell(unguarded(store.url, "its file system has no locks"))
        yield Lease()
        return
    except OSError as error:
        raise disk_error(error, store.folder / NAME) from None
    try:
        yield lease
    finally:
        lease.release()


def _acquired_folder(store: LocalStore, record: Record, tell: Tell, wait: float) -> _FolderLease:
    path = store.folder / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait
    told = False
    while (descriptor := _locked(path)) is None:
        holder = _holder(path, record.ttl)
        if not told and wait > 0:
            tell(waiting(store.url, holder, wait))
            told = True
        left = deadline - time.monotonic()
        if left <= 0:
            raise ServiceError(
                in_use(store.url, holder),
                "wait until it has ended, or stop it, and start the same run again; or give this "
                "run a folder of its own",
            )
        pause(left)
    _held.add(descriptor)
    with contextlib.suppress(OSError):  # what it says is for people; the lock is what counts
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, record.encode(), 0)
    return _FolderLease(path, descriptor)


def _locked(path: Path) -> int | None:
    """A descriptor of the file, with its lock; None where another has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, path):
            return descriptor
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        if error.errno in NO_LOCKS:
            raise _NoLocks from None
        raise
    # Whoever held it has removed it meanwhile: this lock is on a file that nobody else will open.
    os.close(descriptor)
    return None


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the path still leads to the file that is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except OSError:
        return False


def _holder(path: Path, ttl: float) -> Record | None:
    try:
        return parse_record(path.read_bytes()[:4096], ttl)
    except OSError:
        return None
