// The Python module pocl_fast._C: checks arguments, releases the GIL, calls. Nothing else is done here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <array>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "buffers/buffers.h"
#include "divergence/divergence.h"
#include "divergence/sparse.h"
#include "products/products.h"
#include "ranking/rank.h"
#include "rouge/rouge.h"
#include "rouge/words.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::span<const T> view(const Array<T>& array) {
    return {array.data(), static_cast<std::size_t>(array.size())};
}

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
    if (name == "jsd") return pocl::Family::jsd;
    if (name == "skew_forward_kl") return pocl::Family::skew_forward_kl;
    if (name == "skew_reverse_kl") return pocl::Family::skew_reverse_kl;
    if (name == "tvd") return pocl::Family::tvd;
    throw std::invalid_argument("no divergence named " + name);
}

void require_labels_within(const std::int64_t* labels, std::int64_t N, std::int64_t ignore_index, std::int64_t V) {
    for (std::int64_t n = 0; n < N; ++n) {
        if (labels[n] == ignore_index || (labels[n] >= 0 && labels[n] < V)) continue;
        throw std::invalid_argument("label " + std::to_string(labels[n]) + " at token " + std::to_string(n) +
                                    " is outside the student's vocabulary of " + std::to_string(V));
    }
}

/// Whether what both row kernels are given is of the student's rows.
bool rows_fit(const pocl::Matrix& student, const std::optional<pocl::Matrix>& gradient, std::initializer_list<std::int64_t> values) {
    const std::int64_t N = student.rows;
    return std::ranges::all_of(values, [=](std::int64_t count) { return count == 1 || count == N; }) &&
           (!gradient || (gradient->rows == N && gradient->columns == student.columns && gradient->dtype == student.dtype));
}

pocl::PerRow per_row(std::uintptr_t address, std::int64_t count) {
    return {reinterpret_cast<const float*>(address), count == 1 ? 0 : 1};
}

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
          py::arg("row_scale"), py::arg("row_scales"), py::arg("stats"), py::arg("loss"), py::arg("reduced"), py::arg("divergence"),
          py::arg("teacher_share"), py::arg("temperature_power"), py::arg("ignore_index"), py::arg("transforms"), py::arg("threads"), "The fused loss of each row; see csrc/divergence/divergence.h.");
    m.def("sparse_distillation_rows", &sparse_distillation_rows, py::kw_only(), py::arg("student"), py::arg("log_probs"),
          py::arg("indices"), py::arg("K"), py::arg("gradient"), py::arg("labels"), py::arg("temperature"), py::arg("temperatures"),
          py::arg("alpha"), py::arg("alphas"), py::arg("row_scale"), py::arg("row_scales"), py::arg("stats"), py::arg("loss"),
          py::arg("reduced"), py::arg("divergence"), py::arg("teacher_share"),
          py::arg("temperature_power"), py::arg("ignore_index"), py::arg("tail"), py::arg("transform"), py::arg("threads"),
          "The fused loss of each row against K entries of the teacher's; see csrc/divergence/sparse.h.");
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

// ---- products ---------------------------------------------------------------------------------------------------------

bool packable(const pocl::Matrix& x) { return x.dtype == pocl::DType::float32 || x.dtype == pocl::DType::bfloat16; }

void check_product(const char* name, const pocl::Matrix& a, const pocl::Matrix& b, const pocl::Matrix& out, bool fits) {
    if (!pocl::has_products()) throw std::runtime_error(std::string(name) + ": has_products() is false here");
    if (!fits || !packable(a) || !packable(b) || out.dtype != pocl::DType::float32)
        throw std::invalid_argument(std::string(name) + ": the arguments' shapes do not fit, or one is not fp32 or bf16");
}

