"""Local shards: each sample once per epoch, wherever and whenever it is read, and what is left out, missing or broken."""

from __future__ import annotations

import gzip
import logging
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_stage import CONFIG, HOME
from many_commands import run_and_die
from test_captions import TEXT
from tiny import column
from tiny_latent import newest_weights, train, write_config
from tiny_shards import SIZE, add, files_of, png, sample_of, write_shards

import latent_mt
from guided_mt.data import Batch
from guided_mt.data.sources import cache
from guided_mt.data.sources.tar import list_tar
from guided_mt.errors import UserError
from guided_mt.networks.caption_head import WordTable
from latent_mt.data import ShardData
from latent_mt.data.shards import source as shard_source
from latent_mt.data.shards.index import SampleRule, index_of
from latent_mt.data.shards.order import WindowOrder
from latent_mt.data.shards.paths import shards_of

COUNTS = (5, 9, 1, 7)
ALL = {(shard, sample) for shard, count in enumerate(COUNTS) for sample in range(count)}


def opened(path: Any, batch: int = 2, **params: Any) -> ShardData:
    return ShardData(path, SIZE, batch, **{"num_workers": 0, "window": 2, **params})


def batches(data: ShardData, start: int, stop: int, rank: int = 0, world: int = 1, seed: int = 3) -> Iterator[Batch]:
    with data.stream(seed=seed, world_size=world, rank=rank, start_step=start, total_steps=stop) as stream:
        yield from stream


def seen(data: ShardData, steps: range, world: int = 1, seed: int = 3, batch: int = 6) -> dict[int, tuple[Any, ...]]:
    """{position: (shard, sample, caption)} of what all processes see in these steps of `batch` samples."""
    data.batch_size = batch // world
    found: dict[int, tuple[Any, ...]] = {}
    for rank in range(world):
        for part in batches(data, steps.start, steps.stop, rank, world, seed):
            rows = zip(part.positions.tolist(), part.images.numpy(), part.captions or [], strict=True)
            for position, image, caption in rows:
                assert position not in found
                found[position] = (*sample_of(image), caption)
    return found


# ---------------------------------------------------------------- the order


@pytest.mark.parametrize(
    ("counts", "window"), [(COUNTS, 2), (COUNTS, 1), (COUNTS, 9), ((3, 0, 4, 0, 0, 2), 2), ((1,), 1)]
)
def test_each_sample_comes_once_per_epoch_and_windows_hold_few_shards(counts, window):
    order = WindowOrder(np.array(counts), 11, window)
    n = sum(counts)
    found = order.indices(np.arange(5 * n)).reshape(5, n)
    assert (np.sort(found, axis=1) == np.arange(n)).all()
    of_shard = np.searchsorted(order.starts, found, side="right") - 1
    for shards in of_shard:
        last = {shard: place for place, shard in enumerate(shards.tolist())}
        first = {shard: n - 1 - place for place, shard in enumerate(reversed(shards.tolist()))}
        for place in range(n):
            assert sum(first[shard] <= place <= last[shard] for shard in last) <= window
    asked_one_by_one = [WindowOrder(np.array(counts), 11, window).indices(np.array([p]))[0] for p in range(n, 2 * n)]
    assert asked_one_by_one == found[1].tolist()
    back_and_forth = [5 * n - 1, 0, 2 * n, n - 1]
    assert order.indices(np.array(back_and_forth)).tolist() == found.ravel()[back_and_forth].tolist()


def test_the_order_is_that_of_the_seed():
    order = WindowOrder(np.array([4, 4, 4]), 1, 2)
    assert order.indices(np.arange(12)).tolist() == GOLDEN
    assert order.indices(np.arange(12)).tolist() != order.indices(np.arange(12, 24)).tolist()
    assert (
        order.indices(np.arange(12)).tolist() != WindowOrder(np.array([4, 4, 4]), 2, 2).indices(np.arange(12)).tolist()
    )


GOLDEN = [3, 4, 2, 1, 0, 6, 7, 5, 9, 11, 10, 8]


# ---------------------------------------------------------------- promises


