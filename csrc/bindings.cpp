// The Python module pocl_fast._C: checks arguments, releases the GIL, calls. Nothing else is done here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>

#include "divergence/divergence.h"

namespace py = pybind11;

namespace {

// ---- divergence -------------------------------------------------------------------------------------------------------

const std::pair<const char*, pocl::Isa> kIsas[] = {
    {"plain", pocl::Isa::plain}, {"avx2", pocl::Isa::avx2}, {"avx512", pocl::Isa::avx512}};

/// The instruction set to use: the widest there is, or the one that POCL_FAST_ISA names.
pocl::Isa chosen_isa() {
    const char* wanted = std::getenv("POCL_FAST_ISA");
    if (wanted == nullptr || *wanted == '\0') return pocl::best_isa();
    for (const auto& [name, isa] : kIsas) {
        if (std::string(wanted) != name) continue;
        if (!pocl::supports(isa)) throw std::runtime_error("POCL_FAST_ISA=" + std::string(wanted) + ": this processor cannot run it");
        return isa;
    }
    throw std::runtime_error("POCL_FAST_ISA must be plain, avx2 or avx512, got " + std::string(wanted));
}

pocl::Family family_of(const std::string& name) {
    if (name == "forward_kl") return pocl::Family::forward_kl;
    if (name == "reverse_kl") return pocl::Family::reverse_kl;
    throw std::invalid_argument("no divergence named " + name);
}

/// Addresses come from tensors that the caller keeps alive; shapes are checked against each other here.
void distillation_rows(const pocl::Matrix& student, const pocl::Matrix& teacher, const std::optional<pocl::Matrix>& gradient,
                       std::uintptr_t labels, std::uintptr_t temperature, std::int64_t temperatures, std::uintptr_t alpha,
                       std::int64_t alphas, std::uintptr_t row_scale, std::uintptr_t stats, const std::string& divergence,
                       int temperature_power, std::int64_t ignore_index, int threads) {
    const std::int64_t N = student.rows;
    const bool fits = teacher.rows == N && (temperatures == 1 || temperatures == N) && (alphas == 1 || alphas == N) &&
                      (!gradient || (gradient->rows == N && gradient->columns == student.columns && gradient->dtype == student.dtype));
    if (!fits) throw std::invalid_argument("distillation_rows: the arguments' shapes do not fit each other");
    const pocl::Task task{
        .student = student,
        .teacher = teacher,
        .gradient = gradient.value_or(pocl::Matrix{}),
        .labels = reinterpret_cast<const std::int64_t*>(labels),
        .temperature = {reinterpret_cast<const float*>(temperature), temperatures == 1 ? 0 : 1},
        .alpha = {reinterpret_cast<const float*>(alpha), alphas == 1 ? 0 : 1},
        .row_scale = reinterpret_cast<const float*>(row_scale),
        .stats = reinterpret_cast<float*>(stats),
        .family = family_of(divergence),
        .temperature_power = temperature_power,
        .ignore_index = ignore_index,
    };
    const pocl::Isa isa = chosen_isa();
    py::gil_scoped_release release;
    pocl::distillation_rows(task, isa, threads);
}

void bind_divergence(py::module_& m) {
    py::enum_<pocl::DType>(m, "DType")
        .value("float32", pocl::DType::float32)
        .value("bfloat16", pocl::DType::bfloat16)
        .value("float16", pocl::DType::float16);
    py::class_<pocl::Matrix>(m, "Matrix", "A row-major matrix by its address; the caller keeps the memory alive.")
        .def(py::init([](std::uintptr_t address, pocl::DType dtype, std::int64_t rows, std::int64_t columns, std::int64_t row_stride) {
                 return pocl::Matrix{reinterpret_cast<void*>(address), dtype, rows, columns, row_stride};
             }),
             py::arg("address"), py::arg("dtype"), py::arg("rows"), py::arg("columns"), py::arg("row_stride"));
    m.def("distillation_rows", &distillation_rows, py::kw_only(), py::arg("student"), py::arg("teacher"), py::arg("gradient"),
          py::arg("labels"), py::arg("temperature"), py::arg("temperatures"), py::arg("alpha"), py::arg("alphas"),
          py::arg("row_scale"), py::arg("stats"), py::arg("divergence"), py::arg("temperature_power"), py::arg("ignore_index"),
          py::arg("threads"), "The fused loss of each row; see csrc/divergence/divergence.h.");
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

// ---- ranking ----------------------------------------------------------------------------------------------------------

void bind_ranking(py::module_& m) { (void)m; }

// ---- rouge ------------------------------------------------------------------------------------------------------------

void bind_rouge(py::module_& m) { (void)m; }

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The C++ part of pocl_fast: the fused CPU loss, rank fusion and ROUGE-L.";
    bind_divergence(m);
    bind_ranking(m);
    bind_rouge(m);
}
