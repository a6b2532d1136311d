// Runs launches of translated kernels, one block after the other. A block's threads are fibers that
// take turns at barriers, of the block or of a warp, in an order that is shuffled anew from one
// barrier to the next.
#include "machine.h"

#include <ucontext.h>

#include <algorithm>
#include <cfenv>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "launch.h"

namespace ptx {

constexpr Range kNone = {~0ull, ~0ull, 0};
Range allowed = kNone;
const unsigned char* parameters;
u32 parameter_bytes;
unsigned char* shared_memory;
Cell* cells;
u32 shared_bytes;

namespace {

std::vector<Range> ranges;  // by their begin; they do not overlap
std::string fault_of_launch;
unsigned seed;

enum class State { kReady, kAtBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  static constexpr size_t kStack = 256 << 10;
  Thread self;
  State state;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
};

std::vector<std::unique_ptr<Fiber>> fibers;
ucontext_t scheduler;
Fiber* running;
const Entry* kernel;

// A fiber runs one thread after the other: to make one takes longer than to run it.
void run_threads() {
  for (;;) {
    kernel->run(running->self);
    running->state = State::kDone;
    swapcontext(&running->context, &scheduler);
  }
}

std::unique_ptr<Fiber> new_fiber() {
  auto fiber = std::make_unique<Fiber>();
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = Fiber::kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, run_threads, 0);
  return fiber;
}

// The threads of a warp have met: what they did before is in order with what they do now.
void pass_warp_barrier(u16 warp) {
  const auto pass = [&](u16& user) {
    if (user != kNobody && user != kMany && warp_of(user) == warp) user = u16(kOfWarp + warp);
  };
  for (u32 i = 0; 4 * i < shared_bytes; ++i) pass(cells[i].writer), pass(cells[i].reader);
}

std::string missed(u32 waiting, u32 threads, const char* barrier, u32 block) {
  return std::to_string(waiting) + " threads wait at a barrier" + barrier + " that " +
         std::to_string(threads - waiting) + " threads missed, block " + std::to_string(block) +
         " of " + kernel->name;
}

void run_block(u32 block, u32 blocks, u32 threads, std::mt19937& random) {
  while (fibers.size() < threads) fibers.push_back(new_fiber());
  for (u32 t = 0; t < threads; ++t) {
    fibers[t]->self = {t, threads, block, blocks};
    fibers[t]->state = State::kReady;
  }
  std::vector<u32> turns(threads);
  std::iota(turns.begin(), turns.end(), 0);
  for (;;) {
    std::shuffle(turns.begin(), turns.end(), random);
    for (const u32 t : turns) {
      running = fibers[t].get();
      if (running->state != State::kReady) continue;
      swapcontext(&scheduler, &running->context);
      if (!fault_of_launch.empty()) return;
    }
    // Every thread waits or is done.
    const auto count = [&](u32 first, u32 last, State state) {
      u32 found = 0;
      for (u32 t = first; t < last; ++t) found += fibers[t]->state == state;
      return found;
    };
    const auto release = [&](u32 first, u32 last) {
      for (u32 t = first; t < last; ++t) fibers[t]->state = State::kReady;
    };
    bool passed = false;
    for (u32 first = 0; first < threads; first += kWarp) {
      const u32 last = std::min(first + kWarp, threads);
      const u32 waiting = count(first, last, State::kAtWarpBarrier);
      if (waiting == 0) continue;
      if (waiting != last - first) {
        fault_of_launch = missed(waiting, last - first, " of their warp", block);
        return;
      }
      pass_warp_barrier(u16(first / kWarp));
      release(first, last);
      passed = true;
    }
    if (passed) continue;
    const u32 waiting = count(0, threads, State::kAtBarrier);
    if (waiting == 0) return;
    if (waiting != threads) {
      fault_of_launch = missed(waiting, threads, "", block);
      return;
    }
    release(0, threads);
    for (u32 i = 0; 4 * i < shared_bytes; ++i) cells[i].writer = cells[i].reader = kNobody;
  }
}

}  // namespace

void barrier(Thread&) {
  running->state = State::kAtBarrier;
  swapcontext(&running->context, &scheduler);
}

void warp_barrier(Thread&) {
  running->state = State::kAtWarpBarrier;
  swapcontext(&running->context, &scheduler);
}

// The fibers of a launch that failed stay in the middle of their threads, so none is used again.
void fault(const Thread& self, const char* what, u64 address, u32 size) {
  char text[200];
  std::snprintf(text, sizeof text, "%s: %u bytes at 0x%llx, block %u, thread %u of ", what, size,
                static_cast<unsigned long long>(address), self.block, self.thread);
  fault_of_launch = std::string(text) + kernel->name;
  setcontext(&scheduler);
  __builtin_unreachable();
}

void find_range(const Thread& self, u64 address, u32 size, bool writes) {
  const auto after = std::upper_bound(ranges.begin(), ranges.end(), address,
                                      [](u64 at, const Range& range) { return at < range.begin; });
  if (after != ranges.begin()) {
    const Range& range = after[-1];
    if (address < range.end && range.end - address >= size && (range.writable || !writes)) {
      allowed = range;
      return;
    }
  }
  fault(self,
        writes ? "write of memory that the call does not write"
               : "read of memory that the call does not read",
        address, size);
}

void allow(const Range* first, int count) {
  ranges.assign(first, first + count);
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  allowed = kNone;
}

void shuffle_by(unsigned number) { seed = number; }

std::string run_launch(const Entry& entry, const unsigned char* with, u32 blocks, u32 threads,
                       u32 dynamic_shared) {
  kernel = &entry;
  parameters = with;
  parameter_bytes = entry.parameters[entry.parameter_count];
  shared_bytes = entry.static_shared + dynamic_shared;
  std::vector<unsigned char> memory(shared_bytes);
  std::vector<Cell> cells_of_block(shared_bytes / 4 + 1);
  shared_memory = memory.data();
  cells = cells_of_block.data();
  fault_of_launch.clear();
  std::mt19937 random(seed);
  std::vector<u32> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  std::fenv_t callers;
  std::fegetenv(&callers);
  std::fesetenv(FE_DFL_ENV);  // of the fibers too: a context keeps what it was made or left with
  for (const u32 block : order) {
    std::fill(cells_of_block.begin(), cells_of_block.end(), Cell{});
    run_block(block, blocks, threads, random);
    if (!fault_of_launch.empty()) break;
  }
  std::fesetenv(&callers);
  if (!fault_of_launch.empty()) fibers.clear();
  return fault_of_launch;
}

}  // namespace ptx
