// Stands in for csrc/cuda/ptx.cuh: the same functions, by what the PTX ISA says that they do.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace vmf::cuda {

#define VMF_DEVICE __attribute__((unused)) inline

uint32_t shared_address(const void* p);
uint8_t* dynamic_shared();

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

void wait_at(int barrier, int threads);
void pass_by(int barrier, int threads);

float exp2_fast(float x);

int rank_in_cluster();
inline void publish_barriers_to_cluster() {}
void meet_cluster();
void arrive_in(int rank, uint64_t* barrier);
void load_box_for(uint16_t blocks, uint32_t target, const CUtensorMap* map, int column, int row, uint64_t* barrier);

}  // namespace vmf::cuda
