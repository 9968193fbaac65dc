#include "bindings/arrays.h"
#include "bindings/bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <stdexcept>
#include <vector>

#include "rouge/rouge.h"
#include "rouge/words.h"

namespace py = pybind11;

namespace {

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

}  // namespace

void bind_rouge(py::module_& m) {
    py::class_<pocl::Tokens>(m, "Tokens", "Texts as word ids; see csrc/rouge/words.h.")
        .def_readonly("words", &pocl::Tokens::words, "The distinct words; a word's place is its id.")
        .def("__len__", [](const pocl::Tokens& tokens) { return tokens.offsets.size() - 1; });
    m.def("tokenize", &tokenize, py::arg("texts"), py::arg("threads"), "Cuts texts into rouge-score's words.");
    m.def("rouge_l", &rouge_l, py::arg("tokens"), py::arg("forms"), py::arg("first_reference"), py::arg("threads"),
          "ROUGE-L of predictions, the first texts of `tokens`, against references, the others; see csrc/rouge/rouge.h.");
}
