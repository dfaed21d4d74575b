"""Downloads, from a server on this machine: every way a mirror can fail, and that the next run needs none."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from inception import download, web
from inception.__main__ import main
from inception.data.cifar import CIFAR10, CIFAR100
from inception.download import DownloadError, Published, fetch
from inception.weights import find_weights, load_model, shipped

CONTENT = os.urandom(300_000)
NAME = "some.tar.gz"
Behave = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    paths: dict[str, Behave]
    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.asked.append((self.path.strip("/"), self.headers.get("Range")))
        self.paths[self.path.strip("/")](self)

    def log_message(self, *_: object) -> None: ...

    def start(self) -> int:
        """The headers of a server that continues; returns where."""
        begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - begin))
        self.end_headers()
        return begin


def good(h: Handler) -> None:
    h.wfile.write(CONTENT[h.start() :])


def breaks(h: Handler) -> None:
    begin = h.start()
    h.wfile.write(CONTENT[begin : begin + 110_000])


def without_range(h: Handler) -> None:
    send(h, CONTENT)


def in_small_pieces(h: Handler) -> None:
    """From the beginning, whatever was asked for; the first piece is smaller than a file's buffer."""
    h.send_response(200)
    h.end_headers()
    for i in range(0, len(CONTENT), 150_000):
        h.wfile.write(CONTENT[i : i + 100])
        h.wfile.flush()
        time.sleep(0.02)
        h.wfile.write(CONTENT[i + 100 : i + 150_000])


def wrong(h: Handler) -> None:
    h.wfile.write(bytes(len(CONTENT) - h.start()))


def half_wrong(h: Handler) -> None:
    h.start()
    h.wfile.write(bytes(1000))


def missing(h: Handler) -> None:
    h.send_error(404)


def page(h: Handler) -> None:
    h.send_response(200)
    h.send_header("Content-Length", "14")
    h.end_headers()
    h.wfile.write(b"<html>no</html>"[:14])


def endless(h: Handler) -> None:
    h.send_response(200)
    h.end_headers()
    h.wfile.write(CONTENT * 2)


def silent(h: Handler) -> None:
    h.start()
    time.sleep(1)


def slow(h: Handler) -> None:
    begin = h.start()
    for i in range(begin, len(CONTENT), 50_000):
        h.wfile.write(CONTENT[i : i + 50_000])
        time.sleep(0.12)


def other_part(h: Handler) -> None:
    h.send_response(206)
    h.send_header("Content-Range", f"bytes 7-{len(CONTENT) - 1}/{len(CONTENT)}")
    h.end_headers()


def send(h: Handler, content: bytes) -> None:
    h.send_response(200)
    h.send_header("Content-Length", str(len(content)))
    h.end_headers()
    h.wfile.write(content)


def refuses_more(h: Handler) -> None:
    """As `good`, and says so where there is nothing to continue."""
    if int((h.headers.get("Range") or "bytes=0-")[6:-1]) >= len(CONTENT):
        h.send_error(416)
    else:
        good(h)


