// gcl_kernels._cpu: the module, and the functions over samples. Addresses and sizes in, no tensors:
// it links no PyTorch and serves every version of it.

#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "passes.hpp"

namespace gcl {

// What both functions over samples are given, as problem.py's Embedded lies in memory.
struct Embedded {
  int threads;
  const Views* views;
  int bases;
  int64_t samples, dim;
  bool normalize;
  double eps, scale;
  Address z, inverse, lengths, coefficients, dots;

  template <class T>
  Samples<T> as() const {
    return {views,    bases,          samples,        dim,
            normalize, T(eps),        T(scale),       at<T>(z),
            at<T>(inverse), at<T>(lengths), at<T>(coefficients), at<T>(dots)};
  }
};

// Samples in ranges, one a thread: no sample's result depends on another.
template <class F>
static void for_samples(const Embedded& s, const F& body) {
  py::gil_scoped_release release;
  const int64_t parts = s.bases * s.samples * s.dim < parallel_copies ? 1 : s.threads;
  for_each_strip(parts, s.threads, parts > 1, [&](int64_t part) {
    body(s.samples * part / parts, s.samples * (part + 1) / parts);
  });
}

// Mixing: 0 where each view is its own base.
template <class T>
static void embed(const Embedded& embedded, const std::vector<Address>& bases,
                  const std::vector<int64_t>& pitches, Address mixing, double absent,
                  Address own_logits) {
  Embedding<T> s{};
  s.of = embedded.as<T>();
  for (size_t b = 0; b < bases.size(); ++b) s.e[b] = at<T>(bases[b]), s.pitch[b] = pitches[b];
  s.mixing = at<T>(mixing), s.absent = T(absent), s.own_logits = at<T>(own_logits);
  for_samples(embedded, [&](int64_t start, int64_t stop) { kernels<T>().embed(s, start, stop); });
}

// By halves: the error does not grow with the number of terms.
template <class T>
static T sum(const T* terms, int64_t count) {
  if (count <= 64) return std::accumulate(terms, terms + count, T(0));
  return sum(terms, count / 2) + sum(terms + count / 2, count - count / 2);
}

// Inner, grad_mixing: 0 where each view is its own base; a base's gradient: 0 where not needed.
template <class T>
static void gradients(const Embedded& embedded, Address sums, Address inner,
                      Address grad_own_logits, const std::vector<Address>& grads,
                      Address grad_mixing, Address grad_scale) {
  const int64_t views = embedded.views->count, samples = embedded.samples;
  std::vector<T> shares((2 * views + 1) * samples);
  EmbeddingGradient<T> s{};
  s.of = embedded.as<T>();
  s.sums = at<T>(sums), s.inner = at<T>(inner), s.grad_own_logits = at<T>(grad_own_logits);
  for (size_t b = 0; b < grads.size(); ++b) s.grad[b] = at<T>(grads[b]);
  s.shares = shares.data();
  for_samples(embedded,
              [&](int64_t start, int64_t stop) { kernels<T>().gradients(s, start, stop); });
  const auto total = [&](int64_t row) { return sum(shares.data() + row * samples, samples); };
  for (int64_t row = 0; grad_mixing && row < 2 * views; ++row) at<T>(grad_mixing)[row] = total(row);
  *at<T>(grad_scale) = total(2 * views);
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

static Views make_views(const std::vector<int>& bases,
                        const std::vector<std::pair<int, int>>& pairs) {
  if (bases.size() > size_t(max_views))
    throw std::invalid_argument("expected at most " + std::to_string(max_views) + " views, got " +
                                std::to_string(bases.size()));
  Views views;
  views.count = int(bases.size());
  std::copy(bases.begin(), bases.end(), views.bases);
  for (const auto& [v, w] : pairs) {
    views.pairs[v * views.count + w] = true;
    views.pairs_itself |= v == w;
  }
  return views;
}

}  // namespace gcl

// A struct that is given as the tuple of its members.
template <class Struct, class... Members>
struct from_tuple {
  PYBIND11_TYPE_CASTER(Struct, pybind11::detail::const_name("tuple"));

  bool load(pybind11::handle source, bool convert) {
    using Tuple = std::tuple<Members...>;
    pybind11::detail::make_caster<Tuple> members;
    if (!members.load(source, convert)) return false;
    value = std::apply([](auto... member) { return Struct{member...}; },
                       pybind11::detail::cast_op<Tuple>(std::move(members)));
    return true;
  }
};

namespace pybind11::detail {
using gcl::Address, gcl::Views;
template <>
struct type_caster<gcl::Problem>
    : from_tuple<gcl::Problem, int, double, bool, Address, Address, Address, int64_t, int64_t,
                 int64_t, const Views*, Address, Address> {};
template <>
struct type_caster<gcl::Embedded>
    : from_tuple<gcl::Embedded, int, const Views*, int, int64_t, int64_t, bool, double, double,
                 Address, Address, Address, Address, Address> {};
}  // namespace pybind11::detail

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
  py::class_<Views>(m, "Views").def(py::init(&make_views));
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
  both("gradients", gradients<float>, gradients<double>);
}
