// The teams of a GPU: a block of threads, or all blocks of a cooperative launch. A thread handles one column at a time.
//
// This file and matching/kernels.cuh also compile with g++ against a stand-in for CUDA C++, so that a machine without a
// GPU can run the real kernels. A stand-in must define, before it includes them:
//
//   __global__ __device__ __host__ __forceinline__ __launch_bounds__(...)
//   threadIdx.x  blockIdx.x  blockDim.x  gridDim.x
//   __syncthreads()                        a barrier of the block
//   __shfl_xor_sync(mask, value, lanes)    for int, float and double, in warps of 32
//   SELBP_DYNAMIC_SHARED(name)             declares `unsigned char* name`, the block's dynamic shared memory, 64-byte
//                                          aligned, as large as the launch said (kernels use no other shared memory)
//   SELBP_GRID_SYNC()                      a barrier of the grid that also orders memory
//   SELBP_LEVEL, SELBP_DEVICE_CODE         the namespace; and that `inline` is to be read as device code
//
// Blocks are launched with a multiple of 32 threads, at most 512.
#pragma once

#include "team/team.hpp"

// NVRTC compiles the kernels without any header of the toolkit, and without those of a cooperative launch.
#if defined(__CUDACC__)
#define SELBP_DYNAMIC_SHARED(name) extern __shared__ __align__(64) unsigned char name[]
#if !defined(__CUDACC_RTC__)
#include <cooperative_groups.h>
#define SELBP_GRID_SYNC() cooperative_groups::this_grid().sync()
#endif
#endif

namespace selbp {
namespace SELBP_LEVEL {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
struct ThreadColumn {
  using Value = T;
  int first;

  SELBP_HD bool contains(int column) const { return first == column; }
  SELBP_HD T fill(T value) const { return value; }
  SELBP_HD T load(const T* array) const { return array[first]; }
  SELBP_HD void store(T* array, T value) const { array[first] = value; }
  SELBP_HD T load_row(const T* row, int end) const { return first < end ? row[first] : T(0); }
  SELBP_HD T load(Panels<T, kWarp> panels, int row) const { return *panels.at(row, first); }
  SELBP_HD void store(Panels<T, kWarp> panels, int row, T value) const { *panels.at(row, first) = value; }
  SELBP_HD T add_at(T value, int column, T amount) const { return first == column ? value + amount : value; }
};

template <class T>
struct ThreadVote {
  T score = T(-1);
  bool flag = false, spoiled = false;
};

template <class T>
SELBP_HD Best<T> fold(Best<T> best, ThreadColumn<T> j, const ThreadVote<T>& vote) {
  const bool greater = vote.score > best.score;  // a thread's columns ascend: an equal one further right stays out
  return {greater ? vote.score : best.score, greater ? j.first : best.index, best.flag || vote.flag,
          best.spoiled || vote.spoiled};
}

// The best of `lanes` neighbours (a power of two), known to each of them.
template <class T>
SELBP_HD Best<T> reduce_lanes(Best<T> best, int lanes) {
  int flags = (best.flag ? 1 : 0) | (best.spoiled ? 2 : 0);
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    const T score = __shfl_xor_sync(kAllLanes, best.score, distance);
    const int index = __shfl_xor_sync(kAllLanes, best.index, distance);
    flags |= __shfl_xor_sync(kAllLanes, flags, distance);
    best = better(best, Best<T>{score, index, false, false});
  }
  return {best.score, best.index, (flags & 1) != 0, (flags & 2) != 0};
}

// Room for one Best per warp or per block, twice: a result may still be read while the next arg max is under way.
template <class T>
struct Ballots {
  Best<T>* slots;
  int size, turn;

  SELBP_HD Best<T>* next() {
    turn ^= 1;
    return slots + turn * size;
  }
};

// What the teams share: a thread takes the columns that its `each` deals out, and `reduce` joins the threads' results.
template <class T, class Team>
class ThreadTeam {
 public:
  static constexpr int kPanel = kWarp, kLookahead = 0, kShelf = 0;

  SELBP_HD void turn(int) const {}

  template <class F>
  SELBP_HD void columns(int, int count, F f) const {
    static_cast<const Team*>(this)->each(count, [&](int j) { f(ThreadColumn<T>{j}); });
  }

