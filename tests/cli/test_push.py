"""`moe-peft push`: what is sent, where, and what is said before anything is sent."""

import base64
import http.server
import json
import sys
import threading
import types

import numpy as np
import pytest

from moe_peft import errors, methods
from moe_peft.cli import main
from moe_peft.cli import push as push_lib
from moe_peft.convert import adapter_folder
from moe_peft.weights import saved_run


def saved():
    described = {"method": methods.mov(2).describe(), "backbone": {"fingerprint": "f"}}
    tree = {"encoder": {"adapter": {"vectors": np.arange(3, dtype=np.float32)}}}
    return saved_run.Saved(7, tree, {}, {"description": described})


@pytest.fixture
def folder(tmp_path):
    """An adapter folder, and something in it that is nobody else's."""
    made = adapter_folder.write(saved(), tmp_path / "mov")
    (made / "secret.env").write_text("TOKEN=1")
    return made


def push(*arguments):
    return main.main(["push", *map(str, arguments)])


def refused(capsys, *arguments):
    assert push(*arguments) == main.USER_ERROR
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.fixture
def hub(monkeypatch):
    """A stand-in of the library; `calls` is what was asked of it."""
    made = types.ModuleType("huggingface_hub")
    made.calls, made.token, made.is_private, made.error = [], "hf_of_the_test", True, None

    class HfApi:
        endpoint = "https://hub.test"

        def create_repo(self, repo, **how):
            made.calls.append(("create", repo, how))
            if made.error:
                raise made.error

        def model_info(self, repo):
            return types.SimpleNamespace(private=made.is_private)

        def upload_folder(self, **what):
            held = sorted(path.name for path in what["folder_path"].iterdir())
            made.calls.append(("upload", held, what))

    made.HfApi, made.get_token = HfApi, lambda: made.token
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    return made


def test_a_folder_is_sent(hub, folder, capsys):
    assert push(folder, "me/mov", "--message", "second try") == 0
    assert "sent to https://hub.test/me/mov" in capsys.readouterr().out
    assert hub.calls[0] == ("create", "me/mov", {"private": None, "exist_ok": True})
    (_, _, what) = hub.calls[1]
    assert (what["repo_id"], what["folder_path"]) == ("me/mov", folder)
    assert what["commit_message"] == "second try"
    assert what["allow_patterns"] == list(adapter_folder.FILES)


def test_a_run_is_sent_as_a_folder(hub, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    load = saved_run.load
    monkeypatch.setattr(saved_run, "load", lambda path: saved() if path == run else load(path))
    assert push(run, "me/mov") == 0
    assert hub.calls[1][1] == ["README.md", "adapter.safetensors", "adapter_config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_private_is_not_sent_to_a_public_repository(hub, folder, capsys):
    assert push(folder, "me/mov", "--private") == 0
    assert hub.calls[0][2]["private"] is True
    hub.is_private = False
    assert "public, so nothing was sent" in refused(capsys, folder, "me/mov", "--private")
    assert [name for name, *_ in hub.calls] == ["create", "upload", "create"]


def test_what_is_wrong_is_said_before_anything_is_asked(hub, folder, capsys, monkeypatch):
    assert "expected NAME/REPO" in refused(capsys, folder, "mov")
    assert "no training checkpoint" in refused(capsys, folder.parent, "me/mov")
    hub.token = None
    error = refused(capsys, folder, "me/mov")
    assert "no token for https://hub.test; run `hf auth login`" in error
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'moe-peft-jax[hub]'" in refused(capsys, folder, "me/mov")
    assert not hub.calls


def test_what_the_library_raises_is_one_line(hub, folder):
    hub.error = RuntimeError("401 Client Error.\n\nInvalid username or password.\n")
    what = "https://hub.test/me/mov cannot be written: 401 Client Error. Invalid username or"
    with pytest.raises(errors.UserError, match=what):
        push_lib.push(folder, "me/mov", private=False, message=None)
    assert len(hub.calls) == 1


# With the library itself, and a stand-in of what it talks to.


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the Hub that sending a folder needs."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.asked.append((self.command, self.path, self.headers["Authorization"], body))
        address = f"https://huggingface.co/{self.server.repo}"
        found = {}
        if self.headers["Authorization"] not in (None, "Bearer hf_right"):
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path.endswith("/repos/create"):
            found = {"url": address}
        elif "/tree/" in self.path:
            old = {"type": "file", "path": "adapter_model.safetensors", "oid": "0", "size": 1}
            found = [old, {**old, "path": "notes.txt"}]
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            found = {"files": [{"path": name, **how} for name in names]}
        elif "/commit/" in self.path:
            found = {"commitUrl": f"{address}/commit/1", "commitOid": "1", "pullRequestUrl": None}
        elif self.path.startswith(f"/api/models/{self.server.repo}"):
            found = {"id": self.server.repo, "private": True, "siblings": [], "tags": []}
        return self.answer(found)

    do_GET = do_POST

    def answer(self, found, code=200):
        content = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A stand-in of the Hub at a port of this machine; `asked` is what came."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs the extra 'hub'")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as made:
        made.asked, made.repo = [], "me/mov"
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{made.server_address[1]}")
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.mark.filterwarnings("ignore")
def test_the_hub_gets_the_files_of_the_folder_and_no_others(server, folder):
    assert push(folder, "me/mov", "--private", "--message", "second try") == 0
    command, path, token, body = server.asked[-1]
    assert (command, path, token) == ("POST", "/api/models/me/mov/commit/main", "Bearer hf_right")
    lines = [json.loads(line) for line in body.splitlines()]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }
    names = ("README.md", "adapter.safetensors", "adapter_config.json")
    assert sent == {name: (folder / name).read_bytes() for name in names}
    # What the folder no longer has goes; what was never of it stays.
    gone = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
    assert gone == ["adapter_model.safetensors"]
    assert lines[0]["value"]["summary"] == "second try"
    create = next(body for _, path, _, body in server.asked if path == "/api/repos/create")
    assert b"private" in create


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_token_and_no_network_are_one_line(server, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "401" in refused(capsys, folder, "me/mov")
    assert not [path for _, path, *_ in server.asked if "commit" in path or "preupload" in path]
    server.shutdown()
    server.server_close()
    assert "me/mov cannot be written: " in refused(capsys, folder, "me/mov")
