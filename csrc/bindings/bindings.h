// The parts of the Python module pocl_fast._C, one for each room: each checks arguments, releases the GIL, and calls. Python's headers are
// included in this folder alone.
#pragma once
#include <pybind11/pybind11.h>

void bind_dense(pybind11::module_& m);
void bind_sparse(pybind11::module_& m);
void bind_simd(pybind11::module_& m);
void bind_products(pybind11::module_& m);
void bind_buffers(pybind11::module_& m);
void bind_ranking(pybind11::module_& m);
void bind_rouge(pybind11::module_& m);
