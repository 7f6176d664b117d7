#include "matrix.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/mman.h>
#endif

namespace lowbit {

constexpr int64_t LARGE = 2 << 20;  // a large page

void FreeAligned::operator()(void* p) const { std::free(p); }

Memory allocate(int64_t bytes) {
    const int64_t unit = bytes >= LARGE / 2 ? LARGE : 64;
    void* p = std::aligned_alloc(size_t(unit), size_t((bytes + unit - 1) / unit * unit));
    if (!p) throw std::bad_alloc();
#if defined(__linux__)
    if (unit == LARGE) madvise(p, size_t(bytes / LARGE * LARGE), MADV_HUGEPAGE);  // streams then cross few page borders, where prefetching stops; the last page would be mostly empty
#endif
    return Memory(static_cast<uint8_t*>(p));
}

bool supported(const std::string& isa) {
    if (isa == "portable") return true;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (isa == "avx2") return avx2_kernels() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == "avx512")
        return avx512_kernels() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni");
#endif
#if defined(__aarch64__) && defined(__linux__)
    if (isa == "neon") return neon_kernels() && (getauxval(AT_HWCAP) & (1 << 20));  // HWCAP_ASIMDDP
#elif defined(__aarch64__) && defined(__APPLE__)
    if (isa == "neon") return neon_kernels() != nullptr;
#endif
    return false;
}

const Kernels* kernels(const std::string& isa) {
    if (isa.empty()) {
        for (const char* name : {"avx512", "avx2", "neon"})
            if (supported(name)) return kernels(name);
        return portable_kernels();
    }
    if (!supported(isa)) return nullptr;
    return isa == "avx512" ? avx512_kernels() : isa == "avx2" ? avx2_kernels() : isa == "neon" ? neon_kernels() : portable_kernels();
}

float to_float(uint16_t half, Real type) {
    if (type == Real::bf16) {
        uint32_t bits = uint32_t(half) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY) : exponent ? std::ldexp(float(mantissa + 1024), exponent - 25) : std::ldexp(float(mantissa), -24);
    return half & 0x8000 ? -magnitude : magnitude;
}

int64_t largest_block(int bits, int64_t group, int64_t most) {
    const int64_t unit = bits == 8 || bits == 4 ? 8 : bits == 2 || bits == 6 ? 16 : 32;
    for (int64_t block = most < MAX_BLOCK ? most : MAX_BLOCK; block >= unit; block -= unit)
        if (group % block == 0) return block;
    return 0;
}

namespace {

// Where the field of input k of a row lies in a block: byte, shift and width of its planes.
struct Place {
    int64_t byte;
    int shift, bits, up;
};

int places(int bits, int64_t k, Place* out) {
    auto plane = [](int width, int64_t base, int64_t k, int up) {
        const int64_t inputs = 32 / width, unit = k / inputs, in = k % inputs;
        return Place{base + unit * 64 + in % 4, int(in / 4) * width, width, up};
    };
    if (bits == 8 || bits == 4 || bits == 2 || bits == 1) {
        out[0] = plane(bits, 0, k, 0);
        return 1;
    }
    const int low = bits == 3 ? 2 : 4, high = bits - low;
    const int64_t run = 32 / high, base = k / run * (run * ROWS * bits / 8);
    out[0] = plane(low, base, k % run, 0);
    out[1] = plane(high, base + run * ROWS * low / 8, k % run, low);
    return 2;
}

uint16_t to_half(float value) {
    uint16_t half;
    float eight[16] = {value};
    uint16_t halves[16];
    portable_kernels()->to_half(eight, halves, 16);
    half = halves[0];
    return half;
}

void put(uint8_t* base, int64_t index, Real type, float value) {
    if (type == Real::f32) {
        std::memcpy(base + 4 * index, &value, 4);
        return;
    }
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint16_t half = type == Real::f16 ? to_half(value) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    std::memcpy(base + 2 * index, &half, 2);
}

float get(const uint8_t* base, int64_t index, Real type) {
    if (type == Real::f32) {
        float value;
        std::memcpy(&value, base + 4 * index, 4);
        return value;
    }
    uint16_t bits;
    std::memcpy(&bits, base + 2 * index, 2);
    return to_float(bits, type);
}

}  // namespace

