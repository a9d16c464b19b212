// The cube method. A sample is a vertex of [0, 1]^n; the inclusion probabilities are a point inside. Flight: the point
// walks along directions u with A u = 0, where column i of A holds x_i / pi_i and the constraint on the size, until it
// meets a face, which decides at least one unit; the two ways it can go are drawn so that it does not move in
// expectation. The fast form takes u from the first q + 1 undecided units, q constraints leave one such direction.
// Landing: with too few units left for q constraints the last one is dropped; the size goes last, so it holds exactly.
#include "cube/cpu.hpp"

namespace selbp {
namespace SELBP_LEVEL {
namespace {

using Size = std::int64_t;

constexpr double kRank = 1e-10;    // what elimination leaves of a row that depends on those before it
constexpr double kDecided = 1e-9;  // rounding distance from a face

double magnitude(double x) { return x < 0 ? -x : x; }

// A nonzero u (q + 1,) with A u = 0, A (q, q + 1) with row stride q + 1, overwritten. Elimination with column pivots.
void null_vector(double* a, double* u, Size* columns, Size q) {
  const Size m = q + 1;
  for (Size j = 0; j < m; ++j) columns[j] = j;
  Size rank = 0;
  for (Size row = 0; row < q; ++row) {
    double* current = a + row * m;
    double before = 0, most = 0;
    for (Size j = 0; j < m; ++j) before = magnitude(current[j]) > before ? magnitude(current[j]) : before;
    for (Size s = 0; s < rank; ++s) {  // a row kept at s has its pivot, scaled to 1, in column columns[s]
      const double* pivot = a + s * m;
      const double factor = current[columns[s]];
      if (factor == 0) continue;
      for (Size j = 0; j < m; ++j) current[j] -= factor * pivot[j];
      current[columns[s]] = 0;
    }
    Size best = rank;
    for (Size s = rank; s < m; ++s) {
      if (magnitude(current[columns[s]]) > most) {
        most = magnitude(current[columns[s]]);
        best = s;
      }
    }
    if (!(most > kRank * before)) continue;
    const Size column = columns[best];
    columns[best] = columns[rank];
    columns[rank] = column;
    const double scale = 1.0 / current[column];
    double* kept = a + rank * m;
    for (Size j = 0; j < m; ++j) kept[j] = current[j] * scale;
    ++rank;
  }
  for (Size s = rank; s < m; ++s) u[columns[s]] = s == rank ? 1.0 : 0.0;
  for (Size s = rank; s-- > 0;) {
    const double* pivot = a + s * m;
    double sum = 0;
    for (Size t = s + 1; t < m; ++t) sum += pivot[columns[t]] * u[columns[t]];
    u[columns[s]] = -sum;
  }
}

}  // namespace

Size cube(const CubeProblem& problem) {
  const Size n = problem.n, most = problem.dimensions + 1;
  for (Size place = 0; place < n; ++place)
    if (problem.order[place] < 0 || problem.order[place] >= n) return place;
  double* pi = problem.probability;
  double* a = problem.scratch;
  double* u = a + most * (most + 1);
  double* first = u + most + 1;  // inclusion probabilities at the start, 1 / weight
  Size* group = problem.group;
  Size* columns = group + most + 1;
  Size count = 0, next = 0;
  for (Size step = 0; step < n; ++step) {
    for (; count <= most && next < n; ++next) {
      const Size unit = problem.order[next];
      if (pi[unit] <= kDecided || pi[unit] >= 1 - kDecided) {
        pi[unit] = pi[unit] < 0.5 ? 0 : 1;
        continue;
      }
      first[count] = pi[unit];
      group[count++] = unit;
    }
    if (count < 2) break;
    const Size q = (count - 1 < most ? count - 1 : most), m = q + 1;
    for (Size j = 0; j < m; ++j) {
      a[j] = 1;
      for (Size c = 1; c < q; ++c) a[c * m + j] = problem.x[(c - 1) * n + group[j]] / first[j];
    }
    null_vector(a, u, columns, q);
    double up = 1e300, down = 1e300;  // how far the point can go along u and along -u
    double largest = 0;
    for (Size j = 0; j < m; ++j) largest = magnitude(u[j]) > largest ? magnitude(u[j]) : largest;
    double sign = 0;  // a direction has no sign: let the first unit's entry be positive
    for (Size j = 0; j < m && sign == 0; ++j)
      if (magnitude(u[j]) > 1e-9 * largest) sign = u[j] > 0 ? 1 : -1;
    for (Size j = 0; j < m; ++j) {
      u[j] *= sign / largest;
      if (magnitude(u[j]) <= 1e-14) continue;
      const double p = pi[group[j]], forward = u[j] > 0 ? (1 - p) / u[j] : -p / u[j];
      const double backward = u[j] > 0 ? p / u[j] : (p - 1) / u[j];
      up = forward < up ? forward : up;
      down = backward < down ? backward : down;
    }
    const double move = problem.draws[step] * (up + down) < down ? up : -down;
    Size left = 0;
    for (Size j = 0; j < count; ++j) {
      const Size unit = group[j];
      if (j < m) pi[unit] += move * u[j];
      if (pi[unit] <= kDecided || pi[unit] >= 1 - kDecided) {
        pi[unit] = pi[unit] < 0.5 ? 0 : 1;
        continue;
      }
      first[left] = first[j];
      group[left++] = unit;
    }
    count = left;
  }
  for (Size j = 0; j < count; ++j) pi[group[j]] = pi[group[j]] < 0.5 ? 0 : 1;  // an integer up to rounding
  return -1;
}

}  // namespace SELBP_LEVEL
}  // namespace selbp
