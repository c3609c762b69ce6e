// gcl_kernels._cpu: the module, and the functions over samples. Addresses and sizes in, no tensors:
// it links no PyTorch and serves every version of it.

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "loss.hpp"

namespace gcl {

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

static Terms make_terms(const std::vector<std::vector<double>>& weights,
                        const std::vector<std::vector<bool>>& candidates, bool keeps_self,
                        bool compete) {
  Terms terms;
  for (const auto& row : weights) terms.weights.insert(terms.weights.end(), row.begin(), row.end());
  for (size_t a = 0; a < candidates.size(); ++a)
    for (size_t b = 0; b < candidates.size(); ++b)
      terms.inside.push_back(candidates[a][b] && (a != b || keeps_self));
  terms.views = int(weights.size()), terms.keeps_self = keeps_self, terms.compete = compete;
  return terms;
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
                 int64_t, const Views*, Address, Address, Address, Address, Address, Address> {};
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
  py::class_<Terms>(m, "Terms").def(py::init(&make_terms));
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
  both("loss", loss<float>, loss<double>);
}
