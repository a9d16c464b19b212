// The matching engine on CPU threads: one team of SIMD registers for each problem, problems spread over OpenMP threads.
#include "matching/cpu.hpp"

#include <stdlib.h>

#include "cpu/parallel.hpp"
#include "matching/engine.hpp"
#include "team/simd_team.hpp"

namespace selbp {
namespace SELBP_LEVEL {
namespace {

// Grows, and stays for the thread's next call: fresh pages would cost a fifth of a solve. What is large goes at once.
class Arena {
 public:
  ~Arena() { release(); }
  char* reserve(std::size_t bytes) {
    if (bytes > bytes_) {
      release();
      if (posix_memalign(&data_, 4096, bytes) != 0) data_ = nullptr;
      bytes_ = data_ ? bytes : 0;
    }
    return static_cast<char*>(data_);
  }
  void trim() {
    if (bytes_ > kKeep) release();
  }

 private:
  static constexpr std::size_t kKeep = std::size_t(32) << 20;
  void release() {
    free(data_);
    data_ = nullptr;
    bytes_ = 0;
  }
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

thread_local Arena arena;

constexpr std::size_t kFetch = std::size_t(256) << 10;  // bytes of the next problem that are worth fetching ahead

std::size_t whole_pages(std::size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

// The bytes of one problem, and where its parts begin.
template <class T>
struct Room {
  using Team = SimdTeam<T>;
  const Shape<T, Team::kPanel> shape;
  const int lookahead;
  const std::size_t arrays, tableau, bytes;

  explicit Room(const Options& options)
      : shape(options.n, options.k),
        lookahead(shape.tableau_bytes() > options.near_bytes ? Team::kLookahead : 0),
        arrays(whole_pages(shape.array_bytes())),
        tableau(whole_pages(shape.tableau_bytes())),
        bytes(arrays + tableau + whole_pages(shape.shelf_bytes(lookahead, Team::kShelf))) {}

  void solve(Team& team, const Options& options, const Problem<T>& problem, const Answer<T>& answer,
             char* memory) const {
    const Workspace<T, Team::kPanel> work(shape, memory, memory + arrays, memory + arrays + tableau, lookahead,
                                          Team::kShelf);
    Engine<Team, T>(team, options, problem, work).solve(answer);
  }
};

template <class T>
bool solve_rows(Options options, const Problem<T>& problem, const Answer<T>& answer, const matching::RowSource& rows) {
  options.near_bytes = std::size_t(-1);  // lookahead would read rows that are not formed
  const Room<T> room(options);
  char* memory = arena.reserve(room.bytes + std::size_t(room.shape.main) * sizeof(T));
  if (!memory) return false;
  SimdTeam<T> team(&rows, reinterpret_cast<T*>(memory + room.bytes), options.n);
  room.solve(team, options, problem, answer, memory);
  arena.trim();
  return true;
}

template <class T>
bool solve_all(const Options& options, const Problem<T>& problems, const Answer<T>& answers, std::int64_t batch,
               int threads) {
  const Room<T> room(options);
  const std::size_t n = std::size_t(options.n), k = std::size_t(options.k);
  const std::size_t gram = n * n * sizeof(T), fetched = gram <= kFetch ? gram : 0;
  const std::int64_t spread = batch / (16 * std::int64_t(threads)), chunk = spread < 1 ? 1 : spread > 16 ? 16 : spread;
  AllOf enough;
  parallel_for(batch, threads, chunk, [&](std::int64_t at) {
    char* memory = arena.reserve(room.bytes);
    if (!memory) return enough.lower();
    const std::size_t i = std::size_t(at);
    const Problem<T> problem{problems.gram + i * n * n, problems.inner + i * n, problems.target_sq + i,
                             problems.valid ? problems.valid + i * n : nullptr};
    const Answer<T> answer{answers.indices + i * k, answers.weights + i * k, answers.count + i, answers.residual + i,
                           answers.status + i};
    SimdTeam<T> team(problem.gram + n * n, at + 1 < batch ? fetched : 0, room.shape.rows + 1);
    room.solve(team, options, problem, answer, memory);
    arena.trim();
  });
  return enough.held();
}

}  // namespace

bool match_f32(const Options& options, const Problem<float>& problems, const Answer<float>& answers, std::int64_t batch,
               int threads) {
  return solve_all(options, problems, answers, batch, threads);
}
bool match_f64(const Options& options, const Problem<double>& problems, const Answer<double>& answers,
               std::int64_t batch, int threads) {
  return solve_all(options, problems, answers, batch, threads);
}

bool match_rows_f32(const Options& options, const Problem<float>& problem, const Answer<float>& answer,
                    const matching::RowSource& rows) {
  return solve_rows(options, problem, answer, rows);
}
bool match_rows_f64(const Options& options, const Problem<double>& problem, const Answer<double>& answer,
                    const matching::RowSource& rows) {
  return solve_rows(options, problem, answer, rows);
}

}  // namespace SELBP_LEVEL
}  // namespace selbp
