// What the verbs of this backend offer each other: a launch in a workspace that the caller has reset.
#pragma once

#include "slots.cuh"

namespace frs::cuda {

int64_t score_blocks(const Score&);
int64_t imitate_blocks(const Imitate&);
void launch_score(const Score&, const Workspace&, void* stream);
int64_t softmax_blocks(const Imitate&);
void launch_imitate(const Imitate&, const Workspace&, void* stream, Begin begin);

// Of the entries whose loss is one of groups; false where there was nothing to launch.
bool launch_softmax(const Imitate&, const Workspace&, void* stream, Begin begin);

}  // namespace frs::cuda
