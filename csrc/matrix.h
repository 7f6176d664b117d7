// Matrices in the kernels' layout: made from codes, scales and zero-points, read back, and multiplied in several threads.
#pragma once
#include <memory>
#include <string>

#include "layout.h"

namespace lowbit {

struct FreeAligned {
    void operator()(void* p) const;
};
using Memory = std::unique_ptr<uint8_t[], FreeAligned>;
Memory allocate(int64_t bytes);  // aligned to 64 bytes, not touched; std::bad_alloc

// The kernels of an instruction set by name: "" is the best that this processor has. nullptr: unknown, not built, or not on this processor.
const Kernels* kernels(const std::string& isa);
bool supported(const std::string& isa);

// Rows as numbers: codes [count, cols], scales and zeros [count, groups] (zeros may be null); of super-blocks, scales and zeros are whole numbers, and d and dmin [count, groups / super].
struct Rows {
    int64_t count = 0;
    const uint8_t* codes = nullptr;
    const float *scales = nullptr, *zeros = nullptr, *d = nullptr, *dmin = nullptr;
};
// Rows from first on, a multiple of ROWS, into data, which has w.bytes().
void pack(const Matrix& w, uint8_t* data, int64_t first, const Rows& rows);
void pack_blocks(const Matrix& w, uint8_t* data, int64_t first, int64_t count, const BlockType& type, const uint8_t* blocks);  // of ggml, row after row
// One row as numbers: out [cols].
void unpack_row(const Matrix& w, int64_t row, float* out);
// One row's codes [cols], scales and zero-points [groups].
void unpack_parts(const Matrix& w, int64_t row, uint8_t* codes, float* scales, float* zeros);

float to_float(uint16_t bits, Real type);  // a float16 or bfloat16
int64_t largest_block(int bits, int64_t group, int64_t most = MAX_BLOCK);  // that a matrix of such codes may have, up to most; 0: none

}  // namespace lowbit
