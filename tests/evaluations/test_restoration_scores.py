"""evaluations/restoration.py: LPIPS, PSNR and SSIM against other ways to compute them, Table 1, and bad input."""

from __future__ import annotations

import csv
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT
from scipy.ndimage import gaussian_filter

from evaluations.errors import EvaluationError
from evaluations.features import weights
from evaluations.restoration import mae, main, mse, psnr, ssim
from evaluations.scores.perceptual import LEAST_SIZE, Lpips
from evaluations.scores.region_scores import METRICS, Score
from evaluations.tables import table1
from guided_mt.commands.restore import region_errors

SCRIPT = ROOT / "evaluations" / "restoration.py"
WITHOUT_LPIPS = ["--metrics", "psnr,ssim,mse,mae"]


def images(count: int, size: int = 40, seed: int = 0) -> np.ndarray:
    """Smooth images with noise: uint8 [count, size, size + 2, 3]."""
    noise = np.random.default_rng(seed).normal(size=(count, size, size + 2, 3))
    smooth = gaussian_filter(noise, (0, 3, 3, 0)) * 400 + noise * 10 + 128
    return np.clip(smooth, 0, 255).astype(np.uint8)


def restored_file(
    count: int = 5, size: int = 40, seed: int = 0, noise: int = 1, masks: int = 7
) -> dict[str, np.ndarray]:
    """Arrays as image_restore writes them. `noise` is the seed of the restoration, `masks` that of the masks."""
    original = images(count, size, seed)
    mask = np.random.default_rng(masks).random(original.shape[:3]) < 0.3
    error = np.random.default_rng(noise).normal(size=original.shape) * 12
    restored = np.clip(original + error, 0, 255).astype(np.uint8)
    masked = np.where(mask[..., None], np.uint8(127), original)
    return {
        "arr_0": restored,
        "original": original,
        "masked": masked,
        "restored": restored,
        "mask": np.where(mask, 255, 0).astype(np.uint8),
    }


