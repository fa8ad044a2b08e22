// Runs one call of a verb and compares what it gives with loops written from the formulas, in long double:
//
//     S = max_k sigmoid(z)     share = scale S / (norm + eps)     d = x - z
//     mse = d^2     l1 = |d|     smooth_l1 = d^2 / (2 beta) where |d| < beta, else |d| - beta / 2
//     bce = softplus(x) - x sigmoid(z)     kl = bce(x, z) - bce(z, z)
//     qfl = |p - q|^beta bce, p = sigmoid(x), q = sigmoid(z); the slope of qfl_detached takes the power for a constant
//     softmax_kl = sum q log(q / p) of each beta channels, or all, p = softmax(x), q = softmax(z)
#pragma once

#include <limits>
#include <tuple>

#include "cuda_runtime.h"
#include "tensors.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace {

// What one launch takes: one pair of dtypes, pointwise losses or those of groups, so many entries and terms.
constexpr int64_t LEVELS_A_LAUNCH = 16, ENTRIES_A_LAUNCH = 16, TERMS_A_LAUNCH = 4;

struct EntrySpec {
  int level, term;
  int64_t c;
  DType student, teacher;
  Layout student_layout, teacher_layout;
  double scale = 1, eps = 0;
};

struct TermSpec {
  Loss loss;
  bool want_grad = true, has_factor = true;
  double weight = 0.75, factor = 3, temperature = 1, beta = 1;
  DType factor_dtype = DType::f32;

  int64_t group_of(int64_t channels) const {
    if (loss != Loss::softmax_kl) return 0;
    return beta == 0 ? channels : static_cast<int64_t>(beta);
  }
};

struct Call {
  std::vector<Shape> levels;  // of the logits that are scored; entries have their level's N, H and W
  DType logits = DType::f32;
  Layout logits_layout = contiguous;
  std::vector<EntrySpec> entries;
  std::vector<TermSpec> terms;
  bool want_loss = true, together = true;  // together: distill, else score and imitate apart
  bool f64_scores = false;                 // not those of the logits
  bool joint = false;                      // one norm for all levels
  int no_mass = -1, nan_level = -1;
};

Real sigmoid(Real v) { return v >= 0 ? 1 / (1 + std::exp(-v)) : std::exp(v) / (1 + std::exp(v)); }
Real softplus(Real v) { return std::max(v, Real(0)) + std::log1p(std::exp(-std::fabs(v))); }

// Rounding errors. A few operations after the exponential 12; the share, the weight and their products 4; a sum of up
// to 64 terms a thread 8.
constexpr Real POINTWISE = 12, COEFFICIENT = 4, SUM = 8;

// Value and slope, and what POINTWISE rounding errors are relative to: sums of the terms that the kernels add or
// subtract.
struct Truth {
  Real value, slope, value_scale, slope_scale;
};

Truth truth_of_logits(bool kl, Real x, Real z, Real temperature) {
  x /= temperature, z /= temperature;
  const Real q = sigmoid(z), bce = softplus(x) - x * q, entropy = softplus(z) - z * q;
  const Real tail_x = sigmoid(-std::fabs(x)), tail_z = sigmoid(-std::fabs(z));
  const Real miss = (x >= 0) == (z >= 0) ? tail_z : 1 - tail_z;
  Truth t{kl ? bce - entropy : bce, sigmoid(x) - q, bce, tail_x + miss};
  if (kl) t.value_scale += entropy;
  // exp(-|x|) is 2 to the rounded product of |x| and a rounded constant: |x| (1 + 1/4) roundings of the result. Of a
  // tail they are tail (1 - tail) times as many, of log1p(exp(-|x|)) tail times.
  const Real of_x = std::fabs(x) * 1.25L / POINTWISE, of_z = std::fabs(z) * 1.25L / POINTWISE;
  const Real move_x = of_x * tail_x * (1 - tail_x), move_z = of_z * tail_z * (1 - tail_z);
  t.slope_scale += move_x + move_z;
  t.value_scale += of_x * tail_x + std::fabs(x) * move_z;
  if (kl) t.value_scale += of_z * tail_z + std::fabs(z) * move_z;
  if (temperature != 1) {  // x / temperature is rounded
    t.value_scale += std::fabs(x * t.slope) + (std::fabs(x) + std::fabs(x - z)) * std::fabs(z) * q * (1 - q);
    t.slope_scale += std::fabs(x) * tail_x + std::fabs(z) * tail_z;
  }
  // what long double loses in softplus(x) - x q, counted as roundings of 12 fp64 units
  t.value_scale += (std::fabs(x) + std::fabs(z)) * 1e-4L;
  const Real square = temperature * temperature;
  return {t.value * square, t.slope * temperature, t.value_scale * square, t.slope_scale * temperature};
}

