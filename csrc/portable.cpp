// Plain C++, for any processor; compilers turn its loops into what the baseline has.
#include "layout.h"
#include <cmath>
#include <cstring>
#include <type_traits>

namespace lowbit::portable {
constexpr const char* NAME = "portable";

struct Vec {
    struct Bytes { uint8_t v[64]; };
    struct Ints { int32_t v[16]; };
    struct Floats { float v[16]; };
    using Table = const uint8_t*;
    static constexpr bool in_place = false;
    static constexpr int NT = 1, MR = 4;

    template <class T, class F> static T each(F f) { T r; for (int i = 0; i < int(sizeof(r.v) / sizeof(r.v[0])); i++) r.v[i] = f(i); return r; }
    static Bytes load(const uint8_t* p) { Bytes b; std::memcpy(b.v, p, 64); return b; }
    static void store_bytes(uint8_t* p, Bytes b) { std::memcpy(p, b.v, 64); }
    template <int MASK> static Bytes low(Bytes b) { return each<Bytes>([&](int i) { return uint8_t(b.v[i] & MASK); }); }
    template <int N> static Bytes shift(Bytes b) { return each<Bytes>([&](int i) { return uint8_t(b.v[i] >> N); }); }
    template <int N> static Bytes pack_or(Bytes a, Bytes b) { return each<Bytes>([&](int i) { return uint8_t(a.v[i] | b.v[i] << N); }); }
    static Table table(const uint8_t* p) { return p; }
    static Bytes lookup(Table t, Bytes b) { return each<Bytes>([&](int i) { return t[b.v[i]]; }); }

    static Ints none() { return each<Ints>([](int) { return 0; }); }
    static Ints fill(int32_t v) { return each<Ints>([&](int) { return v; }); }
    static Ints dot(Ints acc, Bytes w, int32_t four) {
        int8_t x[4];
        std::memcpy(x, &four, 4);
        return each<Ints>([&](int i) { return acc.v[i] + w.v[4 * i] * x[0] + w.v[4 * i + 1] * x[1] + w.v[4 * i + 2] * x[2] + w.v[4 * i + 3] * x[3]; });
    }
    static Ints add(Ints a, Ints b) { return each<Ints>([&](int i) { return a.v[i] + b.v[i]; }); }
    template <int N> static Ints down(Ints a) { return each<Ints>([&](int i) { return a.v[i] >> N; }); }
    template <int N> static Ints up(Ints a) { return each<Ints>([&](int i) { return a.v[i] * (1 << N); }); }
    static Ints up8(Ints a) { return up<8>(a); }

    static Floats zero() { return set(0); }
    static Floats set(float v) { return each<Floats>([&](int) { return v; }); }
    static Floats load_f32(const float* p) { return each<Floats>([&](int i) { return p[i]; }); }
    static Floats load_f16(const uint16_t* p);
    static Floats load_bf16(const uint16_t* p);
    static Floats load_u8(const uint8_t* p) { return each<Floats>([&](int i) { return float(p[i]); }); }
    static Floats load_i8(const int8_t* p) { return each<Floats>([&](int i) { return float(p[i]); }); }
    static Floats from(Ints a) { return each<Floats>([&](int i) { return float(a.v[i]); }); }
    static Floats mul(Floats a, Floats b) { return each<Floats>([&](int i) { return a.v[i] * b.v[i]; }); }
    static Floats plus(Floats a, Floats b) { return each<Floats>([&](int i) { return a.v[i] + b.v[i]; }); }
    static Floats fma(Floats a, Floats b, Floats c) { return each<Floats>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
    static Floats fnma(Floats a, Floats b, Floats c) { return each<Floats>([&](int i) { return c.v[i] - a.v[i] * b.v[i]; }); }
    static void store(float* p, Floats v) { std::memcpy(p, v.v, 64); }
    static void store_f16(uint16_t* p, Floats v);
    static Floats larger(Floats a, Floats b) { return each<Floats>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
    static Floats magnitude(Floats a) { return each<Floats>([&](int i) { return a.v[i] < 0 ? -a.v[i] : a.v[i]; }); }
    static float half(uint16_t h);
    static float largest(Floats v) { float m = v.v[0]; for (float x : v.v) m = x > m ? x : m; return m; }
    static float sum(Floats v) { float s = 0; for (float x : v.v) s += x; return s; }
};

#include "kernels.inc"
Vec::Floats Vec::load_f16(const uint16_t* p) { return each<Floats>([&](int i) { return half_to_float(p[i]); }); }
Vec::Floats Vec::load_bf16(const uint16_t* p) { return each<Floats>([&](int i) { return bfloat_to_float(p[i]); }); }
float Vec::half(uint16_t h) { return half_to_float(h); }
void Vec::store_f16(uint16_t* p, Floats v) { for (int i = 0; i < 16; i++) p[i] = float_to_half(v.v[i]); }
}  // namespace lowbit::portable
const lowbit::Kernels* lowbit::portable_kernels() { return &portable::table; }
int64_t lowbit::panel_bytes(int64_t m) { return 2 * MAX_BLOCK * 4 * ROWS + m * 4 * ROWS * 4 + 64; }
