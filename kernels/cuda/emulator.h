// Runs CUDA kernels on the host, for tests: c++ -std=c++17 -include emulator.h.
//
// Each thread of a block is a fiber with its own stack; blocks run one after another. With a seed other
// than 0, the order of fibers and blocks is random, and so is the moment at which an asynchronous copy
// arrives. README.md says what a kernel may rely on.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define STB_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define STB_SITE_ , const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- Vector types ----------------------------------------------------------------------------

#define STB_VECTOR(name, type)                                                                     \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                       \
    struct name##3 { type x, y, z; };                                                              \
    struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; };    \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                               \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                    \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
STB_VECTOR(char, signed char)
STB_VECTOR(uchar, unsigned char)
STB_VECTOR(short, short)
STB_VECTOR(ushort, unsigned short)
STB_VECTOR(int, int)
STB_VECTOR(uint, unsigned int)
STB_VECTOR(float, float)
STB_VECTOR(longlong, long long)
STB_VECTOR(ulonglong, unsigned long long)
#undef STB_VECTOR

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#include "emulator_numbers.h"
#include "emulator_fiber.h"
#include "emulator_warp.h"
#include "emulator_builtins.h"
#include "emulator_mma.h"
#include "emulator_main.h"
