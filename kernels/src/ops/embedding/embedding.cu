/// Ids that a kernel gets with its arguments.
struct FewIds {
    u32 of[16];
};

/// y[t] = table[ids[t]]; one block a token. Up to 16 ids need no memory.
extern "C" __global__ void embedding(
    real_t* y,            // [tokens, hidden]
    const real_t* table,  // [vocab, hidden]
    const u32* ids,       // [tokens] or null
    FewIds few, int hidden) {
    start_next_early();
    await_previous();
    const real_t* row = table + (size_t)(ids ? ids[blockIdx.x] : few.of[blockIdx.x]) * hidden;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) y[(size_t)blockIdx.x * hidden + i] = row[i];
}
