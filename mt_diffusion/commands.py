"""The table of sub-commands. A row is all that is needed to add one; nothing is imported for it until it is run."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType


@dataclass(frozen=True)
class Command:
    """A sub-command.

    module: has `console()`, which reads sys.argv and ends with an exit code, and `main(argv)`, the same for Python. script: the
    file of a clone that does the same. extra: what has to be installed beside the package itself, as in pip install
    'mt-diffusion[latent]'. passes_to: the sub-command that takes the flags which this one doesn't have itself.
    """

    module: str
    summary: str
    group: str
    script: str = ""
    extra: str = ""
    passes_to: str = ""

    def load(self) -> ModuleType:
        """The module, imported now."""
        return import_module(self.module)


PIXELS = "Images in pixels"
LATENTS = "Images in the latent space of an autoencoder"
FILES = "Data and weights"
SCORES = "Scores"
PAPER = "Experiments"
ABOUT = "Looking around"
GROUPS = (PIXELS, LATENTS, FILES, SCORES, PAPER, ABOUT)

COMMANDS: dict[str, Command] = {
    "train": Command(
        "guided_mt.commands.train",
        "train a model of images and a second kind of data",
        PIXELS,
        "scripts/image_train.py",
    ),
    "sample": Command(
        "guided_mt.commands.sample",
        "draw images, and what else the model knows of them",
        PIXELS,
        "scripts/image_sample.py",
    ),
    "restore": Command(
        "guided_mt.commands.restore", "fill in the masked part of images", PIXELS, "scripts/image_restore.py"
    ),
    "classify": Command(
        "reproduce.classify", "name the class of images by a model's label head", PIXELS, "scripts/image_classify.py"
    ),
    "caption": Command(
        "guided_mt.commands.caption",
        "write captions of images by a model's caption head",
        PIXELS,
        "scripts/image_caption.py",
    ),
    "nll": Command(
        "guided_mt.commands.nll", "bits per dimension of images under a model", PIXELS, "scripts/image_nll.py"
    ),
    "classifier-train": Command(
        "guided_mt.commands.classifier_train",
        "train a classifier of noisy images",
        PIXELS,
        "scripts/classifier_train.py",
    ),
    "classifier-sample": Command(
        "guided_mt.commands.classifier_sample",
        "draw images guided by a classifier of noisy images",
        PIXELS,
        "scripts/classifier_sample.py",
    ),
    "autoencoder-train": Command(
        "latent_mt.commands.autoencoder_train",
        "train a first stage: images to latents and back",
        LATENTS,
        "scripts/autoencoder_train.py",
        "latent",
    ),
    "latent-train": Command(
        "latent_mt.commands.latent_train",
        "train a latent model, also one of several images of each item",
        LATENTS,
        "scripts/latent_train.py",
        "latent",
    ),
    "latent-sample": Command(
        "latent_mt.commands.latent_sample",
        "draw from a latent model, or translate one image into another",
        LATENTS,
        "scripts/latent_sample.py",
    ),
    "latent-restore": Command(
        "latent_mt.commands.latent_restore",
        "fill in the masked part of images by a latent model",
        LATENTS,
        "scripts/latent_restore.py",
    ),
    "latent-classify": Command(
        "reproduce.latent_classify",
        "name the class of images by a latent model's label head",
        LATENTS,
        "scripts/latent_classify.py",
    ),
    "encode": Command(
        "latent_mt.commands.encode_latents",
        "encode a data set once, so that training reads latents",
        LATENTS,
        "scripts/encode_latents.py",
    ),
    "prepare": Command(
        "guided_mt.commands.prepare",
        "crop a data set once into a .zip that is read fast",
        FILES,
        "scripts/prepare_images.py",
    ),
    "export adm": Command(
        "guided_mt.commands.export", "write weights for guided-diffusion's own code", FILES, "scripts/export_adm.py"
    ),
    "export ldm": Command(
        "latent_mt.commands.export_ldm", "write weights for latent-diffusion's own code", FILES, "scripts/export_ldm.py"
    ),
    "export diffusers": Command(
        "latent_mt.commands.export_diffusers",
        "write a text-to-image model for diffusers' own code",
        FILES,
        "scripts/export_diffusers.py",
        "text",
    ),
    "evaluate": Command(
        "evaluations.evaluator",
        "FID, sFID, Inception Score, precision and recall of samples",
        SCORES,
        "evaluations/evaluator.py",
        "eval",
    ),
    "reference": Command(
        "evaluations.make_reference",
        "write the reference that evaluate compares with",
        SCORES,
        "evaluations/make_reference.py",
        "eval",
    ),
    "score restoration": Command(
        "evaluations.restoration",
        "LPIPS, PSNR and SSIM of restored images; Table 1",
        SCORES,
        "evaluations/restoration.py",
        "eval",
    ),
    "score segmentation": Command(
        "evaluations.segmentation",
        "pixel accuracy and intersection over union of label maps",
        SCORES,
        "evaluations/segmentation.py",
    ),
    "score classification": Command(
        "evaluations.classification",
        "accuracy and calibration of what classify wrote",
        SCORES,
        "evaluations/classification.py",
    ),
    "demo": Command(
        "reproduce.demo",
        "train, restore and draw digits: the whole in minutes on a CPU",
        PAPER,
        "scripts/demo.py",
        "plots",
    ),
    "compare": Command(
        "reproduce.compare",
        "multi-task models against single-task ones at equal budget",
        PAPER,
        "scripts/compare.py",
        "eval",
    ),
    "subsets": Command(
        "reproduce.subsets",
        "one picture: what a model makes of every subset of what it can be given",
        PAPER,
        "scripts/subsets.py",
    ),
    "table4": Command(
        "reproduce.table4",
        "the paper's Table 4: one image of a pair from the other",
        PAPER,
        "scripts/table4.py",
        "latent",
    ),
    "joint-clip": Command(
        "reproduce.joint_clip",
        "image and CLIP representation (appendix E.4), small: against its twin",
        PAPER,
        "scripts/joint_clip.py",
        "text",
    ),
    "transfer": Command(
        "reproduce.transfer",
        "which task helps or hurts which (appendix E.5), small: a table and a heat map",
        PAPER,
        "scripts/transfer.py",
        "eval",
        passes_to="train",
    ),
    "figure6": Command(
        "reproduce.figure6",
        "the paper's Figure 6: a classifier fine-tuned from a joint model",
        PAPER,
        "scripts/figure6.py",
        "eval",
        passes_to="classifier-train",
    ),
    "presets": Command("mt_diffusion.presets", "list the named settings, or print one of them", ABOUT),
    "show": Command("mt_diffusion.show", "say what a run, a weights file, samples or a data set is", ABOUT),
    "completion": Command("mt_diffusion.completion", "print the completion script of bash, zsh or fish", ABOUT),
}


def kinds(word: str) -> list[str]:
    """The second words of the sub-commands of two words that begin with `word`: ["adm", "ldm"] for "export"."""
    return [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{word} ")]
