// What both passes share: a producer thread that streams tiles of keys (and of values) into a ring, and warpgroups that form
// logits = queries keys^T, turn them into weights by a policy, and add weights values to their sums.
//
// A policy has   weigh(logits, bias, value_bias)   logits -> weights, in place, and what it sums over keys itself
//                rescale(sums)                     of the sums so far, before the weights of the last `weigh` are added
//
// Order of consumption, and so of the ring: keys 0, keys 1, values 0, keys 2, values 1, ... Where values are the keys, keys
// only.
#pragma once

#include "cluster.cuh"
#include "descriptor.cuh"
#include "ptx.cuh"
#include "tile.cuh"
#include "wgmma.cuh"

namespace vmf::cuda {

enum class Values { none, keys, own };

// What streams past a block's queries.
struct Walk {
  const CUtensorMap *queries, *keys, *values;
  const float *bias, *value_bias;  // a float beside each key; the second or nullptr
  int first_query, first_key, tiles;
};

// A place in the ring. A slot's n-th filling completes parity n % 2 of `full`, its n-th release that of `empty`.
template <int SLOTS>
struct Cursor {
  int slot = 0;
  uint32_t parity = 0;

  VMF_DEVICE void advance() {
    if (++slot == SLOTS) {
      slot = 0;
      parity ^= 1;
    }
  }
};

template <typename T>
VMF_DEVICE Shared<T>& shared_memory() {
  return *reinterpret_cast<Shared<T>*>(dynamic_shared());
}

// One thread, before anything waits.
template <typename T, int BLOCKS>
VMF_DEVICE void prepare_barriers(Shared<T>& shared) {
  // products would read elsewhere than copies write
  if (shared_address(&shared) % 1024 != 0) __trap();
  for (int i = 0; i < T::SLOTS; ++i) {
    init_barrier(&shared.full[i], 1);
    init_barrier(&shared.empty[i], Cluster<BLOCKS>::RELEASES);
  }
  init_barrier(&shared.query_full, 1);
  init_barrier(&shared.query_empty, CONSUMER_WARPS);
  Cluster<BLOCKS>::publish();
}

VMF_DEVICE float base_2_scale(const double* temperature) {
  constexpr double LOG2_E = 1.4426950408889634;
  return static_cast<float>(1.0 / *temperature * LOG2_E);
}

// Which part of the sums' columns is this block's.
VMF_DEVICE int part_of_block() { return blockIdx.z; }

// ---- producer: one thread ----

template <typename T, int BLOCKS>
struct Producer {
  Shared<T>& shared;
  Cursor<T::SLOTS> cursor;

  // All tiles of a block's i_walk-th walk. Its queries come after the first tile of keys, which need not wait for room.
  template <Values VALUES>
  VMF_DEVICE void stream(const Walk& walk, int i_walk) {
    const int i_column = part_of_block() * T::PANEL;
    for (int i = 0; i < walk.tiles; ++i) {
      const int row = walk.first_key + i * T::KEYS;
      load_keys(walk, row);
      if (i == 0) load_queries(walk, i_walk);
      if (VALUES == Values::own && i > 0) load_panel(walk.values, i_column, row - T::KEYS, 0);
    }
    if (VALUES == Values::own && walk.tiles > 0)
      load_panel(walk.values, i_column, walk.first_key + (walk.tiles - 1) * T::KEYS, 0);
  }

 private:
  VMF_DEVICE void load_queries(const Walk& walk, int i_walk) {
    wait(&shared.query_empty, (i_walk & 1) ^ 1);
    arrive_expecting(&shared.query_full, T::QUERY_BYTES);
    const uint32_t target = shared_address(shared.queries);
    for (int i = 0; i < T::WIDTH / BOX; ++i)
      load_box(target + i * QUERIES * BOX_BYTES_PER_ROW, walk.queries, i * BOX, walk.first_query, &shared.query_full);
  }

