// The next token of every row of scores, by the arithmetic that mod.rs describes. Up to eight blocks, a cluster, share
// a row, each with the ids of one stretch. What is wanted is always a place in some order of the tokens: it is found
// digit by digit, by how many tokens, or how much weight, there is for each value of the digit.

#define SAMPLE_THREADS 1024
#define MOST_SHARES 8
/// Scores that a thread asks for at once.
#define SAMPLE_AHEAD 8
#define DIGIT_BITS 10
#define DIGITS (1 << DIGIT_BITS)
#define NO_KEY (~0ull)

/// As mod.rs has it for one row.
struct Draw {
    float rate;  // 0 for the likeliest token
    u32 top_k;
    float top_p, typical_p;
    u64 random;
    u32 first_change, changes;
};

struct Change {
    u32 id;
    float added, repeated;
    float logit;  // what it was before
};

/// What the host makes a log-probability of.
struct Found {
    float logit, largest, mass;
};

/// A block's part of a row.
struct Share {
    float* logits;  // [vocab]
    int from, to, share, shares;

    /// All blocks of the row are here, and see what the others wrote to their shared memory.
    __device__ __forceinline__ void meet() const {
#if HOPPER
        if (shares > 1) return cluster_sync();
#endif
        __syncthreads();
    }

    /// What a block of the row keeps at the place of `mine`.
    template <class T>
    __device__ __forceinline__ T of(const T* mine, int block) const {
#if HOPPER
        if (shares > 1) return read_of_block(mine, block);
#endif
        return *mine;
    }

    /// `visit(id, logit)` for all ids, by whole warps; beyond the last id nothing is there to visit.
    template <class Visit>
    __device__ __forceinline__ void each(Visit visit) const {
        for (int first = from + threadIdx.x / 32 * 32; first < to; first += SAMPLE_AHEAD * SAMPLE_THREADS) {
            float logit[SAMPLE_AHEAD];
#pragma unroll
            for (int i = 0; i < SAMPLE_AHEAD; i++) {
                int id = first + i * SAMPLE_THREADS + threadIdx.x % 32;
                logit[i] = id < to ? logits[id] : -INFINITY_F;
            }
#pragma unroll
            for (int i = 0; i < SAMPLE_AHEAD; i++) visit(first + i * SAMPLE_THREADS + threadIdx.x % 32, logit[i]);
        }
    }
};

/// Tokens and weight for each value of a digit, for two digits in turns: one is read while the other is cleared.
struct Tally {
    u64 weight[2][DIGITS];
    u32 count[2][DIGITS];
    u64 sums[32];
    u64 before;
    u32 digit, count_there;
};

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < INFINITY_F; }

__device__ __forceinline__ u64 warp_total(u64 x) {
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(FULL_WARP, x, offset);
    return x;
}

/// The largest key of a row, for all threads of its blocks. `slots` serve once.
__device__ u64 largest_key(const Share& row, u64* slots) {
    u64 key = 0;
    row.each([&](int id, float logit) {
        u64 next = is_finite(logit) ? top_key(logit, id) : 0;
        key = next > key ? next : key;
    });
    for (int offset = 16; offset > 0; offset >>= 1) {
        u64 other = __shfl_xor_sync(FULL_WARP, key, offset);
        key = other > key ? other : key;
    }
    if (threadIdx.x % 32 == 0) atomicMax(slots, key);
    row.meet();
    for (int i = 0; i < row.shares; i++) {
        u64 other = row.of(slots, i);
        key = other > key ? other : key;
    }
    return key;
}

/// sum_i exp(logit[i] - largest) over the row, for all threads. `slot` serves once.
__device__ float mass_of(const Share& row, float largest, float* slot) {
    float mass = 0.f, total = 0.f;
    row.each([&](int id, float logit) { mass += is_finite(logit) ? exp2_fast((logit - largest) * 1.44269504f) : 0.f; });
    mass = block_sum(mass);
    if (threadIdx.x == 0) *slot = mass;
    row.meet();
    for (int i = 0; i < row.shares; i++) total += row.of(slot, i);
    return total;
}

/// How many octaves, as an integer, a token is below the likeliest; `none` where it is never drawn. Products and sums
/// are rounded one by one, as on a processor.
__device__ __forceinline__ u32 shortfall_of(float largest, float logit, float rate, u32 none) {
    float octaves = __fmul_rn(__fsub_rn(largest, logit), rate);
    return octaves >= 0.f && octaves < (float)SAMPLE_OCTAVES ? (u32)(octaves * (float)(1 << SAMPLE_FRACTION_BITS)) : none;
}

/// 2^(40 - shortfall).
__device__ __forceinline__ u64 weight_of(u32 shortfall) {
    const float series[] = {SAMPLE_SERIES};
    float x = (float)(shortfall & ((1 << SAMPLE_FRACTION_BITS) - 1)) / (float)(1 << SAMPLE_FRACTION_BITS) - 0.5f;
    float power = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) power = __fadd_rn(__fmul_rn(power, x), series[i]);
    return ((u64)(u32)(power * 16777216.f) << 16) >> (shortfall >> SAMPLE_FRACTION_BITS);
}