// Of bce, with what rounding d = p - q makes of its power. Both parts of the slope move with d, and with a few
// roundings of the power's own.
Truth truth_of_focal(const TermSpec& term, Real x, Real z, bool detached) {
  const Real tau = term.temperature, beta = term.beta;
  const Truth bce = truth_of_logits(false, x, z, tau);
  if (beta == 0) return bce;
  // The long double itself has as little of d as is 1e-19 of p and q.
  const Real d = bce.slope / tau, a = std::max(std::fabs(d), Real(1e-18)), move = bce.slope_scale / tau;
  const Real value = bce.value / (tau * tau), value_scale = bce.value_scale / (tau * tau);
  const Real p = sigmoid(x / tau), variance = p * sigmoid(-x / tau), power = d == 0 ? 0 : std::pow(a, beta);
  const Real moving = d == 0 || detached ? 0 : beta * std::pow(a, beta - 1) * (d > 0 ? 1 : -1) * variance;
  // exp(-|x|) is off by |x| / 12 of its bound's roundings, and the quotient of an x by tau by as many
  const Real own = 1 + (beta + 2 + std::fabs(x / tau) * 0.25L) / 2;
  const Real weight_scale = power * own + beta * std::pow(a, beta - 1) * move;
  const Real slope_scale = (beta + 1) * power * move + std::fabs(power * d) * own +
                           std::fabs(moving) * (value * own + value_scale + value * std::fabs(beta - 1) * move / a);
  return {power * value * tau * tau, (power * d + moving * value) * tau,
          (weight_scale * std::fabs(value) + power * value_scale) * tau * tau, slope_scale * tau};
}

Truth truth(const TermSpec& term, Real x, Real z) {
  const Real d = x - z, a = std::fabs(d), beta = term.beta, sign = d > 0 ? 1 : d < 0 ? -1 : d;
  switch (term.loss) {
    case Loss::mse: return {d * d, 2 * d, d * d, 2 * a};
    case Loss::l1: return {a, sign, a, std::fabs(sign)};
    case Loss::smooth_l1:
      if (a < beta) return {d * d / (2 * beta), d / beta, d * d / (2 * beta), a / beta};
      return {a - beta / 2, sign, a, std::fabs(sign)};
    case Loss::bce: return truth_of_logits(false, x, z, term.temperature);
    case Loss::kl: return truth_of_logits(true, x, z, term.temperature);
    case Loss::qfl: return truth_of_focal(term, x, z, false);
    case Loss::qfl_detached: return truth_of_focal(term, x, z, true);
    default: std::abort();  // a new loss wants a line
  }
}

bool takes_logits(Loss loss) {
  return loss == Loss::bce || loss == Loss::kl || loss == Loss::qfl || loss == Loss::qfl_detached ||
         loss == Loss::softmax_kl;
}

// Of the channels of a group at one position: each one's part of the value, p - q + q log(q / p), and slope. The
// exponential of what lies a below the maximum is off by a few roundings of a; a sum of many by some of theirs.
std::vector<Truth> truth_of_softmax(Real temperature, const std::vector<Real>& x, const std::vector<Real>& z) {
  const auto logs = [&](const std::vector<Real>& v, Real& most) {
    most = *std::max_element(v.begin(), v.end());
    Real sum = 0;
    for (Real u : v) sum += std::exp((u - most) / temperature);
    std::vector<Real> log;
    for (Real u : v) log.push_back((u - most) / temperature - std::log(sum));
    return log;
  };
  Real most_x, most_z;
  const std::vector<Real> log_p = logs(x, most_x), log_q = logs(z, most_z);
  std::vector<Truth> found;
  for (size_t c = 0; c < x.size(); ++c) {
    const Real p = std::exp(log_p[c]), q = std::exp(log_q[c]), t = log_p[c] - log_q[c];
    const Real d = (x[c] - z[c]) / temperature, below = (most_x - x[c] + most_z - z[c]) / temperature;
    const Real own = 1 + (below * 2.75L + Real(x.size()) / 2) / POINTWISE, moves = std::fabs(d) + std::fabs(d - t);
    found.push_back({(p - q - q * t) * temperature * temperature, (p - q) * temperature,
                     (p + q * (1 + std::fabs(t) + moves)) * own * temperature * temperature,
                     (p + q) * own * temperature});
  }
  return found;
}

