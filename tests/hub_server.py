"""A small hub on this machine, for the real library: reading, uploading, large files, failures."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Files = dict[str, bytes]
_API = re.compile(
    r"/api/(?P<kind>model|dataset)s/(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<what>revision|tree)/(?P<rev>.+))?"
)
_FILE = re.compile(
    r"/(?P<kind>datasets/)?(?P<name>[\w.-]+/[\w.-]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)"
)
_UPLOAD = re.compile(
    r"(?:/api/models)?/(?P<name>[\w.-]+/[\w-][\w.-]*?)(?:\.git/info/lfs/objects/batch|/(?P<what>preupload/main|commit/main))"
)


def commit_of(files: Files) -> str:
    """A commit's name, which its files decide."""
    content = hashlib.sha1()
    for name in sorted(files):
        content.update(name.encode() + files[name])
    return content.hexdigest()


@dataclass
class Repository:
    """Commits by their name, branches, and what the card says; `gate` is the status without access."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    gate: tuple[int, dict[str, str]] | None = None
    opens_with: str | None = None  # the token that passes the gate
    private: bool = False

    def push(self, files: Files, branch: str = "main") -> str:
        commit = commit_of(files)
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/agent-harnesses":  # the library asks for it where it likes
            return self._answer(404, b"{}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.hub.asked.append((self.command, path, self.headers.get("Range") or "", token))
        for part, (status, headers) in self.hub.failing.items():
            if part in path:
                return self._answer(status, b"{}", headers)
        if path.startswith("/cdn/"):
            return self._large(path.removeprefix("/cdn/"))
        if match := _API.fullmatch(path):
            return self._api(match)
        if match := _FILE.fullmatch(path):
            return self._file(match, token)
        return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    # ------------------------------------------------------------ uploading

    def do_POST(self) -> None:
        path, token = self._asked()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if (refused := self._refused(path, token)) is not None:
            return self._answer(*refused)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if match := _UPLOAD.fullmatch(path):
            repo = self.hub.repos.get(("model", match["name"]))
            if repo is None:
                return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if match["what"] == "preupload/main":
                return self._preupload(repo, json.loads(body))
            if match["what"] == "commit/main":
                return self._commit(match["name"], repo, body)
            return self._batch(json.loads(body))
        return self._answer(404, b"{}")

    def do_PUT(self) -> None:
        """A large file, to where the answer to a batch said."""
        sha256 = self._asked()[0].rpartition("/")[2]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        good = hashlib.sha256(body).hexdigest() == sha256
        if good:
            self.hub.large[sha256] = body
        return self._answer(200 if good else 400, b"")

    def _asked(self) -> tuple[str, str]:
        path = self.path.partition("?")[0]
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.hub.asked.append((self.command, path, self.headers.get("Range") or "", token))
        return path, token

    def _refused(self, path: str, token: str) -> tuple[int, bytes, dict[str, str]] | None:
        for part, (status, headers) in self.hub.failing.items():
            if part in path:
                return status, b"{}", headers
        return None if token in self.hub.writers else (403, b"{}", {})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if ("model", name) in self.hub.repos:
            return self._answer(409, b"{}")
        repo = self.hub.repo(name)
        repo.private = asked.get("visibility") == "private"
        repo.push({".gitattributes": b"*.gguf filter=lfs\n"})
        return self._json({"url": f"{self.hub.address}/{name}", "id": name})

    def _preupload(self, repo: Repository, asked: dict[str, Any]) -> None:
        there = repo.commits[repo.branches["main"]]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": _oid(there[file["path"]]) if file["path"] in there else None,
            }
            for file in asked["files"]
        ]
        return self._json({"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects: list[dict[str, Any]] = []
        for wanted in asked["objects"]:
            way = {"upload": {"href": f"{self.hub.address}/lfs/{wanted['oid']}"}}
            known = wanted["oid"] in self.hub.large
            objects.append({**wanted, **({} if known else {"actions": way})})
        return self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repo: Repository, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        header, changes = lines[0]["value"], lines[1:]
        if header.get("parentCommit") not in (None, repo.branches["main"]):
            return self._answer(412, b"{}")
        files = dict(repo.commits[repo.branches["main"]])
        for change in changes:
            value = change["value"]
            large = change["key"] == "lfsFile"
            content = self.hub.large[value["oid"]] if large else base64.b64decode(value["content"])
            files[value["path"]] = content
        commit = repo.push(files)
        url = f"{self.hub.address}/{name}/commit/{commit}"
        return self._json({"success": True, "commitOid": commit, "commitUrl": url})

    def _json(self, value: dict[str, Any]) -> None:
        self._answer(200, json.dumps(value).encode())

    # ------------------------------------------------------------ answering

    def _api(self, match: re.Match[str]) -> None:
        repo = self.hub.repos.get((match["kind"], match["name"]))
        if repo is None:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = _commit(repo, match["rev"] or "main")
        if commit is None:
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = repo.commits[commit]
        if match["what"] == "tree":
            tree = [
                {"type": "file", "path": name, "oid": _oid(body), **self.hub.described(name, body)}
                for name, body in files.items()
            ]
            return self._answer(200, json.dumps(tree).encode())
        siblings = [
            {"rfilename": name, "blobId": _oid(body), **self.hub.described(name, body)}
            for name, body in files.items()
        ]
        info = {"id": match["name"], "sha": commit, "siblings": siblings, "cardData": repo.card}
        info["private"] = repo.private
        return self._answer(200, json.dumps(info).encode())

    def _file(self, match: re.Match[str], token: str) -> None:
        repo = self.hub.repos.get(("dataset" if match["kind"] else "model", match["name"]))
        commit = _commit(repo, match["rev"]) if repo else None
        if repo is None or commit is None:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if repo.gate and token != repo.opens_with:
            return self._answer(repo.gate[0], b"{}", repo.gate[1])
        body = repo.commits[commit].get(match["path"])
        if body is None:
            return self._answer(
                404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            )
        headers = {"ETag": f'"{_oid(body)}"', "X-Repo-Commit": commit}
        if not _is_large(match["path"]):
            return self._answer(200, body, headers)
        sha256 = hashlib.sha256(body).hexdigest()
        self.hub.large[sha256] = body
        headers["X-Linked-Etag"] = f'"{sha256}"'
        headers["X-Linked-Size"] = str(len(body))
        headers["Location"] = f"http://localhost:{self.hub.port}/cdn/{sha256}"  # another host
        return self._answer(302, b"", headers)

    def _large(self, sha256: str) -> None:
        body = self.hub.large[sha256]
        if self.hub.spoilt:
            body = bytes([body[0] ^ 1]) + body[1:]
        start = int(re.findall(r"\d+", self.headers.get("Range") or "0")[0])
        part = body[start:]
        headers = {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self._answer(206 if start else 200, part, headers)

    def _answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.stop_after and len(body) > self.hub.stop_after:
            self.wfile.write(body[: self.hub.stop_after])
            self.wfile.flush()
            self.hub.stopped.set()
            self.hub.go_on.wait(60)
            self.close_connection = True
            return
        self.wfile.write(body)
        self.hub.sent_bytes += len(body)


def _commit(repo: Repository, revision: str) -> str | None:
    return revision if revision in repo.commits else repo.branches.get(revision)


def _is_large(name: str) -> bool:
    """What the hub keeps in Git LFS, apart from the other files."""
    return name.endswith((".safetensors", ".bin", ".gguf"))


def _oid(body: bytes) -> str:
    """The name that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


