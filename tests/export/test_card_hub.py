"""Cards on the Hub: its own validation takes them, and the run is known again with them in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from jobs.errors import ServiceError
from jobs.export.card import BaseCard, cards, find_base_card, write_cards
from jobs.spec import HubTarget
from jobs.store.base import no_advance
from jobs.store.connect import Connections
from jobs.store.hashing import file_entries
from jobs.store.hub import HubStore
from jobs.store.publish import publish
from jobs.store.retry import Retries
from tests.conftest import BASE
from tests.export.test_card import HUB, manifest
from tests.servers.hub import Hub

pytest_plugins = ["tests.servers.hub_fixtures"]

TOKEN = "hf_ada"


@pytest.fixture(autouse=True)
def _at_the_double(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def published(tmp_path: Path, hub: Hub) -> tuple[Path, HubStore]:
    """A run's folder, published with the GGUF files in a repository of their own."""
    target = {**HUB, "gguf": "acme/bot-GGUF"}
    made = manifest(spec__publish=[target])
    for file in made["files"]:
        path = tmp_path / "run" / file["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file["path"].encode())
    folder = tmp_path / "run"
    write_cards(folder, cards(made, BaseCard({"license": "apache-2.0"})))
    made["files"] = file_entries(folder)
    (folder / "manifest.json").write_text(json.dumps(made))
    store = HubStore.of_target(HubTarget.model_validate(target), Retries(wait=0.01))
    publish(folder, made["files"], store, no_advance)
    return folder, store


def test_each_repository_shows_its_own_card(published: tuple[Path, HubStore], hub: Hub) -> None:
    api = HfApi(endpoint=hub.endpoint, token=TOKEN)
    for repository, card, library, relation in (
        ("acme/bot", "README.md", "transformers", "finetune"),
        ("acme/bot-GGUF", "gguf/README.md", "gguf", "quantized"),
    ):
        info = api.model_info(repository)
        assert info.card_data is not None
        assert info.card_data["library_name"] == library
        assert info.card_data["base_model_relation"] == relation
        fetched = Path(api.hf_hub_download(repository, "README.md"))
        assert fetched.read_bytes() == (published[0] / card).read_bytes()


def test_the_run_is_there_with_its_cards_and_nothing_is_sent_again(
    published: tuple[Path, HubStore],
) -> None:
    folder, _ = published
    listed = json.loads((folder / "manifest.json").read_text())
    target = HubTarget.model_validate(listed["spec"]["publish"][0])
    store = HubStore.of_target(target, Retries(wait=0.01))
    there = {entry.key for entry in store.entries()}
    assert {file["path"] for file in listed["files"]} <= there
    assert publish(folder, listed["files"], store, no_advance)["sent"] == 0


def test_the_bases_licence_is_read_off_its_card(hub: Hub) -> None:
    from jobs.base_model import open_base

    files = {path.name: path for path in BASE.iterdir()}
    hub.add_repo("acme/plain", "model", files)
    hub.add_repo("acme/base", "model", {**files, "README.md": b"---\nlicense: mit\n---\n# Base\n"})
    connections = Connections()
    assert find_base_card(open_base("acme/plain", connections)) == BaseCard()
    assert find_base_card(open_base("acme/base", connections)).licence == {"license": "mit"}


def test_a_base_card_that_cannot_be_had_stops_nothing(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.base_model import open_base

    hub.add_repo("acme/base", "model", {path.name: path for path in BASE.iterdir()})
    base = open_base("acme/base", Connections())
    assert base.remote

    def fail(self: HubStore) -> None:
        raise ServiceError("the Hub does not answer")

    monkeypatch.setattr(type(base.remote.store), "entries", fail)
    assert find_base_card(base) == BaseCard()
