// NumPy arrays as the rooms take them, and the number of threads.
#pragma once
#include <pybind11/numpy.h>

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>

template <class T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

template <class T>
std::span<const T> view(const Array<T>& array) {
    return {array.data(), static_cast<std::size_t>(array.size())};
}

/// The threads asked for, or one for each processor that this process may use.
inline int team_size(std::optional<int> threads) {
    if (threads && *threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(*threads));
    if (threads) return *threads;
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
    return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}
