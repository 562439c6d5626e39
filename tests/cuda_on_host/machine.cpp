// machine.h: fibers, their scheduler, shared memory.
#include "machine.h"

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

namespace vmf::cuda {
constexpr size_t SHARED_BYTES = 227 * 1024;
alignas(1024) uint8_t p_shared[SHARED_BYTES];  // what `extern __shared__` of the kernels names
}  // namespace vmf::cuda

namespace on_host {
namespace {

using vmf::cuda::p_shared;

constexpr size_t STACK_BYTES = 128 * 1024;
constexpr uint32_t FIRST_ADDRESS = 1024;  // not 0, so that an offset taken for an address is found out
constexpr int SHORT_STALL = 5, LONG_STALL = 100, LONG_STALL_ONE_IN = 8;  // rounds
constexpr int PATIENCE = 10 * LONG_STALL;  // rounds in which nothing happened before nothing ever will

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  std::function<bool()> condition;  // of going on; none: at once
  bool done;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  std::vector<int> stalls;  // rounds that a warp sits out
  std::map<int, Meeting> named;
  std::vector<std::function<void()>> copies;
  void (*thread)(void**);  // what each runs
  void** arguments;
  size_t shared_bytes;
  ucontext_t scheduler;
};

Block block;
Timing chosen;
std::mt19937 schedule;

int below(int n) { return static_cast<int>(schedule() % n); }

void run_fiber() {
  block.thread(block.arguments);
  Fiber& fiber = block.fibers[threadIdx.x];
  fiber.done = true;
  swapcontext(&fiber.context, &block.scheduler);
}

void prepare_block(int threads) {
  memset(p_shared, 0xFF, sizeof p_shared);  // NaN, as floats and as either element
  block.named.clear();
  block.warps.assign(threads / LANES, {});
  block.stalls.assign(threads / LANES, 0);
  if (block.fibers.size() != static_cast<size_t>(threads)) block.fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : block.fibers) {
    fiber.done = false;
    fiber.condition = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  clear_products(threads);
}

// Whether any of its threads could run. Then a warp that is not favoured pauses for a little, and any for long now and then:
// until whatever it has given up is taken.
bool run_warp(int warp, bool is_favoured) {
  if (block.stalls[warp] > 0) return --block.stalls[warp], false;
  bool ran = false;
  for (int i = warp * LANES; i < (warp + 1) * LANES; ++i) {
    Fiber& fiber = block.fibers[i];
    if (fiber.done || (fiber.condition && !fiber.condition())) continue;
    fiber.condition = nullptr;
    threadIdx = dim3(i);
    swapcontext(&block.scheduler, &fiber.context);
    ran = true;
  }
  if (ran) block.stalls[warp] = by_chance(LONG_STALL_ONE_IN) ? below(LONG_STALL) : is_favoured ? 0 : below(SHORT_STALL);
  return ran;
}

bool land_a_copy() {
  if (block.copies.empty() || !by_chance(3)) return false;
  const auto chosen = block.copies.begin() + below(static_cast<int>(block.copies.size()));
  const std::function<void()> copy = *chosen;
  block.copies.erase(chosen);
  copy();
  return true;
}

bool are_all_done() {
  for (const Fiber& fiber : block.fibers)
    if (!fiber.done) return false;
  return true;
}

void run_block() {
  const int warps = static_cast<int>(block.warps.size()), favoured = below(3);  // a warpgroup that is ahead of the others
  for (int idle = 0; !are_all_done();) {
    bool happened = false;
    const int first = below(warps);
    for (int i = 0; i < warps; ++i) {
      const int warp = (first + i) % warps;
      happened |= run_warp(warp, warp / 4 == favoured);
    }
    happened |= land_a_copy();
    if (chosen == Timing::any) happened |= finish_a_product(below(warps));
    idle = happened ? 0 : idle + 1;
    if (idle > PATIENCE && block.copies.empty()) fail("LOCKED block %u %u %u", blockIdx.x, blockIdx.y, blockIdx.z);
  }
  if (!block.copies.empty()) fail("LEFT a copy in flight");
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

void let_others_run() { swapcontext(&block.fibers[threadIdx.x].context, &block.scheduler); }

void wait_until(std::function<bool()> condition) {
  if (condition()) return;
  block.fibers[threadIdx.x].condition = std::move(condition);
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

Meeting& named_barrier(int id) { return block.named[id]; }

void start_copy(std::function<void()> copy) { block.copies.push_back(std::move(copy)); }

uint8_t* shared_at(uint32_t address, size_t bytes) {
  if (address < FIRST_ADDRESS || address - FIRST_ADDRESS + bytes > block.shared_bytes)
    fail("OUTSIDE of shared memory: %zu bytes at %u", bytes, address);
  return p_shared + address - FIRST_ADDRESS;
}

uint32_t address_of_shared(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - p_shared) + FIRST_ADDRESS;
}

void run_grid(dim3 grid, int threads, size_t shared_bytes, void (*thread)(void**), void** arguments) {
  if (shared_bytes > sizeof p_shared || shared_bytes > static_cast<size_t>(shared_bytes_asked_for))
    fail("REFUSED %zu bytes of shared memory, %d asked for", shared_bytes, shared_bytes_asked_for);
  block.thread = thread;
  block.arguments = arguments;
  block.shared_bytes = shared_bytes;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        prepare_block(threads);
        run_block();
      }
}

}  // namespace on_host

void __trap() { on_host::fail("TRAP"); }
void __syncthreads() {
  on_host::meet(on_host::named_barrier(0), static_cast<int>(on_host::block.fibers.size()));
}
void __syncwarp() { on_host::meet(on_host::block.warps[threadIdx.x / on_host::LANES], on_host::LANES); }
