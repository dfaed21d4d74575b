"""Servers that mean no good, and addresses that are none: each is given up in one sentence, and in time."""

from __future__ import annotations

import contextlib
import hashlib
import io
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from test_download import CONTENT, NAME

from inception import download, web
from inception.download import DownloadError, Published, fetch
from inception.weights import find_weights


class Raw:
    """A server that answers each request with what `answer` writes to the socket."""

    def __init__(self, answer: Callable[[socket.socket], None]):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.answer = answer
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.recv(4096)
                self.answer(connection)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


def trickle(head: bytes, again: bytes, pause: float) -> Callable[[socket.socket], None]:
    """Send the head, then one thing again and again for at most 20 seconds."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        since = time.monotonic()
        while time.monotonic() - since < 20:
            connection.sendall(again)
            time.sleep(pause)

    return answer


@pytest.mark.parametrize(
    ("head", "again", "pause"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n", b"a", 0.05),
        (b"HTTP/1.1 200 OK\r\n", b"a", 0.05),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.0),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0", 0.05),
        (b"HTTP/1.1 302 Found\r\nLocation: /again\r\n\r\n", b"a", 0.05),
    ],
    ids=["body", "header", "continue", "chunk size", "redirect"],
)
def test_a_server_that_trickles_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, head: bytes, again: bytes, pause: float
) -> None:
    monkeypatch.setenv("MINIGRAD_DATA", str(tmp_path))
    monkeypatch.setattr(web, "TIMEOUT", 0.4)
    monkeypatch.setattr(download, "_PATIENCE", 0.3)
    server = Raw(trickle(head, again, pause))
    wanted = Published(NAME, len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), (f"{server.url}/a",), "a page")
    since = time.monotonic()
    with pytest.raises(DownloadError, match="no mirror delivered"):
        fetch((wanted,), quiet=True)
    assert time.monotonic() - since < 15
    server.close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", "a file of more bytes than there are"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\n\r\n", "leads to what is no address"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://" + b"a" * 70 + b".org/\r\n\r\n", "leads to what is no address"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://\xff\xfe.org/\r\n\r\n", "127.0.0.1"),
        (b"HTTP/1.1 302 Found\r\nLocation: ftp://127.0.0.1/a\r\n\r\n", "redirects from http to ftp"),
        (b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n", "answered 302 .*file:///etc/passwd"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://me:secret@127.0.0.1/a\r\n\r\n", "an address with a user's name"),
        (b"HTTP/1.1 302 Found\r\nLocation: /a\r\n\r\n", "answered 302"),
        (b"HTTP/1.1 404 \x1b[31mno\x07\r\n\r\n", r"answered 404 \\x1b\[31mno\\x07"),
        (b"nonsense\r\n\r\n", "did not answer"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n", "did not answer .got more than 100 headers"),
        (b"", "did not answer"),
    ],
)  # fmt: skip
def test_a_strange_answer_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: bytes, message: str
) -> None:
    monkeypatch.setenv("MINIGRAD_DATA", str(tmp_path))
    server = Raw(lambda connection: connection.sendall(answer))
    with pytest.raises(DownloadError, match=message) as caught:
        find_weights(f"{server.url}/a.pth#sha256={'ab' * 32}", quiet=True)
    server.close()
    assert str(caught.value).isprintable()
    assert "secret" not in str(caught.value)


def test_from_https_nothing_leads_to_http() -> None:
    """As urllib calls the handler when a server at an https address answers so."""
    request = urllib.request.Request("https://example.org/a.pth")
    for status in (301, 302, 303, 307, 308):
        with pytest.raises(web.Refused, match="redirects from https to http"):
            getattr(web._Redirects(), f"http_error_{status}")(
                request, io.BytesIO(), status, "Found", {"location": "http://example.org/a.pth"}
            )


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://example.org/googlenet-1378be20.pth", "8 digits of a hash are too few over http"),
        ("http://example.org/a.pth#sha256=" + "a" * 31, "31 digits of a hash are too few over http"),
        ("https://me:secret@example.org/a.pth#sha256=" + "a" * 64, "was given with a user's name or password"),
        ("https://me:secret@[::1/a.pth#sha256=" + "a" * 64, "is no address"),
        ("https://me:secret@example.org/a.pth", "was given with a user's name"),
        ("https://" + "a" * 70 + ".org/a.pth#sha256=" + "a" * 64, "is no address"),
        ("https://example.org/\udcff.pth#sha256=" + "a" * 64, "is no address"),
        ("https://\udcff.org/a.pth#sha256=" + "a" * 64, "is no address"),
        ("https:///a.pth#sha256=" + "a" * 64, "it names no host"),
        ("https://example.org/" + "a" * 300 + ".pth#sha256=" + "a" * 64, "its file name is too long"),
        ("https://example.org/cat.jpg", "is the address of a picture: download it"),
    ],
)
def test_addresses_that_are_refused(address: str, message: str) -> None:
    with pytest.raises(DownloadError, match=message) as caught:
        Published.at(address)
    assert "secret" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_eight_digits_pass_over_https_and_32_over_http() -> None:
    assert Published.at("https://download.pytorch.org/models/googlenet-1378be20.pth").sha256 == "1378be20"
    assert Published.at("http://example.org/a.pth#sha256=" + "a" * 32).sha256 == "a" * 32
    assert Published.at("https://münchen.example/a.pth#sha256=" + "a" * 64).mirrors == (
        "https://xn--mnchen-3ya.example/a.pth",
    )