__device__ __forceinline__ u64 key_of(u32 order, int id) { return (u64)order << SAMPLE_ID_BITS | (u32)id; }

/// Counts, and weighs unless COUNTED, the keys that begin with `prefix`, by the digit that ends at `shift`.
/// `visit(id, logit, shortfall)` gives a token's key, or none.
template <bool COUNTED, class Visit>
__device__ void tally_digit(Tally& tally, int turn, const Share& row, int shift, u64 prefix, Visit visit) {
    row.each([&](int id, float logit) {
        u32 shortfall = 0;
        u64 key = visit(id, logit, shortfall);
        bool member = key >> (shift + DIGIT_BITS) == prefix;
        u32 members = __ballot_sync(FULL_WARP, member);
        if (!members) return;
        u32 digit = (u32)(key >> shift) & (DIGITS - 1);
        u64 weight = COUNTED || !member ? 0 : weight_of(shortfall);
        u32 first = __shfl_sync(FULL_WARP, digit, __ffs(members) - 1);
        // Neighbours often go to one place: one addition instead of 32 that wait for each other.
        bool together = __all_sync(FULL_WARP, !member || digit == first);
        if (together && !COUNTED) weight = warp_total(weight);
        if (together ? threadIdx.x % 32 != 0 : !member) return;
        atomicAdd(&tally.count[turn][together ? first : digit], together ? __popc(members) : 1);
        if (!COUNTED) atomicAdd(&tally.weight[turn][together ? first : digit], weight);
    });
}

/// The sum up to each thread's number, in the order of threads.
__device__ u64 sum_up_to(u64 x, u64* sums) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto in_warp = [&](u64 x) {
        for (int offset = 1; offset < 32; offset <<= 1) {
            u64 before = __shfl_up_sync(FULL_WARP, x, offset);
            if (lane >= offset) x += before;
        }
        return x;
    };
    x = in_warp(x);
    if (lane == 31) sums[warp] = x;
    __syncthreads();
    if (warp == 0) sums[lane] = in_warp(sums[lane]);
    __syncthreads();
    return warp > 0 ? x + sums[warp - 1] : x;
}

/// The keys below the result are the fewest first ones that together reach a target: a number of tokens where they are
/// COUNTED, otherwise weight. `target(all)` is asked once; all keys where it is more than there is. EXACT: the
/// result is the last key and one. Keys have `digits` digits.
template <bool COUNTED, bool EXACT, class Target, class Visit>
__device__ u64 search(Tally& tally, int& turn, const Share& row, int digits, Target target_of, Visit visit) {
    u64 prefix = 0, before = 0, target = 0;
    for (int shift = DIGIT_BITS * (digits - 1);; shift -= DIGIT_BITS) {
        tally_digit<COUNTED>(tally, turn, row, shift, prefix, visit);
        row.meet();
        u32 count = 0;
        u64 weight = 0;
        for (int i = 0; i < row.shares; i++) {
            count += row.of(&tally.count[turn][threadIdx.x], i);
            weight += row.of(&tally.weight[turn][threadIdx.x], i);
        }
        // All blocks have read those of the digit before.
        turn ^= 1;
        tally.count[turn][threadIdx.x] = 0, tally.weight[turn][threadIdx.x] = 0;
        u64 here = COUNTED ? count : weight, up_to = sum_up_to(here, tally.sums), all = tally.sums[31];
        if (target == 0) target = target_of(all);
        if (before + all < target) return NO_KEY;
        if (before + up_to >= target && before + up_to - here < target)
            tally.digit = threadIdx.x, tally.before = before + up_to - here, tally.count_there = count;
        __syncthreads();
        prefix = prefix << DIGIT_BITS | tally.digit;
        before = tally.before;
        if (shift == 0 || (!EXACT && tally.count_there == 1)) return (prefix + 1) << shift;
    }
}

/// The mean of shortfalls over the weights of what `visit` gives a key.
template <class Visit>
__device__ u32 expected_shortfall(const Share& row, u64 (&slots)[2], Visit visit) {
    u64 sum = 0, mass = 0;
    row.each([&](int id, float logit) {
        u32 shortfall = 0;
        if (visit(id, logit, shortfall) == NO_KEY) return;
        u64 weight = weight_of(shortfall);
        mass += weight;
        sum += (weight >> 16) * (shortfall >> (SAMPLE_FRACTION_BITS - 15));
    });
    __syncwarp();
    mass = warp_total(mass), sum = warp_total(sum);
    if (threadIdx.x % 32 == 0) atomicAdd(&slots[0], sum), atomicAdd(&slots[1], mass);
    row.meet();
    sum = mass = 0;
    for (int i = 0; i < row.shares; i++) sum += row.of(&slots[0], i), mass += row.of(&slots[1], i);
    return (u32)(sum / (mass >> 16)) << (SAMPLE_FRACTION_BITS - 15);
}

