"""What torch's profiler saw a call allocate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._C._profiler import _EventType


def peak_of(call: Callable[[], object]) -> int:
    """The most bytes that were allocated at a time during a call, over what was before it. Memory that torch's own
    allocator gives, so not the large gradient buffers that the C++ backend keeps."""
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        call()
    assert profile.profiler is not None
    events = list(profile.profiler.kineto_results.experimental_event_tree())
    changes = []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    now = peak = 0
    for _, size in sorted(changes):
        now += size
        peak = max(peak, now)
    return peak
