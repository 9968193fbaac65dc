#include "bindings/arrays.h"
#include "bindings/bindings.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <variant>
#include <vector>

#include "ranking/rank.h"

namespace py = pybind11;

namespace {

/// Fused scores, ranks and order, as three NumPy arrays.
py::tuple rank_fusion(const std::vector<std::variant<Array<float>, Array<double>>>& scores, const std::vector<bool>& descending,
                      const std::vector<double>& weights, double k, bool average_ties, std::optional<int> threads) {
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
        pocl::fuse(rankings, k, average_ties ? pocl::Ties::average : pocl::Ties::first, fusion, places, team);
    }
    return py::make_tuple(score, rank, order);
}

}  // namespace

void bind_ranking(py::module_& m) {
    m.def("rank_fusion", &rank_fusion, py::arg("scores"), py::arg("descending"), py::arg("weights"), py::arg("k"),
          py::arg("average_ties"), py::arg("threads"), "Reciprocal rank fusion; see csrc/ranking/rank.h.");
}
