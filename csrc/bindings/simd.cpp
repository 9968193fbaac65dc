#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "bindings/rows.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "dense/dense.h"

namespace py = pybind11;

void bind_simd(py::module_& m) {
    m.def("vector_math", [](const std::string& function, const Array<float>& x) {
        const std::vector<std::string> names{"exp2", "exp2_minus_1", "log1p", "tanh", "log2", "exp"};
        const auto found = std::ranges::find(names, function);
        if (found == names.end()) throw std::invalid_argument("no function named " + function);
        py::array_t<float> y(x.size());
        pocl::vector_math(static_cast<int>(found - names.begin()), x.data(), y.mutable_data(), x.size(), chosen_isa());
        return y;
    }, py::arg("function"), py::arg("x"), "The kernel's own exp2, exp2_minus_1, log1p, tanh, log2 or exp of fp32 numbers, for their test.");
    m.def("isa", [] {
        const pocl::Isa isa = chosen_isa();
        for (const auto& [name, value] : kIsas)
            if (value == isa) return name;
        return "";
    }, "The instruction set in use: plain, avx2 or avx512.");
    m.def("supported_isas", [] {
        std::vector<std::string> names;
        for (const auto& [name, isa] : kIsas)
            if (pocl::supports(isa)) names.emplace_back(name);
        return names;
    }, "The instruction sets that this processor can run.");
}