  // One panel into the next slot, once all that read it have left it; `extra` bytes are to come besides. Returns the slot. Of a
  // cluster's blocks each copies its share of the rows to all: bytes may come before they are expected, and count as well.
  VMF_DEVICE int load_panel(const CUtensorMap* map, int column, int row, int extra) {
    const int slot = cursor.slot;
    uint64_t* full = &shared.full[slot];
    wait(&shared.empty[slot], cursor.parity ^ 1);
    arrive_expecting(full, T::SLOT_BYTES + extra);
    const int share = Cluster<BLOCKS>::rank() * (T::KEYS / BLOCKS);  // its first row
    const uint32_t target = shared_address(shared.slots[slot]) + share * BOX_BYTES_PER_ROW;
    for (int i = 0; i < T::PANEL / BOX; ++i)
      Cluster<BLOCKS>::load(target + i * T::KEYS * BOX_BYTES_PER_ROW, map, column + i * BOX, row + share, full);
    cursor.advance();
    return slot;
  }

  // All panels of a tile of keys, this block's own last: where values are the keys, it stays for the second product. Lines are
  // a hundredth of the bytes: every block copies its own.
  VMF_DEVICE void load_keys(const Walk& walk, int row) {
    const int i_part = part_of_block();
    for (int i = 1; i < T::PANELS; ++i) load_panel(walk.keys, (i_part + i) % T::PANELS * T::PANEL, row, 0);
    const int lines = walk.value_bias ? 2 : 1;
    const int slot = load_panel(walk.keys, i_part * T::PANEL, row, lines * T::LINE_BYTES);
    load_line(shared.lines[slot][0], walk.bias + row, T::LINE_BYTES, &shared.full[slot]);
    if (walk.value_bias) load_line(shared.lines[slot][1], walk.value_bias + row, T::LINE_BYTES, &shared.full[slot]);
  }
};

// ---- consumers: warpgroups ----

VMF_DEVICE int lane_of_thread() { return threadIdx.x % WARP; }
// The same in all threads of a warp, and known to be: branches on it do not diverge.
VMF_DEVICE int group_of_thread() { return __shfl_sync(~0u, threadIdx.x / GROUP, 0); }
// First of the two rows of its block's queries that the thread has registers of; the other is 8 further.
VMF_DEVICE int row_of_thread() { return threadIdx.x / WARP * 16 + lane_of_thread() / 4; }
VMF_DEVICE int column_of_thread() { return lane_of_thread() % 4 * 2; }

// One arrival a warp, after all its lanes.
VMF_DEVICE void release(uint64_t* barrier) {
  __syncwarp();
  if (lane_of_thread() == 0) arrive(barrier);
}

// The fragment of the logits as left operand of the next product, wgmma.cuh.
template <Element ELEMENT, int WEIGHTS>
VMF_DEVICE void round_weights(uint32_t (&weights)[WEIGHTS], const float (&logits)[2 * WEIGHTS]) {
#pragma unroll
  for (int i = 0; i < WEIGHTS; ++i) weights[i] = rounded_pair<ELEMENT>(logits[2 * i], logits[2 * i + 1]);
}

template <typename T, Element ELEMENT, int BLOCKS>
struct Consumer {
  Shared<T>& shared;
  const int group;  // of the thread
  Cursor<T::SLOTS> cursor;

  VMF_DEVICE explicit Consumer(Shared<T>& shared) : shared(shared), group(group_of_thread()) {
    if (group == 1) hand_turn();  // the first turn is group 0's
  }

  // Logits only: no sums.
  template <typename Policy>
  VMF_DEVICE void weigh_keys(int tiles, Policy& policy) {
    float logits[T::LOGITS];
    for (int i = 0; i < tiles; ++i) {
      const int slot = issue_logits(logits);
      await_products<0>(logits);
      release_other_panels(slot);
      policy.weigh(logits, shared.lines[slot][0], shared.lines[slot][1]);
      release_slot(slot);
    }
  }

