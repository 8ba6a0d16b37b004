"""What a file is by its first bytes, whatever its name says: one that holds tensors, or what else."""

from __future__ import annotations

import string
import zipfile
from pathlib import Path

from ..errors import UserError

SAFETENSORS, TORCH = "safetensors", "torch"
TORCH_LEGACY = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number that torch.save wrote before its zip files
)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
AGAIN = "copy it again, or take another checkpoint"
FETCH = "download the file itself"

# {first bytes: (what begins so, what to do instead)}
BEGINNINGS: dict[bytes, tuple[str, str]] = {
    b"version https://git-lfs": ("a Git LFS pointer, the file itself was not fetched", "run git lfs pull where it is from"),
    b"\x89PNG": ("a PNG picture", ""),
    b"\xff\xd8\xff": ("a JPEG picture", ""),
    b"GIF8": ("a GIF picture", ""),
    b"\x1f\x8b": ("compressed by gzip", "unpack it first"),
    b"BZh": ("compressed by bzip2", "unpack it first"),
    b"\xfd7zXZ": ("compressed by xz", "unpack it first"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstandard", "unpack it first"),
    b"7z\xbc\xaf": ("a 7-Zip archive", "unpack it first"),
    b"Rar!": ("a RAR archive", "unpack it first"),
    b"%PDF": ("a PDF document", FETCH),
    b"\x89HDF": ("an HDF5 file, as Keras writes", "give weights of PyTorch"),
    b"GGUF": ("a GGUF file of a language model", "give weights of PyTorch"),
    b"\x93NUMPY": ("a NumPy array", "give weights of PyTorch"),
}  # fmt: skip


def container(path: Path) -> str:
    """SAFETENSORS or TORCH: how the tensors of a file are kept. Raises UserError that says what another file is, and OSError."""
    with path.open("rb") as file:
        head = file.read(4096)
    size = path.stat().st_size
    if not size:
        raise UserError(f"{path}: is empty, as a truncated copy is; {AGAIN}")
    if not head.strip(b"\0"):
        raise UserError(f"{path}: begins with nothing but zeros, as a damaged copy does; {AGAIN}")
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < 1 << 40:
        return SAFETENSORS
    if head.startswith(b"PK"):
        return _zip(path)
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        if len(head) > 32 and TORCH_LEGACY not in head[:32]:
            raise UserError(
                f"{path}: refused, it is a Python pickle, which can run code when it is read; give a .safetensors file, or a .pt "
                "that torch.save wrote of a state dict"
            )
        return TORCH
    what, instead = _other(head)
    raise UserError(f"{path}: is {what}, no weights file; {instead or 'name a .pt, .ckpt or .safetensors file'}")


def _zip(path: Path) -> str:
    """TORCH for an archive that torch.save wrote. Raises UserError for another."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise UserError(
            f"{path}: is a truncated or damaged file of torch.save, or another zip archive; {AGAIN}"
        ) from None
    if any(name.endswith("/constants.pkl") for name in names):
        raise UserError(
            f"{path}: is a TorchScript program, no weights file; where it was made, save the weights: "
            "torch.save(model.state_dict(), 'weights.pt')"
        )
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        return TORCH
    if names and all(name.endswith(".npy") for name in names):
        raise UserError(
            f"{path}: is a NumPy .npz file ({', '.join(names[:3])}), no weights file; samples and statistics are such"
        )
    pictures = sum(name.lower().endswith(PICTURES) for name in names)
    held = f"{pictures} pictures" if pictures else f"{len(names)} files"
    first = f", first '{names[0]}'" if names else ""
    advice = (
        "give it as --data_dir, if these are images to train on" if pictures else "unpack it and name the weights in it"
    )
    raise UserError(f"{path}: is a zip archive of {held}{first}, no weights file; {advice}")


def _other(head: bytes) -> tuple[str, str]:
    """(what begins with `head`, what to do instead)."""
    for beginning, found in BEGINNINGS.items():
        if head.startswith(beginning):
            return found
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it and name the weights in it"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page (HTML)", f"the link was that of a page, perhaps one to sign in; {FETCH}"
    if text.startswith(b"<?xml"):
        return "an XML document, perhaps a server's message", FETCH
    if text.startswith(b"{") and b"_class_name" in text and b"pipeline" in text:
        return (
            "the index of a text-to-image pipeline in diffusers' layout",
            "mt-diffusion latent-sample loads its folder",
        )
    if text.startswith((b"{", b"[")):
        return "a JSON file", "an index or a configuration is such; name the weights beside it"
    try:
        words = head[:64].decode("ascii")
    except UnicodeDecodeError:
        words = ""
    if words and all(letter in string.printable for letter in words):
        return f"text, '{words.splitlines()[0][:40] if words.strip() else ''}'", ""
    return f"damaged or of an unknown kind (it begins with the bytes {head[:8].hex(' ')})", AGAIN
