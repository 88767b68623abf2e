"""Getting llama.cpp: its pinned source from the package registry, compiled for this machine.

The finished tools are one folder, named by the hash of everything that went into them:

    llama_cpp/             the Python bindings; their lib/ holds libllama and ggml
    convert_hf_to_gguf.py  the converter, with conversion/ and gguf-py/ beside it
    templates/             real chat templates, for the tests
    BUILD.json             written last: what it was built from

An image brings them along ($LORAJOB_LLAMA_CPP); elsewhere they are built on first use and kept in
the cache.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from jobs.errors import AccessError, ServiceError
from jobs.observe.events import Observer
from jobs.store.cache import cache_folder
from jobs.store.hashing import key_of, sha256_of

# The sdist of the Python bindings carries a complete llama.cpp: sources, converter, vocabularies.
# It is the one source that every machine with a package registry reaches.
PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
LLAMA_CPP_COMMIT = "0c1e57098"

CMAKE_FLAGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_C_FLAGS_RELEASE": "-O2 -DNDEBUG",
    "CMAKE_CXX_FLAGS_RELEASE": "-O2 -DNDEBUG",
    "CMAKE_SHARED_LINKER_FLAGS": "-static-libgcc -static-libstdc++" if sys.platform == "linux" else "",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
    "BUILD_SHARED_LIBS": "ON",
    # Runs on other machines than the one it was built on, and beside torch's own OpenMP.
    "GGML_NATIVE": "OFF",
    "GGML_OPENMP": "OFF",
    # Nothing that downloads, serves or links to more than the C and C++ libraries.
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_BUILD_COMMON": "OFF",
}  # fmt: skip

# What is compiled of our own, beside this module.
OURS = ("CMakeLists.txt", "kquants.c")

# Of the sdist, what is compiled or used; the rest (tests, media, vocabularies) is not unpacked.
_NEEDED = re.compile(
    r"^(llama_cpp/|vendor/llama\.cpp/"
    r"(CMakeLists\.txt|LICENSE|cmake/|src/|include/|ggml/|gguf-py/|conversion/|scripts/|vendor/|models/templates/|convert_\w+\.py))"
)


def tools_key() -> str:
    """Changes with anything that would make other tools."""
    ours = [Path(__file__).with_name(name).read_text("utf-8") for name in OURS]
    made_of = [SHA256, CMAKE_FLAGS, *ours, _NEEDED.pattern, platform.machine(), sys.platform]
    return key_of(made_of)[:16]


def find_tools() -> Path | None:
    """The finished tools, or None where they have to be built first."""
    given = os.environ.get("LORAJOB_LLAMA_CPP")
    if given:
        if not (Path(given) / "BUILD.json").is_file():
            raise AccessError(
                f"LORAJOB_LLAMA_CPP={given} holds no llama.cpp built by lorajob",
                "unset it, and the tools are built; or build there with `lorajob tools`",
            )
        return Path(given)
    folder = cache_folder() / "llama.cpp" / tools_key()
    return folder if (folder / "BUILD.json").is_file() else None


def require_compiler() -> str:
    """The C++ compiler's name. Raises AccessError where there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise AccessError(
        "there is no C++ compiler (looked for $CXX, c++, g++, clang++), and llama.cpp, which makes "
        "the GGUF files, has to be built with one",
        "install one (Debian, Ubuntu: apt-get install g++; macOS: xcode-select --install), or "
        "leave out export.gguf",
    )


def ensure_tools(observer: Observer) -> Path:
    """The finished tools, built now where they are missing.

    Raises AccessError without a compiler or where the source cannot be had, ServiceError where the
    registry fails.
    """
    found = find_tools()
    if found:
        return found
    require_compiler()
    final = cache_folder() / "llama.cpp" / tools_key()
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".building-") as name:
        work = Path(name)
        source = _unpack(_sdist(work), work / "source")
        tools = work / "tools"
        _compile(source, work / "build", observer)
        _collect(source, work / "build", tools)
        (tools / "BUILD.json").write_text(
            json.dumps({"package": PACKAGE, "version": VERSION, "sha256": SHA256,
                        "llama_cpp_commit": LLAMA_CPP_COMMIT, "cmake": CMAKE_FLAGS}, indent=2)
        )  # fmt: skip
        try:
            tools.rename(final)
        except OSError:
            if find_tools() is None:  # else another process was faster, with the same result
                raise
    return final


