// Folds the slots of the tables into running statistics, always in the same order:
//
//     M' = max(M, max_t m_t)        L' = L exp(M - M') + sum_t l_t exp(m_t - M')
//
// A program folds FOLD_LINES lines (a cache line of each slot); its threads share the slots of a
// line.
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
  const int64_t lines = fold.length, line = int64_t(program) * FOLD_LINES + in_program;
  Statistics folded = {FINITE_MIN, 0};
  if (line < lines)
    for (int slot = part; slot < fold.slots; slot += FOLD_PARTS)
      folded.add(fold.table[slot * lines + line], fold.table[(fold.slots + slot) * lines + line]);
  auto& parts = *reinterpret_cast<Statistics(*)[FOLD_PARTS][FOLD_LINES]>(shared_memory());
  parts[part][in_program] = folded;
  sync_threads();
  if (part > 0 || line >= lines) return;
  Statistics running = {fold.max[line], fold.sum[line]};
  for (const auto& of_part : parts) running.add(of_part[in_program].max, of_part[in_program].sum);
  fold.max[line] = running.max;
  fold.sum[line] = running.sum;
}

int programs_of(const Fold& fold) { return ceil_div(fold.length, FOLD_LINES); }

}  // namespace

int fold(const Fold& rows, const Fold& cols, Stream stream) {
  const Arguments arguments = {rows, cols, programs_of(rows)};
  return launch(fold_kernel, programs_of(rows) + programs_of(cols), THREADS,
                sizeof(Statistics) * THREADS, stream, arguments);
}

}  // namespace gcl