// Everything that a call reads and writes, each in memory of its own.
struct Data {
  std::vector<Tensor> logits, students, teachers, grads;
  std::vector<Level> levels;
  std::vector<Entry> entries;
  std::vector<Term> terms;
  std::vector<std::unique_ptr<char[]>> factors;
  DType dtype = DType::f32, score_dtype = DType::f32;
  int64_t positions = 0;
};

Data make(const Call& call) {
  Data d;
  for (const Shape& shape : call.levels) {
    const int l = static_cast<int>(d.levels.size());
    Tensor& z = d.logits.emplace_back(shape, call.logits, call.logits_layout);
    if (l == call.no_mass)
      z.fill(-std::numeric_limits<double>::infinity(), 0);
    else
      z.fill(-1, 3);
    if (l == call.nan_level) z.set(0, shape.c - 1, shape.positions() - 1, NAN);
    z.remember();
    d.levels.push_back({shape.n, shape.c, shape.h, shape.w, d.positions, is_last(call.logits_layout), {}, z.view, {}});
    d.positions += shape.n * shape.positions();
  }
  for (const TermSpec& term : call.terms) {
    d.factors.push_back(garbage(bytes(term.factor_dtype)));
    write(d.factors.back().get(), term.factor_dtype, term.factor);
    d.terms.push_back({term.loss, term.weight, term.has_factor ? d.factors.back().get() : nullptr, term.factor_dtype,
                       takes_logits(term.loss) ? term.temperature : 1.0, term.beta});
  }
  for (const EntrySpec& e : call.entries) {
    const auto [n, _, h, w] = call.levels[e.level];
    const Shape shape{n, e.c, h, w};
    const Layout layout = e.student_layout;
    Tensor& x = d.students.emplace_back(shape, e.student, layout);
    Tensor& z = d.teachers.emplace_back(shape, e.teacher, e.teacher_layout);
    x.fill(-0.5, 3), z.fill(-1, 3);
    // torch.empty_like: the student's strides if it is dense; a gap in one case of three all the same
    const bool dense = layout == transposed || layout == channels_last || layout >= LAYOUTS;
    const bool same = dense || pick(0, 2) == 0;
    Tensor& g = d.grads.emplace_back(shape, e.student, same ? layout : is_last(layout) ? channels_last : contiguous);
    if (e.level == call.nan_level) {
      x.set(n - 1, e.c / 2, 0, NAN);
      z.set(0, e.c - 1, shape.positions() - 1, NAN);
    }
    x.remember(), z.remember(), g.remember();
    const View grad = call.terms[e.term].want_grad ? g.view : View{nullptr, 0, 0, 0, 0, 0, e.student};
    d.entries.push_back({{n, e.c, h, w, d.levels[e.level].first, is_last(layout), x.view, z.view, grad},
                         e.level,
                         e.term,
                         e.scale,
                         e.eps,
                         call.terms[e.term].group_of(e.c)});
    if (e.student == DType::f64 || e.teacher == DType::f64) d.dtype = DType::f64;
  }
  if (call.logits == DType::f64 || call.f64_scores) d.score_dtype = DType::f64;
  return d;
}

// Of all channels at one position.
std::vector<Truth> truths(const TermSpec& term, const Entry& entry, const Data& d, size_t i, int64_t n, int64_t p) {
  std::vector<Truth> found;
  std::vector<Real> x, z;
  for (int64_t c = 0; c < entry.c; ++c) {
    x.push_back(d.students[i].get(n, c, p)), z.push_back(d.teachers[i].get(n, c, p));
    if (!entry.group) {
      found.push_back(truth(term, x[0], z[0]));
    } else if (static_cast<int64_t>(x.size()) < entry.group) {
      continue;
    } else {
      const auto group = truth_of_softmax(term.temperature, x, z);
      found.insert(found.end(), group.begin(), group.end());
    }
    x.clear(), z.clear();
  }
  return found;
}

void check_scores(const std::string& name, const Call& call, const Data& d, const Numbers& scores,
                  const Numbers& mass) {
  for (size_t l = 0; l < d.levels.size(); ++l) {
    const Level& level = d.levels[l];
    const Tensor& z = d.logits[l];
    Real sum = 0;
    for (int64_t n = 0; n < level.n; ++n)
      for (int64_t p = 0; p < level.positions(); ++p) {
        Real best = -std::numeric_limits<Real>::infinity();
        for (int64_t k = 0; k < level.c; ++k) {
          const Real v = z.get(n, k, p);
          if (!(v <= best)) best = v;
          if (std::isnan(best)) break;
        }
        const Real right = sigmoid(best);
        const double got = scores.get(level.first + n * level.positions() + p);
        near(got, right, 4 * roundoff(d.score_dtype) * right, name + " score");
        sum += got;
      }
    near(mass.get(l), sum, (d.score_dtype == DType::f64 ? 8 : 2) * roundoff(d.score_dtype) * sum, name + " mass");
    const bool hides = static_cast<int>(l) == call.nan_level && !std::isnan(mass.get(l));
    expect(!hides, name + " hides a NaN", mass.get(l), NAN, 0);
    expect(z.is_as_remembered(), name + " writes its logits", l, l, 0);
  }
}

