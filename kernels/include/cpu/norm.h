// Root-mean-square norms. Rows and heads are whole numbers of 16 lanes.
#pragma once

#include "cpu/lanes.h"

namespace headrace {

// Lane l sums elements l, l + 16, ... ascending; the lanes are then added in a fixed tree.
template <int kSize>
inline float inverse_rms(const float* x, float eps) {
    Lanes squares = zero_lanes();
    for (int i = 0; i < kSize; i += kLanes) {
        const Lanes a = load(x + i);
        squares = fma(a, a, squares);
    }
    return 1.0f / std::sqrt(sum(squares) / kSize + eps);
}

template <int kSize>
inline void rms_norm(const float* x, const float* weight, float eps, float* out) {
    const Lanes scale = splat(inverse_rms<kSize>(x, eps));
    for (int i = 0; i < kSize; i += kLanes) store(out + i, load(x + i) * scale * load(weight + i));
}

}  // namespace headrace
