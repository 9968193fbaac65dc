"""Files told apart by their content: SHA-256."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from pocl_fast.system.errors import InputError

BLOCK = 1 << 22  # bytes that are read at a time


def file_fingerprint(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises `InputError` where the file cannot be read."""
    try:
        with open(path, "rb") as file:
            return sha256_of(file)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def sha256_of(file: BinaryIO) -> str:
    """SHA-256 of what is left to read in a file, in hexadecimal."""
    digest = hashlib.sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()
