// What the searches of encoders and algorithms work on (encode.inc, solve.inc).
#pragma once
#include "blocks.h"

namespace lowbit {

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
