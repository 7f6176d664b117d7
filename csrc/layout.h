// How a quantized matrix lies in memory for the kernels, and how its inputs do.
//
// A matrix [rows, cols] is cut into tiles of 16 rows. A tile holds its scales [groups][16], then its zero-points [groups][16] (or nothing), then its codes, all in the order in which a
// matrix-vector product reads them. Where scales are whole numbers times a float16 of a super-block (ggml's k-quants), a tile has them as int8 [groups][16], and after them the float16s
// [super-blocks][16]; minima likewise. Codes of b bits lie in planes; every plane's unit is 64 bytes, 16 rows of 4 bytes, and bit field j of byte i of row r is the code of input 4 j + i:
//
//     bytes    8 bits     4 inputs a unit          8
//     nibbles  4 bits     8 inputs                 4, the low bits of 5 and 6, tables of 16 values
//     pairs    2 bits    16 inputs                 2, the high bits of 6, the low bits of 3
//     bits     1 bit     32 inputs                 1, the high bits of 3 and 5
//
// For codes of two planes, a run of 32 inputs (16 for 6 bits) has the low plane's units, then the high plane's.
#pragma once
#include <cstddef>
#include <cstdint>

#include "searches.h"

namespace lowbit {

constexpr int ROWS = 16;      // of a tile
constexpr int MAX_BLOCK = 128;  // inputs of one integer sum, at most

enum class Real : int { f32 = 0, f16 = 1, bf16 = 2 };
// One zero-point for all; uint8 of each group; numbers of the scales' type; or minima of the scales' type: a weight is scale * code - minimum, and else scale * (code - zero).
enum class Zeros : int { constant = 0, codes = 1, reals = 2, minima = 3 };

struct Matrix {
    int64_t rows = 0, cols = 0;  // rows is padded to ROWS in data
    int bits = 4;                // 1, 2, 3, 4, 5, 6 or 8
    int tables = 0;              // of 16 bytes each that codes of 4 bits look up: none, one, or two (high and low byte)
    int64_t group = 0;           // inputs of one scale
    int64_t block = 0;           // inputs of one integer sum and of one scale of the inputs: divides group
    Real scales = Real::f32;
    Zeros zeros = Zeros::constant;
    float zero = 0;
    int64_t super = 0;           // groups of a super-block, a power of two; 0: each group has a scale of its own
    alignas(16) uint8_t table[2][16] = {};
    const uint8_t* data = nullptr;
    const int32_t* order = nullptr;  // [cols]: column k of the layout reads input order[k] (GPTQ's act-order); null: input k

