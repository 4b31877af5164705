// Writes addresses into a buffer, and clears them again: what is left in buffers is compared.
extern "C" {
__global__ void set_slot(KvSlot *to, u8 *cache, u32 capacity, u32 position) {
    if (threadIdx.x == 0)
        *to = {cache, capacity, position};
}
__global__ void clear_slots(KvSlot *to, u32 count) {
    if (threadIdx.x < count)
        to[threadIdx.x] = {nullptr, 0, 0};
}
}
