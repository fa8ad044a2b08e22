// Runs score, imitate and scale_ of csrc/cuda on the host and compares them with loops written from the formulas:
//
//     S = max_k sigmoid(z)     bce = softplus(x) - x sigmoid(z)     kl = bce(x, z) - bce(z, z)     mse = (x - z)^2
//
// in long double. Every tensor has a heap block of exactly its size, so that the address sanitizer sees a byte too
// many.
//
//     driver SEED             all cases
//     driver SEED one         one small case of every verb, for the tests that plant a fault
//     driver SEED far         images and channels more than 2^31 numbers apart; 77 if there are no such addresses
#include <unistd.h>

#include <limits>

#include "cuda_runtime.h"
#include "tensors.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace {

struct LevelSpec {
  Shape shape;
  DType student, teacher;
  Layout student_layout, teacher_layout;
};

struct Options {
  Loss loss = Loss::mse;
  bool want_loss = true, want_grad = true, null_factor = false, f64_scores = false;
  DType factor_dtype = DType::f32;
  double weight = 0.75, factor = 3, temperature = 1;
  int zero_norm = -1, nan_level = -1;
};

Real sigmoid(Real v) { return v >= 0 ? 1 / (1 + std::exp(-v)) : std::exp(v) / (1 + std::exp(v)); }
Real softplus(Real v) { return std::max(v, Real(0)) + std::log1p(std::exp(-std::fabs(v))); }

// Value and slope, and what their rounding errors are relative to: sums of the terms that the kernels add or subtract.
struct Truth {
  Real value, slope, value_scale, slope_scale;
};

Truth truth(Loss loss, Real x, Real z, Real temperature) {
  if (loss == Loss::mse) return {(x - z) * (x - z), 2 * (x - z), (x - z) * (x - z), 2 * std::fabs(x - z)};
  x /= temperature, z /= temperature;
  const Real q = sigmoid(z), bce = softplus(x) - x * q, entropy = softplus(z) - z * q;
  const Real tail_x = sigmoid(-std::fabs(x)), tail_z = sigmoid(-std::fabs(z));
  const Real miss = (x >= 0) == (z >= 0) ? tail_z : 1 - tail_z;
  Truth t{loss == Loss::kl ? bce - entropy : bce, sigmoid(x) - q, bce, tail_x + miss};
  if (loss == Loss::kl) t.value_scale += entropy;
  if (temperature != 1) {  // x / temperature is rounded
    t.value_scale += std::fabs(x * t.slope) + (std::fabs(x) + std::fabs(x - z)) * std::fabs(z) * q * (1 - q);
    t.slope_scale += std::fabs(x) * tail_x + std::fabs(z) * tail_z;
  }
  // what long double loses in softplus(x) - x q, counted as roundings of 12 fp64 units
  t.value_scale += (std::fabs(x) + std::fabs(z)) * 1e-4L;
  const Real square = temperature * temperature;
  return {t.value * square, t.slope * temperature, t.value_scale * square, t.slope_scale * temperature};
}

// exp, a reciprocal and eight roundings: 12; the share, the weight and their products 4; a sum of 32 terms a thread 8.
constexpr Real POINTWISE = 12, COEFFICIENT = 4, SUM = 8;

void check_score(std::vector<Level>& levels, std::vector<Tensor>& teachers, const std::string& name, Numbers& scores,
                 DType dtype, int nan_level) {
  const int64_t count = static_cast<int64_t>(levels.size());
  Numbers mass(count, dtype);
  const Score call{levels.data(), count, dtype, scores.data(), mass.data()};
  auto workspace = garbage(score_workspace(call));
  host::launches = 0;
  score(call, workspace.get(), nullptr);
  expect(host::launches == (count + 15) / 16, name + " launches", host::launches, count, 0);
  for (int64_t l = 0; l < count; ++l) {
    Real sum = 0;
    const Tensor& z = teachers[l];
    for (int64_t n = 0; n < levels[l].n; ++n)
      for (int64_t p = 0; p < levels[l].positions(); ++p) {
        Real best = -std::numeric_limits<Real>::infinity();
        for (int64_t k = 0; k < levels[l].c; ++k) {
          const Real s = sigmoid(z.get(n, k, p));
          if (!(s <= best)) best = s;
          if (std::isnan(best)) break;
        }
        const double got = scores.get(levels[l].first + n * levels[l].positions() + p);
        near(got, best, 4 * roundoff(dtype) * best, name + " score");
        sum += got;
      }
    near(mass.get(l), sum, (dtype == DType::f64 ? 8 : 2) * roundoff(dtype) * sum, name + " mass");
    expect(l != nan_level || std::isnan(mass.get(l)), name + " hides a NaN", mass.get(l), NAN, 0);
  }
}

