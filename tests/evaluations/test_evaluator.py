"""The evaluator as a program: what it prints, what must not change its numbers, and what it says of bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT
from PIL import Image
from small_inception import WIDTH, SmallBackend, pixels, use_small_backend

from evaluations import errors, evaluator, make_reference
from evaluations.errors import EvaluationError
from evaluations.features import dinov2, moments, reference
from evaluations.files.images import open_images
from evaluations.scores import comparison
from evaluations.scores.kid import kernel_distance

EVALUATOR = ROOT / "evaluations" / "evaluator.py"


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The evaluator on SmallBackend, with a cache folder of its own."""
    use_small_backend(monkeypatch, tmp_path / "cache")


@pytest.fixture
def files(tmp_path) -> SimpleNamespace:
    np.savez(tmp_path / "ref.npz", arr_0=pixels(60, 0))
    np.savez(tmp_path / "samples.npz", arr_0=pixels(40, 1, brightness=10))
    return SimpleNamespace(ref=tmp_path / "ref.npz", samples=tmp_path / "samples.npz", folder=tmp_path)


def scores(*argv: object) -> dict[str, float]:
    out = Path(str(argv[1])).with_suffix(".json")
    evaluator.main([*map(str, argv), "--json", str(out)])
    return json.loads(out.read_text())["scores"]


def test_prints_adms_lines_and_the_protocol(small, files, capsys):
    evaluator.main([str(files.ref), str(files.samples)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "Inception Score",
        "FID",
        "sFID",
        "Precision",
        "Recall",
        "protocol",
    ]
    assert all(float(line.split(": ")[1]) > 0 for line in lines[:-1])
    for part in ("60 images of 8x8", "40 images of 8x8", "sha256 " + "0" * 64, "split_size 5000", "k 3"):
        assert part in lines[-1]


def test_the_numbers_are_the_formulas_of_the_features(small, files):
    found = scores(files.ref, files.samples, "--split_size", 25, "--k", 2)
    backend = SmallBackend(SimpleNamespace(batch_size=8, workers=0))
    ref, samples = (backend.features(open_images(path), "") for path in (files.ref, files.samples))
    assert found == {
        "inception_score": evaluator.inception_score(samples.pool, backend.softmax_weight, 25),
        "fid": evaluator.frechet_distance(*moments.statistics(ref.pool), *moments.statistics(samples.pool)),
        "sfid": evaluator.frechet_distance(*ref.spatial_statistics, *samples.spatial_statistics),
        **evaluator.precision_recall(ref.pool, samples.pool, 2)._asdict(),
    }


def as_container(kind: str, images: np.ndarray, folder: Path) -> Path:
    path = folder / f"images.{kind}" if kind != "folder" else folder / "images"
    if kind == "npz":
        np.savez_compressed(path, arr_0=images)
        return path
    plain = folder / "images"
    plain.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(plain / f"{i:05d}.png")
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in plain.iterdir():
                archive.write(file, file.name)
    return path


@pytest.mark.parametrize("kind", ["npz", "folder", "zip"])
@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (7, 3), (64, 1)])
def test_container_batch_size_and_workers_change_nothing(small, files, kind, batch_size, workers):
    expected = scores(files.ref, files.samples)
    path = as_container(kind, pixels(40, 1, brightness=10), files.folder)
    assert scores(files.ref, path, "--batch_size", batch_size, "--workers", workers) == pytest.approx(
        expected, rel=1e-6
    )


def test_a_set_against_itself_and_sets_swapped(small, files):
    same = scores(files.ref, files.ref)
    assert same["fid"] < 1e-8
    assert (same["precision"], same["recall"]) == (1, 1)
    there, back = scores(files.ref, files.samples), scores(files.samples, files.ref)
    assert there["fid"] == pytest.approx(back["fid"], rel=1e-9)
    assert (there["precision"], there["recall"]) == (back["recall"], back["precision"])


def test_the_references_features_are_kept(small, files):
    first = scores(files.ref, files.samples)
    assert SmallBackend.calls == 2
    assert scores(files.ref, files.samples) == first
    assert SmallBackend.calls == 3  # the samples
    copy = files.folder / "copy.npz"
    copy.write_bytes(files.ref.read_bytes())
    scores(copy, files.samples)
    assert SmallBackend.calls == 4
    np.savez(copy, arr_0=pixels(60, 5))  # other images under the same name
    assert scores(copy, files.samples) != first
    assert SmallBackend.calls == 6
    scores(files.ref, files.samples, "--no_cache")
    assert SmallBackend.calls == 8


