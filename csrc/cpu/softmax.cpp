// imitate of softmax_kl: the loss of a tile of whole groups and its gradient by the student.
//
//     sum      = sum_p share_p sum_groups tau^2 value             share_p: shares.h; value and slope: softmax.h
//     gradient = upstream * share_p * tau * slope                 upstream = weight * factor
//
// The lanes of a vector are neighbouring positions, so that a maximum or a sum over a group's channels needs no other
// lane. The channels of one vector's positions are read three times, for the maxima, for the exponentials, which are
// kept, and for the gradient: the second and third time out of L1. What does not lie in memory like that, or ends
// within a vector, is brought into such a form, COLUMN positions at a time.
#include "../softmax.h"
#include "isa.h"
#include "panels.h"
#include "shares.h"

namespace frs::FRS_ISA {
namespace {

// The positions that are computed at once, from what is kept as S.
template <class S>
struct Lanes {
  typedef F32 V;
  static constexpr int64_t COUNT = WIDTH;
  static FRS_INLINE V of(const S* p) { return load_wide(p); }
  static FRS_INLINE V numbers(const float* p) { return load<F32>(p); }
  static FRS_INLINE void put(S* p, V v) { store_narrow(p, v); }
  static FRS_INLINE void put_past(S* p, V v) { stream(p, Stored<S>::narrow(v)); }
  static FRS_INLINE double sum(V v) {
    double sum = 0;
    for (int lane = 0; lane < WIDTH; ++lane) sum += v[lane];
    return sum;
  }
};
template <>
struct Lanes<double> {
  typedef double V;
  static constexpr int64_t COUNT = 1;
  static FRS_INLINE V of(const double* p) { return *p; }
  static FRS_INLINE V numbers(const double* p) { return *p; }
  static FRS_INLINE void put(double* p, V v) { *p = v; }
  static FRS_INLINE void put_past(double* p, V v) { *p = v; }
  static FRS_INLINE double sum(V v) { return v; }
};

// A group's channels at some positions, which are neighbours; `step` numbers from channel to channel.
template <class S>
struct Panel {
  S* at;
  int64_t step;
};

template <class T, class S>
struct Group {
  Panel<const S> x, z;
  Panel<S> grad;
  const T *share, *coefficient;  // of its positions
  int64_t channels, positions;   // up to the end of a vector all can be read and written
  T inverse_temperature;
  T *e_x, *e_z;  // room for the exponentials of a vector's positions
  bool stream;   // write the gradient past the caches
};

template <bool WANT_LOSS, bool WANT_GRAD, class T, class S>
double imitate_group(const Group<T, S>& g) {
  using L = Lanes<S>;
  using V = typename L::V;
  constexpr int64_t AHEAD = 256 / sizeof(S);
  V sums = {};
  for (int64_t p = 0; p < g.positions; p += L::COUNT) {
    const S *x = g.x.at + p, *z = g.z.at + p;
    V m_x = L::of(x), m_z = L::of(z);
    for (int64_t c = 0; c < g.channels; ++c) {
      const S *x_c = x + c * g.x.step, *z_c = z + c * g.z.step;
      prefetch(x_c, AHEAD), prefetch(z_c, AHEAD);
      const V a = L::of(x_c), b = L::of(z_c);
      m_x = a > m_x ? a : m_x, m_z = b > m_z ? b : m_z;  // a NaN may be passed over: its exponential is one
    }
    V z_x = {}, z_z = {};
    for (int64_t c = 0; c < g.channels; ++c) {
      const V a = exp_neg<V>((m_x - L::of(x + c * g.x.step)) * g.inverse_temperature);
      const V b = exp_neg<V>((m_z - L::of(z + c * g.z.step)) * g.inverse_temperature);
      memcpy(g.e_x + c * L::COUNT, &a, sizeof(V)), memcpy(g.e_z + c * L::COUNT, &b, sizeof(V));
      z_x = z_x + a, z_z = z_z + b;
    }
    const auto softmax = Softmax<V>::of(m_x, m_z, z_x, z_z, g.inverse_temperature);
    const V inverse = 1.0f / z_x, coefficient = L::numbers(g.coefficient + p) * inverse;
    V sum = {};
    for (int64_t c = 0; c < g.channels; ++c) {
      V a, b;
      memcpy(&a, g.e_x + c * L::COUNT, sizeof(V)), memcpy(&b, g.e_z + c * L::COUNT, sizeof(V));
      const V d = (L::of(x + c * g.x.step) - L::of(z + c * g.z.step)) * g.inverse_temperature;
      const auto [value, slope] = softmax.at(a, b, d);
      if (WANT_LOSS) sum = sum + value;
      if (!WANT_GRAD) continue;
      S* grad = g.grad.at + c * g.grad.step + p;
      if (g.stream)
        L::put_past(grad, coefficient * slope);
      else
        L::put(grad, coefficient * slope);
    }
    if (WANT_LOSS) sums = sums + L::numbers(g.share + p) * inverse * sum;
  }
  return L::sum(sums);
}

// A panel is the tensor's own memory where a channel's positions are a run, and end with a vector.
template <class S>
bool is_direct(const View& v, const Level& level, int64_t positions) {
  return !level.interleaved && v.p == 1 && v.dtype == dtype_of<S> && positions % Lanes<S>::COUNT == 0;
}

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

template <class S>
S* corner(const View& v, const Part& part) {
  const Row row{part.tile, part.c0, part.c0 + 1, part.p0, part.p0 + 1};
  return reinterpret_cast<S*>(const_cast<char*>(address(v, offset(v, row, part.c0, part.p0))));
}

template <class T, class S, bool WANT_LOSS, bool WANT_GRAD>
double softmax_tile(const Imitate& call, const Tile& tile, double upstream, void* scratch) {
  const Entry& entry = call.entries[tile.index];
  const double tau = call.terms[entry.term].temperature;
  const int64_t group = entry.group, panel = group * COLUMN;
  T* const e_x = static_cast<T*>(scratch);
  T* const e_z = e_x + group * Lanes<S>::COUNT;
  S* const panels = reinterpret_cast<S*>(e_z + group * Lanes<S>::COUNT);
  S* const line = panels + 3 * panel;
  alignas(64) T share[COLUMN], coefficient[COLUMN];
  const bool past_caches = WANT_GRAD && streams<S>(entry) && sizeof(S) * Lanes<S>::COUNT == 64;
  double sum = 0;
  for (int64_t p = tile.p0; p < tile.p1; p += COLUMN) {
    const int64_t size = at_most(COLUMN, tile.p1 - p);
    memset(share, 0, sizeof(share)), memset(coefficient, 0, sizeof(coefficient));
    weigh(call, tile, p, p + size, static_cast<T>(upstream * tau), share, coefficient);
    for (int64_t c = tile.c0; c < tile.c1; c += group) {
      const Part part{&tile, c, group, p, size};
      const auto source = [&](const View& v, S* room) -> Panel<const S> {
        if (is_direct<S>(v, entry, size)) return {corner<S>(v, part), v.c};
        gather(v, part, room, line);
        return {room, COLUMN};
      };
      const bool direct = WANT_GRAD && is_direct<S>(entry.grad, entry, size);
      const Panel<S> grad = direct ? Panel<S>{corner<S>(entry.grad, part), entry.grad.c} : Panel<S>{panels, COLUMN};
      const bool stream = past_caches && direct && is_aligned(grad.at) && is_aligned(grad.at + grad.step);
      sum += imitate_group<WANT_LOSS, WANT_GRAD>(
          Group<T, S>{source(entry.student, panels + panel), source(entry.teacher, panels + 2 * panel), grad, share,
                      coefficient, group, size, static_cast<T>(1 / tau), e_x, e_z, stream});
      if (WANT_GRAD && !direct) scatter(entry.grad, part, panels, line);
    }
  }
  if (past_caches) fence();
  return sum * tau * tau;
}

template <class T, class S>
double softmax_tile(const Imitate& call, const Tile& tile, double upstream, void* scratch) {
  if (!tile.level->grad.data) return softmax_tile<T, S, true, false>(call, tile, upstream, scratch);
  if (!call.total) return softmax_tile<T, S, false, true>(call, tile, upstream, scratch);
  return softmax_tile<T, S, true, true>(call, tile, upstream, scratch);
}

}  // namespace

double softmax_tile(const Imitate& call, const Tile& tile, double upstream, void* scratch) {
  if (call.dtype == DType::f64) return softmax_tile<double, double>(call, tile, upstream, scratch);
  const DType student = tile.level->student.dtype, teacher = tile.level->teacher.dtype;
  if (tile.level->interleaved) return softmax_tile<float, float>(call, tile, upstream, scratch);
  if (student == DType::bf16 && teacher == student) return softmax_tile<float, Bf16>(call, tile, upstream, scratch);
  if (student == DType::f16 && teacher == student) return softmax_tile<float, F16>(call, tile, upstream, scratch);
  return softmax_tile<float, float>(call, tile, upstream, scratch);
}

}  // namespace frs::FRS_ISA
