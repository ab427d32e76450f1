"""A server on this machine that speaks as much of wandb's protocol as a run needs, and keeps what it was told."""

from __future__ import annotations

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0" * 40


class WandbServer:
    """Within its block it answers at `url`.

    Attributes:
        runs: id -> what was logged for it, line after line, over all of its starts.
        projects, names: id -> of the run.
        exits: id -> exit codes, one for each start that came to an end.
        preempted: ids of the runs that have said that they go on later.
        paths: of every request.
        refuses: set it, and every question is answered with an error.
    """

    def __init__(self) -> None:
        self.runs: dict[str, list[dict[str, Any]]] = {}
        self.projects: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.exits: dict[str, list[int]] = {}
        self.preempted: set[str] = set()
        self.paths: list[str] = []
        self.refuses = False
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def answer(self, value: Any) -> None:
                body = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def read(self) -> bytes:
                server.paths.append(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

            def do_GET(self) -> None:
                self.read()
                self.answer({})

            do_PUT = do_GET

            def do_POST(self) -> None:
                body = self.read()
                if self.path.endswith("/file_stream"):
                    self.answer(server.stream(self.path.split("/")[-2], json.loads(body)))
                elif self.path.endswith("/graphql"):
                    request = json.loads(body)
                    if server.refuses:
                        self.send_error(404)
                    else:
                        self.answer({"data": server.query(request, self.headers["Host"])})
                else:
                    self.answer({})

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def stream(self, run: str, request: dict[str, Any]) -> dict[str, Any]:
        history = request.get("files", {}).get("wandb-history.jsonl")
        if history:
            lines = self.runs[run]
            # A client sends lines again that were not acknowledged.
            lines[history["offset"] :] = [json.loads(line) for line in history["content"]]
        if request.get("preempting"):
            self.preempted.add(run)
        if request.get("complete"):
            self.exits.setdefault(run, []).append(request["exitcode"])
        return {"exitcode": None, "limits": {}}

    def query(self, request: dict[str, Any], host: str) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", request.get("query", ""))
        name, given = found[1] if found else "", request.get("variables") or {}
        if name == "Viewer":
            return {"viewer": {"id": "e", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if name == "RunResumeStatus":
            known = given["name"] in self.runs
            return {"model": {**_project(given["project"]), "bucket": self._resumed(given["name"]) if known else None}}
        if name == "UpsertBucket":
            run = given["name"]
            inserted = run not in self.runs
            self.runs.setdefault(run, [])
            self.projects[run] = given["project"]
            self.names[run] = given.get("displayName") or self.names.get(run, "")
            return {"upsertBucket": {"bucket": self._run(run), "inserted": inserted}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"http://{host}/upload/{file}"} for file in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def _run(self, run: str) -> dict[str, Any]:
        told = {"id": "r", "name": run, "displayName": self.names.get(run, ""), "description": "", "config": "{}"}
        return {
            **told,
            "sweepName": None,
            "project": _project(self.projects[run]),
            "historyLineCount": len(self.runs[run]),
        }

    def _resumed(self, run: str) -> dict[str, Any]:
        last = self.runs[run][-1] if self.runs[run] else {}
        tails = {name: json.dumps([json.dumps(last)]) for name in ("historyTail", "eventsTail")}
        rest = {"summaryMetrics": json.dumps(last), "wandbConfig": json.dumps({"t": 1}), "tags": []}
        counts = {"logLineCount": 0, "eventsLineCount": 0, **rest}
        return {**self._run(run), **counts, **tails}


def _project(name: str) -> dict[str, Any]:
    return {"id": "p", "name": name, "entity": {"id": "e", "name": "me"}}
