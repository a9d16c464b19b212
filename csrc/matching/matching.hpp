// The matching solver's options and buffers, of every backend; see engine.hpp for what it does.
#pragma once

#include <cstddef>
#include <cstdint>

namespace selbp {
namespace matching {

enum class Rule : int { ols = 0, normalized = 1, raw = 2 };
enum class Status : int { full = 0, optimal = 1, tolerance = 2, invalid = 3, iterations = 4 };

struct Options {
  int n;             // rows to choose from
  int k;             // how many to choose at most; more than n is allowed
  Rule rule;         // which score picks the next row
  bool nonnegative;  // weights >= 0
  double ridge;      // of the mean squared norm
  double tolerance;  // relative residual at which to stop; 0: never
  // Bytes of the tableau beyond which rows are formed ahead (CPU): what fits in L1 gains nothing. Results are the same.
  std::size_t near_bytes = std::size_t(64) << 10;
  bool fill = false;  // spare slots repeat the first row chosen, else the first valid one, else row 0
};

// One problem, or the first of a batch of problems that lie one behind the other.
template <class T>
struct Problem {
  const T* gram;               // (n, n) symmetric
  const T* inner;              // (n,)
  const T* target_sq;          // ()
  const unsigned char* valid;  // (n,) rows that may be chosen; null: all
};

template <class T>
struct Answer {
  std::int64_t* indices;  // (k,) in order of choice, padded with -1 unless they are filled
  T* weights;             // (k,) padded with 0
  std::int32_t* count;    // ()
  T* residual;            // () relative, without the ridge's term
  unsigned char* status;  // () a Status
};

// Rows of a Gram matrix that are formed when the solver comes to read them (CPU). Its diagonal is there from the start,
// and the caller has seen to it that no entry can fail to be finite.
struct RowSource {
  void (*form)(void* self, int row, int likely);  // `row`; and `likely`, -1 or a guess at one of the next
  bool (*alike)(void* self, int row, int other);  // whether `other` will do less once `row` has joined: a guess
  void* self;
  const unsigned char* formed;  // (n,) which rows are there
};

}  // namespace matching
}  // namespace selbp
