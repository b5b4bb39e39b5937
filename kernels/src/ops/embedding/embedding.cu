/// y[t] = table[ids[t]]; one block a token.
extern "C" __global__ void embedding(
    real_t* y,            // [tokens, hidden]
    const real_t* table,  // [vocab, hidden]
    const u32* ids,       // [tokens]
    int hidden) {
    const real_t* row = table + (size_t)ids[blockIdx.x] * hidden;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) y[(size_t)blockIdx.x * hidden + i] = row[i];
}
