// Loads, stores, atomics and fences: one wrapper an instruction.
#pragma once

#include <cstdint>
#include <cstring>

namespace headrace::ptx {

using SharedAddress = uint32_t;  // in the block's shared window; shared_base() is where its dynamic part begins

extern __shared__ __align__(128) uint8_t dynamic_shared[];

__device__ __forceinline__ SharedAddress shared_base() {
    return static_cast<SharedAddress>(__cvta_generic_to_shared(dynamic_shared));
}

// The same pointer, kept as it is: what is added to it later is not mixed with what it was computed from.
template <class T>
__device__ __forceinline__ T* settled_pointer(T* pointer) {
    asm("" : "+l"(pointer));
    return pointer;
}

// T is 1, 2, 4, 8 or 16 bytes (of shared memory 2 or more), and addresses are multiples of that.
template <class T>
__device__ __forceinline__ T load_shared(SharedAddress from) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    T value;
    if constexpr (sizeof(T) == 2) {
        uint16_t bits;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(from) : "memory");
        memcpy(&value, &bits, sizeof value);
    } else if constexpr (sizeof(T) == 4) {
        uint32_t bits;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(bits) : "r"(from) : "memory");
        memcpy(&value, &bits, sizeof value);
    } else if constexpr (sizeof(T) == 8) {
        uint2 bits;
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(bits.x), "=r"(bits.y) : "r"(from) : "memory");
        memcpy(&value, &bits, sizeof value);
    } else {
        uint4 bits;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                     : "r"(from)
                     : "memory");
        memcpy(&value, &bits, sizeof value);
    }
    return value;
}

template <class T>
__device__ __forceinline__ void store_shared(SharedAddress to, T value) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    if constexpr (sizeof(T) == 2) {
        uint16_t bits;
        memcpy(&bits, &value, sizeof value);
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(bits) : "memory");
    } else if constexpr (sizeof(T) == 4) {
        uint32_t bits;
        memcpy(&bits, &value, sizeof value);
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(bits) : "memory");
    } else if constexpr (sizeof(T) == 8) {
        uint2 bits;
        memcpy(&bits, &value, sizeof value);
        asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(bits.x), "r"(bits.y) : "memory");
    } else {
        uint4 bits;
        memcpy(&bits, &value, sizeof value);
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z),
                     "r"(bits.w)
                     : "memory");
    }
}

// Block scope: what the adding threads had written, and what they knew of, is visible after it.
__device__ __forceinline__ uint32_t load_shared_acquire(SharedAddress from) {
    uint32_t value;
    asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
    return value;
}

__device__ __forceinline__ void add_shared_release(SharedAddress to, uint32_t value) {
    asm volatile("red.release.cta.shared.add.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

// From L2, where other blocks' stores of this launch are.
template <class T>
__device__ __forceinline__ T load_global(const T* from) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    T value;
    if constexpr (sizeof(T) == 1) {
        uint32_t bits;
        asm volatile("ld.global.cg.u8 %0, [%1];" : "=r"(bits) : "l"(from) : "memory");
        const uint8_t byte = bits;
        memcpy(&value, &byte, sizeof value);
    } else if constexpr (sizeof(T) == 2) {
        uint16_t bits;
        asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(from) : "memory");
        memcpy(&value, &bits, sizeof value);
    } else if constexpr (sizeof(T) == 4) {
        uint32_t bits;
        asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(bits) : "l"(from) : "memory");
        memcpy(&value, &bits, sizeof value);
    } else if constexpr (sizeof(T) == 8) {
        uint2 bits;
        asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(bits.x), "=r"(bits.y) : "l"(from) : "memory");
        memcpy(&value, &bits, sizeof value);
    } else {
        uint4 bits;
        asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                     : "l"(from)
                     : "memory");
        memcpy(&value, &bits, sizeof value);
    }
    return value;
}

// To `to` if `is_wanted`; otherwise that stays as it is. Without a branch: so who waits for the load is who uses it.
__device__ __forceinline__ void load_global_if(bool is_wanted, const uint4* from, uint4& to) {
    asm volatile(
        "{ .reg .pred wanted;\n"
        "  setp.ne.u32 wanted, %5, 0;\n"
        "  @wanted ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
        : "l"(from), "r"(static_cast<uint32_t>(is_wanted))
        : "memory");
}

