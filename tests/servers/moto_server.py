"""An S3 server that starts in a moment, in this process: moto.

It takes any credentials and does not check what it is sent; `tests.servers.ceph` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from moto.server import ThreadedMotoServer

from tests.servers.s3 import S3Server


@contextlib.contextmanager
def running_moto() -> Iterator[S3Server]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server(
            endpoint=f"http://{host}:{port}",
            access_key="test",
            secret_key="test",
            region="us-east-1",
        )
    finally:
        server.stop()
