// distill: score, then imitate with its scores and its mass as the norm, in one workspace that is reset once. From
// sm_90 on imitate begins while score drains: student and teacher are on their way before it waits for the scores.
#include "verbs.cuh"

namespace frs {

int64_t distill_workspace(const Score& first, const Imitate& then) {
  return cuda::workspace_bytes(std::max(cuda::score_blocks(first), cuda::imitate_blocks(then)), then.term_count);
}

void distill(const Score& first, const Imitate& then, void* memory, void* stream) {
  cuda::reset(memory, then.term_count, "distill", stream);
  const cuda::Workspace workspace = cuda::workspace_at(memory, then.term_count);
  cuda::launch_score(first, workspace, stream);
  cuda::launch_imitate(then, workspace, stream, cuda::Begin::beside_previous);
}

}  // namespace frs
