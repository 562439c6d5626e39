// Where the operands of a wgmma lie in shared memory: arithmetic only, for the device and for tests on the host.
//
// A tile [rows, columns] is stored as boxes [rows, 64] of 128-byte rows, one after the other, as TMA writes them with its
// 128-byte swizzle: 16-byte unit u of row r lies in the place of unit u ^ (r % 8).
#pragma once

#include <cstdint>

#include "tile.cuh"

#if defined(__CUDACC__)
#define VMF_ANYWHERE __host__ __device__
#else
#define VMF_ANYWHERE
#endif

namespace vmf::cuda {

// Matrix descriptor of a tile in shared memory, 128-byte swizzle (PTX ISA, "Matrix Descriptor Format" of wgmma): address and
// both offsets in units of 16 bytes at bits 0, 16 and 32, layout type 1 at bit 62. The base offset, bits 49 to 51, is 0 because
// every pattern starts at a multiple of 1024 bytes.
VMF_ANYWHERE constexpr uint64_t descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  return uint64_t{(address & 0x3FFFF) >> 4} | uint64_t{leading_bytes >> 4} << 16 | uint64_t{stride_bytes >> 4} << 32 |
         uint64_t{1} << 62;
}

constexpr uint32_t EIGHT_ROWS = 8 * BOX_BYTES_PER_ROW;  // the stride of both kinds: from eight rows of a box to the next eight
constexpr int STEP = 16;                                // of k, in one wgmma

// K-major, k along the columns: rows of a box. The leading offset is not read.
VMF_ANYWHERE constexpr uint64_t rows_descriptor(uint32_t address) { return descriptor(address, 0, EIGHT_ROWS); }

// MN-major, k along the rows: leading is from one box to the next.
VMF_ANYWHERE constexpr uint64_t columns_descriptor(uint32_t address, int box_rows) {
  return descriptor(address, box_rows * BOX_BYTES_PER_ROW, EIGHT_ROWS);
}

// How far step i of k lies from step 0, in a descriptor's units. K-major: 32 bytes within a box, then the next box; the
// hardware applies the swizzle to the sum. MN-major: 16 rows.
VMF_ANYWHERE constexpr uint64_t rows_step(int i, int box_rows) {
  return (i / (BOX / STEP) * box_rows * BOX_BYTES_PER_ROW + i % (BOX / STEP) * STEP * 2) / 16;
}
VMF_ANYWHERE constexpr uint64_t columns_step(int i) { return i * STEP * BOX_BYTES_PER_ROW / 16; }

// Whether products find each element of a tile [rows, columns] where copies put it, by rows and by columns.
constexpr uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
constexpr bool finds_all(int rows, int columns, uint64_t values) {
  const uint32_t leading = (values >> 16 & 0x3FFF) * 16, stride = (values >> 32 & 0x3FFF) * 16;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      const uint32_t stored = swizzled((c / BOX * rows + r) * BOX_BYTES_PER_ROW + c % BOX * 2);
      const uint32_t by_rows = rows_step(c / STEP, rows) * 16 + r / 8 * EIGHT_ROWS + r % 8 * BOX_BYTES_PER_ROW + c % STEP * 2;
      const uint32_t by_columns =
          columns_step(r / STEP) * 16 + c / BOX * leading + r % STEP / 8 * stride + r % 8 * BOX_BYTES_PER_ROW + c % BOX * 2;
      if (swizzled(by_rows) != stored || swizzled(by_columns) != stored) return false;
    }
  }
  return true;
}
static_assert(finds_all(32, 128, columns_descriptor(0, 32)));
static_assert(!finds_all(32, 128, columns_descriptor(0, 64)));  // a wrong leading offset is seen

}  // namespace vmf::cuda
