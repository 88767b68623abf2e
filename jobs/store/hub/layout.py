"""Where a run's files stand in the repositories of the Hub, and the way back.

The merged model goes to the root of the main repository, because that is where `from_pretrained`
and servers look; without one the adapter does, because that is where peft looks. What has a
repository of its own stands at its root.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from jobs.store.manifest import NAME

Part = Literal["adapter", "gguf", "main"]
PARTS: tuple[Part, ...] = ("adapter", "gguf", "main")  # in the order of sending

ADAPTER_CONFIG = "adapter_config.json"  # at the root it says that the root is an adapter
CARD = "README.md"  # the run's own, at the root in the folder and in the repository

T = TypeVar("T")


def layout(keys: Iterable[str], apart: Iterable[Part]) -> dict[Part, dict[str, str]]:
    """For each repository, path in it -> key in the run's folder; the manifest is left out.

    `apart` are the parts with a repository of their own.
    """
    keys = sorted(set(keys) - {NAME})
    own = {f"{part}/": part for part in apart}
    root = root_folder(keys, apart)
    found: dict[Part, dict[str, str]] = {part: {} for part in PARTS if part in (*apart, "main")}
    for key in keys:
        folder, slash, rest = key.partition("/")
        part = own.get(folder + slash, "main")
        at_root = part != "main" or folder + slash == root
        path = rest if at_root else key
        # The folders' names are lorajob's own and no model has a file called like them.
        assert path not in found[part] and path != NAME, f"two files for {path}"
        found[part][path] = key
    return found


def root_folder(keys: Iterable[str], apart: Iterable[Part]) -> str:
    """The folder of the run that stands at the main repository's root."""
    folders = {key.partition("/")[0] for key in keys if "/" in key}
    if "merged" in folders:
        return "merged/"
    return "adapter/" if "adapter" in folders and "adapter" not in apart else ""


def keys_of(part: Part, paths: Iterable[str]) -> dict[str, str]:
    """path -> key of what a repository holds, told from its paths alone.

    An earlier run may have had another layout than this one.
    """
    paths = list(paths)
    root = "adapter" if ADAPTER_CONFIG in paths else "merged"
    found = {}
    for path in paths:
        if part != "main":
            found[path] = f"{part}/{path}"
        elif path in (NAME, CARD) or path.partition("/")[0] in (
            "adapter",
            "gguf",
            "report",
            "logs",
        ):
            found[path] = path
        else:
            found[path] = f"{root}/{path}"
    return found


def part_manifest(
    manifest: Mapping[str, Any], paths: Mapping[str, str], repository: str
) -> dict[str, Any]:
    """The run's manifest as it stands in one repository: its files under their paths there."""
    path_of = {key: path for path, key in paths.items()}
    files = [
        {**file, "path": path_of[file["path"]]}
        for file in manifest["files"]
        if file["path"] in path_of
    ]
    return {**manifest, "files": by_path(files), "repository": repository}


def run_manifest(parts: Mapping[Part, Any]) -> dict[str, Any] | None:
    """The run's manifest put together again from those of its repositories; None if none is one."""
    main = parts.get("main")
    if not isinstance(main, dict) or not isinstance(main.get("files"), list):
        return None
    files = []
    for part, manifest in parts.items():
        listed = listed_files(manifest)
        keys = keys_of(part, [file["path"] for file in listed])
        files += [{**file, "path": keys[file["path"]]} for file in listed]
    whole = {name: value for name, value in main.items() if name != "repository"}
    return {**whole, "files": by_path(files)}


def listed_files(manifest: Any) -> list[dict[str, Any]]:
    """The files that a manifest lists; none where it is no manifest."""
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, list):
        return []
    return [file for file in files if isinstance(file, dict) and isinstance(file.get("path"), str)]


def by_path(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(files, key=lambda file: str(file["path"]))
