// Product of two small matrices that lie in the caches, in blocks whose sums stay in the registers.
#pragma once

#include <algorithm>

#include "vector.h"

namespace stable_sam {
namespace {

// A block has this many rows of the result and vectors of its columns: sums and one row of the right matrix fill the
// registers (32, or 16 below AVX-512), and every load serves several multiplications.
constexpr int kBlockRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockVectors = 4;
#else
constexpr int kBlockVectors = 2;
#endif
// Steps of the sum after which the next block of rows has its turn: a block of the right matrix stays in the
// first-level cache meanwhile.
constexpr int64_t kBlockSteps = 128;

// The left matrix, [rows, steps]: `by_step` says that its rows are contiguous in memory (stride between steps), else
// its steps are (stride between rows).
template <typename A, bool by_step>
struct LeftMatrix {
  const A* data;
  int64_t stride;

  const A* at(int64_t row, int64_t step) const {
    return by_step ? data + step * stride + row : data + row * stride + step;
  }
};

template <typename A>
struct Matrix {
  A* data;
  int64_t stride;  // between rows

  A* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

// result = (adds ? result : 0) + left * right. The sum of an element has one order of its steps whatever the block, so
// that a product computed again gives the same bits.
template <int rows, int vectors, typename A, bool by_step>
inline void multiply_block(LeftMatrix<A, by_step> left, Matrix<const A> right, int64_t steps, bool adds,
                           Matrix<A> result) {
  Vector<A> sums[rows][vectors];
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sums[row][v] = adds ? load(result.at(row, v * kLanes<A>)) : Vector<A>{};
  }
  for (int64_t step = 0; step < steps; ++step) {
    Vector<A> factors[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) factors[v] = load(right.at(step, v * kLanes<A>));
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row) {
      const A factor = *left.at(row, step);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sums[row][v] += factor * factors[v];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(result.at(row, v * kLanes<A>), sums[row][v]);
  }
}

// All rows of one block of columns; the last block of rows has what is left.
template <int rows, int vectors, typename A, bool by_step>
inline void multiply_rows(LeftMatrix<A, by_step> left, Matrix<const A> right, int64_t steps, bool adds, int64_t row,
                          int64_t row_count, Matrix<A> result) {
  for (; row + rows <= row_count; row += rows) {
    multiply_block<rows, vectors>(LeftMatrix<A, by_step>{left.at(row, 0), left.stride}, right, steps, adds,
                                  Matrix<A>{result.at(row, 0), result.stride});
  }
  if constexpr (rows > 1) {
    if (row < row_count) multiply_rows<rows - 1, vectors>(left, right, steps, adds, row, row_count, result);
  }
}

// Columns from `column` on in blocks of `vectors`, the rest in smaller ones.
template <int vectors, typename A, bool by_step>
inline void multiply_columns(LeftMatrix<A, by_step> left, Matrix<const A> right, int64_t steps, bool adds,
                             int64_t row_count, int64_t column, int64_t column_count, Matrix<A> result) {
  for (; column + vectors * kLanes<A> <= column_count; column += vectors * kLanes<A>) {
    multiply_rows<kBlockRows, vectors>(left, Matrix<const A>{right.at(0, column), right.stride}, steps, adds, 0,
                                       row_count, Matrix<A>{result.at(0, column), result.stride});
  }
  if constexpr (vectors > 1) {
    multiply_columns<vectors - 1>(left, right, steps, adds, row_count, column, column_count, result);
  }
}

// result [rows, columns] = (adds ? result : 0) + left [rows, steps] * right [steps, columns]; columns are whole
// vectors.
template <typename A, bool by_step>
void multiply(LeftMatrix<A, by_step> left, Matrix<const A> right, int64_t rows, int64_t columns, int64_t steps,
              bool adds, Matrix<A> result) {
  int64_t step = 0;
  do {  // once even without any step: then the result is 0
    multiply_columns<kBlockVectors>(LeftMatrix<A, by_step>{left.at(0, step), left.stride},
                                    Matrix<const A>{right.at(step, 0), right.stride},
                                    std::min(kBlockSteps, steps - step), adds || step > 0, rows, 0, columns, result);
    step += kBlockSteps;
  } while (step < steps);
}

}  // namespace
}  // namespace stable_sam
