// What `hopper.cu` attends to comes into shared memory: which tile of queries a block takes next, its queries, and the keys
// and values that they see.

#if HOPPER && !F32

/// Query rows of a block, keys of a tile, and tiles of each kind that have room.
#define ROWS 128
#define KEYS 128
#define STAGES 2
#define COPIERS 128
#define MULTIPLIERS 256
/// Bytes of 64 features of a tile: rows of 128 bytes, their 16-byte pieces permuted by the row's last three bits.
#define PANEL (128 * 128)
/// Rows that one instruction copies.
#define BOX KV_BLOCK_ROWS

struct AttentionCall {
    Batch batch;
    int heads, kv_heads, window, tiles, sequences, together;
};

/// A tile of queries and the tiles of keys that they see. The longest come first; `together` heads, whose keys and values
/// fit the GPU's cache, are gone through before the next ones.
struct QueryTile {
    int sequence, head, start, rows, context, length, kv_first, count;

    __device__ __forceinline__ QueryTile(const AttentionCall& call, int item) {
        int of_sequence = call.heads * call.tiles;
        sequence = item / of_sequence;
        int rest = item % of_sequence, first_head = rest / (call.together * call.tiles) * call.together;
        int heads = min(call.together, call.heads - first_head);
        rest -= first_head * call.tiles;
        head = first_head + rest % heads;
        rows = call.batch.rows[sequence], context = call.batch.context[sequence];
        int tile = (rows + ROWS - 1) / ROWS - 1 - rest / heads;
        start = tile * ROWS;
        length = context + min(rows, start + ROWS);
        kv_first = (call.window > 0 ? max(0, context + start + 1 - call.window) : 0) / KEYS;
        count = tile < 0 ? 0 : (length - 1) / KEYS - kv_first + 1;
    }

    /// The first key of the tile that comes as number `n`: the last tile first, which has the diagonal, so that all rows see
    /// something in it.
    __device__ __forceinline__ int first_key(int n) const { return (kv_first + count - 1 - n) * KEYS; }
};

/// A ring's barriers: what is there, and what may be filled again.
struct Ring {
    u32 full, empty;
};

struct Memory {
    u32 q_tiles, k_tiles, v_tiles;
    Ring q, k, v, item;
    int* items;
};

/// Items that blocks have taken beyond their first, and blocks that are through; zeros between two kernels.
__device__ u32 attention_items[2];

/// The number of a block's next item is read while it copies the one before.
struct Items {
    int next = blockIdx.x;
    RingPlace<2> place;

    __device__ __forceinline__ int take(const Memory& memory, int lane) {
        int item = next;
        barrier_wait(memory.item.empty + 8 * place.index, place.parity ^ 1);
        if (lane == 0) {
            memory.items[place.index] = item;
            barrier_arrive(memory.item.full + 8 * place.index);
            next = gridDim.x + atomicAdd(&attention_items[0], 1);
        }
        place.next();
        return item;
    }

    __device__ __forceinline__ void end() const {
        __threadfence();
        if (atomicAdd(&attention_items[1], 1) == gridDim.x - 1) attention_items[0] = attention_items[1] = 0;
    }
};

/// The block's next item, for all warps but the one that takes it.
__device__ __forceinline__ int next_item(const Memory& memory, RingPlace<2>& place) {
    barrier_wait(memory.item.full + 8 * place.index, place.parity);
    int item = memory.items[place.index];
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(memory.item.empty + 8 * place.index);
    place.next();
    return item;
}

/// A tile of `count` rows; a lane has the first row of its box.
template <int D>
__device__ __forceinline__ void copy_tile(u32 target, const TensorMap& map, int head, int row, int count, u32 barrier) {
    constexpr int PANELS = D / 64;
    int lane = threadIdx.x % 32, box = lane / PANELS, boxes = min(KEYS / BOX, (count + BOX - 1) / BOX);
    if (lane == 0) barrier_expect(barrier, boxes * BOX * D * 2);
    if (box < boxes)
        copy_box(target + lane % PANELS * PANEL + box * BOX * 128, map, lane % PANELS * 64, head, row, barrier);
}

/// The keys or the values that a tile of queries sees.
template <int D>
__device__ __forceinline__ void copy_keys(const Ring& ring, u32 tiles, RingPlace<STAGES>& place, const TensorMap& map,
                                          const AttentionCall& call, const QueryTile& tile) {
    const Batch& batch = call.batch;
    const u32* table = batch.table ? batch.table + batch.table_start[tile.sequence] : 0;
    int box = threadIdx.x % 32 / (D / 64), head = tile.head / (call.heads / call.kv_heads);
    int row = table ? 0 : batch.first_row[tile.sequence] + box * BOX;
    for (int n = 0; n < tile.count; n++) {
        int first = tile.first_key(n), count = tile.length - first;
        int from = !table ? row + first : box * BOX < min(KEYS, count) ? table[first / BOX + box] * BOX : 0;
        barrier_wait(ring.empty + 8 * place.index, place.parity ^ 1);
        copy_tile<D>(tiles + place.index * (D / 64 * PANEL), map, head, from, count, ring.full + 8 * place.index);
        place.next();
    }
}

template <int D>
__device__ __forceinline__ void copy_queries_and_keys(const Memory& memory, const AttentionCall& call, const TensorMap& q,
                                                      const TensorMap& k) {
    int lane = threadIdx.x % 32, all = call.sequences * call.heads * call.tiles;
    Items items;
    RingPlace<STAGES> place;
    RingPlace<STAGES> q_place;
    for (;;) {
        int item = items.take(memory, lane);
        if (item >= all) break;
        QueryTile tile(call, item);
        if (tile.count > 0) {
            int row = call.batch.first_row[tile.sequence] + tile.start + lane / (D / 64) * BOX;
            int at = q_place.index;
            barrier_wait(memory.q.empty + 8 * at, q_place.parity ^ 1);
            copy_tile<D>(memory.q_tiles + at * (D / 64 * PANEL), q, tile.head, row, tile.rows - tile.start,
                         memory.q.full + 8 * at);
            q_place.next();
            copy_keys<D>(memory.k, memory.k_tiles, place, k, call, tile);
        }
        items.next = __shfl_sync(FULL_WARP, items.next, 0);
    }
    if (lane == 0) items.end();
}

template <int D>
__device__ __forceinline__ void copy_values(const Memory& memory, const AttentionCall& call, const TensorMap& v) {
    int all = call.sequences * call.heads * call.tiles;
    RingPlace<STAGES> place;
    RingPlace<2> item_place;
    for (;;) {
        int item = next_item(memory, item_place);
        if (item >= all) break;
        copy_keys<D>(memory.v, memory.v_tiles, place, v, call, QueryTile(call, item));
    }
}

#endif
