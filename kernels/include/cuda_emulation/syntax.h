// What CUDA C++ has beyond C++, for a host compiler.
#pragma once

// Before the words below become macros: the standard library has attributes of the same names.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#define __device__
#define __host__
#define __global__ __attribute__((visibility("default")))
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
// Of kernels: tiles written out at each of their calls, as a device wants them, take a host compiler thrice as long.
#define __forceinline__ inline
// Of what wraps operations: they return to the kernel's own line, which reports name.
#define HEADRACE_ALWAYS_INLINE inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
