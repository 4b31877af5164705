// Matrices of which some rows, the listed ones, are stored a second time (spec/encodings.md §6). The kernels of their
// encodings compute both parts as matrices of their own; these kernels say where the listed rows belong.
#include "common.cuh"

// Fields as `MoveParams` of mixed_rows.rs.
struct MoveParams {
    // The listed rows, [count].
    const u32 *listed;
    // Results of the listed rows, [tokens][count].
    float *values;
    // Results of all rows, [tokens][rows].
    float *out;
    u32 count, rows;
};

// Fields as `FindParams` of mixed_rows.rs.
struct FindParams {
    // The listed rows, ascending, [listed_count].
    const u32 *listed;
    // Rows to find, [count]; nullptr for 0, 1, 2 and so on.
    const u32 *ids;
    // Where each of them is in the list, [count].
    u32 *found;
    u32 listed_count, count;
};

// Of a row that is not in the list. No matrix has a row with this number, so `dequantize_rows` skips it.
constexpr u32 NOT_LISTED = 0xffffffff;

// Calls `move` with the result of each listed row and its place among those of all rows. A file may list a row that
// does not exist.
template <typename F> STB_DEVICE void for_listed(const MoveParams &a, F move) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= a.count)
        return;
    const u32 row = a.listed[i];
    if (row < a.rows)
        move(a.values[u64(blockIdx.y) * a.count + i], a.out[u64(blockIdx.y) * a.rows + row]);
}

extern "C" {
// values[t][i] = out[t][listed[i]].
__global__ void __launch_bounds__(THREADS) gather_results(const __grid_constant__ MoveParams a) {
    for_listed(a, [](float &value, float &out) { value = out; });
}

// out[t][listed[i]] = values[t][i].
__global__ void __launch_bounds__(THREADS) scatter_results(const __grid_constant__ MoveParams a) {
    for_listed(a, [](float &value, float &out) { out = value; });
}

__global__ void __launch_bounds__(THREADS) find_rows(const __grid_constant__ FindParams a) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= a.count)
        return;
    const u32 row = a.ids != nullptr ? a.ids[i] : i;
    u32 first = 0, end = a.listed_count;
    while (first < end) {
        const u32 middle = first + (end - first) / 2;
        if (a.listed[middle] < row)
            first = middle + 1;
        else
            end = middle;
    }
    a.found[i] = first < a.listed_count && a.listed[first] == row ? first : NOT_LISTED;
}
}