int64_t up_to(int64_t count, int64_t most) { return (count + most - 1) / most; }

int64_t launches_of(const Call& call) {
  std::vector<std::pair<std::tuple<DType, DType, bool>, int64_t>> pairs;
  for (const EntrySpec& e : call.entries) {
    const std::tuple pair{e.student, e.teacher, call.terms[e.term].loss == Loss::softmax_kl};
    const auto known = std::find_if(pairs.begin(), pairs.end(), [&](const auto& p) { return p.first == pair; });
    if (known == pairs.end())
      pairs.push_back({pair, 1});
    else
      ++known->second;
  }
  int64_t launches = 0;
  for (const auto& pair : pairs) launches += up_to(pair.second, ENTRIES_A_LAUNCH);
  return launches;
}

// In the dtype of the scores, by definition.
double norm_of(const Call& call, const Numbers& norm, int64_t level, bool wide) {
  if (!call.joint) return norm.get(level);
  double sum = 0;
  for (size_t l = 0; l < call.levels.size(); ++l) sum = wide ? sum + norm.get(l) : float(sum) + float(norm.get(l));
  return sum;
}

// The gradients of an entry; its value, and that value's bound.
std::pair<Real, Real> check_entry(const std::string& name, const Call& call, Data& d, size_t i, const Numbers& scores,
                                  const Numbers& norm, Real upstream) {
  const Entry& entry = d.entries[i];
  const TermSpec& term = call.terms[entry.term];
  const Real u = roundoff(d.dtype);
  Real value = 0, scale = 0;
  for (int64_t n = 0; n < entry.n; ++n)
    for (int64_t p = 0; p < entry.positions(); ++p) {
      const bool wide = d.score_dtype == DType::f64;
      const double S = scores.get(entry.first + n * entry.positions() + p), M = norm_of(call, norm, entry.level, wide);
      const Real denominator = wide ? M + entry.eps : float(M) + float(entry.eps);
      const Real quotient = wide ? S / double(denominator) : float(S) / float(denominator);
      const Real share = denominator == 0 ? 0 : quotient * entry.scale;
      const std::vector<Truth> of_channels = truths(term, entry, d, i, n, p);
      for (int64_t c = 0; c < entry.c; ++c) {
        const Truth& t = of_channels[c];
        value += share * t.value;
        scale += std::fabs(share) * t.value_scale;
        if (!term.want_grad) continue;
        const Real coefficient = upstream * share, want = coefficient * t.slope;
        const Real bound = u * std::fabs(coefficient) * (POINTWISE * t.slope_scale + COEFFICIENT * std::fabs(t.slope)) +
                           (takes_logits(term.loss) ? 1e-18L * std::fabs(coefficient) : 0);
        const DType dtype = entry.student.dtype;
        near(d.grads[i].get(n, c, p), want, bound, name + " grad", ulp(std::fabs(want) + bound, dtype) / 2);
      }
    }
  expect(d.students[i].is_as_remembered() && d.teachers[i].is_as_remembered(), name + " writes its input", i, i, 0);
  const bool kept = term.want_grad ? d.grads[i].gaps_are_kept() : d.grads[i].is_as_remembered();
  expect(kept, name + " writes beside", i, i, 0);
  return {value, u * (POINTWISE + COEFFICIENT + SUM) * scale};
}

