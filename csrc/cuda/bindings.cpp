// gcl_kernels._cuda: the launchers for Python. Pointers and streams are integers; errors of CUDA
// become RuntimeErrors with CUDA's text. Arguments are keywords only, so that none is mistaken for
// another. Nothing here or below knows PyTorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/block.h"
#include "cuda/samples.h"

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

// Of each view one; more than there is room for is refused.
template <class TO, class FROM, class CONVERT>
void fill(TO (&to)[MAX_VIEWS], const std::vector<FROM>& from, CONVERT convert) {
  if (from.size() > MAX_VIEWS)
    throw std::invalid_argument("at most " + std::to_string(MAX_VIEWS) + " views, got " +
                                std::to_string(from.size()));
  for (std::size_t v = 0; v < from.size(); ++v) to[v] = convert(from[v]);
}

Gradients gradients(const std::vector<Address>& addresses) {
  Gradients grads{};
  fill(grads.at, addresses, pointer<void>);
  return grads;
}

// Bit a * views + b of each pair.
uint64_t bits_of(const std::vector<std::pair<int, int>>& pairs, int views) {
  uint64_t bits = 0;
  for (const auto& [a, b] : pairs) bits |= uint64_t(1) << (a * views + b);
  return bits;
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
  m.attr("FUSED_TILE") = FUSED_TILE;
  m.attr("MAX_VIEWS") = MAX_VIEWS;

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
      .def(py::init([](Address z, int64_t base_stride, Address ids, int length) {
             return Side{pointer<void>(z), base_stride, pointer<int64_t>(ids), length};
           }),
           py::kw_only(), arg("z"), arg("base_stride"), arg("ids"), arg("length"));

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

  py::class_<Output>(m, "Output")
      .def(py::init([](Address at, int64_t pitch, int64_t plane) {
             return Output{pointer<void>(at), pitch, plane};
           }),
           py::kw_only(), arg("at"), arg("pitch"), arg("plane"));

  py::class_<Views>(m, "Views")
      .def(py::init([](int count, uint64_t candidates, Address row_coefficients,
                       Address col_coefficients, int64_t row_samples, int64_t col_samples) {
             if (count < 1 || count > MAX_VIEWS)
               throw std::invalid_argument("Views: 1 to " + std::to_string(MAX_VIEWS) +
                                           " views, got " + std::to_string(count));
             return Views{count,       candidates, pointer<float>(row_coefficients),
                          pointer<float>(col_coefficients), row_samples, col_samples};
           }),
           py::kw_only(), arg("count"), arg("candidates"), arg("row_coefficients"),
           arg("col_coefficients"), arg("row_samples"), arg("col_samples"));

  py::class_<Fold>(m, "Fold")
      .def(py::init([](Address table, int slots, int length, int groups, int64_t stride,
                       Address max, Address sum) {
             return Fold{pointer<float>(table), slots, length, groups, stride,
                         pointer<float>(max),   pointer<float>(sum)};
           }),
           py::kw_only(), arg("table"), arg("slots"), arg("length"), arg("groups"), arg("stride"),
           arg("max"), arg("sum"));

  py::class_<Embeddings>(m, "Embeddings")
      .def(py::init([](const std::vector<Address>& at, const std::vector<int64_t>& stride,
                       int64_t samples, int dim) {
             Embeddings views{};
             fill(views.at, at, pointer<const void>);
             fill(views.stride, stride, [](int64_t elements) { return elements; });
             views.count = static_cast<int>(at.size());
             views.samples = samples;
             views.dim = dim;
             return views;
           }),
           py::kw_only(), arg("at"), arg("stride"), arg("samples"), arg("dim"));

  py::class_<Mixture>(m, "Mixture")
      .def(py::init([](const std::vector<int>& base_of, bool normalize, bool self, Address inverse,
                       Address lengths, Address coefficients, Address dots) {
             Mixture mixture{};
             fill(mixture.base_of, base_of, [](int base) { return base; });
             mixture.views = static_cast<int>(base_of.size());
             mixture.normalize = normalize;
             mixture.self = self;
             mixture.inverse = pointer<float>(inverse);
             mixture.lengths = pointer<float>(lengths);
             mixture.coefficients = pointer<float>(coefficients);
             mixture.dots = pointer<float>(dots);
             return mixture;
           }),
           py::kw_only(), arg("base_of"), arg("normalize"), arg("self"), arg("inverse"),
           arg("lengths"), arg("coefficients"), arg("dots"));

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
         Output out) {
        select(device);
        check(block_weights(product, block, rows, cols, out, pointer<void>(stream)),
              "block_weights");
      },
      py::kw_only(), arg("device"), arg("stream"), arg("product"), arg("block"), arg("rows"),
      arg("cols"), arg("out"));

  m.def(
      "fused_block_stats",
      [](int device, Address stream, Product product, const Block& block, const Views& views,
         Address row_table, Address col_table) {
        select(device);
        check(fused_block_stats(product, block, views, pointer<float>(row_table),
                                pointer<float>(col_table), pointer<void>(stream)),
              "fused_block_stats");
      },
      py::kw_only(), arg("device"), arg("stream"), arg("product"), arg("block"), arg("views"),
      arg("row_table"), arg("col_table"));

  m.def(
      "fused_block_weights",
      [](int device, Address stream, Product product, const Block& block, const Views& views,
         Lines rows, Lines cols, Output out, Address row_table, Address col_table) {
        select(device);
        check(fused_block_weights(product, block, views, rows, cols, out, pointer<float>(row_table),
                                  pointer<float>(col_table), pointer<void>(stream)),
              "fused_block_weights");
      },
      py::kw_only(), arg("device"), arg("stream"), arg("product"), arg("block"), arg("views"),
      arg("rows"), arg("cols"), arg("out"), arg("row_table"), arg("col_table"));

  m.def(
      "embed",
      [](int device, Address stream, Product product, const Embeddings& views, bool normalize,
         const std::vector<std::pair<int, int>>& pairs, Address scale, float absent, Address z,
         Address norm, Address inverse, Address own, Address own_logits) {
        const Embed arguments = {views,
                                 normalize,
                                 bits_of(pairs, views.count),
                                 pointer<float>(scale),
                                 absent,
                                 pointer<void>(z),
                                 pointer<float>(norm),
                                 pointer<float>(inverse),
                                 pointer<float>(own),
                                 pointer<float>(own_logits)};
        select(device);
        check(embed(product, arguments, pointer<void>(stream)), "embed");
      },
      py::kw_only(), arg("device"), arg("stream"), arg("product"), arg("views"), arg("normalize"),
      arg("pairs"), arg("scale"), arg("absent"), arg("z"), arg("norm"), arg("inverse"), arg("own"),
      arg("own_logits"));

  m.def(
      "embed_backward",
      [](int device, Address stream, Product product, const Embeddings& units, bool normalize,
         bool rounded, Address norm, Address inverse, Address own, Address hz,
         Address grad_own_logits, Address scale, const std::vector<Address>& grads,
         Address shares) {
        const EmbedBackward arguments = {units,
                                         normalize,
                                         rounded,
                                         pointer<float>(norm),
                                         pointer<float>(inverse),
                                         pointer<float>(own),
                                         pointer<float>(hz),
                                         pointer<float>(grad_own_logits),
                                         pointer<float>(scale),
                                         gradients(grads),
                                         pointer<float>(shares)};
        select(device);
        check(embed_backward(product, arguments, pointer<void>(stream)), "embed_backward");
      },
      py::kw_only(), arg("device"), arg("stream"), arg("product"), arg("units"), arg("normalize"),
      arg("rounded"), arg("norm"), arg("inverse"), arg("own"), arg("hz"), arg("grad_own_logits"),
      arg("scale"), arg("grads"), arg("shares"));

  m.def(
      "embed_fused",
      [](int device, Address stream, Product product, const Embeddings& bases,
         const Mixture& mixture, const std::vector<std::pair<int, int>>& pairs, Address scale,
         float absent, Address mixing, Address z, Address own_logits) {
        const EmbedFused arguments = {bases,
                                      mixture,
                                      bits_of(pairs, mixture.views),
                                      pointer<float>(scale),
                                      absent,
                                      pointer<float>(mixing),
                                      pointer<void>(z),
                                      pointer<float>(own_logits)};
        select(device);
        check(embed_fused(product, arguments, pointer<void>(stream)), "embed_fused");
      },
      py::kw_only(), arg("device"), arg("stream"), arg("product"), arg("bases"), arg("mixture"),
      arg("pairs"), arg("scale"), arg("absent"), arg("mixing"), arg("z"), arg("own_logits"));

  m.def(
      "fused_gradients",
      [](int device, Address stream, Product product, const Embeddings& units,
         const Mixture& mixture, bool rounded, Address r, Address inner, Address grad_own_logits,
         Address scale, const std::vector<Address>& grads, Address shares) {
        const FusedGradients arguments = {units,
                                          mixture,
                                          rounded,
                                          pointer<float>(r),
                                          pointer<float>(inner),
                                          pointer<float>(grad_own_logits),
                                          pointer<float>(scale),
                                          gradients(grads),
                                          pointer<float>(shares)};
        select(device);
        check(fused_gradients(product, arguments, pointer<void>(stream)), "fused_gradients");
      },
      py::kw_only(), arg("device"), arg("stream"), arg("product"), arg("units"), arg("mixture"),
      arg("rounded"), arg("r"), arg("inner"), arg("grad_own_logits"), arg("scale"), arg("grads"),
      arg("shares"));

  m.def(
      "fold",
      [](int device, Address stream, const Fold& rows, const Fold& cols) {
        select(device);
        check(fold(rows, cols, pointer<void>(stream)), "fold");
      },
      py::kw_only(), arg("device"), arg("stream"), arg("rows"), arg("cols"));
}
