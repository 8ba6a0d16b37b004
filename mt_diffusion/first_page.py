"""What `mt-diffusion` says by itself, and `mt-diffusion --help`."""

from __future__ import annotations

from .commands import COMMANDS, GROUPS

# What people do first, each with a command that runs as it stands after those above it.
STEPS = (
    ("See it work: train on real digits, restore masked ones, draw new ones", "mt-diffusion demo"),
    (
        "Train on your own images (a folder, .zip or .tar of any sizes, here `images`)",
        "mt-diffusion train --preset masked-cifar10 --data_dir images --log_dir runs/mine",
    ),
    ("Draw new images from a trained model", "mt-diffusion sample --model_path runs/demo --num_samples 16"),
    (
        "Restore the masked part of images",
        "mt-diffusion restore --model_path runs/demo --data_dir builtin:digits-test --mask patches:10 --num_samples 16",
    ),
    ("Ask what a run or file is, and what can be done with it", "mt-diffusion show runs/demo"),
)
WHERE = """\
All sub-commands: mt-diffusion --help. Flags of one: mt-diffusion train --help. Named settings: mt-diffusion presets.
Translation between two images, and all else in latent space: mt-diffusion latent-train --help.
Documentation: docs/index.md and README.md of the repository; every flag: docs/commands.md."""


def first_steps() -> str:
    """For someone who types the name alone."""
    lines = ["MT-Diffusion: one diffusion model of images and a second kind of data.", ""]
    for number, (what, command) in enumerate(STEPS, start=1):
        lines += [f"{number}. {what}:", f"     {command}"]
    return "\n".join([*lines, "", WHERE])


def all_commands() -> str:
    """Every sub-command with its line, by group."""
    width = max(map(len, COMMANDS)) + 2
    lines = [
        "usage: mt-diffusion SUB-COMMAND [flags]",
        "",
        "mpiexec, torchrun --no-python and srun start it on several processes.",
    ]
    for group in GROUPS:
        lines += ["", f"{group}:"]
        for name, command in COMMANDS.items():
            if command.group == group:
                extra = f"  [needs the extra {command.extra}]" if command.extra else ""
                lines.append(f"  {name:{width}s}{command.summary}{extra}")
    return "\n".join(
        [*lines, "", "mt-diffusion SUB-COMMAND --help lists the flags of one; mt-diffusion alone says where to begin."]
    )
