// What becomes of a finished Q, K or V head, and where it goes.
#pragma once

#include "cpu/norm.h"

namespace headrace {

// Half-split rotation of one head: dimension i turns with i + kDim / 2. `turn` is [kDim / 2] cosines, then
// as many sines. kDim is a multiple of 32, or 16 (halves of 8 lanes go one by one).
template <int kDim>
inline void rotate(float* head, const float* turn, float scale) {
    constexpr int kHalf = kDim / 2;
    const float *cos = turn, *sin = turn + kHalf;
    if constexpr (kHalf % kLanes == 0) {
        for (int i = 0; i < kHalf; i += kLanes) {
            const Lanes a = load(head + i), b = load(head + kHalf + i), c = load(cos + i), s = load(sin + i);
            store(head + i, (a * c - b * s) * splat(scale));
            store(head + kHalf + i, (b * c + a * s) * splat(scale));
        }
    } else {
        for (int i = 0; i < kHalf; i++) {
            const float a = head[i], b = head[kHalf + i];
            head[i] = (a * cos[i] - b * sin[i]) * scale;
            head[kHalf + i] = (b * cos[i] + a * sin[i]) * scale;
        }
    }
}

template <int kDim>
inline void add_bias(float* head, const float* bias) {
    for (int i = 0; i < kDim; i += kLanes) store(head + i, load(head + i) + load(bias + i));
}

inline void narrow(const float* from, Half* to, int count) {
    for (int i = 0; i < count; i += kLanes) store(to + i, load(from + i));
}
inline void narrow(const float* from, float* to, int count) { std::memcpy(to, from, sizeof(float) * count); }

}  // namespace headrace
