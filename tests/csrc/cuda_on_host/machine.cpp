// machine.h: fibers, their scheduler, shared memory.
#include "machine.h"

#undef _FORTIFY_SOURCE  // it takes a jump to another stack for an error
#include <setjmp.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime_api.h"
#include "products.h"

namespace on_host {
namespace {

constexpr size_t SHARED_BYTES = 227 * 1024;
constexpr int MOST_BLOCKS = 2;  // of a cluster
constexpr size_t STACK_BYTES = 128 * 1024;
constexpr uint32_t FIRST_ADDRESS = 1024;  // not 0, so that an offset taken for an address is found out
constexpr uint32_t WINDOW = 1 << 24;      // addresses of the cluster's block r start at (r + 1) windows, those of the own at 0
constexpr int SHORT_STALL = 5, LONG_STALL = 100, LONG_STALL_ONE_IN = 8;  // rounds
constexpr int PATIENCE = 10 * LONG_STALL;  // rounds in which nothing happened before nothing ever will

struct Fiber {
  ucontext_t start;  // of a thread that has not run: from then on it is resumed where it left
  jmp_buf place;
  bool has_run;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  std::function<bool()> condition;  // of going on; none: at once
  bool done;
};

struct Block {
  uint8_t* memory;
  dim3 index;
  std::map<int, Meeting> named;
  int running;  // threads that have not ended
};

struct Copy {
  int rank;  // of the block that it fills
  std::function<void()> work;
};

// The blocks that run together. Fibers and warps are numbered throughout: a block's are neighbours.
struct Cluster {
  Grid grid;
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  std::vector<int> stalls;  // rounds that a warp sits out
  std::vector<Copy> copies;
  std::vector<Block> blocks;
  int rank;         // of the block that runs
  Meeting meeting;  // of all
  jmp_buf scheduler;
};

alignas(1024) uint8_t memories[MOST_BLOCKS][SHARED_BYTES];
Cluster cluster;
Timing chosen;
std::mt19937 schedule;

int below(int n) { return static_cast<int>(schedule() % n); }

Block& block() { return cluster.blocks[cluster.rank]; }

void enter_block(int rank) {
  cluster.rank = rank;
  blockIdx = block().index;
}

int running_threads() {
  int sum = 0;
  for (const Block& each : cluster.blocks) sum += each.running;
  return sum;
}

// Those who have ended are not waited for.
void open_meeting_if_all_came() {
  Meeting& meeting = cluster.meeting;
  if (meeting.arrived == 0 || meeting.arrived < running_threads()) return;
  meeting.arrived = 0;
  ++meeting.phase;
}

void run_fiber() {
  cluster.grid.thread(cluster.grid.arguments);
  cluster.fibers[thread_in_cluster()].done = true;
  --block().running;
  open_meeting_if_all_came();
  _longjmp(cluster.scheduler, 1);
}

// Until the fiber waits, or ends. A swapcontext would call the kernel each time.
void resume(Fiber& fiber) {
  if (_setjmp(cluster.scheduler)) return;
  if (fiber.has_run) _longjmp(fiber.place, 1);
  fiber.has_run = true;
  setcontext(&fiber.start);
}

void prepare_fiber(Fiber& fiber) {
  fiber.done = fiber.has_run = false;
  fiber.condition = nullptr;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = STACK_BYTES;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_fiber, 0);
}

void prepare_cluster(dim3 first) {
  const Grid& grid = cluster.grid;
  cluster.blocks.clear();
  for (int rank = 0; rank < grid.cluster; ++rank) {
    memset(memories[rank], 0xFF, SHARED_BYTES);  // NaN, as floats and as either element
    cluster.blocks.push_back({memories[rank], dim3(first.x + rank, first.y, first.z), {}, grid.threads});
  }
  const size_t threads = static_cast<size_t>(grid.cluster) * grid.threads;
  cluster.meeting = {};
  cluster.warps.assign(threads / LANES, {});
  cluster.stalls.clear();
  for (int rank = 0; rank < grid.cluster; ++rank)  // the blocks of a cluster need not start at the same time
    cluster.stalls.insert(cluster.stalls.end(), grid.threads / LANES, grid.cluster == 1 ? 0 : below(LONG_STALL));
  if (cluster.fibers.size() != threads) cluster.fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : cluster.fibers) prepare_fiber(fiber);
  clear_products(static_cast<int>(threads));
}

void enter_block_of(int warp) { enter_block(warp * LANES / cluster.grid.threads); }

// Whether any of its threads could run. Then a warp that is not favoured pauses for a little, and any for long now and then:
// until whatever it has given up is taken.
bool run_warp(int warp, bool is_favoured) {
  if (cluster.stalls[warp] > 0) return --cluster.stalls[warp], false;
  bool ran = false;
  enter_block_of(warp);
  for (int i = warp * LANES; i < (warp + 1) * LANES; ++i) {
    Fiber& fiber = cluster.fibers[i];
    if (fiber.done || (fiber.condition && !fiber.condition())) continue;
    fiber.condition = nullptr;
    threadIdx = dim3(i % cluster.grid.threads);
    resume(fiber);
    ran = true;
  }
  if (ran) cluster.stalls[warp] = by_chance(LONG_STALL_ONE_IN) ? below(LONG_STALL) : is_favoured ? 0 : below(SHORT_STALL);
  return ran;
}

