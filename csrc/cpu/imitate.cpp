// imitate: the masked imitation loss of a tile and its gradient by the student, in one pass.
//
//     share_p  = scale S_p / (norm_l + eps)                       0 where norm_l + eps is 0; joint: norm_l = sum(norm)
//     sum      = sum_p share_p sum_c value(x_pc, z_pc)            (value, slope: pointwise.h)
//     gradient = upstream * share_p * slope(x_pc, z_pc)           upstream = weight * factor
#include "isa.h"
#include "rows.h"
#include "shares.h"

namespace frs::FRS_ISA {
namespace {

// A row, and for each of its values the share and the gradient's coefficient upstream * share.
template <class T, class S>
struct Values {
  const S *x, *z;
  S* grad;
  const T *share, *coefficient;
  int64_t size;
  T inverse_temperature, beta;
  int64_t x_ahead, z_ahead;  // from a row to the next one in memory
  bool stream;               // write the gradient past the caches
};

template <Loss LOSS, bool TEMPERED, bool WANT_LOSS, bool WANT_GRAD>
inline double imitate_row(const Values<double, double>& v) {
  double sum = 0;
  for (int64_t i = 0; i < v.size; ++i) {
    const auto [value, slope] =
        Traits<LOSS>::at(v.x[i] * v.inverse_temperature, v.z[i] * v.inverse_temperature, v.beta);
    if (WANT_LOSS) sum += v.share[i] * value;
    if (WANT_GRAD) v.grad[i] = v.coefficient[i] * slope;
  }
  return sum;
}

template <Loss LOSS, bool TEMPERED, bool WANT_LOSS, bool WANT_GRAD, class S>
inline double imitate_row(const Values<float, S>& v) {
  const auto [x, z, grad, share, coefficient, size, inverse_temperature, beta, x_ahead, z_ahead, stream_grad] = v;
  F32 sums = {};
  const auto step = [&](F32 x, F32 z, F32 share, F32 coefficient) {
    if (TEMPERED) x = x * inverse_temperature, z = z * inverse_temperature;
    const auto [value, slope] = Traits<LOSS>::at(x, z, beta);
    if (WANT_LOSS) sums = sums + share * value;
    return coefficient * slope;
  };
  const auto whole = [&](int64_t i) {
    // The hardware prefetches no further than a row goes (docs/design-notes.md).
    prefetch(x + i, x_ahead);
    prefetch(z + i, z_ahead);
    return step(load_wide(x + i), load_wide(z + i), load<F32>(share + i), load<F32>(coefficient + i));
  };
  const auto part = [&](int64_t i, int64_t count) {
    const F32 g = step(load_wide(x + i, count), load_wide(z + i, count), load_wide(share + i, count),
                       load_wide(coefficient + i, count));
    if (WANT_GRAD) store_narrow(grad + i, g, count);
  };
  int64_t i = 0;
  if (WANT_GRAD && stream_grad) {
    i = at_most(-(reinterpret_cast<intptr_t>(grad) / static_cast<intptr_t>(sizeof(S))) & (WIDTH - 1), size);
    if (i) part(0, i);
    for (; i + WIDTH <= size; i += WIDTH) stream(grad + i, Stored<S>::narrow(whole(i)));
  } else {
    for (; i + WIDTH <= size; i += WIDTH) {
      const F32 g = whole(i);
      if (WANT_GRAD) store_narrow(grad + i, g);
    }
  }
  if (i < size) part(i, size - i);
  double sum = 0;
  for (int lane = 0; lane < WIDTH; ++lane) sum += sums[lane];
  return sum;
}

// Repeat each of the `count` numbers for the channels of its position.
template <class T>
void spread(T* out, const T* numbers, int64_t count, int64_t channels) {
  for (int64_t p = 0; p < count; ++p)
    for (int64_t c = 0; c < channels; ++c) *out++ = numbers[p];
}

template <class T, class S, Loss LOSS, bool TEMPERED, bool WANT_LOSS, bool WANT_GRAD>
double imitate_tile(const Imitate& call, const Tile& tile, double upstream) {
  const Level& level = *tile.level;
  const Term& term = call.terms[call.entries[tile.index].term];
  // The temperature's factors, of the value and of the slope, are the same for the whole tile.
  const double tau = TEMPERED ? term.temperature : 1;
  const T factor = static_cast<T>(upstream * tau);
  const bool past_caches = WANT_GRAD && streams<S>(level);
  // From a row to the next one: to the next channel, or over all channels of some positions.
  const int64_t x_ahead = level.interleaved ? ROW : level.student.c,
                z_ahead = level.interleaved ? ROW : level.teacher.c;
  Buffer<S> x_buffer, z_buffer, grad_buffer;
  Buffer<T> share, coefficient, wide_share, wide_coefficient;
  if (!level.interleaved) weigh(call, tile, tile.p0, tile.p1, factor, share.values, coefficient.values);
  double sum = 0;
  each_row(tile, [&](const Row& row) {
    const S* x = fetch(level.student, row, x_buffer);
    const S* z = fetch(level.teacher, row, z_buffer);
    S* grad = target(level.grad, row, grad_buffer);
    Values<T, S> v{x,
                   z,
                   grad,
                   share.values,
                   coefficient.values,
                   row.size(),
                   static_cast<T>(1 / tau),
                   static_cast<T>(term.beta),
                   x == x_buffer.values ? 0 : x_ahead,
                   z == z_buffer.values ? 0 : z_ahead,
                   past_caches && grad != grad_buffer.values};
    if (level.interleaved) {
      weigh(call, tile, row.p0, row.p1, factor, share.values, coefficient.values);
      v.share = wide_share.values;
      v.coefficient = wide_coefficient.values;
      spread(wide_share.values, share.values, row.p1 - row.p0, row.c1 - row.c0);
      spread(wide_coefficient.values, coefficient.values, row.p1 - row.p0, row.c1 - row.c0);
    }
    sum += imitate_row<LOSS, TEMPERED, WANT_LOSS, WANT_GRAD>(v);
    if (WANT_GRAD) commit(level.grad, row, grad_buffer, v.grad);
  });
  if (past_caches) fence();
  return sum * tau * tau;
}

template <class T, class S, Loss LOSS, bool TEMPERED>
double imitate_tile(const Imitate& call, const Tile& tile, double upstream) {
  if (!tile.level->grad.data) return imitate_tile<T, S, LOSS, TEMPERED, true, false>(call, tile, upstream);
  if (!call.total) return imitate_tile<T, S, LOSS, TEMPERED, false, true>(call, tile, upstream);
  return imitate_tile<T, S, LOSS, TEMPERED, true, true>(call, tile, upstream);
}

template <class T, class S>
double imitate_tile(const Imitate& call, const Tile& tile, double upstream) {
  const Term& term = call.terms[call.entries[tile.index].term];
  double sum = 0;
  EveryPointwise::with(term.loss, [&](auto loss) {
    constexpr Loss LOSS = decltype(loss)::value;
    if constexpr (Traits<LOSS>::takes_logits) {
      if (term.temperature != 1) {
        sum = imitate_tile<T, S, LOSS, true>(call, tile, upstream);
        return;
      }
    }
    sum = imitate_tile<T, S, LOSS, false>(call, tile, upstream);
  });
  return sum;
}

}  // namespace

double imitate_tile(const Imitate& call, const Tile& tile, double upstream) {
  if (call.dtype == DType::f64) return imitate_tile<double, double>(call, tile, upstream);
  const DType student = tile.level->student.dtype, teacher = tile.level->teacher.dtype;
  if (student == DType::bf16 && teacher == student) return imitate_tile<float, Bf16>(call, tile, upstream);
  if (student == DType::f16 && teacher == student) return imitate_tile<float, F16>(call, tile, upstream);
  return imitate_tile<float, float>(call, tile, upstream);
}

}  // namespace frs::FRS_ISA
