// The memory one problem works in: the tableau's columns, the arrays beside it, and where each begins.
#pragma once

#include "matching/matching.hpp"
#include "team/team.hpp"

namespace selbp {
namespace SELBP_LEVEL {

// How the tableau's columns are numbered: [0, n) the rows to choose from, padded to `main` columns; then one slot
// column for each chosen row. Whole panels, so that no group of columns straddles `main`.
template <class T, int width>
struct Shape {
  int main, count, rows, height;

  SELBP_BOTH Shape(int n, int k) {
    rows = k < n ? k : n;
    main = round_up(n, width);
    count = main + round_up(rows, width);
    height = rows | 1;  // odd: see Panels
  }
  SELBP_BOTH std::size_t tableau_bytes() const { return std::size_t(count) * std::size_t(height) * sizeof(T); }
  SELBP_BOTH std::size_t shelf_bytes(int lookahead, int shelf) const {
    return lookahead ? std::size_t(count) * std::size_t(shelf | 1) * sizeof(T) +
                           std::size_t(lookahead) * std::size_t(rows) * sizeof(T) + std::size_t(count) * sizeof(T)
                     : 0;
  }
  SELBP_BOTH std::size_t array_bytes() const {
    const std::size_t doubles = std::size_t(rows < 64 ? 64 : rows) * sizeof(double);
    return doubles + (5 * std::size_t(count) + 4 * std::size_t(rows)) * sizeof(T) + 2 * std::size_t(rows) * sizeof(int);
  }
};

template <class T, int width>
struct Workspace {
  // for each column
  T* correlation;  // c: b - G_S w of a main column, -w of a slot column
  T* distance;     // D: squared distance from the span of S; of a slot column 1 while it is in use, else 0
  T* floor;        // the distance below which a column depends on S; infinite for what may not be chosen
  T* unit;         // 1 / sqrt(G_jj); 0 for a row that is not valid or is zero
  T* held;         // slot columns: the last feasible weight
  // for each chosen row, in order of choice
  T *pivot_column, *z, *cosine, *sine;
  int *order, *slot;
  double* partial;  // sums, in a fixed order
  Panels<T, width> tableau;
  // provisional rows for the next pivots; null where there is no lookahead
  Panels<T, width> shelf;
  T *shelf_column = nullptr, *score = nullptr;

  // `arrays`, `tableau_data` and `shelf_data` are aligned to 64 bytes and as long as Shape says.
  SELBP_BOTH Workspace(Shape<T, width> shape, void* arrays, void* tableau_data, void* shelf_data, int lookahead,
                       int shelf_rows) {
    T* next = static_cast<T*>(arrays);
    correlation = take(next, shape.count);
    distance = take(next, shape.count);
    floor = take(next, shape.count);
    unit = take(next, shape.count);
    held = take(next, shape.count);
    partial = reinterpret_cast<double*>(next);  // count is a multiple of 8, so this stays aligned
    next = reinterpret_cast<T*>(partial + (shape.rows < 64 ? 64 : shape.rows));
    pivot_column = take(next, shape.rows);
    z = take(next, shape.rows);
    cosine = take(next, shape.rows);
    sine = take(next, shape.rows);
    order = reinterpret_cast<int*>(next);
    slot = order + shape.rows;
    tableau = {static_cast<T*>(tableau_data), shape.height};
    T* rest = static_cast<T*>(shelf_data);
    shelf = {rest, shelf_rows | 1};
    if (lookahead) {
      take(rest, shape.count * (shelf_rows | 1));
      score = take(rest, shape.count);
      shelf_column = take(rest, shape.rows * lookahead);
    }
  }

 private:
  SELBP_BOTH static T* take(T*& next, int count) {
    T* begin = next;
    next += count;
    return begin;
  }
};

}  // namespace SELBP_LEVEL
}  // namespace selbp
