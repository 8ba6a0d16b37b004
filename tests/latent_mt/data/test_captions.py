"""Captions of images: where they are found, which one a position gets, and a training that reads them."""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_stage import CONFIG, HOME, SEEN
from tiny_latent import SIZE, UNET, random_model, train, write_config, write_images

import latent_mt
from guided_mt.data import Batch
from guided_mt.data.dataset import draw_caption
from guided_mt.diffusion.random import SampleStreams
from guided_mt.errors import UserError
from guided_mt.modalities.settings import MTConfig
from latent_mt.data import ImageData

TEXT_UNET = {
    "target": "latent_mt.unet.UNetModel",
    "params": {**UNET, "use_spatial_transformer": True, "context_dim": 16},
}
TEXT = {
    "mt_sides": [],
    "cond_stage_config": CONFIG,
    "cond_stage_key": "txt",
    "conditioning_key": "crossattn",
    "unet_config": TEXT_UNET,
}


def files(folder: Path) -> list[str]:
    """The images of `write_images` by their names."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def beside(folder: Path) -> tuple[str, str]:
    for name in files(folder):
        (folder / name).with_suffix(".txt").write_text(f"a {name}\n\nthe {name}\n")
    return "txt", str(folder)


def in_csv(folder: Path) -> tuple[str, str]:
    with open(folder / "captions.csv", "w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["File", "Caption", "other"])
        rows.writerows(
            [f"{folder.name}/{name}", f"{word} {name}", 0] for word in ("a", "the") for name in files(folder)
        )
    return "captions.csv", str(folder)


def in_json_lines(folder: Path) -> tuple[str, str]:
    table = folder.parent / "elsewhere.jsonl"
    lines = [json.dumps({"file_name": name, "text": [f"a {name}", f"the {name}"]}) for name in files(folder)]
    table.write_text("\n".join(lines))
    return str(table), str(folder)


def in_tar(folder: Path) -> tuple[str, str]:
    in_csv(folder)
    archive = folder.parent / "all.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, "train")
        tar.add(folder / "captions.csv", "captions.csv")
    return "captions.csv", f"{archive}/train"


@pytest.mark.parametrize("lay_out", [beside, in_csv, in_json_lines, in_tar])
def test_captions_are_found(lay_out, tmp_path, caplog):
    where, path = lay_out(write_images(tmp_path / "images"))
    data = ImageData(path, SIZE, 3, captions=where, num_workers=0).open()
    assert len(data.source) == 9
    for k in range(9):
        name = data.source.name(k)
        assert list(data.source.captions[k]) == [f"a {name}", f"the {name}"]
    assert "left out" not in caplog.text


def test_a_caption_is_a_function_of_seed_and_position(tmp_path):
    where, path = beside(write_images(tmp_path / "images"))
    data = ImageData(path, SIZE, 2, captions=where, num_workers=0, ucg_rate=0.25, limit=8)

    def seen(world: int, workers: int, start: int = 0) -> dict[int, str]:
        data.batch_size, data.num_workers = 8 // world, workers
        found = {}
        for rank in range(world):
            with data.stream(seed=5, world_size=world, rank=rank, start_step=start, total_steps=6) as stream:
                for batch in stream:
                    found |= dict(zip(batch.positions.tolist(), batch.captions, strict=True))
                    named = [data.source.name(int(index)) for index in batch.indices]
                    assert all(
                        text.endswith(name) or not text for text, name in zip(batch.captions, named, strict=True)
                    )
        return found

    whole = seen(1, 0)
    assert sorted(whole) == list(range(48)) and seen(2, 0) == whole and seen(4, 1) == whole
    assert seen(1, 0, start=4) == {p: whole[p] for p in range(32, 48)}
    words = [text.partition(" ")[0] for text in whole.values()]
    assert {*words} == {"a", "the", ""}


def test_the_share_that_is_dropped():
    drawn = [draw_caption(["a", "b", "c"], 3, position, 0.1) for position in range(4000)]
    shares = [drawn.count(text) / len(drawn) for text in ("", "a", "b", "c")]
    assert np.allclose(shares, [0.1, 0.3, 0.3, 0.3], atol=0.025)
    assert draw_caption([], 0, 0) == "" and draw_caption(["a"], 0, 0, 1.0) == ""
    # golden: a run that goes on must find the same
    assert "".join(draw_caption("abcd", 7, position, 0.2) or "-" for position in range(12)) == GOLDEN


GOLDEN = "dbcaaa-bad-d"


@pytest.mark.parametrize(
    ("captions", "rows", "expected"),
    [
        ("none.csv", None, r"captions none\.csv: no such file, and none of that name in .*images"),
        ("words", None, r"captions 'words': write txt for a text beside each image, or name a table \(\.csv"),
        ("txt", None, r"captions txt has none for any of the 9 images; the first is ant/0\.png"),
        ("t.csv", "name,caption\nx,y\n", r"t\.csv: row 1 has none of the columns file, .*; it has name, caption"),
        ("t.csv", "file,label\nx,y\n", r"t\.csv: row 1 has none of the columns caption, .*; it has file, label"),
        ("t.csv", "file,caption\nx.png,y\n", r"captions t\.csv has none for any of the 9 images"),
        (
            "t.csv",
            "file,caption\na/ant/0.png,y\nb/ant/0.png,z\n",
            r"t\.csv: b/ant/0 and another row both fit the image ant/0;",
        ),
        ("t.jsonl", '{"file": "x", \n', r"t\.jsonl: line 1 is no JSON"),
        ("t.jsonl", "[1]\n", r"t\.jsonl: line 1 is no JSON object"),
        ("t.csv", "file,caption\nx,a caf\udce9\n", r"t\.csv: line 2 is no UTF-8; save the table in that encoding"),
        ("t.csv", "file,caption\nx,a cat, asleep\n", r"t\.csv: line 2 has more columns than .* a comma between double"),
        (
            "t.csv",
            f"file,caption\nx,{'y' * 140_000}\n",
            r"t\.csv: can't be read behind line 1 \(field larger .*left open",
        ),
        (["txt"], None, r"data\.params\.captions \['txt'\]: name one place, txt or a table"),
    ],
)
def test_what_is_no_caption(captions, rows, expected, tmp_path):
    folder = write_images(tmp_path / "images")
    if rows:
        (folder / captions).write_text(rows, errors="surrogateescape")
    with pytest.raises(UserError, match=expected):
        ImageData(str(folder), SIZE, 2, captions=captions).open()


def test_a_share_is_between_0_and_1():
    with pytest.raises(UserError, match=r"data\.params\.ucg_rate 1\.5: must be between 0 and 1"):
        ImageData("x", SIZE, 2, ucg_rate=1.5)


def test_a_text_condition_is_trained_on_captions(tmp_path):
    """The stage is given the captions of each step, some of them dropped, and those of validation, with none dropped."""
    latent_mt.register(CONFIG["target"], HOME)
    where, path = beside(write_images(tmp_path / "images"))
    file = write_config(tmp_path / "run.yaml", Path(path), tmp_path / "run", **TEXT)
    words = [f"data.params.captions={where}", f"data.params.val_path={path}", "data.params.ucg_rate=0.5"]
    SEEN.clear()
    train(file, *words, "run.total_steps=2", "run.val_interval=2")
    named = [f"{word} {name}" for word in ("a", "the") for name in files(Path(path))]
    in_training, in_validation = SEEN[:8], SEEN[8:]
    assert "" in in_training and any(in_training) and {*in_training} <= {"", *named}
    assert {*in_validation} == {*named[:9]}


def test_a_text_condition_needs_captions(tmp_path):
    latent_mt.register(CONFIG["target"], HOME)
    folder = write_images(tmp_path / "images")
    file = write_config(tmp_path / "run.yaml", folder, tmp_path / "run", **TEXT)
    with pytest.raises(
        UserError, match=r"images: has no captions, which model\.params\.cond_stage_key txt needs; say where"
    ):
        train(file)


def test_without_a_condition_a_sample_has_the_empty_text(tmp_path):
    """What is trained unconditionally is what guidance draws from: samples of `mt_drop_prob` are told the empty text."""
    latent_mt.register(CONFIG["target"], HOME)
    model = random_model(mt_drop_prob=0.9999, **TEXT)
    size = model.first_stage_model.downsampling * model.size
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)

    def loss(captions: list[str]) -> torch.Tensor:
        batch = Batch(images, None, torch.arange(2), torch.arange(2), captions=captions)
        return model.losses(batch, SampleStreams(0, batch.positions))[0].loss

    dropped = loss(["a fox", "a hen"])
    model.config[MTConfig].mt_drop_prob = 0.0
    assert torch.allclose(dropped, loss(["", ""]), atol=1e-6)
    assert not torch.allclose(dropped, loss(["a fox", "a hen"]), atol=1e-4)
