"""From the spec's text for a place to the store behind it. Nothing is touched yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from jobs.errors import SpecError
from jobs.spec import S3, HubTarget
from jobs.store.base import KeyStore, Store
from jobs.store.local import LocalStore
from jobs.store.places import HubPlace, LocalPlace, S3Place, WrongPlace, parse_place
from jobs.store.retry import Retries


@dataclass(frozen=True)
class Connections:
    """How stores are reached in one run: the spec's settings, and one count of retries."""

    s3: S3 = field(default_factory=S3)
    retries: Retries = field(default_factory=Retries)

    # boto3 and huggingface_hub take a third of a second each to import: only who needs them does.

    def s3_store(self, place: S3Place) -> KeyStore:
        from jobs.store.s3 import S3Store

        return S3Store(place, self.s3, self.retries)

    def hub_store(self, place: HubPlace) -> Store:
        from jobs.store.hub import HubStore

        return HubStore.of_place(place, self.retries)

    def target(self, target: str | HubTarget) -> Store:
        """The store that a target of `publish` names. Raises SpecError where it names none."""
        if isinstance(target, HubTarget):
            from jobs.store.hub import HubStore

            return HubStore.of_target(target, self.retries)
        return self.key_store(target)

    def key_store(self, text: str) -> KeyStore:
        """The folder or the prefix in S3 that a text names. Raises SpecError for anything else."""
        try:
            place = parse_place(text)
        except WrongPlace as error:
            raise SpecError(str(error), "name a folder or s3://bucket/prefix") from None
        match place:
            case LocalPlace(path):
                return LocalStore(path)
            case S3Place():
                return self.s3_store(place)
        raise SpecError(f"{text} is neither a folder nor in S3", "name one of the two")
