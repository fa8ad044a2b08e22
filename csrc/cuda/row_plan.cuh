// How levels whose channels are rows are cut into parts and blocks.
#pragma once

#include <vector>

#include "row_walks.cuh"

namespace frs::cuda {

struct GroupSpans {
  uint32_t starts[MAX_ROWS + 1];  // the first group of each level, then the number of groups
  uint32_t count;
};

struct RowPlan {
  RowTable table;
  GroupSpans groups;
  int64_t blocks, parts;
};

inline void check_rows(const Level& level, const char* verb) {
  check_sizes(level, verb);
  if (level.n * level.c > INT32_MAX)
    throw std::runtime_error(std::string("frs_kernels ") + verb + ": a level of more than 2^31 channels of its images");
}

// True if the numbers of each channel lie side by side, aligned alike in all tensors.
inline bool is_parallel(const Level& level, int64_t width) {
  const auto place = [&](const View& view) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.data) / bytes_of(view.dtype) % width);
  };
  const auto fits = [&](const View& view) {
    const View& like = level.student;
    return view.data == nullptr ||
           ((view.p == 1 || level.positions() == 1) && place(view) == place(like) &&
            (level.c == 1 || (view.c - like.c) % width == 0) && (level.n == 1 || (view.n - like.n) % width == 0));
  };
  return fits(level.student) && fits(level.teacher) && fits(level.grad);
}

// Cuts a level whose thread takes UNDER_WAY packets up to `rounds` times.
inline void cut(const Level& level, bool per_image, int64_t packet, int64_t rounds, RowLevel& row) {
  constexpr int64_t MOST_NUMBERS = 64;  // that a thread adds up in float
  constexpr int64_t MOST_PARTS = 4;     // that a thread adds up in the end, where threads can be had
  const int64_t images = per_image ? 1 : level.n, sets = per_image ? level.n : 1, positions = level.positions();
  row.all_rows = static_cast<uint32_t>(sets * level.c);
  row.across = row.chunks = row.tiles = row.length = row.blocks = 1;
  row.parts = row.log_lanes = row.log_finishers = 0;
  const auto tile = [&](int64_t length) {  // of so many positions at most, all of them about as long
    const int64_t granule = row.interleaved ? 1 : packet;
    row.length = static_cast<uint32_t>(cdiv(cdiv(positions, cdiv(positions, length)), granule) * granule);
    row.tiles = cdiv(positions, row.length);
    row.parts = static_cast<uint32_t>(images * row.tiles);
  };
  if (row.interleaved) {
    row.across = static_cast<uint32_t>(std::min<int64_t>(level.c / packet, packet > 1 ? 4 : MOST_COLUMNS));
    row.rows = static_cast<uint32_t>(row.across * packet);
    row.chunks = cdiv(level.c, row.rows);
    row.groups = static_cast<uint32_t>(sets * row.chunks);
    tile(THREADS / row.across * UNDER_WAY * rounds);
    row.blocks = row.parts;
    while (row.rows << (row.log_finishers + 1) <= THREADS) ++row.log_finishers;
    return;
  }
  if (!is_empty(level)) {
    // As many threads as have two packets each, at least 4: short runs leave no warps idle.
    const int64_t packets = cdiv(positions, packet);
    row.log_lanes = 2;
    while (row.log_lanes < 5 && 4 << row.log_lanes <= packets) ++row.log_lanes;
    tile(std::min(UNDER_WAY * rounds * packet, MOST_NUMBERS) << row.log_lanes);
    while (MOST_PARTS << row.log_finishers < row.parts && 2u << row.log_finishers <= THREADS) ++row.log_finishers;
  }
  row.rows = cdiv(row.all_rows, std::max(cdiv(row.all_rows, THREADS >> row.log_finishers), 1u));
  row.groups = row.rows ? cdiv(row.all_rows, row.rows) : 0;
  if (row.parts) row.blocks = cdiv(static_cast<int64_t>(row.rows) * row.parts, THREADS >> row.log_lanes);
}

// The levels of one launch, for kernels that move `width` numbers at once. Parts are as long as leaves half of BLOCKS
// blocks: what a part costs beside its numbers is some 430 instructions a thread.
inline RowPlan plan_rows(const Level* levels, const std::vector<int64_t>& which, const double* scale, bool per_image,
                         int width) {
  RowPlan plan{};
  RowTable& table = plan.table;
  table.count = plan.groups.count = static_cast<uint32_t>(which.size());
  int64_t first = 0;
  for (size_t i = 0; i < which.size(); ++i) {
    const Level& level = levels[which[i]];
    RowLevel& row = table.rows[i];
    row.first = level.first;
    row.scale = scale ? scale[which[i]] : 0;
    row.images = static_cast<uint32_t>(level.n);
    row.channels = static_cast<uint32_t>(level.c);
    row.positions = static_cast<uint32_t>(level.positions());
    row.entry = static_cast<uint32_t>(which[i]);
    if (is_empty(level)) continue;
    const bool split = !has_positions(level.student, level.teacher, level.grad);
    const auto wide = [&](const View& view) { return is_wide(level, view, width); };
    row.student = operand_of(level.student, !split);
    row.teacher = operand_of(level.teacher, !split);
    row.grad = operand_of(level.grad, !split);
    row.width = split ? static_cast<uint32_t>(level.w) : 0;
    row.interleaved = level.interleaved;
    row.wide = width > 1 && (level.interleaved ? wide(level.student) && wide(level.teacher) && wide(level.grad)
                                               : is_parallel(level, width));
  }
  for (int64_t rounds = 8; rounds > 0; rounds /= 2) {
    plan.blocks = plan.parts = first = 0;
    for (size_t i = 0; i < which.size(); ++i) {
      RowLevel& row = table.rows[i];
      cut(levels[which[i]], per_image, row.wide ? width : 1, rounds, row);
      row.first_part = plan.parts;
      table.starts[i] = static_cast<uint32_t>(plan.blocks);
      plan.groups.starts[i] = static_cast<uint32_t>(first);
      plan.blocks += static_cast<int64_t>(row.groups) * row.blocks;
      plan.parts += static_cast<int64_t>(row.all_rows) * row.parts;
      first += row.groups;
    }
    if (plan.blocks >= BLOCKS / 2) break;
  }
  table.starts[table.count] = static_cast<uint32_t>(plan.blocks);
  plan.groups.starts[table.count] = static_cast<uint32_t>(first);
  return plan;
}

}  // namespace frs::cuda
