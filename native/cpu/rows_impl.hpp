// Body of rows_generic.cc and rows_avx2.cc. Included once by each, inside its own namespace.
// Not a header in the usual sense: it has no include guard and defines everything static.

constexpr size_t kBlock = 512;  // FP32 accumulators of one block stay in L1

static inline float bf16_to_f32(uint16_t value) {
  return std::bit_cast<float>(uint32_t(value) << 16);
}

static inline uint16_t f32_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

template <typename T>
static inline float load(const T* row, size_t i) {
  if constexpr (sizeof(T) == 2)
    return bf16_to_f32(row[i]);
  else
    return row[i];
}

template <typename T>
static inline void store(T* row, size_t i, float value) {
  if constexpr (sizeof(T) == 2)
    row[i] = f32_to_bf16(value);
  else
    row[i] = value;
}

template <typename T>
static void add_row(float* acc, const T* row, size_t n, bool is_first, const float* weight) {
  if (weight == nullptr) {
    if (is_first) {
      for (size_t i = 0; i < n; ++i) acc[i] = load(row, i);
    } else {
      for (size_t i = 0; i < n; ++i) acc[i] = acc[i] + load(row, i);
    }
  } else {
    const float w = *weight;
    if (is_first) {
      for (size_t i = 0; i < n; ++i) acc[i] = w * load(row, i);
    } else {
      for (size_t i = 0; i < n; ++i) acc[i] = std::fma(w, load(row, i), acc[i]);
    }
  }
}

template <typename T>
static void reduce_typed(const Reduction& r) {
  alignas(64) float total[kBlock];
  alignas(64) float part[kBlock];
  T* dst = static_cast<T*>(r.dst);
  for (size_t begin = 0; begin < r.num_elements; begin += kBlock) {
    const size_t n = r.num_elements - begin < kBlock ? r.num_elements - begin : kBlock;
    int row = 0;
    for (int g = 0; g < r.num_groups; ++g) {
      float* acc = g == 0 ? total : part;
      for (int first = row; row < r.group_ends[g]; ++row)
        add_row(acc, static_cast<const T*>(r.rows[row]) + begin, n, row == first,
                r.weights == nullptr ? nullptr : r.weights + row);
      if (g > 0)
        for (size_t i = 0; i < n; ++i) total[i] = total[i] + part[i];
    }
    for (size_t i = 0; i < n; ++i) store(dst, begin + i, total[i]);
  }
}

static void reduce(const Reduction& r) {
  if (r.dtype == Dtype::kBf16)
    reduce_typed<uint16_t>(r);
  else
    reduce_typed<float>(r);
}

// E4M3 (no infinities, NaN = 0x7f): round to nearest even on the bits, saturate at 448.
static inline uint8_t f32_to_e4m3(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal: keep 3 mantissa bits, rebias the exponent from 127 to 7.
  const uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1);
  const uint32_t normal = (rounded >> 20) - (120u << 3);
  // Below 2^-6: multiples of 2^-9. Adding 2^14 makes the FP32 unit 2^-9, so the adder rounds.
  const float shifted = std::bit_cast<float>(magnitude) + 16384.0f;
  const uint32_t subnormal = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(16384.0f);
  uint32_t result = magnitude < (121u << 23) ? subnormal : normal;
  result = magnitude >= 0x43e80000u ? 0x7eu : result;  // 464 and above round past 448
  result = magnitude > 0x7f800000u ? 0x7fu : result;
  return uint8_t(sign | result);
}

template <typename T>
static void cast_typed(uint8_t* dst, float* scales, const T* row, size_t n, Cast mode) {
  alignas(64) float values[kScaleBlock];
  for (size_t begin = 0; begin < n; begin += kScaleBlock) {
    uint32_t top = 0;  // |x| as bits orders like |x|; a NaN is left out and only spoils itself
    for (size_t i = 0; i < kScaleBlock; ++i) {
      values[i] = load(row, begin + i);
      const uint32_t magnitude = std::bit_cast<uint32_t>(values[i]) & 0x7fffffffu;
      top = magnitude > top && magnitude <= 0x7f800000u ? magnitude : top;
    }
    const float amax = std::bit_cast<float>(top);
    float scale = (amax > 1e-4f ? amax : 1e-4f) / 448.0f;
    if (mode == Cast::kE4m3Pow2) {
      const uint32_t bits = std::bit_cast<uint32_t>(scale);
      if ((bits & 0x7f800000u) != 0x7f800000u)
        scale = std::bit_cast<float>((bits + 0x7fffffu) & 0x7f800000u);
    }
    scales[begin / kScaleBlock] = scale;
    for (size_t i = 0; i < kScaleBlock; ++i) dst[begin + i] = f32_to_e4m3(values[i] / scale);
  }
}

static void cast(uint8_t* dst, float* scales, const void* row, Dtype dtype, size_t n, Cast mode) {
  if (dtype == Dtype::kBf16)
    cast_typed(dst, scales, static_cast<const uint16_t*>(row), n, mode);
  else
    cast_typed(dst, scales, static_cast<const float*>(row), n, mode);
}
