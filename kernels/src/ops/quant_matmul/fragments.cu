// Weights repacked once: for 16 outputs and a chunk of features, 16 bytes a lane, the codes in the order in which the
// tensor cores' left factor wants them. Of a gate and what it gates, a tile takes eight outputs each. Codes of 2 and 3 bits
// become codes of 4.

/// A lane's features of one chunk, and the chunk's: 16 of 64 with 4 bits, 8 of 32 with 8.
#define LANE_FEATURES(BITS) (64 / (BITS))
#define CHUNK_FEATURES(BITS) (256 / (BITS))

/// The file's output in row `row` of a tile; the products of gates may be wanted in an order.
__device__ __forceinline__ int output_of(int tile, int row, int out, int gated, const u32* result) {
    if (!gated) return tile * 16 + row;
    int place = tile * 8 + row % 8;
    return row / 8 * (out / 2) + (result ? result[place] : place);
}

/// Codes in fragment order. One thread a word.
extern "C" __global__ void repack_codes(
    u32* fragments,      // [out / 16, in / chunk, 32 lanes, 4 words], codes of `bits`
    const u32* qweight,  // [in * stored_bits / 32, out]
    const u32* order,    // [in]: feature at each place, groups in one run each
    int in, int out, int bits, int stored_bits, int gated,
    const u32* result) {     // [out / 2] or null: product at each place
    size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    int chunk_features = 256 / bits, chunks = in / chunk_features;
    if (index >= (size_t)(out / 16) * chunks * 128) return;
    int word = index % 4, lane = index / 4 % 32, chunk = index / 128 % chunks, tile = index / 128 / chunks;
    int features = 64 / bits, first = chunk * chunk_features + lane % 4 * features;
    int rows[2] = {output_of(tile, lane / 4, out, gated, result), output_of(tile, lane / 4 + 8, out, gated, result)};
    u32 packed = 0;
    if (bits == 4) {
        // Nibbles i and i + 4 are the two halves of register i: rows g, g + 8, g, g + 8, features in pairs.
        for (int i = 0; i < 8; i++) {
            int part = i % 4, k = first + word * 4 + part / 2 * 2 + i / 4;
            packed |= code_at(qweight, out, rows[part % 2], order[k], stored_bits) << (4 * i);
        }
    } else {
        for (int i = 0; i < 4; i++) {
            int k = first + word / 2 * 4 + word % 2 * 2 + i % 2;
            packed |= code_at(qweight, out, rows[i / 2], order[k], stored_bits) << (8 * i);
        }
    }
    fragments[index] = packed;
}

/// A scale and a zero point in one word: f16 bits, and the integer above them. Those of outputs g and g + 8 lie
/// side by side. One thread each.
extern "C" __global__ void repack_grids(
    u32* grids,           // [out / 16, groups, 8, 2]
    const f16_t* scales,  // [groups, out]
    const u32* qzeros,    // [groups, out * bits / 32]
    int groups, int out, int bits, int zero_offset, int gated, const u32* result) {
    int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= groups * out) return;
    int n = output_of(index / 16 / groups, index % 16 / 2 + index % 2 * 8, out, gated, result), group = index / 16 % groups;
    u32 zero = code_at(qzeros + (size_t)group * (out * bits / 32), 1, 0, n, bits) + zero_offset;
    grids[index] = scales[(size_t)group * out + n] | zero << 16;
}

/// w[row, place] = (code - zero) * scale from fragments, features in their order. A thread takes eight features of two
/// outputs, so that neighbours store side by side: half of a lane's 16 bytes with 4 bits, all of them with 8.
extern "C" __global__ void dequantize_fragments(
    real_t* w,              // [out, in]
    const uint2* fragments, // [out / 16, in / chunk, 32, 2]
    const u32* grids,       // [out / 16, groups, 8, 2]
    int in, int out, int bits, int group_size) {
    size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    int chunks = in / (256 / bits), groups = (in + group_size - 1) / group_size, parts = 8 / bits;
    if (index >= (size_t)(out / 16) * chunks * 32 * parts) return;
    int part = index % parts, lane = index / parts % 32, chunk = index / parts / 32 % chunks;
    int tile = index / parts / 32 / chunks, g = lane / 4, first = ((chunk * 4 + lane % 4) * parts + part) * 8;
    uint2 low = fragments[index * 2 / parts], high = bits == 8 ? fragments[index * 2 + 1] : low;
    u32 words[4] = {low.x, low.y, high.x, high.y};
    const u32* grid = grids + ((size_t)tile * groups + first / group_size) * 16 + 2 * g;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float scale = f16_to_float(grid[half] & 0xFFFF), zero = (float)(grid[half] >> 16), values[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            // Of four features with 4 bits in a word: pair i / 2 and its half i % 2.
            u32 code = bits == 4 ? words[i / 4] >> (4 * (i % 4 / 2 * 2 + half + i % 2 * 4)) & 15
                                 : words[i / 2] >> (8 * (2 * half + i % 2)) & 255;
            values[i] = ((float)code - zero) * scale;
        }
        store8(w + (size_t)(tile * 16 + g + 8 * half) * in + first, values);
    }
}
