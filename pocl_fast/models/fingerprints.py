"""Models told apart: by their files, by their commit on the hub, by their weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from pocl_fast.models.loading import readable_errors, resolve
from pocl_fast.models.placement import resident

_SUFFIXES = (".gguf", ".safetensors", ".bin", ".json", ".jinja", ".model", ".tiktoken", ".py")
_VOCABULARIES = ("vocab.txt", "merges.txt")  # of tokenizers; other texts are notes
_NAMED_TEMPLATES = "additional_chat_templates"  # transformers' folder of them


def source_fingerprint(source: str) -> str:
    """Identifies a model by its files without reading them whole: the source, and of each file of weights, settings,
    tokenizer or code its name, its size, its first MiB and 4 KiB out of each 1/1024 of the rest. A hub id stands for
    itself."""
    where = resolve(source)
    folders = [Path(where.path), *([Path(where.adapter)] if where.adapter else [])]
    if not folders[-1].is_dir():
        return source
    files = [(folder, name) for folder in folders if folder.is_dir() for name in _files_of(folder, where.gguf_file)]
    digest = hashlib.sha256(where.path.encode() if where.adapter and not folders[0].is_dir() else b"")
    for folder, name in files:
        size = (folder / name).stat().st_size
        digest.update(f"{name} {size}".encode())
        with open(folder / name, "rb") as file:
            digest.update(file.read(1 << 20))
            for place in range(1 << 20, size, max(1 << 12, size >> 10)):  # a changed tensor spans at least one of them
                file.seek(place)
                digest.update(file.read(1 << 12))
    return f"{source} ({digest.hexdigest()[:16]})"


def _files_of(folder: Path, gguf_file: str | None) -> list[str]:
    if gguf_file:
        return [gguf_file]
    paths = [*folder.iterdir(), *(folder / _NAMED_TEMPLATES).glob("*.jinja")]
    read = [path for path in paths if path.suffix in _SUFFIXES or path.name in _VOCABULARIES]
    return sorted(path.relative_to(folder).as_posix() for path in read)


def hub_revision(source: str, *, trust_remote_code: bool = False) -> str | None:
    """The commit of a hub id's files on this machine, brought up to date where the hub can be reached; None for a local
    folder or file. Raises `InputError` where there is no such model."""
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoConfig

    where = resolve(source)
    if Path(where.path).is_dir():
        return None
    with readable_errors(source, "model"):
        AutoConfig.from_pretrained(where.path, trust_remote_code=trust_remote_code)
    found = try_to_load_from_cache(where.path, "config.json")  # .../snapshots/<commit>/config.json
    return Path(found).parent.name if isinstance(found, str) else None


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of a model's parameters and of the rest of its state (the scales
    of a quantised model): equal exactly where the weights are equal."""
    digest = hashlib.sha256()
    tied = getattr(model, "all_tied_weights_keys", {})  # an offloaded one appears under both names
    tensors: dict[str, torch.Tensor] = {
        name: parameter
        for name, parameter in model.named_parameters()  # a tied one once
        if not (parameter.is_meta and name in tied)
    }
    untied = dict(model.named_parameters(remove_duplicate=False))
    tensors |= {name: value for name, value in model.state_dict().items() if name not in untied}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.is_meta:
            tensor = resident(model, name, "cpu")
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
