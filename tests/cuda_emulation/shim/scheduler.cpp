// The scheduler of the stand-in: who runs on, who waits for whom, and what is wrong with that; see cuda_shim.hpp.
#include "fibers.hpp"

namespace shim {
namespace {

void fail(const std::string& what) {
  if (run->error.empty()) run->error = what;
  __tsan_release(&run->end_tag);
  to_scheduler();  // and is never resumed
  abort();
}

void release(unsigned begin, unsigned end, State from) {
  for (unsigned i = begin; i < end; ++i) {
    if (run->fibers[i].state != from) continue;
    run->fibers[i].state = State::ready;
    run->ready.push_back(i);
  }
}

void meet(Meeting& meeting, State state, const void* site, unsigned begin, unsigned end, unsigned exited) {
  Fiber& self = *run->current;
  const char* what = state == State::at_barrier ? "__syncthreads" : "the grid's barrier";
  if (meeting.arrived == 0) meeting.site = site;
  if (meeting.site != site)
    fail(std::string("divergent barrier: ") + name_of(self) + " reached " + what +
         " at another place than those before");
  if (exited)
    fail(std::string("divergent barrier: ") + name_of(self) + " waits at " + what + ", but " + std::to_string(exited) +
         " threads have exited");
  char* tag = &meeting.tags[meeting.turn & 1];
  __tsan_release(tag);
  self.state = state;
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.turn;
    release(begin, end, state);
  }
  to_scheduler();
  __tsan_acquire(tag);
}

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &run->scheduler_stack, &run->scheduler_stack_size);
#endif
  __tsan_acquire(&run->start_tag);
  (*run->body)();
  Fiber& self = *run->current;
  ++self.block->exited;
  if (self.block->barrier.arrived)
    run->error = "divergent barrier: " + name_of(self) + " exited while others wait at __syncthreads";
  else if (run->grid.arrived)
    run->error = "divergent barrier: " + name_of(self) + " exited while others wait at the grid's barrier";
  self.state = State::exited;
  __tsan_release(&run->end_tag);
  to_scheduler();
}

unsigned next_ready() {
  std::vector<unsigned>& ready = run->ready;
  const std::size_t count = ready.size() - run->head;
  if (run->order == Order::first_released_first) {
    if (run->head > kCompact) {
      ready.erase(ready.begin(), ready.begin() + std::ptrdiff_t(run->head));
      run->head = 0;
    }
    return ready[run->head++];
  }
  std::size_t back = 0;
  if (run->order == Order::random) back = run->random() % count;
  if (run->order == Order::random_among_latest) back = run->random() % std::min<std::size_t>(count, 2 * kWarp);
  std::swap(ready[ready.size() - 1 - back], ready.back());
  const unsigned picked = ready.back();
  ready.pop_back();
  return picked;
}

std::string deadlock() {
  unsigned count[6] = {};
  for (const Fiber& fiber : run->fibers) ++count[int(fiber.state)];
  return "deadlock: " + std::to_string(count[int(State::at_barrier)]) + " threads wait at __syncthreads, " +
         std::to_string(count[int(State::at_grid_barrier)]) + " at the grid's barrier, " +
         std::to_string(count[int(State::at_shuffle)]) + " at a shuffle; " + std::to_string(count[int(State::exited)]) +
         " have exited";
}

void schedule() {
  for (;;) {
    if (run->head == run->ready.size()) {
      run->ready.clear();
      run->head = 0;
      break;
    }
    resume(run->fibers[next_ready()]);
    if (!run->error.empty()) return;
  }
  for (const Fiber& fiber : run->fibers)
    if (fiber.state != State::exited) {
      run->error = deadlock();
      return;
    }
}

class Stacks {  // kept from launch to launch
 public:
  char* at(std::size_t i) {
    while (stacks_.size() <= i) {
      void* fresh = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (fresh == MAP_FAILED) throw std::runtime_error("cannot map a fiber's stack");
      stacks_.push_back(static_cast<char*>(fresh));
    }
    return stacks_[i];
  }

 private:
  std::vector<char*> stacks_;
} stacks;

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kBehind = 0;
#else
constexpr std::size_t kBehind = kCanary;
#endif

unsigned char* allocate_shared(std::size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes + kBehind) != 0) throw std::runtime_error("out of memory");
  std::memset(memory, kPoison, bytes);
  std::memset(static_cast<unsigned char*>(memory) + bytes, kCanaryByte, kBehind);
  return static_cast<unsigned char*>(memory);
}

void prepare(Block& block, unsigned thread) {
  const unsigned index = block.first + thread;
  Fiber& fiber = run->fibers[index];
  fiber.block = &block;
  fiber.thread = thread;
  fiber.stack = stacks.at(index);
#if defined(SHIM_TSAN)
  fiber.tsan = __tsan_create_fiber(0);
#endif
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  makecontext(&fiber.context, entry, 0);
  run->ready.push_back(index);
}

