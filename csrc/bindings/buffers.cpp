#include "bindings/bindings.h"

#include <pybind11/numpy.h>

#include <cstdint>
#include <new>
#include <stdexcept>

#include "buffers/buffers.h"

namespace py = pybind11;

void bind_buffers(py::module_& m) {
    m.def("buffer", [](std::int64_t bytes) {
        if (bytes < 1) throw std::invalid_argument("buffer: bytes must be positive");
        void* const memory = pocl::take_buffer(bytes);
        if (memory == nullptr) throw std::bad_alloc();
        return py::array_t<std::uint8_t>(bytes, static_cast<std::uint8_t*>(memory), py::capsule(memory, pocl::give_back_buffer));
    }, py::arg("bytes"), "Memory for a large tensor, kept for the next one when the last reference to it is gone.");
    m.def("release_buffers", &pocl::release_buffers, "Gives kept memory back to the system; how many bytes that were.");
}