// Of memory that others write only before the thread's block has last waited for them: it may be in L1 since then.
// Neither moved nor merged, but other accesses may be moved past it.
__device__ __forceinline__ int32_t load_settled(const int32_t* from) {
    int32_t value;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
}

// Brings a line to L2, if it can.
__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// Of memory that nobody writes during the launch. May be moved and merged like any pure expression.
template <class T>
__device__ __forceinline__ T load_constant(const T* from) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    T value;
    if constexpr (sizeof(T) == 1) {
        uint32_t bits;
        asm("ld.global.nc.u8 %0, [%1];" : "=r"(bits) : "l"(from));
        const uint8_t byte = bits;
        memcpy(&value, &byte, sizeof value);
    } else if constexpr (sizeof(T) == 2) {
        uint16_t bits;
        asm("ld.global.nc.u16 %0, [%1];" : "=h"(bits) : "l"(from));
        memcpy(&value, &bits, sizeof value);
    } else if constexpr (sizeof(T) == 4) {
        uint32_t bits;
        asm("ld.global.nc.u32 %0, [%1];" : "=r"(bits) : "l"(from));
        memcpy(&value, &bits, sizeof value);
    } else if constexpr (sizeof(T) == 8) {
        uint2 bits;
        asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(bits.x), "=r"(bits.y) : "l"(from));
        memcpy(&value, &bits, sizeof value);
    } else {
        uint4 bits;
        asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
            : "l"(from));
        memcpy(&value, &bits, sizeof value);
    }
    return value;
}

// load_constant of 16 bytes, but where it stands: for what is to be on its way during a wait.
__device__ __forceinline__ float4 load_constant_early(const float4* from) {
    float4 value;
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "l"(from));
    return value;
}

template <class T>
__device__ __forceinline__ void store_global(T* to, T value) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    if constexpr (sizeof(T) == 1) {
        uint8_t byte;
        memcpy(&byte, &value, sizeof value);
        const uint32_t bits = byte;
        asm volatile("st.global.u8 [%0], %1;" ::"l"(to), "r"(bits) : "memory");
    } else if constexpr (sizeof(T) == 2) {
        uint16_t bits;
        memcpy(&bits, &value, sizeof value);
        asm volatile("st.global.u16 [%0], %1;" ::"l"(to), "h"(bits) : "memory");
    } else if constexpr (sizeof(T) == 4) {
        uint32_t bits;
        memcpy(&bits, &value, sizeof value);
        asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(bits) : "memory");
    } else if constexpr (sizeof(T) == 8) {
        uint2 bits;
        memcpy(&bits, &value, sizeof value);
        asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(bits.x), "r"(bits.y) : "memory");
    } else {
        uint4 bits;
        memcpy(&bits, &value, sizeof value);
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z),
                     "r"(bits.w)
                     : "memory");
    }
}

// Device scope: what the adding threads had written, and what they knew of, is visible after it.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* from) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

__device__ __forceinline__ void add_release(uint32_t* to, uint32_t value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// Device scope, both ways: what was there before.
__device__ __forceinline__ uint32_t add_acquire_release(uint32_t* to, uint32_t value) {
    uint32_t previous;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(previous) : "l"(to), "r"(value) : "memory");
    return previous;
}

// What was there before. Orders nothing; the host sees it, as it does store_system.
__device__ __forceinline__ uint32_t compare_exchange(uint32_t* at, uint32_t expected, uint32_t desired) {
    uint32_t previous;
    asm volatile("atom.relaxed.sys.global.cas.b32 %0, [%1], %2, %3;"
                 : "=r"(previous)
                 : "l"(at), "r"(expected), "r"(desired)
                 : "memory");
    return previous;
}

__device__ __forceinline__ void store_system(uint32_t* to, uint32_t value) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t load_system(const uint32_t* from) {
    uint32_t value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

__device__ __forceinline__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

}  // namespace headrace::ptx
