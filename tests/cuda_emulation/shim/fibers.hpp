// What one emulated launch consists of, and how the one operating-system thread goes from fiber to fiber.
#pragma once

#include "cuda_shim.hpp"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#include <setjmp.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SHIM_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#else
namespace {
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
}  // namespace
#endif

namespace shim {
namespace {

constexpr unsigned kWarp = 32;
constexpr std::size_t kCompact = 1 << 16;  // entries of the ready list that have been used up, before they go
constexpr std::size_t kStack = std::size_t(256) << 10;
constexpr std::size_t kCanary = 64;  // bytes behind the shared memory, where AddressSanitizer does not watch
constexpr unsigned char kCanaryByte = 0xA5, kPoison = 0xFF;

// Threads that wait for each other. Two tags, used in turn: a thread that leaves a barrier late must not be ordered
// after what the early ones do before the next barrier.
struct Meeting {
  unsigned size = 0, arrived = 0, turn = 0;
  const void* site = nullptr;
  char tags[2];
};

struct Warp {
  std::uint32_t arrived = 0, mask = 0;
  unsigned turn = 0;
  const void* site = nullptr;
};

struct Block {
  dim3 index;
  unsigned char* shared = nullptr;
  Meeting barrier;
  std::vector<Warp> warps;
  unsigned first = 0, exited = 0;
};

enum class State { fresh, ready, at_barrier, at_grid_barrier, at_shuffle, exited };

struct Fiber {
  ucontext_t context;
  jmp_buf place;
  char* stack = nullptr;
  State state = State::fresh;
  Block* block = nullptr;
  unsigned thread = 0;
  std::uint64_t posted[2];  // in turn: a lane may post again while a slower one still reads
  void* tsan = nullptr;
  void* fake_stack = nullptr;
};

// How the next thread is picked; each seed has one.
enum class Order { random, last_released_first, first_released_first, random_among_latest };

struct Run {
  const Launch* how = nullptr;
  const std::function<void()>* body = nullptr;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<unsigned> ready;
  std::size_t head = 0;
  Meeting grid;
  std::mt19937 random;
  Order order = Order::random;
  ucontext_t scheduler;
  jmp_buf scheduler_place;
  Fiber* current = nullptr;
  std::string error;
  long switches = 0;
  char start_tag, end_tag;
  void* scheduler_tsan = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_size = 0;
};

Run* run = nullptr;

std::string name_of(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.thread) + " of block " + std::to_string(fiber.block->index.x);
}

// Sanitizers keep a record for each stack and follow swapcontext; elsewhere _longjmp saves two system calls.
void to_scheduler() {
  Fiber& self = *run->current;
#if defined(SHIM_TSAN)
  __tsan_switch_to_fiber(run->scheduler_tsan, 1);
#endif
#if defined(__SANITIZE_ADDRESS__)
  const bool over = self.state == State::exited;
  __sanitizer_start_switch_fiber(over ? nullptr : &self.fake_stack, run->scheduler_stack, run->scheduler_stack_size);
#endif
#if defined(SHIM_TSAN) || defined(__SANITIZE_ADDRESS__)
  swapcontext(&self.context, &run->scheduler);
#else
  if (!_setjmp(self.place)) _longjmp(run->scheduler_place, 1);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake_stack, &run->scheduler_stack, &run->scheduler_stack_size);
#endif
}

void resume(Fiber& fiber) {
  run->current = &fiber;
  ++run->switches;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&run->scheduler_fake_stack, fiber.stack, kStack);
#endif
#if defined(SHIM_TSAN)
  __tsan_switch_to_fiber(fiber.tsan, 1);
#endif
#if defined(SHIM_TSAN) || defined(__SANITIZE_ADDRESS__)
  swapcontext(&run->scheduler, &fiber.context);
#else
  if (!_setjmp(run->scheduler_place)) {
    if (fiber.state == State::fresh)
      setcontext(&fiber.context);
    else
      _longjmp(fiber.place, 1);
  }
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(run->scheduler_fake_stack, nullptr, nullptr);
#endif
}

}  // namespace
}  // namespace shim
