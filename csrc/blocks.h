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

}  // namespace lowbit
