"""Which files of a data set on the Hub belong to a configuration and a split: `datasets` knows."""

from __future__ import annotations

from pathlib import Path

from jobs.data.files import KNOWN, endings
from jobs.errors import AccessError, SpecError, bullet_list
from jobs.spec import Source


def split_files(repository: str, commit: str, source: Source) -> list[str]:
    """The paths in the repository, as its card or its files' names say. Raises AccessError where
    they are of a kind that is not read, SpecError where there is no such config or split."""
    from datasets import DownloadConfig, config, load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError
    from datasets.utils.logging import set_verbosity_error

    set_verbosity_error()
    # Without this the data set's name, a private one's too, goes to a counter of downloads that is
    # neither the Hub nor what HF_ENDPOINT names.
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        builder = load_dataset_builder(
            repository, name=source.config, revision=commit, download_config=DownloadConfig()
        )
    except ValueError as error:  # the library's word for an unknown or missing configuration
        raise SpecError(
            f"{source.source}: {' '.join(str(error).split())}", "set this source's `config`"
        ) from None
    except (DatasetNotFoundError, OSError, RuntimeError) as error:
        raise AccessError(
            f"{source.source} is no data set that can be read: {' '.join(str(error).split())}",
            f"name its files: hf://{repository}/data/*.jsonl; data files end in {KNOWN}",
        ) from None
    of_split = builder.config.data_files or {}
    wanted = source.split or ("train" if "train" in of_split else None)
    if wanted is None and len(of_split) == 1:
        wanted = next(iter(of_split))
    if wanted not in of_split:
        raise SpecError(
            f"{source.source} has "
            + (f"no split {wanted}" if wanted else "several splits")
            + f"; it has\n{bullet_list(map(str, of_split))}",
            "set this source's `split`",
        )
    marker = f"@{commit}/"
    paths = [str(url).partition(marker)[2] for url in of_split[wanted]]
    odd = [path for path in paths if not endings(Path(path))[0]]
    if odd or not paths:
        raise AccessError(
            f"{source.source}: files such as {odd[0] if odd else 'these'} are not read",
            f"name a data set of files ending in {KNOWN}",
        )
    return paths
