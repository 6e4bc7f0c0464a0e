/* One step of decoding on a CPU: a token of each row through all layers of PaLM, over keys and values kept so far.

   The same function as Decoder.__call__ in decoding.py, in one call. With few rows a step is as fast as weights come
   from memory, so they are read once; and between the products little is called, since code that a step needs once a
   layer has left the caches by then, pushed out by weights. A row's bits are the same whoever else is in the batch.

   Compiled once for each instruction set that setup.py names. Threads are those of the OpenMP runtime that torch
   brings: it is not linked here, but found when torch has loaded it. Knows nothing of Python; native.py checks what
   comes in. Letters: b rows, h heads, d features of a head, k outputs of a product, n its inputs. */

#include "products.h"

#define BLOCK 32  /* keys that lie side by side, feature by feature, so that products with them need no sum of lanes */
#define CHUNK 128 /* keys between two looks at the largest product of a query */
#define GROUP 4   /* query heads that read keys and values together */
#define DIM_HEAD 256

struct layer {
    float eps;                   /* of the norm before the layer */
    const float *norm;           /* its gain, (dim) */
    const void *in, *out;        /* (h d + 2 d + 2 wide, dim), (dim, h d + wide) */
    const float *gains;          /* of normalised queries and keys, (h + 1, d), or NULL */
    const void *down_in, *up_in; /* low rank: (rank_in, dim), (h d + 2 d, rank_in), or NULL */
    const void *down_out, *up_out; /* (rank_out, h d), (dim, rank_out) */
    void *keys, *values;         /* (b, room / BLOCK, d, BLOCK), (b, room, d) */
};

struct step {
    int64_t depth, rows, dim, heads, dim_head, wide, vocabulary, rank_in, rank_out, room, place, last_position, threads;
    float scale, eps, gain_eps;      /* of products with keys; of the last norm; of normalised queries and keys */
    const float *turns;              /* cosines, then sines: (2, last_position + 1, 3 kinds, d / 2) */
    const float *norm;               /* the last norm's gain */
    const void *embedding;           /* (vocabulary, dim) */
    const int64_t *tokens;           /* (b) */
    int64_t *positions;              /* (b), raised here */
    void *hidden_places;             /* (b, room), minus infinity where a row sees nothing, or NULL */
    void *x, *normed, *projected, *low, *both, *logits; /* room for b rows of each */
};

/* layer norm of rows, a thread's share of them */
INLINE void normalise(const struct step *s, const float *gain, float eps, int thread, int threads, int half) {
    int64_t n = s->dim;
    for (int64_t row = thread; row < s->rows; row += threads) {
        const void *x = at(s->x, row * n, half);
        void *out = (void *)at(s->normed, row * n, half);
        vec total = {0}, squares = {0};
        for (int64_t i = 0; i < n; i += LANES) total += load(x, i, half);
        float mean = sum(total) / n;
        for (int64_t i = 0; i < n; i += LANES) {
            vec centred = load(x, i, half) - mean;
            squares += centred * centred;
        }
        float inverse = 1 / sqrtf(sum(squares) / n + eps);
        for (int64_t i = 0; i < n; i += LANES)
            store(out, i, (load(x, i, half) - mean) * inverse * *(const loose *)(gain + i), half);
    }
}

/* a head's features (d) of a projection, normalised where asked, turned to the row's position; as the weights round */
INLINE void turn(
    const struct step *s, const void *from, const float *gain, int64_t position, int kind, float *out, int half
) {
    int64_t d = s->dim_head, pairs = d / 2;
    const float *cosines = s->turns + (position * 3 + kind) * pairs;
    const float *sines = cosines + (s->last_position + 1) * 3 * pairs;
    float squares = 0;
    for (int64_t i = 0; i < d; i++) out[i] = get(from, i, half), squares += out[i] * out[i];
    if (gain) {
        float inverse = 1 / sqrtf(squares / d + s->gain_eps);
        for (int64_t i = 0; i < d; i++) out[i] *= inverse * gain[i];
    }
    for (int64_t i = 0; i < pairs; i++) {
        float first = out[i], second = out[i + pairs];
        out[i] = rounded(first * cosines[i] - second * sines[i], half);
        out[i + pairs] = rounded(second * cosines[i] + first * sines[i], half);
    }
}

struct state { /* of a group's heads: sums so far, and the largest product among them */
    float out[GROUP][DIM_HEAD], total[GROUP], most[GROUP];
};

