// What a finished sweep has found, as the file holds it.

/// codes to the checkpoint's order of features: out[n, order[place]] = codes[n, place]
extern "C" __global__ void sweep_scatter(u8* out, const u8* codes, const u32* order, int in) {
    for (int i = threadIdx.x; i < in; i += blockDim.x)
        out[(size_t)blockIdx.x * in + order[i]] = codes[(size_t)blockIdx.x * in + i];
}

/// Words of the file from codes: word w of output n holds bits 32 w to 32 w + 31 of n's stream of codes.
extern "C" __global__ void pack_codes(
    u32* words,       // [in * bits / 32, rows]
    const u8* codes,  // [rows, in], checkpoint order
    int rows, int in, int bits) {
    int n = blockIdx.x * blockDim.x + threadIdx.x, w = blockIdx.y;
    if (n >= rows) return;
    const u8* row = codes + (size_t)n * in;
    u32 word = 0;
    for (int i = 32 * w / bits; i * bits < 32 * (w + 1) && i < in; i++) {
        int shift = i * bits - 32 * w;
        word |= shift >= 0 ? (u32)row[i] << shift : (u32)row[i] >> -shift;
    }
    words[(size_t)w * rows + n] = word;
}

/// The same for zero points, whose stored value lies `zero_offset` below; words of one group lie together.
extern "C" __global__ void pack_zeros(
    u32* words,       // [groups, rows * bits / 32]
    const u8* zeros,  // [groups, rows]
    int count, int rows, int bits, int zero_offset) {
    int w = blockIdx.x * blockDim.x + threadIdx.x, group = blockIdx.y;
    if (w >= count) return;
    u32 word = 0, mask = (1u << bits) - 1;
    for (int n = 32 * w / bits; n * bits < 32 * (w + 1) && n < rows; n++) {
        int shift = n * bits - 32 * w;
        u32 zero = ((u32)zeros[(size_t)group * rows + n] - zero_offset) & mask;
        word |= shift >= 0 ? zero << shift : zero >> -shift;
    }
    words[(size_t)group * count + w] = word;
}

/// Scales as the file holds them.
extern "C" __global__ void store_scales(f16_t* stored, const float* scales, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    f16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(scales[i]));
    stored[i] = bits;
}