def test_what_is_seen_does_not_depend_on_processes_workers_or_interruptions(tmp_path):
    data = opened(write_shards(tmp_path), ucg_rate=0.2).open()
    whole = seen(data, range(11))  # 66 positions are three epochs
    assert sorted(whole) == list(range(66))
    for epoch in range(3):
        assert {whole[p][:2] for p in range(22 * epoch, 22 * epoch + 22)} == ALL
    assert {caption for _, _, caption in whole.values()} > {""}
    assert all(caption in ("", f"shard {shard} sample {sample}") for shard, sample, caption in whole.values())
    assert seen(data, range(11), world=2) == whole and seen(data, range(11), world=3) == whole
    # stopped after 5 steps with 2 processes, gone on with 3, other workers, and what was decoded ahead is forgotten
    data.num_workers = 1
    ahead = batches(data, 0, 11, rank=1, world=2)
    next(ahead)
    ahead.close()
    parts = seen(data, range(5), world=2)
    again = opened(str(tmp_path), ucg_rate=0.2, num_workers=2)
    parts |= seen(again, range(5, 11), world=3)
    assert parts == whole
    assert seen(data, range(1), seed=4) != {p: whole[p] for p in range(6)}


def on_shards(pattern: str) -> list[str]:
    """Words that put shards into the place of a file's data."""
    params = {"path": f"'{pattern}'", "image_size": SIZE, "batch_size": 4, "num_workers": 0, "window": 2}
    return ["data.target=latent_mt.data.ShardData", *(f"data.params.{key}={value}" for key, value in params.items())]


@pytest.mark.parametrize("where", ["local", "remote"])
def test_captions_of_shards_are_a_modality(where, tmp_path, caplog):
    """Some samples have none: the file has to say so, and for remote shards, of which nobody knows, in any case."""

    def files(shard: int, sample: int) -> dict[str, bytes]:
        whole = files_of(shard, sample)
        return {name: content for name, content in whole.items() if name != "txt" or sample or where == "remote"}

    pattern = write_shards(tmp_path / "shards", files=files)
    pattern = pattern if where == "local" else f"pipe:cat {pattern}"
    tasks = {"caption": {"absent": True, "caption_length": 3}, "random-caption": {"caption_length": 3}}
    config = write_config(tmp_path / "c.yaml", Path(pattern), tmp_path / "run", mt_sides=[], mt_tasks=tasks)
    words = [*on_shards(pattern), "run.total_steps=2", *(["data.params.lanes=4"] if where == "remote" else [])]
    with pytest.raises(
        UserError, match=r"mt_tasks\.caption: some of the data have none of it; write absent: true there"
    ):
        train(config, *words, "model.params.mt_tasks.caption.absent=false", f"run.log_dir={tmp_path / 'other'}")
    train(config, *words)
    assert all(np.isfinite(column(tmp_path / "run", name)).any() for name in ("caption", "random-caption"))
    assert "22 of 22 captions have more than 3 tokens" in caplog.text or where == "local"
    table = WordTable(998)
    table.load_state_dict(
        {"table": newest_weights(tmp_path / "run")["model.diffusion_model.heads.caption.words.table"]}
    )
    assert table.words()[:2] == ["sample", "shard"]
    with pytest.raises(UserError, match=r"mt_tasks\.caption\.caption_file: captions come with the data here"):
        train(config, *words, "model.params.mt_tasks.caption.caption_file=txt")


