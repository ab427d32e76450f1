"""A stand-in for the hub on localhost: as much of its API as an upload of small files takes, kept in memory."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_standin"


class Hub(ThreadingHTTPServer):
    """Repositories by name, each a dictionary from paths to contents; `failing` answers commits with that status."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits = 0
        self.requests: list[str] = []
        self.failing: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def _answer(self, method: str) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        self.server.requests.append(f"{method} {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid username or password."})
            return
        status, value = self._route(method, path, content)
        self._send(status, value)

    def _route(self, method: str, path: str, content: bytes) -> tuple[int, Any]:
        hub = self.server
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "auth": {}, "orgs": []}
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            hub.repositories.setdefault(name, {})
            hub.private.setdefault(name, bool(asked.get("private")) or asked.get("visibility") == "private")
            return 200, {"url": f"{hub.url}/{name}", "id": name, "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        parts = path.removeprefix("/api/models/").split("/")
        name, rest = "/".join(parts[:2]), "/".join(parts[2:])
        if name not in hub.repositories:
            return 404, {"error": "Repository not found"}
        files = hub.repositories[name]
        if method == "GET" and rest.startswith("tree/"):
            return 200, [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()]
        if rest.startswith("preupload/"):
            asked = json.loads(content)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in asked]
            return 200, {"files": modes}
        if rest.startswith("commit/"):
            if hub.failing is not None:
                return hub.failing, {"error": "no"}
            changed = dict(files)
            for line in content.decode().splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "file":
                    changed[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "deletedFile":
                    del changed[value["path"]]
            hub.repositories[name] = changed
            hub.commits += 1
            url = f"{hub.url}/{name}/commit/{'1' * 40}"
            return 200, {"commitUrl": url, "commitOid": "1" * 40, "hookOutput": "", "success": True}
        siblings = [{"rfilename": p} for p in files]
        return 200, {"_id": "0", "id": name, "modelId": name, "sha": "1" * 40, "siblings": siblings, "tags": []}

    def _send(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