/* attention of some heads of a row over `count` keys from `start` */
INLINE void attend_chunk(
    const struct step *s, const void *keys, const void *values, const void *bias, const float (*query)[DIM_HEAD],
    int64_t start, int count, struct state *state, int heads, int half
) {
    int64_t d = s->dim_head;
    float weights[GROUP][CHUNK];
    for (int j = 0; j < count; j += 2 * LANES) {
        const void *block = at(keys, (start + j) / BLOCK * BLOCK * d + (start + j) % BLOCK, half);
        vec product[GROUP][2] = {{{0}}};
        for (int64_t e = 0; e < d; e++) {
            vec first = load(block, e * BLOCK, half), second = load(block, e * BLOCK + LANES, half);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) product[h][0] += query[h][e] * first, product[h][1] += query[h][e] * second;
        }
        for (int h = 0; h < heads; h++) {
            if (bias)
                for (int i = 0; i < 2; i++) product[h][i] += load(bias, start + j + i * LANES, half);
            memcpy(&weights[h][j], product[h], sizeof product[h]);
        }
    }
    for (int h = 0; h < heads; h++) {
        for (int j = count; j % (2 * LANES); j++) weights[h][j] = -INFINITY;
        vec largest = all(-INFINITY);
        for (int j = 0; j < count; j += LANES) {
            vec product = *(loose *)&weights[h][j];
            largest = where(product > largest, product, largest);
        }
        float most = state->most[h];
        for (int i = 0; i < LANES; i++) most = largest[i] > most ? largest[i] : most;
        float shrink = expf(state->most[h] - most);
        vec total = {0};
        for (int j = 0; j < count; j += LANES) {
            vec weight = exponential(*(loose *)&weights[h][j] - most);
            total += weight;
            *(loose *)&weights[h][j] = weight;
        }
        state->total[h] = state->total[h] * shrink + sum(total);
        state->most[h] = most;
        for (int64_t e = 0; e < d; e++) state->out[h][e] *= shrink;
    }
    for (int64_t e = 0; e < d; e += 2 * LANES) {
        vec out[GROUP][2] = {{{0}}};
        for (int j = 0; j < count; j++) {
            vec first = load(values, (start + j) * d + e, half);
            vec second = load(values, (start + j) * d + e + LANES, half);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) out[h][0] += weights[h][j] * first, out[h][1] += weights[h][j] * second;
        }
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < 2; i++) {
                loose *kept = (loose *)&state->out[h][e + i * LANES];
                *kept += out[h][i];
            }
    }
}

/* attention of some heads of a row: over what is kept, and its own key and value, which the first heads' thread keeps;
   the others may read that place meanwhile, as they read whole vectors, and leave out what comes of it */
INLINE void attend(const struct step *s, const struct layer *l, int64_t row, int64_t first, int heads, int half) {
    int64_t d = s->dim_head, inner = s->heads * d, width = inner + 2 * d + 2 * s->wide, position = s->positions[row];
    const void *projected = at(s->projected, row * width, half), *value = at(projected, inner + d, half);
    void *keys = (void *)at(l->keys, row * d * s->room, half), *values = (void *)at(l->values, row * d * s->room, half);
    float query[GROUP][DIM_HEAD], key[DIM_HEAD];
    struct state state;
    turn(s, at(projected, inner, half), l->gains ? l->gains + inner : 0, position, 1, key, half);
    for (int h = 0; h < heads; h++) {
        const float *gain = l->gains ? l->gains + (first + h) * d : 0;
        turn(s, at(projected, (first + h) * d, half), gain, position, 0, query[h], half);
        for (int64_t e = 0; e < d; e++) query[h][e] *= s->scale;
        float product = 0;
        for (int64_t e = 0; e < d; e++) product += query[h][e] * key[e];
        state.most[h] = product, state.total[h] = 1;
        for (int64_t e = 0; e < d; e++) state.out[h][e] = get(value, e, half);
    }
    const void *bias = s->hidden_places ? at(s->hidden_places, row * s->room, half) : 0;
    for (int64_t start = 0; start < s->place; start += CHUNK) {
        int count = s->place - start < CHUNK ? s->place - start : CHUNK;
        if (heads == GROUP) attend_chunk(s, keys, values, bias, query, start, count, &state, GROUP, half);
        else attend_chunk(s, keys, values, bias, query, start, count, &state, heads, half);
    }
    void *both = (void *)at(s->both, row * (inner + s->wide), half);
    for (int h = 0; h < heads; h++)
        for (int64_t e = 0; e < d; e++) put(both, (first + h) * d + e, state.out[h][e] / state.total[h], half);
    if (first) return;
    for (int64_t e = 0; e < d; e++) {
        put(keys, (s->place / BLOCK * d + e) * BLOCK + s->place % BLOCK, key[e], half);
        put(values, s->place * d + e, get(value, e, half), half);
    }
}

