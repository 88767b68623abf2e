"""What the pages say of images, variables and installing holds together with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helm.values_file import read_values
from jobs import __version__
from jobs.errors import LorajobError
from tests.conftest import ROOT
from tests.docs.pages import CODE, PAGES, Page, commands

BOX = next(page for page in PAGES if page.name == "docs/rented-box.md")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
OWN_IMAGE = re.compile(r"(?:[\w.:/$-]+/)?lorajob(?::([\w.-]+))?")


def images(page: Page) -> list[tuple[str, str | None]]:
    """Each image of lorajob in a docker command: the command and its tag."""
    found = []
    for block in page.blocks:
        for words in commands(block.text):
            if words[0] == "docker" and words[1] in ("build", "tag", "push", "run", "save"):
                own = [
                    m for word in words[2:] if (m := OWN_IMAGE.fullmatch(word)) and word[0] != "-"
                ]
                found += [(f"{block}: {' '.join(words[:2])}", m[1]) for m in own]
    return found


@every_page
def test_every_image_has_the_version_as_its_tag(page: Page) -> None:
    wrong = [at for at, tag in images(page) if tag not in (__version__, f"{__version__}-cpu")]
    assert wrong == []


def test_the_pages_build_tag_and_push_what_clusters_pull() -> None:
    for name in ("README.md", "docs/eks.md", "docs/gke.md", "docs/air-gapped.md"):
        page = next(page for page in PAGES if page.name == name)
        done = {at.split()[-1] for at, _ in images(page)}
        assert done >= {"build", "tag", "push"}, name
    for path in (ROOT / "k8s").rglob("*.yaml"):
        for image in re.findall(r"(?m)^\s*image: \"?(lorajob\S*?)\"?$", path.read_text("utf-8")):
            assert image in (f"lorajob:{__version__}", f"lorajob:{__version__}-cpu"), path


def test_every_variable_is_in_the_table() -> None:
    files = [ROOT / "Dockerfile", *(ROOT / "jobs").rglob("*.py")]
    read = {name for path in files for name in re.findall(r"\bLORAJOB_[A-Z]\w*", path.read_text("utf-8"))}  # fmt: skip
    section = BOX.text.partition("\n## Every variable\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    told = {name for row in rows for _, name in CODE.findall(row)}
    assert len(read) > 6
    assert told - {"LORAJOB__..."} == read


def test_the_memory_that_the_chart_asks_for_is_what_the_page_reckons_with() -> None:
    memory = read_values(ROOT / "helm/lorajob/values.yaml")["resources"]["requests"]["memory"]
    eks = next(page for page in PAGES if page.name == "docs/eks.md")
    assert f"the chart asks for {memory.removesuffix('Gi')} GiB" in eks.text


LOOP = next(block.text for block in BOX.blocks if block.language == "bash" and "until " in block.text)  # fmt: skip


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 6, 10, 20, 130, 137])
def test_the_loop_starts_again_only_where_that_is_any_use(code: int, tmp_path: Path) -> None:
    """With a docker that ends with the code, and at its second call well."""
    own = {kind.exit_code for kind in LorajobError.__subclasses__()}
    assert {2, 3, 4, 5, 6, 10, 20} <= own
    (tmp_path / "docker").write_text(f'#!/bin/sh\necho x >> calls\n[ "$(wc -l < calls)" -gt 1 ] || exit {code}\n')  # fmt: skip
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for name in ("docker", "sleep"):
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", LOOP], check=False, cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}
    )
    calls = len((tmp_path / "calls").read_text().split())
    again = code in (10, 20, 137)
    assert calls == (2 if again else 1)
    assert done.returncode == (0 if again else code)


def test_the_loop_ends_with_ctrl_c_though_the_run_says_20(tmp_path: Path) -> None:
    """docker hands the signal on and ends with the run's own code, and the shell hears it too."""
    (tmp_path / "docker").write_text('#!/bin/sh\necho x >> calls\nkill -INT "$PPID"\nexit 20\n')
    (tmp_path / "sleep").write_text("#!/bin/sh\necho slept >> calls\n")
    for name in ("docker", "sleep"):
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", LOOP], check=False, cwd=tmp_path, timeout=30,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 130
    assert (tmp_path / "calls").read_text() == "x\n"


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], check=False, cwd=ROOT, capture_output=True, text=True)  # fmt: skip


def test_setup_leaves_a_program_that_runs_from_anywhere(tmp_path: Path) -> None:
    there = tmp_path / "venv"
    (there / "bin").mkdir(parents=True)
    (there / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (there / "bin" / "python").chmod(0o755)
    (there / ".ready").touch()
    done = make(f"VENV={there}", f"--old-file={there}/.ready", "setup")
    assert done.returncode == 0, done.stderr
    (tmp_path / "link").symlink_to(there / "bin" / "lorajob")
    for program in (there / "bin" / "lorajob", tmp_path / "link"):
        told = subprocess.run([program, "--version"], check=False, cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
        assert told.stdout == f"lorajob {__version__}\n"


def test_setup_gpu_installs_the_cuda_lock_as_the_image_does(tmp_path: Path) -> None:
    told = make("-n", f"VENV={tmp_path}/venv", "setup-gpu").stdout
    (install,) = [
        line for line in told.splitlines() if "pip" in line and "requirements.lock" in line
    ]
    image = re.search(r"-m pip --python \S+ install .*\n(.*--require-hashes.*)\\\n", (ROOT / "Dockerfile").read_text("utf-8"))  # fmt: skip
    assert image
    for flag in ("--require-hashes", "--no-deps", "--only-binary :all:"):
        assert flag in image[1]
        assert flag in install


def test_setup_gpu_refuses_another_python_and_leaves_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    other.chmod(0o755)
    if sys.version_info[:2] == (3, 12):
        pytest.skip("this is the one that it takes")
    done = make(f"VENV={tmp_path}/venv", f"GPU_PYTHON={other}", "setup-gpu")
    assert done.returncode != 0
    assert "requirements.lock is for Python 3.12" in done.stdout
    assert (tmp_path / "venv").is_dir()