  // sums += weights values over all tiles. Logits of tile i and the second product of tile i - 1 are in flight together, and
  // the policy works on the former under the latter.
  template <Values VALUES, typename Policy>
  VMF_DEVICE void add_values(int tiles, Policy& policy, float (&sums)[T::SUMS]) {
    if (tiles == 0) return;
    float logits[T::LOGITS];  // fp32; from `weigh` on, weights
    uint32_t weights[T::WEIGHTS];
    take_turn();
    int keys_slot = issue_logits(logits);
    hand_turn();
    await_products<0>(logits);
    weigh<VALUES>(policy, logits, keys_slot);
    round_weights<ELEMENT>(weights, logits);
    for (int i = 1; i < tiles; ++i) {
      take_turn();
      const int next_slot = issue_logits(logits);
      policy.rescale(sums);  // while the logits are formed
      const int values_slot = VALUES == Values::own ? await_slot() : keys_slot;
      issue_values(sums, weights, values_slot);
      hand_turn();
      await_products<1>(logits);
      weigh<VALUES>(policy, logits, next_slot);
      await_products<0>(sums);
      release_slot(values_slot);
      round_weights<ELEMENT>(weights, logits);
      keys_slot = next_slot;
    }
    release(&shared.query_empty);
    policy.rescale(sums);
    const int values_slot = VALUES == Values::own ? await_slot() : keys_slot;
    issue_values(sums, weights, values_slot);
    await_products<0>(sums);
    release_slot(values_slot);
  }

 private:
  // The groups take turns at the tensor cores: each waits at the barrier of its own number, where the other passes by.
  VMF_DEVICE void take_turn() const {
    if constexpr (T::TURNS) wait_at(1 + group, CONSUMERS * GROUP);
  }
  VMF_DEVICE void hand_turn() const {
    if constexpr (T::TURNS) pass_by(2 - group, CONSUMERS * GROUP);
  }

  // The next slot, filled.
  VMF_DEVICE int await_slot() {
    const int slot = cursor.slot;
    wait(&shared.full[slot], cursor.parity);
    cursor.advance();
    return slot;
  }

  // Issues logits = queries keys^T of the next tile. Returns the slot of its last panel.
  VMF_DEVICE int issue_logits(float (&logits)[T::LOGITS]) {
    const uint32_t rows = group * GROUP_QUERIES * BOX_BYTES_PER_ROW;
    const uint64_t queries = rows_descriptor(shared_address(shared.queries) + rows);
    int slot = 0;
#pragma unroll
    for (int i = 0; i < T::PANELS; ++i) {
      slot = await_slot();
      const uint64_t keys = rows_descriptor(shared_address(shared.slots[slot]));
      const int i_panel = T::PANELS == 1 ? 0 : (part_of_block() + 1 + i) % T::PANELS;
      const uint64_t left = queries + i_panel * rows_step(T::PANEL / STEP, QUERIES);
      begin_products();
#pragma unroll
      for (int step = 0; step < T::PANEL / STEP; ++step)
        multiply_shared<ELEMENT>(logits, left + rows_step(step, QUERIES), keys + rows_step(step, T::KEYS), i == 0 && step == 0);
    }
    commit_products();
    return slot;
  }

  // Issues sums += weights values, the values in `slot`.
  VMF_DEVICE void issue_values(float (&sums)[T::SUMS], const uint32_t (&weights)[T::WEIGHTS], int slot) {
    const uint64_t values = columns_descriptor(shared_address(shared.slots[slot]), T::KEYS);
    begin_products();
#pragma unroll
    for (int step = 0; step < T::KEYS / STEP; ++step)
      multiply_registers<ELEMENT>(sums, weights + 4 * step, values + columns_step(step));
    commit_products();
  }

  // Logits to weights; and the slots that were for the logits only are released.
  template <Values VALUES, typename Policy>
  VMF_DEVICE void weigh(Policy& policy, float (&logits)[T::LOGITS], int slot) {
    release_other_panels(slot);
    policy.weigh(logits, shared.lines[slot][0], shared.lines[slot][1]);
    // The exponentials belong under the second product. Without `pin` the compiler, and without a memory operation the
    // assembler, moves them behind the wait that follows; where the slot is not released here, a look at the next one will do.
    pin(logits);
    if constexpr (VALUES == Values::own) {
      release_slot(slot);
    } else {
      look_at(&shared.full[cursor.slot], cursor.parity);
    }
  }

  // Panels of a tile other than its last: read by the first product only.
  VMF_DEVICE void release_other_panels(int last) {
#pragma unroll
    for (int i = 1; i < T::PANELS; ++i) release_slot((last + T::SLOTS - i) % T::SLOTS);
  }

  VMF_DEVICE void release_slot(int slot) {
    __syncwarp();
    Cluster<BLOCKS>::release(&shared.empty[slot], lane_of_thread());
  }
};

}  // namespace vmf::cuda