def test_a_killed_training_goes_on_within_the_shard(tmp_path, caplog):
    """Killed (-9) in its fourth step, when the newest checkpoint is of the second; gone on with other workers."""
    latent_mt.register(CONFIG["target"], HOME)
    pattern = write_shards(tmp_path / "shards")
    model = {**TEXT, "cond_stage_key": "caption", "cond_stage_trainable": True}
    words = [
        *on_shards(pattern),
        "data.params.random_crop=true",
        "run.save_interval=2",
        "run.ema_rate=''",
        "run.total_steps=4",
    ]
    whole = write_config(tmp_path / "whole.yaml", Path(pattern), tmp_path / "whole", **model)
    train(whole, *words)
    cut = write_config(tmp_path / "cut.yaml", Path(pattern), tmp_path / "cut", **model)
    run_and_die("latent_train", ["--config", str(cut), *words], 3)
    assert [folder.name for folder in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step_00000002"]
    train(cut, *words, "data.params.num_workers=1")
    expected, found = newest_weights(tmp_path / "whole"), newest_weights(tmp_path / "cut")
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert "the order is a new one" not in caplog.text
    train(cut, *words, "run.total_steps=5", "data.params.window=1")
    assert (
        "the data, their filters or their order are others than at step 4: from here on the order is a new one"
        in caplog.text
    )


# ---------------------------------------------------------------- filters and captions


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"filters": {"min_aesthetic": 50}}, lambda k: k >= 5),
        ({"filters": {"max_watermark": 0.03}}, lambda k: 1 <= k <= 3),  # of the first the .json does not say
        ({"filters": {"max_aspect": 1.2}}, lambda k: k <= 3),
        ({"filters": {"min_height": 18, "min_width": 16, "max_watermark": 0.05}}, lambda k: 2 <= k <= 5),
        ({"filters": {"min_aesthetic": 18}, "fields": {"aesthetic": ["none", "height"]}}, lambda k: k >= 2),
    ],
)
def test_filters(params, kept, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    pattern = write_shards(tmp_path)
    data = opened(pattern, **params).open()
    wanted = {(shard, sample) for shard, sample in ALL if kept(sample)}
    whole = seen(data, range(len(wanted)), batch=2)
    for epoch in range(2):
        assert {whole[p][:2] for p in range(epoch * len(wanted), (epoch + 1) * len(wanted))} == wanted
    assert f"{22 - len(wanted)} of 22 samples are left out: " in caplog.text


def test_captions_of_the_json(tmp_path):
    data = opened(write_shards(tmp_path), captions=["texts", "txt"]).open()
    words = [caption.split()[0] for _, _, caption in seen(data, range(40)).values()]
    assert {*words} == {"one", "two", "shard"}
    assert abs(words.count("one") / len(words) - 1 / 3) < 0.1
    assert opened(str(tmp_path), captions="height").open().source.captions is None


def test_samples_without_a_caption_are_counted(tmp_path, caplog):
    def files(shard: int, sample: int) -> dict[str, bytes]:
        return {suffix: x for suffix, x in files_of(shard, sample).items() if suffix != "txt" or sample > 1}

    data = opened(write_shards(tmp_path, files=files)).open()
    assert "7 of 22 samples have no caption, and are given the empty one" in caplog.text
    assert {caption for _, sample, caption in seen(data, range(4)).values() if sample < 2} == {""}


def test_shards_without_captions_where_text_is_the_condition(tmp_path):
    latent_mt.register(CONFIG["target"], HOME)
    pattern = write_shards(tmp_path / "shards", files=lambda shard, sample: {"png": png(shard, sample)})
    file = write_config(tmp_path / "run.yaml", Path(pattern), tmp_path / "run", **TEXT)
    with pytest.raises(
        UserError, match=r"tar: has no captions, which model\.params\.cond_stage_key txt needs; say where"
    ):
        train(file, *on_shards(pattern))


def test_names_with_points_are_no_samples_and_that_is_said(tmp_path, caplog):
    """The key ends at the first point: KEY.seg.png is none of the sample KEY, which without an image counts as one without."""
    caplog.set_level(logging.INFO)

    def files(shard: int, sample: int) -> dict[str, bytes]:
        extra = {"seg.png": b"no image"}
        return files_of(shard, sample) | extra if sample else {"v2.png": png(shard, 0), "v2.txt": b"lost"}

    data = opened(write_shards(tmp_path, (3, 2), files)).open()
    assert {x[:2] for x in seen(data, range(1), batch=3).values()} == {(0, 1), (0, 2), (1, 1)}
    assert (
        "2 of 5 samples are left out: 2 have no image KEY.jpg, KEY.png or KEY.webp, where KEY is without a point"
        in caplog.text
    )


def test_the_mark_of_an_encoding_is_no_caption_and_null_are_none(tmp_path):
    def files(shard: int, sample: int) -> dict[str, bytes]:
        return files_of(shard, sample) | {"txt": b"\xef\xbb\xbfa cat\r\n"}

    pattern = write_shards(tmp_path, (2,), files)
    assert {caption for _, _, caption in seen(opened(pattern).open(), range(1), batch=2).values()} == {"a cat"}
    assert opened(pattern, captions=None).open().source.captions is None


# ---------------------------------------------------------------- the index


def test_the_index_is_kept_and_told_apart_by_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("MT_DIFFUSION_LISTINGS", str(tmp_path / "listings"))
    monkeypatch.setattr(cache, "LEAST_BYTES", 0)
    monkeypatch.setattr("latent_mt.data.shards.index.KEEPING", cache.Keeping("shards", least_seconds=0))
    made: list[Path] = []
    monkeypatch.setattr("latent_mt.data.shards.index.list_tar", lambda file: made.append(file) or list_tar(file))
    write_shards(tmp_path, (6,))
    file = tmp_path / "00000.tar"
    rule = opened(str(file), filters={"min_aesthetic": 20}).rule
    first, second = index_of(file, rule), index_of(file, rule)
    assert len(made) == 1 and list(first.keys) == list(second.keys) and len(first) == 4
    assert np.array_equal(first.places, second.places) and first.left_out == second.left_out == {"min_aesthetic": 2}
    other_bound = opened(str(file), filters={"min_aesthetic": 30}).rule
    assert len(index_of(file, other_bound)) == 3 and len(made) == 1  # the bound is not part of the index
    assert len(index_of(file, SampleRule())) == 6 and len(made) == 2
    write_shards(tmp_path, (3,))
    assert len(index_of(file, SampleRule())) == 3


def test_only_a_sample_s_own_files_are_read(tmp_path):
    """Members that other programs would unpickle are never opened."""
    bomb = pickle.dumps(pytest.fail)

    def files(shard: int, sample: int) -> dict[str, bytes]:
        unsafe = dict.fromkeys(("pyd", "pickle", "pkl", "pth", "npy"), bomb)
        return {**unsafe, **files_of(shard, sample), "jpg": png(shard, sample), "seg.png": b"no image"}

    data = opened(write_shards(tmp_path, files=files)).open()
    assert {x[:2] for x in seen(data, range(4)).values()} <= ALL


def test_few_indices_and_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_source, "HELD_SAMPLES", 10)
    monkeypatch.setattr(shard_source, "HELD_FILES", 1)
    data = opened(write_shards(tmp_path)).open()
    source = pickle.loads(pickle.dumps(data.source))
    assert sum(map(len, source._held.values())) <= 10
    whole = seen(data, range(11))
    assert {whole[p][:2] for p in range(22)} == ALL
    assert len(data.source._files) == 1 and sum(map(len, data.source._held.values())) <= 10
    assert source.name(21) == "00003.tar/000030006"


