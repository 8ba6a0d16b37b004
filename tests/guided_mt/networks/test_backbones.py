"""Every row of BACKBONES is a backbone: all that `MultiTask` asks of one."""

from __future__ import annotations

import pytest
from backbones import check_backbone

from guided_mt.networks.model import BACKBONES, VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_output_depends_on_what_is_given_and_on_nothing_else(backbone, variant):
    check_backbone(backbone, variant)