/// The id that is drawn among tokens whose largest logit is `largest`.
__device__ u32 drawn_id(Tally& tally, u64 (&slots)[2], const Share& row, const Draw& draw, float largest) {
    constexpr int KEY_DIGITS = 5, ID_DIGITS = 2;
    int turn = 0;
    u64 end = NO_KEY, typical_end = NO_KEY;
    u32 expected = 0;
    auto likelier = [&](int id, float logit, u32& shortfall) {
        u32 none = 0xFFFFFFFFu;
        shortfall = shortfall_of(largest, logit, draw.rate, none);
        u64 key = key_of(shortfall, id);
        return shortfall != none && key < end ? key : NO_KEY;
    };
    auto share = [](float part) { return [=](u64 all) { return max((u64)ceil((double)all * (double)part), 1ull); }; };
    if (draw.top_k) {
        auto count = [&](u64) { return (u64)draw.top_k; };
        end = search<true, false>(tally, turn, row, KEY_DIGITS, count, likelier);
    }
    // Below what top_k left: the smaller of two ends.
    if (draw.top_p < 1.f) end = min(end, search<false, false>(tally, turn, row, KEY_DIGITS, share(draw.top_p), likelier));
    auto usual = [&](int id, float logit, u32& shortfall) {
        if (likelier(id, logit, shortfall) == NO_KEY) return NO_KEY;
        u64 key = key_of(shortfall > expected ? shortfall - expected : expected - shortfall, id);
        return key < typical_end ? key : NO_KEY;
    };
    bool typical = draw.typical_p < 1.f;
    if (typical) {
        expected = expected_shortfall(row, slots, likelier);
        typical_end = search<false, false>(tally, turn, row, KEY_DIGITS, share(draw.typical_p), usual);
    }
    auto in_order = [&](int id, float logit, u32& shortfall) {
        u64 key = typical ? usual(id, logit, shortfall) : likelier(id, logit, shortfall);
        return key == NO_KEY ? NO_KEY : (u64)id;
    };
    auto place = [&](u64 all) { return __umul64hi(draw.random, all) + 1; };
    return (u32)search<false, true>(tally, turn, row, ID_DIGITS, place, in_order) - 1;
}

/// A logit after its change.
__device__ __forceinline__ float changed(float logit, const Change& change) {
    logit = __fadd_rn(logit, change.added);
    if (change.repeated == 1.f) return logit;
    return logit > 0.f ? __fdiv_rn(logit, change.repeated) : __fmul_rn(logit, change.repeated);
}

/// `each(change, logit)` for the changes to ids of this block; then all of it see what was done.
template <class Each>
__device__ void for_own(const Share& row, const Draw& draw, Change* changes, Each each) {
    for (u32 i = threadIdx.x; i < draw.changes; i += SAMPLE_THREADS) {
        Change& change = changes[draw.first_change + i];
        if ((int)change.id >= row.from && (int)change.id < row.to) each(change, row.logits[change.id]);
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS) sample(
    u32* ids,           // [rows]: the largest number where no score is finite
    Found* found,       // [rows]
    float* logits,      // [rows, vocab]: as they were in the end
    const Draw* draws,  // [rows], or null: the likeliest everywhere
    Change* changes,    // those of all rows
    int vocab) {
    __shared__ Tally tally;
    __shared__ u64 keys[2], means[2];
    __shared__ float mass_slot;
    int number = blockIdx.x, shares = gridDim.y, share = blockIdx.y;
    Share row{logits + (size_t)number * vocab, (int)((long long)vocab * share / shares),
              (int)((long long)vocab * (share + 1) / shares), share, shares};
    for (int turn = 0; turn < 2; turn++) tally.count[turn][threadIdx.x] = 0, tally.weight[turn][threadIdx.x] = 0;
    if (threadIdx.x < 2) keys[threadIdx.x] = means[threadIdx.x] = 0;
    __syncthreads();
    start_next_early();
    await_previous();
    Draw draw = draws ? draws[number] : Draw{};
    u64 key = largest_key(row, &keys[0]);
    float largest = top_logit(key), mass = mass_of(row, largest, &mass_slot);
    // Every block changes its own ids, and puts back what was there.
    for_own(row, draw, changes, [](Change& change, float& logit) { change.logit = logit, logit = changed(logit, change); });
    if (key && draw.changes) key = largest_key(row, &keys[1]);
    u32 id = key ? ~(u32)key : 0xFFFFFFFFu;
    if (key && draw.rate > 0.f) id = drawn_id(tally, means, row, draw, top_logit(key));
    for_own(row, draw, changes, [](Change& change, float& logit) { logit = change.logit; });
    bool here = key != 0 ? (int)id >= row.from && (int)id < row.to : share == 0;
    if (here && threadIdx.x == 0) {
        ids[number] = id;
        if (key) found[number] = Found{row.logits[id], largest, mass};
    }
    // Nobody ends while others read its memory.
    row.meet();
}
