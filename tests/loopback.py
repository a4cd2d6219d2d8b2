"""A small Hugging Face Hub on this computer, for the unmodified client: real HTTP, with faults."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

Files = dict[str, bytes]


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


def checksum(path: str, data: bytes) -> str:
    if is_large(path):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, files: Files, ref: str = "main") -> str:
        old = self.commits.get(self.refs.get(ref, self.refs.get("main", "")), {})
        tree = {**old, **files}
        text = f"{len(self.commits)} {sorted((p, checksum(p, d)) for p, d in tree.items())}"
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit], self.refs[ref] = tree, commit
        return commit


@dataclass
class Fault:
    """kind: `status`, `stall`, `reset`, `cut`, `flip` or `drip`; `times` < 0 is for ever."""

    pattern: str
    kind: str
    times: int = -1
    status: int = 503
    seconds: float = 60.0
    size: int = 0
    body: bytes = b""
    headers: dict = field(default_factory=dict)


class LoopbackHub:
    def __init__(self, tokens: dict[str, str] | None = None) -> None:
        self.tokens = tokens or {}
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.authorized: list[bool] = []
        self.connections: list[socket.socket] = []
        self.port = 0
        self.released = threading.Event()
        self.start()

    def start(self) -> None:
        self.released.clear()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:  # the client keeps them for later
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def commit(self, repo: str, files: Files, **options: bool) -> str:
        return self.repos.setdefault(repo, Repo(**options)).add(files)

    def fail(self, pattern: str, kind: str, **options: object) -> None:
        self.faults.append(Fault(pattern, kind, **options))


class _Refused(Exception):
    """Status, and the Hub's word for the reason."""


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        self.fault = None
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.authorized.append("Authorization" in self.headers)
        self.body = self._read_body()
        asked = f"{self.command} {path}"
        faults = (f for f in self.hub.faults if f.times and re.search(f.pattern, asked))
        if fault := next(faults, None):
            fault.times -= 1
            self.fault = fault
        try:
            self._answer(asked)
        except _Refused as refused:
            status, code = refused.args
            self._send(b'{"error": "no"}', status, {"X-Error-Code": code, "X-Error-Message": "no"})
        except OSError:  # the client has gone
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size + 2)[:-2]
        self.rfile.readline()
        return body

    def _answer(self, asked: str) -> None:
        if self.fault and self.fault.kind == "stall":
            self.hub.released.wait(self.fault.seconds)
        if self.fault and self.fault.kind == "status":
            return self._send(self.fault.body, self.fault.status, self.fault.headers)
        routes = {
            r"GET /login": lambda: self._send(b"<html>", headers={"Content-Type": "text/html"}),
            r"GET /api/models": self._list,
            r"GET /api/models/([^/]+/[^/]+)(?:/revision/(.+))?": self._info,
            r"GET /api/models/([^/]+/[^/]+)/refs": self._refs,
            r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self._file,
            r"POST /api/repos/create": self._create,
            r"POST /api/validate-yaml": lambda: self._json({"errors": [], "warnings": []}),
            r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)": self._preupload,
            r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": self._batch,
            r"PUT /large/(\w+)": self._put,
            r"POST /api/models/([^/]+/[^/]+)/commit/(.+)": self._commit,
            r"POST /api/models/([^/]+/[^/]+)/tag/(.+)": self._tag,
        }
        for pattern, handler in routes.items():
            if match := re.fullmatch(pattern, asked):
                return handler(*match.groups())
        raise _Refused(404, "")

    def _send(self, body: bytes, status: int = 200, headers: dict | None = None) -> None:
        fault = self.fault
        if fault and fault.kind == "reset" and fault.size < 0:
            return self._reset()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.kind == "flip":
            body = bytes([body[0] ^ 255]) + body[1:]
        if fault and fault.kind in ("reset", "cut"):
            self.wfile.write(body[: fault.size])
            self.wfile.flush()
            time.sleep(0.05)
            self.close_connection = True
            if fault.kind == "reset":
                self._reset()
        elif fault and fault.kind == "drip":
            for start in range(0, len(body), fault.size):
                self.wfile.write(body[start : start + fault.size])
                self.wfile.flush()
                self.hub.released.wait(fault.seconds)
        else:
            self.wfile.write(body)

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _json(self, value: object, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise _Refused(401, "")
        return self.hub.tokens.get(token)

    def _repo(self, name: str, *, write: bool = False) -> Repo:
        user, repo = self._user(), self.hub.repos.get(name)
        if repo is None or (repo.private and user != name.split("/")[0]):
            raise _Refused(404 if user else 401, "RepoNotFound")
        if write and user != name.split("/")[0]:
            raise _Refused(403, "")
        return repo

    def _at(self, repo: Repo, revision: str) -> str:
        commit = repo.refs.get(revision) or repo.tags.get(revision) or revision
        if commit not in repo.commits:
            raise _Refused(404, "RevisionNotFound")
        return commit

    def _list(self) -> None:
        found = []
        for name, repo in self.hub.repos.items():
            card = repo.commits[repo.refs["main"]].get("README.md", b"---\n---").decode()
            data = yaml.safe_load(card.split("---")[1]) or {}
            tags = [*data.get("tags", []), f"base_model:{data.get('base_model')}"]
            if not repo.private and set(self.query.get("filter", [])) <= set(tags):
                found.append({"id": name, "tags": tags})
        self._json(found)

    def _info(self, name: str, revision: str | None) -> None:
        repo = self._repo(name)
        commit = self._at(repo, revision or "main")
        files = []
        for path, data in repo.commits[commit].items():
            size, own = len(data), checksum(path, data)
            files.append({"rfilename": path, "size": size, "blobId": own})
            if is_large(path):
                lfs = {"sha256": own, "size": size, "pointerSize": 130}
                files[-1] |= {"blobId": "0" * 40, "lfs": lfs}
        self._json({"id": name, "sha": commit, "private": repo.private, "siblings": files})

    def _refs(self, name: str) -> None:
        tags = self._repo(name).tags.items()
        tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": c} for t, c in tags]
        self._json({"branches": [], "converts": [], "tags": tags})

    def _file(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        if repo.gated and self._user() != name.split("/")[0]:
            raise _Refused(403 if self._user() else 401, "GatedRepo")
        commit = self._at(repo, revision)
        if path not in repo.commits[commit]:
            raise _Refused(404, "EntryNotFound")
        data = repo.commits[commit][path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{checksum(path, data)}"'}
        if is_large(path):
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": headers["ETag"]}
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, size = int(wanted[1]), len(data)
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            return self._send(data[start:], 206, headers)
        self._send(data, 200, headers)

    def _create(self) -> None:
        user, asked = self._user(), json.loads(self.body)
        if user is None:
            raise _Refused(401, "")
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if not name.startswith(f"{user}/"):
            raise _Refused(403, "")
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repos:
            return self._json(answer, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.commit(name, {}, private=bool(private))
        self._json(answer)

    def _preupload(self, name: str, revision: str) -> None:
        self._repo(name)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {True: "lfs", False: "regular"}
        files = [{"path": path, "uploadMode": modes[is_large(path)]} for path in paths]
        self._json({"files": [{**file, "shouldIgnore": False} for file in files]})

    def _batch(self, name: str) -> None:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.hub.url}/large/{entry['oid']}"}}}
            for entry in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> None:
        self.hub.large[oid] = self.body
        self._send(b"")

    def _commit(self, name: str, revision: str) -> None:
        proposed = "create_pr" in self.query
        repo = self._repo(name, write=not proposed)
        if self._user() is None:
            raise _Refused(401, "")
        files, parent = {}, None
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                parent = value.get("parentCommit")
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.hub.large[value["oid"]]
        if parent != repo.refs["main"]:
            raise _Refused(412, "")
        commit = repo.add(files, "refs/pr/1" if proposed else "main")
        answer = {"commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"}
        if proposed:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/1"
        self._json(answer)

    def _tag(self, name: str, revision: str) -> None:
        repo = self._repo(name, write=True)
        repo.tags[json.loads(self.body)["tag"]] = self._at(repo, revision)
        self._json({})
