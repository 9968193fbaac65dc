#include "parallel/parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace pocl {
namespace {

// libgomp's entry point for `#pragma omp parallel`; libomp and libiomp5 export it too. Looked up in the process instead of
// linked, so that it is torch's copy of the runtime and not a second one beside it.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_gomp_parallel() {
    return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

struct Work {
    std::int64_t count;
    std::int64_t grain;
    const std::function<void(std::int64_t, std::int64_t)>* body;
    std::atomic<std::int64_t> next{0};

    void run() {
        for (;;) {
            const std::int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
            if (begin >= count) return;
            (*body)(begin, std::min(count, begin + grain));
        }
    }
};

}  // namespace

void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  const std::function<void(std::int64_t, std::int64_t)>& body) {
    if (count <= 0) return;
    grain = std::max<std::int64_t>(grain, 1);
    const std::int64_t pieces = (count + grain - 1) / grain;
    const int team = static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), pieces));
    Work work{count, grain, &body};
    if (team == 1) {
        body(0, count);
        return;
    }
    static const GompParallel gomp_parallel = find_gomp_parallel();
    if (gomp_parallel != nullptr) {
        gomp_parallel([](void* data) { static_cast<Work*>(data)->run(); }, &work, static_cast<unsigned>(team), 0);
        return;
    }
    std::vector<std::thread> others;
    for (int i = 1; i < team; ++i) others.emplace_back([&work] { work.run(); });
    work.run();
    for (auto& other : others) other.join();
}

}  // namespace pocl
