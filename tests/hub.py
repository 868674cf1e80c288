"""A small hub on localhost that answers the clients of huggingface_hub and datasets."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """The files of each commit, and the commit of each branch and tag."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]


@dataclass
class Hub:
    """Repos by "models/owner/name" or "datasets/owner/name", and what was asked of them."""

    repos: dict[str, Repo]
    requests: list[str] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does; a subclass names the `hub`."""

    hub: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

    def answer(self, body: dict[str, Any]) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] == "api":
            parts.pop(0)
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        name, rest = "/".join(parts[:2]), parts[2:]
        if f"{kind}/{name}" not in self.hub.repos:
            return self.refuse("RepoNotFound")
        repo = self.hub.repos[f"{kind}/{name}"]
        what, revision, *path = [*rest, "main"] if len(rest) == 1 else rest or ["revision", "main"]
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self.refuse("RevisionNotFound")
        files = repo.commits[commit]
        if what == "revision":
            siblings = [{"rfilename": file} for file in files]
            info = {"_id": "1", "id": name, "sha": commit, "siblings": siblings}
            return self.send(json.dumps(info | {"private": False, "tags": []}).encode())
        if what in ("tree", "paths-info"):
            asked = body.get("paths", files)
            entries = [_entry(file, content) for file, content in files.items() if file in asked]
            return self.send(json.dumps(entries).encode())
        if what == "resolve" and "/".join(path) in files:
            return self.send(files["/".join(path)], commit)
        return self.refuse("EntryNotFound", commit)

    def refuse(self, code: str, commit: str = "") -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, content: bytes, commit: str = "") -> None:
        tag, size, asked = _hash(content), len(content), self.headers.get("Range")
        self.send_response(206 if asked else 200)
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            content = content[int(first) : int(last) + 1 if last else None]
            end = int(first) + len(content) - 1
            self.send_header("Content-Range", f"bytes {first}-{end}/{size}")
        if commit:
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{tag}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _hash(content)}


@contextmanager
def serve(hub: Hub) -> Iterator[None]:
    """Answer for a hub, at its `url`, while the body runs."""
    handler = type("Answering", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
