// The Hessian's lower triangle on Hopper: H += X^T X over tokens. The two blocks of a cluster make a tile of 256 x 256, 128
// rows each, and share the columns' features: each copies half of them into the memory of both. One warp copies, two warp
// groups multiply 64 rows each by `wgmma`, which reads both factors the way they are stored, token by token.
//
// A cluster makes one whole tile after another while there are enough of them for all. The rest is divided evenly by
// steps of tokens, so that all clusters end together: a tile's steps may then belong to several neighbours. They add their
// sums in a fixed order, the last steps first, so that the same tokens always make the same bits. The last steps of a tile
// are the first part of the rest that a cluster makes, so that it waits for no one who waits for it.

#if HOPPER && !F32

/// Rows and columns of a cluster's tile, tokens of a step, steps that have room.
#define MOMENT_TILE 256
#define MOMENT_TOKENS 64
#define MOMENT_STAGES 4
/// Rows of tiles that are gone through together, so that what they multiply stays in the GPU's cache.
#define MOMENT_BAND 8
/// Bytes of 64 features of a step's tokens, and of a step: two panels of a block's own rows, then four of the columns.
#define MOMENT_PANEL (MOMENT_TOKENS * 128)
#define MOMENT_STAGE (6 * MOMENT_PANEL)
#define MOST_MOMENT_TILES 16384

/// Steps of tokens whose sums both blocks have added, for tiles that several clusters make; zeros between launches.
__device__ u32 moment_steps_added[MOST_MOMENT_TILES];

/// d (+)= a^T b: 64 rows and 256 columns, 16 tokens of both in shared memory.
__device__ __forceinline__ void multiply_features(float (&d)[128], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32." PAIR " " R128 ", %128, %129, p, 1, 1, 1, 1;\n}"
                 : D32(d, 0), D32(d, 32), D32(d, 64), D32(d, 96) : "l"(a), "l"(b), "r"(add));
}

struct MomentCall {
    float* hessian;
    /// Features, and steps of tokens.
    int size, steps;
    /// Tiles, and how many of them belong to one cluster each.
    int tiles, whole;
};

/// Some steps of a tile: which, its first row and column, and the steps.
struct MomentPart {
    int tile, row, column, begin, end;
};

/// What one cluster makes, part by part.
struct MomentParts {
    const MomentCall& call;
    /// The next whole tile; and what of the rest's steps is the cluster's.
    int tile, next, end;

    __device__ __forceinline__ MomentParts(const MomentCall& call) : call(call) {
        int cluster = blockIdx.x, clusters = gridDim.x;
        long long rest = (long long)(call.tiles - call.whole) * call.steps;
        tile = cluster, next = rest * cluster / clusters, end = rest * (cluster + 1) / clusters;
    }

    __device__ __forceinline__ bool take(MomentPart& part) {
        if (tile < call.whole) {
            part.tile = tile, part.begin = 0, part.end = call.steps;
            tile += gridDim.x;
        } else {
            if (next >= end) return false;
            int of_rest = next / call.steps, first = of_rest * call.steps;
            part.tile = call.whole + of_rest, part.begin = next - first, part.end = min(end - first, call.steps);
            next = first + part.end;
        }
        place(part);
        return true;
    }

    /// Tiles are counted band by band; in a band column by column, from its top or the diagonal down.
    __device__ __forceinline__ void place(MomentPart& part) const {
        int at = part.tile, rows = (call.size + MOMENT_TILE - 1) / MOMENT_TILE, band = 0, high;
        for (;; band += MOMENT_BAND) {
            high = min(MOMENT_BAND, rows - band);
            int tiles = band * high + high * (high + 1) / 2;
            if (at < tiles) break;
            at -= tiles;
        }
        int column = at / high;
        if (at < band * high) {
            at %= high;
        } else {
            at -= band * high;
            for (column = 0; at >= high - column; column++) at -= high - column;
            at += column, column += band;
        }
        part.row = (band + at) * MOMENT_TILE, part.column = column * MOMENT_TILE;
    }
};

/// 64 features of a step's tokens into the memory of both blocks, whose barriers are told.
__device__ __forceinline__ void copy_to_both(u32 target, const TensorMap& x, int feature, int token, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%2, %3, %4}], [%5], %6;"
                 ::"r"(target), "l"((u64)&x), "r"(feature), "r"(0), "r"(token), "r"(barrier), "h"((short)3) : "memory");
}

/// Arrives at the barrier that is at this place in each of the blocks. It orders no memory: what frees a stage has read it
/// by `wgmma` alone.
__device__ __forceinline__ void arrive_at_both(u32 barrier) {
#pragma unroll
    for (int block = 0; block < 2; block++)
        asm volatile("{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                     "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(block) : "memory");
}

