/* Products of few rows with a weight, each weight read once, in its own layout.

   A sum's order depends on its length alone, not on how many rows or threads there are. */

#include "vectors.h"

#define TILE 4 /* rows, and outputs, whose sums are in registers together */

/* acc + w . x of 2 LANES bfloat16 each, or LANES floats */
INLINE vec multiply_add(vec acc, const void *w, const void *x, int64_t i, int half) {
    if (!half) return acc + load(w, i, 0) * load(x, i, 0);
#ifdef __AVX512BF16__
    __m512i a = _mm512_loadu_si512((const char *)w + 2 * i), b = _mm512_loadu_si512((const char *)x + 2 * i);
    return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    bits a = *(const loose_bits *)((const char *)w + 2 * i), b = *(const loose_bits *)((const char *)x + 2 * i);
    acc += (vec)(a << 16) * (vec)(b << 16);
    return acc + (vec)(a & 0xffff0000u) * (vec)(b & 0xffff0000u);
#endif
}

/* out (b, k) = x (b, n) @ w (k, n).T, with low (b, rank) @ up (adapted, rank).T in the first `adapted`, and
   `onto` where given; strides are of rows */

struct product {
    const void *x, *w, *onto;
    void *out;
    int64_t rows, k, n, x_stride, onto_stride, out_stride, adapted, rank;
    const void *low, *up;
};

/* sums of products of some rows of x with some of w */
INLINE void add(
    vec (*acc)[TILE], const void *w, const void *x, int64_t x_stride, int64_t n, int rows, int outputs, int ahead,
    int half
) {
    for (int64_t j = 0; j < n; j += half ? 2 * LANES : LANES)
#pragma GCC unroll 4
        for (int a = 0; a < outputs; a++) {
            if (ahead) /* into the second cache: the first is full of x */
                __builtin_prefetch((const char *)at(w, outputs * (2 * n + j), half) + a * (int)sizeof(vec), 0, 2);
#pragma GCC unroll 4
            for (int c = 0; c < rows; c++)
                acc[a][c] = multiply_add(acc[a][c], at(w, a * n, half), at(x, c * x_stride, half), j, half);
        }
}

/* outputs i, i + 1 .. of some rows, at most TILE of each */
INLINE void tile(const struct product *p, int64_t row, int64_t i, int rows, int outputs, int half) {
    vec acc[TILE][TILE] = {{{0}}};
    const void *w = at(p->w, i * p->n, half), *x = at(p->x, row * p->x_stride, half);
    add(acc, w, x, p->x_stride, p->n, rows, outputs, outputs > 1 && !row, half);
    if (i < p->adapted) {
        const void *up = at(p->up, i * p->rank, half), *low = at(p->low, row * p->rank, half);
        add(acc, up, low, p->rank, p->rank, rows, outputs, 0, half);
    }
#pragma GCC unroll 4
    for (int a = 0; a < outputs; a++) {
        __m128 totals = sums(acc[a][0], acc[a][1], acc[a][2], acc[a][3]);
#pragma GCC unroll 4
        for (int c = 0; c < rows; c++) {
            float total = totals[c];
            if (p->onto) total += get(p->onto, (row + c) * p->onto_stride + i + a, half);
            put(p->out, (row + c) * p->out_stride + i + a, total, half);
        }
    }
}

INLINE void tiles(const struct product *p, int64_t i, int outputs, int half) {
    int64_t row = 0;
    for (; row + TILE <= p->rows; row += TILE) tile(p, row, i, TILE, outputs, half);
    if (p->rows - row == 1) tile(p, row, i, 1, outputs, half);
    if (p->rows - row == 2) tile(p, row, i, 2, outputs, half);
    if (p->rows - row == 3) tile(p, row, i, 3, outputs, half);
}

/* a thread's share: so many outputs in a row. With one or two rows nothing but memory counts, which is read fastest one
   weight after the other; with more, some at a time spare reads of x, and what comes next is asked for in its order */
INLINE void multiply_share(struct product p, int thread, int threads, int half) {
    int64_t i = p.k * thread / threads, end = p.k * (thread + 1) / threads;
    /* those with an adapter, then the rest */
    for (int64_t until = p.adapted < end ? p.adapted : end; i < end; until = end) {
        if (p.rows > 2)
            for (; i + TILE <= until; i += TILE) tiles(&p, i, TILE, half);
        for (; i < until; i++) tiles(&p, i, 1, half);
    }
}

static __attribute__((noinline)) void multiply_single(struct product p, int thread, int threads) {
    multiply_share(p, thread, threads, 0);
}

static __attribute__((noinline)) void multiply_half(struct product p, int thread, int threads) {
    multiply_share(p, thread, threads, 1);
}

INLINE void multiply(struct product p, int thread, int threads, int half) {
    if (half) multiply_half(p, thread, threads);
    else multiply_single(p, thread, threads);
}
