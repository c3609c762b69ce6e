// gcl_kernels._cpu: the module, and the functions over samples. Addresses and sizes in, no tensors:
// it links no PyTorch and serves every version of it.

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "passes.hpp"

namespace gcl {

// Samples in `threads` ranges: no sample's result depends on another.
template <class F>
static void for_samples(int64_t samples, int64_t elements, int threads, const F& body) {
  py::gil_scoped_release release;
  const int64_t parts = elements < parallel_copies ? 1 : threads;
  for_each_strip(parts, threads, parts > 1, [&](int64_t part) {
    body(samples * part / parts, samples * (part + 1) / parts);
  });
}

template <class T>
static void embed(int threads, const std::vector<Address>& views,
                  const std::vector<int64_t>& pitches, int64_t samples, int64_t dim,
                  bool normalize, double eps, const std::vector<int64_t>& pairs, double scale,
                  double absent, Address z, Address norm, Address inverse, Address own,
                  Address own_logits) {
  Embedding<T> s{};
  s.scale = T(scale), s.absent = T(absent), s.own_logits = at<T>(own_logits);
  s.views = int(views.size());
  s.samples = samples, s.dim = dim, s.normalize = normalize, s.eps = T(eps);
  for (int v = 0; v < s.views; ++v) s.e[v] = at<T>(views[v]), s.pitch[v] = pitches[v];
  for (size_t i = 0; i + 1 < pairs.size(); i += 2) s.pairs[pairs[i] * s.views + pairs[i + 1]] = true;
  s.z = at<T>(z), s.norm = at<T>(norm), s.inverse = at<T>(inverse), s.own = at<T>(own);
  for_samples(samples, s.views * samples * dim, threads,
              [&](int64_t start, int64_t stop) { kernels<T>().embed(s, start, stop); });
}

template <class T>
static void embed_backward(int threads, int64_t samples, int64_t dim, bool normalize, double eps,
                           double scale, Address z, Address norm, Address inverse, Address own,
                           Address hz, Address grad_own_logits,
                           const std::vector<Address>& grads, Address grad_scale) {
  EmbeddingGradient<T> s{};
  s.views = int(grads.size());
  s.samples = samples, s.dim = dim, s.normalize = normalize, s.eps = T(eps), s.scale = T(scale);
  s.z = at<T>(z), s.norm = at<T>(norm), s.inverse = at<T>(inverse), s.own = at<T>(own);
  s.hz = at<T>(hz), s.grad_own_logits = at<T>(grad_own_logits);
  s.grad_scale = at<T>(grad_scale);
  for (int v = 0; v < s.views; ++v) s.grad[v] = at<T>(grads[v]);
  for_samples(samples, s.views * samples * dim, threads,
              [&](int64_t start, int64_t stop) { kernels<T>().embed_backward(s, start, stop); });
}

template <class T>
static void embed_fused(int threads, const std::vector<Address>& views,
                        const std::vector<int64_t>& pitches, int64_t samples, int64_t dim,
                        const std::vector<int>& bases, const std::vector<int64_t>& pairs,
                        Address mixing, bool normalize, double eps, double scale, double absent,
                        Address z, Address inverse, Address lengths, Address coefficients,
                        Address dots, Address own_logits) {
  FusedEmbedding<T> s{};
  s.views = int(bases.size());
  s.samples = samples, s.dim = dim, s.normalize = normalize, s.eps = T(eps);
  for (int b = 0; b < 2; ++b) s.e[b] = at<T>(views[b]), s.pitch[b] = pitches[b];
  s.scale = T(scale), s.absent = T(absent), s.own_logits = at<T>(own_logits);
  std::copy(bases.begin(), bases.end(), s.bases);
  for (size_t i = 0; i + 1 < pairs.size(); i += 2) {
    s.pairs[pairs[i] * s.views + pairs[i + 1]] = true;
    s.self |= pairs[i] == pairs[i + 1];
  }
  s.mixing = at<T>(mixing), s.z = at<T>(z), s.inverse = at<T>(inverse);
  s.lengths = at<T>(lengths), s.coefficients = at<T>(coefficients), s.dots = at<T>(dots);
  for_samples(samples, 2 * samples * dim, threads,
              [&](int64_t start, int64_t stop) { kernels<T>().embed_fused(s, start, stop); });
}

template <class T>
static void fused_gradients(int threads, int64_t samples, int64_t dim,
                            const std::vector<int>& bases, bool self, bool normalize, double eps,
                            double scale, Address z, Address inverse, Address lengths,
                            Address coefficients, Address dots, Address r, Address inner,
                            Address grad_own_logits, const std::vector<Address>& grads,
                            Address shares) {
  FusedGradient<T> s{};
  s.views = int(bases.size());
  s.samples = samples, s.dim = dim, s.scale = T(scale), s.eps = T(eps);
  s.self = self, s.normalize = normalize;
  std::copy(bases.begin(), bases.end(), s.bases);
  s.z = at<T>(z), s.r = at<T>(r), s.inverse = at<T>(inverse), s.lengths = at<T>(lengths);
  s.coefficients = at<T>(coefficients), s.dots = at<T>(dots), s.inner = at<T>(inner);
  s.grad_own_logits = at<T>(grad_own_logits), s.shares = at<T>(shares);
  for (int b = 0; b < 2; ++b) s.grad[b] = at<T>(grads[b]);
  for_samples(samples, 2 * samples * dim, threads,
              [&](int64_t start, int64_t stop) { kernels<T>().fused_gradients(s, start, stop); });
}

static const std::pair<const char*, Isa> instruction_sets[] = {
    {"baseline", Isa::baseline}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}};

