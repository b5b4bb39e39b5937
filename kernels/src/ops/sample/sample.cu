// The next token of every row of scores, by the arithmetic that mod.rs describes. What is wanted is always a place in
// some order of the tokens. Where few tokens are left, every block of a row has all of them and goes on alone.

/// As mod.rs has it for one row.
struct RowSampling {
    float rate;  // 0 for the likeliest token
    u32 top_k;
    float top_p, typical_p;
    u64 random;
    u32 first_change, changes;
    u32 farthest;  // the largest shortfall that min_p keeps
};

struct Change {
    u32 id;
    float added, repeated;
};

/// What the host makes a log-probability of.
struct Found {
    float logit, largest, mass;
};

/// The weight that has to be reached for a share of `all`.
__device__ __forceinline__ u64 part_of(u64 all, float share) {
    return max((u64)ceil((double)all * (double)share), 1ull);
}

/// What few tokens weigh, and those that come before `own` in an order; and how many these are.
template <class Order>
__device__ __forceinline__ u64 weigh(const Few& few, u32 count, u64 own, u64& before, u32& rank, Order order) {
    u64 all = 0;
    before = 0, rank = 0;
    __syncthreads();
    // Those without a token wait.
    if (threadIdx.x >= FEW_TOKENS) count = 0;
    for (u32 i = 0; i < count; i++) {
        u64 weight = few.weights[i];
        bool earlier = order(few.keys[i]) < own;
        all += weight;
        before += earlier ? weight : 0;
        rank += earlier;
    }
    __syncthreads();
    return all;
}

/// The id that is drawn among few tokens, a thread for each. `target`: the weight that top_p wants where there is no
/// top_k.
__device__ u32 sampled_of_few(Few& few, u32 count, const RowSampling& params, u64 target) {
    u32 i = threadIdx.x, rank;
    u64 key = i < count ? few.keys[i] : NO_KEY, before;
    u64 weight = i < count ? weight_of((u32)(key >> SAMPLE_ID_BITS)) : 0;
    auto keep = [&](bool kept) {
        weight = kept ? weight : 0;
        if (i < count) few.weights[i] = weight;
    };
    auto likelier = [](u64 key) { return key; };
    keep(true);
    u64 all = weigh(few, count, key, before, rank, likelier);
    if (params.top_k) {
        keep(rank < params.top_k);
        all = weigh(few, count, key, before, rank, likelier);
        target = part_of(all, params.top_p);
    }
    if (params.top_p < 1.f) keep(before < target);
    keep(key >> SAMPLE_ID_BITS <= params.farthest);
    if (params.typical_p < 1.f) {
        __syncthreads();
        u64 sum = 0, mass = 0;
        for (u32 j = 0; j < count; j++) mass += few.weights[j];
        int cut = cut_of(mass);
        for (u32 j = 0; j < count; j++) sum += (few.weights[j] >> cut) * (few.keys[j] >> SAMPLE_ID_BITS);
        u32 expected = (u32)(sum / (mass >> cut));
        auto usual = [=](u64 key) {
            u32 shortfall = (u32)(key >> SAMPLE_ID_BITS), id = (u32)key & ((1 << SAMPLE_ID_BITS) - 1);
            return key_of(shortfall > expected ? shortfall - expected : expected - shortfall, id);
        };
        all = weigh(few, count, usual(key), before, rank, usual);
        keep(before < part_of(all, params.typical_p));
    }
    all = weigh(few, count, key, before, rank, likelier);
    u64 place = __umul64hi(params.random, all);
    if (before <= place && place < before + weight) few.sampled = (u32)key & ((1 << SAMPLE_ID_BITS) - 1);
    __syncthreads();
    return few.sampled;
}