void run(const std::string& name, const Call& call) {
  Data d = make(call);
  const auto levels = static_cast<int64_t>(d.levels.size()), terms = static_cast<int64_t>(d.terms.size());
  const auto count = static_cast<int64_t>(d.entries.size());
  Numbers scores(d.positions, d.score_dtype), norm(levels, d.score_dtype);
  Numbers total(1, d.dtype), values(terms + count, d.dtype);
  const Score first{d.levels.data(), levels, d.score_dtype, scores.data(), norm.data()};
  const Imitate then{d.entries.data(),
                     count,
                     d.terms.data(),
                     terms,
                     d.dtype,
                     d.score_dtype,
                     scores.data(),
                     norm.data(),
                     call.joint ? levels : 0,
                     call.want_loss ? total.data() : nullptr,
                     call.want_loss ? values.data() : nullptr};
  host::launches = 0;
  int64_t launches = launches_of(call);
  if (call.f64_scores) {
    for (int64_t i = 0; i < d.positions; ++i) scores.set(i, std::fabs(normal(0, 1)));
    for (int64_t l = 0; l < levels; ++l) norm.set(l, l == call.no_mass ? 0.0 : 1 + std::fabs(normal(0, 5)));
  } else if (call.together) {
    auto workspace = garbage(distill_workspace(first, then));
    distill(first, then, workspace.get(), nullptr);
    launches += up_to(levels, LEVELS_A_LAUNCH);
  } else {
    auto workspace = garbage(score_workspace(first));
    score(first, workspace.get(), nullptr);
    launches += up_to(levels, LEVELS_A_LAUNCH);
  }
  if (call.f64_scores || !call.together) {
    auto workspace = garbage(imitate_workspace(then));
    imitate(then, workspace.get(), nullptr);
  }
  if (call.want_loss && terms <= TERMS_A_LAUNCH)
    expect(host::launches == launches, name + " launches", host::launches, launches, 0);
  if (!call.f64_scores) check_scores(name, call, d, scores, norm);

  std::vector<Real> sums(terms), bounds(terms), upstream;
  for (const Term& term : d.terms)
    upstream.push_back(term.weight * (term.factor ? read(term.factor, term.factor_dtype) : 1));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = d.entries[i].term;
    const auto [value, bound] = check_entry(name, call, d, i, scores, norm, upstream[t]);
    sums[t] += value, bounds[t] += bound;
    if (!call.want_loss) continue;
    near(values.get(terms + i), value, bound, name + " value of an entry");
    const bool hides = d.entries[i].level == call.nan_level && !std::isnan(values.get(terms + i));
    expect(!hides, name + " hides a NaN", values.get(terms + i), NAN, 0);
  }
  if (!call.want_loss) return;
  const Real u = roundoff(d.dtype);
  Real sum = 0, sum_bound = 0;
  for (int64_t t = 0; t < terms; ++t) {
    near(values.get(t), sums[t], bounds[t] + u * std::fabs(sums[t]), name + " value of a term");
    sum += upstream[t] * sums[t];
    sum_bound += std::fabs(upstream[t]) * (bounds[t] + 2 * u * std::fabs(sums[t]));
  }
  near(total.get(0), sum, sum_bound, name + " total");
}

void run_scale(const std::string& name, const std::vector<int64_t>& sizes, const std::vector<DType>& dtypes,
               double factor, DType factor_dtype) {
  std::vector<Run> runs;
  std::vector<std::unique_ptr<char[]>> memory;
  std::vector<std::vector<double>> before;
  auto number = garbage(bytes(factor_dtype));
  write(number.get(), factor_dtype, factor);
  for (size_t i = 0; i < sizes.size(); ++i) {
    const DType d = dtypes[i % dtypes.size()];
    const int lead = static_cast<int>(i % 3);  // in elements: every alignment but a multiple of 16 as well
    memory.push_back(garbage((lead + sizes[i]) * bytes(d)));
    char* data = memory.back().get() + lead * bytes(d);
    before.emplace_back();
    for (int64_t k = 0; k < sizes[i]; ++k) {
      write(data + k * bytes(d), d, normal(0, 2));
      before.back().push_back(read(data + k * bytes(d), d));
    }
    runs.push_back({data, sizes[i], d});
#if defined(__SANITIZE_ADDRESS__)
    if (factor == 1) ASAN_POISON_MEMORY_REGION(data, sizes[i] * bytes(d));  // not even read
#endif
  }
  scale({runs.data(), static_cast<int64_t>(runs.size()), number.get(), factor_dtype}, nullptr);
  const double exact = read(number.get(), factor_dtype);
  for (size_t i = 0; i < runs.size(); ++i) {
    const DType d = runs[i].dtype;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(runs[i].data, sizes[i] * bytes(d));
#endif
    for (int64_t k = 0; k < sizes[i]; ++k) {
      const Real want = Real(before[i][k]) * exact;
      const Real bound = factor == 1 ? 0 : std::fabs(want) * 2 * roundoff(d == DType::f64 ? d : DType::f32);
      near(read(static_cast<char*>(runs[i].data) + k * bytes(d), d), want, bound, name,
           factor == 1 ? 0 : ulp(want, d) / 2);
    }
  }
}

}  // namespace
