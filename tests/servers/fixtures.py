"""Fixtures of the servers. A conftest takes them in with

from tests.servers.fixtures import ceph, moto  # noqa: F401
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.servers.ceph import running_ceph, why_not
from tests.servers.moto_server import running_moto
from tests.servers.s3 import S3Server


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, one for all tests: each makes a bucket of its own.

    Skips where it cannot run, unless LORAJOB_REQUIRE (`ceph,...`) says that it must.
    """
    if reason := why_not():
        if "ceph" in os.environ.get("LORAJOB_REQUIRE", "").split(","):
            pytest.fail(reason)
        pytest.skip(reason)
    with running_ceph(tmp_path_factory.mktemp("ceph")) as server:
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """moto's S3 server, one for all tests."""
    with running_moto() as server:
        yield server
