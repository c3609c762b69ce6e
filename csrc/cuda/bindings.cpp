// gcl_kernels._cuda: the launchers for Python. Pointers and streams are integers; errors of CUDA
// become RuntimeErrors with CUDA's text. Arguments are keywords only, so that none is mistaken for
// another. Nothing here or below knows PyTorch.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/block.h"

#ifndef GCL_KERNELS_CUDA_ARCHS
#error "GCL_KERNELS_CUDA_ARCHS names the compiled targets, such as \"80;90+PTX\""
#endif

namespace py = pybind11;
using namespace gcl;
using py::arg;
using Address = uintptr_t;

namespace {

template <class TYPE>
TYPE* pointer(Address address) {
  return reinterpret_cast<TYPE*>(address);
}

void check(int error, const std::string& what) {
  if (error != 0) throw std::runtime_error(what + ": " + error_text(error));
}

void select(int device) {
  check(use_device(device), "cannot use CUDA device " + std::to_string(device));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA C++ kernels: see gcl_kernels/backends/cuda.py";
  m.attr("compiled_archs") = GCL_KERNELS_CUDA_ARCHS;
  m.attr("device_type") = DEVICE_TYPE;
  m.attr("TILE") = TILE;

  m.def("device_count", [] {
    int count = 0;
    return device_count(&count) == 0 ? count : 0;
  });
  m.def("why_no_device", [] {
    int count = 0;
    const int error = device_count(&count);
    return std::string(error != 0 ? error_text(error) : count == 0 ? "no CUDA device" : "");
  });

  py::enum_<Product>(m, "Product")
      .value("float32", Product::float32)
      .value("tf32", Product::tf32)
      .value("bfloat16", Product::bfloat16)
      .value("float16", Product::float16);

  py::class_<Side>(m, "Side")
      .def(py::init([](Address z, Address ids, Address log_weights, Address limits, int length) {
             return Side{pointer<void>(z), pointer<int64_t>(ids), pointer<float>(log_weights),
                         pointer<float>(limits), length};
           }),
           py::kw_only(), arg("z"), arg("ids"), arg("log_weights"), arg("limits"), arg("length"));

  py::class_<Block>(m, "Block")
      .def(py::init([](Side rows, Side cols, Address scale, int dim, int id_offset, int id_period,
                       bool unit_rows, bool diagonal, bool serves_rows, bool serves_cols) {
             return Block{rows,      cols,      pointer<float>(scale), dim, id_offset, id_period,
                          unit_rows, diagonal, serves_rows,           serves_cols};
           }),
           py::kw_only(), arg("rows"), arg("cols"), arg("scale"), arg("dim"), arg("id_offset"),
           arg("id_period"), arg("unit_rows"), arg("diagonal"), arg("serves_rows"),
           arg("serves_cols"));

  py::class_<Lines>(m, "Lines")
      .def(py::init([](Address lse, Address grad) {
             return Lines{pointer<float>(lse), pointer<float>(grad)};
           }),
           py::kw_only(), arg("lse"), arg("grad"));

  py::class_<Fold>(m, "Fold")
      .def(py::init([](Address table, int slots, int length, Address max, Address sum) {
             return Fold{pointer<float>(table), slots, length, pointer<float>(max),
                         pointer<float>(sum)};
           }),
           py::kw_only(), arg("table"), arg("slots"), arg("length"), arg("max"), arg("sum"));

  m.def(
      "block_stats",
      [](int device, Address stream, Product product, const Block& block, Address row_table,
         Address col_table) {
        select(device);
        check(block_stats(product, block, pointer<float>(row_table), pointer<float>(col_table),
                          pointer<void>(stream)),
              "block_stats");
      },
      py::kw_only(), arg("device"), arg("stream"), arg("product"), arg("block"), arg("row_table"),
      arg("col_table"));

  m.def(
      "block_weights",
      [](int device, Address stream, Product product, const Block& block, Lines rows, Lines cols,
         Address out, int64_t pitch) {
        select(device);
        check(block_weights(product, block, rows, cols, pointer<void>(out), pitch,
                            pointer<void>(stream)),
              "block_weights");
      },
      py::kw_only(), arg("device"), arg("stream"), arg("product"), arg("block"), arg("rows"),
      arg("cols"), arg("out"), arg("pitch"));

  m.def(
      "fold",
      [](int device, Address stream, const Fold& rows, const Fold& cols) {
        select(device);
        check(fold(rows, cols, pointer<void>(stream)), "fold");
      },
      py::kw_only(), arg("device"), arg("stream"), arg("rows"), arg("cols"));
}
