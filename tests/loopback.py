"""A Hub on this machine for the real client to talk to: repositories, commits, tags, LFS or Xet, accounts, bad days.

Accounts are the tokens of TOKENS. What a server can do wrong is set on the running `Hub`: `damage`, `cut`, `race`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from repository import Pointer, Repo, git, sha256, shard_files

TOKENS = {"hf_ann": ("ann", "write"), "hf_bob": ("bob", "write"), "hf_reader": ("ann", "read")}
STALE = "The branch was updated since you opened this page. Please refresh and try again."
LFS = (".safetensors", ".bin", ".model")


@dataclass
class Hub:
    """The server's state, and what it shall do wrong."""

    repos: dict[str, Repo] = field(default_factory=dict)
    address: str = ""
    asked: list[str] = field(default_factory=list)  # "METHOD /path", and " bytes=..." for a range
    stored: dict[str, bytes] = field(default_factory=dict)  # uploads by sha256
    xet: Path | None = None  # the folder of a local store: the client then uses Xet
    damage: dict[str, bytes] = field(default_factory=dict)  # sent instead of a file's content
    cut: dict[str, list[int]] = field(default_factory=dict)  # bytes after which the next answers break off
    race: Callable[[], None] | None = None  # what happens once between a push's look and its commit
    spoil: bool = False  # uploads are stored with a flipped bit

    def add(self, name: str, files: Mapping[str, bytes], **facts: bool) -> str:
        """A repository with one commit more; gives the commit."""
        repo = self.repos.setdefault(name, Repo(**facts))
        return repo.commit(files)

    def environment(self, home: Path, token: str = "") -> dict[str, str]:
        """Variables that send vgen here."""
        xet = {} if self.xet else {"HF_HUB_DISABLE_XET": "1"}
        quiet = {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_SYMLINKS_WARNING": "1",
        }
        where = {"HF_HOME": str(home), "HF_ENDPOINT": self.address, "HF_HUB_OFFLINE": "0", "VGEN_HOME": str(home)}
        return {**where, **xet, **quiet, **({"HF_TOKEN": token} if token else {})}

    def xet_hash(self, sha256: str) -> str | None:
        """The name that the local store of Xet gave to an upload, from the shards that it wrote."""
        for shard in sorted(self.xet.rglob("*.mdb")) if self.xet else ():
            found = shard_files(shard.read_bytes())
            if sha256 in found:
                return found[sha256]
        return None


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    """The routes that the client uses."""

    hub: Hub

    def respond(self) -> None:
        """Answer one request; every error as the Hub tells it."""
        split = urlsplit(self.path)
        parts = [unquote(part) for part in split.path.strip("/").split("/")]
        self.query = parse_qs(split.query)
        span = self.headers.get("Range", "")
        self.hub.asked.append(f"{self.command} {unquote(split.path)} {span}".strip())
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self._chunks()
        try:
            self._route(parts)
        except Refused as no:
            told = json.dumps({"error": no.message or no.code}).encode()
            headers = {"X-Error-Code": no.code, "X-Error-Message": no.message}
            self._send(no.status, told, {k: v for k, v in headers.items() if v})
        except (KeyError, ValueError, IndexError, AssertionError) as error:
            self._send(500, json.dumps({"error": repr(error)}).encode(), {})

    do_GET = do_HEAD = do_POST = do_PUT = respond

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _route(self, parts: list[str]) -> None:
        if parts[0] == "lfs":
            return self._lfs(parts)
        if parts[:2] == ["api", "validate-yaml"]:
            return self._validate()
        if parts[:3] == ["api", "repos", "create"]:
            return self._create()
        if parts == ["api", "models"]:
            return self._list()
        if parts[0] == "api" and parts[1] != "models":
            raise Refused(404, "", "no such route")
        if parts[0] == "api":
            name, rest = "/".join(parts[2:4]), parts[4:]
            repo = self._repo(name)
            verb = rest[0].replace("-", "_") if rest else "info"
            route = getattr(self, f"_api_{verb}", None)
            if route is None:
                raise Refused(404, "", f"no such route: {verb}")
            return route(name, repo, *rest[1:])
        name = "/".join(parts[:2])
        if parts[2:5] == ["info", "lfs", "objects"]:
            self._account()
            return self._batch()
        if parts[2] != "resolve":
            raise Refused(404, "", "no such route")
        return self._resolve(self._repo(name, files=True), parts[3], "/".join(parts[4:]))

    # Accounts

    def _account(self) -> tuple[str, str]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return TOKENS.get(token, ("", ""))

    def _repo(self, name: str, files: bool = False) -> Repo:
        user = self._account()[0]
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and name.partition("/")[0] != user):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if repo.gated and files and not user:
            raise Refused(401, "GatedRepo", "Access to this model is restricted.")
        return repo

    def _may_write(self, name: str) -> None:
        user, right = self._account()
        if right != "write" or name.partition("/")[0] != user:
            raise Refused(403, "", f"You don't have the rights to write to {name}.")

    def _commit_of(self, repo: Repo, revision: str) -> str:
        sha = repo.at(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    # Reading

    def _info(self, name: str, repo: Repo, sha: str) -> dict[str, Any]:
        siblings = [{"rfilename": path} for path in repo.trees[sha]]
        told = {"id": name, "sha": sha, "private": repo.private, "gated": repo.gated, "siblings": siblings}
        return {
            **told,
            "tags": sorted(map(str, repo.all_tags())),
            "downloads": 3,
            "lastModified": "2026-01-02T03:04:05.000Z",
        }

    def _api_info(self, name: str, repo: Repo) -> None:
        self._api_revision(name, repo, "main")

    def _api_revision(self, name: str, repo: Repo, revision: str) -> None:
        self._json(self._info(name, repo, self._commit_of(repo, revision)))

    def _api_tree(self, name: str, repo: Repo, revision: str) -> None:
        if repo.gated:
            self._repo(name, files=True)
        files = repo.trees[self._commit_of(repo, revision)]
        self._json([self._entry(path, data) for path, data in files.items()])

    def _api_paths_info(self, name: str, repo: Repo, revision: str) -> None:
        files = repo.trees[self._commit_of(repo, revision)]
        text = self.body.decode()
        wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        self._json([self._entry(path, files[path]) for path in wanted if path in files])

    def _entry(self, path: str, data: bytes | Pointer) -> dict[str, Any]:
        size = data.size if isinstance(data, Pointer) else len(data)
        entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": git(data)}
        if path.endswith(LFS):
            entry["lfs"] = {"oid": sha256(data), "size": size, "pointerSize": 130}
            if found := self.hub.xet_hash(sha256(data)):
                entry["xetHash"] = found
        return entry

    def _api_refs(self, name: str, repo: Repo) -> None:
        def told(kind: str, names: Mapping[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in names.items()]

        branches = {n: sha for n, sha in repo.names.items() if not n.startswith("refs/")}
        self._json({"branches": told("heads", branches), "tags": told("tags", repo.tags), "converts": []})

    def _list(self) -> None:
        user = self._account()[0]
        wanted, words = set(self.query.get("filter", [])), self.query.get("search", [""])[0]
        author, limit = self.query.get("author", [""])[0], int(self.query.get("limit", ["100"])[0])
        found = []
        for name, repo in self.hub.repos.items():
            seen = not repo.private or name.partition("/")[0] == user
            if seen and wanted <= repo.all_tags() and words in name and name.startswith(author):
                found.append(self._info(name, repo, repo.names["main"]))
        self._json(found[:limit])

    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        sha = self._commit_of(repo, revision)
        if path not in repo.trees[sha]:
            raise Refused(404, "EntryNotFound", "Entry not found")
        data = repo.trees[sha][path]
        entry = self._entry(path, data)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(entry["size"])}
        if "xetHash" in entry:
            token = f"{self.hub.address}/api/models/any/repo/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": entry["xetHash"], "Link": f'<{token}>; rel="xet-auth"'}
        data = self.hub.damage.get(path, b"" if isinstance(data, Pointer) else data)
        status = 200
        if span := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(span[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data = data[start:]
        stops = self.hub.cut.get(path) if self.command == "GET" else None
        self._send(status, data, headers, stops.pop(0) if stops else None)

    # Writing

    def _validate(self) -> None:
        text = json.loads(self.body)["content"]
        told = yaml.safe_load(text.split("---")[1])
        if not told.get("license"):
            self._send(400, json.dumps({"errors": [{"message": '"license" is required'}]}).encode(), {})
            return
        self._json({"errors": [], "warnings": []})

    def _create(self) -> None:
        told = json.loads(self.body)
        name = f"{told['organization']}/{told['name']}"
        self._may_write(name)
        if name in self.hub.repos:
            raise Refused(409, "", "You already created this model repo")
        self.hub.add(
            name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=told.get("visibility") == "private"
        )
        self._json({"url": f"{self.hub.address}/{name}"})

    def _api_preupload(self, name: str, repo: Repo, revision: str) -> None:
        self._account() if self.query.get("create_pr") else self._may_write(name)
        tree = repo.trees[self._commit_of(repo, revision)]
        race, self.hub.race = self.hub.race, None
        if race:
            race()
        found = []
        for one in json.loads(self.body)["files"]:
            path, mode = one["path"], "lfs" if one["path"].endswith(LFS) else "regular"
            oid = (sha256(tree[path]) if mode == "lfs" else git(tree[path])) if path in tree else None
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": found})

    def _batch(self) -> None:
        objects = []
        for one in json.loads(self.body)["objects"]:
            there = one["oid"] in self.hub.stored
            actions = {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}"}}
            objects.append({**one, **({} if there else {"actions": actions})})
        self._json({"transfer": "basic", "objects": objects})

    def _lfs(self, parts: list[str]) -> None:
        assert hashlib.sha256(self.body).hexdigest() == parts[1], "an upload that is not what it says"
        self.hub.stored[parts[1]] = self.body[:-1] + bytes([self.body[-1] ^ self.hub.spoil])
        self._json({})

    def _api_xet_write_token(self, name: str, repo: Repo, revision: str) -> None:
        self._account()
        self._json({"accessToken": "xet", "exp": 4_000_000_000, "casUrl": f"local://{self.hub.xet}"})

    def _api_xet_read_token(self, name: str, repo: Repo, revision: str) -> None:
        where = {"X-Xet-Cas-Url": f"local://{self.hub.xet}", "X-Xet-Access-Token": "xet"}
        self._send(200, b"{}", {**where, "X-Xet-Token-Expiration": "4000000000"})

    def _api_commit(self, name: str, repo: Repo, revision: str) -> None:
        proposal = bool(self.query.get("create_pr"))
        self._account() if proposal else self._may_write(name)
        lines = [json.loads(line) for line in self.body.splitlines()]
        head = self._commit_of(repo, revision)
        if lines[0]["value"].get("parentCommit", head) != head:
            raise Refused(412, "", STALE)
        tree = dict(repo.trees[head])
        for line in lines[1:]:
            told = line["value"]
            if line["key"] == "deletedFile":
                del tree[told["path"]]
            elif line["key"] == "file":
                tree[told["path"]] = base64.b64decode(told["content"])
            else:
                uploaded = self.hub.stored.get(told["oid"])
                assert uploaded or self.hub.xet_hash(told["oid"]), "a commit of what was never uploaded"
                tree[told["path"]] = uploaded or Pointer(told["oid"], told["size"])
        number = 1 + sum(one.startswith("refs/pr/") for one in repo.names)
        sha = repo.commit(tree, f"refs/pr/{number}" if proposal else revision)
        url = f"{self.hub.address}/{name}"
        more = {"pullRequestUrl": f"{url}/discussions/{number}"} if proposal else {}
        self._json({"commitUrl": f"{url}/commit/{sha}", "commitOid": sha, "success": True, **more})

    def _api_tag(self, name: str, repo: Repo, revision: str) -> None:
        self._may_write(name)
        tag = json.loads(self.body)["tag"]
        if tag in repo.tags:
            raise Refused(409, "", f"Tag reference exists already: {tag}")
        repo.tags[tag] = self._commit_of(repo, revision)
        self._json({})

    def _api_branch(self, name: str, repo: Repo, branch: str) -> None:
        self._may_write(name)
        repo.names[branch] = repo.names["main"]
        self._json({})

    # Answers

    def _json(self, told: Any) -> None:
        self._send(200, json.dumps(told).encode(), {})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], stop: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:stop])

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@contextmanager
def hub(repos: Mapping[str, Mapping[str, bytes]] | None = None, xet: Path | None = None) -> Iterator[Hub]:
    """A running Hub with these repositories, each of one commit."""
    state = Hub(xet=xet)
    for name, files in (repos or {}).items():
        state.add(name, files)
    handler = type("Bound", (Handler,), {"hub": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        state.address = f"http://127.0.0.1:{server.server_port}"
        yield state
        server.shutdown()
