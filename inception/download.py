"""Published files: fetched once from whichever mirror answers, checked by their hash, kept in the cache directory."""

from __future__ import annotations

import hashlib
import http.client
import mimetypes
import os
import re
import string
import time
from io import BufferedRandom
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from inception import web
from inception.console import progress
from inception.files import open_file
from inception.web import Lost, Refused, get, without_user
from minigrad.errors import MinigradError

_PATIENCE = 10.0  # seconds over which the speed is measured
_SLOWEST = 250_000  # bytes per second; below, another mirror is tried first
_LEAST = 1_000  # bytes per second; below, the mirror is given up
_TRIES = 3  # of one mirror, if the connection breaks
_CHUNK = 1 << 18
_LONG_HASH = 32  # hexadecimal digits that nobody can match with another file
_LONGEST_NAME = 200  # bytes of a file's name; file systems allow 255, the part that has arrived adds some


class DownloadError(MinigradError):
    """A published file could not be had, or is not what it should be."""


class Published(NamedTuple):
    """A file that its authors published, and where it can be had. What it holds is named by its SHA-256."""

    name: str  # in the cache directory
    size: int | None  # bytes; None: as many as the mirror says
    sha256: str  # hexadecimal, or its first digits
    mirrors: tuple[str, ...]
    page: str  # where a person finds it

    @classmethod
    def at(cls, address: str) -> Published:
        """The file at ADDRESS#sha256=DIGITS, or at one whose name ends in its hash, as torchvision's do
        (…/googlenet-1378be20.pth). Over https at least eight digits are wanted, over http 32: eight can be forged.

        Raises DownloadError where the address is none, names a user, or no hash.
        """
        shown = without_user(address)
        url, _, fragment = address.partition("#")
        try:
            parts = urlsplit(url)
            name = PurePosixPath(unquote(parts.path)).name
            host = (parts.hostname or "").encode("idna")
            url = quote(url.replace(parts.netloc, parts.netloc.encode("idna").decode(), 1), safe=string.punctuation)
        except ValueError as error:
            raise DownloadError(f"{shown:.200} is no address ({' '.join(str(error).split()):.200})") from None
        if shown != address:
            raise DownloadError(f"{shown} was given with a user's name or password, which is not sent: download it")
        if not host or "\0" in name or len(name.encode()) > _LONGEST_NAME:
            reason = "it names no host" if not host else "its file name is too long or holds a zero byte"
            raise DownloadError(f"{shown:.200} is no address: {reason}")
        if (mimetypes.guess_type(name)[0] or "").startswith("image/"):
            raise DownloadError(f"{shown} is the address of a picture: download it, then name the file")
        given = re.fullmatch(r"sha256=([0-9a-fA-F]{8,64})", fragment)
        in_name = re.fullmatch(r".+-([0-9a-f]{8,64})\.\w+", name)
        digits = given or (in_name if not fragment else None)
        if not name or digits is None:
            raise DownloadError(
                f"{shown} does not say what the file must hold: add #sha256= and at least eight digits of its SHA-256"
            )
        sha256 = digits[1].lower()
        if parts.scheme != "https" and len(sha256) < _LONG_HASH:
            raise DownloadError(
                f"{shown}: {len(sha256)} digits of a hash are too few over {parts.scheme}, where anyone on the way can "
                f"send another file: use https, or add #sha256= and all 64 digits"
            )
        if given:  # files of one name from two places are kept apart
            name = f"{PurePosixPath(name).stem}-{sha256[:8]}{PurePosixPath(name).suffix}"
        return cls(name, None, sha256, (url,), url)


class _Failed(Exception):
    """A mirror did not deliver; the message says what it did."""


class _Broken(_Failed):
    """The connection was lost, or there was none."""


class _Slow(_Failed):
    """It delivers, but others may be faster."""


def cache_directory() -> Path:
    """MINIGRAD_DATA, or ~/.cache/inception-minigrad. Raises DownloadError if that needs a home, and there is none."""
    try:
        return Path(os.environ.get("MINIGRAD_DATA") or "~/.cache/inception-minigrad").expanduser()
    except RuntimeError:
        raise DownloadError("there is no home directory: set MINIGRAD_DATA to one where data may be kept") from None


