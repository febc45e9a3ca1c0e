"""A hub on loopback that speaks the Hugging Face Hub's protocol to the real huggingface_hub client.

Metadata, file lists, HEAD and ranged GET with ETag and X-Repo-Commit; gated and private models; connections that
break; and what an upload needs. Every request is on record, with the bytes that were sent for it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_BYTES = 10_000  # larger files have their sha256 for an ETag, as on the Hub


@dataclass
class Repository:
    """A model: branches and tags, each with a commit, and for each commit a folder with its files."""

    folders: dict[str, Path]  # by commit
    refs: dict[str, str]  # by branch or tag
    gated: bool = False
    private: bool = False


@dataclass
class Request:
    """One request, and what was sent for it."""

    method: str
    path: str
    sent: int = 0  # bytes of the body


@dataclass
class Hub:
    """The server's models and what was asked of it."""

    token: str = "hf_secret"
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    breaks_after: int | None = None  # bytes of a body after which its connection is cut, once
    bytes_per_second: float | None = None
    status: int | None = None  # answered to everything, where it is set
    uploads: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by model: files by path
    objects: dict[str, bytes] = field(default_factory=dict)  # of Git LFS, by sha256
    made_private: dict[str, bool] = field(default_factory=dict)
    url: str = ""

    def add(self, name: str, folder: Path, revision: str = "main", **how: bool) -> str:
        """Publishes a folder under a name; returns the commit."""
        commit = hashlib.sha1(f"{name} {revision} {folder}".encode()).hexdigest()
        repository = self.repositories.setdefault(name, Repository({}, {}, **how))
        repository.folders[commit], repository.refs[revision] = folder, commit
        return commit

    def bytes_sent(self, pattern: str = "") -> int:
        """Bytes of all bodies whose request's path matches."""
        return sum(request.sent for request in self.requests if re.search(pattern, request.path))

    def environment(self, cache: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a process that takes this for the Hub."""
        unset = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }
        return {**unset, **own, **({} if token is None else {"HF_TOKEN": token})}


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal: requests are on record."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.record = Request(self.command, unquote(url.path))
        self.hub.requests.append(self.record)
        if self.hub.status is not None:
            self.send_json({"error": "out of order"}, self.hub.status)
            return
        path, query = unquote(url.path), parse_qs(url.query)
        if self.command in ("POST", "PUT") or path == "/api/whoami-v2":
            self.answer_upload(path, body)
        elif path == "/api/models":
            public = [name for name, repository in self.hub.repositories.items() if not repository.private]
            makers = [name for name in public if name.startswith(query["author"][0] + "/")]
            self.send_json([{"id": name, "modelId": name} for name in makers])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.answer_info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?.*", path):
            self.answer_tree(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/((?:refs/pr/)?[^/]+)/(.+)", path):
            self.answer_file(match[1], match[2], match[3])
        else:
            self.send_json({"error": f"no such page {path}"}, 404)

    def find(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """(the repository, the commit); None where that is answered by a refusal."""
        repository = self.hub.repositories.get(name)
        if repository is None and name in self.hub.made_private:
            repository = Repository({"c" * 40: Path(__file__).parent / "pictures"}, {"main": "c" * 40})
            repository.private = self.hub.made_private[name]
        knows_token = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repository is None or (repository.private and not knows_token):
            headers = {} if knows_token else {"X-Error-Message": "Invalid username or password."}
            headers = {"X-Error-Code": "RepoNotFound"} if knows_token else headers
            self.send_json({"error": "Repository not found"}, 404 if knows_token else 401, headers)
            return None
        commit = repository.refs.get(revision, revision)
        if commit not in repository.folders:
            self.send_json({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository, commit

    def files_of(self, repository: Repository, commit: str) -> Iterator[dict[str, Any]]:
        folder = repository.folders[commit]
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry: dict[str, Any] = {"path": path.relative_to(folder).as_posix(), "size": path.stat().st_size}
            entry["oid"] = hashlib.sha1(path.name.encode()).hexdigest()
            if entry["size"] > LFS_BYTES:
                entry["lfs"] = {"oid": etag_of(path), "size": entry["size"], "pointerSize": 134}
            yield entry

    def answer_info(self, name: str, revision: str) -> None:
        if (found := self.find(name, revision)) is None:
            return
        siblings = []
        for entry in self.files_of(*found):
            lfs = entry.get("lfs")
            lfs = {} if lfs is None else {"lfs": {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 134}}
            siblings.append({"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"], **lfs})
        gated = "manual" if found[0].gated else False
        self.send_json({"id": name, "modelId": name, "sha": found[1], "siblings": siblings, "gated": gated,
                        "private": found[0].private, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def answer_tree(self, name: str, revision: str) -> None:
        if (found := self.find(name, revision)) is not None:
            self.send_json([{"type": "file", **entry} for entry in self.files_of(*found)])

    def answer_file(self, name: str, revision: str, file: str) -> None:
        if (found := self.find(name, revision)) is None:
            return
        repository, commit = found
        if repository.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.send_json({"error": "gated"}, 403 if self.headers.get("Authorization") else 401,
                           {"X-Error-Code": "GatedRepo"})  # fmt: skip
            return
        path = repository.folders[commit] / file
        if not path.is_file():
            self.send_json({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        size, start, stop = path.stat().st_size, 0, path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is not None:
            start, stop = int(wanted[1]), min(size, int(wanted[2]) + 1 if wanted[2] else size)
        self.send_response(200 if wanted is None else 206)
        self.send_header("ETag", f'"{etag_of(path)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if wanted is not None:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if self.command == "GET":
            self.send_body(path, start, stop)

    def send_body(self, path: Path, start: int, stop: int) -> None:
        with path.open("rb") as stream:
            stream.seek(start)
            while start < stop:
                step = min(1 << 16, stop - start)
                if self.hub.breaks_after is not None and self.record.sent + step > self.hub.breaks_after:
                    self.hub.breaks_after = None
                    self.close_connection = True
                    self.connection.close()
                    return
                try:
                    self.wfile.write(stream.read(step))
                except OSError:  # the client has gone
                    self.close_connection = True
                    return
                start += step
                self.record.sent += step
                if self.hub.bytes_per_second is not None:
                    threading.Event().wait(step / self.hub.bytes_per_second)

    def answer_upload(self, path: str, body: bytes) -> None:
        """What create_repo and upload_folder ask for."""
        is_open = path.startswith("/objects/") or path == "/api/validate-yaml"
        if not is_open and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.send_json({"error": "Invalid credentials"}, 401)
        elif path == "/api/whoami-v2":
            self.send_json({"type": "user", "name": "ada", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'ada'}/{wanted['name']}"
            self.hub.made_private[name] = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.uploads.setdefault(name, {})
            self.send_json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/.+", path):
            files = json.loads(body)["files"]
            self.send_json({"files": [{"path": file["path"], "shouldIgnore": False, "uploadMode":
                            "lfs" if file["size"] > LFS_BYTES else "regular"} for file in files]})  # fmt: skip
        elif re.fullmatch(r"/.+\.git/info/lfs/objects/batch", path):
            objects = [{"oid": entry["oid"], "size": entry["size"], "authenticated": True, "actions":
                        {"upload": {"href": f"{self.hub.url}/objects/{entry['oid']}", "header": {}}}}
                       for entry in json.loads(body)["objects"]]  # fmt: skip
            self.send_json({"transfer": "basic", "objects": objects})
        elif path.startswith("/objects/"):
            self.hub.objects[path.rpartition("/")[2]] = body
            self.send_json({})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/.+", path):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.hub.uploads[match[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.hub.uploads[match[1]][value["path"]] = self.hub.objects[value["oid"]]
            self.send_json({"commitUrl": f"{self.hub.url}/{match[1]}/commit/{'c' * 40}", "commitOid": "c" * 40})
        else:
            self.send_json({"error": f"no such page {path}"}, 404)

    def send_json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
            self.record.sent += len(data)


def etag_of(path: Path) -> str:
    """A file's ETag: of its content, as the cache names it by that."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub on a port of its own."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
