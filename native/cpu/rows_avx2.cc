// Built with -mavx2 -mfma on x86-64; elsewhere this file is the generic code under another name.
#include <bit>
#include <cmath>

#include "cpu/rows.hpp"

namespace commlib {
namespace avx2 {
#include "cpu/rows_impl.hpp"
}  // namespace avx2

const RowKernels kRowKernelsAvx2 = {"avx2", avx2::reduce, avx2::cast};

}  // namespace commlib
