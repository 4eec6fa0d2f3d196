// Arithmetic on rows: both builds of the kernels against each other and against plain loops.
#include "cpu/rows.hpp"

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "tests/bf16.hpp"

using namespace commlib;
using namespace commlib::testing;

namespace {

const RowKernels* const kBoth[] = {&kRowKernelsGeneric, &kRowKernelsAvx2};
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kTiny = std::numeric_limits<float>::denorm_min();
constexpr float kSmall = std::numeric_limits<float>::min();
constexpr float kHuge = std::numeric_limits<float>::max();
const std::vector<float> kSpecial = {0.0f,  -0.0f,  1.0f,    -1.0f,  kTiny, -kTiny, kSmall - kTiny,
                                     kHuge, -kHuge, kInf,    -kInf,  kNan,  -kNan,  kSmall,
                                     1e-4f, 448.0f, -448.0f, 1e-30f, 1e30f};

uint32_t bits(float value) { return std::bit_cast<uint32_t>(value); }
// Equal bits; which NaN comes out is left open.
bool is_same(float a, float b) { return bits(a) == bits(b) || (a != a && b != b); }

class Numbers {
 public:
  explicit Numbers(unsigned seed) : random_(seed) {}
  float normal() { return std::normal_distribution<float>(0, 1)(random_); }
  float any_bits() { return std::bit_cast<float>(uint32_t(random_())); }
  float special() { return kSpecial[random_() % kSpecial.size()]; }
  unsigned below(unsigned n) { return unsigned(random_() % n); }

 private:
  std::mt19937 random_;
};

struct Problem {
  Dtype dtype;
  size_t num_elements;
  std::vector<std::vector<float>> rows;
  std::vector<std::vector<uint16_t>> half_rows;
  std::vector<float> weights;  // empty: none
  std::vector<int> group_ends;
};

Problem make_problem(Numbers& numbers, Dtype dtype, size_t num_elements, bool has_weights,
                     double special_share) {
  Problem p{dtype, num_elements, {}, {}, {}, {}};
  const unsigned num_groups = 1 + numbers.below(4);
  int end = 0;
  for (unsigned g = 0; g < num_groups; ++g)
    p.group_ends.push_back(end += 1 + int(numbers.below(4)));
  const auto pick = [&] {
    return numbers.below(1000) < special_share * 1000 ? numbers.special() : numbers.normal();
  };
  for (int r = 0; r < end; ++r) {
    p.rows.emplace_back(num_elements);
    p.half_rows.emplace_back(num_elements);
    for (size_t i = 0; i < num_elements; ++i) {
      float value = pick();
      if (dtype == Dtype::kBf16) {
        p.half_rows.back()[i] = uint16_t(bits(value) >> 16);
        value = from_bf16(p.half_rows.back()[i]);
      }
      p.rows.back()[i] = value;
    }
    if (has_weights) p.weights.push_back(pick());
  }
  return p;
}

std::vector<uint8_t> run(const RowKernels& kernels, const Problem& p) {
  std::vector<uint8_t> out(p.num_elements * dtype_bytes(p.dtype) + 1, 0xcd);
  std::vector<const void*> rows;
  for (size_t r = 0; r < p.rows.size(); ++r)
    rows.push_back(p.dtype == Dtype::kBf16 ? static_cast<const void*>(p.half_rows[r].data())
                                           : p.rows[r].data());
  kernels.reduce({out.data(), rows.data(), p.weights.empty() ? nullptr : p.weights.data(),
                  p.group_ends.data(), int(p.group_ends.size()), p.num_elements, p.dtype});
  CHECK(out.back() == 0xcd);  // nothing beyond the row
  out.pop_back();
  return out;
}

// The definition, element by element.
float naive(const Problem& p, size_t i) {
  float total = 0;
  int row = 0;
  for (size_t g = 0; g < p.group_ends.size(); ++g) {
    float acc = 0;
    for (int first = row; row < p.group_ends[g]; ++row) {
      const float value = p.rows[size_t(row)][i];
      if (p.weights.empty())
        acc = row == first ? value : acc + value;
      else
        acc = row == first ? p.weights[size_t(row)] * value
                           : std::fma(p.weights[size_t(row)], value, acc);
    }
    total = g == 0 ? acc : total + acc;
  }
  return total;
}

float result(const std::vector<uint8_t>& out, Dtype dtype, size_t i) {
  if (dtype == Dtype::kBf16) {
    uint16_t half;
    std::memcpy(&half, out.data() + 2 * i, 2);
    return from_bf16(half);
  }
  float value;
  std::memcpy(&value, out.data() + 4 * i, 4);
  return value;
}

// Elements in which both builds or the definition differ.
int count_differences(const Problem& p) {
  int differences = 0;
  const std::vector<uint8_t> generic = run(kRowKernelsGeneric, p);
  const std::vector<uint8_t> avx2 = run(kRowKernelsAvx2, p);
  for (size_t i = 0; i < p.num_elements; ++i) {
    float expected = naive(p, i);
    if (p.dtype == Dtype::kBf16 && std::isfinite(expected)) expected = from_bf16(to_bf16(expected));
    differences += !is_same(result(generic, p.dtype, i), expected);
    differences += !is_same(result(generic, p.dtype, i), result(avx2, p.dtype, i));
  }
  return differences;
}

float decode_e4m3(unsigned code) {
  const int exponent = int(code >> 3 & 0xf);
  const float mantissa = float(code & 7) / 8;
  return exponent == 0 ? std::ldexp(mantissa, -6) : std::ldexp(1 + mantissa, exponent - 7);
}

// Nearest by search in the table of all values, ties to the even code, at most 448.
uint8_t search_e4m3(float value) {
  if (value != value) return 0x7f;
  const double magnitude = std::fabs(double(value));
  unsigned best = 0;
  for (unsigned code = 1; code <= 0x7e; ++code) {
    const double distance = std::fabs(decode_e4m3(code) - magnitude);
    const double best_distance = std::fabs(decode_e4m3(best) - magnitude);
    if (distance < best_distance || (distance == best_distance && code % 2 == 0)) best = code;
  }
  return uint8_t(best | (std::signbit(value) ? 0x80 : 0));
}

struct CastRow {
  std::vector<uint8_t> codes;
  std::vector<float> scales;
};

CastRow cast(const RowKernels& kernels, const std::vector<float>& row, Cast mode) {
  CastRow out{std::vector<uint8_t>(row.size()), std::vector<float>(row.size() / kScaleBlock)};
  kernels.cast(out.codes.data(), out.scales.data(), row.data(), Dtype::kF32, row.size(), mode);
  return out;
}

// A block that holds 448, so that its scale is 1 and its codes are those of the values themselves.
std::vector<float> unscaled(const std::vector<float>& values) {
  std::vector<float> row;
  for (size_t i = 0; i < values.size(); ++i) {
    if (row.size() % kScaleBlock == 0) row.push_back(448.0f);
    row.push_back(values[i]);
  }
  while (row.size() % kScaleBlock != 0) row.push_back(448.0f);
  return row;
}

}  // namespace

