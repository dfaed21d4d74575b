"""One HTTP request that ends: however slowly a server sends, and wherever it points, the answer comes or is given up.

`urllib` waits anew for every byte, follows a redirect from https to http, reads what a redirect sends without end, and
lets a hostile header raise errors of many kinds.
"""

from __future__ import annotations

import http.client
import io
import re
import socket
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from typing import Any, cast
from urllib.parse import urlsplit

TIMEOUT = 20.0  # seconds for an answer: for each byte that a socket waits for, and for all headers together


class Refused(Exception):
    """A server's answer leads to no file; the message says what it answered."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status  # of HTTP, where it is the reason


class Lost(Exception):
    """The connection could not be made, or was lost."""


class Response(http.client.HTTPResponse):
    """An answer for which there is a deadline: `grant` moves it, at the deadline the connection is shut down."""

    def __init__(self, sock: socket.socket, *more: Any, **how: Any):
        super().__init__(sock, *more, **how)
        self._timer: threading.Timer | None = None
        self._socket = sock

    def begin(self) -> None:
        self.grant(TIMEOUT)
        super().begin()

    def grant(self, seconds: float) -> None:
        """Let the connection live for so many seconds from now."""
        self._cancel()
        self._timer = threading.Timer(seconds, self._hang_up)
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        self._cancel()
        super().close()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _hang_up(self) -> None:
        with suppress(OSError):  # it is closed already
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # an SSLSocket's own would drop the decryption


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(cast(Any, _timed(http.client.HTTPConnection)), request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(cast(Any, _timed(http.client.HTTPSConnection)), request)


def _timed(kind: type[http.client.HTTPConnection]) -> type[http.client.HTTPConnection]:
    return type(kind.__name__, (kind,), {"response_class": Response})


class _Redirects(urllib.request.HTTPRedirectHandler):
    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        fp.close()  # the handler of urllib would read all of its body
        return super().http_error_302(req, io.BytesIO(), code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        target = urlsplit(newurl)
        if target.scheme not in ("https", req.type):
            raise Refused(f"redirects from {req.type} to {target.scheme:.10}")
        if "@" in target.netloc:
            raise Refused("redirects to an address with a user's name")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def get(url: str, headers: dict[str, str]) -> Response:
    """The answer to a GET of `url`, http or https, redirects followed; its body is still to be read.

    Raises Refused or Lost, each with a message that follows the name of a host.
    """
    try:
        opener = urllib.request.build_opener(_Http, _Https, _Redirects)
        return opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise Refused(f"answered {error.code} {_brief(error.reason)}", error.code) from None
    except (OSError, http.client.HTTPException) as error:
        raise Lost(f"did not answer ({_brief(getattr(error, 'reason', error))})") from None
    except ValueError as error:  # an address that cannot be taken apart or encoded, of a redirect most likely
        raise Refused(f"leads to what is no address ({_brief(error)})") from None


def _brief(reason: object) -> str:
    return " ".join(str(reason).split())[:200] or repr(reason)[:200]


def without_user(address: str) -> str:
    """The address as it may be shown: without the name and password before its host."""
    return re.sub(r"//[^/?#]*@", "//", address)
