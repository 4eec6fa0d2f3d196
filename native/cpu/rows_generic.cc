#include <bit>
#include <cmath>

#include "cpu/rows.hpp"

namespace commlib {
namespace generic {
#include "cpu/rows_impl.hpp"
}  // namespace generic

const RowKernels kRowKernelsGeneric = {"generic", generic::reduce, generic::cast};

const RowKernels& row_kernels() {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) return kRowKernelsAvx2;
#endif
  return kRowKernelsGeneric;
}

}  // namespace commlib
