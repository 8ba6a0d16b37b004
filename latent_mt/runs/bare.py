"""A transformer's file, which holds the network alone (DiT's, SiT's, REPA's), and what a foreign file lacks of a network here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guided_mt.errors import UserError
from guided_mt.runs.recognise import DIT_CLASSES, DIT_PATCHES, LDM_UNET, recognise
from guided_mt.runs.weights import shapes_of

PROJECTORS = "projectors."  # before what REPA aligns by, which training alone uses
FIXED = ("pos_embed",)  # not learned: files may lack it
# Tables of classes by the networks' names of them; in those of NULL_LAST the last row is no class, and is learned.
CLASS_TABLES = ("label_emb.weight", DIT_CLASSES)
NULL_LAST = CLASS_TABLES[1:]


def is_bare(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the entries of a transformer for latents alone, without any stage beside it."""
    kind = recognise(shapes_of(state)) if DIT_PATCHES in state else None
    return kind is not None and kind.family == "latent"


def holds_network_alone(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict of latent-diffusion's names is that of such a file."""
    return LDM_UNET + DIT_PATCHES in state and all(key.startswith(LDM_UNET) for key in state)


def refuse_transformer(state: Mapping[str, Tensor], weights: Path, code: str) -> None:
    """Raises UserError where the network's entries are a transformer's, which `code` does not have."""
    if DIT_PATCHES in state:
        raise UserError(
            f"{weights}: its network is a transformer, which {code} does not have; export adm writes it for DiT's own"
        )


def completed(network: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `weights` of a `MultiTask` with what a foreign file may lack: the fixed positions of a transformer, and the class that
    tells the role, which begins by saying nothing, or what the file's null class says, the last row of a transformer's table."""
    own = network.state_dict()
    found = {**{key: own[key] for key in FIXED if key in own}, **weights}
    table = next((key for key in CLASS_TABLES if key in own), None)
    if network.roles and table is not None:
        saved = found.get(table)
        if saved is None:
            found[table] = torch.zeros_like(own[table])
        elif table in NULL_LAST and len(saved) != len(own[table]):
            found[table] = saved[-1:].expand(len(own[table]), -1)
    return found