static const std::pair<const char*, Products> products[] = {
    {"own", Products::own}, {"blas", Products::blas}, {"pytorch", Products::pytorch}};

static bool supported(Products chosen) {
  return chosen != Products::blas || (gemm<float> && gemm<double>);
}

// Binds `supported`, `in_use` and `use` of one table of choices. To choose is for tests and
// comparisons: every later call takes what was chosen.
template <class Choice, size_t count>
static void bind_choice(py::module_& m, const std::string& what,
                        const std::pair<const char*, Choice> (&table)[count],
                        const std::string& plural, Choice (*in_use)(), void (*use)(Choice)) {
  m.def(("supported_" + plural).c_str(), [&table] {
    std::vector<std::string> names;
    for (const auto& [name, choice] : table)
      if (supported(choice)) names.push_back(name);
    return names;
  });
  m.def(what.c_str(), [&table, in_use] {
    for (const auto& [name, choice] : table)
      if (choice == in_use()) return name;
    throw std::logic_error("a choice without a name");
  });
  m.def(("use_" + what).c_str(), [&table, what, use](const std::string& chosen) {
    for (const auto& [name, choice] : table)
      if (name == chosen && supported(choice)) return use(choice);
    throw std::invalid_argument(what + ": not supported here: " + chosen);
  });
}

}  // namespace gcl

PYBIND11_MODULE(_cpu, m) {
  using namespace gcl;
  m.doc() = "Products and epilogues of the tiles on a CPU; see gcl_kernels/backends/cpu.py.";
  bind_choice(m, "instruction_set", instruction_sets, "instruction_sets", isa_in_use, use_isa);
  bind_choice<Products>(
      m, "products", products, "products", [] { return products_in_use; },
      [](Products chosen) { products_in_use = chosen; });
  // Addresses of sgemm_ and dgemm_, from then on in use unless the own product is.
  m.def("set_blas", [](Address single, Address twice) {
    gemm<float> = reinterpret_cast<Gemm<float>>(single);
    gemm<double> = reinterpret_cast<Gemm<double>>(twice);
    if (products_in_use == Products::pytorch) products_in_use = Products::blas;
  });
  m.attr("max_views") = max_views;
  py::class_<BlockPlace>(m, "BlockPlace")
      .def(py::init([](int64_t row_start, int64_t rows, int64_t col_start, int64_t cols,
                       bool serves_rows, bool serves_cols, bool diagonal,
                       std::vector<int64_t> offsets) {
        return BlockPlace{row_start,   rows,     col_start,         cols, serves_rows,
                          serves_cols, diagonal, std::move(offsets)};
      }));
  const auto both = [&m](const char* name, auto single, auto twice) {
    m.def((std::string(name) + "_float32").c_str(), single);
    m.def((std::string(name) + "_float64").c_str(), twice);
  };
  both("product", product<float>, product<double>);
  both("block_stats", block_stats<float>, block_stats<double>);
  both("block_weights", block_weights<float>, block_weights<double>);
  both("statistics", statistics<float>, statistics<double>);
  both("matrix_gradient", matrix_gradient<float>, matrix_gradient<double>);
  both("embed", embed<float>, embed<double>);
  both("embed_backward", embed_backward<float>, embed_backward<double>);
  both("embed_fused", embed_fused<float>, embed_fused<double>);
  both("fused_gradients", fused_gradients<float>, fused_gradients<double>);
  both("fused_block_stats", fused_block_stats<float>, fused_block_stats<double>);
  both("fused_block_weights", fused_block_weights<float>, fused_block_weights<double>);
  both("fused_statistics", fused_statistics<float>, fused_statistics<double>);
  both("fused_matrix_gradient", fused_matrix_gradient<float>, fused_matrix_gradient<double>);
}
