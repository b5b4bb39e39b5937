// Looking for places in an order of the tokens of a row of scores, of which up to eight blocks, a cluster, have a
// stretch of ids each. A place is found digit by digit, by how many tokens, or how much weight, there is for each value
// of the digit; where its first digit leaves few tokens, every block gets all of them.

#define SAMPLE_THREADS 1024
/// Scores that a thread asks for at once.
#define SAMPLE_AHEAD 8
#define DIGIT_BITS 10
#define DIGITS (1 << DIGIT_BITS)
#define KEY_DIGITS 5
#define NO_KEY (~0ull)
/// So many tokens are few.
#define FEW_TOKENS 256

/// A block's part of a row.
struct Share {
    float* logits;  // [vocab]
    int from, to, shares;  // the ids of this block, and the blocks of the row

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

/// Something that is looked for in the order of keys: those before have less than is wanted, and with the ones that
/// begin with `prefix` it is reached.
struct Place {
    int shift;  // of the prefix's last digit
    u32 count;  // tokens that begin so
    u64 prefix, before, target;
    u64 one;  // where there is one token, its key

    __device__ __forceinline__ static Place anywhere() { return {DIGIT_BITS * KEY_DIGITS, ~0u, 0, 0, 0, 0}; }
};

/// Tokens, weight, a word each for its halves, and one of the keys for each value of a digit; for two digits in turns:
/// one is read while the other is cleared.
struct Tally {
    u64 key[2][DIGITS];
    u32 low[2][DIGITS], high[2][DIGITS], count[2][DIGITS];
    u64 sums[32];
    Place place;

    /// Sums of 64 bits are added in a loop of tries, those of 32 are not.
    __device__ __forceinline__ void add(int turn, u32 digit, u64 some_key, u32 tokens, u64 weight) {
        key[turn][digit] = some_key;
        atomicAdd(&count[turn][digit], tokens);
        if (!weight) return;
        u32 part = (u32)weight, carry = atomicAdd(&low[turn][digit], part) > ~part;
        if (u32 rest = (u32)(weight >> 32) + carry) atomicAdd(&high[turn][digit], rest);
    }

    __device__ __forceinline__ void clear(int turn) {
        count[turn][threadIdx.x] = low[turn][threadIdx.x] = high[turn][threadIdx.x] = 0;
    }
};

/// Tokens that every block of the row has.
struct Few {
    u64 keys[FEW_TOKENS], weights[FEW_TOKENS];
    u64 own[FEW_TOKENS];  // those of this block
    u32 own_count, sampled;
};

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < INFINITY_F; }

__device__ __forceinline__ u64 warp_total(u64 x) {
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(FULL_WARP, x, offset);
    return x;
}

/// The largest key of this block's part, for all its threads. `slot` is 0 before.
__device__ u64 own_largest_key(const Share& row, u64* slot) {
    u64 key = 0;
    row.each([&](int id, float logit) {
        u64 next = is_finite(logit) ? top_key(logit, id) : 0;
        key = next > key ? next : key;
    });
    for (int offset = 16; offset > 0; offset >>= 1) {
        u64 other = __shfl_xor_sync(FULL_WARP, key, offset);
        key = other > key ? other : key;
    }
    if (threadIdx.x % 32 == 0) atomicMax(slot, key);
    __syncthreads();
    return *slot;
}

__device__ __forceinline__ float exp_of(float x) { return exp2_fast(x * 1.44269504f); }

/// The largest key of the row and sum_i exp(logit[i] - largest), for all threads of its blocks.
__device__ u64 largest_and_mass(const Share& row, u64* key_slot, float* mass_slot, float& mass) {
    float own = top_logit(own_largest_key(row, key_slot)), sum = 0.f;
    row.each([&](int id, float logit) { sum += is_finite(logit) ? exp_of(logit - own) : 0.f; });
    sum = block_sum(sum);
    if (threadIdx.x == 0) *mass_slot = sum;
    row.meet();
    u64 key = 0;
    for (int i = 0; i < row.shares; i++) key = max(key, row.of(key_slot, i));
    mass = 0.f;
    for (int i = 0; i < row.shares; i++)
        if (u64 other = row.of(key_slot, i)) mass += row.of(mass_slot, i) * exp_of(top_logit(other) - top_logit(key));
    return key;
}

/// The largest key of the row, for all threads of its blocks.
__device__ u64 largest_key(const Share& row, u64* slot) {
    u64 key = own_largest_key(row, slot);
    row.meet();
    for (int i = 0; i < row.shares; i++) key = max(key, row.of(slot, i));
    return key;
}