def fetch(files: tuple[Published, ...], *, quiet: bool = False) -> Path:
    """The path of the first of `files` in the cache directory; downloaded if none of them is there.

    The mirrors are tried in turn, the slow ones last. What has arrived is kept in NAME.part and continued by the
    next mirror or the next run; the file gets its name once its checksum is right, so it is whole or absent. Of
    several processes one downloads, the others wait for it.
    Raises DownloadError saying what each mirror did, and which file to put where to do without.
    """
    folder = cache_directory()
    try:
        for wanted in files:
            path = folder / wanted.name
            if path.exists():
                with open_file(path, DownloadError) as file:
                    if not _is(wanted, file):
                        raise DownloadError(f"{path} is not the published file (wrong SHA-256): remove or replace it")
                return path
        folder.mkdir(parents=True, exist_ok=True)
        untried = [(wanted, url) for wanted in files for url in wanted.mirrors]
        problems = []
        for slowest in (_SLOWEST, _LEAST):
            slow = []
            for wanted, url in untried:
                try:
                    return _complete(wanted, url, folder, slowest, quiet)
                except _Slow as failure:
                    slow.append((wanted, url))
                    if slowest == _LEAST:
                        problems.append(f"{urlsplit(url).netloc} {failure}")
                except _Failed as failure:
                    problems.append(f"{urlsplit(url).netloc} {failure}")
            untried = slow
    except OSError as error:
        raise DownloadError(
            f"{error.filename or folder} cannot be used ({error.strerror}): "
            f"set MINIGRAD_DATA to a directory where data may be kept"
        ) from error
    names = " or ".join(wanted.name for wanted in files)
    raise DownloadError(
        f"no mirror delivered ({'; '.join(dict.fromkeys(problems))}): try again, or put {names} into {folder} "
        f"(from {files[0].page})"
    )


def _is(wanted: Published, file: Any) -> bool:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest().startswith(wanted.sha256)


def _complete(wanted: Published, url: str, folder: Path, slowest: int, quiet: bool) -> Path:
    path = folder / wanted.name
    with open(folder / f"{wanted.name}.part", "a+b") as part:
        _lock(part)
        if not path.exists():  # else another process was faster
            _from_mirror(url, wanted, part, slowest, quiet)
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


def _from_mirror(url: str, wanted: Published, part: BufferedRandom, slowest: int, quiet: bool) -> None:
    """Complete `part` from one mirror, by several requests if the connection breaks."""
    for tries_left in reversed(range(_TRIES)):
        already = part.seek(0, os.SEEK_END)
        whole = already == wanted.size if wanted.size else already > 0 and _is(wanted, part)
        try:
            if not whole:
                _receive(url, wanted, part, slowest, quiet)
        except _Broken:
            if not tries_left or part.tell() <= already:
                raise
            continue
        if _is(wanted, part):
            return
        _empty(part)
        if not already:  # else it may be the other bytes that were wrong: once more, without them
            break
    raise _Failed("sent a file that is not the published one (wrong SHA-256)")


def _receive(url: str, wanted: Published, part: BufferedRandom, slowest: int, quiet: bool) -> None:
    """Append to `part` what it lacks, or all of it, as the mirror likes."""
    already = part.tell()
    headers = {"User-Agent": "inception-minigrad"} | ({"Range": f"bytes={already}-"} if already else {})
    try:
        response = get(url, headers)
    except Refused as refused:
        if refused.status == 416 and already:  # there is more in `part` than the file has
            _empty(part)
            return _receive(url, wanted, part, slowest, quiet)
        raise _Failed(str(refused)) from None
    except Lost as lost:
        raise _Broken(str(lost)) from None
    with response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {already}-"):
            if response.status == 206:
                raise _Failed("sent another part of the file than asked for")
            already = _empty(part)
        length = response.headers.get("Content-Length", "")
        if len(length) > 15:
            raise _Failed("offered a file of more bytes than there are")
        offered = already + int(length) if length.isdecimal() else None
        size = wanted.size or offered
        if size is None:
            raise _Failed("does not say how many bytes the file has")
        if offered not in (None, size):
            raise _Failed(f"offered a file of {offered:,} bytes instead of {size:,}")
        with progress(wanted.name, size, unit="B", quiet=quiet, initial=already, unit_scale=True) as bar:
            response.grant(_PATIENCE + web.TIMEOUT)
            arrived, since = 0, time.monotonic()
            while True:
                try:
                    chunk = response.read1(_CHUNK)
                except (OSError, ValueError, http.client.HTTPException) as error:
                    raise _Broken(f"broke off after {part.tell():,} bytes ({error!s:.200})") from None
                if not chunk:
                    break
                part.write(chunk)
                bar.update(len(chunk))
                if part.tell() > size:
                    _empty(part)
                    raise _Failed(f"sent more than {size:,} bytes")
                arrived += len(chunk)
                seconds = time.monotonic() - since
                if seconds >= _PATIENCE:
                    if arrived < slowest * seconds:
                        raise _Slow(f"sends {arrived / seconds:,.0f} bytes a second")
                    arrived, since = 0, time.monotonic()
                    response.grant(_PATIENCE + web.TIMEOUT)
    part.flush()
    if part.tell() < size:
        raise _Broken(f"broke off after {part.tell():,} bytes")
