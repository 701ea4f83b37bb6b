// How weights lie in memory: megakernel/pack_cuda.py writes them so, fragment by fragment of the tensor cores.
#pragma once

#include <cstdint>

namespace headrace {

enum class Format { kQ4_0, kQ4_1, kQ8_0, kW4G128, kW8G128, kBF16, kF16 };

constexpr bool is_4bit(Format f) { return f == Format::kQ4_0 || f == Format::kQ4_1 || f == Format::kW4G128; }
constexpr bool is_8bit(Format f) { return f == Format::kQ8_0 || f == Format::kW8G128; }
constexpr bool is_float(Format f) { return f == Format::kBF16 || f == Format::kF16; }
constexpr bool has_minima(Format f) { return f == Format::kQ4_1 || f == Format::kW4G128; }

// Elements of K that a scale is shared by; of floats, as many as 4-bit formats, for one loop over both.
constexpr int scale_group(Format f) { return f == Format::kW4G128 || f == Format::kW8G128 ? 128 : 32; }
// Elements of K that are packed together.
constexpr int unit_k(Format f) { return scale_group(f) == 128 ? 128 : 64; }
constexpr int weight_bytes(Format f) {  // of a unit of 16 columns, without scales
    return 16 * unit_k(f) * (is_float(f) ? 4 : is_8bit(f) ? 2 : 1) / 2;
}
constexpr int scale_bytes(Format f) { return is_float(f) ? 0 : has_minima(f) ? 4 : 2; }  // of a column's group
constexpr int scale_groups(Format f) { return unit_k(f) / scale_group(f); }  // of a unit
constexpr int unit_bytes(Format f) {
    return weight_bytes(f) + (is_float(f) ? 0 : scale_groups(f) * 16 * scale_bytes(f));
}
constexpr int num_units(Format f, int in_features) { return (in_features + unit_k(f) - 1) / unit_k(f); }
constexpr int64_t group_bytes(Format f, int in_features) {  // of 16 columns
    return int64_t{num_units(f, in_features)} * unit_bytes(f);
}

}  // namespace headrace
