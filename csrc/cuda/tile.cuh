// Sizes of the streaming kernels, in one table, and the layout of their shared memory. Plain C++: nothing here needs a device.
//
// Legend: a block of threads owns QUERIES rows of one matrix (rows, or prototypes) and streams tiles of KEYS rows of
// another past them; a panel is a tile's KEYS rows by PANEL columns, what one slot of the ring holds.
#pragma once

#include <cstdint>

namespace vmf::cuda {

constexpr int WARP = 32;
constexpr int GROUP = 128;         // threads of a warpgroup, what one wgmma takes
constexpr int GROUP_QUERIES = 64;  // rows of a wgmma
constexpr int CONSUMERS = 2;       // warpgroups: the accumulators of a third would not fit the registers at width 256
constexpr int QUERIES = CONSUMERS * GROUP_QUERIES;
constexpr int BLOCK_THREADS = (CONSUMERS + 1) * GROUP;
constexpr int CONSUMER_WARPS = CONSUMERS * GROUP / WARP;
constexpr int BOX = 64;  // columns of a TMA box: 128 bytes, the widest swizzle
constexpr int BOX_BYTES_PER_ROW = 128;

// Registers a thread, multiples of 8: (2 x 240 + 24) x 128 = 64512 of the multiprocessor's 65536. A block starts with 168 each.
constexpr int CONSUMER_REGISTERS = 240;
constexpr int PRODUCER_REGISTERS = 24;

constexpr int PROTOTYPE_PADDING = 256;  // what the callers pad K to: whole tiles and whole blocks, whatever the width

constexpr int SHARED_LIMIT = 227 * 1024;  // bytes a block may have on compute capability 9.0

// KEYS:  64 where the sums take 96 or 128 registers of a thread, so that logits (32) and probabilities (16) fit beside them;
//        128 where they take at most 64: a wider product reads less shared memory per operation.
// PANEL: columns of the sums a block forms. 384 would take 192 registers: two blocks share them, each with logits of its own.
// SLOTS: as many as shared memory holds; at width 64 more than 8 would only wait. Each slot has two lines of KEYS floats.
// TURNS: whether the warpgroups take turns at the tensor cores. At 128 and below a group's softmax takes most of the time of
// its
//        products, and must not fall into the same time in both groups; above, it fits under the group's own second product.
template <int WIDTH>
struct Sizes;
// clang-format off
template <> struct Sizes<64>  { static constexpr int KEYS = 128, PANEL = 64,  SLOTS = 8; static constexpr bool TURNS = true; };
template <> struct Sizes<128> { static constexpr int KEYS = 128, PANEL = 128, SLOTS = 5; static constexpr bool TURNS = true; };
template <> struct Sizes<192> { static constexpr int KEYS = 64,  PANEL = 192, SLOTS = 7; static constexpr bool TURNS = false; };
template <> struct Sizes<256> { static constexpr int KEYS = 64,  PANEL = 256, SLOTS = 5; static constexpr bool TURNS = false; };
template <> struct Sizes<384> { static constexpr int KEYS = 64,  PANEL = 192, SLOTS = 5; static constexpr bool TURNS = false; };
// clang-format on

template <int WIDTH_>
struct Tile : Sizes<WIDTH_> {
  static constexpr int WIDTH = WIDTH_;
  using Sizes<WIDTH>::KEYS, Sizes<WIDTH>::PANEL, Sizes<WIDTH>::SLOTS, Sizes<WIDTH>::TURNS;
  static constexpr int PANELS = WIDTH / PANEL;
  static constexpr int ELEMENT_BYTES = 2;
  static constexpr int QUERY_BYTES = QUERIES * WIDTH * ELEMENT_BYTES;
  static constexpr int SLOT_BYTES = KEYS * PANEL * ELEMENT_BYTES;
  static constexpr int LINE_BYTES = KEYS * 4;
  static constexpr int LOGITS = KEYS / 2;   // fp32 registers of a thread: 64 x KEYS over 128 threads
  static constexpr int WEIGHTS = KEYS / 4;  // 32-bit registers, two 16-bit probabilities in each
  static constexpr int SUMS = PANEL / 2;    // fp32 registers of a thread
  // The passes count tiles by division: what is left over would be dropped, and never missed.
  static_assert(PROTOTYPE_PADDING % KEYS == 0, "a tile of the row pass must divide what prototypes are padded to");
  static_assert(QUERIES % KEYS == 0, "a tile of the column pass must divide what rows are padded to");
  static_assert(WIDTH % PANEL == 0, "panels must share out the columns");
  static_assert(KEYS / 2 * BOX_BYTES_PER_ROW % 1024 == 0, "half a tile must start where the swizzle's pattern does");
};

static_assert(PROTOTYPE_PADDING % QUERIES == 0, "blocks of the column pass must share out the padded prototypes");

// Blocks may run in clusters of two that share each tile's copies: half of its rows each, which start at whole patterns of the
// swizzle at every width; half of the boxes would not do where a panel has one or three. Narrower rows are left out: there the
// exponentials take as long as the products, and a wait for the other block would show.
constexpr int MOST_BLOCKS_IN_CLUSTER = 2;
constexpr int NARROWEST_IN_CLUSTERS = 128;

// Shared memory of a block. Swizzled tiles start at multiples of 1024 bytes: the pattern repeats with eight rows of 128.
template <typename T>
struct alignas(1024) Shared {
  uint8_t queries[T::QUERY_BYTES];           // WIDTH / 64 boxes [QUERIES, 64]
  uint8_t slots[T::SLOTS][T::SLOT_BYTES];    // each PANEL / 64 boxes [KEYS, 64]
  float lines[T::SLOTS][2][T::KEYS];         // biases or offsets of the slot's keys
  uint64_t full[T::SLOTS], empty[T::SLOTS];  // mbarriers
  uint64_t query_full, query_empty;
  float scalars[4];
};

static_assert(sizeof(Shared<Tile<64>>) <= SHARED_LIMIT && sizeof(Shared<Tile<128>>) <= SHARED_LIMIT &&
              sizeof(Shared<Tile<192>>) <= SHARED_LIMIT && sizeof(Shared<Tile<256>>) <= SHARED_LIMIT &&
              sizeof(Shared<Tile<384>>) <= SHARED_LIMIT);

}  // namespace vmf::cuda
