"""A Hub on localhost for tests: it speaks the protocol of uploads and downloads with real bytes.

Repositories, commits, large objects (in one piece, in parts, or over Xet) and branches live in
memory. What it is told to do wrong, it does: answer 5xx, drop a connection, store other bytes than
it was sent.
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PART = 5000
"""Bytes of a part of an object that is sent in parts."""
TOKEN = "hf_" + "a" * 32


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """Files by path for each commit, and which commit a branch is at."""

    private: bool
    commits: dict[str, dict[str, tuple[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(
        self, branch: str, changes: dict[str, tuple[str, bytes]], deleted: Iterable[str] = ()
    ) -> str:
        files = {**self.commits[self.branches[branch]], **changes} if self.branches else changes
        files = {name: entry for name, entry in files.items() if name not in set(deleted)}
        text = repr((len(self.commits), sorted((n, git_hash(d)) for n, (_, d) in files.items())))
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, tuple[str, bytes]]] | None:
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None

    def contents(self, revision: str = "main") -> dict[str, bytes]:
        found = self.at(revision)
        assert found is not None
        return {name: data for name, (_, data) in found[1].items()}


@dataclass
class Fault:
    """A request that goes wrong: `kind` is a status, "reset", "lost" (done, but the answer never
    comes) or "corrupt" (other bytes are stored)."""

    method: str
    path: str
    kind: Any
    times: int = 1

    def hits(self, method: str, path: str) -> bool:
        return self.times > 0 and method == self.method and re.search(self.path, path) is not None


@dataclass
class Hub:
    """The state of the server, and what it has been asked."""

    repos: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    multipart_above: int = 20_000
    trusting: bool = False
    xet: Any = None
    routes: list[tuple[str, str, Callable[..., None]]] = field(default_factory=list)
    url: str = ""

    def fail(self, method: str, path: str, kind: Any, times: int = 1) -> None:
        self.faults.append(Fault(method, path, kind, times))

    def fault(self, method: str, path: str) -> Any:
        for fault in self.faults:
            if fault.hits(method, path):
                fault.times -= 1
                return fault.kind
        return None

    def create(self, name: str, files: dict[str, bytes], *, private: bool = False) -> str:
        """A repository with one commit; its revision."""
        self.repos[name] = Repository(private=private)
        kind = {True: "lfs", False: "regular"}
        changes = {n: (kind[n.endswith(".safetensors")], data) for n, data in files.items()}
        return self.repos[name].commit("main", changes)

    def count(self, method: str, path: str) -> int:
        return sum(m == method and re.search(path, p) is not None for m, p, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        kind = self.hub.fault(self.command, path)
        if kind == "reset":
            self.rfile.read(min(100, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            self.connection.close()
            return
        body = self.read_body()
        self.hub.requests.append((self.command, path, len(body)))
        if isinstance(kind, int):
            self.answer(kind, {"error": "injected"})
            return
        if kind == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.lost = kind == "lost"
        for method, pattern, action in [*ROUTES, *self.hub.routes]:
            found = re.fullmatch(pattern, path)
            if found and self.command == method:
                action(self, body, **found.groupdict())
                return
        self.answer(404, {"error": f"no route {self.command} {path}"})

    do_GET = do_PUT = do_POST = do_HEAD = handle_any

    def read_body(self) -> bytes:
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, value: Any = None, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        if getattr(self, "lost", False):
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def repository(self, repo: str) -> Repository | None:
        found = self.hub.repos.get(repo)
        if found is None:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return found

    def files_at(self, repo: str, revision: str) -> tuple[str, dict[str, tuple[str, bytes]]] | None:
        found = self.repository(repo)
        if found is None:
            return None
        files = found.at(revision) if found.branches else ("0" * 40, {})
        if files is None:
            self.answer(404, {"error": "no revision"}, X_Error_Code="RevisionNotFound")
        return files

    def whoami(self, body: bytes) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
            return
        self.answer(200, {"type": "user", "name": "me", "fullname": "Me", "orgs": [], "auth": {}})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        files = self.files_at(repo, revision)
        if files is not None:
            value = {
                "id": repo,
                "modelId": repo,
                "sha": files[0],
                "private": self.hub.repos[repo].private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": name} for name in files[1]],
            }
            self.answer(200, value)

    def create(self, body: bytes) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
            return
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if asked.get("organization") not in (None, "me"):
            self.answer(403, {"error": "You have no rights on this namespace"})
            return
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            self.answer(409, {"error": "exists", "url": url})
            return
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.repos[name] = Repository(private=private)
        self.hub.repos[name].commit("main", {".gitattributes": ("regular", b"")})
        self.answer(200, {"url": url, "name": name})

    def branch(self, body: bytes, repo: str, branch: str) -> None:
        found = self.repository(repo)
        if found is None:
            return
        if branch in found.branches:
            self.answer(409, {"error": "exists"})
            return
        found.branches[branch] = found.branches["main"]
        self.answer(200, {})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = self.files_at(repo, revision)
        if files is None:
            return
        answers = []
        for asked in json.loads(body)["files"]:
            large = asked["path"].endswith(".safetensors") or asked["size"] > 100_000
            answers.append(
                {
                    "path": asked["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
            )
        self.answer(200, {"files": answers})

    def validate(self, body: bytes) -> None:
        """The check of a card's head."""
        self.answer(200, {"errors": [], "warnings": []})

    def batch(self, body: bytes, repo: str) -> None:
        objects = []
        told = json.loads(body)
        if self.hub.xet is not None and "xet" in told.get("transfers", ()):
            self.answer(200, {"transfer": "xet", "objects": told["objects"]})
            return
        for asked in told["objects"]:
            oid, size = asked["oid"], asked["size"]
            entry = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                header: dict[str, str] = {}
                href = f"{self.hub.url}/lfs/{oid}"
                if size > self.hub.multipart_above:
                    href += "/complete"
                    header = {"chunk_size": str(PART)}
                    for number in range(1, -(-size // PART) + 1):
                        header[f"{number:05d}"] = f"{self.hub.url}/lfs/{oid}/part/{number}"
                actions = {"upload": {"href": href, "header": header}}
                if not header:
                    actions["verify"] = {"href": f"{self.hub.url}/lfs/verify", "header": {}}
                entry["actions"] = actions
            objects.append(entry)
        transfer = "multipart" if any("complete" in str(o) for o in objects) else "basic"
        self.answer(200, {"transfer": transfer, "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        self.hub.objects[oid] = body
        self.answer(200, b"")

    def part(self, body: bytes, oid: str, number: str) -> None:
        self.hub.parts.setdefault(oid, {})[int(number)] = body
        self.answer(200, b"", ETag=f'"{hashlib.md5(body).hexdigest()}"')

    def complete(self, body: bytes, oid: str) -> None:
        parts = self.hub.parts.pop(oid, {})
        for told in json.loads(body)["parts"]:
            etag = f'"{hashlib.md5(parts[told["partNumber"]]).hexdigest()}"'
            if told["etag"] != etag:
                self.answer(400, {"error": "etag"})
                return
        self.store(oid, b"".join(parts[n] for n in sorted(parts)))

    def verify(self, body: bytes) -> None:
        oid = json.loads(body)["oid"]
        self.store(oid, self.hub.objects.pop(oid, b""))

    def store(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid and not self.hub.trusting:
            self.answer(422, {"error": "the content does not have this hash"})
            return
        self.hub.objects[oid] = data
        self.answer(200, {"success": True})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        found = self.repository(repo)
        if found is None:
            return
        changes: dict[str, tuple[str, bytes]] = {}
        deleted: list[str] = []
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                parent = value.get("parentCommit")
                if parent is not None and parent != found.branches.get(revision):
                    self.answer(412, {"error": "A commit has happened since. Please refresh."})
                    return
            elif entry["key"] == "deletedFile":
                if value["path"] not in found.contents(revision):
                    self.answer(400, {"error": f"{value['path']} is not there to be deleted"})
                    return
                deleted.append(value["path"])
            elif entry["key"] == "file":
                changes[value["path"]] = ("regular", base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                data = self.hub.objects.get(value["oid"])
                if data is None:
                    self.answer(400, {"error": f"{value['path']} was not uploaded"})
                    return
                changes[value["path"]] = ("lfs", data)
        sha = found.commit(revision, changes, deleted)
        url = f"{self.hub.url}/{repo}/commit/{sha}"
        self.answer(200, {"success": True, "commitUrl": url, "commitOid": sha, "hookOutput": ""})

    def paths(self, body: bytes, repo: str, revision: str) -> None:
        files = self.files_at(repo, revision)
        if files is None:
            return
        text = body.decode()
        if text.startswith("{"):
            wanted = json.loads(text)["paths"]
        else:
            wanted = urllib.parse.parse_qs(text).get("paths", [])
        self.answer(200, [described(n, *files[1][n]) for n in wanted if n in files[1]])

    def tree(self, body: bytes, repo: str, revision: str, folder: str = "") -> None:
        files = self.files_at(repo, revision)
        if files is None:
            return
        prefix = folder + "/" if folder else ""
        inside = {n: entry for n, entry in files[1].items() if n.startswith(prefix)}
        if prefix and not inside:
            self.answer(404, {"error": "no folder"}, X_Error_Code="EntryNotFound")
            return
        folders = {
            prefix + name.removeprefix(prefix).partition("/")[0]
            for name in inside
            if "/" in name.removeprefix(prefix)
        }
        self.answer(
            200,
            [described(name, *entry) for name, entry in inside.items()]
            + [{"type": "directory", "path": n, "size": 0, "oid": "0" * 40} for n in folders],
        )

    def resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        files = self.files_at(repo, revision)
        if files is None:
            return
        if file not in files[1]:
            self.answer(404, {"error": "no entry"}, X_Error_Code="EntryNotFound")
            return
        kind, data = files[1][file]
        etag = hashlib.sha256(data).hexdigest() if kind == "lfs" else git_hash(data)
        headers = {
            "X_Repo_Commit": files[0],
            "ETag": f'"{etag}"',
            "X_Linked_Size": str(len(data)),
            "X_Linked_ETag": f'"{etag}"',
            "Accept_Ranges": "bytes",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            last = min(last, len(data) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            self.answer(206, data[first : last + 1], **headers)
        elif self.command == "HEAD":
            self.answer(200, b"", Content_Length=str(len(data)), **headers)
        else:
            self.answer(200, data, **headers)


def described(name: str, kind: str, data: bytes) -> dict[str, Any]:
    found = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
    if kind == "lfs":
        digest = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
    return found


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
DATA = r"(?P<repo>datasets/[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("GET", rf"/api/models/{REPO}", Handler.info),
    ("GET", rf"/api/models/{REPO}/revision/(?P<revision>.+)", Handler.info),
    ("POST", rf"/api/models/{REPO}/branch/(?P<branch>.+)", Handler.branch),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>.+)", Handler.commit),
    ("POST", rf"/api/models/{REPO}/paths-info/(?P<revision>.+)", Handler.paths),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)/?", Handler.tree),
    ("GET", rf"/api/{DATA}", Handler.info),
    ("GET", rf"/api/{DATA}/revision/(?P<revision>.+)", Handler.info),
    ("POST", rf"/api/{DATA}/paths-info/(?P<revision>.+)", Handler.paths),
    ("GET", rf"/api/{DATA}/tree/(?P<revision>[^/]+)/?(?P<folder>.*)", Handler.tree),
    ("GET", rf"/{DATA}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Handler.resolve),
    ("HEAD", rf"/{DATA}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Handler.resolve),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.put),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/part/(?P<number>\d+)", Handler.part),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", Handler.complete),
    ("POST", r"/lfs/verify", Handler.verify),
    ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Handler.resolve),
    ("HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Handler.resolve),
]


@contextmanager
def serving() -> Iterator[Hub]:
    """A running server."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