def test_a_damaged_cache_is_made_anew(small, files, capsys):
    first = scores(files.ref, files.samples)
    for kept in list((files.folder / "cache" / "features").iterdir()):
        kept.write_bytes(kept.read_bytes()[:100])
    assert scores(files.ref, files.samples) == first
    assert "made anew" in capsys.readouterr().err
    assert SmallBackend.calls == 4


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(small, files, monkeypatch, capsys):
    (files.folder / "file").write_text("")
    monkeypatch.setenv("MT_DIFFUSION_CACHE", str(files.folder / "file"))
    assert scores(files.ref, files.samples)["fid"] > 0
    assert "not kept" in capsys.readouterr().err


def test_a_reference_lends_its_statistics(small, files, capsys):
    out = files.folder / "made" / "reference.npz"
    make_reference.main([str(files.ref), str(out), "--images", "20"])
    assert "statistics of 60 images of 8x8, 20 of them stored" in capsys.readouterr().out
    with np.load(out, allow_pickle=False) as made:
        assert made["arr_0"].shape == (20, 8, 8, 3)
        np.testing.assert_array_equal(made["arr_0"], pixels(60, 0)[::3])
        assert made["mu"].shape == (WIDTH,)
        assert made["sigma_s"].shape == (WIDTH, WIDTH)
    assert reference.stored_weights(out) == SmallBackend.network_sha256
    direct, lent = scores(files.ref, files.samples), scores(out, files.samples)
    assert {key: lent[key] for key in ("fid", "sfid")} == pytest.approx({key: direct[key] for key in ("fid", "sfid")})
    assert lent["recall"] != direct["recall"]  # of the images that are stored


def test_statistics_made_with_other_weights_are_noticed(small, files, monkeypatch, capsys):
    make_reference.main([str(files.ref), str(files.folder / "r.npz")])
    scores(files.folder / "r.npz", files.samples)
    assert "other weights" not in capsys.readouterr().err
    monkeypatch.setattr(SmallBackend, "network_sha256", "1" * 64)
    scores(files.folder / "r.npz", files.samples, "--metrics", "is")
    assert "other weights" not in capsys.readouterr().err
    scores(files.folder / "r.npz", files.samples)
    assert "r.npz: its statistics were made with other weights than no.pth" in capsys.readouterr().err


def test_samples_lend_their_statistics_too(small, files, capsys):
    """As in ADM: a file against itself has distance 0 also where few of its images are stored."""
    made = files.folder / "made.npz"
    make_reference.main([str(files.ref), str(made), "--images", "5"])
    assert scores(made, made, "--metrics", "fid,sfid") == pytest.approx({"fid": 0, "sfid": 0}, abs=1e-8)
    assert "singular" not in capsys.readouterr().err


