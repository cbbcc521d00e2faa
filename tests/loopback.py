"""A Hub on this machine, of as few routes as downloading needs, for the real client to talk to."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "89abcdef0123456789abcdef0123456789abcdef"
ERRORS = {"toys/gated": (403, "GatedRepo"), "toys/gone": (401, "RepoNotFound"), "toys/old": (404, "RevisionNotFound")}
DAMAGE: dict[str, bytes] = {}  # files that are sent with another content of the same length


def _entry(path: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": _git(data)}
    if path.endswith(".safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _git(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """Answers for repositories in `repos`, and with the Hub's errors for those of ERRORS."""

    repos: Mapping[str, Mapping[str, bytes]]
    asked: list[str]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo in ERRORS:
            status, code = ERRORS[repo]
            return self._send(status, b"{}", {"X-Error-Code": code})
        if repo not in self.repos:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = self.repos[repo]
        if rest[:1] == ["resolve"]:
            name = "/".join(rest[2:])
            oid = _entry(name, files[name])
            etag = oid["lfs"]["oid"] if "lfs" in oid else oid["oid"]  # type: ignore[index]
            return self._send(200, DAMAGE.get(name, files[name]), {"ETag": f'"{etag}"', "X-Repo-Commit": SHA})
        if rest[:1] == ["tree"]:
            return self._send(200, json.dumps([_entry(*item) for item in files.items()]).encode(), {})
        told = {"id": repo, "sha": SHA, "private": False, "siblings": [{"rfilename": name} for name in files]}
        return self._send(200, json.dumps(told).encode(), {})

    do_HEAD = do_GET

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@contextmanager
def hub(repos: Mapping[str, Mapping[str, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """A running Hub: its address and the paths asked for."""
    asked: list[str] = []
    handler = type("Handler", (Hub,), {"repos": repos, "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
