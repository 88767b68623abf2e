"""A source of the spec -> the files behind it: one file, those of a folder, or those of a glob."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from jobs.errors import AccessError, DataError, SpecError, bullet_list
from jobs.spec import Source

TYPES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
COMPRESSIONS = (".gz", ".zst")
KNOWN = f"{', '.join(TYPES)}, each also with {' or '.join(COMPRESSIONS)}"

# What a split is called differs between data sets.
SPLIT_NAMES = {"validation": ("validation", "valid", "val", "dev")}


def endings(path: Path) -> tuple[str, str]:
    """The type and the compression that a file's name ends in; "" where it is none of ours."""
    name = path.name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    name = name.removesuffix(compression)
    return next((ending for ending in TYPES if name.endswith(ending)), ""), compression


@dataclass(frozen=True)
class DataFile:
    path: Path
    name: str  # as messages call it


def source_files(source: Source) -> list[DataFile]:
    """The files behind a source on this machine, sorted by path.

    Raises AccessError where there is none or one cannot be read, DataError where a file that is
    named has an ending that is not read.
    """
    try:
        return [DataFile(path, str(path)) for path in _source_files(source)]
    except OSError as error:
        raise AccessError(
            f"{error.filename or source.source} cannot be read: {error.strerror}",
            "check its name and its rights",
        ) from None


def _source_files(source: Source) -> list[Path]:
    name = source.source.removeprefix("file://")
    path = Path(name)
    if path.is_dir():
        root, seen = path, list(_walk(path))
    elif path.exists():
        return [_one_file(path, source)]
    elif glob.has_magic(name):
        root = _fixed_part(path)
        # Not Path.glob, whose ** matches no files before Python 3.13.
        matches = map(Path, glob.glob(name, recursive=True))  # noqa: PTH207
        seen = [match for match in matches if match.is_file()]
    else:
        raise AccessError(
            f"there is no data file at {name}",
            f"data paths are taken from the folder lorajob is started in ({Path.cwd()})",
        )
    files = choose_files(name, seen, root, source.split)
    for file in files:
        _must_be_readable(file)
    return files


def choose_files(name: str, seen: Iterable[Path], root: Path, split: str | None) -> list[Path]:
    """Of the files that were seen at a place those that hold data, of the split where one is
    named. `root` is the folder the place begins at. Raises AccessError where there is none."""
    seen = sorted(file for file in seen if not file.name.startswith("."))
    files = [file for file in seen if endings(file)[0]]
    if not files:
        there = f"; it has\n{bullet_list(map(str, seen), 8)}" if seen else ": it has no files"
        raise AccessError(f"{name} has no data file{there}", f"data files end in {KNOWN}")
    if split is None:
        return files
    chosen = [file for file in files if _is_of_split(file.relative_to(root), split)]
    if not chosen:
        raise AccessError(
            f"{name} has no file of the split {split}; it has\n{bullet_list(map(str, files), 8)}",
            "a file is of a split if its name, or the name of a folder it is in, begins with "
            "the split's",
        )
    return chosen


def matches(key: str, pattern: str) -> bool:
    """Whether a key matches a glob as it would among files: `*` within a name, `**` over folders."""
    return _match(key.split("/"), pattern.split("/"))


def _match(names: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_match(names[skip:], patterns[1:]) for skip in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _match(names[1:], patterns[1:])


def _one_file(path: Path, source: Source) -> Path:
    if not path.is_file():
        raise AccessError(f"{path} is neither a file nor a folder", "name one of the two")
    if not endings(path)[0]:
        raise DataError(
            f"{path}: files ending in {path.suffix or 'nothing'} are not read",
            f"data files end in {KNOWN}",
        )
    if source.split is not None:
        raise SpecError(
            f"the source {path} is a file, and `split` picks files out of a folder",
            "leave `split` out, or name the folder",
        )
    _must_be_readable(path)
    return path


def _must_be_readable(path: Path) -> None:
    if not os.access(path, os.R_OK):
        raise AccessError(f"{path} cannot be read: permission denied", "check its rights")


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, but hidden ones; links are followed, each folder once."""

    def refuse(error: OSError) -> None:
        raise error

    visited: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _fixed_part(pattern: Path) -> Path:
    """The folder of a glob that all its matches are below."""
    fixed = Path(pattern.anchor)
    for part in pattern.relative_to(pattern.anchor).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed


def _is_of_split(path: Path, split: str) -> bool:
    """Whether a file, by its path below the source, belongs to a split: train/x.jsonl,
    train.jsonl and train-00000-of-00002.parquet are of train, trainer.jsonl is not."""
    names = "|".join(map(re.escape, SPLIT_NAMES.get(split.lower(), (split,))))
    pattern = re.compile(rf"(?:{names})(?![^\W\d_])", re.IGNORECASE)
    return any(pattern.match(part) for part in path.parts)