class Server:
    """Mirrors by name, and what was asked of them."""

    def __init__(self, url: str, handler: type[Handler]):
        self.url, self.asked, self.paths = url, handler.asked, handler.paths

    def archive(self, *mirrors: str) -> Published:
        digest = hashlib.sha256(CONTENT).hexdigest()
        return Published(NAME, len(CONTENT), digest, tuple(f"{self.url}/{name}" for name in mirrors), "a page")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    behaviours = [
        good,
        breaks,
        without_range,
        in_small_pieces,
        wrong,
        half_wrong,
        missing,
        page,
        endless,
        silent,
        slow,
        other_part,
        refuses_more,
    ]
    handler = type("H", (Handler,), {"paths": {b.__name__: b for b in behaviours}, "asked": []})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("MINIGRAD_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield Server(f"http://127.0.0.1:{httpd.server_port}", handler)
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_the_second_run_asks_nobody(server: Server, tmp_path: Path) -> None:
    archive = server.archive("good")
    path = fetch((archive,), quiet=True)
    assert path == tmp_path / "cache" / NAME
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == [NAME]
    assert fetch((archive,), quiet=True) == path
    assert server.asked == [("good", None)]


def test_a_broken_connection_is_continued(server: Server) -> None:
    assert fetch((server.archive("breaks"),), quiet=True).read_bytes() == CONTENT
    assert server.asked == [("breaks", None), ("breaks", "bytes=110000-"), ("breaks", "bytes=220000-")]


@pytest.mark.parametrize("then", ["good", "without_range", "in_small_pieces"])
@pytest.mark.parametrize("had", [1, 123_456, len(CONTENT) - 1])
def test_an_interrupted_run_is_continued_by_the_next(server: Server, tmp_path: Path, then: str, had: int) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{NAME}.part").write_bytes(CONTENT[:had])
    assert fetch((server.archive(then),), quiet=True).read_bytes() == CONTENT
    assert server.asked == [(then, f"bytes={had}-")]
    assert os.listdir(tmp_path / "cache") == [NAME]


@pytest.mark.parametrize("beginning", [bytes(5000), CONTENT[:-1] + b"!", CONTENT + b"more"])
def test_a_wrong_beginning_is_thrown_away(server: Server, tmp_path: Path, beginning: bytes) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{NAME}.part").write_bytes(beginning)
    assert fetch((server.archive("good"),), quiet=True).read_bytes() == CONTENT


def test_a_whole_part_needs_no_network(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{NAME}.part").write_bytes(CONTENT)
    assert fetch((server.archive("missing"),), quiet=True).read_bytes() == CONTENT
    assert server.asked == []


@pytest.mark.parametrize(
    ("mirror", "what"),
    [
        ("missing", "answered 404"),
        ("wrong", "not the published one"),
        ("half_wrong", "broke off after 3,000 bytes"),
        ("page", "14 bytes instead of 300,000"),
        ("endless", "more than 300,000 bytes"),
        ("silent", "broke off after 0 bytes"),
        ("other_part", "another part"),
    ],
)
def test_a_bad_mirror_is_left_for_the_next_and_named_if_it_is_the_last(
    monkeypatch: pytest.MonkeyPatch, server: Server, tmp_path: Path, mirror: str, what: str
) -> None:
    if mirror == "silent":
        monkeypatch.setattr(web, "TIMEOUT", 0.4)
    with pytest.raises(DownloadError, match=what) as caught:
        fetch((server.archive(mirror),), quiet=True)
    message = str(caught.value)
    assert f"({server.url.removeprefix('http://')} " in message
    assert f"put {NAME} into {tmp_path / 'cache'}" in message
    assert not (tmp_path / "cache" / NAME).exists()
    assert fetch((server.archive(mirror, "good"),), quiet=True).read_bytes() == CONTENT


@pytest.fixture
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_PATIENCE", 0.2)
    monkeypatch.setattr(download, "_SLOWEST", 1_000_000)


def test_a_slow_mirror_waits_for_the_others_to_fail(server: Server, impatience: None) -> None:
    assert fetch((server.archive("slow", "good"),), quiet=True).read_bytes() == CONTENT
    assert [name for name, _ in server.asked] == ["slow", "good"]
    assert server.asked[1][1] is not None  # what it had sent was not lost


def test_a_slow_mirror_is_better_than_none(server: Server, impatience: None) -> None:
    assert fetch((server.archive("slow", "missing"),), quiet=True).read_bytes() == CONTENT
    assert [name for name, _ in server.asked] == ["slow", "missing", "slow"]


def test_offline_the_file_can_be_put_there_by_hand(
    monkeypatch: pytest.MonkeyPatch, server: Server, tmp_path: Path
) -> None:
    archive = server.archive("good")._replace(mirrors=("http://127.0.0.1:9/x",))  # nobody listens on 9
    other = archive._replace(name="other.tar.gz")
    with pytest.raises(DownloadError, match=f"did not answer.*put {NAME} or other.tar.gz into"):
        fetch((archive, other), quiet=True)
    (tmp_path / "cache" / other.name).write_bytes(CONTENT)
    assert fetch((archive, other), quiet=True) == tmp_path / "cache" / other.name
    (tmp_path / "cache" / other.name).write_bytes(CONTENT[1:])
    with pytest.raises(DownloadError, match=r"other.tar.gz is not the published file"):
        fetch((archive, other), quiet=True)
    assert (tmp_path / "cache" / other.name).read_bytes() == CONTENT[1:]  # it is the user's


def test_a_second_archive_stands_in_for_a_first_that_is_missing_or_slow(server: Server, impatience: None) -> None:
    second = server.archive("good")._replace(name="second.tar.gz")
    assert fetch((server.archive("missing", "slow"), second), quiet=True).name == "second.tar.gz"
    assert [name for name, _ in server.asked] == ["missing", "slow", "good"]


def test_two_at_once_download_once(server: Server) -> None:
    archive = server.archive("slow")
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch((archive,), quiet=True))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in paths] == [CONTENT] * 3
    assert len([1 for _, start in server.asked if start is None]) == 1


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINIGRAD_DATA", str(tmp_path / "file" / "below"))
    with pytest.raises(DownloadError, match=r"cannot be used.*set MINIGRAD_DATA"):
        fetch((server.archive("good"),), quiet=True)
    assert server.asked == []


