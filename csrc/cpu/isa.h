// The kernels of the CPU backend, compiled once for each instruction set: the same sources, other flags, each in a
// namespace of its own. They see nothing of torch or of the C++ library, whose inline functions the linker merges over
// all objects, so that an old CPU could meet an instruction it does not have.
#pragma once

#include "tiles.h"

#define FRS_KERNELS(ISA)                                                                           \
  namespace frs::ISA {                                                                             \
  /* Write the scores of a tile; their sum. */                                                     \
  double score_tile(const Score&, const Tile&);                                                    \
  /* Write the gradients of a tile, where wanted; the sum of share * value, or 0. */               \
  double imitate_tile(const Imitate&, const Tile&, double upstream);                               \
  /* Multiply the values [begin, end) of a run. */                                                 \
  void scale_run(const Run&, int64_t begin, int64_t end, double factor);                           \
  /* A number of any dtype. */                                                                     \
  double number(const void* data, DType);                                                          \
  }

FRS_KERNELS(baseline)
#if defined(__x86_64__)
FRS_KERNELS(avx2)
FRS_KERNELS(avx512)
#endif
