// Runs moments and moments_backward and compares what they give with loops written from the formulas, in long double:
//
//     pkd   u = (s - mean s) / (std s + eps) of a channel, v: as u, of t;  value = mean (u - v)^2 / 2
//     cwd   p = softmax(s / tau) of a channel of an image, q: as p, of t;  value = tau^2 mean of sum q (log q - log p)
#pragma once

#include <map>

#include "cuda_runtime.h"
#include "tensors.h"

namespace {

struct RowSpec {
  Shape shape;
  DType student, teacher;
  Layout student_layout, teacher_layout;
  double scale = 1, far = 0, spread = 1, apart = 0;  // far: what is added to all numbers; apart: to the teacher's
};

struct RowCall {
  RowLoss loss;
  std::vector<RowSpec> levels;
  double weight = 0.75, factor = 3, temperature = 1, eps = 1e-6;
  bool has_factor = true;
  DType factor_dtype = DType::f32;
  int nan_level = -1, flat_level = -1;  // flat: one number all over the first channel,
  double ripple = 0;                    // or every second one this much above it
};

// Rounding errors of a sum of some tens of numbers in float, each after a few operations.
constexpr Real OF_SUM = 24;

// The truth's own rounding: where the teacher's channel is flat, pkd's slope is 1e-6 of the terms that it is left of.
constexpr Real OF_TRUTH = std::numeric_limits<Real>::epsilon();

constexpr Real SUBNORMAL = std::numeric_limits<float>::denorm_min();

// A row's numbers as the truth and its bounds need them.
struct Side {
  std::vector<Real> at;
  Real mean = 0, square = 0, moved = 0, most = -std::numeric_limits<Real>::infinity(), least = -most, total = 0;