# ---------------------------------------------------------------- what is wrong


def damaged(folder: Path) -> str:
    """The second shard is cut off, and the third gone."""
    pattern = write_shards(folder)
    content = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(content[: len(content) // 2])
    (folder / "00002.tar").unlink()
    return pattern


def test_missing_and_truncated_shards_stop_the_run(tmp_path):
    expected = r"00001\.tar: not a whole tar archive .*\(2 of the 4 shards of .*can't be read\); data\.params\.missing_shards=skip"
    with pytest.raises(UserError, match=expected):
        opened(damaged(tmp_path)).open()


def test_missing_and_truncated_shards_are_skipped(tmp_path, caplog):
    pattern = damaged(tmp_path)
    data = opened(pattern, missing_shards="skip").open()
    assert {x[:2] for x in seen(data, range(2)).values()} == {(s, k) for s, k in ALL if s in (0, 3)}
    assert "00001.tar: not a whole tar" in caplog.text and "00002.tar: cannot be read" in caplog.text
    for file in tmp_path.glob("*.tar"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"4 of the 4 shards of .*can't be read\)$"):
        opened(pattern, missing_shards="skip").open()


def test_a_shard_that_vanishes(tmp_path, caplog):
    data = opened(write_shards(tmp_path)).open()
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(
        UserError, match=r"00001\.tar: can't be read any more \(No such file or directory\); bring it back"
    ):
        seen(data, range(4))


def test_broken_samples_are_left_out_up_to_one_percent(tmp_path, caplog):
    def files(shard: int, sample: int) -> dict[str, bytes]:
        return {**files_of(shard, sample), **({"png": b"broken"} if (shard, sample) in broken else {})}

    broken = {(1, 4)}
    whole = seen(opened(write_shards(tmp_path / "a", files=files)).open(), range(11))
    assert caplog.text.count("image 00001.tar/000010004 is broken and left out") == 1
    assert all(x[:2] != (1, 4) for x in whole.values()) and sorted(whole) == list(range(66))
    assert all(caption == f"shard {s} sample {k}" for s, k, caption in whole.values())
    broken = {(1, 4), (0, 2)}
    with pytest.raises(UserError, match=r"2 of 22 images are broken, over 1 %, the last one 0000[01]\.tar/"):
        seen(opened(write_shards(tmp_path / "b", files=files)).open(), range(11))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"path": "{folder}/none"}, r"none: no such folder, and no \.tar"),
        ({"path": "{folder}/{{00000..00001}}.tra"}, None),
        ({"path": []}, r"data\.params\.path \[\]: name shards \(data/\{00000\.\.00099\}\.tar\)"),
        ({"path": ["{folder}", "{folder}/00001.tar"]}, r"00001\.tar is named twice; each shard is to come once"),
        ({"path": ["{folder}", "pipe:cat x"]}, r"pipe:cat x is remote and .*00000\.tar is a file"),
        ({"path": "{folder}/empty"}, r"empty: no \.tar shards in this folder"),
        ({"path": "{folder}/*.tar"}, r"\*\.tar: write numbered shards as {00000\.\.00099}\.tar, or name their folder"),
        ({"path": "{folder}/packed"}, r"00000\.tar: is compressed, .* unpack it once with `gunzip`"),
        (
            {"path": "{folder}/nothing.tar"},
            r"no samples in 1 shard\(s\): they hold no files KEY\.jpg, KEY\.png or KEY\.webp",
        ),
        ({"captions": 3}, r"captions 3: write txt, or names of fields"),
        ({"window": 0}, r"data\.params\.window 0: must be at least 1"),
        ({"missing_shards": "go on"}, r"missing_shards 'go on': must be one of stop, skip"),
        ({"captions": [3]}, r"captions \[3\]: write txt, or names of fields"),
        (
            {"filters": {"min_widht": 3}},
            r"filters: unknown 'min_widht' \(did you mean min_width\?\); there are min_width, ",
        ),
        ({"filters": [3]}, r"filters \[3\]: must be \{name: value\} of min_width"),
        ({"filters": {"min_width": "wide"}}, r"filters\.min_width takes a number, not 'wide'"),
        ({"fields": {"width": 3}}, r"fields\.width takes the name of a field, or a list of names, not '3'"),
        (
            {"filters": {"min_width": 99, "max_aspect": 1}},
            r"none of the 6 samples in 2 shard\(s\) is left \(6 by min_width 99, 4 by max_aspect 1\)",
        ),
    ],
)
def test_bad_input(params, expected, tmp_path):
    write_shards(tmp_path, (3, 3))
    (tmp_path / "empty").mkdir()
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "00000.tar").write_bytes(gzip.compress((tmp_path / "00000.tar").read_bytes()))
    if "nothing" in str(params):
        tarfile.open(tmp_path / "nothing.tar", "w").close()
    path = params.get("path", "{folder}")
    given = [word.format(folder=tmp_path) for word in path] if isinstance(path, list) else path.format(folder=tmp_path)
    with pytest.raises(UserError, match=expected):
        opened(given, **{key: value for key, value in params.items() if key != "path"}).open()