/// How many octaves, as an integer, a token is below the likeliest; `none` where it is never drawn. Products and sums
/// are rounded one by one, as on a processor.
__device__ __forceinline__ u32 shortfall_of(float largest, float logit, float rate, u32 none) {
    float octaves = __fmul_rn(__fsub_rn(largest, logit), rate);
    bool weighs = octaves >= 0.f && octaves < (float)SAMPLE_OCTAVES;
    return weighs ? (u32)(octaves * (float)(1 << SAMPLE_FRACTION_BITS)) : none;
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
        u64 first_key = __shfl_sync(FULL_WARP, key, __ffs(members) - 1);
        if (together) {
            if (threadIdx.x % 32 == 0) tally.add(turn, first, first_key, __popc(members), weight);
        } else if (member) {
            tally.add(turn, digit, key, 1, weight);
        }
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

/// Finds the next digit of a place, tokens being counted where they are COUNTED and weighed otherwise: `count` is how
/// many have the thread's own value of it. `target_of(all)` is asked first; false where that is more than there is.
template <bool COUNTED, class Target, class Visit>
__device__ bool next_digit(Tally& tally, int& turn, const Share& row, Place& place, u32& count, Target target_of,
                           Visit visit) {
    int digit = threadIdx.x, shift = place.shift - DIGIT_BITS;
    tally_digit<COUNTED>(tally, turn, row, shift, place.prefix, visit);
    row.meet();
    u64 weight = 0, key = 0;
    count = 0;
    for (int i = 0; i < row.shares; i++) {
        u32 there = row.of(&tally.count[turn][digit], i);
        if (there) key = row.of(&tally.key[turn][digit], i);
        count += there;
        weight += row.of(&tally.low[turn][digit], i) + ((u64)row.of(&tally.high[turn][digit], i) << 32);
    }
    // All blocks have read those of the digit before.
    turn ^= 1;
    tally.clear(turn);
    u64 here = COUNTED ? count : weight, up_to = sum_up_to(here, tally.sums), all = tally.sums[31];
    if (!place.target) place.target = target_of(all);
    if (place.before + all < place.target) return false;
    up_to += place.before;
    if (up_to >= place.target && up_to - here < place.target)
        tally.place = Place{shift, count, place.prefix << DIGIT_BITS | digit, up_to - here, place.target, key};
    __syncthreads();
    place = tally.place;
    return true;
}

/// The keys below the result are the fewest first ones that together reach a target, the largest of them being one
/// less; all keys where it is more than there is.
template <bool COUNTED, class Target, class Visit>
__device__ u64 search(Tally& tally, int& turn, const Share& row, Place place, Target target_of, Visit visit) {
    u32 count;
    while (place.shift > 0 && place.count > 1)
        if (!next_digit<COUNTED>(tally, turn, row, place, count, target_of, visit)) return NO_KEY;
    return (place.count == 1 ? place.one : place.prefix) + 1;
}

/// Gives every block the tokens up to the value of the first digit with which a target is reached; no tokens where
/// those are not few.
template <bool COUNTED, class Target, class Visit>
__device__ u32 find_few(Few& few, Tally& tally, int& turn, const Share& row, Place& place, Target target_of,
                        Visit visit) {
    if (threadIdx.x == 0) few.own_count = 0;
    u32 count;
    bool reached = next_digit<COUNTED>(tally, turn, row, place, count, target_of, visit);
    u32 digit = reached ? (u32)place.prefix : DIGITS - 1;
    sum_up_to(threadIdx.x <= digit ? count : 0, tally.sums);
    u32 all = (u32)tally.sums[31];
    if (all > FEW_TOKENS) return 0;
    row.each([&](int id, float logit) {
        u32 shortfall;
        u64 key = visit(id, logit, shortfall);
        if (key >> (DIGIT_BITS * (KEY_DIGITS - 1)) <= digit) few.own[atomicAdd(&few.own_count, 1)] = key;
    });
    row.meet();
    for (int i = 0, first = 0; i < row.shares; i++) {
        int there = row.of(&few.own_count, i);
        for (int j = threadIdx.x; j < there; j += SAMPLE_THREADS) few.keys[first + j] = row.of(&few.own[j], i);
        first += there;
    }
    __syncthreads();
    return all;
}

/// Bits that are cut off the weights of a mass, so that the sum of shortfalls has room.
__device__ __forceinline__ int cut_of(u64 mass) { return max(63 - __clzll(mass) - 32, 0); }

/// The sum of `value(shortfall)` over what `visit` gives a key, in all blocks of the row. `slot` is 0 before.
template <class Visit, class Value>
__device__ u64 sum_of(const Share& row, u64* slot, Visit visit, Value value) {
    u64 sum = 0;
    row.each([&](int id, float logit) {
        u32 shortfall;
        if (visit(id, logit, shortfall) != NO_KEY) sum += value(shortfall);
    });
    __syncwarp();
    sum = warp_total(sum);
    if (threadIdx.x % 32 == 0) atomicAdd(slot, sum);
    row.meet();
    sum = 0;
    for (int i = 0; i < row.shares; i++) sum += row.of(slot, i);
    return sum;
}
