"""Runs `compress` commands against a Hub that is a local server, given as HF_ENDPOINT.

    python hub_client.py FOLDER     (FOLDER holds a checkpoint, and files nobody should fetch)

Prints one JSON line: for each command its exit code, its errors, and the bytes of every file that
the server handed out meanwhile. The Hub's client reads its endpoint when it is imported, hence the
process of its own.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ERRORS = {
    "gated": (403, "GatedRepo"),
    "missing": (401, "RepoNotFound"),
    "broken": (500, ""),
}


class Hub(BaseHTTPRequestHandler):
    """The few routes that a download needs; the name of a repository decides what happens."""

    folder: Path
    served: dict[str, int]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def names(self, repo: str) -> list[str]:
        names = sorted(path.name for path in self.folder.iterdir())
        if repo.endswith("pickled"):
            names = [name for name in names if "safetensors" not in name]
        return names

    def answer(self, *, body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        for name, (status, code) in ERRORS.items():
            if repo.endswith(name):
                return self.reply(status, b"{}", {"X-Error-Code": code}, body=body)
        if "nowhere" in parts:
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body=body)
        if api:
            siblings = [{"rfilename": name} for name in self.names(repo)]
            found: Any = {"id": repo, "sha": COMMIT, "siblings": siblings, "tags": []}
            if "tree" in parts:
                found = [
                    {"type": "file", "path": n, "size": (self.folder / n).stat().st_size, "oid": n}
                    for n in self.names(repo)
                ]
            return self.reply(200, json.dumps(found).encode(), {}, body=body)
        name = parts[-1]
        if name not in self.names(repo):
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)
        data = (self.folder / name).read_bytes()
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, wanted = 200, self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            stop = int(last) + 1 if last else len(data)
            headers["Content-Range"] = f"bytes {first}-{min(stop, len(data)) - 1}/{len(data)}"
            status, data = 206, data[int(first) : stop]
        if body:
            self.served[name] = self.served.get(name, 0) + len(data)
        self.reply(status, data, headers, body=body)

    def reply(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextlib.contextmanager
def hub(folder: Path) -> Iterator[ThreadingHTTPServer]:
    Hub.folder, Hub.served = folder, {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()


def main() -> None:
    results = {}
    with hub(Path(sys.argv[1])) as server, tempfile.TemporaryDirectory() as home:
        os.environ.update(
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
            HF_HOME=home,
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
        )
        os.environ.pop("HF_HUB_OFFLINE", None)
        from compressor.cli.main import main as compress

        recipe = Path(home) / "recipe.yaml"
        recipe.write_text(
            f"model: org/model\noutput: {home}/out\npasses: [rtn: {{group_size: 32}}]\n"
            "verify: false\n"
        )

        def command(name: str, *arguments: str) -> None:
            Hub.served = {}
            errors, sys.argv = io.StringIO(), ["compress", *arguments]
            code: Any = 0
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                try:
                    compress()
                except SystemExit as left:
                    code = left.code
            results[name] = {"code": code, "errors": errors.getvalue(), "served": dict(Hub.served)}

        command("plan", "plan", str(recipe))
        command("inspect", "inspect", "org/model@main")
        command("run", "run", str(recipe), "--device", "cpu")
        for name in ("gated", "missing", "pickled", "broken"):
            command(name, "plan", str(recipe), "--model", f"org/{name}")
        command("revision", "plan", str(recipe), "--model", "org/model@nowhere")
        server.shutdown()
        server.server_close()
        command("down", "plan", str(recipe), "--model", "org/other")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
