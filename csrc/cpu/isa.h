// The kernels of the CPU backend, compiled once for each instruction set: the same sources, other flags, each in a
// namespace of its own. They see nothing of torch or of the C++ library, whose inline functions the linker merges over
// all objects, so that an old CPU could meet an instruction it does not have.
#pragma once

#include "tiles.h"

// score_tile      writes the scores of a tile; their sum
// imitate_tile    writes the gradients of a tile, where they are wanted; the sum of share * value
// softmax_tile    the same of a loss of groups, given the softmax_scratch that tiles.h says
// scale_run       multiplies the values [begin, end) of a run
// moments_tile    the sums of each of a tile's rows
// align_tile      writes the gradients of a tile of a loss along rows
// number          a number of any dtype
#define FRS_KERNELS(ISA)                                                            \
  namespace frs::ISA {                                                              \
  double score_tile(const Score&, const Tile&);                                     \
  double imitate_tile(const Imitate&, const Tile&, double upstream);                \
  double softmax_tile(const Imitate&, const Tile&, double upstream, void* scratch); \
  void scale_run(const Run&, int64_t begin, int64_t end, double factor);            \
  void moments_tile(const Moments&, const Tile&, Sums* of_channels);                \
  void align_tile(const MomentsBackward&, const Tile&, double upstream);            \
  double number(const void* data, DType);                                           \
  }

FRS_KERNELS(baseline)
#if defined(__x86_64__)
FRS_KERNELS(avx2)
FRS_KERNELS(avx512)
#endif
