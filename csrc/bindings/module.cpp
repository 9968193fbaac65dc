#include "bindings/bindings.h"

PYBIND11_MODULE(_C, m) {
    m.doc() = "The C++ part of pocl_fast: the fused CPU losses, their bf16 products, rank fusion and ROUGE-L.";
    bind_dense(m);
    bind_sparse(m);
    bind_simd(m);
    bind_products(m);
    bind_buffers(m);
    bind_ranking(m);
    bind_rouge(m);
}
