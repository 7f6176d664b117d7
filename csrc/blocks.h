// ggml's blocks of 32 and super-blocks of 256 weights: their codes and scales taken out, and k-quants made. Bytes of each are in lowbit/numerics/ggml.py.
#pragma once
#include <cstdint>
#include <string>

namespace lowbit {

struct BlockType {
    const char* name;
    int64_t weights, bytes, group;  // of a block; group: weights with one scale
    int bits, zero;                 // w = scale * (code - zero), or scale * code - minimum
    bool minima, super;             // super: scales (and minima) are whole numbers, times a float16 of the block
};

const BlockType* block_type(const std::string& name);  // nullptr: unknown here

// A row of blocks: codes [cols], scales and minima [cols / group]: whole numbers for super-blocks, whose d and dmin [cols / weights] are given besides.
void take_apart(const BlockType& t, const uint8_t* row, int64_t cols, uint8_t* codes, float* scales, float* minima, float* d, float* dmin);

// One block of codes [weights], whole numbers [weights / group] from their least up (super-blocks) and float16 numbers.
void put_together(const BlockType& t, const uint8_t* codes, const uint8_t* scales, const uint8_t* minima, uint16_t d, uint16_t dmin, uint8_t* out);

// A matrix to be encoded: x [rows][cols]; importance [cols], positive, or null; means: of the squares of each row [rows], which blocks of 32 need with an importance.
struct Encoding {
    const BlockType* type = nullptr;
    const float *x = nullptr, *importance = nullptr, *means = nullptr;
    int64_t cols = 0;
    uint8_t* out = nullptr;
};

// Vectors of eight numbers x [n][8] to the nearest points of E8P (lowbit/numerics/lattice.py): table [8][count] and half [count] of its folded rows, count a multiple of 16.
struct Lattice {
    int64_t count = 0;
    const float *table = nullptr, *half = nullptr;
    const int32_t *row_of = nullptr;  // [3^8]
    const uint8_t *odd_row = nullptr;  // [256]
};

// Some columns of GPTQ's loop (lowbit/algorithms/gptq.py), [columns][rows]; scales and what belongs to them [shares][rows].
struct Panel {
    static constexpr int64_t MOST = 64;  // columns
    int64_t rows = 0, columns = 0, first = 0, last = 0;  // first to last are rounded, all behind them get the feedback
    float *W = nullptr, *Q = nullptr, *error = nullptr;
    const float *U = nullptr, *P = nullptr;  // [columns][columns]; P may be null
    const float *divisor = nullptr, *scale = nullptr, *offset = nullptr, *low = nullptr, *high = nullptr;  // the last three may be null
    const int64_t* share = nullptr;  // of each column
    const float* inverse = nullptr;  // of the diagonal
    float least = 0, most = 0;
};

}  // namespace lowbit
