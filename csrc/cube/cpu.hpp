// Balanced sampling by the cube method (Deville & Tille 2004) in its fast form (Chauvet & Tille 2006).
#pragma once

#include <cstdint>

#include "cpu/level.hpp"

namespace selbp {

// n units of which a sample is balanced on the columns of x (dimensions, n), and its size fixed. `probability` (n,)
// sums to an integer; on return it is 1 for the units of the sample and 0 for the others. `order` (n,) is the order in
// which units are looked at; `draws` (n,) are uniform on [0, 1), one a step. `scratch` holds (d + 2) (d + 3) values and
// `group` 2 d + 4 indices, with d = dimensions. Returns the first place of `order` that names no unit, before anything
// else is read, or -1.
struct CubeProblem {
  std::int64_t n, dimensions;
  const double* x;
  double* probability;
  const std::int64_t* order;
  const double* draws;
  double* scratch;
  std::int64_t* group;
};

SELBP_DECLARE_LEVELS(std::int64_t cube(const CubeProblem& problem);)

}  // namespace selbp
