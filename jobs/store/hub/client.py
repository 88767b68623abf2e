"""The Hub's own client, settled: bounded waits, no retries behind our back, nothing printed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import httpx
from huggingface_hub import HfApi, constants, get_token, set_client_factory
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils._http import default_client_factory, hf_raise_for_status
from huggingface_hub.utils.tqdm import disable_progress_bars

from jobs import __version__
from jobs.errors import AccessError
from jobs.store.places import WrongPlace, require_no_secret

# The client's own default is to wait for ever. A commit of many files takes the Hub a while.
TIMEOUT = httpx.Timeout(120.0, connect=20.0, pool=None)
PASSING = (408, 429)  # besides all from 500 on: states of the Hub that may pass


def hub_api() -> HfApi:
    """The client. It finds the token (HF_TOKEN or its file) and the endpoint by itself."""
    settle_client()
    try:
        require_no_secret(constants.ENDPOINT)
    except WrongPlace as error:
        raise AccessError(f"HF_ENDPOINT: {error}", "set it to https://HOST") from None
    return HfApi(library_name="lorajob", library_version=__version__)


def is_offline() -> bool:
    return bool(constants.is_offline_mode())


@cache
def settle_client() -> None:
    """Once for the process: what huggingface_hub shares between all its calls."""
    set_client_factory(_client)
    constants.DOWNLOAD_CHUNK_SIZE = 2**20  # the client's own 10 MB for each file add up
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where HF_HUB_DISABLE_PROGRESS_BARS=0 forbids it
        disable_progress_bars()
    # Their lines name addresses, and the storage's addresses are signed: whoever has one, may read.
    hub_logging.set_verbosity(logging.CRITICAL)
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _client() -> httpx.Client:
    client = default_client_factory()
    client.timeout = TIMEOUT
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "response": [*hooks["response"], _on_response]}
    return client


def _on_response(response: httpx.Response) -> None:
    """Raise what may pass at once: the client would wait and try again, as long as it is told to,
    with nobody counting."""
    if response.status_code in PASSING or response.status_code >= 500:
        hf_raise_for_status(response)
    assert isinstance(response.stream, httpx.SyncByteStream)
    response.stream = _Body(response.stream)


class _Body(httpx.SyncByteStream):
    """An answer's body. A reset in its middle looks like an early end: after that the client goes
    on where a download stopped, and after a reset it would begin again."""

    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._stream
        except httpx.ReadError as error:
            raise httpx.RemoteProtocolError(str(error)) from error

    def close(self) -> None:
        self._stream.close()


class Account:
    """Whose token it is."""

    def __init__(self, api: HfApi) -> None:
        self._api = api
        self._said: dict[str, Any] | None = None

    def is_given(self) -> bool:
        return not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and bool(get_token())

    def whoami(self) -> dict[str, Any]:
        if self._said is None:
            self._said = self._api.whoami()
        return self._said

    def phrase(self) -> str:
        """For a message: whether there is a token, and of whom. Never the token."""
        if not self.is_given():
            return "no token was given"
        try:
            return f"the token given is that of {self.whoami()['name']}"
        except Exception:  # this is about another error already
            return "a token was given"
