// ptx.cuh, and the driver's encoder of tensor maps: barriers in shared memory, copies into it.
#include "ptx.cuh"

#include <cmath>
#include <cstring>
#include <limits>

#include "machine.h"

using on_host::fail;

namespace vmf::cuda {
namespace {

// What the 64 bits of an mbarrier hold: counts of the phase under way, and how many have been completed.
struct Barrier {
  int8_t expected, pending;  // arrivals
  uint16_t completed;
  int32_t bytes;  // to come
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));

Barrier read(uint32_t address) {
  Barrier barrier;
  memcpy(&barrier, on_host::shared_at(address, sizeof barrier), sizeof barrier);
  if (barrier.expected <= 0) fail("BARRIER at %u that nobody initialised, or that was overwritten", address);
  return barrier;
}

void change(uint32_t address, int arrivals, int bytes) {
  Barrier barrier = read(address);
  barrier.pending = static_cast<int8_t>(barrier.pending - arrivals);
  barrier.bytes += bytes;
  if (barrier.pending < 0) fail("BARRIER at %u has more arrivals than it counts", address);
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.expected;
    ++barrier.completed;
  }
  memcpy(on_host::shared_at(address, sizeof barrier), &barrier, sizeof barrier);
}

void arrive_at(uint32_t barrier) {
  change(barrier, 1, 0);
  if (on_host::by_chance(2)) on_host::let_others_run();  // what follows may come too late
}

// TMA into a box of 128-byte rows with the 128-byte swizzle; what lies outside of the matrix is 0.
void fill_box(uint32_t target, const CUtensorMap& map, int column, int row) {
  for (int r = 0; r < map.box_rows; ++r)
    for (int c = 0; c < map.box_columns; ++c) {
      const bool is_inside = row + r < map.rows && column + c < map.columns;
      const size_t at = static_cast<size_t>(row + r) * map.row_bytes + (column + c) * 2;
      uint8_t* stored = on_host::shared_at(on_host::swizzled(target + r * 128 + c * 2), 2);
      if (is_inside)
        memcpy(stored, map.matrix + at, 2);
      else
        memset(stored, 0, 2);
    }
}

}  // namespace

uint32_t shared_address(const void* p) { return on_host::address_of_shared(p); }
uint8_t* dynamic_shared() { return on_host::shared_bytes(); }

void init_barrier(uint64_t* p, int arrivals) {
  const Barrier barrier{static_cast<int8_t>(arrivals), static_cast<int8_t>(arrivals), 0, 0};
  memcpy(p, &barrier, sizeof barrier);
}

void arrive(uint64_t* barrier) { arrive_at(shared_address(barrier)); }
void arrive_expecting(uint64_t* barrier, int bytes) { change(shared_address(barrier), 1, bytes); }

bool look_at(uint64_t* barrier, uint32_t parity) { return (read(shared_address(barrier)).completed & 1) != parity; }

void wait(uint64_t* barrier, uint32_t parity) {
  on_host::wait_until([=] { return look_at(barrier, parity); });
  if (on_host::by_chance(4)) on_host::let_others_run();
}

void load_box(uint32_t target, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  load_box_for(static_cast<uint16_t>(1 << rank_in_cluster()), target, map, column, row, barrier);
}

// The addresses are those of the block that asks: each block of the mask takes them for its own.
void load_box_for(uint16_t blocks, uint32_t target, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  if (blocks >> on_host::blocks_together() != 0) fail("OUTSIDE of the cluster: a copy to blocks %x", blocks);
  for (int rank = 0; rank < on_host::blocks_together(); ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    // the map by value: it is a parameter of the kernel, and the thread that asked may be gone by then
    on_host::start_copy(rank, [=, map = *map, full = shared_address(barrier)] {
      fill_box(target, map, column, row);
      change(full, 0, -map.box_rows * map.box_columns * 2);
    });
  }
}

void load_line(float* target, const float* source, int bytes, uint64_t* barrier) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0 || shared_address(target) % 16 != 0)
    fail("UNALIGNED copy of %d bytes", bytes);
  on_host::start_copy(rank_in_cluster(), [=] {
    memcpy(on_host::shared_at(shared_address(target), bytes), source, bytes);
    change(shared_address(barrier), 0, -bytes);
  });
}

void wait_at(int barrier, int threads) { on_host::meet(on_host::named_barrier(barrier), threads); }
void pass_by(int barrier, int threads) { on_host::arrive_at(on_host::named_barrier(barrier), threads); }

float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;  // subnormal
}

int rank_in_cluster() { return on_host::rank_in_cluster(); }
void meet_cluster() { on_host::meet_cluster(); }
void arrive_in(int rank, uint64_t* barrier) { arrive_at(on_host::address_in(rank, shared_address(barrier))); }

}  // namespace vmf::cuda

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* matrix, const cuuint64_t* sizes,
                                const cuuint64_t* row_bytes, const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill) {
  if (rank != 2 || swizzle != CU_TENSOR_MAP_SWIZZLE_128B || box[0] != 64 || box[1] > 256 || steps[0] != 1 || steps[1] != 1 ||
      *row_bytes % 16 != 0 || reinterpret_cast<uintptr_t>(matrix) % 16 != 0)
    return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const uint8_t*>(matrix), static_cast<int>(sizes[1]), static_cast<int>(sizes[0]),
          static_cast<int>(*row_bytes),        static_cast<int>(box[1]),   static_cast<int>(box[0])};
  return CUDA_SUCCESS;
}

void* on_host::find_driver_function(const char* name) {
  if (strcmp(name, "cuTensorMapEncodeTiled") != 0) fail("REFUSED %s, which the driver is not asked for", name);
  return reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
}