void run(const std::string& name, const std::vector<LevelSpec>& specs, const Options& o) {
  const int64_t count = static_cast<int64_t>(specs.size());
  std::vector<Tensor> students, teachers, grads;
  std::vector<Level> levels;
  bool f64 = false, f64_teacher = false;
  int64_t first = 0;
  for (int64_t l = 0; l < count; ++l) {
    const LevelSpec& s = specs[l];
    students.emplace_back(s.shape, s.student, s.student_layout).fill(-0.5, 3);
    teachers.emplace_back(s.shape, s.teacher, s.teacher_layout).fill(-1, 3);
    const bool dense =
        s.student_layout == transposed || s.student_layout == channels_last || s.student_layout >= LAYOUTS;
    // torch.empty_like: the student's strides if it is dense; a gap in one case of three all the same
    grads.emplace_back(s.shape, s.student,
                       dense || pick(0, 2) == 0    ? s.student_layout
                       : is_last(s.student_layout) ? channels_last
                                                   : contiguous);
    if (l == o.nan_level) {
      students[l].set(s.shape.n - 1, s.shape.c / 2, 0, NAN);
      teachers[l].set(0, s.shape.c - 1, s.shape.positions() - 1, NAN);
    }
    levels.push_back({s.shape.n, s.shape.c, s.shape.h, s.shape.w, first, is_last(s.student_layout), students[l].view,
                      teachers[l].view, o.want_grad ? grads[l].view : View{nullptr, 0, 0, 0, 0, 0, s.student}});
    first += s.shape.n * s.shape.positions();
    f64_teacher |= s.teacher == DType::f64;
    f64 |= s.student == DType::f64;
    students[l].remember(), teachers[l].remember(), grads[l].remember();
  }
  f64 |= f64_teacher;
  const DType dtype = f64 ? DType::f64 : DType::f32;
  const DType score_dtype = f64_teacher || o.f64_scores ? DType::f64 : DType::f32;

  Numbers scores(first, score_dtype);
  if (o.f64_scores && !f64_teacher) {
    for (int64_t i = 0; i < first; ++i) scores.set(i, std::fabs(normal(0, 1)));
  } else {
    std::vector<Level> own = levels;
    for (int64_t l = 0; l < count; ++l) own[l].interleaved = is_last(specs[l].teacher_layout);
    check_score(own, teachers, name, scores, score_dtype, o.nan_level);
  }
  Numbers norm(count, score_dtype), total(1, dtype), per_level(count, dtype);
  for (int64_t l = 0; l < count; ++l) norm.set(l, l == o.zero_norm ? 0.0 : 1 + std::fabs(normal(0, 5)));
  auto factor = garbage(bytes(o.factor_dtype));
  write(factor.get(), o.factor_dtype, o.factor);

  const Imitate call{levels.data(),
                     count,
                     dtype,
                     score_dtype,
                     scores.data(),
                     norm.data(),
                     o.null_factor ? nullptr : factor.get(),
                     o.factor_dtype,
                     o.weight,
                     o.temperature,
                     o.loss,
                     o.want_grad,
                     o.want_loss ? total.data() : nullptr,
                     o.want_loss ? per_level.data() : nullptr};
  auto workspace = garbage(imitate_workspace(call));
  host::launches = 0;
  imitate(call, workspace.get(), nullptr);
  if (o.want_loss) expect(host::launches == (count + 15) / 16, name + " launches", host::launches, count, 0);

  const Real u = roundoff(dtype), upstream = o.weight * (o.null_factor ? 1 : read(factor.get(), o.factor_dtype));
  Real sum = 0, sum_bound = 0;
  for (int64_t l = 0; l < count; ++l) {
    const Level& level = levels[l];
    Real loss = 0, scale = 0;
    for (int64_t n = 0; n < level.n; ++n)
      for (int64_t p = 0; p < level.positions(); ++p) {
        const double S = scores.get(level.first + n * level.positions() + p);
        // in the dtype of the scores, by definition
        const Real quotient = score_dtype == DType::f64 ? S / norm.get(l) : float(S) / float(norm.get(l));
        const Real share = l == o.zero_norm ? 0 : quotient;
        for (int64_t c = 0; c < level.c; ++c) {
          const Truth t = truth(o.loss, students[l].get(n, c, p), teachers[l].get(n, c, p), o.temperature);
          loss += share * t.value;
          scale += share * t.value_scale;
          if (!o.want_grad) continue;
          const Real coefficient = upstream * share, want = coefficient * t.slope;
          const Real bound =
              u * std::fabs(coefficient) * (POINTWISE * t.slope_scale + COEFFICIENT * std::fabs(t.slope)) +
              (o.loss == Loss::mse ? 0 : 1e-18L * std::fabs(coefficient));
          near(grads[l].get(n, c, p), want, bound, name + " grad", ulp(std::fabs(want) + bound, specs[l].student) / 2);
        }
      }
    if (o.want_loss) {
      const Real bound = u * (POINTWISE + COEFFICIENT + SUM) * scale;
      near(per_level.get(l), loss, bound, name + " per level");
      expect(l != o.nan_level || std::isnan(per_level.get(l)), name + " hides a NaN", per_level.get(l), NAN, 0);
      sum += loss, sum_bound += bound;
    }
    expect(students[l].is_as_remembered() && teachers[l].is_as_remembered(), name + " writes its input", l, l, 0);
    expect(o.want_grad ? grads[l].gaps_are_kept() : grads[l].is_as_remembered(), name + " writes beside", l, l, 0);
  }
  if (o.want_loss) near(total.get(0), upstream * sum, std::fabs(upstream) * (sum_bound + 2 * u * sum), name + " total");
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

Options options(int i) {  // every loss, output and temperature in turn
  Options o;
  o.loss = static_cast<Loss>(i % 3);
  o.want_loss = i % 5 != 3;
  o.want_grad = i % 7 != 4;
  o.temperature = i % 4 == 2 ? 2.5 : 1;
  o.null_factor = i % 6 == 5;
  o.factor_dtype = DTYPES[i % 4];
  return o;
}

void all_cases() {
  const int CHANNELS[] = {5, 24, 1, 80, 3, 17};
  int i = 0;
  auto pyramid = [&](DType s, DType t, Layout sl, Layout tl, int64_t c) {
    return std::vector<LevelSpec>{
        {{2, c, 4, 8}, s, t, sl, tl}, {{1, c, 5, 7}, s, t, sl, tl}, {{2, c, 1, 1}, s, t, sl, tl}};
  };
  for (DType s : DTYPES)
    for (DType t : DTYPES)
      for (Layout l : {contiguous, channels_last}) {
        const std::string name = std::string(NAMES[int(s)]) + " from " + NAMES[int(t)] + " " + LAYOUT_NAMES[l];
        run(name, pyramid(s, t, l, l, CHANNELS[i % 6]), options(i));
        ++i;
      }
  for (DType d : DTYPES)  // every loss, with and without it, where the wide walk runs
    for (int loss = 0; loss < 3; ++loss)
      for (bool want_loss : {true, false}) {
        Options o;
        o.loss = static_cast<Loss>(loss), o.want_loss = want_loss;
        const Layout l = want_loss ? contiguous : channels_last;
        run(std::string(NAMES[int(d)]) + " wide", {{{2, 16, 8, 8}, d, d, l, l}}, o);
      }
  for (int l = 0; l < LAYOUTS; ++l)
    for (DType d : {DType::f32, DType::bf16}) {
      const auto layout = static_cast<Layout>(l);
      run(std::string(NAMES[int(d)]) + " " + LAYOUT_NAMES[l], pyramid(d, d, layout, layout, CHANNELS[i % 6]),
          options(i));
      ++i;
    }
  for (int k = 0; k < 16; ++k, ++i) {  // any mix of layouts and dtypes over the levels
    std::vector<LevelSpec> specs;
    for (int l = pick(1, 4); l > 0; --l)
      specs.push_back({{pick(0, 4) ? pick(1, 2) : 0, CHANNELS[k % 6], pick(1, 7), pick(1, 9)},
                       DTYPES[pick(0, 3)],
                       DTYPES[pick(0, 3)],
                       static_cast<Layout>(pick(0, LAYOUTS - 1)),
                       static_cast<Layout>(pick(0, LAYOUTS - 1))});
    run("mixed levels", specs, options(i));
  }
  for (DType d : DTYPES) {
    const auto l = d == DType::f16 ? channels_last : contiguous;
    run("empty levels", {{{0, 8, 4, 4}, d, d, l, l}, {{1, 8, 4, 4}, d, d, l, l}, {{2, 8, 0, 4}, d, d, l, l}},
        options(i++));
    run("only empty levels", {{{0, 8, 4, 4}, d, d, l, l}, {{2, 8, 4, 0}, d, d, l, l}}, Options{});
    Options o = options(i++);
    o.want_loss = o.want_grad = true;
    o.zero_norm = 1;
    run("zero norm", pyramid(d, d, l, l, 8), o);
    o.zero_norm = -1, o.nan_level = 1;
    run("NaN", pyramid(d, d, l, l, 8), o);
    o.nan_level = -1, o.f64_scores = true;
    run("fp64 scores", pyramid(d, d, l, l, 8), o);
    run("19 levels", std::vector<LevelSpec>(19, {{1, 8, 2, 4}, d, d, l, l}), Options{});
  }
  // Several rounds of packets a thread, tiles cut in both directions, and rows that 256 columns do not divide.
  Options o;
  o.loss = Loss::bce;
  run("large", {{{1, 40, 34, 32}, DType::bf16, DType::bf16, contiguous, contiguous}}, o);
  run("large, last", {{{1, 720, 5, 7}, DType::f16, DType::f16, channels_last, channels_last}}, o);
  run("large, odd", {{{1, 61, 27, 23}, DType::f32, DType::bf16, contiguous, contiguous}}, o);
  run("long rows", {{{1, 5000, 1, 3}, DType::f32, DType::f32, channels_last, channels_last}}, Options{});
  run("few channels", {{{1, 3, 40, 32}, DType::f32, DType::f32, contiguous, contiguous}}, Options{});
  run("few channels, last", {{{1, 3, 37, 29}, DType::f16, DType::f16, channels_last, channels_last}}, Options{});

  const std::vector<DType> every(DTYPES, DTYPES + 4);
  for (DType d : DTYPES) run_scale("scale", {0, 1, 7, 8, 9, 100, 333, 2, 64}, {d}, -1.37, d);
  run_scale("scale, mixed", {5, 16, 77, 1, 130, 40}, every, 16, DType::f16);
  run_scale("scale by 1", {5, 16, 77, 1, 130, 40}, every, 1, DType::f32);
  run_scale("scale, 70 runs", std::vector<int64_t>(70, 9), every, 0.3, DType::f64);
  run_scale("scale, several rounds", {40000}, {DType::bf16}, 0.3, DType::f32);
  run_scale("scale, none", {0, 0}, {DType::bf16}, 0.3, DType::f32);
}

void one_case() {
  const LevelSpec level{{2, 8, 5, 7}, DType::f32, DType::f32, contiguous, contiguous};
  const LevelSpec wide{{2, 16, 4, 8}, DType::f32, DType::f32, contiguous, contiguous};
  const LevelSpec last{{1, 16, 4, 4}, DType::f32, DType::f32, channels_last, channels_last};
  Options o;
  run("one", {level, wide, last}, o);
  o.zero_norm = 1;
  run("one", {last, wide}, o);
  o.zero_norm = -1, o.nan_level = 0;
  run("one", {level}, o);
  for (double factor : {0.3, 1.0}) run_scale("one", {333, 64}, {DType::f32}, factor, DType::f32);
}

void far_cases() {
  for (DType d : {DType::f32, DType::f16})
    for (Layout l : {far_images, far_channels})
      for (Loss loss : {Loss::mse, Loss::bce}) {
        Options o;
        o.loss = loss;
        run(LAYOUT_NAMES[l], {{{2, 16, 4, 8}, d, d, l, l}, {{2, 3, 5, 7}, d, d, l, l}}, o);
      }
  run("far, mixed", {{{2, 3, 4, 8}, DType::f32, DType::bf16, far_images, far_channels}}, Options{});
  run("far, any", {{{2, 3, 4, 8}, DType::bf16, DType::f32, far_images, far_channels}}, Options{});
}

}  // namespace

int main(int argc, char** argv) {
  alarm(280);  // a barrier that not all threads reach waits for ever
  rng.seed(argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0);
  const std::string cases = argc > 2 ? argv[2] : "all";
  if (cases == "one")
    one_case();
  else if (cases == "far")
    far_cases();
  else
    all_cases();
  std::printf("%d checks, %d failures, largest error %.2Lf of its bound\n", checks, failures, worst);
  return failures ? 1 : 0;
}
