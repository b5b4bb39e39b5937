/// Ids that a kernel gets with its arguments.
struct FewIds {
    u32 of[16];
};

/// y[t] = table[ids[t]]; one block a token. Up to 16 ids need no memory. Tokens from `known` on, and those whose id is
/// none of the table's, get its first row.
extern "C" __global__ void embedding(
    real_t* y,            // [tokens, hidden]
    const real_t* table,  // [vocab, hidden]
    const u32* ids,       // [known] or null
    FewIds few, int known, int vocab, int hidden) {
    start_next_early();
    await_previous();
    u32 id = blockIdx.x < known ? ids ? ids[blockIdx.x] : few.of[blockIdx.x] : 0;
    const real_t* row = table + (size_t)(id < vocab ? id : 0) * hidden;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) y[(size_t)blockIdx.x * hidden + i] = row[i];
}
