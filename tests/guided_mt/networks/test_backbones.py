"""Every row of BACKBONES is a backbone: all that `MultiTask` asks of one."""

from __future__ import annotations

import pytest
from backbones import check_backbone
from tiny import words

from guided_mt.commands import train
from guided_mt.errors import UserError
from guided_mt.networks.model import VARIANTS
from guided_mt.runs.backbones import BACKBONES


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_output_depends_on_what_is_given_and_on_nothing_else(backbone, variant):
    check_backbone(backbone, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_of_modalities_in_the_sequence(variant):
    check_backbone("dit", variant, dit_context="in-context")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"backbone": "dit", "num_channels": 64}, "--num_channels: --mt_backbone dit has no use for it"),
        ({"mt_backbone": "unet", "dit_size": "B/2"}, "--dit_size: --mt_backbone unet has no use for it"),
        ({"backbone": "dit", "dit_size": "B/3"}, "--dit_size: 'B/3' is none of .*B/4"),
        ({"backbone": "dit", "dit_patch_size": 5}, "--image_size 16 is not a multiple of --dit_patch_size 5"),
        ({"backbone": "vit"}, "--mt_backbone"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        train.main(words(preset="masked-digits", **flags, total_steps=1, log_dir="nowhere"))
