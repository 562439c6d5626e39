// Multiprocessors with the blocks of one cluster at a time. Threads are fibers of one thread of the host: each runs until it
// waits, and a seed decides who runs next, which copy lands next, and when a product finishes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace on_host {

constexpr int LANES = 32;

// When a committed product is carried out: at the wait for it, at its commit, or at any time between.
enum class Timing { late, early, any };

// Everything that follows depends on these two.
void set_schedule(Timing timing, unsigned seed);
Timing timing();

// Prints, and ends the process with status 1.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// True once in `n` calls.
bool by_chance(int n);

// Lets other threads run until `condition` holds. A block none of whose threads can run, and for which nothing is under way,
// fails as LOCKED.
void wait_until(std::function<bool()> condition);
void let_others_run();

// Of `threads` that arrive, in any order, the last opens it for those who wait.
struct Meeting {
  int arrived = 0;
  long phase = 0;
};
void arrive_at(Meeting& meeting, int threads);
void meet(Meeting& meeting, int threads);
Meeting& named_barrier(int id);  // of the block that runs
void meet_cluster();             // all threads of the cluster that have not ended

int thread_in_cluster();  // that runs; a block's threads are neighbours
int rank_in_cluster();    // of the block that runs
int blocks_together();    // in a cluster of the last launch

// Work of the copies' engine for a block of the cluster, which runs while it is done: some time after this, in no particular
// order.
void start_copy(int rank, std::function<void()> copy);

// Shared memory, by the 32-bit addresses that instructions have: of the block that runs, or of one of the cluster's. Fails
// outside of what the launch asked for, and where the block has ended.
uint8_t* shared_at(uint32_t address, size_t bytes);
uint32_t address_of_shared(const void* p);        // of the block that runs
uint32_t address_in(int rank, uint32_t address);  // the same place in another block
uint8_t* shared_bytes();                          // all of the block that runs

// The 128-byte swizzle, of copies and of products: exclusive-ors bits 4-6 of an address with bits 7-9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

}  // namespace on_host
