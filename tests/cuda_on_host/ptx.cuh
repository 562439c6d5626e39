// Stands in for csrc/cuda/ptx.cuh: the same functions, by what the PTX ISA says that they do.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "machine.h"

namespace vmf::cuda {

#define VMF_DEVICE __attribute__((unused)) inline

inline uint32_t shared_address(const void* p) { return on_host::address_of_shared(p); }

void init_barrier(uint64_t* barrier, int arrivals);
inline void publish_barriers() {}
void arrive(uint64_t* barrier);
void arrive_expecting(uint64_t* barrier, int bytes);
void wait(uint64_t* barrier, uint32_t parity);
bool look_at(uint64_t* barrier, uint32_t parity);

void load_box(uint32_t target, const CUtensorMap* map, int column, int row, uint64_t* barrier);
void load_line(float* target, const float* source, int bytes, uint64_t* barrier);

template <int COUNT>
void shrink_registers() {}
template <int COUNT>
void grow_registers() {}

inline void wait_at(int barrier, int threads) { on_host::meet(on_host::named_barrier(barrier), threads); }
inline void pass_by(int barrier, int threads) { on_host::arrive_at(on_host::named_barrier(barrier), threads); }

inline float exp2_fast(float x) {
  constexpr float LEAST_NORMAL = 1.17549435e-38f;
  const float y = std::exp2(x);
  return y < LEAST_NORMAL ? 0.0f : y;
}

}  // namespace vmf::cuda
