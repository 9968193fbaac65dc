#include "products/products.h"

#include <algorithm>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>

#include "parallel/parallel.h"
#include "products/micro_kernel.h"
#include "products/packing.h"

namespace pocl {

bool has_products() noexcept { return static_cast<bool>(micro_kernel()); }

#if defined(__x86_64__)
namespace {

using Int = std::int64_t;
using Half = std::uint16_t;  // the bits of a bf16 number

constexpr Int kRows = 32;       // of A at a time: few shapes for which a micro-kernel is made, whatever the number of tokens
constexpr Int kInner = 1024;    // of K at a time, in logits: a block of B within 128 KB
constexpr Int kPanel = 128;     // of V at a time, in hidden gradients: a panel of kWide columns of the weight within 192 KB
constexpr Int kWide = 768;
constexpr Int kTall = 128;      // of V at a time, in weight gradients

/// Memory that a thread keeps for its next product.
template <class T>
class Scratch {
  public:
    T* take(Int count) {
        if (count > held_) {
            memory_.reset();
            memory_.reset(static_cast<T*>(::operator new(static_cast<std::size_t>(count) * sizeof(T), std::align_val_t{64})));
            held_ = count;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(T* memory) const { ::operator delete(memory, std::align_val_t{64}); }
    };
    std::unique_ptr<T, Free> memory_;
    Int held_ = 0;
};

thread_local Scratch<Half> shared;  // the caller's: a factor that all threads read
thread_local Scratch<Half> left, right;
thread_local Scratch<float> tile;

Matrix part(const Matrix& of, Int row, Int rows, Int column, Int columns) {
    const Int bytes = of.dtype == DType::float32 ? 4 : 2;
    char* const data = static_cast<char*>(of.data) + (row * of.row_stride + column) * bytes;
    return {data, of.dtype, std::clamp<Int>(of.rows - row, 0, rows), std::clamp<Int>(of.columns - column, 0, columns), of.row_stride};
}

float* at(const Matrix& of, Int row, Int column) { return static_cast<float*>(of.data) + row * of.row_stride + column; }

/// The sum of no terms.
void clear(const Matrix& x) {
    for (Int row = 0; row < x.rows; ++row) std::fill_n(at(x, row, 0), x.columns, 0.0f);
}

/// parallel_for with a body that may throw; the first exception comes out. Neighbours go to one thread, which prefetches the next.
void each(Int count, int threads, const std::function<void(Int)>& body) {
    const Int grain = std::clamp<Int>(count / (8 * std::max(threads, 1)), 1, 16);
    std::exception_ptr error;
    std::mutex mutex;
    parallel_for(count, grain, threads, [&](Int begin, Int end) {
        try {
            for (Int i = begin; i < end; ++i) body(i);
            micro_kernel().release(true);
        } catch (...) {
            const std::lock_guard lock(mutex);
            if (!error) error = std::current_exception();
        }
    });
    if (error) std::rethrow_exception(error);
}

/// C [rows, columns] (+)= A [rows, K] · one block of B.
void multiply(Int rows, Int columns, Int K, const Half* A, Int ld_a, const Half* B, float* C, Int ld_c, bool add) {
    micro_kernel().multiply(rows, columns, K, ld_a, kBlock, ld_c, add, A, B, C, true);
}

}  // namespace

void logits_product(const Matrix& hidden, const Matrix& weight, const float* bias, const Matrix& out, int threads) {
    const Int n = hidden.rows, V = weight.rows, H = hidden.columns, ld_a = padded(H, kMultiple);
    Half* const A = shared.take(n * ld_a);
    pack_rows(hidden, A);
    each((V + kBlock - 1) / kBlock, threads, [&](Int block) {
        const Int v = block * kBlock, columns = std::min(kBlock, V - v);
        Half* const B = right.take(ld_a * kBlock);
        float* const C = tile.take(kRows * kBlock);
        const Matrix next = part(weight, v + kBlock, kBlock, 0, H);
        for (Int k = 0; k < H; k += kInner) pack_pairs_transposed(part(weight, v, kBlock, k, kInner), B + k * kBlock);
        for (Int row = 0; row < n; row += kRows) {
            const Int rows = std::min(kRows, n - row);
            prefetch(next, row / kRows, (n + kRows - 1) / kRows);
            for (Int k = 0; k < H; k += kInner)
                multiply(rows, columns, std::min(kInner, ld_a - k), A + row * ld_a + k, ld_a, B + k * kBlock, C, kBlock, k > 0);
            stream_rows(C, bias == nullptr ? nullptr : bias + v, part(out, row, rows, v, columns));
        }
    });
}

void hidden_grad_product(const Matrix& grad, const Matrix& weight, const Matrix& out, int threads) {
    const Int n = grad.rows, V = weight.rows, H = weight.columns;
    if (n == 0 || V == 0) return clear(out);
    // each part of the rows packs the weight, each part of the columns the gradient: few, yet one for each thread
    const Int row_parts = std::clamp<Int>(threads, 1, (n + kRows - 1) / kRows);
    const Int column_parts = std::max((H + kWide - 1) / kWide, std::min((threads + row_parts - 1) / row_parts, (H + kBlock - 1) / kBlock));
    const Int tall = padded((n + row_parts - 1) / row_parts, kRows), wide = padded((H + column_parts - 1) / column_parts, kBlock);
    each(row_parts * column_parts, threads, [&](Int task) {
        const Int row = task % row_parts * tall, column = task / row_parts * wide;
        const Matrix C = part(out, row, tall, column, wide);
        if (C.rows == 0 || C.columns == 0) return;  // parts are whole blocks: the last may have none
        const Int pieces = (C.rows + kRows - 1) / kRows * ((C.columns + kBlock - 1) / kBlock);
        Half* const A = left.take(tall * kPanel);
        Half* const B = right.take(kPanel * wide);
        for (Int v = 0; v < V; v += kPanel) {
            const Int K = padded(std::min(kPanel, V - v), kMultiple);
            pack_rows(part(grad, row, tall, v, kPanel), A);
            pack_pairs(part(weight, v, kPanel, column, wide), B);
            const Matrix next_grad = part(grad, row, tall, v + kPanel, kPanel);
            const Matrix next_weight = part(weight, v + kPanel, kPanel, column, wide);
            for (Int h = 0, piece = 0; h < C.columns; h += kBlock) {
                for (Int i = 0; i < C.rows; i += kRows, ++piece) {
                    prefetch(next_grad, piece, pieces);
                    prefetch(next_weight, piece, pieces);
                    const Int rows = std::min(kRows, C.rows - i), columns = std::min(kBlock, C.columns - h);
                    multiply(rows, columns, K, A + i * K, K, B + h * K, at(C, i, h), C.row_stride, v > 0);
                }
            }
        }
    });
}

void weight_grad_product(const Matrix& grad, const Matrix& hidden, const Matrix& total, bool add, int threads) {
    const Int n = grad.rows, V = grad.columns, H = hidden.columns, K = padded(n, kMultiple);
    if (n == 0) return add ? void() : clear(total);
    Half* const B = shared.take(K * padded(H, kBlock));
    pack_pairs(hidden, B);
    each((V + kTall - 1) / kTall, threads, [&](Int block) {
        const Int v = block * kTall;
        Half* const A = left.take(kTall * K);
        pack_columns(part(grad, 0, n, v, kTall), A);
        const Matrix next = part(grad, 0, n, v + kTall, kTall);
        const Int pieces = kTall / kBlock * ((H + kBlock - 1) / kBlock);
        for (Int i = 0, piece = 0; i < kTall && v + i < V; i += kBlock) {
            for (Int h = 0; h < H; h += kBlock, ++piece) {
                const Matrix C = part(total, v + i, kBlock, h, kBlock);
                prefetch(next, piece, pieces);
                prefetch(part(total, v + i, kBlock, h + kBlock, kBlock), 0, 1);
                multiply(C.rows, C.columns, K, A + i * K, K, B + h * K, at(C, 0, 0), C.row_stride, add);
            }
        }
    });
}

#else  // has_products() is false

void logits_product(const Matrix&, const Matrix&, const float*, const Matrix&, int) { throw std::runtime_error("no products here"); }
void hidden_grad_product(const Matrix&, const Matrix&, const Matrix&, int) { throw std::runtime_error("no products here"); }
void weight_grad_product(const Matrix&, const Matrix&, const Matrix&, bool, int) { throw std::runtime_error("no products here"); }

#endif

}  // namespace pocl