  template <class F>
  SELBP_HD Best<T> argmax(int, int count, F f) {
    Team& team = *static_cast<Team*>(this);
    Best<T> best{T(-1), -1, false, false};
    team.each(count, [&](int column) {
      const ThreadColumn<T> j{column};
      ThreadVote<T> vote;
      f(j, vote);
      best = fold(best, j, vote);
    });
    return team.reduce(best);
  }

 protected:
  // Rows first, first + step, ... of an (n, n) matrix by one block.
  template <class Block>
  SELBP_HD static Best<T> not_finite(const Block& block, const T* matrix, int n, const T* there, int first, int step) {
    Best<T> found{T(-1), -1, false, false};
    for (int i = first; i < n; i += step) {
      if (there && !(there[i] > T(0))) continue;
      const T* row = matrix + std::size_t(i) * std::size_t(n);
      block.each(n, [&](int j) {
        if (!(magnitude(row[j]) <= Limits<T>::kMax) && (!there || there[j] > T(0))) found.spoiled = true;
      });
    }
    return found;
  }
};

template <class T>
class BlockTeam : public ThreadTeam<T, BlockTeam<T>> {
 public:
  static constexpr int kBallots = 2 * kWarp;  // entries of shared memory that the constructor wants

  SELBP_HD explicit BlockTeam(Best<T>* shared) : ballots_{shared, kWarp, 0} {}

  template <class F>
  SELBP_HD void each(int count, F f) const {
    for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) f(i);
  }
  template <class F>
  SELBP_HD void broadcast(int count, F f) const {
    each(count, f);
  }
  template <class F>
  SELBP_HD void once(F f) const {
    if (threadIdx.x == 0) f();
  }
  SELBP_HD void sync() const { __syncthreads(); }

  SELBP_HD bool all_finite(const T* matrix, int n, const T* there) {
    return !reduce(this->not_finite(*this, matrix, n, there, 0, 1)).spoiled;
  }

  // One barrier: every warp folds the warps' results for itself.
  SELBP_HD Best<T> reduce(Best<T> best) {
    const int lane = int(threadIdx.x) % kWarp, warps = int(blockDim.x) / kWarp;
    best = reduce_lanes(best, kWarp);
    Best<T>* shared = ballots_.next();
    if (lane == 0) shared[int(threadIdx.x) / kWarp] = best;
    __syncthreads();
    int lanes = 1;
    while (lanes < warps) lanes *= 2;
    const int source = lane % lanes;
    return reduce_lanes(source < warps ? shared[source] : Best<T>{T(-1), -1, false, false}, lanes);
  }

 private:
  Ballots<T> ballots_;
};

#ifdef SELBP_GRID_SYNC
// All blocks of a cooperative launch. Everything that blocks share lies in global memory; `broadcast` arrays lie in
// each block's shared memory.
template <class T>
class GridTeam : public ThreadTeam<T, GridTeam<T>> {
 public:
  // shared: BlockTeam's room; global: two entries for each block of the grid.
  SELBP_HD GridTeam(Best<T>* shared, Best<T>* global) : block_(shared), ballots_{global, int(gridDim.x), 0} {}

  template <class F>
  SELBP_HD void each(int count, F f) const {
    const int threads = int(gridDim.x * blockDim.x);
    for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < count; i += threads) f(i);
  }
  template <class F>
  SELBP_HD void broadcast(int count, F f) const {
    block_.each(count, f);
  }
  template <class F>
  SELBP_HD void once(F f) const {
    if (blockIdx.x == 0 && threadIdx.x == 0) f();
  }
  SELBP_HD void sync() const { SELBP_GRID_SYNC(); }

  SELBP_HD bool all_finite(const T* matrix, int n, const T* there) {
    return !reduce(this->not_finite(block_, matrix, n, there, int(blockIdx.x), int(gridDim.x))).spoiled;
  }

  SELBP_HD Best<T> reduce(Best<T> best) {
    best = block_.reduce(best);
    Best<T>* global = ballots_.next();
    if (threadIdx.x == 0) global[blockIdx.x] = best;
    SELBP_GRID_SYNC();
    best = Best<T>{T(-1), -1, false, false};
    for (int block = int(threadIdx.x) % kWarp; block < int(gridDim.x); block += kWarp)
      best = better(best, global[block]);
    return reduce_lanes(best, kWarp);
  }

 private:
  BlockTeam<T> block_;
  Ballots<T> ballots_;
};
#endif  // SELBP_GRID_SYNC

}  // namespace SELBP_LEVEL
}  // namespace selbp
