"""A stand-in for `vllm serve` without a model: its completions are hashes of what they were asked
from, adapter and seed included."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from paint_engine.config.bundled import TINY_BASE
from paint_engine.files import ADAPTER_FILE

_NUM_IDS = 256


class _Handler(BaseHTTPRequestHandler):
    adapters: dict[str, str]
    """of each adapter's name, the digest of its weights"""

    def do_GET(self) -> None:
        card = {"id": str(TINY_BASE), "root": str(TINY_BASE), "parent": None}
        self._answer(200, {"data": [card]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            weights = self.adapters.get(body["model"], "base")
            self._answer(200, {"choices": [complete(body, weights)]})
        elif self.path == "/v1/load_lora_adapter":
            if not body["lora_name"]:
                return self._answer(400, {"error": "both name and path are needed"})
            weights = (Path(body["lora_path"]) / ADAPTER_FILE).read_bytes()
            self.adapters[body["lora_name"]] = hashlib.sha256(weights).hexdigest()
            self._answer(200, {})
        else:
            self.adapters.pop(body["lora_name"], None)
            self._answer(200, {})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing of each request."""


def complete(request: dict[str, Any], weights: str) -> dict[str, Any]:
    """Returns a choice of as many tokens as may be, a pure function of weights, prompt and seed."""
    asked = json.dumps([weights, request["prompt"], request["seed"]]).encode()
    # Without a choice, the processed log-probability is 0.
    scale = 0.0 if request["top_k"] == 1 else -1 / 256
    digests = [
        hashlib.sha256(asked + place.to_bytes(4)).digest() for place in range(request["max_tokens"])
    ]
    ids = [digest[0] % _NUM_IDS for digest in digests]
    return {
        "index": 0,
        "text": "",
        "prompt_token_ids": request["prompt"],
        "token_ids": ids,
        "logprobs": {"token_logprobs": [scale * digest[1] for digest in digests]},
        "finish_reason": "length",
    }


@contextmanager
def serving() -> Iterator[str]:
    """Serves on a free port of this machine inside; yields the address."""
    handler = type("Handler", (_Handler,), {"adapters": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
