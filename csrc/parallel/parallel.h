// Work shared over threads. Knows nothing of the work; no Python, no torch.
#pragma once
#include <cstdint>
#include <functional>

namespace pocl {

/// Calls body(begin, end) over pieces of [0, count) on at most `threads` threads, the caller's among them, and waits.
/// Pieces are of `grain` items (the last may be shorter), handed out one by one. The body must not throw.
/// The threads are those of the OpenMP runtime that torch has loaded, where there is one, so that its pool and ours never
/// compete for the cores; else std::thread.
void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  const std::function<void(std::int64_t, std::int64_t)>& body);

}  // namespace pocl
