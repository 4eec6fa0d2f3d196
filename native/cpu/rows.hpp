// Arithmetic on rows: fixed-order reductions and the FP8 cast. Two builds of one source (AVX2 +
// FMA, generic) chosen once at run time; both give the same bits.
#pragma once

#include "common/types.hpp"

namespace commlib {

enum class Cast : uint32_t { kNone = 0, kE4m3 = 1, kE4m3Pow2 = 2 };

// dst = sum over groups g of (sum over the rows of group g), FP32, groups and rows in the given
// order, first term assigned. weights (one per row, or nullptr): fma(w, row, acc), first term w *
// row. Rows and dst are `dtype` (F32 or BF16); the result is rounded to it once, at the end.
struct Reduction {
  void* dst;
  const void* const* rows;
  const float* weights;
  const int* group_ends;  // row index past each group, ascending
  int num_groups;
  size_t num_elements;
  Dtype dtype;
};

struct RowKernels {
  const char* name;
  void (*reduce)(const Reduction& reduction);
  // row (F32 or BF16) -> E4M3 and one FP32 scale per kScaleBlock elements: s = max(|x|, 1e-4) /
  // 448, kE4m3Pow2: rounded up to a power of two; q = e4m3(x / s), round to nearest even.
  void (*cast)(uint8_t* dst, float* scales, const void* row, Dtype dtype, size_t num_elements,
               Cast cast);
};

const RowKernels& row_kernels();

extern const RowKernels kRowKernelsGeneric;
extern const RowKernels kRowKernelsAvx2;

}  // namespace commlib
