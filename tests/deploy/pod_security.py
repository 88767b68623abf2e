"""The Pod Security Standards' profile `restricted`, as Kubernetes 1.35 documents it, for one pod."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected",
    "secret",
}  # fmt: skip
SECCOMP = {"RuntimeDefault", "Localhost"}
SELINUX_TYPES = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
}  # fmt: skip


def violations(pod: dict[str, Any], annotations: dict[str, str] | None = None) -> list[str]:
    """What of a pod's spec the profile refuses."""
    return [*_of_pod(pod, annotations or {}), *_of_containers(pod)]


def _of_pod(pod: dict[str, Any], annotations: dict[str, str]) -> Iterator[str]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield name
    context = pod.get("securityContext", {})
    yield from _of_context("pod", context)
    for sysctl in context.get("sysctls", []):
        if sysctl["name"] not in SYSCTLS:
            yield f"sysctl {sysctl['name']}"
    for volume in pod.get("volumes", []):
        for kind in set(volume) - {"name"} - VOLUMES:
            yield f"volume {volume['name']}: {kind}"
    for key, value in annotations.items():
        named = key.startswith("container.apparmor.security.beta.kubernetes.io/")
        if named and value != "runtime/default" and not value.startswith("localhost/"):
            yield f"annotation {key}"


def _of_containers(pod: dict[str, Any]) -> Iterator[str]:
    of_pod = pod.get("securityContext", {})
    kinds = ("initContainers", "containers", "ephemeralContainers")
    for container in (c for kind in kinds for c in pod.get(kind, [])):
        name, context = container["name"], container.get("securityContext", {})
        yield from _of_context(name, context)
        if context.get("privileged"):
            yield f"{name}: privileged"
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{name}: allowPrivilegeEscalation"
        capabilities = context.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", []):
            yield f"{name}: capabilities are not dropped"
        if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            yield f"{name}: capabilities are added"
        if context.get("procMount", "Default") != "Default":
            yield f"{name}: procMount"
        if any(port.get("hostPort") for port in container.get("ports", [])):
            yield f"{name}: hostPort"
        for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
            if container.get(probe, {}).get("httpGet", {}).get("host"):
                yield f"{name}: {probe} names a host"
        if context.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is not True:
            yield f"{name}: may run as root"
        profile = context.get("seccompProfile", of_pod.get("seccompProfile", {}))
        if profile.get("type") not in SECCOMP:
            yield f"{name}: no seccomp profile"


def _of_context(name: str, context: dict[str, Any]) -> Iterator[str]:
    if context.get("runAsNonRoot", True) is not True:
        yield f"{name}: runAsNonRoot"
    if context.get("runAsUser", 1) == 0:
        yield f"{name}: runAsUser 0"
    if context.get("seccompProfile", {}).get("type", "RuntimeDefault") not in SECCOMP:
        yield f"{name}: seccompProfile"
    if context.get("appArmorProfile", {}).get("type", "RuntimeDefault") == "Unconfined":
        yield f"{name}: appArmorProfile"
    selinux = context.get("seLinuxOptions", {})
    if selinux.get("type", "") not in SELINUX_TYPES or selinux.get("user") or selinux.get("role"):
        yield f"{name}: seLinuxOptions"
    if context.get("windowsOptions", {}).get("hostProcess"):
        yield f"{name}: hostProcess"