/* silu(gate) * feedforward of a row beside attention's output, a thread's share */
INLINE void gate(const struct step *s, int64_t row, int thread, int threads, int half) {
    int64_t inner = s->heads * s->dim_head, begin = inner + 2 * s->dim_head, vectors = s->wide / LANES;
    const void *forward = at(s->projected, row * (begin + 2 * s->wide) + begin, half);
    const void *gate = at(forward, s->wide, half);
    void *both = (void *)at(s->both, row * (inner + s->wide) + inner, half);
    for (int64_t i = LANES * (vectors * thread / threads); i < LANES * (vectors * (thread + 1) / threads); i += LANES) {
        vec x = load(gate, i, half), ff = load(forward, i, half), silu = x / (1.0f + exponential(-x));
        if (half) silu = (vec)(((bits)silu + 0x7fff + (((bits)silu >> 16) & 1)) & 0xffff0000u); /* as torch rounds it */
        store(both, i, silu * ff, half);
    }
}

INLINE void layer(const struct step *s, const struct layer *l, int thread, int threads, int half) {
    int64_t b = s->rows, inner = s->heads * s->dim_head, attention = inner + 2 * s->dim_head;
    int64_t width = attention + 2 * s->wide;
    normalise(s, l->norm, l->eps, thread, threads, half);
#pragma omp barrier
    struct product into = {.x = s->normed, .w = l->in, .out = s->projected, .rows = b, .k = width, .n = s->dim,
                           .x_stride = s->dim, .out_stride = width};
    if (l->down_in) {
        struct product down = {.x = s->normed, .w = l->down_in, .out = s->low, .rows = b, .k = s->rank_in, .n = s->dim,
                               .x_stride = s->dim, .out_stride = s->rank_in};
        multiply(down, thread, threads, half);
#pragma omp barrier
        into.adapted = attention, into.rank = s->rank_in, into.low = s->low, into.up = l->up_in;
    }
    multiply(into, thread, threads, half);
#pragma omp barrier
    int64_t group = (b * s->heads + threads - 1) / threads;
    group = group > GROUP ? GROUP : group < 1 ? 1 : group;
    int64_t groups = (s->heads + group - 1) / group;
    for (int64_t unit = thread; unit < b * groups; unit += threads) {
        int64_t first = unit % groups * group, left = s->heads - first;
        attend(s, l, unit / groups, first, left < group ? left : group, half);
    }
    for (int64_t row = 0; row < b; row++) gate(s, row, thread, threads, half);
#pragma omp barrier
    int64_t n = inner + s->wide;
    struct product out = {.x = s->both, .w = l->out, .onto = s->x, .out = s->x, .rows = b, .k = s->dim, .n = n,
                          .x_stride = n, .onto_stride = s->dim, .out_stride = s->dim};
    if (l->down_out) {
        struct product down = {.x = s->both, .w = l->down_out, .out = s->low, .rows = b, .k = s->rank_out, .n = inner,
                               .x_stride = n, .out_stride = s->rank_out};
        multiply(down, thread, threads, half);
#pragma omp barrier
        out.adapted = s->dim, out.rank = s->rank_out, out.low = s->low, out.up = l->up_out;
    }
    multiply(out, thread, threads, half);
#pragma omp barrier
}

INLINE void take(const struct step *s, const struct layer *layers, int thread, int threads, int half) {
    int64_t size = s->dim * (half ? 2 : 4);
    for (int64_t row = thread; row < s->rows; row += threads) {
        memcpy((char *)s->x + row * size, (const char *)s->embedding + s->tokens[row] * size, size);
        if (s->hidden_places) put(s->hidden_places, row * s->room + s->place, 0, half);
    }
#pragma omp barrier
    for (int64_t i = 0; i < s->depth; i++) layer(s, layers + i, thread, threads, half);
    normalise(s, s->norm, s->eps, thread, threads, half);
    for (int64_t row = thread; row < s->rows; row += threads) /* a row that has ended goes on, and is not looked at */
        s->positions[row] += s->positions[row] < s->last_position;
#pragma omp barrier
    struct product out = {.x = s->normed, .w = s->embedding, .out = s->logits, .rows = s->rows, .k = s->vocabulary,
                          .n = s->dim, .x_stride = s->dim, .out_stride = s->vocabulary};
    multiply(out, thread, threads, half);
}

/* the first row whose token there is not, or -1 */
static int64_t unknown(const struct step *s) {
    for (int64_t row = 0; row < s->rows; row++)
        if (s->tokens[row] < 0 || s->tokens[row] >= s->vocabulary) return row;
    return -1;
}

/* both return -1, or the number of a row whose token is unknown, where nothing was done */

int64_t take_float32(const struct step *s, const struct layer *layers) {
    int64_t wrong = unknown(s);
    if (wrong >= 0) return wrong;
#pragma omp parallel num_threads(s->threads)
    take(s, layers, omp_get_thread_num(), omp_get_num_threads(), 0);
    return -1;
}

int64_t take_bfloat16(const struct step *s, const struct layer *layers) {
    int64_t wrong = unknown(s);
    if (wrong >= 0) return wrong;
#pragma omp parallel num_threads(s->threads)
    take(s, layers, omp_get_thread_num(), omp_get_num_threads(), 1);
    return -1;
}

const uint32_t sources = SOURCES; /* what this was compiled from, for native.py to compare */
