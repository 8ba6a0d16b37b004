"""Encode the images of a configuration once, so that training reads latents in the place of images.

    mt-diffusion encode --config camvid_mt --out latents/camvid data.params.path=camvid-256.tar
    mt-diffusion latent-train --config camvid_mt data.params.path=camvid-256.tar data.params.latents=latents/camvid

--representation clip-image also stores what a frozen CLIP makes of each image, for a configuration with such a modality.
What is random stays random: the latent of an image is drawn anew in every step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from guided_mt.commands.console import run
from guided_mt.data import check_workers
from guided_mt.errors import UserError, nearest
from guided_mt.generation.build import complete
from guided_mt.modalities.representation import SOURCES
from guided_mt.modalities.settings import row_config
from guided_mt.runs.checkpoint import find_weights, read_config
from guided_mt.runs.distributed import choose_device
from guided_mt.runs.processes.claim import Claim

from ..first_stage.first_stages import Autoencoder
from ..first_stage.latents import PRECISIONS, first_stage_hash, write_cache
from ..model.tasks import TaskKeys, read_tasks
from ..runs.configuration import load_config
from ..runs.ldm_checkpoint import read_state_dict
from ..runs.targets import instantiate

_FIRST_STAGE = "model.params.first_stage_config"
_FLAGS = [
    f"--{name}"
    for name in (
        "help",
        "config",
        "out",
        "splits",
        "first_stage",
        "batch_size",
        "precision",
        "device",
        "num_workers",
        "dry_run",
        "representation",
    )
]


def console() -> NoReturn:
    """Run as a command: bad input is one line on stderr and exit code 2."""
    run(main)
    sys.exit(0)


def main(argv: Sequence[str]) -> None:
    """Parse, encode each split, print a summary line for each. Raises UserError."""
    args = _parse(argv)
    config = load_config(args.config, args.overrides)
    if not config.get("data"):
        raise UserError(
            f"{args.config}: has no data section; write data: {{target: latent_mt.data.PairData, params: ...}}"
        )
    data = instantiate(config["data"], "data")
    splits = [name.strip() for name in args.splits.split(",")] if args.splits else [s for s in data.splits if s]
    sources = {split: data.pixel_source(split) for split in splits}
    task = _encoder_task(config, args)
    first_stage = _first_stage(config, args)
    made_by = first_stage_hash(first_stage)
    for split, source in sources.items():
        print(f"# {split}: {len(source)} items of {source.path}, {data.image_size} pixels, first stage {made_by[:12]}")
    if args.dry_run:
        return
    device = choose_device("" if args.device == "auto" else args.device)
    first_stage.to(device).to_fast_layout()
    row = SOURCES[args.representation] if args.representation else None
    encoder = row.encoder(task).to(device, torch.float32) if row and row.encoder else None
    described = {"source": args.representation, **row.described(task)} if row else None
    with Claim(args.out, setting="--out"):
        for split, source in sources.items():
            start = time.perf_counter()
            cache = write_cache(
                source,
                first_stage,
                data.image_size,
                args.out / split,
                batch_size=args.batch_size,
                precision=args.precision,
                num_workers=data.num_workers if args.num_workers is None else args.num_workers,
                encoder=encoder,
                described=described,
            )
            seconds = time.perf_counter() - start
            megabytes = (args.out / split / "latents.bin").stat().st_size / 1e6
            _, sides, _, moments, channels, height, width = cache.shape
            print(
                f"{args.out / split}: {len(cache)} items, {sides} side(s) of {channels}x{height}x{width}, {moments} moment(s), "
                f"plain and mirrored, {seconds:.1f} s, {len(cache) / seconds:.1f} items/s, {megabytes:.1f} MB"
                + (f", and {encoder.size} numbers of {args.representation}" if encoder else ""),
                flush=True,
            )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="YAML file with data, and with the first stage in its model")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; it gets a folder for each split")
    parser.add_argument("--splits", help="such as train,val (default: those of the data section)")
    parser.add_argument("--first_stage", help="weights of the first stage: a run, checkpoint folder or file")
    parser.add_argument("--batch_size", type=int, default=8, help="items encoded at once, each side plain and mirrored")
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of the stored latents")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto takes a GPU where there is one")
    parser.add_argument(
        "--num_workers", type=int, help="processes that decode images (default: those of the data section)"
    )
    parser.add_argument(
        "--representation",
        choices=[name for name, row in SOURCES.items() if row.encoder],
        help="also store the vectors of this encoder, whose settings are those of the modality in mt_tasks that has it as its "
        "representation_source",
    )
    parser.add_argument("--dry_run", action="store_true", help="say what would be encoded, and stop")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the YAML file, as data.params.limit=8"
    )

    def refuse(message: str) -> None:
        raise UserError(message)

    parser.error = refuse  # type: ignore[method-assign, assignment]
    for flag in (word.partition("=")[0] for word in argv if word.startswith("--")):
        if flag not in _FLAGS:  # before parsing, which would rather complain about what is missing
            raise UserError(f"unknown flag {flag}{nearest(flag, _FLAGS)}")
    args = parser.parse_intermixed_args(argv)
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: must be at least 1")
    if args.num_workers is not None:
        check_workers("--num_workers", args.num_workers)
    return args


def _encoder_task(config: Mapping[str, Any], args: argparse.Namespace) -> Any:
    """What the configuration says of the modality that has --representation as its source; None without the flag. Raises
    UserError."""
    if not args.representation:
        return None
    tasks = (config["model"].get("params") or {}).get("mt_tasks") or {}
    for name, entry in tasks.items():
        if (entry or {}).get("representation_source") == args.representation:
            params = {
                key: value for key, value in config["model"]["params"].items() if key in TaskKeys.__dataclass_fields__
            }
            settings = read_tasks(TaskKeys(**params), precision="fp32")
            complete(settings)
            return row_config(settings, name)
    raise UserError(
        f"{args.config}: --representation {args.representation}: no modality of model.params.mt_tasks has that as its "
        "representation_source; write one with its clip_arch and clip_weights"
    )


def _first_stage(config: Mapping[str, Any], args: argparse.Namespace) -> Autoencoder:
    """The autoencoder with its weights: that of the configuration, or of the run that --first_stage names."""
    described = (config["model"].get("params") or {}).get("first_stage_config")
    where = f"{args.config}: {_FIRST_STAGE}"
    if described is None:
        if args.first_stage is None:
            raise UserError(f"{where}: missing; write it there, or name a run of autoencoder-train by --first_stage")
        weights = find_weights(args.first_stage, flag="--first_stage")
        saved = read_config(weights, "first stage") or {}
        if not isinstance(saved.get("model"), dict):
            read_state_dict(weights, "autoencoder")  # says what a file of another kind is
            raise UserError(f"{where}: missing, and {args.first_stage} has no config.yaml that says what it is")
        described, where = saved["model"], f"{args.first_stage}: model"
        described = {key: described[key] for key in ("target", "params") if key in described}
    if args.first_stage is not None:
        described = {**described, "params": {**(described.get("params") or {}), "ckpt_path": args.first_stage}}
    first_stage = instantiate(described, where)
    if not isinstance(first_stage, Autoencoder):
        raise UserError(f"{where}: {described['target']} is no first stage")
    if any(True for _ in first_stage.parameters()) and not (described.get("params") or {}).get("ckpt_path"):
        raise UserError(f"{where}: has no weights; set its params.ckpt_path, or name them by --first_stage")
    return first_stage.requires_grad_(False)


if __name__ == "__main__":
    console()
