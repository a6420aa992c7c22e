"""A Hub on 127.0.0.1: the endpoints that huggingface_hub uses to make a repository, to upload over
git LFS, and to download; with faults on request. Keeps everything in memory."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_" + "SecretOfTheTests" * 2
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repo:
    """Commits by hash (files by path), and the hash that each branch points to."""

    private: bool
    commits: dict = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict = field(default_factory=lambda: {"main": "0" * 40})
    messages: list = field(default_factory=list)

    def commit_of(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """What becomes of requests that match: a status to answer with, or the connection is cut.

    Attributes:
        times: How often, from the first request that matches.
        after: Requests that match and are let through before.
        late: Carry the request out, then cut.
    """

    method: str
    path: str
    status: int | None = None
    times: int = 10**6
    after: int = 0
    late: bool = False
    headers: dict = field(default_factory=dict)

    def hits(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.path, path) or not self.times:
            return False
        if self.after:
            self.after -= 1
            return False
        self.times -= 1
        return True


class Hub:
    """`with Hub() as hub:` serves at `hub.url` until the block ends."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by sha256
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int]] = []  # method, path, bytes received
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a repository."""
        found = self.repos[repo]
        tree = found.commits[found.commit_of(revision)]
        return {path: self.content(entry) for path, entry in tree.items()}

    def content(self, entry) -> bytes:
        kind, value = entry
        return self.objects[value] if kind == "lfs" else value

    def sent(self, method: str, path: str) -> list[int]:
        """Bytes of each request that matched."""
        return [size for m, p, size in self.log if m == method and re.search(path, p)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create"),
        ("GET", rf"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", "tree"),
        ("POST", rf"/api/models/{REPO}/branch/(?P<revision>[^/]+)", "branch"),
        ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "store"),
        ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
        ("HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def handle_request(self):
        hub, path = self.server.hub, urlsplit(self.path).path
        fault = next((f for f in hub.faults if f.hits(self.command, path)), None)
        if fault and not fault.status and not fault.late:
            self.rfile.read1(4096)  # some of it
            return self.cut()
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.log.append((self.command, path, len(self.body)))
        if fault and fault.status:
            return self.answer(
                {"error": f"as ordered: {fault.status}"}, fault.status, fault.headers
            )
        self.cut_late = bool(fault)
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                return self.serve(
                    name, **{k: unquote(v or "") for k, v in match.groupdict().items()}
                )
        return self.answer({"error": f"no such endpoint: {self.command} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def serve(self, name, repo=None, **names):
        found = self.server.hub.repos.get(repo)
        writes = self.command == "POST" and name != "validate_yaml"  # a PUT has a signed address
        given = self.headers.get("Authorization")
        if writes and given != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        hidden = found is not None and found.private and given != f"Bearer {TOKEN}"
        if repo is not None and (found is None or hidden):
            return self.refuse("RepoNotFound")
        self.repo, self.repo_id = found, repo
        return getattr(self, name)(**names)

    def answer(self, values, status=200, headers=None):
        self.send(
            json.dumps(values).encode(),
            status,
            {"Content-Type": "application/json"} | (headers or {}),
        )

    def send(self, content, status=200, headers=None):
        if getattr(self, "cut_late", False):
            return self.cut()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, code):
        self.answer({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code})

    def cut(self):
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_):
        pass

    # ---- endpoints ----

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        card = yaml.safe_load(content.split("---\n")[1])
        errors = [] if isinstance(card, dict) else ["no metadata"]
        base = card.get("base_model", "user/name")
        errors += [] if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else ['"base_model" is no model id']
        license = card.get("license", "mit")
        errors += (
            [] if license in ("mit", "apache-2.0", "other") else ['"license" must be one of []']
        )
        for model in card.get("model-index", ()):
            for result in model["results"]:
                complete = result["task"]["type"] and result["dataset"]["type"]
                numbers = [isinstance(m["value"], float) for m in result["metrics"]]
                errors += [] if complete and all(numbers) else ['"model-index" is not complete']
        self.answer(
            {"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200
        )

    def create(self):
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        there = repo in self.server.hub.repos
        if not there:
            self.server.hub.repos[repo] = Repo(asked.get("visibility") == "private")
        self.answer({"url": f"{self.server.hub.url}/{repo}"}, 409 if there else 200)

    def info(self, revision):
        sha = self.repo.commit_of(revision or "main")
        if sha is None:
            return self.refuse("RevisionNotFound")
        files = [{"rfilename": path} for path in self.repo.commits[sha]]
        self.answer(
            {"id": self.repo_id, "sha": sha, "siblings": files, "private": self.repo.private}
        )

    def tree(self, revision):
        sha = self.repo.commit_of(revision)
        if sha is None:
            return self.refuse("RevisionNotFound")
        self.answer(
            [
                {"type": "file", "path": path, "oid": digest(entry), "size": self.size(entry)}
                | (
                    {"lfs": {"oid": entry[1], "size": self.size(entry), "pointerSize": 1}}
                    if entry[0] == "lfs"
                    else {}
                )
                for path, entry in self.repo.commits[sha].items()
            ]
        )

    def size(self, entry):
        return len(self.server.hub.content(entry))

    def branch(self, revision):
        there = revision in self.repo.branches
        self.repo.branches.setdefault(revision, self.repo.branches["main"])
        self.answer({}, 409 if there else 200)

    def preupload(self, revision):
        sha = self.repo.commit_of(revision)
        if sha is None:
            return self.refuse("RevisionNotFound")
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            entry = self.repo.commits[sha].get(file["path"])
            facts = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            files.append(facts | ({"oid": digest(entry)} if entry else {}))
        self.answer({"files": files})

    def batch(self):
        objects = []
        for asked in json.loads(self.body)["objects"]:
            href = f"{self.server.hub.url}/lfs/{asked['oid']}"
            there = asked["oid"] in self.server.hub.objects
            objects.append(asked if there else asked | {"actions": {"upload": {"href": href}}})
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer({"error": "another checksum"}, 400)
        self.server.hub.objects[oid] = self.body
        self.answer({})

    def commit(self, revision):
        if revision not in self.repo.branches:
            return self.refuse("RevisionNotFound")
        files = dict(self.repo.commits[self.repo.branches[revision]])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                self.repo.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = ("file", base64.b64decode(value["content"]))
            elif value["oid"] in self.server.hub.objects:
                files[value["path"]] = ("lfs", value["oid"])
            else:
                return self.answer({"error": f"{value['path']} was not uploaded"}, 400)
        sha = hashlib.sha1(repr(files).encode()).hexdigest()
        self.repo.commits[sha] = files
        self.repo.branches[revision] = sha
        url = f"{self.server.hub.url}/{self.repo_id}/commit/{sha}"
        self.answer({"commitUrl": url, "commitOid": sha})

    def resolve(self, revision, path):
        sha = self.repo.commit_of(revision)
        if sha is None:
            return self.refuse("RevisionNotFound")
        entry = self.repo.commits[sha].get(path)
        if entry is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
            return self.answer({"error": "Entry not found"}, 404, headers)
        self.send(
            self.server.hub.content(entry),
            200,
            {"ETag": f'"{digest(entry)}"', "X-Repo-Commit": sha},
        )


def digest(entry) -> str:
    """As the Hub names content: sha256 under LFS, otherwise git's."""
    kind, value = entry
    return value if kind == "lfs" else hashlib.sha1(b"blob %d\0" % len(value) + value).hexdigest()