  // moved: the sum of squares about whichever of the numbers is the pivot
  void finish(Real temperature) {
    const Real n = at.size();
    for (Real v : at) mean += v, most = v > most || v != v ? v : most, least = v < least ? v : least;
    mean /= n;
    const Real apart = std::max(most - mean, mean - least);
    for (Real v : at) square += (v - mean) * (v - mean), moved += std::pow(std::fabs(v - mean) + apart, 2);
    for (Real v : at) total += std::exp((v - most) / temperature);
  }
  Real log_share(size_t i, Real temperature) const { return (at[i] - most) / temperature - std::log(total); }
};

struct RowTruth {
  Real value = 0, bound = 0;
  std::vector<Real> slope, slope_bound;
};

RowTruth truth_of_pkd(const Side& s, const Side& t, const RowCall& call, Real share, Real u) {
  const Real n = s.at.size();
  RowTruth truth;
  truth.slope.resize(s.at.size()), truth.slope_bound.resize(s.at.size());
  if (n < 2) return truth.value = n ? (s.at[0] - s.at[0]) + (t.at[0] - t.at[0]) : 0, truth;
  const Real sigma = std::sqrt(s.square / (n - 1)), rho = std::sqrt(t.square / (n - 1)), eps = call.eps;
  const Real p = sigma + eps == 0 ? 0 : 1 / (sigma + eps), q = rho + eps == 0 ? 0 : 1 / (rho + eps);
  const auto apart = [&](size_t i) { return p * (s.at[i] - s.mean) - q * (t.at[i] - t.mean); };
  Real sum = 0, along = 0;
  for (size_t i = 0; i < s.at.size(); ++i) {
    const Real w = apart(i);
    sum += w, along += w * (s.at[i] - s.mean), truth.value += share / 2 * w * w;
  }
  truth.bound = OF_SUM * u * std::fabs(share) / 2 * std::pow(p * std::sqrt(s.moved) + q * std::sqrt(t.moved), 2);
  const Real pull = sigma == 0 ? 0 : p * p / ((n - 1) * sigma);
  const Real loose = OF_SUM * u * std::max(s.square ? s.moved / s.square : 1, t.square ? t.moved / t.square : 1);
  const Real most = std::fabs(share), b = most * p * q;
  const Real a =
      most * p * (eps * p * p + p * q * (sigma == 0 ? 0 : std::sqrt(s.square * t.square) / ((n - 1) * sigma)));
  for (size_t i = 0; i < s.at.size(); ++i) {
    const Real by_s = std::fabs(s.at[i] - s.mean), by_t = std::fabs(t.at[i] - t.mean);
    truth.slope[i] = share * (p * (apart(i) - sum / n) - pull * along * (s.at[i] - s.mean));
    truth.slope_bound[i] = 3 * loose * (a * by_s + b * by_t) +
                           loose * (a * std::sqrt(s.square / n) + b * std::sqrt(t.square / n)) +
                           4 * OF_TRUTH * most * p * (p * by_s + q * by_t);
  }
  return truth;
}

RowTruth truth_of_cwd(const Side& s, const Side& t, const RowCall& call, Real share, Real u) {
  const Real tau = call.temperature;
  RowTruth truth;
  truth.slope.resize(s.at.size()), truth.slope_bound.resize(s.at.size());
  Real kl = 0, scale = 0;
  for (size_t i = 0; i < s.at.size(); ++i) {
    const Real log_p = s.log_share(i, tau), log_q = t.log_share(i, tau), p = std::exp(log_p), q = std::exp(log_q);
    kl += q * (log_q - log_p), scale += q * (std::fabs(log_q) + std::fabs(log_p));
    truth.slope[i] = share * tau * (p - q);
    const auto roundings = [&](const Side& of) { return OF_SUM + 2 * (of.most - of.at[i]) / tau; };
    truth.slope_bound[i] = u * std::fabs(share) * tau * (p * roundings(s) + q * roundings(t)) + 3 * SUBNORMAL;
  }
  truth.value = share * tau * tau * kl;
  truth.bound = OF_SUM * u * std::fabs(share) * tau * tau * (1 + scale);
  return truth;
}

struct RowData {
  std::vector<Tensor> students, teachers, grads;
  std::vector<Level> levels;
  std::vector<double> scale;
  DType dtype = DType::f32;
  int64_t rows = 0;
};

RowData make(const RowCall& call) {
  RowData d;
  for (const RowSpec& spec : call.levels) {
    const int l = static_cast<int>(d.levels.size());
    const Shape& shape = spec.shape;
    const Layout layout = spec.student_layout;
    Tensor& s = d.students.emplace_back(shape, spec.student, layout);
    Tensor& t = d.teachers.emplace_back(shape, spec.teacher, spec.teacher_layout);
    Tensor& g = d.grads.emplace_back(shape, spec.student, is_last(layout) && layout < LAYOUTS ? channels_last : layout);
    s.fill(spec.far - 0.5, 2 * spec.spread), t.fill(spec.far + spec.apart + 1, 1.5 * spec.spread);
    for (int64_t i = 0; l == call.flat_level && i < shape.n * shape.positions(); ++i)
      s.set(i / shape.positions(), 0, i % shape.positions(), (call.ripple ? 0 : 0.5) + i % 2 * call.ripple);
    if (l == call.nan_level) s.set(shape.n - 1, shape.c / 2, shape.positions() / 2, NAN), t.set(0, 0, 0, NAN);
    s.remember(), t.remember(), g.remember();
    d.levels.push_back({shape.n, shape.c, shape.h, shape.w, d.rows, is_last(layout), s.view, t.view, g.view});
    d.scale.push_back(spec.scale);
    d.rows += (call.loss == RowLoss::cwd ? shape.n : 1) * shape.c;
    if (spec.student == DType::f64 || spec.teacher == DType::f64) d.dtype = DType::f64;
  }
  return d;
}

// Of a level: checks the gradients; the value and its bound.
std::pair<Real, Real> check_level(const std::string& name, const RowCall& call, RowData& d, size_t l, Real upstream) {
  const bool per_image = call.loss == RowLoss::cwd;
  const Shape& shape = call.levels[l].shape;
  const int64_t sets = per_image ? shape.n : 1, images = per_image ? 1 : shape.n, positions = shape.positions();
  const Real u = roundoff(d.dtype);
  Tensor &student = d.students[l], &teacher = d.teachers[l], &grad = d.grads[l];
  Real value = 0, bound = 0;
  for (int64_t set = 0; set < sets; ++set)
    for (int64_t c = 0; c < shape.c; ++c) {
      Side s, t;
      for (int64_t i = 0; i < images * positions; ++i) {
        s.at.push_back(student.get(set + i / positions, c, i % positions));
        t.at.push_back(teacher.get(set + i / positions, c, i % positions));
      }
      s.finish(call.temperature), t.finish(call.temperature);
      const Real share = call.levels[l].scale / (Real(sets * shape.c) * (per_image ? 1 : s.at.size()));
      const RowTruth truth = per_image ? truth_of_cwd(s, t, call, share, u) : truth_of_pkd(s, t, call, share, u);
      if (!s.at.empty()) value += truth.value, bound += truth.bound;
      for (int64_t i = 0; i < images * positions; ++i) {
        const Real want = upstream * truth.slope[i];
        const Real most = std::fabs(upstream) * truth.slope_bound[i] + 4 * u * std::fabs(want);
        near(grad.get(set + i / positions, c, i % positions), want, most, name + " gradient",
             ulp(std::fabs(want) + most, student.view.dtype) / 2);
      }
    }
  expect(student.is_as_remembered() && teacher.is_as_remembered(), name + " writes its input", l, l, 0);
  expect(grad.gaps_are_kept(), name + " writes beside", l, l, 0);
  return {value, bound + 4 * u * std::fabs(value)};
}

void run(const std::string& what, const RowCall& call) {
  const std::string name = std::string(call.loss == RowLoss::cwd ? "cwd " : "pkd ") + what;
  RowData d = make(call);
  const auto count = static_cast<int64_t>(d.levels.size());
  Numbers total(1, d.dtype), values(1 + count, d.dtype), rows(NUMBERS * d.rows, d.dtype);
  auto factor = garbage(bytes(call.factor_dtype));
  write(factor.get(), call.factor_dtype, call.factor);
  const void* const given = call.has_factor ? factor.get() : nullptr;
  const Moments first{d.levels.data(),  count,         call.loss,  d.scale.data(),    call.weight,
                      call.temperature, call.eps,      given,      call.factor_dtype, d.dtype,
                      total.data(),     values.data(), rows.data()};
  std::map<std::pair<DType, DType>, int64_t> pairs;
  for (const RowSpec& spec : call.levels) ++pairs[{spec.student, spec.teacher}];
  int64_t launches = 0;
  for (const auto& [_, levels] : pairs) launches += (levels + 15) / 16;
  host::launches = 0;
  {
    auto workspace = garbage(moments_workspace(first));
    moments(first, workspace.get(), nullptr);
  }
  expect(host::launches == launches, name + " launches", host::launches, launches, 0);
  moments_backward({d.levels.data(), count, call.loss, call.weight, call.temperature, given, call.factor_dtype, d.dtype,
                    rows.data()},
                   nullptr);
  const Real upstream = call.weight * (given ? read(given, call.factor_dtype) : 1);
  Real sum = 0, sum_bound = 0;
  for (int64_t l = 0; l < count; ++l) {
    const auto [value, bound] = check_level(name, call, d, l, upstream);
    near(values.get(1 + l), value, bound, name + " value of a level");
    sum += value, sum_bound += bound;
  }
  near(values.get(0), sum, sum_bound, name + " value");
  near(total.get(0), upstream * sum, std::fabs(upstream) * sum_bound * 1.01L, name + " total");
}

}  // namespace
