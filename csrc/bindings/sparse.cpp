#include "bindings/bindings.h"
#include "bindings/rows.h"

#include <pybind11/stl.h>

#include "sparse/sparse.h"

namespace py = pybind11;

namespace {

void sparse_distillation_rows(const pocl::Matrix& student, std::uintptr_t log_probs, std::uintptr_t indices, std::int64_t K,
                              const std::optional<pocl::Matrix>& gradient, std::uintptr_t labels, std::uintptr_t temperature,
                              std::int64_t temperatures, std::uintptr_t alpha, std::int64_t alphas, std::uintptr_t row_scale,
                              std::int64_t row_scales, std::uintptr_t stats, std::uintptr_t loss, bool reduced, const std::string& divergence, double teacher_share, int temperature_power,
                              std::int64_t ignore_index, const std::string& tail, const std::array<float, 2>& transform, int threads) {
    const std::int64_t N = student.rows;
    if (!rows_fit(student, gradient, {temperatures, alphas, row_scales}))
        throw std::invalid_argument("sparse_distillation_rows: the arguments' shapes do not fit each other");
    if (tail != "bucket" && tail != "renormalise") throw std::invalid_argument("tail must be bucket or renormalise, got " + tail);
    const pocl::SparseTask task{
        .student = student,
        .gradient = gradient.value_or(pocl::Matrix{}),
        .log_probs = reinterpret_cast<const float*>(log_probs),
        .indices = reinterpret_cast<const std::int64_t*>(indices),
        .K = K,
        .labels = reinterpret_cast<const std::int64_t*>(labels),
        .temperature = per_row(temperature, temperatures),
        .alpha = per_row(alpha, alphas),
        .row_scale = per_row(row_scale, row_scales),
        .stats = reinterpret_cast<float*>(stats),
        .family = family_of(divergence),
        .teacher_share = teacher_share,
        .temperature_power = temperature_power,
        .ignore_index = ignore_index,
        .tail = tail == "bucket" ? pocl::Tail::bucket : pocl::Tail::renormalise,
        .transform = {transform[0], transform[1]},
    };
    require_labels_within(task.labels, N, ignore_index, student.columns);
    if (const std::int64_t at = pocl::first_index_outside(task); at >= 0) {
        throw std::invalid_argument("index " + std::to_string(task.indices[at]) + " of the teacher's entry " + std::to_string(at % K) +
                                    " at token " + std::to_string(at / K) + " is outside the student's vocabulary of " +
                                    std::to_string(student.columns));
    }
    const pocl::Isa isa = chosen_isa();
    py::gil_scoped_release release;
    pocl::sparse_distillation_rows(task, isa, threads);
    pocl::scaled_losses(task.stats, task.labels, N, ignore_index, task.row_scale, reduced, reinterpret_cast<float*>(loss));
}

}  // namespace

void bind_sparse(py::module_& m) {
    m.def("sparse_distillation_rows", &sparse_distillation_rows, py::kw_only(), py::arg("student"), py::arg("log_probs"),
          py::arg("indices"), py::arg("K"), py::arg("gradient"), py::arg("labels"), py::arg("temperature"), py::arg("temperatures"),
          py::arg("alpha"), py::arg("alphas"), py::arg("row_scale"), py::arg("row_scales"), py::arg("stats"), py::arg("loss"),
          py::arg("reduced"), py::arg("divergence"), py::arg("teacher_share"),
          py::arg("temperature_power"), py::arg("ignore_index"), py::arg("tail"), py::arg("transform"), py::arg("threads"),
          "The fused loss of each row against K entries of the teacher's; see csrc/sparse/sparse.h.");
}
