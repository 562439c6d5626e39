// What blocks that stream the same keys and values do together: each copies its share of every tile to all of them.
//
// A cluster is BLOCKS neighbours along the grid's x, with the same split (y) and the same columns of the sums (z): they walk
// over the same tiles in the same order. Of one block, everything here is what a block does alone.
#pragma once

#include "ptx.cuh"
#include "tile.cuh"

namespace vmf::cuda {

template <int BLOCKS>
struct Cluster {
  static_assert(BLOCKS == 1 || BLOCKS == 2);
  static constexpr bool IS_ALONE = BLOCKS == 1;
  static constexpr uint16_t ALL = (1 << BLOCKS) - 1;
  static constexpr int RELEASES = BLOCKS * CONSUMER_WARPS;  // that empty a slot: each block writes into all of them

  static VMF_DEVICE int rank() {
    if constexpr (IS_ALONE) return 0;
    return rank_in_cluster();
  }

  // One thread, after it initialised the block's barriers.
  static VMF_DEVICE void publish() {
    publish_barriers();
    if constexpr (!IS_ALONE) publish_barriers_to_cluster();
  }

  // All threads, before the first use of a barrier.
  static VMF_DEVICE void begin() {
    if constexpr (IS_ALONE) {
      __syncthreads();
    } else {
      meet_cluster();
    }
  }

  // All threads, last: a block that has ended can no longer be arrived at, and the other may have slots left to release.
  static VMF_DEVICE void end() {
    if constexpr (!IS_ALONE) {
      __syncwarp();  // the producer's thread comes long after its warp's others, and they must meet as one
      meet_cluster();
    }
  }

  // A box of this block's share, into the same place of every block.
  static VMF_DEVICE void load(uint32_t target, const CUtensorMap* map, int column, int row, uint64_t* full) {
    if constexpr (IS_ALONE) {
      load_box(target, map, column, row, full);
    } else {
      load_box_for(ALL, target, map, column, row, full);
    }
  }

  // One warp, by its lane: leaves a slot, for every block that writes into it.
  static VMF_DEVICE void release(uint64_t* empty, int lane) {
    if constexpr (IS_ALONE) {
      if (lane == 0) arrive(empty);
    } else {
      if (lane < BLOCKS) arrive_in(lane, empty);
    }
  }
};

}  // namespace vmf::cuda