void pack(const Matrix& w, uint8_t* data, int64_t first, const Rows& rows) {
    const int64_t groups = w.groups(), block_bytes = w.block_bytes(), count = rows.count;
    Place place[MAX_BLOCK][2];
    int planes = 1;
    for (int64_t k = 0; k < w.block; k++) planes = places(w.bits, k, place[k]);
    for (int64_t t = first / ROWS; t * ROWS < first + count; t++) {
        uint8_t* tile = data + t * w.tile_bytes();
        std::memset(tile, 0, size_t(w.tile_bytes()));
        for (int64_t r = 0; r < ROWS && t * ROWS + r < first + count; r++) {
            const int64_t row = t * ROWS + r - first;
            auto numbers = [&](uint8_t* to, const float* from, const float* factors) {
                for (int64_t g = 0; g < groups; g++)
                    if (w.super)
                        to[g * ROWS + r] = uint8_t(int8_t(from[row * groups + g]));
                    else
                        put(to, g * ROWS + r, w.scales, from[row * groups + g]);
                if (w.super)
                    for (int64_t s = 0; s < groups / w.super; s++) put(to + groups * ROWS, s * ROWS + r, Real::f16, factors[row * (groups / w.super) + s]);
            };
            numbers(tile, rows.scales, rows.d);
            if (w.zeros >= Zeros::reals) numbers(tile + w.scale_bytes(), rows.zeros, rows.dmin);
            if (w.zeros == Zeros::codes)
                for (int64_t g = 0; g < groups; g++) tile[w.scale_bytes() + g * ROWS + r] = uint8_t(rows.zeros[row * groups + g]);
            for (int64_t b = 0; b < w.cols / w.block; b++) {
                uint8_t* out = tile + w.head_bytes() + b * block_bytes + r * 4;
                const uint8_t* in = rows.codes + row * w.cols + b * w.block;
                for (int64_t k = 0; k < w.block; k++)
                    for (int p = 0; p < planes; p++) {
                        const Place& at = place[k][p];
                        out[at.byte] |= uint8_t((in[k] >> at.up & ((1 << at.bits) - 1)) << at.shift);
                    }
            }
        }
    }
}

void pack_blocks(const Matrix& w, uint8_t* data, int64_t first, int64_t count, const BlockType& type, const uint8_t* blocks) {
    const int64_t groups = w.cols / type.group, supers = w.cols / type.weights, row_bytes = supers * type.bytes;
    auto codes = std::make_unique<uint8_t[]>(size_t(ROWS * w.cols));
    auto numbers = std::make_unique<float[]>(size_t(2 * ROWS * (groups + supers)));
    float *scales = numbers.get(), *minima = scales + ROWS * groups, *d = minima + ROWS * groups, *dmin = d + ROWS * supers;
    for (int64_t row = 0; row < count; row += ROWS) {
        const int64_t some = count - row < ROWS ? count - row : ROWS;
        for (int64_t r = 0; r < some; r++)
            take_apart(type, blocks + (row + r) * row_bytes, w.cols, codes.get() + r * w.cols, scales + r * groups, minima + r * groups, d + r * supers, dmin + r * supers);
        pack(w, data, first + row, {some, codes.get(), scales, minima, d, dmin});
    }
}

void unpack_parts(const Matrix& w, int64_t row, uint8_t* codes, float* scales, float* zeros) {
    const int64_t r = row % ROWS;
    const uint8_t* tile = w.data + row / ROWS * w.tile_bytes();
    for (int64_t g = 0; g < w.groups(); g++) {
        if (w.super) {
            auto product = [&](const uint8_t* base) { return float(int8_t(base[g * ROWS + r])) * get(base + w.groups() * ROWS, g / w.super * ROWS + r, Real::f16); };
            scales[g] = product(tile), zeros[g] = w.zeros == Zeros::minima ? product(tile + w.scale_bytes()) : w.zero;
            continue;
        }
        scales[g] = get(tile, g * ROWS + r, w.scales);
        zeros[g] = w.zeros == Zeros::codes ? float(tile[w.scale_bytes() + g * ROWS + r]) : w.zeros >= Zeros::reals ? get(tile + w.scale_bytes(), g * ROWS + r, w.scales) : w.zero;
    }
    for (int64_t b = 0; b < w.cols / w.block; b++) {
        const uint8_t* in = tile + w.head_bytes() + b * w.block_bytes() + r * 4;
        for (int64_t k = 0; k < w.block; k++) {
            Place place[2];
            int code = 0;
            for (int p = 0, n = places(w.bits, k, place); p < n; p++) code |= (in[place[p].byte] >> place[p].shift & ((1 << place[p].bits) - 1)) << place[p].up;
            codes[b * w.block + k] = uint8_t(code);
        }
    }
}

void unpack_row(const Matrix& w, int64_t row, float* out) {
    auto codes = std::make_unique<uint8_t[]>(size_t(w.cols));
    auto scales = std::make_unique<float[]>(size_t(2 * w.groups()));
    float* zeros = scales.get() + w.groups();
    unpack_parts(w, row, codes.get(), scales.get(), zeros);
    for (int64_t k = 0; k < w.cols; k++) {
        const int code = codes[k];
        const float value = w.tables == 0 ? float(code) : w.tables == 1 ? float(w.table[0][code]) : float(w.table[0][code] * 256 + w.table[1][code]);
        const float zero = zeros[k / w.group], scale = scales[k / w.group];
        out[w.order ? w.order[k] : k] = w.zeros == Zeros::minima ? value * scale - zero : (value - zero) * scale;
    }
}

}  // namespace lowbit
