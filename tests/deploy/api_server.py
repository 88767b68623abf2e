"""A double of Kubernetes' API server, for the real helm and kubectl to talk to.

It stores objects and runs nothing. What it refuses is what matters here: objects that Kubernetes'
schema refuses, names that are taken, pods that break the profile `restricted`, a change of what cannot
be changed on a Job or an immutable ConfigMap, and a Job's podFailurePolicy without what it takes. A
test's pod succeeds at once.
"""

from __future__ import annotations

import copy
import json
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.deploy.kubernetes import VERSIONS, invalid
from tests.deploy.pod_security import violations
from tests.deploy.protobuf import MAGIC, read_secret

Object = dict[str, Any]

# Group and version, and the plurals and kinds in it.
GROUPS = {
    "v1": {
        "configmaps": "ConfigMap", "secrets": "Secret", "serviceaccounts": "ServiceAccount",
        "persistentvolumeclaims": "PersistentVolumeClaim", "pods": "Pod", "namespaces": "Namespace",
    },
    "batch/v1": {"jobs": "Job"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
}  # fmt: skip
# What of a Job's spec the API lets nobody change.
FIXED = ("completions", "selector", "template", "podFailurePolicy", "completionMode")
PATH = re.compile(
    r"/(?:api|apis)/(?P<group>v1|batch/v1|networking\.k8s\.io/v1)"
    r"(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+))?"
)


class Refused(Exception):
    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message


@dataclass
class Cluster:
    objects: dict[tuple[str, str], Object] = field(default_factory=dict)  # by plural and name
    deleted: dict[tuple[str, str], str] = field(
        default_factory=dict
    )  # and what becomes of its pods
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.RLock = field(default_factory=threading.RLock)
    url: str = ""

    def names(self, plural: str) -> list[str]:
        return sorted(name for kind, name in self.objects if kind == plural)

    def get(self, plural: str, name: str) -> Object:
        if (plural, name) not in self.objects:
            raise Refused(404, "NotFound", f'{plural} "{name}" not found')
        return self.objects[plural, name]

    def put(self, plural: str, its: Object) -> Object:
        """Admission: a new object, or a changed one."""
        its = copy.deepcopy(its)
        name = its["metadata"]["name"]
        old = self.objects.get((plural, name))
        _require_valid(its)
        if old:
            _require_unchanged(old, its)
        its["metadata"] |= {
            "namespace": its["metadata"].get("namespace", "ml"),
            "uid": old["metadata"]["uid"] if old else str(uuid.uuid4()),
            "resourceVersion": str(int(old["metadata"]["resourceVersion"]) + 1 if old else 1),
            "creationTimestamp": "2026-01-01T00:00:00Z",
        }
        if plural == "pods":
            its["status"] = {"phase": "Succeeded"}
        self.objects[plural, name] = its
        return its


def _require_valid(its: Object) -> None:
    wrong = invalid([its], VERSIONS[-1]) if its["kind"] != "Secret" else []
    pod = its["spec"] if its["kind"] == "Pod" else None
    if its["kind"] == "Job":
        pod = its["spec"]["template"]["spec"]
        if pod["restartPolicy"] != "Never":
            wrong.append("podFailurePolicy takes restartPolicy Never")
        if its["spec"].get("podReplacementPolicy", "Failed") != "Failed":
            wrong.append("podFailurePolicy takes podReplacementPolicy Failed")
    if wrong:
        raise Refused(422, "Invalid", "; ".join(wrong))
    if pod and (found := violations(pod)):
        raise Refused(403, "Forbidden", f"violates PodSecurity restricted: {found}")


def _require_unchanged(old: Object, new: Object) -> None:
    if old["kind"] == "Job":
        changed = [name for name in FIXED if old["spec"].get(name) != new["spec"].get(name)]
        if changed:
            raise Refused(422, "Invalid", f"spec.{changed[0]}: field is immutable")
    if old.get("immutable") and old.get("data") != new.get("data"):
        raise Refused(422, "Invalid", "data: field is immutable when `immutable` is set")


@contextmanager
def running() -> Iterator[Cluster]:
    cluster = Cluster()

    class Handler(_Handler):
        its = cluster

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    cluster.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield cluster
    finally:
        cluster.over.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    its: Cluster
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _do(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if "watch" in query:
            self._watch(url.path, query)
            return
        try:
            with self.its.lock:
                code, answer = self._answer(url.path, query)
        except Refused as refused:
            code, answer = refused.code, {
                "kind": "Status", "apiVersion": "v1", "status": "Failure",
                "code": refused.code, "reason": refused.reason, "message": refused.message,
            }  # fmt: skip
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _watch(self, path: str, query: dict[str, list[str]]) -> None:
        """What there is, where that is asked for; and then nothing happens."""
        match = PATH.fullmatch(path)
        assert match
        events: list[Object] = []
        if "sendInitialEvents" in query:
            with self.its.lock:
                found = self._list(match["group"], match["plural"], query)
            events = [{"type": "ADDED", "object": its} for its in found["items"]]
            end = {"resourceVersion": "1", "annotations": {"k8s.io/initial-events-end": "true"}}
            kind = GROUPS[match["group"]][match["plural"]]
            its = {"apiVersion": match["group"], "kind": kind, "metadata": end}
            events.append({"type": "BOOKMARK", "object": its})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write("".join(json.dumps(event) + "\n" for event in events).encode())
        self.wfile.flush()
        self.its.over.wait(5)
        self.close_connection = True

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _do

    def _answer(self, path: str, query: dict[str, list[str]]) -> tuple[int, Object]:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if (found := _discovery(path)) is not None:
            return 200, found
        match = PATH.fullmatch(path)
        if not match or match["plural"] not in GROUPS[match["group"]]:
            raise Refused(404, "NotFound", f"there is no {path} here")
        group, plural, name = match["group"], match["plural"], match["name"]
        if plural == "namespaces":
            return 200, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        if self.command == "GET":
            return 200, self.its.get(plural, name) if name else self._list(group, plural, query)
        if self.command == "DELETE":
            its = self.its.get(plural, name)
            del self.its.objects[plural, name]
            options = json.loads(body) if body.startswith(b"{") else {}
            self.its.deleted[plural, name] = options.get("propagationPolicy", "")
            return 200, its
        # YAML, for what server-side apply sends is that.
        sent = read_secret(body) if body.startswith(MAGIC) else yaml.safe_load(body)
        if self.command == "POST":
            if (plural, sent["metadata"]["name"]) in self.its.objects:
                raise Refused(409, "AlreadyExists", f"{plural} {sent['metadata']['name']} exists")
            return 201, self.its.put(plural, sent)
        if self.command == "PUT":
            return 200, self.its.put(plural, sent)
        if "apply" in self.headers["Content-Type"]:
            # One manager applies here: what it says is what there is, but for what was set beside.
            there = (plural, name) in self.its.objects
            return 200 if there else 201, self.its.put(plural, sent)
        return 200, self.its.put(plural, _merged(self.its.get(plural, name), sent))

    def _list(self, group: str, plural: str, query: dict[str, list[str]]) -> Object:
        wanted = dict(
            pair.split("=", 1) for pair in query.get("labelSelector", [""])[0].split(",") if pair
        )
        named = [f.split("=")[1] for f in query.get("fieldSelector", []) if "metadata.name=" in f]
        items = [
            its
            for (kind, name), its in self.its.objects.items()
            if kind == plural
            and wanted.items() <= its["metadata"].get("labels", {}).items()
            and (not named or name in named)
        ]
        kind = f"{GROUPS[group][plural]}List"
        return {
            "apiVersion": group,
            "kind": kind,
            "metadata": {"resourceVersion": "1"},
            "items": items,
        }


def _merged(old: Any, patch: Any) -> Any:
    """RFC 7386, which is enough of a strategic merge patch where no list changes."""
    if not isinstance(patch, dict):
        return patch
    made = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            made.pop(key, None)
        elif not key.startswith("$"):
            made[key] = _merged(made.get(key), value)
    return made


def _discovery(path: str) -> Object | None:
    if path == "/version":
        return {"major": "1", "minor": "35", "gitVersion": "v1.35.2"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = []
        for group in GROUPS:
            name, slash, version = group.rpartition("/")
            if slash:
                its = {"groupVersion": group, "version": version}
                groups.append({"name": name, "versions": [its], "preferredVersion": its})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    if path == "/openapi/v3":
        urls = {
            _base(group): {"serverRelativeURL": f"/openapi/v3/{_base(group)}"} for group in GROUPS
        }
        return {"paths": urls}
    for group, plurals in GROUPS.items():
        if path == f"/openapi/v3/{_base(group)}":
            return _openapi(group, plurals)
        if path == f"/{_base(group)}":
            verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
            resources = [
                {"name": plural, "singularName": kind.lower(), "namespaced": plural != "namespaces",
                 "kind": kind, "verbs": verbs}
                for plural, kind in plurals.items()
            ]  # fmt: skip
            return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": resources}  # fmt: skip
    return None


def _base(group: str) -> str:
    return f"apis/{group}" if "/" in group else f"api/{group}"


def _openapi(group: str, plurals: dict[str, str]) -> Object:
    """No schemas: only that the server itself finds unknown fields, as it does (`_require_valid`)."""
    name, _, version = group.rpartition("/")
    paths = {}
    for plural, kind in plurals.items():
        gvk = {"group": name, "version": version, "kind": kind}
        paths[f"/{_base(group)}/namespaces/{{namespace}}/{plural}/{{name}}"] = {
            "patch": {
                "parameters": [{"name": "fieldValidation", "in": "query"}],
                "responses": {},
                "x-kubernetes-group-version-kind": gvk,
            }
        }
    return {
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.35.2"},
        "paths": paths,
    }
