"""Python's collector of garbage, kept from looking at the libraries again and again."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_open: set[object] = set()  # the blocks that have set objects aside


@contextlib.contextmanager
def old_objects_set_aside() -> Iterator[None]:
    """While the block runs, the collector looks only at objects that are made meanwhile.

    torch and transformers are 300,000 objects, which it would walk over (0.2 s) for every 10,000 records that are read.
    Blocks may end in any order, as generators do: the last one brings the objects back. Where the caller has set
    objects aside (`gc.freeze`), these are left as they are.
    """
    if not _open and gc.get_freeze_count():
        yield
        return
    if not _open:
        gc.freeze()
    block = object()
    _open.add(block)
    try:
        yield
    finally:
        _open.remove(block)
        if not _open:
            gc.unfreeze()
