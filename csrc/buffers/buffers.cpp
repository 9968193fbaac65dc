#include "buffers/buffers.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

namespace pocl {
namespace {

constexpr std::int64_t kHugePage = std::int64_t{2} << 20;

struct Kept {
    void* buffer = nullptr;
    std::int64_t bytes = 0;
};

constexpr std::size_t kMost = 4;  // what one loss holds at a time: student's and teacher's logits, a gradient, an lm_head's

std::mutex mutex;
std::vector<Kept>& kept() {  // by size
    static auto* buffers = new std::vector<Kept>;
    return *buffers;
}
std::map<void*, std::int64_t>& taken() {
    static auto* sizes = new std::map<void*, std::int64_t>;  // outlives every tensor, also at exit
    return *sizes;
}

/// Takes one out of the kept.
Kept removed(std::vector<Kept>::iterator at) {
    const Kept found = *at;
    kept().erase(at);
    return found;
}

void unmap(const Kept& old) { munmap(old.buffer, static_cast<std::size_t>(old.bytes)); }

}  // namespace

void* take_buffer(std::int64_t bytes) {
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    const std::lock_guard lock(mutex);
    const auto fits = std::ranges::lower_bound(kept(), bytes, {}, &Kept::bytes);
    if (fits != kept().end() && fits->bytes <= 2 * bytes) {
        const Kept found = removed(fits);
        taken()[found.buffer] = found.bytes;
        return found.buffer;
    }
    // not to hold both: the new one is in the place of the next smaller, or larger
    if (!kept().empty()) unmap(removed(fits == kept().begin() ? fits : fits - 1));
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
    const Kept returned{buffer, found->second};
    taken().erase(found);
    kept().insert(std::ranges::lower_bound(kept(), returned.bytes, {}, &Kept::bytes), returned);
    if (kept().size() > kMost) unmap(removed(kept().begin()));
}

std::int64_t release_buffers() {
    const std::lock_guard lock(mutex);
    std::int64_t bytes = 0;
    for (const Kept& old : kept()) {
        bytes += old.bytes;
        unmap(old);
    }
    kept().clear();
    return bytes;
}

}  // namespace pocl
