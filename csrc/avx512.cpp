// AVX-512 with VNNI (Zen 4 and newer, Ice Lake and newer).
#include "layout.h"
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace lowbit::avx512 {
constexpr const char* NAME = "avx512";

struct Vec {
    using Bytes = __m512i;
    using Ints = __m512i;
    using Floats = __m512;
    using Table = __m512i;
    static constexpr bool in_place = true;
    static constexpr int NT = 4, MR = 6;

    static Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static void store_bytes(uint8_t* p, Bytes b) { _mm512_storeu_si512(p, b); }
    template <int MASK> static Bytes low(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(char(MASK))); }
    template <int N> static Bytes shift(Bytes b) { if constexpr (N == 0) return b; else return _mm512_srli_epi16(b, N); }
    template <int N> static Bytes pack_or(Bytes a, Bytes b) { return _mm512_or_si512(a, _mm512_slli_epi16(b, N)); }
    static Table table(const uint8_t* p) { return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(p))); }
    static Bytes lookup(Table t, Bytes b) { return _mm512_shuffle_epi8(t, b); }

    static Ints none() { return _mm512_setzero_si512(); }
    static Ints fill(int32_t v) { return _mm512_set1_epi32(v); }
    static Ints dot(Ints acc, Bytes w, int32_t four) { return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(four)); }
    static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
    template <int N> static Ints down(Ints a) { return _mm512_srai_epi32(a, N); }
    template <int N> static Ints up(Ints a) { return _mm512_slli_epi32(a, N); }
    static Ints up8(Ints a) { return _mm512_slli_epi32(a, 8); }

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats set(float v) { return _mm512_set1_ps(v); }
    static Floats load_f32(const float* p) { return _mm512_loadu_ps(p); }
    static Floats load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static Floats load_bf16(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16)); }
    static Floats load_u8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
    static Floats load_i8(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
    static Floats from(Ints a) { return _mm512_cvtepi32_ps(a); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
    static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
    static void store_f16(uint16_t* p, Floats v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
    static Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static Floats magnitude(Floats a) { return _mm512_abs_ps(a); }
    static float half(uint16_t h) { return _cvtsh_ss(h); }
    static float largest(Floats v) { return _mm512_reduce_max_ps(v); }
    static float sum(Floats v) { return _mm512_reduce_add_ps(v); }
};

#include "kernels.inc"
}  // namespace lowbit::avx512
const lowbit::Kernels* lowbit::avx512_kernels() { return &avx512::table; }
#else
const lowbit::Kernels* lowbit::avx512_kernels() { return nullptr; }
#endif
