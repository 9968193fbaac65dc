"""A hub of data sets on this machine: as much of its HTTP interface as `datasets` asks for, over a folder of files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub_of(folder: Path) -> Iterator[str]:
    """Serves each FOLDER/ORG/NAME as a data set, and gives the address."""
    handler = type("Handler", (_Handler,), {"root": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    root: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._asked = self.rfile.read(int(self.headers.get("content-length", 0)))
        self._answer()

    def _answer(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "datasets"]:
            self._describe(self.root / parts[2] / parts[3], parts[4:])
        elif parts[0] == "datasets" and parts[3] == "resolve":
            self._file(self.root / parts[1] / parts[2], Path(*parts[5:]))
        else:
            self._send(404, b"{}")

    def _describe(self, repository: Path, asked: list[str]) -> None:
        if not repository.is_dir():
            self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif asked[:1] == ["revision"] and asked[1] not in ("main", COMMIT):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif asked[:1] == ["tree"]:
            under = repository.joinpath(*asked[2:])
            if under.is_dir():
                found = sorted(under.rglob("*") if "recursive=True" in self.path else under.glob("*"))
                self._send(200, json.dumps([_entry(repository, path) for path in found]).encode())
            else:
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        elif asked[:1] == ["paths-info"]:
            given = self._asked.decode()
            paths = json.loads(given)["paths"] if given.startswith("{") else parse_qs(given).get("paths", [])
            there = [repository / path for path in paths if (repository / path).exists()]
            self._send(200, json.dumps([_entry(repository, path) for path in there]).encode())
        else:
            every = sorted(path for path in repository.rglob("*") if path.is_file())
            files = [{"rfilename": str(path.relative_to(repository))} for path in every]
            name = f"{repository.parent.name}/{repository.name}"
            about = {"id": name, "sha": COMMIT, "siblings": files, "private": False, "tags": [], "downloads": 0}
            self._send(200, json.dumps(about).encode())

    def _file(self, repository: Path, name: Path) -> None:
        path = repository / name
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        content = path.read_bytes()
        self._send(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(repository: Path, path: Path) -> dict[str, object]:
    name = str(path.relative_to(repository))
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    content = path.read_bytes()
    return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}
