"""Python's collector of garbage, kept from looking at the libraries again and again."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def old_objects_set_aside() -> Iterator[None]:
    """Has the collector look at objects that are made meanwhile alone.

    torch and transformers are 300,000 objects, which it would walk over (0.2 s) for every 10,000 records that are read.
    Where the caller has set objects aside (`gc.freeze`), these are left as they are.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
