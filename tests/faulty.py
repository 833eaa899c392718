"""A proxy before an object store, that does to the next requests what it is told: what networks and full stores do."""

import http.client
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import urlsplit

ERRORS = {"busy": (503, "SlowDown"), "denied": (403, "AccessDenied")}
FOR_EVER = 1 << 30


@dataclass
class Fault:
    """What becomes of some requests."""

    method: str
    """PUT, GET, HEAD, DELETE; LIST for a GET that lists; ANY."""
    how: str
    """dropped (unanswered), cut (off half-way), lost (done, but the answer is not heard), slow (2 s), busy (503) or denied (403)."""
    times: int
    about: str
    """In the address."""


@dataclass
class Faults:
    """Those to come, and those that have been."""

    coming: list[Fault] = field(default_factory=list)
    met: list[str] = field(default_factory=list)
    """METHOD, for each request that met a fault."""
    _lock: Lock = field(default_factory=Lock)

    def bring(self, method: str, how: str, times: int = 1, about: str = "") -> None:
        """From the next such request on."""
        self.coming.append(Fault(method, how, times, about))

    def of(self, method: str, path: str) -> str:
        """What becomes of this request: ``""`` for nothing unusual."""
        asked = "LIST" if method == "GET" and "list-type=2" in path else method
        with self._lock:
            for fault in self.coming:
                if fault.times and fault.method in (asked, "ANY") and fault.about in path:
                    fault.times -= 1
                    self.met.append(asked)
                    return fault.how
        return ""


@contextmanager
def faulty(address: str) -> Iterator[tuple[str, Faults]]:
    """The proxy's address, and what it is told."""
    faults = Faults()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            how = faults.of(self.command, self.path)
            if how == "dropped" or (how == "cut" and self.command != "GET"):
                sent = 2000 if "Transfer-Encoding" in self.headers else int(self.headers.get("Content-Length", 0))
                self.rfile.read(min(1000, sent // 2) if how == "cut" else 0)
                self.close_connection = True
                return
            body = self._body()
            if how in ERRORS:
                status, code = ERRORS[how]
                self._answer(status, {}, f"<Error><Code>{code}</Code><Message>as it was told</Message></Error>".encode())
                return
            time.sleep(2 if how == "slow" else 0)
            there = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
            kept = {name: value for name, value in self.headers.items() if name.lower() not in ("transfer-encoding", "content-length")}
            there.request(self.command, self.path, body, kept | {"Content-Length": str(len(body))})
            answer = there.getresponse()
            content = answer.read()
            there.close()
            if how == "lost":
                self.close_connection = True
                return
            self._answer(answer.status, dict(answer.getheaders()), content, half=how == "cut")

        def _body(self) -> bytes:
            if "Transfer-Encoding" not in self.headers:
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _answer(self, status: int, headers: dict[str, str], content: bytes, half: bool = False) -> None:
            self.send_response_only(status)
            kept = {name: value for name, value in headers.items() if name.lower() not in ("connection", "transfer-encoding")}
            kept |= {} if self.command == "HEAD" else {"Content-Length": str(len(content))}
            for name, value in kept.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if half else content)
            self.close_connection = half or self.close_connection

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass_on

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        server.shutdown()
        server.server_close()
