"""A Hub on 127.0.0.1: the endpoints that huggingface_hub uses to make a repository, to upload over
Xet or git LFS, and to download; with faults on request.

Files under LFS are kept in memory. Those under Xet never come by: hf_xet stores them itself, in the
folder that the Hub names as `local://`, and the Hub reads their hashes from the shards there.
"""

import base64
import hashlib
import json
import re
import struct
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
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

    def commit(self, branch: str, tree: dict) -> str:
        sha = hashlib.sha1(repr(tree).encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha

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
    """`with Hub(folder) as hub:` serves at `hub.url`; the folder is for what Xet stores."""

    def __init__(self, xet_dir: Path):
        self.xet_dir = xet_dir
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by sha256
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int]] = []  # method, path, bytes received
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a client that hangs up
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

    def add(self, repo: str, files: dict[str, bytes]) -> str:
        """Commit files to `main`, as if someone had uploaded them. Returns the commit."""
        found = self.repos.setdefault(repo, Repo(private=False))
        tree = dict(found.commits[found.branches["main"]])
        tree |= {path: ("file", content, len(content)) for path, content in files.items()}
        return found.commit("main", tree)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a repository, but for what is under Xet."""
        found = self.repos[repo]
        tree = found.commits[found.commit_of(revision)]
        return {path: self.content(entry) for path, entry in tree.items() if self.holds(entry)}

    def content(self, entry) -> bytes:
        kind, value, _ = entry
        return self.objects[value] if kind == "lfs" else value

    def holds(self, entry) -> bool:
        return entry[0] == "file" or entry[1] in self.objects

    def xet_hashes(self) -> dict[str, str]:
        """What Xet calls the files that it stored, by sha256 (huggingface.co/docs/xet/shard)."""
        found = {}
        for shard in self.xet_dir.rglob("shards/*.mdb"):
            content, at = shard.read_bytes(), 48
            while content[at : at + 32] != b"\xff" * 32:
                name = content[at : at + 32]
                flags, num_parts = struct.unpack_from("<II", content, at + 32)
                at += 48 * (1 + num_parts * (2 if flags & 1 << 31 else 1))
                if flags & 1 << 30:
                    found[in_words(content[at : at + 32])] = in_words(name)
                    at += 48
        return found

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
        ("GET", rf"/api/models/{REPO}/xet-(read|write)-token/(?P<revision>[^/]+)", "xet_token"),
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
        writes |= "/xet-write-token/" in self.path
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
        self.answer([self.described(*item) for item in self.repo.commits[sha].items()])

    def described(self, path, entry):
        file = {"type": "file", "path": path, "oid": digest(entry), "size": entry[2]}
        lfs = {"oid": digest(entry), "size": entry[2], "pointerSize": 1}
        return file | ({"lfs": lfs} if entry[0] == "lfs" else {})

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
        stored = self.server.hub.xet_hashes()
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                self.repo.messages.append(value["summary"])
            elif item["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = ("file", content, len(content))
            elif value["oid"] in self.server.hub.objects or value["oid"] in stored:
                files[value["path"]] = ("lfs", value["oid"], value["size"])
            else:
                return self.answer({"error": f"{value['path']} was not uploaded"}, 400)
        sha = self.repo.commit(revision, files)
        url = f"{self.server.hub.url}/{self.repo_id}/commit/{sha}"
        self.answer({"commitUrl": url, "commitOid": sha})

    def xet_token(self, revision):
        url = f"local://{self.server.hub.xet_dir}"
        facts = {"casUrl": url, "accessToken": "x", "exp": 2**31}
        names = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": 2**31}
        self.answer(facts, headers=names)

    def resolve(self, revision, path):
        sha = self.repo.commit_of(revision)
        if sha is None:
            return self.refuse("RevisionNotFound")
        entry = self.repo.commits[sha].get(path)
        if entry is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
            return self.answer({"error": "Entry not found"}, 404, headers)
        hub, headers = self.server.hub, {"ETag": f'"{digest(entry)}"', "X-Repo-Commit": sha}
        if not hub.holds(entry):
            headers["X-Xet-Hash"] = hub.xet_hashes()[entry[1]]
            route = f"{hub.url}/api/models/{self.repo_id}/xet-read-token/{sha}"
            headers |= {"X-Xet-Refresh-Route": route, "Content-Length": entry[2]}
            return self.send(b"", headers=headers)
        self.send(hub.content(entry), headers=headers)


def digest(entry) -> str:
    """As the Hub names content: sha256 under LFS, otherwise git's."""
    kind, value, _ = entry
    return value if kind == "lfs" else hashlib.sha1(b"blob %d\0" % len(value) + value).hexdigest()


def in_words(value: bytes) -> str:
    """A hash as Xet writes it: 8 bytes at a time, last one first."""
    return "".join(value[i : i + 8][::-1].hex() for i in range(0, 32, 8))
