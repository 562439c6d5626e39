// Named PTX instructions. Each line's comment is the section of the PTX ISA manual that defines it.
//
// Addresses of shared memory are 32-bit. Barriers are mbarriers, 8 bytes; a wait names the parity of the phase it waits for,
// and a fresh barrier counts as having completed parity 1.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace vmf::cuda {

// "unused": for parts other than sm_90a kernels are compiled to a trap, and call none of these.
#define VMF_DEVICE __attribute__((unused)) __device__ __forceinline__

VMF_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// The block's dynamic shared memory.
VMF_DEVICE uint8_t* dynamic_shared() {
  extern __shared__ __align__(1024) uint8_t p_shared[];
  return p_shared;
}

// "mbarrier.init"
VMF_DEVICE void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// "membar/fence", proxy fence: the copies' engine must see the barriers that threads initialised.
VMF_DEVICE void publish_barriers() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// "mbarrier.arrive"
VMF_DEVICE void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// "mbarrier.arrive", with "expect-tx operation": one arrival, and so many bytes to come.
VMF_DEVICE void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// "mbarrier.try_wait", repeated until the phase of that parity is complete. With VMF_BOUNDED_WAITS it traps after some two
// seconds: a hang becomes an error. In clocks, as a try may take any time.
VMF_DEVICE void wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
#if defined(VMF_BOUNDED_WAITS)
  const long long last = clock64() + (1ll << 32);
#endif
  while (!done) {
#if defined(VMF_BOUNDED_WAITS)
    if (clock64() > last) __trap();
#endif
    asm volatile("{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  }
}

// "mbarrier.test_wait": whether the phase of that parity is complete; returns at once.
VMF_DEVICE bool look_at(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
}

// "cp.async.bulk.tensor": the box at (column, row), counted in bytes at the barrier.
VMF_DEVICE void load_box(uint32_t target, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          target),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// "cp.async.bulk": `bytes` is a multiple of 16, both addresses too.
VMF_DEVICE void load_line(float* target, const float* source, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(target)),
      "l"(source), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// "setmaxnreg"; all threads of a warpgroup.
template <int COUNT>
VMF_DEVICE void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
VMF_DEVICE void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// "bar": a named barrier of all consumers, of which one warpgroup waits and the other passes by. Barrier 0 is __syncthreads'.
VMF_DEVICE void wait_at(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
VMF_DEVICE void pass_by(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// "ex2": 2^x, subnormal results as 0.
VMF_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- clusters: blocks that run at the same time and reach each other's shared memory ----
//
// An address of the block's own shared memory is one of the cluster's as well; "mapa" finds the same place in another block.

// "%cluster_ctarank": of the block in its cluster.
VMF_DEVICE int rank_in_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// "membar/fence", fence.mbarrier_init: other blocks must see the barriers that this thread initialised.
VMF_DEVICE void publish_barriers_to_cluster() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// "barrier.cluster": until all threads of all blocks are here, of those that have not ended.
VMF_DEVICE void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// "mbarrier.arrive" at the barrier in the same place of the cluster's block `rank`, which may be this one. Release is of the
// block's scope, not the cluster's: nothing that was written is handed over, and reads are complete by then (products are
// waited for, lines are in registers). Release of the cluster's scope would be MEMBAR.ALL.GPU, a way to L2 and back for each
// tile.
VMF_DEVICE void arrive_in(int rank, uint64_t* barrier) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(
          shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// "cp.async.bulk.tensor" with multicast: the box into the same place of every block of the mask, each of which counts the bytes
// at its own barrier in the place of this one.
VMF_DEVICE void load_box_for(uint16_t blocks, uint32_t target, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

}  // namespace vmf::cuda
