// Large buffers that are kept when given back. A fresh one costs more than the loss that fills it: the system hands its pages out
// zeroed, one fault after the other. No Python, no torch.
#pragma once
#include <cstdint>

namespace pocl {

/// Memory of at least `bytes`, aligned to a page, its content arbitrary: the smallest kept buffer that fits and is not twice as large,
/// else fresh memory on huge pages where the system has them. Null where there is none.
void* take_buffer(std::int64_t bytes);

/// Ends the use of a buffer. The four largest that were given back are kept, the others go back to the system.
void give_back_buffer(void* buffer);

/// Gives the kept buffers back to the system. Bytes that were kept.
std::int64_t release_buffers();

}  // namespace pocl
