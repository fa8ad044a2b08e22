// How a level is cut: into tiles, which threads take one after another, and each tile into rows, which stay in L1.
//
// Walking planar memory, a row is a run of positions of one channel; walking interleaved memory, all channels of a few
// positions, or some channels of one. The cut depends on the shapes alone, never on the number of threads, so that each
// tile has its own slot for its sum and the result has the same bits on any number of threads.
#pragma once

#include "../verbs.h"

namespace frs {

constexpr int64_t ROW = 1024;       // values: 4 KB in fp32; beside them L1 holds the shares and coefficients, 8 KB
constexpr int64_t TILE = 16 * ROW;  // values: 5 to 20 microseconds, short enough to share out evenly

struct Tile {
  const Level* level;
  int64_t index, n, c0, c1, p0, p1;  // index: the level's number; channels [c0, c1) and positions [p0, p1) of image n
};

struct Cut {
  int64_t length, channels;  // of a tile: positions and channels
  int64_t blocks, chunks;    // of an image: tiles along the positions, and along the channels

  int64_t tiles(const Level& level) const { return level.n * blocks * chunks; }
};

static constexpr int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t at_least_1(int64_t a) { return a < 1 ? 1 : a; }
static constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Blocks of equal length, a multiple of 16 where the level is planar, rather than full ones and a rest.
static inline Cut cut(const Level& level, int64_t length, int64_t channels) {
  const int64_t positions = level.positions();
  if (positions == 0 || level.n == 0) return {1, level.c, 0, 0};
  length = at_most(at_least_1(length), positions);
  length = up(positions, up(positions, length));
  if (!level.interleaved) length = up(length, 16) * 16;
  channels = at_most(at_least_1(channels), level.c);
  return {length, channels, up(positions, length), up(level.c, channels)};
}

// A score needs all channels of its positions.
static inline Cut score_cut(const Level& level) {
  return cut(level, level.interleaved ? TILE / level.c : ROW, level.c);
}

constexpr int64_t COLUMN = 64;  // positions of which a loss of groups works on all channels of a group at once

// Whole groups of whole columns: planar as many groups as fill a tile, interleaved all of them, which are neighbours.
static inline Cut softmax_cut(const Entry& entry) {
  const int64_t positions = entry.positions(), group = entry.group;
  if (positions == 0 || entry.n == 0) return {1, entry.c, 0, 0};
  const int64_t columns = at_least_1(TILE / COLUMN / (entry.interleaved ? entry.c : group));
  const int64_t length = at_most(columns, up(positions, COLUMN)) * COLUMN;
  const int64_t groups = entry.interleaved ? entry.c / group : at_least_1(TILE / (length * group));
  const int64_t channels = at_most(groups * group, entry.c);
  return {length, channels, up(positions, length), up(entry.c, channels)};
}

// Bytes that such a tile needs to work in: panels of student, teacher and gradient, two vectors of exponentials for
// each channel, and the channels of one position.
static inline int64_t softmax_scratch(const Entry& entry) { return entry.group * (3 * COLUMN + 2 * 8 + 1) * 8; }

// As many rows of one channel as fill a tile.
static inline Cut planar_cut(const Level& level) {
  const Cut rows = cut(level, ROW, 1);
  return cut(level, ROW, TILE / at_least_1(rows.length));
}

static inline Cut imitate_cut(const Entry& entry) {
  if (entry.group) return softmax_cut(entry);
  return entry.interleaved ? cut(entry, TILE / entry.c, entry.c) : planar_cut(entry);
}

// Interleaved, a tile's sums are as many as its channels, so that it has some positions to each; and they are to stay
// in L1, five doubles a channel.
static inline Cut moments_cut(const Level& level) {
  return level.interleaved ? cut(level, 128, ROW / 2) : planar_cut(level);
}

static inline Tile tile_of(const Level& level, const Cut& cut, int64_t index, int64_t number) {
  const int64_t chunk = number % cut.chunks, block = number / cut.chunks % cut.blocks;
  const int64_t c0 = chunk * cut.channels, p0 = block * cut.length;
  return {&level,
          index,
          number / (cut.chunks * cut.blocks),
          c0,
          at_most(c0 + cut.channels, level.c),
          p0,
          at_most(p0 + cut.length, level.positions())};
}

}  // namespace frs