def _sdist(work: Path) -> Path:
    """The source archive, checked against its hash; from the registry that pip is set up for."""
    given = os.environ.get("LORAJOB_LLAMA_CPP_SDIST")
    if given:
        if not Path(given).is_file() or sha256_of(Path(given)) != SHA256:
            raise AccessError(
                f"LORAJOB_LLAMA_CPP_SDIST={given} is not {PACKAGE} {VERSION}'s source archive",
                f"its sha256 must be {SHA256}",
            )
        return Path(given)
    requirement = work / "llama.txt"
    requirement.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation",
               "--no-binary", ":all:", "--require-hashes", "-r", str(requirement),
               "-d", str(work / "sdist")]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    archives = list((work / "sdist").glob("*.tar.gz"))
    if done.returncode != 0 or not archives:
        raise ServiceError(
            f"the source of llama.cpp ({PACKAGE} {VERSION}) could not be fetched:\n"
            + "\n".join(done.stderr.strip().splitlines()[-5:]),
            "check that pip reaches its registry; on a closed network fetch the archive elsewhere "
            "and set LORAJOB_LLAMA_CPP_SDIST to it",
        )
    return archives[0]


def _unpack(archive: Path, target: Path) -> Path:
    with tarfile.open(archive) as tar:
        members = []
        for member in tar.getmembers():
            member.name = member.name.partition("/")[2]  # without the archive's top folder
            if _NEEDED.match(member.name):
                members.append(member)
        # Python 3.11 knows the argument only from 3.11.4 on, and Debian 12 has 3.11.2.
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        tar.extractall(target, members)  # noqa: S202 - the archive is known by its hash
    return target


def _program(name: str) -> str:
    """cmake or ninja: the locked package's, else the machine's."""
    found = shutil.which(
        name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if found is None:
        raise AccessError(f"{name} is missing", "install the locked packages: `make setup`")
    return found


def _compile(source: Path, build: Path, observer: Observer) -> None:
    log = build.parent / "build.log"
    configure = [_program("cmake"), "-S", str(Path(__file__).parent), "-B", str(build), "-G", "Ninja",
                 f"-DCMAKE_MAKE_PROGRAM={_program('ninja')}",
                 f"-DLLAMA_CPP_SOURCE={source / 'vendor' / 'llama.cpp'}",
                 *(f"-D{key}={value}" for key, value in CMAKE_FLAGS.items())]  # fmt: skip
    compile_ = [_program("cmake"), "--build", str(build), "--target", "llama"]
    with observer.ticker("building llama.cpp") as ticker, log.open("w") as file:
        for command in (configure, compile_):
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    file.write(line)
                    if step := re.match(r"\[(\d+)/(\d+)\]", line):
                        ticker.at(int(step[1]), int(step[2]))
            if process.returncode != 0:
                kept = cache_folder() / "llama.cpp" / "build-failed.log"
                file.flush()
                shutil.copy(log, kept)
                tail = "\n".join(log.read_text().splitlines()[-15:])
                raise AccessError(
                    f"llama.cpp could not be built:\n{tail}",
                    f"the whole log is {kept}; it needs a compiler for C++17",
                )


def _collect(source: Path, build: Path, tools: Path) -> None:
    llama = source / "vendor" / "llama.cpp"
    (tools / "llama_cpp").parent.mkdir()
    shutil.move(source / "llama_cpp", tools / "llama_cpp")
    libraries = tools / "llama_cpp" / "lib"
    libraries.mkdir(exist_ok=True)
    for path in (build / "bin").iterdir():
        if ".so" in path.name or path.suffix == ".dylib":
            shutil.copy2(path, libraries / path.name, follow_symlinks=False)
    for name in (
        "convert_hf_to_gguf.py",
        "convert_lora_to_gguf.py",
        "conversion",
        "gguf-py",
        "LICENSE",
    ):
        shutil.move(llama / name, tools / name)
    shutil.move(llama / "models" / "templates", tools / "templates")
