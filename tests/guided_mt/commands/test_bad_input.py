"""Bad input gets one clear line that names the flag or file and the way out, and nothing is lost by it."""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import MODEL, PROCESS, adm_unet, assert_same, contents, flags, mpiexec, start, step_folder, words

from guided_mt.commands import export, nll, restore, sample, train
from guided_mt.errors import UserError


def complaint(command, argv: list[str]) -> str:
    """The UserError's text, which must be one line that a terminal shows without a traceback."""
    with pytest.raises(UserError) as caught:
        command.main(argv)
    text = str(caught.value)
    assert "\n" not in text and 20 < len(text) < 400, text
    return text


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two steps of the tiny masked X model. Tests that spoil it take `copied`."""
    folder = tmp_path_factory.mktemp("bad") / "run"
    train.main(flags(log_dir=folder, total_steps=2))
    return folder


@pytest.fixture
def copied(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copied"))


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "five pictures"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    return folder


# ---------------------------------------------------------------- flags

TRAINING = [
    ("--mt_tusk masked", r"unknown flag --mt_tusk \(did you mean mt_task\?\); --help"),
    ("--mt_weigths=paper", r"unknown flag --mt_weigths \(did you mean mt_weights\?\)"),
    ("--presets x", r"unknown flag --presets \(did you mean preset\?\)"),
    ("--num_samples 5", r"unknown flag --num_samples"),
    ("16", r"don't know what to do with '16'; flags are written --name value"),
    ("--lr", r"--lr.*expected one argument"),
    ("--preset masked-digit", r"unknown preset 'masked-digit' \(did you mean masked-digits\?\)"),
    ("--lr fast", r"--lr takes a number, not 'fast'"),
    ("--lr nan", r"--lr takes a number, not 'nan'"),
    ("--grad_clip inf", r"--grad_clip takes a number"),
    ("--num_channels 32.5", r"--num_channels takes a whole number, not '32.5'"),
    ("--learn_sigma maybe", r"--learn_sigma takes True or False, not 'maybe'"),
    ("--mt_variant Y", r"--mt_variant: 'Y' is none of auto, U, X, any"),
    ("--mt_weights papr", r"--mt_weights: 'papr' is none of .*did you mean paper\?"),
    (
        "--noise_schedule cosin",
        r"--noise_schedule: 'cosin' is none of linear, cosine, straight \(did you mean cosine\?\)",
    ),
    ("--schedule_sampler unifrom", r"--schedule_sampler: .*did you mean uniform"),
    ("--precision fp8", r"--precision: 'fp8' is none of fp32, bf16, fp16"),
    ("--mt_task mask", r"--mt_task: unknown 'mask' \(did you mean masked\?\)"),
    ("--mt_task none,masked,depth", r"--mt_task: unknown 'depth'"),
    ("--image_size 10 --channel_mult 1,2,4", r"10.*channel_mult"),
    ("--image_size 48 --channel_mult ''", r"48.*--channel_mult"),
    ("--channel_mult 1,x", r"--channel_mult must be numbers"),
    ("--attention_resolutions 0", r"--attention_resolutions must be positive"),
    ("--num_channels 40", r"group norm needs a multiple of 32: change --num_channels"),
    ("--num_heads 5", r"--num_heads 5 doesn't divide"),
    ("--num_head_channels 24", r"--num_head_channels 24 doesn't divide"),
    ("--diffusion_steps 10 --noise_schedule linear", r"--diffusion_steps 10 is too small .*take at least 21, or"),
    ("--noise_schedule straight", r"ends in pure noise .*let the network predict velocity, v or x0"),
    ("--diffusion_steps 20 --noise_schedule linear", r"--diffusion_steps 20 is too small"),
    ("--diffusion_steps 1", r"--diffusion_steps must be at least 2, not 1"),
    ("--timestep_respacing 100", r"timestep_respacing: can't take 100 steps"),
    ("--timestep_respacing 5 --trained_timesteps 6", r"--timestep_respacing 5 contradicts --trained_timesteps 6"),
    ("--total_steps 0", r"--total_steps must be at least 1, not 0"),
    ("--global_batch_size 0", r"--global_batch_size must be at least 1, or -1, not 0"),
    ("--batch_size -4", r"--batch_size must be at least 1, or -1, not -4"),
    ("--microbatch 0", r"--microbatch must be at least 1"),
    ("--lr -1", r"--lr must be at least 0, not -1"),
    ("--data_workers -1", r"--data_workers must be between 0 and 1024, not -1"),
    ("--data_workers 100000000", r"--data_workers must be between 0 and 1024, not 100000000"),
    ("--keep_checkpoints -1", r"--keep_checkpoints must be at least 0"),
    ("--log_interval 0", r"--log_interval must be at least 1"),
    ("--mt_drop_prob 1.5", r"--mt_drop_prob must be between 0 and 1, not 1.5"),
    ("--mask_full_prob -0.1", r"--mask_full_prob must be between 0 and 1"),
    ("--mask_patch 0", r"--mask_patch must be at least 1, or -1, not 0"),
    ("--mt_loss_weight -1", r"--mt_loss_weight must be at least 0"),
    ("--seed -1", r"--seed must be between 0 and"),
    ("--ema_rate 1.5", r"--ema_rate '1.5': write rates between 0 and 1"),
    ("--ema_rate slow", r"--ema_rate 'slow': write rates"),
    ("--device gpu", r"--device 'gpu': write cpu, cuda"),
    ("--data_dir nowhere", r"nowhere"),
    ("--data_dir builtin:digts", r"builtin:digts.*did you mean"),
    ("--data_dir ''", r"--data_dir is missing"),
    ("--data_dir builtin:digits,", r"nothing stands before or after a comma"),
    ("--global_batch_size 2000", r"1437 images are fewer than a global batch of 2000; lower --global_batch_size"),
    ("--class_cond True --num_classes 4", r"has 10 classes; raise --num_classes 4 to 10"),
    ("--resume_checkpoint gone.pt", r"gone.pt: no such file"),
    ("--config gone.yaml", r"gone.yaml: can't be read"),
]


@pytest.mark.parametrize(("words_typed", "expected"), TRAINING, ids=[row[0] for row in TRAINING])
def test_training_flags(words_typed, expected, tmp_path):
    typed = [word.strip("'") for word in words_typed.split(" ")]
    argv = [*flags(log_dir=tmp_path / "run", total_steps=1), *typed]
    assert re.search(expected, complaint(train, argv))


SAMPLING = [
    ("--num_sample 3", r"unknown flag --num_sample \(did you mean num_samples\?\)"),
    ("--num_samples 0", r"--num_samples must be at least 1"),
    ("--batch_size 0", r"--batch_size must be at least 1"),
    ("--steps 0", r"--steps must be at least 1"),
    ("--steps ten", r"--steps takes a whole number"),
    ("--sampler dpm", r"--sampler: 'dpm' is none of"),
    ("--seeds 1,x", r"--seeds '1,x': write '0-99' or '3,5,10-20'"),
    ("--seeds 5-2", r"--seeds '5-2'"),
    ("--seeds -3", r"--seeds '-3': write"),
    ("--seeds 99999999999999999999999", r"--seeds '9+': write"),
    ("--seeds 0-99999999999999999 --out s.txt", r"--out s.txt: the name must end in .npz"),
    ("--seeds 3", r"--seeds '3' names 1 seeds for 2 samples"),
    ("--class 3", r"--class needs a class-conditional model"),
    ("--ema 0.5", r"has no averaged weights '0.5'; there are 0.9999"),
    ("--timestep_respacing 100", r"timestep_respacing: can't take 100 steps"),
    ("--timestep_respacing few", r"timestep_respacing 'few': write '250'"),
    (
        "--num_channels 64",
        r"was trained with other settings: num_channels \(32 there, 64 here\); leave these flags out",
    ),
    ("--mt_condition own", r"--mt_condition: 'own' is none of .*did you mean own-head"),
    ("--device cuda:x", r"--device 'cuda:x'"),
    ("--eta 2", r"--eta must be between 0 and 1"),
]


@pytest.mark.parametrize(("words_typed", "expected"), SAMPLING, ids=[row[0] for row in SAMPLING])
def test_sampling_flags(words_typed, expected, run, tmp_path):
    argv = [*words(model_path=run, out=tmp_path / "s.npz", num_samples=2), *words_typed.split(" ")]
    assert re.search(expected, complaint(sample, argv))
    assert not (tmp_path / "s.npz").exists()


RESTORING = [
    ("--mask patches", r"--mask 'patches': write patches:10, half, full, or image FILE"),
    ("--mask patches:-1", r"--mask 'patches:-1'"),
    ("--mask quarter", r"--mask 'quarter'"),
    ("--mask image gone.png", r"--mask image gone.png: can't be read"),
    ("--mask image", r"--mask 'image'"),
    ("--strength 0 --method sdedit", r"--strength must be above 0 and at most 1, not 0"),
    ("--method palette", r"--method: 'palette' is none of mt, sdedit, repaint, none"),
    ("--num_samples 0", r"--num_samples must be at least 1"),
    ("--data_dir gone", r"gone"),
]


@pytest.mark.parametrize(("words_typed", "expected"), RESTORING, ids=[row[0] for row in RESTORING])
def test_restoring_flags(words_typed, expected, run, tmp_path):
    settings = {"model_path": run, "out": tmp_path / "r.npz", "data_dir": "builtin:digits-test", "num_samples": 2}
    assert re.search(expected, complaint(restore, [*words(**settings), *words_typed.split(" ")]))
    assert not (tmp_path / "r.npz").exists()


def test_black_mask_and_missing_data(run, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    argv = words(model_path=run, out=tmp_path / "r.npz", data_dir="builtin:digits-test")
    assert "masks nothing; white is masked" in complaint(
        restore, [*argv, "--mask", "image", str(tmp_path / "black.png")]
    )
    for command in (restore, nll):
        assert "--data_dir is missing" in complaint(command, words(model_path=run, out=tmp_path / "r.npz"))
    assert "--mask 'most': write" in complaint(nll, [*argv, "--mask", "most"])
    assert "--out is missing" in complaint(export, words(model_path=run))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu(run, tmp_path):
    assert "--device cuda: no CUDA device was found; leave the flag out" in complaint(
        train, flags(log_dir=tmp_path, device="cuda")
    )
    assert "no CUDA device" in complaint(sample, words(model_path=run, device="cuda:0"))


# ---------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("lr: 0.1\nnum_chanels: 3\n", r"unknown key 'num_chanels' \(did you mean num_channels\?\)"),
        ("lr: [1, 2\n", r"not valid YAML"),
        ("- lr\n", r"a YAML file of 'key: value' lines is expected"),
        ("lr: fast\n", r"--lr takes a number, not 'fast'"),
        ("class_cond: 2\n", r"--class_cond takes True or False"),
        ("total_steps: 1.5\n", r"--total_steps takes a whole number"),
        ("mt_variant: Z\n", r"--mt_variant: 'Z' is none of"),
        ("save_interval: 0\n", r"--save_interval must be at least 1"),
    ],
)
def test_config_files(content, expected, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    text = complaint(train, words(log_dir=tmp_path / "run", config=file))
    assert re.search(expected, text)
    assert str(file) in text or text.startswith("--")


# ---------------------------------------------------------------- data and folders


def test_data_that_can_not_feed_a_batch(pictures, tmp_path):
    argv = flags(log_dir=tmp_path / "run", total_steps=1)
    few = complaint(train, [*argv, "--data_dir", str(pictures)])
    assert "5 images are fewer than a global batch of 8; lower --global_batch_size" in few
    (tmp_path / "empty").mkdir()
    assert "no images" in complaint(train, [*argv, "--data_dir", str(tmp_path / "empty")])
    assert "--class_cond True needs classes" in complaint(
        train, [*argv, *words(data_dir=pictures, class_cond=True, global_batch_size=4)]
    )


def test_log_dir_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        text = complaint(train, flags(log_dir=path, total_steps=1))
        assert f"--log_dir {path}: can't be written" in text and "name another folder" in text


def test_out_that_can_not_be_written(run, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    argv = words(model_path=run, num_samples=1, steps=2, out=tmp_path / "file" / "s.npz")
    assert "can't be written" in complaint(sample, argv)
    assert "can't be written" in complaint(export, words(model_path=run, out=tmp_path / "file" / "s.pt"))


# ---------------------------------------------------------------- resuming with something else


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_channels": 64}, ["num_channels (32 there, 64 here)"]),
        ({"num_res_blocks": 2, "dropout": 0.2}, ["num_res_blocks (1 there, 2 here)", "dropout (0.0 there, 0.2 here)"]),
        ({"mt_variant": "U"}, ["mt_variant (X there, U here)"]),
        ({"mt_weights": "bridge"}, ["mt_weights (paper there, bridge here)"]),
        ({"noise_schedule": "linear"}, ["noise_schedule (cosine there, linear here)"]),
        ({"global_batch_size": 16}, ["global_batch_size (8 there, 16 here)"]),
        ({"seed": 1}, ["seed (0 there, 1 here)"]),
        ({"mask_full_prob": 0}, ["mask_full_prob (0.1 there, 0.0 here)"]),
    ],
    ids=str,
)
def test_resuming_with_other_settings_names_them(change, expected, run):
    before = contents(step_folder(run, 2))
    text = complaint(train, flags(log_dir=run, total_steps=3, **change))
    assert all(part in text for part in expected) and text.count(" there, ") == len(expected)
    assert "repeat them to resume, or take another --log_dir" in text
    assert_same(before, contents(step_folder(run, 2)))


def test_resuming_with_another_average(run):
    assert "no averaged weights for --ema_rate 0.5" in complaint(
        train, flags(log_dir=run, total_steps=3, ema_rate="0.5")
    )


def test_starting_from_another_architecture_names_the_keys(run, tmp_path):
    text = complaint(train, flags(log_dir=tmp_path / "new", resume_checkpoint=run, num_channels=64, total_steps=1))
    assert "another architecture" in text and "compare num_channels (32 there, 64 here)" in text
    torch.save(adm_unet().state_dict(), tmp_path / "adm.pt")  # with no configuration beside it
    argv = flags(log_dir=tmp_path / "new", resume_checkpoint=tmp_path / "adm.pt", total_steps=1)
    assert "compare the model flags" in complaint(train, [*argv, "--num_res_blocks", "2"])
    assert "compare the model flags" in complaint(train, [*argv, "--num_channels", "64"])
    assert "compare the model flags" in complaint(train, [*argv, "--learn_sigma", "False"])


# ---------------------------------------------------------------- damaged and hostile files


@pytest.mark.parametrize("name", ["model.safetensors", "ema_0.9999.safetensors", "training_state.pt"])
@pytest.mark.parametrize("left", [0, 100, 0.5])
def test_truncated_checkpoint(name, left, copied):
    """Half a file, a few bytes of it, nothing of it: named, and not overwritten."""
    file = step_folder(copied, 2) / name
    content = file.read_bytes()
    file.write_bytes(content[: left if isinstance(left, int) else len(content) // 2])
    damaged = file.read_bytes()
    text = complaint(train, flags(log_dir=copied, total_steps=3))
    assert str(file) in text and ("truncated" in text or "damaged" in text)
    assert file.read_bytes() == damaged and not step_folder(copied, 3).exists()
    if name != "training_state.pt":
        argv = words(model_path=copied, ema="none" if name.startswith("model") else "", num_samples=1, steps=2)
        assert str(file) in complaint(sample, argv)


class Hostile:
    """Unpickled, it would create a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_hostile_file_is_never_unpickled(how, run, tmp_path):
    marker, file = tmp_path / "marker", tmp_path / "hostile.pt"
    payload = {"weight": torch.zeros(2), "extra": Hostile(marker)}
    if how == "pickle":
        file.write_bytes(pickle.dumps(payload, protocol=2))
    else:
        torch.save(payload, file, _use_new_zipfile_serialization=how == "zip")
    commands = [
        (sample, words(**MODEL, **PROCESS, model_path=file, num_samples=1)),
        (train, flags(log_dir=tmp_path / "run", resume_checkpoint=file, total_steps=1)),
        (export, words(model_path=file, out=tmp_path / "out.pt")),
    ]
    for command, argv in commands:
        text = complaint(command, argv)
        assert str(file) in text and "refused" in text
    assert not marker.exists()
    loaded = pickle.loads(file.read_bytes()) if how == "pickle" else torch.load(file, weights_only=False)
    loaded["extra"].close()  # it would have worked
    assert marker.exists()


