"""A server on this machine that answers in every way a download goes wrong, and no network at
all."""

import contextlib
import hashlib
import random
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

GOOD = random.Random(3).randbytes(70001)  # more than one block of the reader
GOOD_SHA = hashlib.sha256(GOOD).hexdigest()


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to connect fails at once, and is counted."""
    tries = []

    def refuse(self, address):
        tries.append(address)
        raise OSError("network blocked by the test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tries


@pytest.fixture
def server(monkeypatch):
    """A loopback server with one page per way a download goes wrong; .hits lists the paths asked
    for, and /stall ends when .go_on is set."""
    go_on = threading.Event()
    hits = []

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)
            if self.path == "/missing":
                return self.send_error(404)
            body = {"/wrong": GOOD[:-1] + b"?", "/silent_cut": GOOD[:-77]}.get(
                self.path, extra.get(self.path, GOOD)
            )
            self.send_response(200)
            if self.path != "/silent_cut":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body[:333] if self.path in ("/cut", "/stall") else body)
                self.wfile.flush()
                if self.path == "/stall":
                    go_on.wait(60)

        def log_message(self, *args):
            pass

    extra = {}
    http = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    http.go_on = go_on
    http.hits = hits
    http.extra = extra
    http.root = f"http://127.0.0.1:{http.server_address[1]}"
    yield http
    go_on.set()
    http.shutdown()
    http.server_close()
