"""The `hub` fixture: a double of the Hub, and a client that cannot reach anything else's state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from tests.servers.hub import Hub, running_hub

TOKEN = "hf_ada"  # of the user ada, who may write for the organisation acme as well


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
    with running_hub(tmp_path / "hf-hub") as hub:
        hub.add_token(TOKEN, "ada", orgs=["acme"])
        close_session()  # proxies are read when the session is made
        yield hub
        close_session()
    assert hub.leaks == [], "a token went to the storage"
