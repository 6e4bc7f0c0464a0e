/* Numbers and vectors of them, whatever the instruction set: what the other files here are written in.

   A vector is GCC's, of as many floats as the widest register holds; bfloat16 is widened as it is read. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <omp.h>

#include <immintrin.h>

#ifdef __AVX512F__
#define LANES 16 /* floats of a vector */
#else
#define LANES 8
#endif

#define INLINE static inline __attribute__((always_inline))
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint32_t loose_bits __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* numbers: half says bfloat16, and is a constant wherever these are inlined */

INLINE float widen(uint16_t x) {
    union { uint32_t u; float f; } both = {.u = (uint32_t)x << 16};
    return both.f;
}

INLINE uint16_t narrow(float x) { /* to the nearest, ties to even */
    union { float f; uint32_t u; } both = {.f = x};
    if (x != x) return 0x7fc0;
    return (both.u + 0x7fff + ((both.u >> 16) & 1)) >> 16;
}

INLINE float get(const void *from, int64_t i, int half) {
    return half ? widen(((const uint16_t *)from)[i]) : ((const float *)from)[i];
}

INLINE void put(void *to, int64_t i, float x, int half) {
    if (half) ((uint16_t *)to)[i] = narrow(x);
    else ((float *)to)[i] = x;
}

INLINE float rounded(float x, int half) { return half ? widen(narrow(x)) : x; }

INLINE vec load(const void *from, int64_t i, int half) {
    if (!half) return *(const loose *)((const float *)from + i);
    halves x = *(const halves *)((const uint16_t *)from + i);
    return (vec)(__builtin_convertvector(x, bits) << 16);
}

INLINE vec where(ints mask, vec yes, vec no) { return (vec)((mask & (ints)yes) | (~mask & (ints)no)); }

INLINE void store(void *to, int64_t i, vec x, int half) {
    if (!half) {
        *(loose *)((float *)to + i) = x;
        return;
    }
    bits u = (bits)x;
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    u = (bits)where(x == x, (vec)u, (vec)(u * 0 + 0x7fc0));
    *(halves *)((uint16_t *)to + i) = __builtin_convertvector(u, halves);
}

INLINE const void *at(const void *from, int64_t i, int half) { return (const char *)from + i * (half ? 2 : 4); }

INLINE vec all(float x) { return (vec){0} + x; }

/* sums of the lanes of four vectors, each in pairs of pairs: in one order, whatever the others hold */
INLINE __m128 sums(vec a, vec b, vec c, vec d) {
#ifdef __AVX512F__
#define FOLD(x) _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1))
#else
#define FOLD(x) (__m256)x
#endif
    __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(FOLD(a), FOLD(b)), _mm256_hadd_ps(FOLD(c), FOLD(d)));
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

INLINE float sum(vec x) { return sums(x, x, x, x)[0]; }

/* e^x to 2 units in the last place from -87 to 88.7, 0 below, infinity above: 2^n e^r, |r| <= ln 2 / 2, e^r a series */
INLINE vec exponential(vec x) {
    vec bounded = where(x < -87.0f, all(-87.0f), where(x > 88.7f, all(88.7f), x));
    vec n = bounded * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: what is left of the point is rounded off */
    ints power = (ints)n - 0x4b400000;
    n -= 12582912.0f;
    vec r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    vec e = all(1.0f / 5040);
    e = e * r + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r * r + r + 1.0f;
    e *= (vec)((power - (power >> 1) + 127) << 23); /* 2^128 is no float: in two factors */
    e *= (vec)(((power >> 1) + 127) << 23);
    e = where(x < -87.0f, (vec){0}, where(x > 88.7f, all(INFINITY), e));
    return where(x == x, e, x);
}
