// A matrix in somebody else's memory, as the rooms hand it to each other. No Python, no torch.
#pragma once
#include <cstdint>

namespace pocl {

enum class DType { float32, bfloat16, float16 };

/// Row-major; rows are `row_stride` elements apart.
struct Matrix {
    void* data = nullptr;
    DType dtype = DType::float32;
    std::int64_t rows = 0;
    std::int64_t columns = 0;
    std::int64_t row_stride = 0;
};

}  // namespace pocl