class HubServer:
    """A running hub, and children that use it with a cache of their own.

    `failing` maps a part of a path to what is answered there. With `stop_after`, a longer answer
    stops after so many bytes, until `go_on` is set.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.repos: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str, str]] = []
        self.failing: dict[str, tuple[int, dict[str, str]]] = {}
        self.writers: set[str] = set()  # the tokens that may upload
        self.claimed_bytes = 0  # told as the size of every file, where not 0
        self.stop_after = 0
        self.stopped, self.go_on = threading.Event(), threading.Event()
        self.spoilt = False  # large files come with a wrong first byte
        self.sent_bytes = 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            args=(0.01,),
            daemon=True,  # seconds to end it
        )
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def repo(self, name: str, kind: str = "model") -> Repository:
        return self.repos.setdefault((kind, name), Repository())

    def described(self, name: str, body: bytes) -> dict[str, Any]:
        size = self.claimed_bytes or len(body)
        if not _is_large(name):
            return {"size": size}
        sha256 = hashlib.sha256(body).hexdigest()
        lfs = {"sha256": sha256, "oid": sha256, "size": size, "pointerSize": 130}
        return {"size": size, "lfs": lfs}

    def paths(self, method: str = "GET") -> list[str]:
        return [path for asked, path, _, _ in self.asked if asked == method]

    def stop(self) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def start(self, code: str, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Python code in a child that takes this for the hub."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        own = {"HF_ENDPOINT": self.address, "HF_HOME": str(self.home / "hf"), **environment}
        return subprocess.Popen(
            [sys.executable, "-c", code, *words],
            env=inherited | own,
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str, words: Sequence[str] = (), **environment: str) -> Any:
        """The JSON that the child prints; it prints nothing else."""
        child = self.start(code, *words, **environment)
        out, err = child.communicate(timeout=120)
        assert err == "", err
        assert child.returncode == 0, out
        return json.loads(out)
