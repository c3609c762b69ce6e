// Folds the slots of the tables into running values, always in the same order:
//
//     M' = max(M, max_t m_t)        L' = L exp(M - M') + sum_t l_t exp(m_t - M')
//
// or, where there is no maximum, S' = S + sum_t s_t. A program folds FOLD_LINES lines (a cache line
// of each slot); its threads share the slots of a line.
#include "cuda/epilogue.cuh"

namespace gcl {
namespace {

constexpr int FOLD_LINES = 32;
constexpr int FOLD_PARTS = THREADS / FOLD_LINES;

struct Arguments {
  Fold rows, cols;
  int row_programs;  // the first so many fold rows, the others columns
};

struct Statistics {
  float max, sum;

  DEVICE void add(float other_max, float other_sum) {
    const float m = fmaxf(max, other_max);
    sum = sum * exponential(max - m) + other_sum * exponential(other_max - m);
    max = m;
  }
};

KERNEL(THREADS, 1) fold_kernel(const Arguments a) {
  const bool of_rows = program_index() < a.row_programs;
  const Fold fold = of_rows ? a.rows : a.cols;
  const int program = of_rows ? program_index() : program_index() - a.row_programs;
  const int in_program = thread_index() % FOLD_LINES, part = thread_index() / FOLD_LINES;
  const int64_t lines = int64_t(fold.length) * fold.groups;
  const int64_t line = int64_t(program) * FOLD_LINES + in_program;
  const bool has_max = fold.max != nullptr;
  Statistics folded = {FINITE_MIN, 0};
  if (line < lines)
    for (int slot = part; slot < fold.slots; slot += FOLD_PARTS) {
      const float* value = fold.table + slot * lines + line;
      if (has_max)
        folded.add(value[0], value[fold.slots * lines]);
      else
        folded.sum += value[0];
    }
  auto& parts = *reinterpret_cast<Statistics(*)[FOLD_PARTS][FOLD_LINES]>(shared_memory());
  parts[part][in_program] = folded;
  sync_threads();
  if (part > 0 || line >= lines) return;
  const int64_t to = line / fold.length * fold.stride + line % fold.length;
  Statistics running = {has_max ? fold.max[to] : FINITE_MIN, fold.sum[to]};
  for (const auto& of_part : parts) {
    if (has_max)
      running.add(of_part[in_program].max, of_part[in_program].sum);
    else
      running.sum += of_part[in_program].sum;
  }
  if (has_max) fold.max[to] = running.max;
  fold.sum[to] = running.sum;
}

int programs_of(const Fold& fold) { return ceil_div(fold.length * fold.groups, FOLD_LINES); }

}  // namespace

int fold(const Fold& rows, const Fold& cols, Stream stream) {
  const Arguments arguments = {rows, cols, programs_of(rows)};
  return launch(fold_kernel, programs_of(rows) + programs_of(cols), THREADS,
                sizeof(Statistics) * THREADS, stream, arguments);
}

}  // namespace gcl