TEST_CASE("reduce: order of summation, both builds, both dtypes") {
  Numbers numbers(1);
  for (size_t n : {1, 7, 8, 40, 511, 512, 513, 1500})
    for (Dtype dtype : {Dtype::kF32, Dtype::kBf16})
      for (bool has_weights : {false, true})
        for (int round = 0; round < 3; ++round)
          CHECK(count_differences(make_problem(numbers, dtype, n, has_weights, 0)) == 0);
}

TEST_CASE("reduce: special values") {
  Numbers numbers(2);
  for (Dtype dtype : {Dtype::kF32, Dtype::kBf16})
    for (bool has_weights : {false, true})
      for (double share : {0.05, 0.5, 1.0})
        for (int round = 0; round < 4; ++round)
          CHECK(count_differences(make_problem(numbers, dtype, 600, has_weights, share)) == 0);
}

TEST_CASE("reduce: -0 stays -0, and one row comes out as it is") {
  for (const RowKernels* kernels : kBoth) {
    Problem p{Dtype::kF32, kSpecial.size(), {kSpecial}, {{}}, {}, {1}};
    const std::vector<uint8_t> out = run(*kernels, p);
    CHECK(std::memcmp(out.data(), kSpecial.data(), out.size()) == 0);
    const std::vector<float> zeros(9, -0.0f);
    p = {Dtype::kF32, 9, {zeros, zeros}, {{}, {}}, {}, {1, 2}};
    CHECK(bits(result(run(*kernels, p), Dtype::kF32, 8)) == bits(-0.0f));
  }
}

