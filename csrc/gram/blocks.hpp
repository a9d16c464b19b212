// Square blocks: factors packed in strips of as many rows, and a block written to its place and, transposed, to its
// mirror image's.
//
// A transposed store of one element would touch a cache line of its own. So the block goes, row by row, to its place;
// then 8 x 8 corners of it are transposed in registers and gathered in a second block, which also goes out row by row.
// (Storing the corners themselves to rows that lie a multiple of 4 KiB apart was twice as slow.)
//
// Included by gram/cpu.cpp only, one of each level.
#pragma once

#include "cpu/parallel.hpp"
#include "cpu/simd.hpp"

namespace selbp {
namespace SELBP_LEVEL {
namespace {

constexpr std::int64_t kBlock = 64;
constexpr std::int64_t kCorner = 8;

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

#if defined(__clang__)
#define SELBP_INTERLEAVE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SELBP_INTERLEAVE(a, b, ...) __builtin_shuffle(a, b, decltype(a > b){__VA_ARGS__})
#endif

// Interleaving row i with row i + 4, three times over, is a transposition: each pass rotates the 3 + 3 bits of
// (row, column) by one place.
template <typename T>
inline void transpose_corner(T* turned, const T* block, std::int64_t stride) {
  using V = typename Lanes<T, kCorner>::V;
  V rows[kCorner], mixed[kCorner];
  for (int i = 0; i < kCorner; ++i) __builtin_memcpy(&rows[i], block + i * stride, sizeof(V));
  for (int pass = 0; pass < 3; ++pass) {
    for (int i = 0; i < kCorner / 2; ++i) {
      mixed[2 * i] = SELBP_INTERLEAVE(rows[i], rows[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      mixed[2 * i + 1] = SELBP_INTERLEAVE(rows[i], rows[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < kCorner; ++i) rows[i] = mixed[i];
  }
  for (int i = 0; i < kCorner; ++i) __builtin_memcpy(turned + i * kBlock, &rows[i], sizeof(V));
}

// turned[j, i] = block[i, j]; the rows of `turned` are kBlock apart, those of `block` are `stride`.
template <typename T>
void transpose(T* turned, const T* block, std::int64_t stride, std::int64_t i_count, std::int64_t j_count) {
  const std::int64_t i_whole = i_count - i_count % kCorner, j_whole = j_count - j_count % kCorner;
  const auto corner = [&](std::int64_t i, std::int64_t j) {
    if (i < i_whole && j < j_whole) transpose_corner(turned + j * kBlock + i, block + i * stride + j, stride);
  };
  // Four corners at a time: rows often lie a power of two apart, where the cache keeps few of their lines.
  for (std::int64_t i = 0; i < i_whole; i += 2 * kCorner)
    for (std::int64_t j = 0; j < j_whole; j += 2 * kCorner) {
      corner(i, j);
      corner(i + kCorner, j);
      corner(i, j + kCorner);
      corner(i + kCorner, j + kCorner);
    }
  for (std::int64_t j = 0; j < j_count; ++j)
    for (std::int64_t i = j < j_whole ? i_whole : 0; i < i_count; ++i) turned[j * kBlock + i] = block[i * stride + j];
}

template <typename T>
void write_rows(T* out, std::int64_t stride, const T* block, std::int64_t rows, std::int64_t columns) {
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < columns; ++j) out[i * stride + j] = block[i * kBlock + j];
}

// The rows that a block goes to lie n apart: too far for the hardware to see the next one coming.
template <typename T>
inline void prefetch_row(const T* row) {
  constexpr std::int64_t kLine = 64 / sizeof(T);
  for (std::int64_t j = 0; j < kBlock; j += kLine) __builtin_prefetch(row + j, 1);
}

// packed[s, k, i] = factor[kBlock s + i, k], zero past the last row.
template <typename T>
void pack(T* packed, const T* factor, std::int64_t n, std::int64_t terms, int n_threads) {
  parallel_for((n + kBlock - 1) / kBlock, n_threads, 0, [&](std::int64_t block) {
    const std::int64_t first = block * kBlock, count = least(kBlock, n - first);
    T* strip = packed + first * terms;
    transpose(strip, factor + first * terms, terms, count, terms);
    for (std::int64_t k = 0; k < terms; ++k)
      for (std::int64_t i = count; i < kBlock; ++i) strip[k * kBlock + i] = 0;
  });
}

}  // namespace
}  // namespace SELBP_LEVEL
}  // namespace selbp
