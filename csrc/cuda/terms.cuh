// A launch of imitate: which entries it takes, what its kernel is told, and how its blocks' sums reach the values of
// entries and terms and the total.
#pragma once

#include <vector>

#include "slots.cuh"
#include "walks.cuh"

namespace frs::cuda {

constexpr uint32_t MAX_TERMS = 4;  // of a launch

using ImitateTable = Table<ImitateRow>;

struct ImitateTerm {
  double weight, temperature, beta;
  const void* factor;
  DType factor_dtype;
  Loss loss;
  uint32_t number;  // of the term in the call

  __device__ __forceinline__ double upstream() const {
    return weight * (factor ? read_number(factor, factor_dtype) : 1.0);
  }
};

struct ImitateCall {
  ImitateTerm terms[MAX_TERMS];
  Share share;
  void *total, *values;
  Workspace workspace;
  uint32_t launch_terms, call_terms;
};
static_assert(sizeof(ImitateTable) + sizeof(ImitateCall) <= PARAMETER_BYTES);

// What every block ends with, given its part of a sum of share * value.
template <class A>
__device__ __forceinline__ void add_up(const ImitateTable& table, const ImitateCall& call, A sum) {
  if (call.total == nullptr || !store_partial(call.workspace, blockIdx.x, sum)) return;
  A* const values = static_cast<A*>(call.values);
  const double* const sums = sum_rows(call.workspace, table, [&](uint32_t i, double s) {
    values[call.call_terms + table.rows[i].entry] = static_cast<A>(s);
  });
  __shared__ double weighted[MAX_TERMS];
  const uint32_t t = threadIdx.x;  // a thread a term
  if (t < call.launch_terms) {
    const ImitateTerm& term = call.terms[t];
    double value = 0;
    for (uint32_t i = 0; i < table.count; ++i) value += table.rows[i].term == t ? sums[i] : 0;
    weighted[t] = term.upstream() * value;
    value += call.workspace.terms[term.number];
    call.workspace.terms[term.number] = value;
    values[term.number] = static_cast<A>(value);
  }
  __syncthreads();
  if (t != 0) return;
  double total = *call.workspace.total;
  for (uint32_t i = 0; i < call.launch_terms; ++i) total += weighted[i];
  *call.workspace.total = total;
  *static_cast<A*>(call.total) = static_cast<A>(total);
}

// Entries of one launch: one pair of dtypes, at most MAX_ROWS and MAX_TERMS terms.
struct Group {
  std::vector<const Entry*> entries;
  std::vector<int64_t> terms;
};

inline std::vector<Group> groups_of(const Imitate& call, bool grouped) {
  std::vector<Group> groups;
  const auto add = [&](const Entry& entry) {
    for (Group& group : groups) {
      const auto known = std::find(group.terms.begin(), group.terms.end(), entry.term);
      const bool fits = known != group.terms.end() || group.terms.size() < MAX_TERMS;
      const Entry& first = *group.entries[0];
      if (group.entries.size() == MAX_ROWS || !fits || first.student.dtype != entry.student.dtype ||
          first.teacher.dtype != entry.teacher.dtype)
        continue;
      group.entries.push_back(&entry);
      if (known == group.terms.end()) group.terms.push_back(entry.term);
      return;
    }
    groups.push_back({{&entry}, {entry.term}});
  };
  const auto is_logits = [&](const Entry& entry) {
    bool is = false;
    EveryLoss::with(call.terms[entry.term].loss, [&](auto loss) { is = Traits<decltype(loss)::value>::takes_logits; });
    return is;
  };
  for (const bool logits : {true, false})
    for (int64_t e = call.count - 1; e >= 0; --e) {
      check_sizes(call.entries[e], "imitate");
      const bool wanted = (call.total || call.entries[e].grad.data) && (call.entries[e].group > 0) == grouped;
      if (wanted && is_logits(call.entries[e]) == logits) add(call.entries[e]);
    }
  return groups;
}

// What of an entry's row does not depend on how its tensors are walked; of one without positions nothing else.
inline ImitateRow row_of(const Imitate& call, const Group& group, const Entry& entry) {
  ImitateRow row{};
  const auto term = std::find(group.terms.begin(), group.terms.end(), entry.term);
  row.entry = static_cast<uint16_t>(&entry - call.entries);
  row.level = static_cast<uint16_t>(entry.level);
  row.term = static_cast<uint16_t>(term - group.terms.begin());
  if (is_empty(entry)) return row;
  const bool split = !has_positions(entry.student, entry.teacher, entry.grad);
  row.student = operand_of(entry.student, !split);
  row.teacher = operand_of(entry.teacher, !split);
  row.grad = operand_of(entry.grad, !split);
  row.first = entry.first;
  row.scale = entry.scale;
  row.eps = entry.eps;
  row.channels = static_cast<uint32_t>(entry.c);
  row.positions = static_cast<uint32_t>(entry.positions());
  row.width = split ? static_cast<uint32_t>(entry.w) : 0;
  return row;
}

inline ImitateCall parameters_of(const Imitate& call, const Group& group, const Workspace& workspace) {
  ImitateCall parameters{};
  parameters.share = {call.scores, call.norm, call.score_dtype, static_cast<uint32_t>(call.joint)};
  parameters.total = call.total;
  parameters.values = call.values;
  parameters.workspace = workspace;
  parameters.launch_terms = static_cast<uint32_t>(group.terms.size());
  parameters.call_terms = static_cast<uint32_t>(call.term_count);
  for (size_t t = 0; t < group.terms.size(); ++t) {
    const Term& term = call.terms[group.terms[t]];
    parameters.terms[t] = {term.weight,
                           term.temperature,
                           term.beta,
                           term.factor,
                           term.factor_dtype,
                           term.loss,
                           static_cast<uint32_t>(group.terms[t])};
  }
  return parameters;
}

}  // namespace frs::cuda