def test_a_folder_a_list_and_a_limit(tmp_path):
    write_shards(tmp_path)
    assert len(opened(str(tmp_path)).open().source) == 22
    data = opened(
        [f"{tmp_path}/00003.tar", f"{tmp_path}/{{00000..00001}}.tar"], val_path=f"{tmp_path}/00002.tar"
    ).open()
    assert [Path(shard).name for shard in data.source.shards] == ["00003.tar", "00000.tar", "00001.tar"]
    assert len(data.source) == 21 and len(data.val_source) == 1
    few = opened(str(tmp_path), limit=4).open()
    assert {x[:2] for x in seen(few, range(2), batch=4).values()} == {(0, k) for k in range(4)}
    with tarfile.open(tmp_path / "none.tar", "w") as tar:
        add(tar, "readme.txt", b"")
    with pytest.raises(UserError, match=r"none of the 1 samples in 1 shard\(s\) is left \(1 have no image KEY.jpg, "):
        opened(str(tmp_path / "none.tar")).open()


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("{00000..00002}.tar", ["00000.tar", "00001.tar", "00002.tar"]),
        ("{00000..00000}.tar", ["00000.tar"]),
        ("0000{1,3}.tar", ["00001.tar", "00003.tar"]),
    ],
)
def test_patterns(pattern, names, tmp_path):
    assert shards_of(f"{tmp_path}/{pattern}") == [f"{tmp_path}/{name}" for name in names]
