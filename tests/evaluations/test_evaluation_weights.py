"""Finding and fetching pretrained weights: from a server of our own that can break off and go on."""

from __future__ import annotations

import hashlib
import http.server
import multiprocessing
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evaluations.errors import EvaluationError
from evaluations.features import weights

CONTENT = np.random.default_rng(0).bytes(3_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT with ranges; breaks off after `server.breaks_at` bytes of the first answers, `server.breaks` times."""

    def do_GET(self):
        server = self.server
        server.ranges.append(self.headers.get("Range"))
        if self.path != "/w.bin":
            self.send_error(404)
            return
        start = int(self.headers["Range"].split("=")[1].rstrip("-")) if self.headers.get("Range") else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        start = start if server.resumes else 0
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.breaks:
            server.breaks -= 1
            body = body[: server.breaks_at]
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.ranges, server.breaks, server.breaks_at, server.resumes = [], 0, 1_000_000, True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def published(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MT_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return weights.Weights("w.bin", f"http://127.0.0.1:{server.server_port}/w.bin", DIGEST[:8], "--inception")


def test_a_download_is_checked_named_and_found_again(published, server):
    path = weights.find(published)
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["w.bin"]
    assert weights.find(published) == path
    assert len(server.ranges) == 1


@pytest.mark.parametrize("resumes", [True, False])
def test_a_broken_download_goes_on_where_it_was(published, server, resumes):
    server.breaks, server.resumes = 1, resumes
    with pytest.raises(EvaluationError, match=r"put w\.bin into .*cache, or give its path with --inception"):
        weights.find(published)
    assert not (weights.cache_folder() / "w.bin").exists()
    assert weights.find(published).read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={1_000_000 // 65536 * 65536}-"]


def test_a_complete_part_is_only_checked(published, server):
    weights.cache_folder().mkdir(parents=True)
    (weights.cache_folder() / "w.bin.part").write_bytes(CONTENT)
    assert weights.find(published).read_bytes() == CONTENT


def test_another_file_than_the_published_one_is_refused(published):
    with pytest.raises(EvaluationError, match=f"sha256 {DIGEST[:16]}"):
        weights.find(replace(published, sha256="00000000"))
    assert list(weights.cache_folder().iterdir()) == []


def test_processes_that_want_the_same_file_take_turns(published, server):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=weights.find, args=(published,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (weights.cache_folder() / "w.bin").read_bytes() == CONTENT
    assert len(server.ranges) == 1


def test_files_that_torch_hub_has_are_used(published, server, tmp_path):
    kept = tmp_path / "torch" / "hub" / "checkpoints" / "w.bin"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"x")
    assert weights.find(published) == kept
    assert server.ranges == []


def test_a_given_file_must_be_there(published, tmp_path):
    with pytest.raises(EvaluationError, match=r"none\.pth: no such file \(--inception\)"):
        weights.find(published, tmp_path / "none.pth")
    given = tmp_path / "mine.pth"
    given.write_bytes(b"x")
    assert weights.find(published, given) == given


def test_what_the_server_says_is_said(published, tmp_path):
    with pytest.raises(EvaluationError, match="HTTP 404"):
        weights.find(replace(published, url=published.url.replace("w.bin", "other")))
    with pytest.raises(EvaluationError, match="ConnectionError"):
        weights.find(replace(published, url="http://127.0.0.1:9/w.bin"))


def test_names_carry_the_hash_that_is_checked():
    for known in (weights.INCEPTION_TORCH, weights.ALEXNET):
        assert known.sha256 in known.name
        assert Path(known.url).name == known.name


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.ckpt"])
def test_content_decides_and_wrappers_are_undone(name, tmp_path):
    state = {"a.weight": torch.ones(2)}
    file = tmp_path / name
    for content in (state, {"module._orig_mod.a.weight": state["a.weight"]}, {"state_dict": state, "epoch": 3}):
        torch.save(content, file)
        assert weights.read_tensors(file, "--x takes y").keys() == state.keys()
    save_file(state, file)
    assert weights.read_tensors(file, "--x takes y").keys() == state.keys()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"", "not a PyTorch file of tensors, or a damaged one"),
    ],
)
def test_what_is_no_weights_file_is_told_so(content, expected, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(EvaluationError, match=f"x.pth: {expected}.*--x takes y"):
        weights.read_tensors(tmp_path / "x.pth", "--x takes y")