def test_a_progress_bar_unless_quiet(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    fetch((server.archive("breaks"),))
    assert NAME in capfd.readouterr().err


@pytest.mark.parametrize("archives", [CIFAR10, CIFAR100])
def test_the_published_archives_are_well_formed(archives: tuple[Published, ...]) -> None:
    for archive in archives:
        assert len(bytes.fromhex(archive.sha256)) == 32
        assert all(url.startswith("https://") and url.endswith(f"/{archive.name}") for url in archive.mirrors)


# ---- Weights, by address and hash ----


def address(server: Server, name: str, *, digits: int = 64) -> str:
    return f"{server.url}/{name}#sha256={hashlib.sha256(CONTENT).hexdigest()[:digits].upper()}"


@pytest.mark.parametrize("digits", [32, 63, 64])
def test_weights_by_address_are_fetched_once(server: Server, tmp_path: Path, digits: int) -> None:
    path = find_weights(address(server, "good", digits=digits), quiet=True)
    assert path.read_bytes() == CONTENT
    assert path.name == f"good-{hashlib.sha256(CONTENT).hexdigest()[:8]}"
    assert find_weights(address(server, "good", digits=digits), quiet=True) == path
    assert server.asked == [("good", None)]


def test_a_hash_in_the_name_is_enough(server: Server, tmp_path: Path) -> None:
    name = f"net-{hashlib.sha256(CONTENT).hexdigest()[:32]}.pth"
    server.paths[name] = good
    assert find_weights(f"{server.url}/{name}", quiet=True) == tmp_path / "cache" / name
    wrong = f"net-{'12345678' * 4}.pth"
    server.paths[wrong] = good
    with pytest.raises(DownloadError, match=rf"wrong SHA-256.*put {wrong} into .*cache \(from http://127"):
        find_weights(f"{server.url}/{wrong}", quiet=True)
    assert not (tmp_path / "cache" / wrong).exists()


@pytest.mark.parametrize(
    "wrong", ["", "#sha256=", "#sha256=1234567", "#sha256=" + "0" * 65, "#sha256=xyzxyzxy", "#md5=0123456789abcdef"]
)
def test_an_address_without_a_hash_is_refused(server: Server, wrong: str) -> None:
    with pytest.raises(DownloadError, match=r"add #sha256= and at least eight digits"):
        find_weights(f"{server.url}/good{wrong}", quiet=True)
    assert server.asked == []


@pytest.mark.parametrize(
    ("then", "had"),
    [("good", 1), ("good", 123_456), ("without_range", 123_456), ("refuses_more", 9), ("refuses_more", 300_005)],
)
def test_of_unknown_size_too_an_interrupted_run_is_continued(
    server: Server, tmp_path: Path, then: str, had: int
) -> None:
    wanted = Published.at(address(server, then))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{wanted.name}.part").write_bytes((CONTENT + b"more!")[:had])
    assert fetch((wanted,), quiet=True).read_bytes() == CONTENT
    assert os.listdir(tmp_path / "cache") == [wanted.name]


def test_a_file_of_any_length_is_not_begun(server: Server) -> None:
    with pytest.raises(DownloadError, match="does not say how many bytes"):
        find_weights(address(server, "endless"), quiet=True)


def test_a_whole_part_of_unknown_size_needs_no_network(server: Server, tmp_path: Path) -> None:
    wanted = Published.at(address(server, "missing"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{wanted.name}.part").write_bytes(CONTENT)
    assert fetch((wanted,), quiet=True).read_bytes() == CONTENT
    assert server.asked == []


def test_offline_weights_are_asked_for_by_name(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    digits = "#sha256=" + "ab" * 32
    assert main(["predict", f"http://127.0.0.1:9/net.pth{digits}", "picture.png"]) == 1
    error = capsys.readouterr().err
    assert "did not answer" in error
    assert f"put net-abababab.pth into {tmp_path / 'cache'} (from http://127.0.0.1:9/net.pth)" in error


@pytest.mark.parametrize("command", ["evaluate", "predict", "predict --weights", "export"])
def test_commands_take_an_address(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture, command: str) -> None:
    weights, picture, data = shipped("googlenet_small_shapes"), tmp_path / "picture.png", tmp_path / "few.npz"
    server.paths["net.safetensors"] = lambda h: send(h, weights.read_bytes())
    few, labels = np.zeros((10, 32, 32, 3), np.uint8), np.arange(10)
    names = load_model(weights)[1]["classes"]
    np.savez(data, x_train=few, y_train=labels, x_test=few, y_test=labels, classes=names)
    pytest.importorskip("PIL.Image").fromarray(few[0]).save(picture)
    more = {"evaluate": ["--data", data], "export": ["--to", tmp_path / "net.npz"]}.get(command, [picture])
    digits = hashlib.sha256(weights.read_bytes()).hexdigest()
    place = f"{server.url}/net.safetensors#sha256={digits}"
    assert main([*command.split(), place, *map(str, more), "--json"]) == 0
    assert (tmp_path / "cache" / f"net-{digits[:8]}.safetensors").exists()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("place", ["http://[::1/a.pth", "http://127.0.0.1:9/a%00.pth"])
def test_what_is_no_address(place: str) -> None:
    with pytest.raises(DownloadError, match="is no address"):
        Published.at(f"{place}#sha256=12345678")


def test_an_address_as_a_browser_shows_it() -> None:
    wanted = Published.at("https://example.org/é/ñ%20.pth?x=1&y=ü#sha256=12345678")
    assert wanted.mirrors == ("https://example.org/%C3%A9/%C3%B1%20.pth?x=1&y=%C3%BC",)


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has no name."""
    monkeypatch.delenv("MINIGRAD_DATA", raising=False)
    monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(DownloadError, match="there is no home directory: set MINIGRAD_DATA"):
        download.cache_directory()
