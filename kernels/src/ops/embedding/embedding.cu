/// y[t] = table[ids[t]]; one block a token.
extern "C" __global__ void embedding(
    half_t* y,            // [tokens, hidden]
    const half_t* table,  // [vocab, hidden]
    const u32* ids,       // [tokens]
    int hidden) {
    const half_t* row = table + (size_t)ids[blockIdx.x] * hidden;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) y[(size_t)blockIdx.x * hidden + i] = row[i];
}