/// The id that is drawn among tokens whose largest logit is `largest`.
__device__ u32 sampled_id(Tally& tally, Few& few, u64 (&slots)[2], const Share& row, const RowSampling& params, float largest) {
    int turn = 0;
    u64 end = NO_KEY, typical_end = NO_KEY;
    u32 expected = 0, count = 0;
    Place place = Place::anywhere();
    auto likelier = [&](int id, float logit, u32& shortfall) {
        u32 none = 0xFFFFFFFFu;
        shortfall = shortfall_of(largest, logit, params.rate, none);
        u64 key = key_of(shortfall, id);
        return shortfall != none && key < end ? key : NO_KEY;
    };
    auto tokens = [&](u64) { return (u64)params.top_k; };
    auto top_part = [&](u64 all) { return part_of(all, params.top_p); };
    if (params.top_k) count = find_few<true>(few, tally, turn, row, place, tokens, likelier);
    else if (params.top_p < 1.f) count = find_few<false>(few, tally, turn, row, place, top_part, likelier);
    if (count) return sampled_of_few(few, count, params, place.target);

    if (params.top_k) {
        end = search<true>(tally, turn, row, place, tokens, likelier);
        place = Place::anywhere();
    }
    // Below what top_k left: the smaller of two ends.
    if (params.top_p < 1.f) end = min(end, search<false>(tally, turn, row, place, top_part, likelier));
    end = min(end, key_of(params.farthest + 1, 0));
    auto usual = [&](int id, float logit, u32& shortfall) {
        if (likelier(id, logit, shortfall) == NO_KEY) return NO_KEY;
        return key_of(shortfall > expected ? shortfall - expected : expected - shortfall, id);
    };
    if (params.typical_p < 1.f) {
        u64 mass = sum_of(row, &slots[0], likelier, weight_of);
        int cut = cut_of(mass);
        auto part_of_sum = [=](u32 shortfall) { return (weight_of(shortfall) >> cut) * shortfall; };
        expected = (u32)(sum_of(row, &slots[1], likelier, part_of_sum) / (mass >> cut));
        auto part = [&](u64 all) { return part_of(all, params.typical_p); };
        typical_end = search<false>(tally, turn, row, Place::anywhere(), part, usual);
    }
    auto kept = [&](int id, float logit, u32& shortfall) {
        bool is = typical_end == NO_KEY || usual(id, logit, shortfall) < typical_end;
        return is ? likelier(id, logit, shortfall) : NO_KEY;
    };
    auto sampled = [&](u64 all) { return __umul64hi(params.random, all) + 1; };
    u64 past = search<false>(tally, turn, row, Place::anywhere(), sampled, kept);
    return (u32)(past - 1) & ((1 << SAMPLE_ID_BITS) - 1);
}

/// A logit after its change.
__device__ __forceinline__ float changed(float logit, const Change& change) {
    logit = __fadd_rn(logit, change.added);
    if (change.repeated == 1.f) return logit;
    return logit > 0.f ? __fdiv_rn(logit, change.repeated) : __fmul_rn(logit, change.repeated);
}

/// `each(change, logit, before)` for the changes to ids of this block; then all of it see what was done.
template <class Each>
__device__ void for_own(const Share& row, const RowSampling& params, const Change* changes, float* before, Each each) {
    for (u32 i = params.first_change + threadIdx.x; i < params.first_change + params.changes; i += SAMPLE_THREADS) {
        const Change& change = changes[i];
        if ((int)change.id >= row.from && (int)change.id < row.to) each(change, row.logits[change.id], before[i]);
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS) sample(
    u32* ids,               // [rows]: the largest number where no score is finite
    Found* found,           // [rows]
    float* logits,          // [rows, vocab]: as they were in the end
    const RowSampling* sampling,      // [rows], or null: the likeliest everywhere
    const Change* changes,  // those of all rows
    float* before,          // the logits that they change
    int vocab) {
    __shared__ Tally tally;
    __shared__ Few few;
    __shared__ u64 keys[2], means[2];
    __shared__ float mass_slot;
    int number = blockIdx.x, shares = gridDim.y, share = blockIdx.y;
    Share row{logits + (size_t)number * vocab, (int)((long long)vocab * share / shares),
              (int)((long long)vocab * (share + 1) / shares), shares};
    for (int turn = 0; turn < 2; turn++) tally.clear(turn);
    if (threadIdx.x < 2) keys[threadIdx.x] = means[threadIdx.x] = 0;
    __syncthreads();
    start_next_early();
    await_previous();
    RowSampling params = sampling ? sampling[number] : RowSampling{};
    float mass;
    u64 key = largest_and_mass(row, &keys[0], &mass_slot, mass);
    float largest = top_logit(key);
    // Every block changes its own ids, and puts back what was there.
    for_own(row, params, changes, before, [](const Change& change, float& logit, float& before) {
        before = logit;
        logit = changed(logit, change);
    });
    if (key && params.changes) key = largest_key(row, &keys[1]);
    u32 id = key ? ~(u32)key : 0xFFFFFFFFu;
    if (key && params.rate > 0.f) id = sampled_id(tally, few, means, row, params, top_logit(key));
    for_own(row, params, changes, before, [](const Change&, float& logit, float& before) { logit = before; });
    bool here = key != 0 ? (int)id >= row.from && (int)id < row.to : share == 0;
    if (here && threadIdx.x == 0) {
        ids[number] = id;
        if (key) found[number] = Found{row.logits[id], largest, mass};
    }
#if HOPPER
    // A block must not end while others of its cluster read its memory.
    if (shares > 1) cluster_meet();
#endif
}
