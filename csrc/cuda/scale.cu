// scale_: gradient *= factor in place, over all levels; nothing is read or written where factor is 1.
//
// A fixed number of blocks strides over all gradients as flat runs, so that the launch ends at once where factor is 1
// (no loss scaling, the usual case).
#include <algorithm>

#include "launch.cuh"
#include "memory.cuh"

namespace frs {
namespace cuda {
namespace {

constexpr int MAX_RUNS = 64;  // 1.5 KB of parameters
constexpr int UNROLL = 2;

struct ScaleTable {
  Run runs[MAX_RUNS];
  int32_t count;
  const void* factor;
  DType factor_dtype;
};

template <class T, class A>
__device__ __forceinline__ void scale_run(T* data, int64_t size, A factor) {
  constexpr int V = 16 / sizeof(T);
  const uint32_t thread = blockIdx.x * THREADS + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
  // A run may begin between two multiples of 16 bytes: fewer than V numbers before the packets, and after.
  const int64_t to_aligned = -(reinterpret_cast<uintptr_t>(data) / sizeof(T)) & (V - 1);
  const int64_t head = to_aligned < size ? to_aligned : size;
  const int64_t packets = (size - head) / V, rest = size - packets * V;
  if (thread < rest) {
    T* number = data + (thread < head ? thread : packets * V + thread);
    *number = Narrow<T>::of(static_cast<A>(widen(*number)) * factor);
  }
  T* const aligned = data + head;
  for (int64_t first = thread; first < packets; first += UNROLL * stride) {
    Held<T, A, V> held[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (first + u * stride < packets) held[u].template fetch<Use::once>(aligned, (first + u * stride) * V, DType{});
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (first + u * stride >= packets) continue;
      const Packet<T, V> grad = held[u].packet();
      A scaled[V];
#pragma unroll
      for (int i = 0; i < V; ++i) scaled[i] = widen(grad.at[i]) * factor;
      store<T, V>(aligned + (first + u * stride) * V, narrow<T>(scaled));
    }
  }
}

__global__ void __launch_bounds__(THREADS, 5) scale_kernel(const __grid_constant__ ScaleTable table) {
  const double factor = read_number(table.factor, table.factor_dtype);
  if (factor == 1) return;
  for (int32_t i = 0; i < table.count; ++i) {
    const Run& run = table.runs[i];
    with_dtype(run.data, run.dtype, [&](auto* data) {
      if constexpr (sizeof(*data) == 8)
        scale_run(data, run.size, factor);
      else
        scale_run(data, run.size, static_cast<float>(factor));
    });
  }
}

}  // namespace
}  // namespace cuda

void scale(const Scale& call, void* stream) {
  for (int64_t first = 0; first < call.count; first += cuda::MAX_RUNS) {
    cuda::ScaleTable table{};
    table.factor = call.factor;
    table.factor_dtype = call.factor_dtype;
    table.count = static_cast<int32_t>(std::min<int64_t>(call.count - first, cuda::MAX_RUNS));
    int64_t bytes = 0;
    for (int32_t i = 0; i < table.count; ++i) {
      table.runs[i] = call.runs[first + i];
      bytes = std::max(bytes, table.runs[i].size * cuda::bytes_of(table.runs[i].dtype));
    }
    if (bytes == 0) continue;
    // 8 blocks are all that a multiprocessor holds at once by the kernel's registers
    const int64_t useful = (bytes + 16 * cuda::THREADS * cuda::UNROLL - 1) / (16 * cuda::THREADS * cuda::UNROLL);
    cuda::launch("scale_", cuda::scale_kernel, std::min<int64_t>(useful, 8 * cuda::multiprocessors("scale_")), stream,
                 cuda::Begin::after_previous, table);
  }
}

}  // namespace frs
