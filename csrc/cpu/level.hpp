// The x86-64 level whose kernels run on this machine, chosen once.
//
// Every <family>/cpu.cpp is compiled once per level with SELBP_LEVEL naming its namespace; a family's public header
// declares its kernels in each of them through SELBP_DECLARE_LEVELS and picks with SELBP_PICK. Such files define no
// inline function with external linkage and instantiate no standard template: the linker would be free to keep a
// copy that was compiled for a level this machine does not have.
#pragma once

#include <cstdlib>
#include <cstring>
#ifdef SELBP_X86_LEVELS
#include <cpuid.h>
#endif

#if defined(__x86_64__)
#define SELBP_BFLOAT16_PRODUCTS  // the v4 kernels have a form for AVX512-BF16
#endif

namespace selbp {

enum class Level { baseline, v3, v4 };

#ifdef SELBP_X86_LEVELS
// Half-precision conversion. Compilers before GCC 11 do not know the name in __builtin_cpu_supports.
inline bool converts_half() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// The features that setup.py compiles each level with: compilers before GCC 11 and all of clang refuse "x86-64-v3".
inline Level detect_level() {
#ifdef SELBP_X86_LEVELS
  __builtin_cpu_init();
  Level best = Level::baseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2") && converts_half()) {
    best = Level::v3;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = Level::v4;
    }
  }
  if (const char* wanted = std::getenv("SELBP_CPU_LEVEL")) {  // lowers the level, never raises it
    if (!std::strcmp(wanted, "baseline")) return Level::baseline;
    if (!std::strcmp(wanted, "v3") && best == Level::v4) return Level::v3;
  }
  return best;
#else
  return Level::baseline;
#endif
}

inline Level level() {
  static const Level chosen = detect_level();
  return chosen;
}

// Whether the level's kernels may use AVX512-BF16.
inline bool multiplies_bfloat16() {
#ifdef SELBP_X86_LEVELS
  unsigned a = 0, b = 0, c = 0, d = 0;
  static const bool found = level() == Level::v4 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1u);
  return found;
#else
  return false;
#endif
}

// Whether SELBP_CPU_LEVEL is unset, empty or names a level.
inline bool level_name_valid() {
  const char* wanted = std::getenv("SELBP_CPU_LEVEL");
  return !wanted || !*wanted || !std::strcmp(wanted, "baseline") || !std::strcmp(wanted, "v3") ||
         !std::strcmp(wanted, "v4");
}

inline const char* level_name() {
  switch (level()) {
    case Level::v4: return "x86-64-v4";
    case Level::v3: return "x86-64-v3";
    default: return "baseline";
  }
}

}  // namespace selbp

#ifdef SELBP_X86_LEVELS
#define SELBP_DECLARE_LEVELS(...) \
  namespace baseline {            \
  __VA_ARGS__                     \
  }                               \
  namespace v3 {                  \
  __VA_ARGS__                     \
  }                               \
  namespace v4 {                  \
  __VA_ARGS__                     \
  }
#define SELBP_PICK(function)                                        \
  (::selbp::level() == ::selbp::Level::v4   ? ::selbp::v4::function \
   : ::selbp::level() == ::selbp::Level::v3 ? ::selbp::v3::function \
                                            : ::selbp::baseline::function)
#else
#define SELBP_DECLARE_LEVELS(...) \
  namespace baseline {            \
  __VA_ARGS__                     \
  }
#define SELBP_PICK(function) ::selbp::baseline::function
#endif
