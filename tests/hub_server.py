"""A small server that speaks the Hub's protocol, as far as huggingface_hub, PEFT and sae-lens use it here."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import unquote, urlsplit

USER, TOKEN = "tester", "hf_local"
Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits by name of their content, and what points at them."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": b""})

    def commit(self, branch: str, files: Files) -> str:
        content = repr((len(self.commits), sorted(files.items()))).encode()
        name = hashlib.sha1(content).hexdigest()
        self.commits[name] = files
        self.refs[branch] = name
        return name

    def at(self, revision: str) -> str | None:
        """The commit that a branch, a tag or the name of a commit stands for."""
        return revision if revision in self.commits else self.refs.get(revision)


class Refusal(Exception):
    """An answer with the Hub's code for an error."""

    def __init__(self, status: int, code: str) -> None:
        self.status, self.code = status, code


class Hub(ThreadingHTTPServer):
    """Model repositories in memory.

    Attributes:
        log: Method and path of every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[str] = []
        self.lock = Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo_id: str, revision: str = "main") -> Files:
        repository = self.repositories[repo_id]
        return repository.commits[repository.at(revision)]


@contextmanager
def running_hub():
    hub = Hub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        self.server.log.append(f"{self.command} {self.path}")

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        for methods, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None and self.command in methods.split():
                try:
                    with self.server.lock:
                        status, headers, content = answer(self, body, *match.groups())
                except Refusal as refusal:
                    status, headers, content = refusal.status, {"X-Error-Code": refusal.code}, b"{}"
                break
        else:
            status, headers, content = 501, {}, f"{self.command} {path} is not served".encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    @property
    def authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        found = self.server.repositories.get(repo_id)
        if found is None or ((found.private or write) and not self.authorised):
            raise Refusal(404 if self.authorised else 401, "RepoNotFound")
        return found

    def commit(self, repo_id: str, revision: str) -> tuple[str, Files]:
        repository = self.repository(repo_id)
        name = repository.at(revision)
        if name is None:
            raise Refusal(404, "RevisionNotFound")
        return name, repository.commits[name]

    # What the routes answer: a status, headers, and a body.

    def who_am_i(self, _: bytes):
        if not self.authorised:
            raise Refusal(401, "Unauthorized")
        return _json({"type": "user", "name": USER, "orgs": []})

    def create(self, body: bytes):
        if not self.authorised:
            raise Refusal(401, "Unauthorized")
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        answer = {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.server.repositories:
            return _json(answer, status=409)
        self.server.repositories[repo_id] = Repository(private=asked.get("visibility") == "private")
        return _json(answer)

    def validate_card(self, body: bytes):
        import yaml

        header = json.loads(body)["content"].split("---")[1]
        return _json({"errors": [], "warnings": []}, status=200 if isinstance(yaml.safe_load(header), dict) else 400)

    def before_upload(self, body: bytes, repo_id: str, _revision: str):
        self.repository(repo_id, write=True)
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
        files = [
            {"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in zip(paths, modes, strict=True)
        ]
        return _json({"files": files})

    def offer_upload(self, body: bytes, repo_id: str):
        self.repository(repo_id, write=True)
        objects = [
            {**asked, "actions": {"upload": {"href": f"{self.server.url}/blobs/{asked['oid']}"}}}
            for asked in json.loads(body)["objects"]
        ]
        return _json({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "WrongContent")
        self.server.blobs[oid] = body
        return _json({})

    def add_commit(self, body: bytes, repo_id: str, revision: str):
        repository = self.repository(repo_id, write=True)
        if revision not in repository.refs:
            raise Refusal(404, "RevisionNotFound")
        files = dict(repository.commits[repository.refs[revision]])
        for operation in map(json.loads, body.splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        name = repository.commit(revision, files)
        return _json({"success": True, "commitOid": name, "commitUrl": f"{self.server.url}/{repo_id}/commit/{name}"})

    def add_ref(self, body: bytes, repo_id: str, kind: str, name: str):
        repository = self.repository(repo_id, write=True)
        asked = json.loads(body or b"{}")
        # A branch brings its own name and may say where it starts; a tag says its name, and starts at the path's.
        start, new = (asked.get("startingPoint", "main"), name) if kind == "branch" else (name, asked["tag"])
        repository.refs[new] = repository.at(start)
        return _json({})

    def about(self, _: bytes, repo_id: str, revision: str | None):
        name, files = self.commit(repo_id, revision or "main")
        siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
        return _json({"id": repo_id, "sha": name, "siblings": siblings, "tags": [], "private": False})

    def tree(self, _: bytes, repo_id: str, revision: str):
        _, files = self.commit(repo_id, revision)
        return _json([{"type": "file", "path": p, "size": len(c), "oid": _digest(c)} for p, c in files.items()])

    def resolve(self, _: bytes, repo_id: str, revision: str, path: str):
        name, files = self.commit(repo_id, revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound")
        content = files[path]
        return 200, {"X-Repo-Commit": name, "ETag": f'"{_digest(content)}"'}, content


def _json(value: object, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


_REPO = r"([^/]+/[^/]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.who_am_i),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_card),
    ("POST", rf"/api/models/{_REPO}/preupload/(.+)", _Handler.before_upload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.offer_upload),
    ("PUT", r"/blobs/(\w+)", _Handler.store),
    ("POST", rf"/api/models/{_REPO}/commit/(.+)", _Handler.add_commit),
    ("POST", rf"/api/models/{_REPO}/(branch|tag)/(.+)", _Handler.add_ref),
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)(?:/.*)?", _Handler.tree),
    ("GET", rf"/api/models/{_REPO}(?:/revision/(.+))?", _Handler.about),
    ("GET HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