/// Addresses come from tensors that the caller keeps alive; shapes are checked against each other here.
void bind_products(py::module_& m) {
    m.def("has_products", &pocl::has_products, "Whether the bf16 products below can be computed here; see csrc/products/products.h.");
    m.def("logits_product", [](const pocl::Matrix& hidden, const pocl::Matrix& weight, std::uintptr_t bias, const pocl::Matrix& out, int threads) {
        check_product("logits_product", hidden, weight, out,
                      hidden.columns == weight.columns && out.rows == hidden.rows && out.columns == weight.rows);
        py::gil_scoped_release release;
        pocl::logits_product(hidden, weight, reinterpret_cast<const float*>(bias), out, threads);
    }, py::arg("hidden"), py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("threads"), "out = hidden · weightᵀ + bias, whose address may be 0.");
    m.def("hidden_grad_product", [](const pocl::Matrix& grad, const pocl::Matrix& weight, const pocl::Matrix& out, int threads) {
        check_product("hidden_grad_product", grad, weight, out,
                      grad.columns == weight.rows && out.rows == grad.rows && out.columns == weight.columns);
        py::gil_scoped_release release;
        pocl::hidden_grad_product(grad, weight, out, threads);
    }, py::arg("grad"), py::arg("weight"), py::arg("out"), py::arg("threads"), "out = grad · weight.");
    m.def("weight_grad_product", [](const pocl::Matrix& grad, const pocl::Matrix& hidden, const pocl::Matrix& total, bool add, int threads) {
        check_product("weight_grad_product", grad, hidden, total,
                      grad.rows == hidden.rows && total.rows == grad.columns && total.columns == hidden.columns);
        py::gil_scoped_release release;
        pocl::weight_grad_product(grad, hidden, total, add, threads);
    }, py::arg("grad"), py::arg("hidden"), py::arg("total"), py::arg("add"), py::arg("threads"), "total (+)= gradᵀ · hidden.");
}

// ---- buffers ----------------------------------------------------------------------------------------------------------

void bind_buffers(py::module_& m) {
    m.def("buffer", [](std::int64_t bytes) {
        if (bytes < 1) throw std::invalid_argument("buffer: bytes must be positive");
        void* const memory = pocl::take_buffer(bytes);
        if (memory == nullptr) throw std::bad_alloc();
        return py::array_t<std::uint8_t>(bytes, static_cast<std::uint8_t*>(memory), py::capsule(memory, pocl::give_back_buffer));
    }, py::arg("bytes"), "Memory for a large tensor, kept for the next one when the last reference to it is gone.");
    m.def("release_buffers", &pocl::release_buffers, "Gives kept memory back to the system; how many bytes that were.");
}

// ---- ranking ----------------------------------------------------------------------------------------------------------

