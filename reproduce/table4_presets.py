"""What Table 4 is made of: the presets of table4."""

from __future__ import annotations

from dataclasses import dataclass

from .table4_scores import IMAGES, MAPS, Half


@dataclass(frozen=True)
class Preset:
    """What is made of what, the YAML file that trains its first stage, and which half of the table it belongs to."""

    given: str
    made: str
    autoencoder: str
    half: Half


PRESETS = {
    "camvid": Preset("photo", "map", "autoencoder_kl_camvid", MAPS),
    "cityscapes": Preset("photo", "map", "autoencoder_kl_f8", MAPS),
    "daynight": Preset("night", "day", "autoencoder_kl_daynight", IMAGES),
    "night2day": Preset("night", "day", "autoencoder_kl_f8", IMAGES),
}
