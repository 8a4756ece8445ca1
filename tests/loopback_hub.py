"""A stand-in for the Hugging Face hub on loopback: the parts of its API by which a model is uploaded."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "loopbackLOOPBACK00" * 2


@dataclass
class Repository:
    """What a repository holds."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return hashlib.sha1(repr((sorted(self.files.items()), len(self.commits))).encode()).hexdigest()


@dataclass
class Hub:
    """The server's state, and how it may be made to fail."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """Content by sha256."""
    requests: list[str] = field(default_factory=list)
    status: int | None = None
    """Answer every commit with this."""
    url: str = ""


@contextmanager
def serving() -> Iterator[Hub]:
    """The hub, for as long as the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _act(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        self.hub.requests.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/large/"):
            self._answer(401, {"error": "Invalid username or password."})
            return
        for method, pattern, act in _ROUTES:
            if method == self.command and (found := re.fullmatch(pattern, path)):
                act(self, body, *found.groups())
                return
        self._answer(404, {"error": f"no such place: {self.command} {path}"}, {"X-Error-Code": "RepoNotFound"})

    do_GET = do_POST = do_PUT = do_HEAD = _act

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline().strip(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _answer(self, status: int, document: Any = None, headers: dict[str, str] | None = None) -> None:
        content = document if isinstance(document, bytes) else json.dumps(document or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        status = 409 if name in self.hub.repositories else 200
        if status == 200:
            self.hub.repositories[name] = Repository(asked.get("visibility") == "private", {".gitattributes": b""})
        self._answer(status, {"url": f"{self.hub.url}/{name}", "error": "You already created this model repo"})

    def info(self, _: bytes, name: str) -> None:
        repository = self.hub.repositories[name]
        files = [{"rfilename": file} for file in repository.files]
        self._answer(
            200, {"id": name, "sha": repository.head, "private": repository.private, "siblings": files, "tags": []}
        )

    def tree(self, _: bytes, name: str) -> None:
        files = self.hub.repositories[name].files.items()
        listed = [{"type": "file", "path": path, "size": len(text), "oid": "0" * 40} for path, text in files]
        self._answer(200, json.dumps(listed).encode())

    def validate(self, body: bytes) -> None:
        wrong = "license: klingon" in json.loads(body)["content"]
        self._answer(400 if wrong else 200, {"errors": [{"message": '"license" must be one of'}] if wrong else []})

    def preupload(self, body: bytes, name: str) -> None:
        files = [
            {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
            for one in json.loads(body)["files"]
        ]
        self._answer(200, {"files": [one | {"shouldIgnore": False} for one in files]})

    def batch(self, body: bytes, name: str) -> None:
        objects = json.loads(body)["objects"]
        found = [
            one
            if one["oid"] in self.hub.large
            else one | {"actions": {"upload": {"href": f"{self.hub.url}/large/{one['oid']}"}}}
            for one in objects
        ]
        self._answer(200, {"transfer": "basic", "objects": found})

    def put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self._answer(200)

    def commit(self, body: bytes, name: str) -> None:
        if self.hub.status is not None:
            self._answer(self.hub.status, {"error": "not now"})
            return
        repository = self.hub.repositories[name]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository.commits.append(value["summary"])
            elif entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del repository.files[value["path"]]
        oid = repository.head
        self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def tag(self, body: bytes, name: str, revision: str) -> None:
        tags, tag = self.hub.repositories[name].tags, json.loads(body)["tag"]
        status = 409 if tag in tags else 201
        tags.setdefault(tag, revision)
        self._answer(status, {"error": "Tag reference exists already"})

    def resolve(self, _: bytes, name: str, revision: str, file: str) -> None:
        repository = self.hub.repositories[name]
        content = repository.files[file]
        self._answer(200, content, {"ETag": hashlib.sha1(content).hexdigest(), "X-Repo-Commit": repository.head})


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    ("POST", r"/api/repos/create", _Handler.create),
    ("GET", rf"/api/models/{_NAME}(?:/revision/main)?", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/main/?", _Handler.tree),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_NAME}/preupload/main", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/large/(\w+)", _Handler.put),
    ("POST", rf"/api/models/{_NAME}/commit/main", _Handler.commit),
    ("POST", rf"/api/models/{_NAME}/tag/(\w+)", _Handler.tag),
    ("GET", rf"/{_NAME}/resolve/(\w+)/(.+)", _Handler.resolve),
    ("HEAD", rf"/{_NAME}/resolve/(\w+)/(.+)", _Handler.resolve),
)
