// What every kernel of these tests is given. A fault is one thing done wrong; 0 is none.
#pragma once

#include "cuda/ptx/convert.h"
#include "cuda/ptx/clock.h"
#include "cuda/ptx/copy.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/memory.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/warp.h"
#include "cuda/registry.h"

struct Arguments {
    const uint8_t* input;
    uint8_t* output;
    uint32_t* counters;
    uint32_t fault, steps;
};

#define KERNEL extern "C" __global__ void __launch_bounds__(288, 1)
