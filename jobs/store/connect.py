"""From the spec's text for a place to the store behind it. Nothing is touched yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from jobs.errors import SpecError
from jobs.spec import S3, HubTarget
from jobs.store.base import Store
from jobs.store.local import LocalStore
from jobs.store.places import HubPlace, LocalPlace, S3Place, WrongPlace, parse_place
from jobs.store.retry import Retries


@dataclass(frozen=True)
class Connections:
    """How stores are reached in one run: the spec's settings, and one count of retries."""

    s3: S3 = field(default_factory=S3)
    retries: Retries = field(default_factory=Retries)

    # boto3 and huggingface_hub take a third of a second each to import: only who needs them does.

    def s3_store(self, place: S3Place) -> Store:
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
        match _place(target, "publish"):
            case LocalPlace(path):
                return LocalStore(path)
            case S3Place() as place:
                return self.s3_store(place)
        raise SpecError(f"publish: {target} is no target", "write `hub: owner/name` instead")


def _place(text: str, where: str) -> LocalPlace | S3Place | HubPlace:
    try:
        return parse_place(text)
    except WrongPlace as error:
        raise SpecError(f"{where}: {error}", "name a folder, s3://bucket/prefix or hub: owner/name") from None  # fmt: skip
