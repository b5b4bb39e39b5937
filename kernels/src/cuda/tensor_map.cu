// Values that the copy engine of Hopper brings into shared memory, and rings of places for them.

#if HOPPER && !F32

/// How the driver describes `[rows, heads, head_dim]` values in boxes of some rows of 64 features of one head.
struct __align__(64) TensorMap {
    u64 words[16];
};

__device__ __forceinline__ void copy_box(u32 target, const TensorMap& map, int feature, int head, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
                 ::"r"(target), "l"((u64)&map), "r"(feature), "r"(head), "r"(row), "r"(barrier) : "memory");
}

/// A place of a ring of N, and the parity of the phase in which it is filled.
template <int N>
struct RingPlace {
    int index = 0;
    u32 parity = 0;

    __device__ __forceinline__ void next() {
        if (++index == N) index = 0, parity ^= 1;
    }
};

#endif