def save(path: Path, **changes: np.ndarray | None) -> Path:
    """A file of `restored_file`, with arrays changed, or left out where None."""
    arrays = {**restored_file(), **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def build_lpips() -> torch.nn.Module:
    """Package lpips by itself with the trunk of a seed."""
    import lpips

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return lpips.LPIPS(pnet_rand=True, verbose=False)


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return build_lpips()


@pytest.fixture(scope="module")
def alexnet(reference, tmp_path_factory) -> Path:
    """The reference's trunk as torchvision writes AlexNet, with a classifier that is of no use here."""
    state = {"features." + name.split(".", 1)[1]: tensor for name, tensor in reference.net.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save({**state, "classifier.6.bias": torch.zeros(1000)}, path)
    return path


@pytest.fixture(scope="module")
def distance(alexnet) -> Lpips:
    return Lpips(alexnet, "cpu")


# LPIPS


def test_lpips_is_that_of_the_package(distance, reference):
    a, b = images(4, seed=1), images(4, seed=2)
    with torch.no_grad():
        expected = reference(*(torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1 for x in (a, b))).flatten()
    found = distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found.shape == (4,) and len(set(found.tolist())) == 4
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_lpips_is_a_distance_and_independent_of_the_batch(distance):
    a, b = (torch.from_numpy(images(5, seed=seed)) for seed in (1, 2))
    assert (distance(a, a) == 0).all()
    both = distance(a, b)
    assert (both > 0.01).all()
    torch.testing.assert_close(distance(b, a), both, rtol=0, atol=1e-7)
    torch.testing.assert_close(torch.cat([distance(a[:3], b[:3]), distance(a[3:], b[3:])]), both, rtol=0, atol=1e-6)


def test_lpips_least_size(distance):
    """LEAST_SIZE is AlexNet's limit, neither more nor less."""
    a = torch.from_numpy(images(1, LEAST_SIZE))
    assert distance(a, 255 - a).item() > 0
    with pytest.raises(RuntimeError, match="too small"):
        distance.model(*2 * [torch.zeros(1, 3, LEAST_SIZE - 1, 64)])
    with pytest.raises(EvaluationError, match="30x42 pixels: LPIPS needs 31x31"):
        distance(a[:, 1:, :].expand(1, 30, 33, 3).repeat(1, 1, 2, 1)[:, :, :42], torch.zeros(1, 30, 42, 3))


def test_lpips_from_safetensors_and_without_a_word(alexnet, distance, tmp_path, recwarn, capsys):
    from safetensors.torch import save_file

    save_file(torch.load(alexnet), tmp_path / "alexnet.safetensors")
    a, b = (torch.from_numpy(images(2, seed=seed)) for seed in (1, 2))
    assert torch.equal(Lpips(tmp_path / "alexnet.safetensors")(a, b), distance(a, b))
    assert not recwarn.list and capsys.readouterr() == ("", "")


class Trap:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path, state: path.write_bytes(b"no weights"), "not a PyTorch file of tensors"),
        (lambda path, state: path.write_bytes(b""), "not a PyTorch file of tensors"),
        (
            lambda path, state: torch.save({"features.0.weight": Trap(path.parent / "ran")}, path),
            "not a PyTorch file of tensors",
        ),
        (
            lambda path, state: path.write_bytes(pickle.dumps(Trap(path.parent / "ran"))),
            "not a PyTorch file of tensors",
        ),
        (lambda path, state: torch.save(torch.zeros(3), path), "holds no state dict of tensors"),
        (lambda path, state: torch.save({"epoch": 3, "model": "alexnet"}, path), "holds no state dict of tensors"),
        (
            lambda path, state: torch.save({**state, "features.8.bias": torch.zeros(7)}, path),
            r"has features.8.bias \[7\], .* features.8.bias \[256\]",
        ),
    ],
)
def test_lpips_refuses_other_files(make, message, alexnet, tmp_path):
    path = tmp_path / "weights.pth"
    make(path, torch.load(alexnet))
    with pytest.raises(EvaluationError, match=message) as raised:
        Lpips(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_lpips_of_damaged_weights(alexnet, tmp_path):
    state = torch.load(alexnet)
    state["features.0.bias"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    a = torch.from_numpy(images(1))
    with pytest.raises(EvaluationError, match="not a number"):
        Lpips(tmp_path / "nan.pth")(a, 255 - a)


# PSNR, SSIM and errors


def test_psnr_by_hand():
    a = np.zeros((3, 2, 2, 3), np.uint8)
    b, mask = a.copy(), np.zeros((3, 2, 2), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    b[0, 0, 0] = (3, 0, 6)  # MSE (9 + 0 + 36) / 3 = 15
    b[0, 1, 0] = 200  # not masked
    found = psnr(a, b, mask)
    assert found[0].item() == pytest.approx(10 * np.log10(255**2 / 15), abs=1e-9)
    assert found[1] == torch.inf and found[2].isnan()


def test_regions():
    """PSNR and MSE see the masked pixels only, MAE the others only."""
    arrays = restored_file()
    a, b, mask = arrays["restored"], arrays["original"], arrays["mask"] > 127
    inside = np.where(mask[..., None], 255 - a, a)
    outside = np.where(mask[..., None], a, 255 - a)
    for function in (psnr, mse):
        assert torch.equal(function(outside, b, mask), function(a, b, mask))
        assert (function(inside, b, mask) != function(a, b, mask)).all()
    assert torch.equal(mae(inside, b, mask), mae(a, b, mask))
    assert (mae(outside, b, mask) > mae(a, b, mask)).all()


def plain_ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Wang et al. 2004, eq. 13 of one channel [H, W], with SciPy's filter: radius int(3.5 * 1.5 + 0.5) = 5, so 11 taps."""

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, mode="mirror", truncate=3.5)

    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


@pytest.mark.parametrize("size", [6, 16, 40])
def test_ssim_against_scipy(size):
    arrays = restored_file(count=3, size=size)
    a, b, mask = arrays["restored"], arrays["original"], arrays["mask"] > 127
    mask[1] = False
    found = ssim(a, b, mask)
    assert found[1].isnan()
    for i in (0, 2):
        maps = np.stack([plain_ssim(a[i, ..., c], b[i, ..., c]) for c in range(3)], axis=-1)
        assert found[i].item() == pytest.approx(maps[mask[i]].mean(), abs=1e-5)  # single precision
        assert abs(maps.mean() - maps[mask[i]].mean()) > 1e-4  # the region matters
    assert ssim(a, a, mask)[0].item() == pytest.approx(1)


def run_json(tmp_path: Path, *argv: str | Path) -> dict:
    """All numbers of a run; NaN and Infinity are not read."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    main([*map(str, argv), "--json", str(tmp_path / "out" / "scores.json")])
    return json.loads((tmp_path / "out" / "scores.json").read_text(), parse_constant=refuse)


@pytest.mark.parametrize("full_mask", [False, True])
def test_errors_are_those_of_image_restore(full_mask, tmp_path):
    arrays = restored_file()
    arrays["mask"][0] = 0
    arrays["mask"][1] = 255
    if full_mask:
        arrays["mask"][:] = 255
    arrays["restored"][2] = arrays["original"][2]
    expected = region_errors(arrays)
    (found,) = run_json(tmp_path, save(tmp_path / "a.npz", **arrays), "--batch_size", 2, *WITHOUT_LPIPS)["files"]
    assert found["restored"]["mse"]["mean"] == pytest.approx(expected["masked_mse"], rel=1e-12)
    assert found["clean_masked"]["mse"]["mean"] == pytest.approx(expected["masked_mse_unrestored"], rel=1e-12)
    assert found["restored"]["mae"]["mean"] == (
        None if full_mask else pytest.approx(expected["unmasked_mae"], rel=1e-12)
    )


def test_mean_and_standard_error():
    values = np.array([1.0, 2.0, 6.0, np.nan, np.inf])
    score = Score.of(values)
    assert (score.mean, score.images, score.without_region, score.exact) == (3, 3, 1, 1)
    assert score.standard_error == pytest.approx(np.sqrt(7 / 3))  # variance 14 / 2
    assert Score.of(values[:1]).standard_error is None
    assert Score.of(values[3:]) == Score(None, None, 0, 1, 1)
    assert Score.of(values[:4], np.array([1, 1, 2, 9])).mean == 15 / 4


# The command


def test_scores_of_a_file(alexnet, distance, tmp_path, capsys):
    arrays = restored_file()
    arrays["mask"][0] = 0
    arrays["restored"][1] = arrays["original"][1]
    path = save(tmp_path / "any.npz", **arrays)
    found = run_json(tmp_path, path, "--lpips_weights", alexnet, "--batch_size", 2)
    out, err = capsys.readouterr()
    scores = found["files"][0]
    each = distance(torch.from_numpy(arrays["restored"]), torch.from_numpy(arrays["original"])).double().numpy()
    lpips = scores["restored"]["lpips"]
    assert lpips["mean"] == pytest.approx(each.mean(), abs=1e-6)
    assert lpips["standard_error"] == pytest.approx(each.std(ddof=1) / np.sqrt(5), abs=1e-6)
    assert scores["clean_masked"]["lpips"]["mean"] > lpips["mean"]
    mask = arrays["mask"] > 127
    each = psnr(arrays["restored"], arrays["original"], mask)[2:]
    assert scores["restored"]["psnr"]["mean"] == pytest.approx(each.mean().item())
    assert [scores["restored"]["psnr"][n] for n in ("images", "without_region", "exact")] == [3, 1, 1]
    assert scores["restored"]["ssim"]["images"] == 4
    assert scores["masked_share"] == mask.mean()

    lines = out.splitlines()
    clean = scores["clean_masked"]["lpips"]["mean"]
    assert lines[0] == f"LPIPS: {lpips['mean']:.4f} +- {lpips['standard_error']:.4f}   (Clean-Masked {clean:.4f})"
    assert lines[1].endswith("images left out: 1 without masked pixels, 1 exact (infinite)")
    assert len(lines) == len(METRICS) + 1
    digest = weights.sha256(alexnet)
    assert f"package 0.1.4), alexnet.pth sha256 {digest[:16]}" in lines[-1] and "5 images of 40x42" in lines[-1]
    assert found["protocol"]["weights_sha256"] == digest
    assert "sha256 does not begin with 7be5be79" in err and err.count("\n") == 1


def test_arr_0_stands_for_restored_and_masks_may_be_bool(tmp_path):
    arrays = restored_file()
    other = np.full_like(arrays["arr_0"], 9)
    runs = [
        run_json(tmp_path, save(tmp_path / "a.npz", **changes), *WITHOUT_LPIPS)["files"][0]["restored"]
        for changes in ({}, {"restored": None}, {"arr_0": other}, {"mask": arrays["mask"] > 127}, {"arr_0": None})
    ]
    assert all(run == runs[0] for run in runs)
    assert (
        runs[0] != run_json(tmp_path, save(tmp_path / "a.npz", restored=other), *WITHOUT_LPIPS)["files"][0]["restored"]
    )


def test_small_images(tmp_path, capsys):
    """LPIPS is left out with a warning, but not where it was asked for."""
    small = save(tmp_path / "small.npz", **restored_file(size=LEAST_SIZE - 1))
    found = run_json(tmp_path, small)
    assert list(found["files"][0]["restored"]) == ["psnr", "ssim", "mse", "mae"]
    assert "images of 30x32 pixels are too small for LPIPS, which needs 31x31: left out\n" in capsys.readouterr().err
    for explicit in (["--metrics", "lpips"], ["--metrics", "psnr,lpips"]):
        with pytest.raises(EvaluationError, match="too small for LPIPS"):
            main([str(small), *explicit])
    with pytest.raises(EvaluationError, match=r"too small for LPIPS.*--table_metric"):
        main([f"mt:5={small}", "--table"])


def test_no_weights(tmp_path, monkeypatch):
    def offline(published, folder):
        raise EvaluationError(f"{published.url}: cannot be downloaded; put {published.name} into {folder}")

    monkeypatch.setattr(weights, "download", offline)
    monkeypatch.setenv("MT_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = save(tmp_path / "a.npz")
    with pytest.raises(EvaluationError, match=f"alexnet-owt-7be5be79.pth into {tmp_path}/cache.*--metrics psnr,ssim"):
        main([str(path)])
    with pytest.raises(EvaluationError, match="--table_metric psnr"):
        main([f"mt:10={path}", "--table"])
    with pytest.raises(EvaluationError, match="no such file"):
        main([str(path), "--lpips_weights", str(tmp_path / "none.pth")])


# Table 1


@pytest.fixture
def table_files(tmp_path) -> list[str]:
    """mt and sdedit with 5 patches, mt with 10 and repaint with 7; the last two named in the argument."""
    kinds = {"restored_mt_patches5": (1, 7), "restored_sdedit_patches5": (2, 7), "b": (3, 8), "c": (4, 9)}
    for name, (noise, masks) in kinds.items():
        save(tmp_path / f"{name}.npz", **restored_file(noise=noise, masks=masks))
    return [
        *(str(tmp_path / f"restored_{method}_patches5.npz") for method in ("mt", "sdedit")),
        *(f"{cell}={tmp_path}/{name}.npz" for cell, name in (("mt:10", "b"), ("repaint:7", "c"))),
    ]


def test_table(table_files, alexnet, tmp_path, capsys):
    argv = [*table_files, "--table", "--lpips_weights", alexnet, "--csv", tmp_path / "t" / "table.csv"]
    found = run_json(tmp_path, *argv)
    lines = capsys.readouterr().out.splitlines()
    by_file = [file["restored"]["lpips"]["mean"] for file in found["files"]]
    clean = [file["clean_masked"]["lpips"]["mean"] for file in found["files"]]
    assert clean[0] == clean[1] and len(set(clean)) == 3 and len(set(by_file)) == 4
    cells = [line.split() for line in lines[:5]]
    assert lines[0].split("   ")[0] == "LPIPS" and [w for w in cells[0] if w.isdigit()] == ["5", "7", "10", "15", "20"]
    assert cells[1] == ["Clean-Masked", f"{clean[0]:.4f}", f"{clean[3]:.4f}", f"{clean[2]:.4f}", "-", "-"]
    assert cells[2] == ["SDEdit-", f"{by_file[1]:.4f}", "-", "-", "-", "-"]
    assert cells[3] == ["RePaint", "-", f"{by_file[3]:.4f}", "-", "-", "-"]
    assert cells[4] == ["MT-Diffusion", f"{by_file[0]:.4f}", "-", f"{by_file[2]:.4f}", "-", "-"]
    assert lines[5].startswith("our numbers only")

    with open(tmp_path / "t" / "table.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [(r["row"], r["patches"]) for r in written] == [
        *(("Clean-Masked", m) for m in ("5", "7", "10")),
        ("SDEdit-", "5"),
        ("RePaint", "7"),
        ("MT-Diffusion", "5"),
        ("MT-Diffusion", "10"),
    ]
    assert float(written[-1]["lpips"]) == by_file[2] and written[-1]["file"] == str(tmp_path / "b.npz")
    quoted = table1.read_quoted(tmp_path / "t" / "table.csv", "lpips")  # what was written can be quoted
    assert quoted["RePaint", 7] == by_file[3] and len(quoted) == 7


def test_table_with_quoted_numbers(table_files, tmp_path, capsys):
    paper = tmp_path / "paper.csv"
    paper.write_text("row,patches,psnr\nMT-Diffusion,5,12.3456\nsdedit,20,7\nRePaint,5,\n")
    found = run_json(tmp_path, *table_files, "--table", "--table_metric", "psnr", "--paper", paper)
    out = capsys.readouterr().out
    assert list(found["files"][0]["restored"]) == ["psnr"]
    assert f"{found['files'][0]['restored']['psnr']['mean']:.2f}  12.35 (quoted)" in out
    sdedit = next(line for line in out.splitlines() if line.startswith("SDEdit-"))
    assert sdedit.endswith("-  7.00 (quoted)")
    assert "our numbers only" not in out and "LPIPS" not in out


def test_given_clean_masked_wins(tmp_path):
    arrays = restored_file()
    save(tmp_path / "restored_none_patches5.npz", **arrays)
    save(tmp_path / "restored_mt_patches5.npz", **restored_file(noise=3))
    files = [tmp_path / f"restored_{method}_patches5.npz" for method in ("mt", "none")]
    found = run_json(tmp_path, *files, "--table", "--table_metric", "mse")
    assert [(r["row"], r["file"]) for r in found["table"]] == [
        ("Clean-Masked", str(files[1])),
        ("MT-Diffusion", str(files[0])),
    ]
    assert found["table"][0]["mse"] == found["files"][1]["restored"]["mse"]["mean"]


def test_unequal_inputs_are_said(tmp_path, capsys):
    save(tmp_path / "restored_mt_patches5.npz")
    save(tmp_path / "restored_sdedit_patches5.npz", **restored_file(masks=99))
    save(tmp_path / "restored_mt_patches10.npz", **restored_file(seed=5, count=4))
    names = ("mt_patches5", "sdedit_patches5", "mt_patches10")
    main([*(str(tmp_path / f"restored_{name}.npz") for name in names), "--table", "--table_metric", "psnr"])
    out, err = capsys.readouterr()
    assert "restored_sdedit_patches5.npz: other masks than" in err
    assert "restored_mt_patches10.npz: other originals than" in err and err.count("warning") == 2
    assert "4 or 5 images" in out


@pytest.mark.parametrize(
    "text, expected",
    [
        ("x/restored_repaint_patches15.npz", table1.Given(Path("x/restored_repaint_patches15.npz"), "repaint", 15)),
        ("sdedit:5=a=b.npz", table1.Given(Path("a=b.npz"), "sdedit", 5)),
        ("restored_mt_half.npz", table1.Given(Path("restored_mt_half.npz"))),
        ("lr=3.npz", table1.Given(Path("lr=3.npz"))),
        ("runs/mt:5=a.npz", table1.Given(Path("runs/mt:5=a.npz"))),
    ],
)
def test_names(text, expected):
    assert table1.parse_given(text) == expected


# Bad input: one line that names the file, and the way out


def arrays_without(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


HALF = restored_file()["original"][:2]
BAD_ARRAYS = [
    (arrays_without("original", "mask"), "no array original, mask, only .*mt-diffusion restore"),
    (arrays_without("restored", "arr_0"), "no array arr_0"),
    ({"mask": np.array([Trap(Path("ran"))], dtype=object)}, "array mask holds Python objects"),
    ({"masked": HALF}, r"masked has shape \[2, 40, 42, 3\].*\[5, 40, 42, 3\]"),
    ({"original": HALF[..., 0]}, r"original has shape \[2, 40, 42\]"),
    ({"mask": HALF[..., 0]}, r"mask has shape \[2, 40, 42\], the images need \[5, 40, 42\]"),
    ({"restored": restored_file()["restored"] / 255}, "restored is float64, not uint8"),
    ({"mask": restored_file()["mask"] // 255}, "mask must be uint8 of 0 .* from 0 to 1"),
    ({"mask": restored_file()["mask"].astype(np.int32)}, "mask must be uint8.*int32"),
    ({name: array[:0] for name, array in restored_file().items()}, "no image"),
]


@pytest.mark.parametrize("changes, message", BAD_ARRAYS)
def test_bad_arrays(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "bad.npz", **changes)
    with pytest.raises(EvaluationError, match=message) as raised:
        main([str(path)])
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


def cut(path: Path, keep: float) -> None:
    data = save(path).read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def flip(path: Path) -> None:
    data = bytearray(save(path).read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def save_single(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, HALF)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "no such file"),
        (lambda path: path.write_bytes(b""), ".npz"),
        (lambda path: path.write_bytes(b"no arrays"), ".npz"),
        (lambda path: path.write_bytes(pickle.dumps(Trap(path.parent / "ran"))), ".npz"),
        (save_single, "not an .npz"),
        (lambda path: cut(path, 0.5), ".npz"),
        (flip, "damaged"),
    ],
)
def test_bad_files(make, message, tmp_path):
    path = tmp_path / "bad.npz"
    make(path)
    with pytest.raises(EvaluationError, match=message) as raised:
        main([str(path)])
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["good.npz", "--metrics", "psnr,lpis"], r"unknown metric 'lpis' \(did you mean lpips\?\)"),
        (["good.npz", "--table", "--table_metric", "psrn"], r"unknown metric 'psrn' \(did you mean psnr\?\)"),
        (["sdedt:5=good.npz"], r"unknown method 'sdedt' \(did you mean sdedit\?\)"),
        (["sdedit=good.npz"], "which number of patches.*sdedit:10=good.npz"),
        (["sdedit:0=good.npz"], "which number of patches"),
        (["sdedit:many=good.npz"], "which number of patches"),
        (["good.npz", "--table"], "good.npz: --table needs its method and number of patches.*mt:10=good.npz"),
        (
            ["mt:5=good.npz", "mt:5=other.npz", "--table"],
            "good.npz and other.npz: both are MT-Diffusion with 5 patches",
        ),
        (["mt:5=good.npz", "--table", "--metrics", "psnr"], "shows lpips, which --metrics leaves out"),
        (["good.npz", "--csv", "t.csv"], "--csv is for the table"),
        (["good.npz", "--paper", "t.csv"], "--paper is for the table"),
        (["good.npz", "--metrics", "psnr", "--json", "."], "is a folder"),
        (["good.npz", "--batch_size", "0"], "--batch_size must be 1 or more"),
        (["good.npz", "--metrics", "psnr", "--device", "cuda:99"], "--device cuda:99: not here"),
        (["good.npz", "--metrics", "psnr", "--device", "toaster"], "--device toaster: not here"),
    ],
)
def test_bad_arguments(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "good.npz")
    with pytest.raises(EvaluationError, match=message) as raised:
        main(argv)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"row,patches\nRePaint,5\n", "no column lpips"),
        (b"", "no column lpips, patches, row"),
        (b"row,patches,lpips\nRepaint!,5,0.1\n", "line 2: unknown row 'Repaint!'"),
        (b"row,patches,lpips\nRePaint,five,0.1\n", "line 2: not numbers: patches 'five'"),
        (b"row,patches,lpips\nRePaint,5,nan\n", "line 2: not numbers"),
        (b"row,patches,lpips\nRePaint,5,0.1\nrepaint,5,0.2\n", "line 3: RePaint with 5 patches a second time"),
        (b"\xff\xfe\x00", "not a CSV file"),
    ],
)
def test_bad_paper(content, message, tmp_path):
    paper = tmp_path / "paper.csv"
    paper.write_bytes(content)
    with pytest.raises(EvaluationError, match=message) as raised:
        main([f"mt:5={save(tmp_path / 'good.npz')}", "--table", "--paper", str(paper)])
    assert str(paper) in str(raised.value)


def test_as_a_program(tmp_path):
    """From another folder: numbers on stdout and code 0; one line on stderr and code 2; --help without torch."""

    good = warm.run(SCRIPT, [save(tmp_path / "good.npz"), "--metrics", "mse,mae"], cwd=tmp_path)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("mean squared error, masked region")
    bad = warm.run(SCRIPT, ["missing.npz"], cwd=tmp_path)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: missing.npz: no such file; mt-diffusion restore writes them\n"
    command = [sys.executable, "-X", "importtime", SCRIPT, "--help"]
    usage = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert usage.returncode == 0 and "--table_metric" in usage.stdout
    imported = {line.split("|")[-1].strip() for line in usage.stderr.splitlines()}
    assert "numpy" in imported and not {"torch", "lpips", "torchmetrics"} & imported
