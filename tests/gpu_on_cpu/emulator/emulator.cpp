#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define ANNOTATE(call) call
#else
#define ANNOTATE(call)
#endif

namespace emulator {

Dim gridDim, blockDim, blockIdx, threadIdx;

namespace {

constexpr size_t kStack = 256 << 10;

enum class State { ready, at_block, at_warp, ended };

// A thread's stack and the point where it left off. Fibers are reused by later blocks, as creating one costs a system
// call.
struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf left;
  bool begun = false;
  void* fake_stack = nullptr;  // for AddressSanitizer

  Dim index;
  State state = State::ended;
  std::source_location site;
  bool phase = false;
};

struct Emulator {
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;

  const std::function<void()>* thread = nullptr;
  int64_t launches = 0;
  std::string failure;
  Order order = Order::forward;
  std::mt19937 random{0};
  std::unique_ptr<unsigned char[]> shared;
  // The values that lanes exchange, in two sets: a lane may give its next value before all have read the last one.
  std::vector<uint64_t> given[2];
};

Emulator e;

// Switches from the fiber to the scheduler. Returns when the fiber is resumed.
__attribute__((noinline)) void leave() {
  Fiber& fiber = *e.current;
  ANNOTATE(__sanitizer_start_switch_fiber(&fiber.fake_stack, e.scheduler_stack, e.scheduler_size));
  if (_setjmp(fiber.left) == 0) _longjmp(e.scheduler, 1);
  ANNOTATE(__sanitizer_finish_switch_fiber(e.current->fake_stack, nullptr, nullptr));
}

void fiber_main() {
  ANNOTATE(__sanitizer_finish_switch_fiber(nullptr, &e.scheduler_stack, &e.scheduler_size));
  for (;;) {
    (*e.thread)();
    e.current->state = State::ended;
    leave();
  }
}

// Runs a fiber until it waits or ends.
__attribute__((noinline)) void resume(Fiber& fiber) {
  e.current = &fiber;
  threadIdx = fiber.index;
  ANNOTATE(__sanitizer_start_switch_fiber(&e.scheduler_fake_stack, fiber.stack.get(), kStack));
  if (_setjmp(e.scheduler) == 0) {
    if (fiber.begun) _longjmp(fiber.left, 1);
    fiber.begun = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    setcontext(&fiber.start);
  }
  ANNOTATE(__sanitizer_finish_switch_fiber(e.scheduler_fake_stack, nullptr, nullptr));
}

void wait(State state, std::source_location site) {
  e.current->state = state;
  e.current->site = site;
  leave();
}

std::vector<int> ordered(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (e.order == Order::reverse) std::reverse(order.begin(), order.end());
  if (e.order == Order::random) std::shuffle(order.begin(), order.end(), e.random);
  return order;
}

std::string place(const Fiber& fiber) {
  const std::string thread = "thread " + std::to_string(fiber.index.x) + ", " + std::to_string(fiber.index.y) + ", " +
                             std::to_string(fiber.index.z);
  if (fiber.state == State::ended) return thread + " has ended";
  std::string file = fiber.site.file_name();
  return thread + " waits in line " + std::to_string(fiber.site.line()) + " of " +
         file.substr(file.find_last_of('/') + 1);
}

// Drops the suspended fibers. Later launches create new ones.
[[noreturn]] void fail(const std::string& what) {
  e.fibers.clear();
  throw std::runtime_error(what);
}

bool together(const Fiber& a, const Fiber& b) {
  return a.state == b.state && (a.state == State::ended || (a.site.line() == b.site.line() &&
                                                            !std::strcmp(a.site.file_name(), b.site.file_name())));
}

// Runs the threads [first, last) of one warp until all wait at a barrier of the block or have ended.
void run_warp(int first, int last) {
  for (;;) {
    for (int lane : ordered(last - first)) {
      Fiber& fiber = *e.fibers[first + lane];
      if (fiber.state == State::ready) resume(fiber);
      if (!e.failure.empty()) fail(e.failure);
    }
    int waiting = 0;
    for (int i = first; i < last; ++i) waiting += e.fibers[i]->state == State::at_warp;
    if (waiting == 0) return;
    for (int i = first; i < last; ++i)
      if (!together(*e.fibers[first], *e.fibers[i]))
        fail("divergent lanes: " + place(*e.fibers[first]) + ", " + place(*e.fibers[i]));
    if (waiting != kWarp) fail("a warp of " + std::to_string(waiting) + " lanes exchanges values");
    for (int i = first; i < last; ++i) e.fibers[i]->state = State::ready;
  }
}

void run_block(int threads) {
  const int warps = (threads + kWarp - 1) / kWarp;
  for (;;) {
    for (int warp : ordered(warps)) run_warp(warp * kWarp, std::min(threads, (warp + 1) * kWarp));
    for (int i = 1; i < threads; ++i)
      if (!together(*e.fibers[0], *e.fibers[i]))
        fail("divergent barrier: " + place(*e.fibers[0]) + ", " + place(*e.fibers[i]));
    if (e.fibers[0]->state == State::ended) return;
    for (int i = 0; i < threads; ++i) e.fibers[i]->state = State::ready;
  }
}

}  // namespace

void set_order(Order order) { e.order = order; }

int64_t launches() { return e.launches; }

void* shared_memory() { return e.shared.get(); }

void wait_for_block(std::source_location site) { wait(State::at_block, site); }

uint64_t exchange(unsigned mask, uint64_t value, std::source_location site,
                  const std::function<uint64_t(const uint64_t*, int)>& read) {
  if (mask != 0xffffffff) {
    e.failure = "only whole warps exchange values here";
    leave();
  }
  const Dim t = threadIdx;
  const int thread = static_cast<int>((t.z * blockDim.y + t.y) * blockDim.x + t.x), lane = thread % kWarp;
  std::vector<uint64_t>& given = e.given[e.current->phase ^= true];
  given[thread] = value;
  wait(State::at_warp, site);
  return read(&given[thread - lane], lane);
}

void run(Dim grid, Dim block, int64_t shared_bytes, const std::function<void()>& thread) {
  const int threads = static_cast<int>(block.x * block.y * block.z);
  if (threads < 1 || threads > 1024 || block.z > 64) fail("a block has 1 to 1024 threads");
  if (grid.x < 1 || grid.x > 0x7fffffff || grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535)
    fail("a grid has 1 to 2^31 - 1 x 65535 x 65535 blocks");
  if (shared_bytes > 48 << 10) fail("a block has 48 KiB of shared memory");
  gridDim = grid;
  blockDim = block;
  ++e.launches;
  e.thread = &thread;
  e.failure.clear();
  while (static_cast<int>(e.fibers.size()) < threads) e.fibers.push_back(std::make_unique<Fiber>());
  for (auto& given : e.given) given.assign(threads, 0);
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t at = e.order == Order::reverse ? blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                static_cast<unsigned>(at / grid.x / grid.y)};
    // Allocated for each block, so that AddressSanitizer sees its end. 0xff is NaN in every type, so no sum starts at 0
    // by luck.
    e.shared.reset(new unsigned char[shared_bytes]);
    std::memset(e.shared.get(), 0xff, shared_bytes);
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = *e.fibers[t];
      fiber.index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
      fiber.state = State::ready;
    }
    run_block(threads);
  }
}

}  // namespace emulator
