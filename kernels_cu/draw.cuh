// One token from the 64 largest logits of a row: engine/sampler.py's rules from top-k on, in double.
//
// Candidates are drawn in the order of token ids. Sums that decide are taken one after another, as
// the sampler takes them, so that equal logits fall on the same side of a limit.
#pragma once

// Fields of a row of parameters, as engine/device_sampler.py packs them.
constexpr int DRAW_TEMPERATURE = 0, DRAW_TOP_K = 1, DRAW_TOP_P = 2, DRAW_MIN_P = 3;
constexpr int DRAW_UNIFORM = 4, NUM_DRAW_FIELDS = 5;

struct Candidates {
    double values[TOP];  // logits, the largest first; of equals, the lower id
    int ids[TOP];
    double terms[TOP], probs[TOP];  // room to work in
    int ids_in_order[TOP];
};

// The sum of the first n terms; what it is for the first `part` of them goes to `before`.
__device__ __forceinline__ double sum_terms(const double* terms, int n, int part, double& before) {
    double sum = 0;
    before = 0;
    for (int i = 0; i < n; ++i) {
        sum += terms[i];
        if (i < part) before = sum;
    }
    return sum;
}

// A thread's candidate; threads without one have is_kept false and any index.
struct Own {
    int idx, place;  // place: in the order of ids
    bool is_there, is_kept;
};

// Keeps the smallest set of most likely candidates that reaches the mass. Of equal probabilities the
// lower id counts as more likely.
__device__ __forceinline__ void keep_nucleus(Candidates& shared, Own& own, int num_candidates,
                                             double mass) {
    double prob = exp(shared.values[own.idx] - shared.values[0]), before;
    if (own.is_there) shared.terms[own.place] = prob;
    __syncthreads();
    prob /= sum_terms(shared.terms, num_candidates, 0, before);
    if (own.is_there) shared.probs[own.idx] = prob;
    __syncthreads();
    int num_above = 0;
    for (int i = 0; i < num_candidates; ++i) {
        double other = shared.probs[i];
        num_above += other > prob || (other == prob && shared.ids[i] < shared.ids[own.idx]);
    }
    if (own.is_there) shared.terms[num_above] = prob;
    __syncthreads();
    sum_terms(shared.terms, num_candidates, num_above, before);
    own.is_kept = own.is_there && (num_above == 0 || before < mass);
    __syncthreads();
}

// The largest value of those kept.
__device__ __forceinline__ double largest_kept(Candidates& shared, const Own& own,
                                               int num_candidates) {
    if (own.is_there) shared.probs[own.idx] = own.is_kept ? shared.values[own.idx] : -INFINITY;
    __syncthreads();
    double top = shared.probs[0];
    for (int i = 1; i < num_candidates; ++i) top = fmax(top, shared.probs[i]);
    return top;
}

// The token of a row, in every thread. All threads of the block, at least TOP of them, must come.
// params: [NUM_DRAW_FIELDS] of the row; num_tokens: in the vocabulary.
__device__ __forceinline__ int draw_token(Candidates& shared, const double* params,
                                          int num_tokens) {
    double temperature = params[DRAW_TEMPERATURE];
    if (temperature <= 0) return shared.ids[0];
    int num_candidates = min(min(int(params[DRAW_TOP_K]), TOP), num_tokens);
    bool is_there = int(threadIdx.x) < num_candidates;
    Own own = {is_there ? int(threadIdx.x) : 0, 0, is_there, is_there};
    double value = shared.values[own.idx];
    for (int i = 0; i < num_candidates; ++i) own.place += shared.ids[i] < shared.ids[own.idx];
    if (params[DRAW_TOP_P] < 1) keep_nucleus(shared, own, num_candidates, params[DRAW_TOP_P]);
    double top = largest_kept(shared, own, num_candidates);
    if (params[DRAW_MIN_P] > 0 && value < top + log(params[DRAW_MIN_P])) own.is_kept = false;
    if (is_there) {
        shared.terms[own.place] = own.is_kept ? exp((value - top) / temperature) : 0;
        shared.ids_in_order[own.place] = shared.ids[own.idx];
    }
    __syncthreads();
    double mass;  // up to the candidate at this thread's place in the order of ids
    double total = sum_terms(shared.terms, num_candidates, int(threadIdx.x) + 1, mass);
    // Kept below the total, or rounding could pick an id of probability 0 behind the last.
    double point = fmin(params[DRAW_UNIFORM] * total, nextafter(total, 0.0));
    return shared.ids_in_order[__syncthreads_count(is_there && mass <= point)];
}
