"""What Table 4 is made of: the presets of table4."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """What is made of what, the configuration that trains its first stage, and which half of the table it belongs to.

    half: "maps" or "images", a key of table4_scores.HALVES. line: what the data are.
    """

    given: str
    made: str
    autoencoder: str
    half: str
    line: str


PRESETS = {
    "camvid": Preset(
        "photo", "map", "autoencoder_kl_camvid", "maps", "CamVid street scenes at 64 pixels, on two CPU cores"
    ),
    "cityscapes": Preset("photo", "map", "autoencoder_kl_f8", "maps", "Cityscapes at 256 pixels, the paper's"),
    "daynight": Preset("night", "day", "autoencoder_kl_daynight", "images", "webcams at 64 pixels, on two CPU cores"),
    "night2day": Preset("night", "day", "autoencoder_kl_f8", "images", "night2day at 256 pixels, the paper's"),
}
