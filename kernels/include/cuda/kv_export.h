// KV of a run of tokens out of a pool's blocks, in the wire's order and type, straight to where it is sent from.
// prefill_workers/pool_export.py makes the arguments.
#pragma once

#include <type_traits>

#include "cuda/convert.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/warp.h"

namespace headrace {

enum class KvType { kFloat32, kFloat16, kBFloat16, kE4M3 };

constexpr uint32_t kv_bytes(KvType t) { return t == KvType::kFloat32 ? 4 : t == KvType::kE4M3 ? 1 : 2; }

constexpr uint32_t kExportThreads = 256;
constexpr uint32_t kStoreBytes = 16;  // of a thread, where alignment allows

// Strides are in elements. A head's values are contiguous in both; on the wire its heads are, too.
struct ExportArguments {
    const uint8_t* pool;       // K of the layer, in block 0
    uint8_t* wire;             // this rank's part of K of the first token: device memory, or the host's, mapped
    const int64_t* block_ids;  // of the sequence
    int64_t pool_part, pool_block, pool_head, pool_token;
    int64_t wire_part, wire_token;
    float scales[2];  // of K and of V: factors of an 8-bit pool's values
    uint32_t first_token, num_tokens;
    uint32_t tokens_per_block, num_heads, head_dim;
    uint32_t is_aligned;  // kStoreBytes divides a head on the wire, and all addresses are aligned to what is moved
};

// kBytes of memory, which are one to four accesses.
template <uint32_t kBytes>
struct Held {
    static constexpr uint32_t kPiece = kBytes < 16 ? kBytes : 16;
    using Piece = std::conditional_t<
        kPiece == 16, uint4,
        std::conditional_t<kPiece == 8, uint2,
                           std::conditional_t<kPiece == 4, uint32_t, std::conditional_t<kPiece == 2, uint16_t, uint8_t>>>>;
    Piece pieces[kBytes / kPiece];
};

template <KvType T>
__device__ __forceinline__ float kv_float(const uint8_t* at) {
    if constexpr (T == KvType::kE4M3) {
        // Exponent and mantissa where a float has them: too small by the difference of the biases, 127 - 7.
        const uint32_t bits = *at, magnitude = bits & 0x7f;
        if (magnitude == 0x7f) return bits_float(0x7fffffff);
        return bits_float((bits & 0x80) << 24 | magnitude << 20) * 0x1p120f;
    } else if constexpr (T == KvType::kFloat32) {
        float value;
        memcpy(&value, at, 4);
        return value;
    } else {
        uint16_t bits;
        memcpy(&bits, at, 2);
        return T == KvType::kFloat16 ? ptx::half_to_float(bits) : ptx::bf16_to_float(bits);
    }
}

// To nearest, ties to even; what is too large becomes infinite.
template <KvType T>
__device__ __forceinline__ void put_kv(uint8_t* to, float value) {
    if constexpr (T == KvType::kFloat32) {
        memcpy(to, &value, 4);
    } else {
        const uint16_t bits = T == KvType::kFloat16 ? ptx::float_to_half(value) : ptx::pack_bf16x2(value, 0);
        memcpy(to, &bits, 2);
    }
}

template <KvType From, KvType To, uint32_t kCount>
__device__ __forceinline__ void export_values(const uint8_t* from, uint8_t* to, float scale) {
    using In = Held<kCount * kv_bytes(From)>;
    using Out = Held<kCount * kv_bytes(To)>;
    In in;
    for (uint32_t i = 0; i < sizeof in / In::kPiece; i++)
        in.pieces[i] = ptx::load_constant(reinterpret_cast<const typename In::Piece*>(from) + i);
    Out out;
    if constexpr (From == To) {
        out = in;
    } else {
        const auto* values = reinterpret_cast<const uint8_t*>(in.pieces);
        auto* made = reinterpret_cast<uint8_t*>(out.pieces);
#pragma unroll
        for (uint32_t i = 0; i < kCount; i++) {
            float value = kv_float<From>(values + i * kv_bytes(From));
            if constexpr (From == KvType::kE4M3) value *= scale;
            put_kv<To>(made + i * kv_bytes(To), value);
        }
    }
    for (uint32_t i = 0; i < sizeof out / Out::kPiece; i++)
        ptx::store_global(reinterpret_cast<typename Out::Piece*>(to) + i, out.pieces[i]);
}

// kCount values a thread, in the wire's order: what lanes store is contiguous, heads of a token included. Over PCIe
// that counts; loads are runs of a head.
template <KvType From, KvType To, uint32_t kCount>
__device__ __forceinline__ void export_all(const ExportArguments& a) {
    const uint32_t a_head = a.head_dim / kCount, a_token = a.num_heads * a_head;
    const uint32_t end = 2 * a.num_tokens * a_token, stride = ptx::num_blocks() * kExportThreads;
    for (uint32_t at = ptx::block() * kExportThreads + ptx::thread(); at < end; at += stride) {
        const uint32_t row = at / a_token, in_row = at % a_token;
        const uint32_t part = row / a.num_tokens, token = row % a.num_tokens;
        const uint32_t head = in_row / a_head, element = in_row % a_head * kCount;
        const uint32_t place = a.first_token + token;
        const int64_t block = ptx::load_constant(a.block_ids + place / a.tokens_per_block);
        const int64_t from = part * a.pool_part + block * a.pool_block + head * a.pool_head +
                             place % a.tokens_per_block * a.pool_token + element;
        const int64_t to = part * a.wire_part + token * a.wire_token + in_row * kCount;
        export_values<From, To, kCount>(a.pool + from * kv_bytes(From), a.wire + to * kv_bytes(To),
                                        part ? a.scales[1] : a.scales[0]);
    }
}

template <KvType From, KvType To>
__device__ __forceinline__ void export_kv(const ExportArguments& a) {
    if (a.is_aligned)
        export_all<From, To, kStoreBytes / kv_bytes(To)>(a);
    else
        export_all<From, To, 1>(a);
}

}  // namespace headrace
