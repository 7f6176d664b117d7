"""A hub id is downloaded: from a server on this machine that answers as the hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lowbit.errors import CheckpointError
from lowbit.pipeline.locate import locate, model_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RUN = """
import sys
from lowbit.pipeline.locate import locate, model_name
path = locate("tiny/llama")
print(path)
import lowbit
result = lowbit.quantize("tiny/llama", "int4-sym-g32-rtn")
print(result.path)
"""


@pytest.fixture
def hub(model_folder):
    """The address of a hub that holds tiny/llama, with a pickle and a script beside the weights, and the paths that were asked for."""
    files = {file.name: file.read_bytes() for file in model_folder("llama").iterdir()} | {"pytorch_model.bin": b"a pickle", "modeling.py": b"raise SystemExit"}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, *, body: bool):
            asked.append(self.path)
            if self.path.startswith("/api/models/tiny/llama/tree/"):
                entries = [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for name, data in files.items()]
                data, kind = json.dumps(entries).encode(), "application/json"
            elif self.path.startswith("/api/models/tiny/llama"):
                data, kind = json.dumps({"id": "tiny/llama", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}).encode(), "application/json"
            elif self.path.startswith("/tiny/llama/resolve/") and self.path.rpartition("/")[2] in files:
                data, kind = files[self.path.rpartition("/")[2]], "application/octet-stream"
            else:
                self.send_error(404)
                return
            self.send_response(200)
            for key, value in (("Content-Type", kind), ("Content-Length", str(len(data))), ("ETag", f'"{hashlib.sha256(data).hexdigest()}"'), ("X-Repo-Commit", COMMIT)):
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def test_a_hub_id_is_downloaded_without_pickles_and_scripts(hub, tmp_path):
    address, asked = hub
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("HF_HUB_OFFLINE", None)
    made = subprocess.run([sys.executable, "-c", RUN], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    path, output = made.stdout.split()
    assert {file.name for file in Path(path).iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not any(name.endswith((".bin", ".py")) for name in asked)
    assert output == "llama-int4-sym-g32-rtn" and (tmp_path / output / "model.safetensors").is_file()


def test_what_is_neither_a_path_nor_on_the_hub(tmp_path):
    with pytest.raises(CheckpointError, match="no path here, and the Hugging Face hub cannot be reached|neither a path here nor a model on the hub"):
        locate("nobody/has-this-model-0123")
    with pytest.raises(CheckpointError, match="does not exist. Expected a folder"):
        locate(tmp_path / "no such folder")


def test_names():
    assert model_name(Path("/cache/models--org--name/snapshots/0123")) == "name"
    assert model_name(Path("/models/llama.gguf")) == "llama" and model_name(Path("/models/llama")) == "llama"