__device__ __forceinline__ void copy_parts(u32 ring, u32 full, u32 empty, MomentParts parts, const TensorMap& x) {
    RingPlace<MOMENT_STAGES> place;
    for (MomentPart part; parts.take(part);) {
        for (int step = part.begin; step < part.end; step++) {
            u32 stage = ring + place.index * MOMENT_STAGE, there = full + 8 * place.index;
            int token = step * MOMENT_TOKENS;
            barrier_wait(empty + 8 * place.index, place.parity ^ 1);
            barrier_expect(there, MOMENT_STAGE);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int panel = 2 * blockIdx.y + i;
                copy_box(stage + i * MOMENT_PANEL, x, part.row + 64 * panel, 0, token, there);
                copy_to_both(stage + (2 + panel) * MOMENT_PANEL, x, part.column + 64 * panel, token, there);
            }
            place.next();
        }
    }
}

/// Adds the sums of a part once both blocks have added those of the tile's later steps.
__device__ __forceinline__ void add_sums(const float (&sum)[128], const MomentCall& call, const MomentPart& part) {
    int thread = threadIdx.x - 128, lane = thread % 32, row = part.row + 128 * blockIdx.y + thread / 32 * 16 + lane / 4;
    u32* added = moment_steps_added + part.tile;
    if (part.end < call.steps) {
        u32 wanted = 2 * (call.steps - part.end), seen;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(added) : "memory");
        while (seen < wanted);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (row + 8 * h >= call.size) continue;
        float* target = call.hessian + (size_t)(row + 8 * h) * call.size;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            int column = part.column + i * 8 + lane % 4 * 2;
            if (column < call.size)
                asm volatile("red.global.add.v2.f32 [%0], {%1, %2};"
                             ::"l"(target + column), "f"(sum[4 * i + 2 * h]), "f"(sum[4 * i + 2 * h + 1]) : "memory");
        }
    }
    if (part.begin == 0 && part.end == call.steps) return;
    __threadfence();
    asm volatile("bar.sync 1, 256;" ::: "memory");
    if (thread > 0) return;
    u32 steps = part.end - part.begin;
    // Of the two blocks that add the first steps, the later one leaves zeros for the next launch.
    if (atomicAdd(added, steps) + steps == 2 * call.steps) atomicExch(added, 0);
}

__device__ __forceinline__ void multiply_parts(u32 ring, u32 full, u32 empty, MomentParts parts) {
    RingPlace<MOMENT_STAGES> place, before;
    int group = threadIdx.x / 128 - 1;
    bool releases = threadIdx.x % 128 == 0;
    float sum[128];
    for (MomentPart part; parts.take(part);) {
        for (int step = part.begin; step < part.end; step++) {
            barrier_wait(full + 8 * place.index, place.parity);
            u32 own = ring + place.index * MOMENT_STAGE + group * MOMENT_PANEL;
            u32 columns = ring + place.index * MOMENT_STAGE + 2 * MOMENT_PANEL;
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < MOMENT_TOKENS / 16; i++)
                multiply_features(sum, matrix(own + i * 16 * 128, MOMENT_PANEL), matrix(columns + i * 16 * 128, MOMENT_PANEL),
                                  step > part.begin || i > 0);
            wgmma_commit();
            // The step before has read its stage.
            wgmma_wait<1>();
            if (releases && step > part.begin) arrive_at_both(empty + 8 * before.index);
            before = place;
            place.next();
        }
        wgmma_wait<0>();
        if (releases) arrive_at_both(empty + 8 * before.index);
        add_sums(sum, parts.call, part);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    hessian_hopper(float* hessian, const __grid_constant__ TensorMap x, int size, int tokens, int tiles, int whole) {
    extern __shared__ u8 moment_stages[];
    __shared__ u64 barriers[2 * MOMENT_STAGES];
    u32 full = shared_address(barriers), empty = full + 8 * MOMENT_STAGES;
    u32 ring = (shared_address(moment_stages) + 1023) & ~1023u;
    MomentCall call = {hessian, size, (tokens + MOMENT_TOKENS - 1) / MOMENT_TOKENS, tiles, whole};
    if (threadIdx.x == 0) {
        for (int i = 0; i < MOMENT_STAGES; i++) {
            barrier_init(full + 8 * i, 1);
            // By two warp groups of each block.
            barrier_init(empty + 8 * i, 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
    MomentParts parts(call);
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) copy_parts(ring, full, empty, parts, x);
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        multiply_parts(ring, full, empty, parts);
        __syncwarp();
    }
    // A block must not end while the other arrives at its barriers.
    cluster_sync();
}

#endif
