#include "bindings/bindings.h"
#include "bindings/rows.h"

#include <pybind11/stl.h>

#include <vector>

#include "dense/dense.h"

namespace py = pybind11;

namespace {

/// Addresses come from tensors that the caller keeps alive; shapes are checked against each other here.
void distillation_rows(const pocl::Matrix& student, const pocl::Matrix& teacher, const std::optional<pocl::Matrix>& gradient,
                       std::uintptr_t labels, std::uintptr_t temperature, std::int64_t temperatures, std::uintptr_t alpha,
                       std::int64_t alphas, std::uintptr_t row_scale, std::int64_t row_scales, std::uintptr_t stats,
                       std::uintptr_t loss, bool reduced, const std::string& divergence,
                       double teacher_share, int temperature_power, std::int64_t ignore_index, const std::array<float, 4>& transforms,
                       int threads) {
    const std::int64_t N = student.rows;
    if (teacher.rows != N || !rows_fit(student, gradient, {temperatures, alphas, row_scales}))
        throw std::invalid_argument("distillation_rows: the arguments' shapes do not fit each other");
    require_labels_within(reinterpret_cast<const std::int64_t*>(labels), N, ignore_index, student.columns);
    const pocl::Task task{
        .student = student,
        .teacher = teacher,
        .gradient = gradient.value_or(pocl::Matrix{}),
        .labels = reinterpret_cast<const std::int64_t*>(labels),
        .temperature = per_row(temperature, temperatures),
        .alpha = per_row(alpha, alphas),
        .row_scale = per_row(row_scale, row_scales),
        .stats = reinterpret_cast<float*>(stats),
        .family = family_of(divergence),
        .teacher_share = teacher_share,
        .temperature_power = temperature_power,
        .ignore_index = ignore_index,
        .student_transform = {transforms[0], transforms[1]},
        .teacher_transform = {transforms[2], transforms[3]},
    };
    const pocl::Isa isa = chosen_isa();
    py::gil_scoped_release release;
    pocl::distillation_rows(task, isa, threads);
    pocl::scaled_losses(task.stats, task.labels, N, ignore_index, task.row_scale, reduced, reinterpret_cast<float*>(loss));
}

}  // namespace

void bind_dense(py::module_& m) {
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
          py::arg("row_scale"), py::arg("row_scales"), py::arg("stats"), py::arg("loss"), py::arg("reduced"), py::arg("divergence"),
          py::arg("teacher_share"), py::arg("temperature_power"), py::arg("ignore_index"), py::arg("transforms"), py::arg("threads"), "The fused loss of each row; see csrc/dense/dense.h.");
    m.def("divergences", [] {
        std::vector<std::string> names;
        for (const auto& [name, family] : pocl::kFamilies) names.emplace_back(name);
        return names;
    }, "The names that `divergence` may have.");
    m.attr("NUM_STATS") = pocl::kStats;
}