void run_blocks(const Launch& how, const std::vector<unsigned>& which) {
  run->blocks = std::vector<Block>(which.size());
  run->fibers = std::vector<Fiber>(which.size() * how.threads);
  run->grid.size = unsigned(run->fibers.size());
  // Never grown by a fiber: ThreadSanitizer would see the move of its contents.
  run->ready.reserve(kCompact + 2 * run->fibers.size());
#if defined(SHIM_TSAN)
  run->scheduler_tsan = __tsan_get_current_fiber();
#endif
  __tsan_release(&run->start_tag);
  for (std::size_t b = 0; b < which.size(); ++b) {
    Block& block = run->blocks[b];
    block.index = {which[b], 0, 0};
    block.shared = allocate_shared(how.shared_bytes);
    block.barrier.size = how.threads;
    block.warps.resize((how.threads + kWarp - 1) / kWarp);
    block.first = unsigned(b) * how.threads;
    for (unsigned t = 0; t < how.threads; ++t) prepare(block, t);
  }
  schedule();
  __tsan_acquire(&run->end_tag);
#if defined(SHIM_TSAN)
  for (Fiber& fiber : run->fibers) __tsan_destroy_fiber(fiber.tsan);
#endif
  for (Block& block : run->blocks) {
    for (std::size_t i = 0; i < kBehind; ++i)
      if (block.shared[how.shared_bytes + i] != kCanaryByte && run->error.empty())
        run->error = "block " + std::to_string(block.index.x) + " wrote past the end of its shared memory";
    free(block.shared);
  }
}

}  // namespace

dim3 thread_index() { return {run->current->thread, 0, 0}; }
dim3 block_index() { return run->current->block->index; }
dim3 block_size() { return {run->how->threads, 1, 1}; }
dim3 grid_size() { return {run->how->blocks, 1, 1}; }
unsigned char* shared_memory() { return run->current->block->shared; }

void block_barrier(const void* site) {
  Block& block = *run->current->block;
  meet(block.barrier, State::at_barrier, site, block.first, block.first + run->how->threads, block.exited);
}

void grid_barrier(const void* site) {
  if (!run->how->cooperative) fail("a grid barrier in a launch that is not cooperative");
  unsigned exited = 0;
  for (const Block& block : run->blocks) exited += block.exited;
  meet(run->grid, State::at_grid_barrier, site, 0, unsigned(run->fibers.size()), exited);
}

std::uint64_t exchange(std::uint32_t mask, std::uint64_t value, unsigned lane_bits, const void* site) {
  Fiber& self = *run->current;
  Block& block = *self.block;
  const unsigned lane = self.thread % kWarp, base = self.thread - lane, other = lane ^ lane_bits;
  Warp& warp = block.warps[self.thread / kWarp];
  const unsigned lanes = std::min(kWarp, run->how->threads - base);
  if (!(mask >> lane & 1)) fail(name_of(self) + " is not in the mask of its shuffle");
  if (lanes < kWarp && mask >> lanes) fail("the mask of a shuffle names lanes that do not exist, in " + name_of(self));
  if (other >= kWarp || !(mask >> other & 1)) fail(name_of(self) + " reads a lane outside of its shuffle's mask");
  if (warp.arrived && (warp.mask != mask || warp.site != site))
    fail("divergent shuffle: " + name_of(self) + " is at another place or has another mask than its warp");
  warp.mask = mask;
  warp.site = site;
  warp.arrived |= 1u << lane;
  const unsigned turn = warp.turn & 1;
  self.posted[turn] = value;
  self.state = State::at_shuffle;
  if (warp.arrived == mask) {
    warp.arrived = 0;
    ++warp.turn;
    release(block.first + base, block.first + base + lanes, State::at_shuffle);
  }
  to_scheduler();
  return run->fibers[block.first + base + other].posted[turn];
}

long launch(const Launch& how, const std::function<void()>& body) {
  Run state;
  state.how = &how;
  state.body = &body;
  state.random.seed(how.seed);
  state.order = static_cast<Order>(how.seed % 4);
  run = &state;
  std::vector<unsigned> blocks(how.blocks);
  for (unsigned b = 0; b < how.blocks; ++b) blocks[b] = b;
  if (how.cooperative) {
    run_blocks(how, blocks);
  } else {  // independent blocks may run in any order
    std::shuffle(blocks.begin(), blocks.end(), state.random);
    for (unsigned b : blocks)
      if (state.error.empty()) run_blocks(how, {b});
  }
  run = nullptr;
  if (!state.error.empty()) throw std::runtime_error(state.error);
  return state.switches;
}

}  // namespace shim
