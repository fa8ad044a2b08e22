// Runs the verbs of csrc/cuda on the host: which cases; checks.h says what they must give. Every tensor has a heap
// block of exactly its size, so that the address sanitizer sees a byte too many.
//
//     driver SEED             all cases
//     driver SEED one         a few small cases that reach every walk and every branch of the sums, for planted faults
//     driver SEED random N    N random calls, each with a seed of its own: the next after the one before
//     driver SEED far         images and channels more than 2^31 numbers apart; 77 if there are no such addresses
#include <unistd.h>

#include "checks.h"
#include "row_checks.h"

namespace {

constexpr DType f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16, f16 = DType::f16;
constexpr Loss FEATURES[] = {Loss::mse, Loss::l1, Loss::smooth_l1},
               LOGITS[] = {Loss::bce, Loss::kl, Loss::qfl, Loss::qfl_detached};
constexpr int64_t CHANNELS[] = {5, 24, 1, 80, 3, 17};
const std::vector<Shape> SMALL = {{2, 7, 4, 8}, {1, 7, 5, 7}, {2, 7, 1, 1}};

// A term of logits and one of features: every loss, output, temperature and beta in turn.
std::vector<TermSpec> terms(int i) {
  const double betas[] = {1, 0, 0.75, 8}, exponents[] = {1, 2, 1.5, 0, 3};
  TermSpec logits{LOGITS[(i + i / 4) % 4]}, features{FEATURES[i % 3]};
  logits.temperature = i % 4 == 2 ? 2.5 : 1;
  logits.weight = 0.5, features.weight = -1.25;
  logits.has_factor = i % 6 != 5, features.has_factor = i % 5 == 2;
  logits.factor_dtype = DTYPES[i % 4], features.factor_dtype = DTYPES[(i + 1) % 4];
  logits.want_grad = i % 7 != 4, features.want_grad = i % 9 != 5;
  features.beta = betas[i % 4];
  logits.beta = exponents[i % 5];
  return {logits, features};
}

// Every level's entries of both terms: the logits have the level's classes, the features c channels.
Call pyramid(int i, std::vector<Shape> levels, int64_t c, DType s, DType t, Layout sl, Layout tl) {
  Call call;
  call.terms = terms(i);
  call.want_loss = i % 5 != 3 || !(call.terms[0].want_grad || call.terms[1].want_grad);
  call.together = i % 3 > 0;
  call.joint = i % 4 == 1;
  call.logits = t, call.logits_layout = tl;
  for (int term = 0; term < 2; ++term)
    for (int l = 0; l < static_cast<int>(levels.size()); ++l)
      call.entries.push_back({l, term, term ? c : levels[l].c, s, t, sl, tl});
  call.levels = std::move(levels);
  return call;
}

// One term alone.
Call plain(Loss loss, std::vector<Shape> levels, DType d, Layout layout) {
  Call call;
  call.terms = {{loss}};
  call.logits = d, call.logits_layout = layout;
  for (int l = 0; l < static_cast<int>(levels.size()); ++l)
    call.entries.push_back({l, 0, levels[l].c, d, d, layout, layout});
  call.levels = std::move(levels);
  return call;
}

void dtypes_and_layouts(int& i) {
  for (DType s : DTYPES)
    for (DType t : DTYPES)
      for (Layout l : {contiguous, channels_last}) {
        const std::string name = std::string(NAMES[int(s)]) + " from " + NAMES[int(t)] + " " + LAYOUT_NAMES[l];
        run(name, pyramid(i, SMALL, CHANNELS[i % 6], s, t, l, l));
        ++i;
      }
  for (DType d : DTYPES)  // every loss, with and without it, where the wide walks run
    for (Loss loss : {Loss::mse, Loss::l1, Loss::smooth_l1, Loss::bce, Loss::kl, Loss::qfl, Loss::qfl_detached})
      for (bool want_loss : {true, false}) {
        const Layout layouts[] = {contiguous, channel_gap, channels_last, packed_rows};
        Call call = plain(loss, {{2, 16, 8, 8}}, d, layouts[i++ % 4]);
        call.want_loss = want_loss;
        run(std::string(NAMES[int(d)]) + " wide", call);
      }
  for (int l = 0; l < LAYOUTS; ++l)
    for (DType d : {f32, bf16}) {
      const auto layout = static_cast<Layout>(l);
      run(std::string(NAMES[int(d)]) + " " + LAYOUT_NAMES[l], pyramid(i, SMALL, CHANNELS[i % 6], d, d, layout, layout));
      ++i;
    }
}

// Any mix of levels, layouts, dtypes, scales and terms, in any order, also more than a launch takes.
void mixed(int& i) {
  for (int k = 0; k < 20; ++k, ++i) {
    Call call;
    call.terms = terms(i);
    if (k % 4 == 3) call.terms.insert(call.terms.end(), {terms(i + 1)[1], terms(i + 2)[0], terms(i + 3)[1]});
    call.logits = DTYPES[k % 4], call.logits_layout = static_cast<Layout>(pick(0, LAYOUTS - 1));
    for (int l = pick(1, 4); l > 0; --l)
      call.levels.push_back({pick(0, 4) ? pick(1, 2) : 0, CHANNELS[k % 6], pick(1, 7), pick(1, 9)});
    const bool one_pair = k % 2;
    const int most = k % 5 == 4 ? 40 : 8;
    const DType student = DTYPES[pick(0, 3)], teacher = DTYPES[pick(0, 3)];
    const int level_count = static_cast<int>(call.levels.size()), term_count = static_cast<int>(call.terms.size());
    for (int e = std::max({most, level_count, term_count}); e > 0; --e)
      call.entries.push_back({e <= level_count ? e - 1 : pick(0, level_count - 1),
                              e <= term_count ? e - 1 : pick(0, term_count - 1), CHANNELS[pick(0, 5)] % 30,
                              one_pair ? student : DTYPES[pick(0, 3)], one_pair ? teacher : DTYPES[pick(0, 3)],
                              static_cast<Layout>(pick(0, LAYOUTS - 1)), static_cast<Layout>(pick(0, LAYOUTS - 1)),
                              pick(0, 3) ? std::fabs(normal(0, 1)) : 0, pick(0, 1) ? std::fabs(normal(0, 1)) : 0});
    call.joint = pick(0, 2) == 0;
    run("mixed entries", call);
  }
}

// softmax_kl, of groups of several sizes and beside pointwise terms, in every pair of dtypes and every layout.
void softmax() {
  const double groups[] = {3, 17, 0, 1, 12, 34};
  const std::vector<Shape> levels = {{2, 7, 4, 8}, {1, 7, 5, 7}, {2, 7, 1, 1}};
  int i = 0;
  const auto some = [&](DType s, DType t, Layout sl, Layout tl) {
    Call call;
    call.levels = levels, call.logits = t, call.logits_layout = tl;
    call.terms = {{Loss::softmax_kl}, {Loss::mse}, {Loss::softmax_kl}};
    call.terms[0].beta = groups[i % 6], call.terms[2].beta = groups[(i + 1) % 6];
    call.terms[0].temperature = i % 3 ? 2.5 : 1, call.terms[2].weight = -0.5;
    call.terms[2].want_grad = i % 4 != 1, call.terms[0].want_grad = i % 7 != 3;
    call.want_loss = i % 5 != 2, call.together = i % 3 > 0, call.joint = i % 4 == 2;
    for (int term = 0; term < 3; ++term)
      for (int l = 0; l < 3; ++l) call.entries.push_back({l, term, term == 1 ? 5 : 204, s, t, sl, tl, 0.5 + l, 0.25});
    run(std::string(NAMES[int(s)]) + " softmax from " + NAMES[int(t)] + " " + LAYOUT_NAMES[sl], call);
    ++i;
  };
  for (DType s : DTYPES)
    for (DType t : DTYPES)
      for (Layout l : {contiguous, channels_last}) some(s, t, l, l);
  for (int l = 0; l < LAYOUTS; ++l)
    for (DType d : {f32, bf16}) some(d, d, static_cast<Layout>(l), static_cast<Layout>((l + i) % LAYOUTS));
  for (DType d : DTYPES)  // several tiles, and groups of another number than a block takes
    for (double group : {17.0, 5.0, 1.0, 0.0}) {
      Call call = plain(Loss::softmax_kl, {{1, 85, 10, 24}, {2, 85, 3, 9}, {0, 85, 4, 4}}, d, contiguous);
      call.terms[0].beta = group, call.terms[0].temperature = 3;
      run("softmax, large", call);
      call.no_mass = 1, call.nan_level = 0;
      run("softmax, no mass and NaN", call);
    }
}

// As `mixed`, with more of everything.
void random_call() {
  constexpr int64_t WIDTHS[] = {1, 2, 3, 4, 5, 7, 8, 16, 17, 24, 31, 32, 33, 64, 80, 130};
  const auto width = [&] { return WIDTHS[pick(0, static_cast<int>(std::size(WIDTHS)) - 1)]; };
  const auto side = [] { return pick(0, 9) ? pick(1, 13) : 0; };
  const auto layout = [] { return static_cast<Layout>(pick(0, LAYOUTS - 1)); };
  const auto dtype = [] { return DTYPES[pick(0, 3)]; };
  Call call;
  for (int t = pick(1, 3); t > 0; --t)
    for (const TermSpec& term : terms(pick(0, 1259))) call.terms.push_back(term);  // their period
  call.terms.resize(pick(1, static_cast<int>(call.terms.size())), TermSpec{Loss::mse});
  for (int l = pick(0, 3) ? pick(1, 5) : pick(6, 20); l > 0; --l)
    call.levels.push_back({pick(0, 5) ? pick(1, 2) : 0, width(), side(), side()});
  call.logits = dtype(), call.logits_layout = layout();
  const int levels = static_cast<int>(call.levels.size()), terms = static_cast<int>(call.terms.size());
  const bool one_pair = pick(0, 1);
  const DType student = dtype(), teacher = dtype();
  for (int e = std::max({levels, terms, pick(1, 20)}); e > 0; --e)
    call.entries.push_back({e <= levels ? e - 1 : pick(0, levels - 1), e <= terms ? e - 1 : pick(0, terms - 1), width(),
                            one_pair ? student : dtype(), one_pair ? teacher : dtype(), layout(), layout(),
                            pick(0, 3) ? std::fabs(normal(0, 1)) : 0, pick(0, 1) ? std::fabs(normal(0, 1)) : 0});
  call.joint = pick(0, 2) == 0;
  call.together = pick(0, 2) > 0;
  call.f64_scores = pick(0, 7) == 0;
  run("random call", call);
}

void edges(int& i) {
  for (DType d : DTYPES) {
    const auto l = d == f16 ? channels_last : contiguous;
    run("empty levels", pyramid(i, {{0, 8, 4, 4}, {1, 8, 4, 4}, {2, 8, 0, 4}}, 8, d, d, l, l));
    run("only empty levels", pyramid(0, {{0, 8, 4, 4}, {2, 8, 4, 0}}, 4, d, d, l, l));
    Call call = pyramid(10 * i++, SMALL, 8, d, d, l, l);  // want_loss
    call.no_mass = 1;
    run("no mass", call);
    call.joint = true;
    run("no mass, joint", call);
    call.joint = false;
    for (EntrySpec& e : call.entries) e.eps = 0.25, e.scale = 0.5;
    run("no mass but eps", call);
    call.no_mass = -1, call.nan_level = 1;
    run("NaN", call);
    call.nan_level = -1, call.no_mass = 0, call.f64_scores = true;
    run("fp64 scores", call);
    Call many = pyramid(10, std::vector<Shape>(19, {1, 8, 2, 4}), 8, d, d, l, l);
    run("19 levels", many);
    many.joint = true;
    run("19 levels, joint", many);
  }
  // A term in two pairs of dtypes: its value and the total are sums over launches.
  Call call = pyramid(0, SMALL, 8, bf16, bf16, contiguous, contiguous);
  for (EntrySpec& e : call.entries)
    if (e.level == 1) e.student = f32;
  run("a term in two launches", call);
}

// Several rounds of packets a thread, tiles cut in both directions; rows, runs and columns of every length.
void sizes() {
  for (Loss loss : {Loss::bce, Loss::mse, Loss::smooth_l1}) {
    run("large", plain(loss, {{1, 40, 34, 32}}, bf16, contiguous));
    run("large, lines", plain(loss, {{1, 33, 24, 20}}, f16, channel_gap));
  }
  run("long lines", plain(Loss::mse, {{1, 9, 40, 56}}, f32, contiguous));
  run("large, last", plain(Loss::bce, {{1, 720, 5, 7}}, f16, channels_last));
  run("large, numbers", plain(Loss::bce, {{1, 61, 27, 23}}, f32, misaligned));
  run("long rows", plain(Loss::mse, {{1, 5000, 1, 3}}, f32, channels_last));
  run("few channels", plain(Loss::mse, {{1, 3, 40, 32}}, f32, contiguous));
  run("few channels, last", plain(Loss::mse, {{1, 3, 37, 29}}, f16, channels_last));
  // Coarse levels whose lines are odd: one run where C H W fills packets, numbers where it does not.
  const std::vector<Shape> coarse = {{2, 16, 25, 42}, {1, 24, 13, 21}, {2, 8, 7, 11}};
  for (DType d : {f32, bf16})
    for (int64_t c : {int64_t(8), int64_t(5)})
      run("coarse", pyramid(static_cast<int>(c), coarse, c, d, d, contiguous, contiguous));
  run("coarse, tiny", pyramid(10, {{1, 4, 1, 2}, {2, 3, 1, 1}, {1, 1, 1, 1}}, 8, f32, f32, contiguous, contiguous));
  for (int64_t k : {3, 80, 720})  // an RPN's, a head's, a head's with its anchors
    for (DType d : {f32, bf16})
      for (Layout l : {contiguous, channels_last})
        run(std::to_string(k) + " classes", plain(Loss::kl, {{1, k, 6, 8}, {2, k, 5, 3}, {1, k, 1, 1}}, d, l));
  run("3 classes, many positions", plain(Loss::bce, {{2, 3, 50, 64}, {2, 3, 25, 33}}, bf16, contiguous));
}

constexpr RowLoss ROW_LOSSES[] = {RowLoss::pkd, RowLoss::cwd};

RowCall rows(RowLoss loss, const std::vector<Shape>& shapes, DType s, DType t, Layout sl, Layout tl) {
  RowCall call{loss, {}};
  for (const Shape& shape : shapes) call.levels.push_back({shape, s, t, sl, tl, 1 + 0.25 * call.levels.size()});
  return call;
}

void rows_of_levels(int& i) {
  const std::vector<Shape> small = {{2, 8, 4, 8}, {1, 24, 5, 7}, {2, 5, 3, 1}, {2, 16, 1, 1}};
  const Layout three[] = {contiguous, channels_last, misaligned};
  for (RowLoss loss : ROW_LOSSES) {
    for (DType s : DTYPES)
      for (DType t : DTYPES) {
        const Layout l = three[++i % 3];
        RowCall call = rows(loss, small, s, t, l, l);
        call.has_factor = i % 4, call.factor_dtype = DTYPES[i / 4 % 4], call.temperature = i % 5 == 1 ? 2.5 : 1;
        call.eps = i % 5 == 2 ? 0.125 : 1e-6;
        run(std::string(NAMES[int(s)]) + " from " + NAMES[int(t)] + " " + LAYOUT_NAMES[l], call);
      }
    for (int l = 0; l < LAYOUTS; ++l) {
      const Layout layout = static_cast<Layout>(l), other = static_cast<Layout>(pick(0, LAYOUTS - 1));
      run(LAYOUT_NAMES[l], rows(loss, small, DTYPES[i % 4], DTYPES[i % 4], layout, layout)), ++i;
      run(std::string(LAYOUT_NAMES[l]) + " and " + LAYOUT_NAMES[other], rows(loss, small, bf16, bf16, layout, other));
    }
    for (DType d : DTYPES) {
      const Layout l = three[++i % 3];
      run("large", rows(loss, {{2, 4, 40, 56}, {1, 9, 25, 42}, {3, 8, 13, 21}}, d, d, l, l));
      run("many channels", rows(loss, {{2, 90, 2, 3}, {1, 136, 7, 11}}, d, d, l, l));
      run("many images", rows(loss, {{40, 3, 2, 5}, {17, 8, 4, 8}, {9, 40, 3, 5}}, d, d, l, l));
      run("empty levels", rows(loss, {{0, 8, 4, 4}, {1, 8, 4, 4}, {2, 8, 0, 4}}, d, d, l, l));
      run("only empty levels", rows(loss, {{0, 8, 4, 4}, {0, 3, 2, 2}}, d, d, l, l));
      run("19 levels", rows(loss, std::vector<Shape>(19, {1, 8, 2, 4}), d, d, l, l));
      RowCall call = rows(loss, {{2, 16, 6, 8}, {2, 8, 5, 7}}, d, d, l, l);
      call.flat_level = 0;
      run("a flat channel", call);
      if (loss == RowLoss::pkd) call.eps = 0, run("a flat channel, no eps", call);
      call.ripple = 1e-6;
      if (loss == RowLoss::pkd) call.eps = 1e-6, run("a channel that is nearly flat", call);
      call.eps = 1e-6, call.nan_level = 1;
      run("NaN", call);
      call.nan_level = -1, call.flat_level = -1, call.levels[0].far = 300, call.levels[1].far = -1000;
      run("far from 0", call);
      for (RowSpec& spec : call.levels) spec.far = 0, spec.apart = 1e4;
      run("the teacher far from the student", call);
      // Of cwd, exp of a difference from any number but the maximum is infinite then.
      for (RowSpec& spec : call.levels) spec.apart = 0, spec.spread = 60;
      for (Layout layout : {contiguous, channels_last}) {
        for (RowSpec& spec : call.levels) spec.student_layout = spec.teacher_layout = layout;
        run("far apart", call);
      }
    }
    run("large, last", rows(loss, {{2, 40, 40, 56}}, bf16, bf16, channels_last, channels_last));
    for (int k = 0; k < 10; ++k) {  // any mix
      RowCall call{loss, {}};
      for (int l = k == 4 ? 40 : pick(1, 6); l > 0; --l)
        call.levels.push_back({{pick(0, 5) ? pick(1, 3) : 0, pick(1, 40), pick(1, 12), pick(1, 12)},
                               DTYPES[pick(0, 3)],
                               DTYPES[pick(0, 3)],
                               static_cast<Layout>(pick(0, LAYOUTS - 1)),
                               static_cast<Layout>(pick(0, LAYOUTS - 1)),
                               normal(0, 1)});
      run("mixed", call);
    }
  }
}

void all_cases() {
  int i = 0;
  dtypes_and_layouts(i);
  mixed(i);
  softmax();
  edges(i);
  sizes();
  rows_of_levels(i);
  const std::vector<DType> every(DTYPES, DTYPES + 4);
  for (DType d : DTYPES) run_scale("scale", {0, 1, 7, 8, 9, 100, 333, 2, 64}, {d}, -1.37, d);
  run_scale("scale, mixed", {5, 16, 77, 1, 130, 40}, every, 16, f16);
  run_scale("scale by 1", {5, 16, 77, 1, 130, 40}, every, 1, f32);
  run_scale("scale, 70 runs", std::vector<int64_t>(70, 9), every, 0.3, f64);
  run_scale("scale, several rounds", {40000}, {bf16}, 0.3, f32);
  run_scale("scale, none", {0, 0}, {bf16}, 0.3, f32);
}

void one_case() {
  Call call;
  call.levels = {{2, 16, 4, 8}, {1, 6, 5, 7}, {2, 3, 3, 4}};
  call.terms = {{Loss::bce}, {Loss::mse}};
  call.terms[1].weight = 2, call.terms[1].has_factor = false;
  for (int l = 0; l < 3; ++l) {
    call.entries.push_back({l, 0, call.levels[l].c, f32, f32, contiguous, contiguous});
    call.entries.push_back({l, 1, 16, f32, f32, l == 1 ? misaligned : channel_gap, contiguous});
    call.entries.push_back({l, 1, 8, f32, f32, channels_last, channels_last});
    call.entries.push_back({l, 1, 8, bf16, bf16, contiguous, contiguous, 0.5, l == 2 ? 0.25 : 0});
    call.entries.push_back({l, 1, 8, f32, f32, l == 0 ? batch_gap_last : packed_rows, channels_last});
  }
  run("one", call);
  call.no_mass = 1, call.together = false;
  run("one", call);
  call.no_mass = -1, call.nan_level = 0, call.together = true;
  run("one", call);
  run("one", plain(Loss::mse, {{1, 40, 10, 11}}, f32, contiguous));  // a run of several tiles
  run("one", plain(Loss::kl, {{1, 20, 4, 4}}, f64, contiguous));
  Call groups = plain(Loss::softmax_kl, {{1, 9, 5, 8}, {2, 9, 3, 5}}, f32, contiguous);
  groups.terms[0].beta = 3, groups.terms[0].temperature = 2;
  groups.terms.push_back({Loss::mse});
  groups.entries.push_back({0, 1, 8, f32, f32, contiguous, contiguous});
  run("one", groups);
  run("one", plain(Loss::mse, {{1, 4, 4, 8}}, f32, channel_gap));  // its last line is fetched first, by half a warp
  for (RowLoss loss : ROW_LOSSES) {
    for (Layout l : {contiguous, channels_last, misaligned}) {
      RowCall mixed = rows(loss, {{2, 16, 12, 16}, {1, 5, 25, 42}, {0, 3, 2, 2}}, f32, f32, l, l);
      mixed.levels[1].student = mixed.levels[1].teacher = bf16;  // in another launch
      run("one", mixed);
    }
    run("one", rows(loss, {{1, 2, 40, 56}, {1, 4, 5, 7}}, f32, f32, contiguous, contiguous));  // several parts a row
    run("one", rows(loss, {{1, 4, 4, 8}}, f32, f32, misaligned, contiguous));
    run("one", rows(loss, {{1, 3, 4, 9}}, f64, f64, contiguous, contiguous));
    run("one", rows(loss, {{2, 64, 6, 8}}, bf16, bf16, channels_last, channels_last));  // two threads finish a row
  }
  for (double factor : {0.3, 1.0}) run_scale("one", {333, 64}, {f32}, factor, f32);
}

void random_calls(unsigned long long seed, int count) {
  for (const int before = failures; count > 0 && failures == before; --count, ++seed) {
    alarm(280);
    rng.seed(seed);
    random_call();
    if (failures > before) std::fprintf(stderr, "again: driver %llu random 1\n", seed);
  }
}

void far_cases() {
  for (DType d : {f32, f16})
    for (Layout l : {far_images, far_channels})
      for (Loss loss : {Loss::mse, Loss::bce}) run(LAYOUT_NAMES[l], plain(loss, {{2, 16, 4, 8}, {2, 3, 5, 7}}, d, l));
  for (RowLoss loss : ROW_LOSSES)
    for (DType d : {f32, f16})
      for (Layout l : {far_images, far_channels})
        run(LAYOUT_NAMES[l], rows(loss, {{2, 16, 4, 8}, {2, 3, 5, 7}}, d, d, l, l));
  Call call = plain(Loss::mse, {{2, 3, 4, 8}}, f32, far_channels);
  call.entries[0].student_layout = far_images;
  call.entries[0].teacher = bf16;
  for (Layout l : {far_images, far_channels}) run("far softmax", plain(Loss::softmax_kl, {{2, 4, 4, 8}}, f32, l));
  run("far, mixed", call);
  call.entries[0].student = bf16, call.entries[0].teacher = f32;
  run("far, any", call);
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
  else if (cases == "random")
    random_calls(argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0, argc > 3 ? std::atoi(argv[3]) : 1);
  else
    all_cases();
  std::printf("%d checks, %d failures, largest error %.2Lf of its bound\n", checks, failures, worst);
  return failures ? 1 : 0;
}
