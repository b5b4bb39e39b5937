/// Code `index` of lane `n` in words laid out `[words, lanes]`.
__device__ __forceinline__ u32 code_at(const u32* words, int lanes, int n, int index, int bits) {
    int position = index * bits, word = position / 32, shift = position % 32;
    u32 value = words[(size_t)word * lanes + n] >> shift;
    if (shift + bits > 32) value |= words[(size_t)(word + 1) * lanes + n] << (32 - shift);
    return value & ((1u << bits) - 1);
}

/// w[k, n] = (code - zero) * scale, for a tile of features and a run of outputs.
extern "C" __global__ void dequantize(
    real_t* w,             // [in, out]
    const u32* qweight,    // [in * bits / 32, out]
    const u32* qzeros,     // [groups, out * bits / 32]
    const void* scales,    // [groups, out]: f16, or f32 where `wide`
    const u32* g_idx,      // [in]
    int in, int out, int bits, int zero_offset, int wide) {
    int n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= out) return;
    int first = blockIdx.y * 32, last = min(first + 32, in), seen = -1;
    float scale = 0.f, zero = 0.f;
    for (int k = first; k < last; k++) {
        int group = g_idx[k];
        if (group != seen) {
            seen = group;
            size_t place = (size_t)group * out + n;
            scale = wide ? ((const float*)scales)[place] : f16_to_float(((const f16_t*)scales)[place]);
            zero = (float)(code_at(qzeros + (size_t)group * (out * bits / 32), 1, 0, n, bits) + zero_offset);
        }
        w[(size_t)k * out + n] = to_real(((float)code_at(qweight, out, n, k, bits) - zero) * scale);
    }
}