TEST_CASE("reduce: the order matters for these numbers") {
  // Otherwise the tests above would accept any order.
  Numbers numbers(3);
  Problem p = make_problem(numbers, Dtype::kF32, 512, true, 0);
  while (p.rows.size() < 4) p = make_problem(numbers, Dtype::kF32, 512, true, 0);
  const std::vector<uint8_t> forwards = run(kRowKernelsGeneric, p);
  std::swap(p.rows.front(), p.rows.back());
  std::swap(p.weights.front(), p.weights.back());
  CHECK(run(kRowKernelsGeneric, p) != forwards);
  std::swap(p.rows.front(), p.rows.back());
  std::swap(p.weights.front(), p.weights.back());
  const int last = p.group_ends.back();
  p.group_ends =
      p.group_ends.size() == 1 ? std::vector<int>{last / 2, last} : std::vector<int>{last};
  CHECK(run(kRowKernelsGeneric, p) != forwards);  // grouping too
}

TEST_CASE("reduce: BF16 results round to nearest even") {
  // Sums of two BF16 numbers reach every kind of tie and neighbour of a tie.
  Numbers numbers(4);
  Problem p{Dtype::kBf16, 4096, {{}, {}}, {{}, {}}, {}, {2}};
  for (size_t i = 0; i < p.num_elements; ++i) {
    const uint16_t a = uint16_t(0x3f80 + numbers.below(256));
    const uint16_t b = uint16_t((numbers.below(2) << 15 | 0x3800) + numbers.below(0x800));
    p.half_rows[0].push_back(a);
    p.half_rows[1].push_back(b);
    p.rows[0].push_back(from_bf16(a));
    p.rows[1].push_back(from_bf16(b));
  }
  int ties = 0;
  for (size_t i = 0; i < p.num_elements; ++i) ties += (bits(naive(p, i)) & 0xffff) == 0x8000;
  CHECK(ties > 20);
  CHECK(count_differences(p) == 0);
}

TEST_CASE("cast: every code, every midpoint and its neighbours") {
  std::vector<float> values;
  for (unsigned code = 0; code <= 0x7e; ++code) {
    const float value = decode_e4m3(code);
    values.push_back(value);
    if (code == 0x7e) break;
    const float middle = (value + decode_e4m3(code + 1)) / 2;
    for (float v : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 1000.0f)})
      values.push_back(v);
  }
  const size_t positive = values.size();
  for (size_t i = 0; i < positive; ++i) values.push_back(-values[i]);
  for (float v : {kTiny, -kTiny, kSmall, 1e-20f, -0.0f}) values.push_back(v);
  const std::vector<float> row = unscaled(values);
  for (const RowKernels* kernels : kBoth)
    for (Cast mode : {Cast::kE4m3, Cast::kE4m3Pow2}) {
      const CastRow out = cast(*kernels, row, mode);
      for (float scale : out.scales) CHECK(scale == 1.0f);
      for (size_t i = 0; i < row.size(); ++i)
        CHECK_MESSAGE(out.codes[i] == search_e4m3(row[i]), kernels->name << " " << row[i]);
    }
}

TEST_CASE("cast: random blocks, scale and codes by the formula") {
  Numbers numbers(5);
  for (int round = 0; round < 30; ++round) {
    std::vector<float> row(kScaleBlock * 2);
    const int exponent = int(numbers.below(60)) - 30;
    for (float& value : row) value = std::ldexp(numbers.normal(), exponent);
    std::vector<uint16_t> half(row.size());
    for (size_t i = 0; i < row.size(); ++i) half[i] = uint16_t(bits(row[i]) >> 16);
    const bool is_half = round % 2 == 1;
    if (is_half)
      for (size_t i = 0; i < row.size(); ++i) row[i] = from_bf16(half[i]);
    for (Cast mode : {Cast::kE4m3, Cast::kE4m3Pow2}) {
      CastRow out = cast(kRowKernelsGeneric, row, mode);
      CastRow other = out;
      kRowKernelsAvx2.cast(other.codes.data(), other.scales.data(),
                           is_half ? static_cast<const void*>(half.data()) : row.data(),
                           is_half ? Dtype::kBf16 : Dtype::kF32, row.size(), mode);
      CHECK(other.codes == out.codes);
      CHECK(std::memcmp(other.scales.data(), out.scales.data(), out.scales.size() * 4) == 0);
      for (size_t b = 0; b < out.scales.size(); ++b) {
        float amax = 0;
        for (size_t i = 0; i < kScaleBlock; ++i)
          amax = std::fmax(amax, std::fabs(row[b * kScaleBlock + i]));
        const float exact = std::fmax(amax, 1e-4f) / 448.0f;
        const float scale = out.scales[b];
        if (mode == Cast::kE4m3) {
          CHECK(bits(scale) == bits(exact));
        } else {
          int ignored = 0;
          CHECK(std::frexp(scale, &ignored) == 0.5f);  // a power of two
          CHECK(scale >= exact);
          CHECK(scale / 2 < exact);
        }
        for (size_t i = 0; i < kScaleBlock; ++i) {
          const size_t at = b * kScaleBlock + i;
          CHECK(out.codes[at] == search_e4m3(row[at] / scale));
        }
      }
    }
  }
}