bool land_a_copy() {
  if (cluster.copies.empty() || !by_chance(3)) return false;
  const auto chosen = cluster.copies.begin() + below(static_cast<int>(cluster.copies.size()));
  const Copy copy = *chosen;
  cluster.copies.erase(chosen);
  enter_block(copy.rank);
  copy.work();
  return true;
}

bool finish_a_product_of(int warp) {
  enter_block_of(warp);
  return finish_a_product(warp);
}

void run_cluster() {
  const int warps = static_cast<int>(cluster.warps.size()), favoured = below(warps / 4);  // a warpgroup that is ahead
  for (int idle = 0; running_threads() > 0;) {
    bool happened = false;
    const int first = below(warps);
    for (int i = 0; i < warps; ++i) {
      const int warp = (first + i) % warps;
      happened |= run_warp(warp, warp / 4 == favoured);
    }
    happened |= land_a_copy();
    if (chosen == Timing::any) happened |= finish_a_product_of(below(warps));
    idle = happened ? 0 : idle + 1;
    if (idle > PATIENCE && cluster.copies.empty()) fail("LOCKED block %u %u %u", blockIdx.x, blockIdx.y, blockIdx.z);
  }
  if (!cluster.copies.empty()) fail("LEFT a copy in flight");
  if (products_in_flight()) fail("LEFT a product in flight");
}

}  // namespace

void set_schedule(Timing timing, unsigned seed) {
  chosen = timing;
  schedule.seed(seed);
}

Timing timing() { return chosen; }

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vprintf(format, arguments);
  va_end(arguments);
  puts("");
  fflush(stdout);
  _Exit(1);  // from a fiber: nothing is unwound
}

bool by_chance(int n) { return below(n) == 0; }

void let_others_run() {
  if (_setjmp(cluster.fibers[thread_in_cluster()].place) == 0) _longjmp(cluster.scheduler, 1);
}

void wait_until(std::function<bool()> condition) {
  if (condition()) return;
  cluster.fibers[thread_in_cluster()].condition = std::move(condition);
  let_others_run();
}

void arrive_at(Meeting& meeting, int threads) {
  if (++meeting.arrived < threads) return;
  meeting.arrived = 0;
  ++meeting.phase;
}

void meet(Meeting& meeting, int threads) {
  const long phase = meeting.phase;
  arrive_at(meeting, threads);
  wait_until([&meeting, phase] { return meeting.phase != phase; });
}

Meeting& named_barrier(int id) { return block().named[id]; }

void meet_cluster() {
  const long phase = cluster.meeting.phase;
  ++cluster.meeting.arrived;
  open_meeting_if_all_came();
  wait_until([phase] { return cluster.meeting.phase != phase; });
}

int thread_in_cluster() { return cluster.rank * cluster.grid.threads + static_cast<int>(threadIdx.x); }
int rank_in_cluster() { return cluster.rank; }
int blocks_together() { return cluster.grid.cluster; }

void start_copy(int rank, std::function<void()> copy) { cluster.copies.push_back({rank, std::move(copy)}); }

uint8_t* shared_at(uint32_t address, size_t bytes) {
  const int rank = address < WINDOW ? cluster.rank : static_cast<int>(address / WINDOW) - 1;
  const uint32_t offset = address % WINDOW - FIRST_ADDRESS;  // of the block's memory; wraps around below it
  if (rank >= cluster.grid.cluster || offset + bytes > cluster.grid.shared_bytes || offset >= SHARED_BYTES)
    fail("OUTSIDE of shared memory: %zu bytes at %u", bytes, address);
  if (cluster.blocks[rank].running == 0) fail("GONE is block %d of its cluster: %zu bytes at %u", rank, bytes, address);
  return cluster.blocks[rank].memory + offset;
}

uint32_t address_of_shared(const void* p) {
  const ptrdiff_t offset = static_cast<const uint8_t*>(p) - block().memory;
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(SHARED_BYTES)) fail("OUTSIDE of the block's shared memory: a pointer");
  return static_cast<uint32_t>(offset) + FIRST_ADDRESS;
}

uint32_t address_in(int rank, uint32_t address) { return (rank + 1) * WINDOW + address; }

uint8_t* shared_bytes() { return block().memory; }

void run_grid(const Grid& grid) {
  if (grid.shared_bytes > SHARED_BYTES || grid.shared_bytes > static_cast<size_t>(shared_bytes_asked_for))
    fail("REFUSED %zu bytes of shared memory, %d asked for", grid.shared_bytes, shared_bytes_asked_for);
  if (grid.cluster < 1 || grid.cluster > MOST_BLOCKS || grid.blocks.x % grid.cluster != 0)
    fail("REFUSED clusters of %d blocks in a row of %u", grid.cluster, grid.blocks.x);
  cluster.grid = grid;
  for (unsigned z = 0; z < grid.blocks.z; ++z)
    for (unsigned y = 0; y < grid.blocks.y; ++y)
      for (unsigned x = 0; x < grid.blocks.x; x += grid.cluster) {
        prepare_cluster(dim3(x, y, z));
        run_cluster();
      }
}

}  // namespace on_host

void __trap() { on_host::fail("TRAP"); }
void __syncthreads() { on_host::meet(on_host::named_barrier(0), on_host::cluster.grid.threads); }
void __syncwarp() { on_host::meet(on_host::cluster.warps[on_host::thread_in_cluster() / on_host::LANES], on_host::LANES); }
