# Copyright 2026 The trl-udm authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
A small Hub on the loopback interface: the part of the Hub's HTTP interface by which `huggingface_hub` makes a
repository, commits files to it, large ones by Git LFS, and lists and downloads them.

Anyone may read. Only `TOKEN` may write, and a wrong token may do neither.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_" + "TheTokenOfTheTests"
USER = "tester"


@dataclass
class Repository:
    """The files of each commit, by its id, which are in order. The last one is `main`."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], message: str) -> str:
        identity = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[identity] = files
        self.messages.append(message)
        return identity

    def resolve(self, revision: str) -> str | None:
        return list(self.commits)[-1] if revision == "main" else (revision if revision in self.commits else None)

    @property
    def files(self) -> dict[str, bytes]:
        return list(self.commits.values())[-1]


class HubServer(ThreadingHTTPServer):
    """Serves from a thread of its own while it is a context; `url` is its address."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubRequestHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".pt", ".pth", ".png"))


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubRequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        """Nothing is written to stderr."""

    def do_HEAD(self):
        self.handle_request()

    def do_GET(self):
        self.handle_request()

    def do_POST(self):
        self.handle_request()

    def do_PUT(self):
        self.handle_request()

    def handle_request(self):
        body = self.read_body()
        method = "GET" if self.command == "HEAD" else self.command
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        # A large file is put at an address that only a writer was told
        is_open = method == "PUT" or (method == "GET" and authorization is None)
        is_allowed = is_open or authorization == f"Bearer {TOKEN}"
        if not is_allowed:
            self.answer({"error": "Invalid username or password."}, 401)
            return
        for route_method, pattern, respond in ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None and route_method == method:
                with self.server.lock:
                    respond(self, body, *match.groups())
                return
        self.answer({"error": f"No such route: {method} {path}"}, 404)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, content, status: int = 200, headers: dict[str, str] | None = None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def find(self, repo_id: str, revision: str = "main") -> tuple[Repository | None, str | None]:
        """Repository and commit, or an answer that there is none."""
        repository = self.server.repositories.get(repo_id)
        commit = None if repository is None else repository.resolve(revision)
        if commit is None:
            code = "RepoNotFound" if repository is None else "RevisionNotFound"
            self.answer({"error": code}, 404, {"X-Error-Code": code})
        return repository, commit

    def create(self, body: bytes):
        payload = json.loads(body)
        repo_id = f"{payload.get('organization') or USER}/{payload['name']}"
        status = 409 if repo_id in self.server.repositories else 200
        if status == 200:
            repository = self.server.repositories[repo_id] = Repository()
            repository.commit({}, "initial commit")
        self.answer({"url": f"{self.server.url}/{repo_id}", "name": repo_id}, status)

    def validate_card(self, body: bytes):
        metadata = yaml.safe_load(json.loads(body)["content"].split("---")[1])
        is_valid = isinstance(metadata, dict) and all(value not in (None, "") for value in metadata.values())
        errors = [] if is_valid else [{"message": f"Empty metadata in {metadata}"}]
        self.answer({"errors": errors, "warnings": []}, 200 if is_valid else 400)

    def preupload(self, body: bytes, repo_id: str, revision: str):
        repository, commit = self.find(repo_id, revision)
        if commit is None:
            return
        files = []
        for entry in json.loads(body)["files"]:
            known = repository.commits[commit].get(entry["path"])
            mode = "lfs" if is_large(entry["path"]) else "regular"
            answer = {"path": entry["path"], "uploadMode": mode, "shouldIgnore": False}
            if known is not None:
                answer["oid"] = hashlib.sha256(known).hexdigest() if mode == "lfs" else git_hash(known)
            files.append(answer)
        self.answer({"files": files})

    def large_file_batch(self, body: bytes, repo_id: str):
        objects = []
        for entry in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/large-files/{entry['oid']}"}}
            known = {} if entry["oid"] not in self.server.large_files else None
            objects.append({**entry, "actions": upload} if known is not None else entry)
        self.answer({"transfer": "basic", "objects": objects})

    def put_large_file(self, body: bytes, oid: str):
        is_whole = hashlib.sha256(body).hexdigest() == oid
        if is_whole:
            self.server.large_files[oid] = body
        self.answer(b"", 200 if is_whole else 400)

    def commit(self, body: bytes, repo_id: str, revision: str):
        repository, commit = self.find(repo_id, revision)
        if commit is None:
            return
        files, message = dict(repository.commits[commit]), ""
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
            else:
                raise ValueError(f"Unknown operation {operation['key']}")
        identity = repository.commit(files, message)
        self.answer({"commitUrl": f"{self.server.url}/{repo_id}/commit/{identity}", "commitOid": identity})

    def info(self, body: bytes, repo_id: str, revision: str | None):
        repository, commit = self.find(repo_id, revision or "main")
        if commit is not None:
            siblings = [{"rfilename": path} for path in repository.commits[commit]]
            self.answer({"id": repo_id, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def history(self, body: bytes, repo_id: str, revision: str):
        repository, commit = self.find(repo_id, revision)
        if commit is not None:
            entries = [
                {"id": identity, "title": message, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
                for identity, message in zip(repository.commits, repository.messages, strict=True)
            ]
            self.answer(entries[::-1])

    def tree(self, body: bytes, repo_id: str, revision: str):
        repository, commit = self.find(repo_id, revision)
        if commit is None:
            return
        entries = []
        for path, content in repository.commits[commit].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if is_large(path):
                oid = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self.answer(entries)

    def download(self, body: bytes, repo_id: str, revision: str, path: str):
        repository, commit = self.find(repo_id, revision)
        if commit is None:
            return
        content = repository.commits[commit].get(path)
        if content is None:
            self.answer(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        etag = hashlib.sha256(content).hexdigest() if is_large(path) else git_hash(content)
        self.answer(content, headers={"X-Repo-Commit": commit, "ETag": f'"{etag}"'})


REPO = "([^/]+/[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", HubRequestHandler.create),
    ("POST", "/api/validate-yaml", HubRequestHandler.validate_card),
    ("POST", f"/api/models/{REPO}/preupload/([^/]+)", HubRequestHandler.preupload),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch", HubRequestHandler.large_file_batch),
    ("PUT", "/large-files/([0-9a-f]+)", HubRequestHandler.put_large_file),
    ("POST", f"/api/models/{REPO}/commit/([^/]+)", HubRequestHandler.commit),
    ("GET", f"/api/models/{REPO}(?:/revision/([^/]+))?", HubRequestHandler.info),
    ("GET", f"/api/models/{REPO}/commits/([^/]+)", HubRequestHandler.history),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)", HubRequestHandler.tree),
    ("GET", f"/{REPO}/resolve/([^/]+)/(.+)", HubRequestHandler.download),
]