TEST_CASE("cast: with powers of two, what E4M3 can hold comes back exactly") {
  Numbers numbers(6);
  for (int exponent = -8; exponent <= 20; ++exponent) {
    std::vector<float> row(kScaleBlock);
    for (float& value : row)
      value = std::ldexp(decode_e4m3(numbers.below(0x7f)), exponent) *
              (numbers.below(2) == 0 ? 1.0f : -1.0f);
    row[0] = std::ldexp(448.0f, exponent);
    for (const RowKernels* kernels : kBoth) {
      const CastRow out = cast(*kernels, row, Cast::kE4m3Pow2);
      CHECK(out.scales[0] == std::ldexp(1.0f, exponent));
      for (size_t i = 0; i < kScaleBlock; ++i) {
        const float magnitude = decode_e4m3(out.codes[i] & 0x7f) * out.scales[0];
        CHECK(bits(out.codes[i] & 0x80 ? -magnitude : magnitude) == bits(row[i]));
      }
    }
  }
}

TEST_CASE("cast: zeros, infinities and NaN") {
  for (const RowKernels* kernels : kBoth)
    for (Cast mode : {Cast::kE4m3, Cast::kE4m3Pow2}) {
      std::vector<float> row(kScaleBlock, 0.0f);
      row[3] = -0.0f;
      CastRow out = cast(*kernels, row, mode);
      CHECK(out.scales[0] >= 1e-4f / 448.0f);
      CHECK(out.scales[0] < 2e-4f / 448.0f);
      CHECK(out.codes[0] == 0);
      CHECK(out.codes[3] == 0x80);

      row[6] = 1.0f;
      const CastRow without = cast(*kernels, row, mode);
      row[5] = kNan;  // spoils itself, not its block
      out = cast(*kernels, row, mode);
      CHECK((out.codes[5] & 0x7f) == 0x7f);
      out.codes[5] = without.codes[5];
      CHECK(out.codes == without.codes);
      CHECK(out.scales == without.scales);

      row[5] = -kInf;  // spoils its block: 0 * inf and inf / inf
      out = cast(*kernels, row, mode);
      CHECK(out.scales[0] == kInf);
      CHECK((out.codes[5] & 0x7f) == 0x7f);
      CHECK(out.codes[6] == 0);

      row[5] = kHuge;
      out = cast(*kernels, row, mode);
      CHECK(std::isfinite(out.scales[0]));
      CHECK(decode_e4m3(out.codes[5] & 0x7f) >= 224.0f);
    }
}

TEST_CASE("cast: both builds give the same codes and scales for any bits") {
  Numbers numbers(7);
  for (int round = 0; round < 200; ++round) {
    std::vector<float> row(kScaleBlock);
    for (float& value : row) value = round % 2 == 0 ? numbers.special() : numbers.any_bits();
    if (round % 4 == 1)
      for (float& value : row) value = value == value ? value : 1.0f;
    for (Cast mode : {Cast::kE4m3, Cast::kE4m3Pow2}) {
      const CastRow generic = cast(kRowKernelsGeneric, row, mode);
      const CastRow avx2 = cast(kRowKernelsAvx2, row, mode);
      CHECK(generic.codes == avx2.codes);
      CHECK(is_same(generic.scales[0], avx2.scales[0]));
    }
  }
}

TEST_CASE("the chosen build is one of the two") {
  CHECK((&row_kernels() == &kRowKernelsGeneric || &row_kernels() == &kRowKernelsAvx2));
}
