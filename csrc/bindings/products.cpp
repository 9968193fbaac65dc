#include "bindings/bindings.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "products/products.h"

namespace py = pybind11;

namespace {

bool packable(const pocl::Matrix& x) { return x.dtype == pocl::DType::float32 || x.dtype == pocl::DType::bfloat16; }

void check_product(const char* name, const pocl::Matrix& a, const pocl::Matrix& b, const pocl::Matrix& out, bool fits) {
    if (!pocl::has_products()) throw std::runtime_error(std::string(name) + ": has_products() is false here");
    if (!fits || !packable(a) || !packable(b) || out.dtype != pocl::DType::float32)
        throw std::invalid_argument(std::string(name) + ": the arguments' shapes do not fit, or one is not fp32 or bf16");
}

}  // namespace

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
