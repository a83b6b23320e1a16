"""A server that speaks as much of MLflow's REST protocol as a tracker without artefacts needs, and can be away."""

import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class FakeMlflow:
    """What the server was sent; `away` answers every request with a status of 500."""

    def __init__(self) -> None:
        self.away, self.refused = False, 0
        self.runs: dict[str, dict[str, Any]] = {}
        self.url = ""

    def answer(self, what: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.away:
            self.refused += 1
            return 500, {"error_code": "INTERNAL_ERROR", "message": "away"}
        if what == "experiments/get-by-name":
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none of this name"}
        if what == "experiments/create":
            return 200, {"experiment_id": "1"}
        if what == "runs/create":
            name = f"run{len(self.runs)}"
            self.runs[name] = {"params": [], "metrics": [], "tags": {}, "status": "RUNNING"}
            return 200, {"run": self.run(name)}
        run = self.runs[asked["run_id"]]
        if what == "runs/log-batch":
            for kind in ("params", "metrics"):
                run[kind] += asked.get(kind, [])
        elif what == "runs/set-tag":
            run["tags"][asked["key"]] = asked["value"]
        elif what == "runs/update":
            run["status"] = asked["status"]
            return 200, {"run_info": self.run(asked["run_id"])["info"]}
        return 200, {"run": self.run(asked["run_id"])}

    def run(self, name: str) -> dict[str, Any]:
        info = {"run_id": name, "run_uuid": name, "experiment_id": "1", "status": self.runs[name]["status"], "start_time": 0}
        data = {"params": self.runs[name]["params"], "metrics": [], "tags": []}
        return {"info": {**info, "artifact_uri": "nowhere:/", "lifecycle_stage": "active"}, "data": data}


@contextmanager
def fake_mlflow() -> Generator[FakeMlflow]:
    """A server on a free loopback port for as long as the block runs."""
    fake = FakeMlflow()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = urlsplit(self.path).query
            self._answer(dict(pair.split("=", 1) for pair in query.split("&") if pair))

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, asked: dict[str, Any]) -> None:
            status, told = fake.answer(urlsplit(self.path).path.partition("/mlflow/")[2], asked)
            body = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: what was asked is kept."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