def test_statistics_of_another_network_are_refused(small, files):
    np.savez(files.ref, arr_0=pixels(60, 0), mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(EvaluationError, match=r"ref\.npz: mu has 5 values, Inception's has 12"):
        scores(files.ref, files.samples)


def test_a_reference_is_not_written_over_its_source(small, files):
    with pytest.raises(EvaluationError, match=r"ref\.npz: is the source itself"):
        make_reference.main([str(files.ref), str(files.ref)])
    (files.folder / "d.npz").mkdir()
    with pytest.raises(EvaluationError, match=r"d\.npz: is a folder"):
        make_reference.main([str(files.ref), str(files.folder / "d.npz")])
    assert SmallBackend.calls == 0


def test_an_interrupt_leaves_no_half_files(small, files, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(reference.np.lib.format, "write_array_header_1_0", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_reference.main([str(files.ref), str(files.folder / "out" / "r.npz")])
    assert list((files.folder / "out").iterdir()) == []


def test_what_was_computed_is_kept_when_a_later_score_fails(small, files, monkeypatch):
    def fails(self):
        raise EvaluationError("no")

    monkeypatch.setitem(comparison.METRICS, "pr", comparison.Metric(fails))
    out = files.folder / "new" / "s.json"
    with pytest.raises(EvaluationError):
        evaluator.main([str(files.ref), str(files.samples), "--json", str(out)])
    assert set(json.loads(out.read_text())["scores"]) == {"inception_score", "fid", "sfid"}
    with pytest.raises(EvaluationError, match="is a folder"):
        evaluator.main([str(files.ref), str(files.samples), "--json", str(out.parent)])


def test_without_torch_fidelity_kid_is_left_out_or_refused(small, files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    np.savez(files.samples, arr_0=pixels(WIDTH, 1))
    assert "kid" not in scores(files.ref, files.samples)
    assert "KID needs torch-fidelity" in capsys.readouterr().err
    with pytest.raises(EvaluationError, match=r"pip install '\.\[eval\]'"):
        scores(files.ref, files.samples, "--metrics", "kid")


def test_statistics_alone_give_the_frechet_distances(small, files, capsys):
    make_reference.main([str(files.ref), str(files.folder / "r.npz"), "--images", "0"])
    found = scores(files.folder / "r.npz", files.samples)
    assert set(found) == {"inception_score", "fid", "sfid"}
    assert "left out: pr" in capsys.readouterr().err
    assert SmallBackend.calls == 2  # for the reference and for the samples, none in between
    with pytest.raises(EvaluationError, match=r"r\.npz: holds no images \(arr_0\), which pr need"):
        scores(files.folder / "r.npz", files.samples, "--metrics", "fid,pr")


def test_metrics_are_picked(small, files):
    assert set(scores(files.ref, files.samples, "--metrics", "sfid,is")) == {"inception_score", "sfid"}
    assert SmallBackend.calls == 2
    with pytest.raises(EvaluationError, match=r"no 'fidd' \(did you mean fid\?\)"):
        scores(files.ref, files.samples, "--metrics", "fidd")


def test_the_inception_score_asks_nothing_of_the_reference(small, files):
    scores(files.ref, files.samples, "--metrics", "is")
    assert SmallBackend.calls == 1


def test_few_images_get_a_warning_and_kid(small, files, capsys):
    pytest.importorskip("torch_fidelity")
    np.savez(files.samples, arr_0=pixels(WIDTH, 1))
    found = scores(files.ref, files.samples)
    assert "samples.npz: 12 images for 12 features: the covariance is singular" in capsys.readouterr().err
    assert {"kid", "kid_std", "fid"} <= set(found)


def test_kid_is_the_unbiased_estimate():
    pytest.importorskip("torch_fidelity")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 6)), rng.standard_normal((50, 6)) + 0.3

    def kernel(a, b):
        return (a @ b.T / 6 + 1) ** 3

    def off_diagonal(k):
        return (k.sum() - np.trace(k)) / (50 * 49)

    expected = off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()
    assert kernel_distance(x, y) == (pytest.approx(expected, rel=1e-6), 0.0)


def test_sizes_that_differ_are_said(small, files, monkeypatch, capsys):
    np.savez(files.samples, arr_0=pixels(40, 1, size=16))
    monkeypatch.setattr(SmallBackend, "network", lambda self, x: (x[:, :4, 0].reshape(len(x), -1) * 1.0,) * 2)
    scores(files.ref, files.samples)
    assert "reference images are 8x8, samples 16x16" in capsys.readouterr().err


def test_features_that_are_not_finite_stop_it(small, files, monkeypatch):
    monkeypatch.setattr(SmallBackend, "network", lambda self, x: (np.full((len(x), 4), np.nan),) * 2)
    with pytest.raises(EvaluationError, match=r"samples\.npz: features of images 0 to 39 are not finite"):
        scores(files.ref, files.samples)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{ref}", "nowhere.npz"], "nowhere.npz"),
        (["{ref}", "{samples}", "--inception", "nowhere.pth"], "nowhere.pth: no such file (--inception)"),
        (["{ref}", "{samples}", "--inception", "{samples}"], "samples.npz: not a PyTorch file of tensors"),
        (
            ["{ref}", "{samples}", "--inception", "{samples}", "--backend", "tensorflow"],
            "not a frozen TensorFlow graph",
        ),
        (["{ref}", "{samples}", "--device", "cuda:99"], "--device cuda:99: not here"),
        (["{ref}", "{samples}", "--batch_size", "0"], "--batch_size must be 1 or more, not 0"),
        (["{ref}", "{samples}", "--k", "60"], "need at least 61 images on both sides, found 40"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(files, argv, message):
    argv = [word.format(ref=files.ref, samples=files.samples) for word in argv]
    result = warm.run(EVALUATOR, argv, cwd=files.folder)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert "Traceback" not in result.stderr


def test_the_published_weights_are_named_where_they_cannot_be_had(files):
    environment = {"MT_DIFFUSION_CACHE": str(files.folder / "c"), "TORCH_HOME": str(files.folder / "t")}
    environment |= {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "PATH": "/usr/bin:/bin"}
    result = warm.run(EVALUATOR, [files.ref, files.samples], env=environment)
    assert result.returncode == 2
    assert "put weights-inception-2015-12-05-6726825d.pth into" in result.stderr.splitlines()[-1]
    assert str(files.folder / "c") in result.stderr.splitlines()[-1]


def test_real_features_through_both_backends(files, inception_pb, monkeypatch):
    """The whole way with the random Inception graph: torch-fidelity here, TensorFlow in its process."""
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("MT_DIFFUSION_CACHE", str(files.folder / "cache"))
    np.savez(files.ref, arr_0=pixels(6, 0, size=32))
    np.savez(files.samples, arr_0=pixels(6, 1, brightness=50, size=32))
    flags = ["--inception", inception_pb, "--metrics", "is,fid,pr"]
    ours = scores(files.ref, files.samples, *flags)
    theirs = scores(files.ref, files.samples, *flags, "--backend", "tensorflow")
    assert set(ours) == {"inception_score", "fid", "precision", "recall", "kid", "kid_std"}
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours["fid"] > 1


HUBCONF = """
import torch
dependencies = ["torch"]
class Tokens(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x.mean((2, 3)), x.std((2, 3)), x[:, :, 0, 0]], 1)
def dinov2_vitl14(**kwargs):
    return Tokens()
"""


def test_fd_dinov2_resizes_as_published(files, monkeypatch):
    """A repository in torch.hub's cache; what reaches its network is Pillow's bicubic image, normalised."""
    pytest.importorskip("torch_fidelity")
    hub = files.folder / "hub"
    (hub / "facebookresearch_dinov2_main").mkdir(parents=True)
    (hub / "facebookresearch_dinov2_main" / "hubconf.py").write_text(HUBCONF)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(hub))
    np.savez(files.samples, arr_0=pixels(8, 1, size=300))
    found = scores(files.samples, files.ref, "--metrics", "fd_dinov2")
    assert found["fd_dinov2"] > 0
    network = dinov2.DinoV2("cpu")
    mu, _ = network.statistics(open_images(files.samples), 3, 2, "images")
    x = np.stack(
        [np.asarray(Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC)) for x in pixels(8, 1, size=300)]
    )
    x = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(mu[:3], x.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(mu[6:], x[:, 0, 0].mean(0), atol=1e-5)


@pytest.mark.parametrize(
    ("missing", "flags", "package"),
    [
        ("requests", [], "requests"),
        ("torch_fidelity", [], "torch-fidelity"),
        ("torch_fidelity", ["--metrics", "fd_dinov2"], "torch-fidelity"),
    ],
)
def test_a_missing_package_is_one_line_with_the_way_to_it(files, missing, flags, package):
    program = files.folder / "program.py"
    program.write_text(
        "import sys\n"
        f"for name in [{missing!r}, *sys.modules]:\n"
        f"    if name.split('.')[0] == {missing!r}: sys.modules[name] = None\n"
        "from evaluations.evaluator import console\nconsole()\n"
    )
    environment = {"MT_DIFFUSION_CACHE": str(files.folder / "c"), "TORCH_HOME": str(files.folder)}
    result = warm.run(program, [files.ref, files.samples, *flags], env={**environment, "PATH": "/usr/bin:/bin"})
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]
    assert package in line
    assert "pip install '.[eval]'" in line
    assert "Traceback" not in result.stderr


def test_the_tensorflow_process_leaves_with_its_parent(tmp_path):
    """A parent that is killed leaves nobody behind."""
    child = "import os, time; from evaluations.features.tensorflow_worker import end_with; end_with(os.getppid()); time.sleep(60)"
    parent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True); p.wait()"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    pid = int(process.stdout.readline())
    time.sleep(3)
    process.kill()
    process.wait()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.1)
    pytest.fail("still there")


def test_formulas_need_no_extra():
    """`frechet_distance` and its like import where torch-fidelity, lpips and TensorFlow are not there."""
    code = (
        "import sys\n"
        "for name in ('torch_fidelity', 'lpips', 'tensorflow', 'torchvision'): sys.modules[name] = None\n"
        "from evaluations.evaluator import frechet_distance, inception_score, precision_recall\n"
        "import numpy as np\n"
        "print(frechet_distance(np.ones(2), np.eye(2), np.zeros(2), np.eye(2)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert float(result.stdout) == pytest.approx(2), result.stderr


def test_a_reader_that_leaves_early_is_no_error(monkeypatch):
    def main(argv):
        raise BrokenPipeError

    monkeypatch.setattr(errors.os, "dup2", lambda *_: None)
    with pytest.raises(SystemExit) as exit_:
        errors.run(main, [])
    assert exit_.value.code == 1
