"""A small Hugging Face Hub on this machine: repositories that are folders, through the routes that clients call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """`refused` are repositories with the status and the error code that the Hub answers with."""

    daemon_threads = True

    def __init__(self, url: str, repositories: Mapping[str, Path], refused: Mapping[str, tuple[int, str]]) -> None:
        super().__init__(("127.0.0.1", urlsplit(url).port or 0), _Handler)
        self.repositories, self.refused = repositories, refused
        self.requests: list[str] = []

    def stop(self) -> None:
        """From here on nobody reaches it."""
        self.shutdown()
        self.server_close()

    @property
    def downloaded(self) -> set[str]:
        """The files that were read, by their paths in their repositories."""
        return {request.split("/resolve/")[1].split("/", 1)[1] for request in self.requests if "/resolve/" in request}


@contextmanager
def serve_hub(
    url: str, repositories: Mapping[str, Path], refused: Mapping[str, tuple[int, str]] | None = None
) -> Iterator[HubServer]:
    """`url` is that of a port of this machine."""
    server = HubServer(url, repositories, refused or {})
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.stop()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.server.requests.append(unquote(self.path))
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if is_api else parts
        repository = f"{owner}/{name}"
        if repository in self.server.refused:
            self._send(b"{}", *self.server.refused[repository])
        elif repository not in self.server.repositories:
            self._send(b"{}", 401, "RepoNotFound")
        elif is_api:
            self._send(json.dumps(self._described(repository, rest)).encode())
        else:
            file = self.server.repositories[repository].joinpath(*rest[2:])
            found = file.is_file()
            self._send(file.read_bytes() if found else b"", 200 if found else 404, "" if found else "EntryNotFound")

    def _described(self, repository: str, rest: list[str]) -> object:
        folder = self.server.repositories[repository]
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = [file.relative_to(folder).as_posix() for file in files]
        if rest[:1] == ["tree"]:
            return [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _digest(file.read_bytes())}
                for name, file in zip(names, files, strict=True)
            ]
        return {"id": repository, "sha": REVISION, "siblings": [{"rfilename": name} for name in names]}

    def _send(self, body: bytes, status: int = 200, code: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{_digest(body)}"')
        self.send_header("X-Repo-Commit", REVISION)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _digest(body: bytes) -> str:
    return hashlib.sha1(body, usedforsecurity=False).hexdigest()