    int64_t tiles() const { return (rows + ROWS - 1) / ROWS; }
    int64_t groups() const { return cols / group; }
    int64_t scale_bytes() const { return super ? groups() * ROWS + groups() / super * ROWS * 2 : groups() * ROWS * (scales == Real::f32 ? 4 : 2); }
    int64_t zero_bytes() const { return zeros == Zeros::constant ? 0 : zeros == Zeros::codes ? groups() * ROWS : scale_bytes(); }
    int64_t head_bytes() const { return (scale_bytes() + zero_bytes() + 63) / 64 * 64; }
    int64_t block_bytes() const { return block * ROWS * bits / 8; }
    int64_t tile_bytes() const { return head_bytes() + cols / block * block_bytes(); }
    int64_t bytes() const { return tiles() * tile_bytes(); }
};

// Rows of inputs, rounded to int8 with one scale for each block.
struct Inputs {
    int64_t cols = 0, block = 0;
    int8_t* codes = nullptr;   // [m][cols]
    float* scales = nullptr;   // [m][cols / block]
    float* sums = nullptr;     // [m][cols / block], of the codes
    const int32_t* order = nullptr;  // as the matrix's: which input is rounded into column k
};

// Rows of 16-bit or 32-bit numbers as they lie in a checkpoint.
struct Dense {
    int64_t rows = 0, cols = 0;
    Real type = Real::f32;
    const void* data = nullptr;
};

// Codes as lowbit's own files pack them: a stream of `bits` from the lowest bit on, each row from a word of its own; value = table[code] * scale, or (code - zero) * scale where there are zeros.
struct Coded {
    int64_t rows = 0, cols = 0, group = 0, row_words = 0;  // group: a multiple of 32 that divides cols
    int bits = 0;
    const uint32_t* words = nullptr;
    const float *scales = nullptr, *zeros = nullptr;  // [rows][cols / group]
    float table[256] = {};
    bool through_half = false;  // values are rounded to float16 first
};

// How a cache keeps a row of numbers (the keys or values of a head for one token): float16, or codes of 8 or 4 bits in groups of GROUP with a float16 scale and least value each, after the codes.
// Code j of a group of 4 bits shares its byte with code j + 16.
struct Row {
    static constexpr int64_t GROUP = 32;
    int bits = 16;
    int64_t dim = 0;
    int64_t codes() const { return dim * bits / 8; }
    int64_t bytes() const { return bits == 16 ? dim * 2 : codes() + dim / GROUP * 4; }
};

// What one instruction set offers. All functions run in the calling thread, on the tiles (rows) that it is given.
struct Kernels {
    const char* name;
    // codes, scales and sums of m rows of x.
    void (*round)(const float* x, int64_t stride, int64_t m, const Inputs& out);
    // y[i][row] = (add ? y : 0) + sum_k W[row][k] x[i][k] for the rows of tiles first to last; scratch: panel_bytes(m).
    void (*matmul)(const Matrix& w, const Inputs& x, int64_t m, float* y, int64_t stride, bool add, int64_t first, int64_t last, uint8_t* scratch);
    void (*dense)(const Dense& w, const float* x, int64_t x_stride, int64_t m, float* y, int64_t stride, bool add, int64_t first_row, int64_t last_row);
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);
    void (*rope)(float* x, const float* cosine, const float* sine, int64_t half);  // of one head; the halves are its first and second 'half' numbers
    // One query head against n cached keys and values: y [dim]. scores: n floats.
    void (*attend)(const float* q, const uint8_t* keys, const uint8_t* values, int64_t n, Row row, float scale, float cap, float* scores, float* y);
    // The same for m (at most QUERIES) queries of one head, of the tokens from position on, each of which sees the last `window` (0: all) cached ones up to itself; dim is a multiple of 16.
    // scratch: attend_scratch(dim) floats.
    void (*attend_many)(const float* q, int64_t q_stride, int64_t m, int64_t position, int64_t window, const uint8_t* keys, const uint8_t* values, Row row, float scale, float cap, float* scratch, float* y,
                        int64_t y_stride);
    void (*keep)(const float* x, Row row, uint8_t* out);  // a row, rounded
    void (*gate)(float* gate, const float* up, int64_t n, int kind);  // gate = act(gate) * up; kind 0: SiLU, 1: GELU by tanh
    void (*to_half)(const float* x, uint16_t* y, int64_t n);
    void (*decode)(const Coded& w, int64_t first, int64_t last, void* out, bool half);  // rows first to last into out [rows][cols], float32 or bfloat16
    bool (*encode)(const Encoding& e, int64_t first, int64_t last);  // blocks first to last; false: a scale does not fit float16
    void (*feedback)(const Panel& p, int64_t first, int64_t last);  // rows first to last: q and the error of each column, which is taken off those behind it
    void (*descend)(const Panel& p, int64_t first, int64_t last);   // the same for a sweep of coordinate descent: W is the gradient, U the Hessian, error the step
    // The scales of groups first to last of x [groups][32], with weights w and the table of IQ4's 16 values by halves from -128 to 128.
    void (*search_iq4)(const float* x, const float* w, const float* values, float lowest, int64_t first, int64_t last, float* scales);
    void (*round_e8p)(const Lattice& l, const float* x, int64_t first, int64_t last, float* points, int64_t* codes);
    // For each of x [n][8] the first column of table [8][count] with the largest product less half.
    void (*nearest)(const float* table, const float* half, int64_t count, const float* x, int64_t first, int64_t last, int64_t* found);
};

int64_t panel_bytes(int64_t m);  // of matmul's scratch
constexpr int64_t QUERIES = 64;  // of attend_many
constexpr int64_t attend_scratch(int64_t dim) { return 2 * dim * QUERIES + 64 * QUERIES + 2 * 64 * dim; }

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // nullptr where they were not built
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

}  // namespace lowbit
