#include "buffers/buffers.h"

#include <sys/mman.h>

#include <map>
#include <mutex>
#include <utility>

namespace pocl {
namespace {

constexpr std::int64_t kHugePage = std::int64_t{2} << 20;

struct Kept {
    void* buffer = nullptr;
    std::int64_t bytes = 0;
};

std::mutex mutex;
Kept kept;
std::map<void*, std::int64_t>& taken() {
    static auto* sizes = new std::map<void*, std::int64_t>;  // outlives every tensor, also at exit
    return *sizes;
}

void unmap(const Kept& old) {
    if (old.buffer != nullptr) munmap(old.buffer, static_cast<std::size_t>(old.bytes));
}

}  // namespace

void* take_buffer(std::int64_t bytes) {
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    const std::lock_guard lock(mutex);
    if (kept.buffer != nullptr && kept.bytes >= bytes && kept.bytes <= 2 * bytes) {
        const Kept found = std::exchange(kept, {});
        taken()[found.buffer] = found.bytes;
        return found.buffer;
    }
    unmap(std::exchange(kept, {}));  // not to hold two
    void* const fresh = mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
    madvise(fresh, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);
#endif
    taken()[fresh] = bytes;
    return fresh;
}

void give_back_buffer(void* buffer) {
    const std::lock_guard lock(mutex);
    const auto found = taken().find(buffer);
    if (found == taken().end()) return;
    Kept returned{buffer, found->second};
    taken().erase(found);
    if (returned.bytes > kept.bytes) std::swap(returned, kept);
    unmap(returned);
}

std::int64_t release_buffers() {
    const std::lock_guard lock(mutex);
    const Kept old = std::exchange(kept, {});
    unmap(old);
    return old.bytes;
}

}  // namespace pocl
