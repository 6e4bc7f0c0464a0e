/* A token a row from softmax(logits / temperature), by inverting its cumulative distribution at a number from [0, 1).

   The same function as sample_tokens in sampling.py, in one call: of a large vocabulary each logit is read twice, and
   nothing as large is written. Sums are of blocks in float32, and of these in float64. Knows nothing of Python. */

#include "vectors.h"

#define BLOCK 256 /* tokens whose weights are summed before they count */

struct draw {
    int64_t rows, vocabulary, threads;
    double temperature;
    const void *logits;     /* (b, v) */
    const double *uniforms; /* (b) */
    int64_t *tokens;        /* (b) */
    float *logprobs;        /* (b) */
    float *sums;            /* room for (b, v / BLOCK + 1) */
};

/* e^((x - most) / temperature) of up to LANES logits from i on, 0 beyond the last */
INLINE vec weights(const void *logits, int64_t i, int64_t end, float most, float inverse, int half) {
    if (i + LANES <= end) return exponential((load(logits, i, half) - most) * inverse);
    vec x = all(-INFINITY);
    for (int64_t j = i; j < end; j++) x[j - i] = (get(logits, j, half) - most) * inverse;
    return exponential(x);
}

INLINE float largest(const void *logits, int64_t n, int half) {
    vec most = all(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vec x = load(logits, i, half);
        most = where(x > most, x, most);
    }
    float found = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) found = most[lane] > found ? most[lane] : found;
    for (; i < n; i++) found = get(logits, i, half) > found ? get(logits, i, half) : found;
    return found;
}

/* where the sum so far first exceeds the target at something that adds to it; else the last that adds */
INLINE int64_t first_above(const float *parts, int64_t n, double *before, double target) {
    int64_t found = 0;
    double sum = *before;
    for (int64_t i = 0; i < n; i++) {
        if (!(parts[i] > 0)) continue;
        found = i, *before = sum, sum += parts[i];
        if (sum > target) break;
    }
    return found;
}

INLINE void draw_row(const struct draw *s, int64_t row, int half) {
    int64_t v = s->vocabulary, blocks = (v + BLOCK - 1) / BLOCK;
    const void *logits = at(s->logits, row * v, half);
    float most = largest(logits, v, half), inverse = (float)(1 / s->temperature);
    float *sums = s->sums + row * (v / BLOCK + 1);
    double total = 0, before = 0;
    for (int64_t block = 0; block < blocks; block++) {
        int64_t end = (block + 1) * BLOCK < v ? (block + 1) * BLOCK : v;
        vec part = {0};
        for (int64_t i = block * BLOCK; i < end; i += LANES) part += weights(logits, i, end, most, inverse, half);
        total += sums[block] = sum(part);
    }
    double target = s->uniforms[row] * total;
    int64_t start = BLOCK * first_above(sums, blocks, &before, target), end = start + BLOCK < v ? start + BLOCK : v;
    float within[BLOCK];
    for (int64_t i = start; i < end; i += LANES) {
        vec part = weights(logits, i, end, most, inverse, half);
        memcpy(within + (i - start), &part, sizeof part);
    }
    int64_t token = start + first_above(within, end - start, &before, target);
    s->tokens[row] = token;
    s->logprobs[row] = (float)((get(logits, token, half) - most) * inverse - log(total));
}

int64_t draw_float32(const struct draw *s) {
#pragma omp parallel for num_threads(s->threads < s->rows ? s->threads : s->rows)
    for (int64_t row = 0; row < s->rows; row++) draw_row(s, row, 0);
    return -1;
}

int64_t draw_bfloat16(const struct draw *s) {
#pragma omp parallel for num_threads(s->threads < s->rows ? s->threads : s->rows)
    for (int64_t row = 0; row < s->rows; row++) draw_row(s, row, 1);
    return -1;
}
