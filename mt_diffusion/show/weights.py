"""What a weights file is, ours or foreign, and what loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guided_mt.runs.checkpoint import PIPELINE, read_config
from latent_mt.runs import hugging_face

from . import runs
from .facts import Facts, size_of
from .tensors import Contents, parameters, read_shapes

# {family of guided_mt.runs.recognise: what to type next, each with the reason}
COMMANDS = {
    "pixel": (("new images", "sample", "--model_path", "PATH"), ("go on training", "train", "--resume_checkpoint", "PATH")),
    "classifier": (("classes of images", "classify", "--classifier_path", "PATH", "--data_dir", "IMAGES"),),
    "latent": (("new images", "latent-sample", "--model_path", "PATH", "--config", "FILE"),),
    "first stage": (
        ("a latent model on it", "latent-train", "--config", "FILE", "model.params.first_stage_config.params.ckpt_path=PATH"),
    ),
}  # fmt: skip


def describe(path: str) -> Facts:
    """Raises UserError for a file that is damaged, holds code, or is no weights file, saying what it is."""
    file = Path(path).expanduser()
    if file.name == "training_state.pt":
        facts = Facts(path, "a run's training state: its optimiser, beside the weights, for going on with the run")
        facts.add("size on disk", size_of(file))
        facts.command("the checkpoint", "show", file.parent)
        return facts
    contents = read_shapes(file)
    beside = read_config(file) if (file.parent / "model.safetensors").exists() else None
    if beside is not None:
        return runs.weights_of_run(path, beside)
    return foreign(path, contents)


def foreign(path: str, contents: Contents) -> Facts:
    """A weights file without a configuration."""
    kind, shapes = contents.found.kind, contents.shapes
    facts = Facts(path, kind.name if kind else "weights of a network that is not known here")
    facts.add("stored under", contents.found.under)
    facts.add("entries", len(shapes))
    facts.add("parameters", parameters(shapes))
    facts.add("stored in", contents.types)
    for name, value in _widths(shapes).items():
        facts.add(name, value)
    facts.add("beside the weights", _beside(contents.found.beside))
    facts.add("first entries", list(shapes)[:3])
    facts.add("size on disk", size_of(Path(path).expanduser()))
    facts.add("to use it", kind.loads_it if kind else None)
    for why, *words in COMMANDS.get(kind.family, ()) if kind else ():
        facts.command(why, *(word.replace("PATH", path) for word in words))
    return facts


def pipeline(path: str) -> Facts:
    """A folder in the layout of Hugging Face's diffusers. Raises UserError for a damaged index, and a pipeline that isn't read."""
    saved = hugging_face.configuration(Path(path).expanduser() / PIPELINE)["model"]["params"]
    facts = Facts(path, "a text-to-image model in the layout of diffusers (StableDiffusionPipeline)")
    facts.add("text encoder", saved["cond_stage_config"]["target"].rpartition(".")[2])
    facts.add("predicts", saved["parameterization"])
    facts.add("size in pixels", saved["image_size"] * 2 ** (len(first_stage_levels(saved)) - 1))
    facts.command("new images", "latent-sample", "--model_path", path, "--prompt", "TEXT", "--guidance_scale", 7.5)
    facts.command("as latent-diffusion's file", "export", "ldm", "--model_path", path, "--out", "FILE.ckpt")
    return facts


def first_stage_levels(params: Mapping[str, Any]) -> list[int]:
    """`ch_mult` of the first stage in a model's `params`."""
    return list(params["first_stage_config"]["params"]["ddconfig"]["ch_mult"])


def _widths(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """What the shapes say of a U-Net of guided-diffusion's or latent-diffusion's."""
    prefix = "model.diffusion_model." if any(key.startswith("model.diffusion_model.") for key in shapes) else ""
    first, last = shapes.get(f"{prefix}input_blocks.0.0.weight"), shapes.get(f"{prefix}out.2.weight")
    found: dict[str, Any] = {}
    if first is not None and len(first) == 4:
        found["channels in"] = int(first[1])
        found["width of the first level"] = int(first[0])
    if last is not None and len(last) == 4:
        out = int(last[0])
        learned = " (with learned variances)" if first is not None and out == 2 * int(first[1]) else ""
        found["channels out"] = f"{out}{learned}"
    classes = shapes.get(f"{prefix}label_emb.weight")
    if classes is not None:
        found["number of classes"] = int(classes[0])
    return found


def _beside(beside: Mapping[str, Any]) -> list[str]:
    plain = {key: isinstance(value, (int, float, str)) and len(str(value)) < 40 for key, value in beside.items()}
    return [f"{key} {value}" if plain[key] else key for key, value in beside.items()]
