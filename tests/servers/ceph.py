"""A real S3 server: Ceph's RADOS gateway over one monitor and one OSD that keeps all in memory.

`.ci/ceph PREFIX` makes the chroot that it runs in. By hand:

    sudo .venv/bin/python -m tests.servers.ceph

prints the variables that point a process at the server, and runs it until Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shlex
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.servers.s3 import S3Server, free_port

MARKER = ".lorajob-complete"  # .ci/ceph writes it last
PATIENCE = 60.0  # seconds for any one step; the whole start takes one or two

# One monitor, one OSD, nothing replicated, and a monitor that commits at once instead of gathering
# proposals for a second: that is what makes a start quick.
CONFIG = """\
[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{mon_port}
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv6 = false
keyring = /mnt/keyring
log_file = /mnt/$name.log
run_dir = /mnt
admin_socket =
mon_data = /mnt/mon
mon_data_avail_warn = 0
mon_data_avail_crit = 0
paxos_propose_interval = 0.02
paxos_min_wait = 0.01
mon_allow_pool_size_one = true
osd_data = /mnt/osd
osd_objectstore = memstore
memstore_device_bytes = {bytes}
osd_crush_chooseleaf_type = 0
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
# A client that asks before the OSD is up asks again this often, in seconds.
objecter_tick_interval = 0.2
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_enable_apis = s3
rgw_run_sync_thread = false
# What is deleted leaves the memory soon, not after two hours.
rgw_gc_obj_min_wait = 5
rgw_gc_processor_period = 5
rgw_gc_processor_max_time = 5
"""

# Each daemon is the first process of a PID namespace: when it is killed, so is all it started, and
# when the test run dies, however it does, the kernel kills the daemon. The mounts are seen by it alone.
INSIDE = """\
mount --bind "$1" "$2/mnt" && mount --rbind /dev "$2/dev" && mount -t proc proc "$2/proc" || exit
root=$2; shift 2
exec chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 CEPH_CONF=/mnt/ceph.conf "$@"
"""


def ceph_root() -> Path | None:
    """The chroot that `.ci/ceph` made, where it is complete."""
    cache = Path(os.environ.get("LORAJOB_CACHE") or Path.home() / ".cache" / "lorajob")
    root = Path(os.environ.get("LORAJOB_CEPH") or cache / "ceph")
    return root if (root / MARKER).exists() else None


def why_not() -> str | None:
    """What keeps Ceph from running here, and what to do about it; None where it can."""
    if ceph_root() is None:
        return (
            "no Ceph here: `sudo .ci/ceph ~/.cache/lorajob/ceph` makes it in a minute "
            "(or set LORAJOB_CEPH to where it is)"
        )
    if os.geteuid() != 0:
        return "Ceph runs in a chroot, and only root can enter one"
    return None


@contextlib.contextmanager
def running_ceph(folder: Path, size_gb: float = 2) -> Iterator[S3Server]:
    """A Ceph cluster of its own with its logs in `folder`; it holds up to `size_gb` in memory.

    Start it from a thread that lives as long as it: the kernel ends it with that thread. When
    it is full it refuses writes (507 InsufficientCapacity), but notices that only after seconds.
    """
    root = ceph_root()
    reason = why_not()
    if root is None or reason:
        raise RuntimeError(reason)
    server = S3Server(
        endpoint=f"http://127.0.0.1:{free_port()}",
        access_key=secrets.token_hex(10).upper(),
        secret_key=secrets.token_hex(20),
        region="us-east-1",
    )
    with contextlib.ExitStack() as stack:
        _Cluster(root, folder, stack).start(server, size_gb)
        yield server


class _Cluster:
    """The steps of a start, in order; `stack` undoes them."""

    def __init__(self, root: Path, folder: Path, stack: contextlib.ExitStack) -> None:
        self.root = root
        self.folder = folder.resolve()
        self.stack = stack

    def start(self, server: S3Server, size_gb: float) -> None:
        fsid, osd_uuid = str(uuid.uuid4()), str(uuid.uuid4())
        mon_port, port = free_port(), int(server.endpoint.rpartition(":")[2])
        for name in ("mon", "osd"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "ceph.conf").write_text(
            CONFIG.format(fsid=fsid, mon_port=mon_port, port=port, bytes=int(size_gb * 2**30))
        )
        self._write_keyring()
        self._run("monmaptool", "--create", "--fsid", fsid,
                  "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", "/mnt/monmap")  # fmt: skip
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", "/mnt/monmap")
        self._daemon(lambda: _listens(mon_port), "ceph-mon", "-f", "-i", "a")
        self._run("ceph", "osd", "new", osd_uuid)
        self._run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", osd_uuid)
        self._daemon(lambda: True, "ceph-osd", "-f", "-i", "0")
        # This one waits for the OSD, and makes the pools that the gateway starts from.
        self._run("radosgw-admin", "user", "create", "--uid=test", "--display-name=test",
                  f"--access-key={server.access_key}", f"--secret-key={server.secret_key}")  # fmt: skip
        self._daemon(lambda: _answers(server.endpoint), "radosgw", "-f", "-n", "client.admin")

    def _write_keyring(self) -> None:
        """One key with all rights for everybody: the gateway refuses to run without keys."""
        key = self._run("ceph-authtool", "--gen-print-key").strip()
        rights = "".join(f'caps {part} = "allow *"\n' for part in ("mon", "osd", "mgr"))
        names = ("mon.", "client.admin", "osd.0")
        text = "".join(f"[{name}]\nkey = {key}\n{rights}" for name in names)
        (self.folder / "keyring").write_text(text)

    def _command(self, *command: str) -> list[str]:
        return [
            *("setpriv", "--pdeathsig", "KILL"),
            *("unshare", "--mount", "--pid", "--fork", "--kill-child"),
            *("sh", "-c", INSIDE, "sh", str(self.folder), str(self.root), *command),
        ]

    def _run(self, *command: str) -> str:
        """Run one command in the chroot to its end, and give back what it printed."""
        try:
            done = subprocess.run(
                self._command(*command),
                check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{command[0]} hangs; the logs are in {self.folder}") from None
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{command[0]} failed: {error.stderr[-2000:]}") from None
        return done.stdout

    def _daemon(self, ready: Callable[[], bool], *command: str) -> None:
        """Start a daemon in the chroot, to be killed at the end, and wait until it is ready."""
        output = self.folder / f"{command[0]}.out"
        # Every process of the daemon holds the pipe's other end: it closes when the last one is gone.
        alive, held = os.pipe()
        with output.open("wb") as file:
            process = subprocess.Popen(
                self._command(*command),
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, pass_fds=(held,),
                start_new_session=True,  # Ctrl-C is for the tests: they stop it in their own order
            )  # fmt: skip
        os.close(held)
        self.stack.callback(_end, command[0], process, alive)
        deadline = time.monotonic() + PATIENCE
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                tail = output.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{command[0]} does not start; {output} ends: {tail}")
            time.sleep(0.02)


def _end(name: str, process: subprocess.Popen[bytes], alive: int) -> None:
    """Kill a daemon; on return nothing of it runs any more, and its ports are free."""
    process.kill()
    process.wait()
    gone, _, _ = select.select([alive], [], [], 10)
    os.close(alive)
    if not gone:
        raise RuntimeError(f"{name} cannot be ended")


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _answers(endpoint: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(endpoint, timeout=5).close()
    except OSError:  # a refused connection, or an HTTP error
        return False
    return True


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        tempfile.TemporaryDirectory(prefix="ceph-") as folder,
        running_ceph(Path(folder)) as server,
    ):
        for name, value in server.environment().items():
            print(f"export {name}={shlex.quote(value)}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
