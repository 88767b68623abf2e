from tests.servers.fixtures import ceph, moto  # noqa: F401