def test_hostile_training_state(copied, tmp_path):
    marker = tmp_path / "marker"
    torch.save({"optimizer": Hostile(marker)}, step_folder(copied, 2) / "training_state.pt")
    text = complaint(train, flags(log_dir=copied, total_steps=3))
    assert "training_state.pt" in text and "refused" in text
    assert not marker.exists()


def test_training_state_of_another_model(copied):
    file = step_folder(copied, 2) / "training_state.pt"
    state = torch.load(file, weights_only=True)
    del state["optimizer"]["adamw"]["param_groups"][0]["params"][0]
    torch.save(state, file)
    assert "does not fit this run" in complaint(train, flags(log_dir=copied, total_steps=3))


def test_files_that_are_no_model(run, tmp_path):
    adam = torch.optim.AdamW(adm_unet().parameters())
    torch.save(adam.state_dict(), tmp_path / "opt000002.pt")
    torch.save({"a": 1}, tmp_path / "number.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty").mkdir()
    rows = {
        tmp_path / "opt000002.pt": "holds an optimiser's state, not a model; give the model",
        step_folder(run, 2) / "training_state.pt": "holds an optimiser's state, not a model",
        tmp_path / "number.pt": "holds no state dict of tensors",
        tmp_path / "list.pt": "holds no state dict of tensors",
        tmp_path / "text.pt": "text.pt",
        tmp_path / "empty": "holds no complete checkpoint",
        tmp_path / "gone": "no such file or folder",
    }
    for path, expected in rows.items():
        text = complaint(sample, words(model_path=path, num_samples=1))
        assert expected in text and str(path) in text
    assert "--model_path is missing: name a run folder" in complaint(sample, [])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("image_size: [8\n", "can't be read"),
        ("- image_size\n", "is damaged"),
        ("image_size: eight\n", "--image_size takes a whole number, not 'eight'"),
        ("image_size: 8\nnum_chanels: 32\n", "unknown key 'num_chanels' (did you mean num_channels?)"),
        ("\x00\x01", "can't be read"),
    ],
)
def test_damaged_saved_configuration(content, expected, copied):
    file = step_folder(copied, 2) / "config.yaml"
    file.write_text(content)
    text = complaint(sample, words(model_path=copied, num_samples=1))
    assert expected in text and (str(file) in text or text.startswith("--"))
    if "takes" not in expected:  # resuming compares, it does not convert
        assert str(file) in complaint(train, flags(log_dir=copied, total_steps=3))


def test_damaged_class_names(copied):
    (step_folder(copied, 2) / "classes.json").write_text("[")
    for command, argv in (
        (sample, words(model_path=copied)),
        (train, flags(log_dir=copied, total_steps=3, class_cond=True)),
    ):
        assert "classes.json: is damaged" in complaint(command, argv)


# ---------------------------------------------------------------- as programs


def test_programs_print_one_line_and_exit_with_2(tmp_path):
    """A refused flag, and a batch that two processes can't share: no traceback, the launcher ends."""
    process = start("image_sample.py", ["--model_path", "gone"])
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 2
    assert output == "error: gone: no such file or folder\n"

    process = start("image_train.py", flags(log_dir=tmp_path / "run", global_batch_size=7), mpiexec(2))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 2 and "Traceback" not in output
    errors = {line for line in output.splitlines() if line.startswith("error:")}
    assert errors == {"error: --global_batch_size 7 does not divide by 2 processes; take 8"}
    assert not (tmp_path / "run").exists()