/// The threads asked for, or one for each processor that this process may use.
int team_size(std::optional<int> threads) {
    if (threads && *threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(*threads));
    if (threads) return *threads;
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
    return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

/// Fused scores, ranks and order, as three NumPy arrays.
py::tuple rank_fusion(const std::vector<std::variant<Array<float>, Array<double>>>& scores, const std::vector<bool>& descending,
                      const std::vector<double>& weights, double k, std::optional<int> threads) {
    if (scores.empty() || descending.size() != scores.size() || weights.size() != scores.size())
        throw std::invalid_argument("rank_fusion: one direction and one weight are needed for each array of scores");
    const py::ssize_t n = std::visit([](const auto& array) { return array.size(); }, scores.front());
    std::vector<pocl::Ranking> rankings;
    for (std::size_t i = 0; i < scores.size(); ++i) {
        std::visit(
            [&](const auto& array) {
                if (array.ndim() != 1 || array.size() != n) throw std::invalid_argument("rank_fusion: arrays must be 1-D and of one length");
                rankings.push_back({view(array), descending[i] ? pocl::Order::descending : pocl::Order::ascending, weights[i]});
            },
            scores[i]);
    }
    if (n > pocl::kMostSamples) throw std::invalid_argument("rank_fusion: at most 2**32 samples");
    py::array_t<double> score(n);
    py::array_t<std::int64_t> rank(n), order(n);
    py::array_t<std::uint32_t> scratch(2 * n);  // NumPy's memory: large arrays are in huge pages
    const auto size = static_cast<std::size_t>(n);
    const pocl::Fusion fusion{{score.mutable_data(), size}, {rank.mutable_data(), size}, {order.mutable_data(), size}};
    const std::span<std::uint32_t> places(scratch.mutable_data(), 2 * size);
    const int team = team_size(threads);
    {
        py::gil_scoped_release release;
        pocl::fuse(rankings, k, fusion, places, team);
    }
    return py::make_tuple(score, rank, order);
}

void bind_ranking(py::module_& m) {
    m.def("rank_fusion", &rank_fusion, py::arg("scores"), py::arg("descending"), py::arg("weights"), py::arg("k"),
          py::arg("threads"), "Reciprocal rank fusion; see csrc/ranking/rank.h.");
}

// ---- rouge ------------------------------------------------------------------------------------------------------------

/// Words of the texts. The list keeps them alive, and a string never changes, so they are read without the GIL.
pocl::Tokens tokenize(const py::list& texts, std::optional<int> threads) {
    std::vector<pocl::CodePoints> views;
    views.reserve(texts.size());
    for (const py::handle text : texts) {
        // the length first: it makes a string of Python 3.11 or older lay out its characters
        const Py_ssize_t size = PyUnicode_GetLength(text.ptr());
        if (size < 0) throw py::error_already_set();
        views.push_back({PyUnicode_DATA(text.ptr()), size, static_cast<int>(PyUnicode_KIND(text.ptr()))});
    }
    const int team = team_size(threads);
    py::gil_scoped_release release;
    return pocl::tokenize(views, team);
}

/// Precision, recall and F of each prediction: [3, predictions] float64.
py::array_t<double> rouge_l(const pocl::Tokens& tokens, const Array<std::int32_t>& forms,
                            const Array<std::int64_t>& first_reference, std::optional<int> threads) {
    const auto form_of = view(forms);
    const auto first = view(first_reference);
    const std::size_t num_texts = tokens.offsets.size() - 1;
    const auto words = static_cast<std::int32_t>(tokens.words.size());
    if (form_of.size() != tokens.words.size() || std::ranges::any_of(form_of, [&](auto form) { return form >= words; }))
        throw std::invalid_argument("rouge_l: each word needs a form, and there cannot be more forms than words");
    const bool covered = !first.empty() && first.front() == 0 && std::ranges::adjacent_find(first, std::greater_equal{}) == first.end() &&
                         first.size() - 1 + static_cast<std::size_t>(first.back()) == num_texts;
    if (!covered) throw std::invalid_argument("rouge_l: each prediction needs a range of references, and all of them all references");
    const std::size_t count = first.size() - 1;
    py::array_t<double> scores({std::size_t{3}, count});
    double* const data = scores.mutable_data();
    const pocl::RougeL out{{data, count}, {data + count, count}, {data + 2 * count, count}};
    const int team = team_size(threads);
    {
        py::gil_scoped_release release;
        pocl::rouge_l(pocl::with_forms(tokens, form_of), words, first, out, team);
    }
    return scores;
}

void bind_rouge(py::module_& m) {
    py::class_<pocl::Tokens>(m, "Tokens", "Texts as word ids; see csrc/rouge/words.h.")
        .def_readonly("words", &pocl::Tokens::words, "The distinct words; a word's place is its id.")
        .def("__len__", [](const pocl::Tokens& tokens) { return tokens.offsets.size() - 1; });
    m.def("tokenize", &tokenize, py::arg("texts"), py::arg("threads"), "Cuts texts into rouge-score's words.");
    m.def("rouge_l", &rouge_l, py::arg("tokens"), py::arg("forms"), py::arg("first_reference"), py::arg("threads"),
          "ROUGE-L of predictions, the first texts of `tokens`, against references, the others; see csrc/rouge/rouge.h.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The C++ part of pocl_fast: the fused CPU loss, rank fusion and ROUGE-L.";
    bind_divergence(m);
    bind_products(m);
    bind_buffers(m);
    bind_ranking(m);
    bind_rouge(m);
}
