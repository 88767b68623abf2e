"""The `hub` fixture: a double of the Hub, and a client that cannot reach anything else's state."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.tqdm import enable_progress_bars

from jobs.store.hub.client import settle_client
from tests.servers.hub import Hub, running_hub

TOKEN = "hf_ada"  # of the user ada, who may write for the organisation acme as well
CHUNK, VERBOSITY = constants.DOWNLOAD_CHUNK_SIZE, hub_logging.get_verbosity()


@contextmanager
def unsettled_client() -> Iterator[None]:
    """huggingface_hub as it is by itself, before and after: what `settle_client` changes is the whole
    process's, so a test would get it or not by which tests were run before it."""
    _unsettle()
    try:
        yield
    finally:
        _unsettle()


def _unsettle() -> None:
    set_client_factory(default_client_factory)  # closes the session that there is
    constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where HF_HUB_DISABLE_PROGRESS_BARS=1 forbids it
        enable_progress_bars()
    hub_logging.set_verbosity(VERBOSITY)
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    settle_client.cache_clear()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with the user ada. The process's own token and cache are out of reach, Xet is off."""
    home = tmp_path / "hf-home"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    # The client reads its environment when it is imported, and that has happened.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    # Proxies are read when the session is made: one from before would not know of NO_PROXY.
    with running_hub(tmp_path / "hf-hub") as hub, unsettled_client():
        hub.add_token(TOKEN, "ada", orgs=["acme"])
        yield hub
    assert hub.leaks == [], "a token went to the storage"
