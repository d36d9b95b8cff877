// The operators on batch x memory, forward and backward, against plain loops in double, and with 1, 2, 3 and 8 threads
// against each other, bit for bit; meant to be built with sanitizers:
// c++ -std=c++20 -O1 -DPROTOMEM_ISA=stress -mavx2 -mfma -fsanitize=thread -pthread stress_stream.cpp
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>

#include "../../../../csrc/cpu/hardest_negatives.kernel.h"
#include "../../../../csrc/cpu/margin_softmax_logits.kernel.h"
#include "../../../../csrc/cpu/negative_logsumexp.kernel.h"
#include "expect.h"
#include "threads.h"

namespace protomem {
namespace {

using PROTOMEM_ISA::bfloat16;
constexpr double infinity = std::numeric_limits<double>::infinity();

// Every output by its name, as double: the step from float, bfloat16 or a slot's number loses nothing.
using Results = std::map<std::string, std::vector<double>>;

template <class T>
std::vector<double> widened(const std::vector<T>& values) {
  std::vector<double> wide(values.size());
  for (size_t i = 0; i < values.size(); i++) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      wide[i] = PROTOMEM_ISA::to_float(values[i]);
    } else {
      wide[i] = static_cast<double>(values[i]);
    }
  }
  return wide;
}

template <class T>
constexpr double tolerance = std::is_same_v<T, double>  ? 1e-10
                             : std::is_same_v<T, float> ? 5e-5
                                                        : 1e-2;

void expect_near(const std::vector<double>& ours, const std::vector<double>& truth, double relative,
                 const std::string& name) {
  expect(ours.size() == truth.size(), name + ": size");
  double largest = 0;
  for (double x : truth)
    if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
  for (size_t i = 0; i < ours.size(); i++)
    if (ours[i] != truth[i] && !(std::abs(ours[i] - truth[i]) <= relative * (1 + largest)))
      expect(false,
             name + "[" + std::to_string(i) + "] is " + std::to_string(ours[i]) + ", not " + std::to_string(truth[i]));
}

struct Case {
  int64_t batch, capacity, dim;
  bool normalize, half_empty, hard, strided, broken;
};

// Which logsumexp: how many samples keep their exponentials, running maxima or an offset, chosen negatives only.
struct Mode {
  std::string name;
  int64_t kept = 0;
  bool running = false, chosen = false, with_gradient = true;
};

// One drawn problem: T is the type of the accumulation, W that of the memory.
template <class T, class W>
class Problem {
 public:
  Problem(const Case& c, Random& random)
      : c_(c),
        stride_(c.dim + (c.strided ? 3 : 0)),
        k_(std::min<int64_t>(random.one_of<int64_t>({1, 3, 40, 300}), std::max<int64_t>(c.capacity, 1))),
        x_(c.batch * c.dim),
        threshold_(c.hard ? c.batch : 0),
        grad_cosine_(c.batch),
        grad_n_(c.batch),
        target_logits_(c.batch),
        grad_logits_(c.batch * c.capacity),
        grad_hardest_(c.batch * k_),
        w_(c.capacity > 0 ? (c.capacity - 1) * stride_ + c.dim : 0),
        targets_(c.batch),
        negatives_(c.batch * 7),
        occupied_(c.half_empty ? c.capacity : 0),
        unit_(c.capacity * c.dim),
        length_(c.capacity, 1),
        cosines_(c.batch * c.capacity) {
    for (auto* values : {&x_, &grad_cosine_, &grad_n_, &target_logits_, &grad_logits_, &grad_hardest_})
      for (T& value : *values) value = static_cast<T>(random.number());
    for (int64_t i = 0; i < c.batch; i++) {
      scale_to(&x_[i * c.dim], 1);
      targets_[i] = random.below(c.capacity + 2) - 1;
    }
    if (c.broken && c.batch > 0) x_[c.batch / 2 * c.dim] = std::numeric_limits<T>::quiet_NaN();
    draw_memory(random);
    for (int64_t& slot : negatives_) {
      slot = random.below(c.capacity + 2) - 1;
      if (has(slot) && !present(slot)) slot = -1;  // chosen negatives are occupied slots
    }
    for (int64_t i = 0; i < c.batch; i++)
      for (int64_t j = 0; j < c.capacity; j++)
        for (int64_t d = 0; d < c.dim; d++)
          cosines_[i * c.capacity + j] += static_cast<double>(x_[i * c.dim + d]) * unit_[j * c.dim + d];
    for (int64_t i = 0; c.hard && i < c.batch; i++) threshold_[i] = static_cast<T>(clear_threshold(i));
  }

  void check(const std::string& name) {
    const int64_t half = c_.batch / 2;
    for (const Mode& mode :
         {Mode{"fixed offset"}, Mode{"kept rows", keeping(half)}, Mode{"as many kept as fit", keeping(c_.batch)},
          Mode{"running maximum", 0, true}, Mode{"chosen", 0, false, true},
          Mode{"chosen, running maximum", 0, true, true}, Mode{"no gradient", 0, false, false, false}}) {
      const Results ours = agreed(name + ", " + mode.name, [&](int64_t threads) { return logsumexp(mode, threads); });
      if (!c_.broken) near(ours, logsumexp_truth(mode), name + ", " + mode.name);
    }
    const Results hardest = agreed(name + ", hardest", [&](int64_t threads) { return hardest_negatives(threads); });
    if (!c_.broken) check_hardest(hardest, name + ", hardest");
    const Results logits = agreed(name + ", logits", [&](int64_t threads) { return margin_softmax_logits(threads); });
    if (!c_.broken) near(logits, logits_truth(), name + ", logits");
  }

 private:
  static constexpr double a_ = 1.1, b_ = 0.1, g_ = 0.3;  // h = a cos + b + g cos^2, at most 1.5
  static constexpr T poison_ = 777;                      // in outputs: what is not written stays so

  // How many of so many samples can be kept: where their gradient will lie there is room for D, in the memory's type.
  int64_t keeping(int64_t samples) const { return std::is_same_v<T, W> ? std::min(samples, c_.dim) : 0; }
  bool has(int64_t slot) const { return slot >= 0 && slot < c_.capacity; }
  bool present(int64_t slot) const { return occupied_.empty() || occupied_[slot]; }
  double cosine(int64_t i, int64_t j) const { return cosines_[i * c_.capacity + j]; }
  bool lifted(int64_t i, int64_t j) const { return c_.hard && cosine(i, j) > threshold_[i]; }
  double h(int64_t i, int64_t j) const {
    const double y = cosine(i, j);
    return lifted(i, j) ? a_ * y + b_ + g_ * y * y : y;
  }
  double slope(int64_t i, int64_t j) const { return lifted(i, j) ? a_ + 2 * g_ * cosine(i, j) : 1; }

  template <class Number>
  void scale_to(Number* row, double length) const {
    double squares = 0;
    for (int64_t d = 0; d < c_.dim; d++) squares += static_cast<double>(row[d]) * row[d];
    for (int64_t d = 0; d < c_.dim; d++) row[d] = static_cast<Number>(row[d] * length / std::sqrt(squares));
  }

  void draw_memory(Random& random) {
    for (char& flag : occupied_) flag = random.below(2) == 0;
    const std::set<int64_t> targeted(targets_.begin(), targets_.end());
    for (int64_t j = 0; j < c_.capacity; j++) {
      std::vector<float> row(c_.dim);
      for (float& value : row) value = static_cast<float>(random.number());
      scale_to(row.data(), c_.normalize ? random.one_of({0.01, 0.7, 50.0}) : 1);
      const bool read = present(j) || targeted.count(j);
      double squares = 0;
      for (int64_t d = 0; d < c_.dim; d++) {
        if (!read) row[d] = std::numeric_limits<float>::quiet_NaN();  // never looked at
        PROTOMEM_ISA::store(&w_[j * stride_ + d], row[d]);
        const double stored = PROTOMEM_ISA::load<T>(w_[j * stride_ + d]);
        unit_[j * c_.dim + d] = read ? stored : 0;
        squares += unit_[j * c_.dim + d] * unit_[j * c_.dim + d];
      }
      if (!c_.normalize || !read) continue;
      length_[j] = std::sqrt(squares);
      for (int64_t d = 0; d < c_.dim; d++) unit_[j * c_.dim + d] /= length_[j];
    }
  }

  // A threshold among the larger cosines of row i to which none is so near that rounding decides.
  double clear_threshold(int64_t i) const {
    std::vector<double> sorted;
    for (int64_t j = 0; j < c_.capacity; j++)
      if (present(j)) sorted.push_back(cosine(i, j));
    std::sort(sorted.begin(), sorted.end());
    double best = 0, widest = 1e-3;
    for (size_t r = sorted.size() / 2; r + 1 < sorted.size(); r++)
      if (sorted[r + 1] - sorted[r] > widest) {
        widest = sorted[r + 1] - sorted[r];
        best = (sorted[r + 1] + sorted[r]) / 2;
      }
    return best;
  }

  // The same results from every number of threads.
  template <class Run>
  Results agreed(const std::string& name, const Run& run) const {
    const Results one = run(1);
    for (int64_t threads : {2, 3, 8})
      for (const auto& [key, values] : run(threads)) {
        const std::vector<double>& expected = one.at(key);
        expect(values.size() == expected.size() &&
                   (values.empty() || std::memcmp(values.data(), expected.data(), values.size() * sizeof(double)) == 0),
               name + ", " + key + ": " + std::to_string(threads) + " threads differ from one");
      }
    return one;
  }

  void near(const Results& ours, const Results& truth, const std::string& name) const {
    for (const auto& [key, values] : truth)
      expect_near(ours.at(key), values, key == "grad_prototypes" ? std::max(tolerance<W>, tolerance<T>) : tolerance<T>,
                  name + ", " + key);
  }

  // ---- what goes in ----

  template <class Number>
  static Matrix matrix(std::vector<Number>& values, int64_t rows, int64_t cols, int64_t row_stride) {
    constexpr Dtype dtype = std::is_same_v<Number, bfloat16> ? Dtype::bfloat16 : dtype_v<Number>;
    return {values.data(), dtype, rows, cols, row_stride, 1};
  }
  Matrix x() { return matrix(x_, c_.batch, c_.dim, c_.dim); }
  Matrix w() { return matrix(w_, c_.capacity, c_.dim, stride_); }
  Matrix like_w(std::vector<W>& values) { return matrix(values, c_.capacity, c_.dim, c_.dim); }
  std::vector<W> gradient_of_w() const {
    std::vector<W> grad(c_.capacity * c_.dim);
    for (W& value : grad) PROTOMEM_ISA::store(&value, poison_);
    return grad;
  }
  const bool* occupied() const { return c_.half_empty ? reinterpret_cast<const bool*>(occupied_.data()) : nullptr; }

  template <class Inputs>
  void fill(Inputs& in, double scale) {
    in.x = x();
    in.prototypes = w();
    in.targets = vector_of(targets_);
    in.occupied = occupied();
    if (c_.hard) {
      in.threshold = vector_of(threshold_);
      in.coefficients = vector_of(coefficients_);
    }
    in.scale = scale;
    in.normalize = c_.normalize;
  }

  // ---- negative_logsumexp ----

  double scale_of(const Mode& mode) const { return mode.running ? 100 : 16; }
  double offset_of(const Mode& mode) const { return mode.running ? 0 : 16 * (c_.hard ? a_ + b_ + g_ : 1); }

  Results logsumexp(const Mode& mode, int64_t threads) {
    const Parallel parallel = std_threads(threads);
    std::vector<T> cosine(c_.batch, poison_), n(c_.batch, poison_), rows(c_.batch * c_.dim, poison_);
    std::vector<T> o(mode.with_gradient ? c_.batch * c_.dim : 0, poison_);
    std::vector<W> grad = gradient_of_w();
    NegativeLogsumexp in;
    NegativeLogsumexpBackward back;
    for (LogsumexpInputs* both : {static_cast<LogsumexpInputs*>(&in), static_cast<LogsumexpInputs*>(&back)}) {
      fill(*both, scale_of(mode));
      both->chosen = mode.chosen;
      if (mode.chosen) both->negatives = matrix_of(negatives_, c_.batch, 7);
      both->offset = offset_of(mode);
      both->kept_rows = mode.kept;
    }
    in.running = mode.running;
    in.cosine = cosine.data();
    in.n = n.data();
    in.target_rows = rows.data();
    in.with_gradient = mode.with_gradient;
    in.o = o.data();
    if constexpr (std::is_same_v<T, W>) in.kept = grad.data();
    PROTOMEM_ISA::negative_logsumexp(in, parallel);
    std::vector<W> kept;
    for (int64_t j = 0; j < c_.capacity; j++)
      kept.insert(kept.end(), grad.begin() + j * c_.dim, grad.begin() + j * c_.dim + mode.kept);

    back.grad_cosine = grad_cosine_.data();
    back.grad_n = grad_n_.data();
    back.n = n.data();
    back.grad_prototypes = like_w(grad);
    PROTOMEM_ISA::negative_logsumexp_backward(back, parallel);
    return {{"cosine", widened(cosine)}, {"n", widened(n)},       {"target_rows", widened(rows)},
            {"o", widened(o)},           {"kept", widened(kept)}, {"grad_prototypes", widened(grad)}};
  }

  std::vector<int64_t> negatives_of(int64_t i, const Mode& mode) const {
    std::vector<int64_t> slots;
    for (int64_t k = 0; mode.chosen && k < 7; k++)
      if (has(negatives_[i * 7 + k]) && negatives_[i * 7 + k] != targets_[i]) slots.push_back(negatives_[i * 7 + k]);
    for (int64_t j = 0; !mode.chosen && j < c_.capacity; j++)
      if (present(j) && j != targets_[i]) slots.push_back(j);
    return slots;
  }

  Results logsumexp_truth(const Mode& mode) const {
    const double s = scale_of(mode), offset = offset_of(mode);
    std::vector<double> c(c_.batch), n(c_.batch, -infinity), rows(c_.batch * c_.dim), kept(c_.capacity * mode.kept);
    std::vector<double> o(mode.with_gradient ? c_.batch * c_.dim : 0), grad(c_.capacity * c_.dim);
    for (int64_t i = 0; i < c_.batch; i++) {
      const std::vector<int64_t> slots = negatives_of(i, mode);
      double highest = -infinity, total = 0;
      for (int64_t j : slots) highest = std::max(highest, s * h(i, j));
      for (int64_t j : slots) total += std::exp(s * h(i, j) - highest);
      if (!slots.empty()) n[i] = std::log(total) + highest;
      for (int64_t j : slots) {
        const double q = s * std::exp(s * h(i, j) - n[i]) * slope(i, j);
        if (i < mode.kept) kept[j * mode.kept + i] = std::exp(s * h(i, j) - offset) * slope(i, j);
        if (mode.with_gradient) add(&o[i * c_.dim], q, &unit_[j * c_.dim]);
        add(&grad[j * c_.dim], q * grad_n_[i], &x_[i * c_.dim]);
      }
      if (!has(targets_[i])) continue;
      c[i] = cosine(i, targets_[i]);
      add(&rows[i * c_.dim], 1, &unit_[targets_[i] * c_.dim]);
      add(&grad[targets_[i] * c_.dim], grad_cosine_[i], &x_[i * c_.dim]);
    }
    to_raw(grad);
    return {{"cosine", c}, {"n", n}, {"target_rows", rows}, {"o", o}, {"kept", kept}, {"grad_prototypes", grad}};
  }

  template <class Number>
  void add(double* to, double factor, const Number* row) const {
    for (int64_t d = 0; d < c_.dim; d++) to[d] += factor * row[d];
  }

  // From the gradients of unit rows to those of the rows themselves.
  void to_raw(std::vector<double>& grad) const {
    for (int64_t j = 0; c_.normalize && j < c_.capacity; j++) {
      double *g = &grad[j * c_.dim], along = 0;
      const double* u = &unit_[j * c_.dim];
      for (int64_t d = 0; d < c_.dim; d++) along += g[d] * u[d];
      for (int64_t d = 0; d < c_.dim; d++) g[d] = (g[d] - along * u[d]) / length_[j];
    }
  }

  // ---- hardest_negatives ----

  Results hardest_negatives(int64_t threads) {
    const Parallel parallel = std_threads(threads);
    std::vector<T> cosines(c_.batch * k_, poison_), grad_x(c_.batch * c_.dim, poison_);
    std::vector<int64_t> slots(c_.batch * k_, 777);
    std::vector<W> grad = gradient_of_w();
    PROTOMEM_ISA::hardest_negatives(
        {x(), w(), vector_of(targets_), occupied(), k_, c_.normalize, cosines.data(), slots.data()}, parallel);
    PROTOMEM_ISA::hardest_negatives_backward(
        {grad_hardest_.data(), x(), w(), slots.data(), k_, c_.normalize, grad_x.data(), like_w(grad)}, parallel);
    std::vector<T> alone(c_.batch * c_.dim, poison_);
    PROTOMEM_ISA::hardest_negatives_backward(
        {grad_hardest_.data(), x(), w(), slots.data(), k_, c_.normalize, alone.data(), {}}, parallel);
    return {{"cosines", widened(cosines)},
            {"slots", widened(slots)},
            {"grad_x", widened(grad_x)},
            {"grad_x alone", widened(alone)},
            {"grad_prototypes", widened(grad)}};
  }

  // Near ties may stand in another order in T than in double: the cosines are compared, then each slot with its own.
  void check_hardest(const Results& ours, const std::string& name) const {
    const std::vector<double>&slots = ours.at("slots"), &cosines = ours.at("cosines");
    std::vector<double> best(c_.batch * k_, -infinity), grad_x(c_.batch * c_.dim), grad(c_.capacity * c_.dim);
    for (int64_t i = 0; i < c_.batch; i++) {
      std::vector<double> all;
      for (int64_t j : negatives_of(i, {})) all.push_back(cosine(i, j));
      std::sort(all.rbegin(), all.rend());
      std::copy_n(all.begin(), std::min<int64_t>(k_, all.size()), best.begin() + i * k_);
      std::set<int64_t> seen;
      for (int64_t k = i * k_; k < (i + 1) * k_; k++) {
        const int64_t slot = static_cast<int64_t>(slots[k]);
        if ((slot < 0) != (best[k] == -infinity)) expect(false, name + ": as many slots as there are");
        if (slot < 0) continue;
        const bool eligible = has(slot) && present(slot) && slot != targets_[i] && seen.insert(slot).second;
        if (!eligible || !(std::abs(cosine(i, slot) - cosines[k]) < tolerance<T>)) expect(false, name + ": slots");
        if (k > i * k_ && !(cosines[k] <= cosines[k - 1])) expect(false, name + ": order");
        add(&grad_x[i * c_.dim], grad_hardest_[k], &unit_[slot * c_.dim]);
        add(&grad[slot * c_.dim], grad_hardest_[k], &x_[i * c_.dim]);
      }
    }
    to_raw(grad);
    near(ours, {{"cosines", best}, {"grad_x", grad_x}, {"grad_x alone", grad_x}, {"grad_prototypes", grad}}, name);
  }

  // ---- margin_softmax_logits ----

  Results margin_softmax_logits(int64_t threads) {
    const Parallel parallel = std_threads(threads);
    std::vector<T> logits(c_.batch * c_.capacity, poison_), grad_x(c_.batch * c_.dim, poison_);
    std::vector<T> grad_target(c_.batch, poison_), alone(c_.batch * c_.dim, poison_);
    std::vector<W> grad = gradient_of_w();
    MarginSoftmaxLogits in;
    fill(in, 16);
    in.target_logits = vector_of(target_logits_);
    in.logits = logits.data();
    PROTOMEM_ISA::margin_softmax_logits(in, parallel);
    MarginSoftmaxLogitsBackward back;
    fill(back, 16);
    back.grad = {grad_logits_.data(), dtype_v<T>, c_.batch, c_.capacity, 1, c_.batch};  // transposed
    back.grad_x = grad_x.data();
    back.grad_target_logits = grad_target.data();
    back.grad_prototypes = like_w(grad);
    PROTOMEM_ISA::margin_softmax_logits_backward(back, parallel);
    back.grad_x = alone.data();
    back.grad_prototypes = {};
    PROTOMEM_ISA::margin_softmax_logits_backward(back, parallel);
    return {{"logits", widened(logits)},
            {"grad_x", widened(grad_x)},
            {"grad_x alone", widened(alone)},
            {"grad_target_logits", widened(grad_target)},
            {"grad_prototypes", widened(grad)}};
  }

  Results logits_truth() const {
    std::vector<double> logits(c_.batch * c_.capacity, -infinity), grad_x(c_.batch * c_.dim), grad_target(c_.batch);
    std::vector<double> grad(c_.capacity * c_.dim);
    for (int64_t i = 0; i < c_.batch; i++) {
      for (int64_t j : negatives_of(i, {})) {
        const double upstream = 16 * slope(i, j) * grad_logits_[j * c_.batch + i];
        logits[i * c_.capacity + j] = 16 * h(i, j);
        add(&grad_x[i * c_.dim], upstream, &unit_[j * c_.dim]);
        add(&grad[j * c_.dim], upstream, &x_[i * c_.dim]);
      }
      if (!has(targets_[i])) continue;
      logits[i * c_.capacity + targets_[i]] = target_logits_[i];
      grad_target[i] = grad_logits_[targets_[i] * c_.batch + i];
    }
    to_raw(grad);
    return {{"logits", logits},
            {"grad_x", grad_x},
            {"grad_x alone", grad_x},
            {"grad_target_logits", grad_target},
            {"grad_prototypes", grad}};
  }

  const Case c_;
  const int64_t stride_, k_;
  std::vector<T> x_, threshold_, grad_cosine_, grad_n_, target_logits_, grad_logits_, grad_hardest_;
  std::vector<W> w_;
  std::vector<double> coefficients_{a_, b_, g_};
  std::vector<int64_t> targets_, negatives_;
  std::vector<char> occupied_;
  std::vector<double> unit_, length_, cosines_;
};

// The larger sizes must bring several tiles, chunks and groups of rows, or the threads have nothing to get wrong.
template <class T>
void expect_cut(const Case& c, int64_t chunks, int64_t groups) {
  const int64_t panels = (c.batch + PROTOMEM_ISA::panel_rows<T> - 1) / PROTOMEM_ISA::panel_rows<T>;
  const int64_t tile = PROTOMEM_ISA::tile_slots<T>(c.dim), moments = c.batch * c.dim * int64_t{sizeof(T)};
  const PROTOMEM_ISA::Cut cut(c.capacity, tile, 16, moments, int64_t{16} << 20, panels, 8);
  const std::string name = std::to_string(c.batch) + " x " + std::to_string(c.capacity);
  expect(cut.chunks >= chunks, name + " is one chunk");
  expect(cut.groups >= groups, name + " is one group of rows");
  expect(cut.chunk_slots > 2 * tile, name + ": a chunk is one tile");
}

template <class T, class W>
void compare(uint64_t seed) {
  Random random(seed);
  const auto check = [&](int64_t batch, int64_t capacity, int64_t dim, int round) {
    const Case c{batch,          capacity,      dim, random.below(2) == 0, round % 2 == 1, random.below(2) == 0,
                 round % 3 == 0, round % 4 == 3};
    const std::string name = std::to_string(sizeof(T)) + " and " + std::to_string(sizeof(W)) + " bytes, " +
                             std::to_string(batch) + " x " + std::to_string(capacity) + " x " + std::to_string(dim) +
                             ", round " + std::to_string(round);
    Problem<T, W>(c, random).check(name);
    return c;
  };
  constexpr bool same = std::is_same_v<T, W>;  // the others differ in how prototypes are read, no more
  for (int round = 0; round < (same ? 4 : 2); round++) {
    check(0, 5, 3, round);
    check(3, 0, 4, round);
    check(1, 1, 1, round);
    check(7, 1, 5, round);
    check(5, 130, 33, round);
    check(27, 530, 4, round);
  }
  const int64_t panel = PROTOMEM_ISA::panel_rows<T>;
  for (int round = 0; round < (same ? 2 : 0); round++) expect_cut<T>(check(8 * panel + 5, 1300, 3, round), 3, 2);
  for (int round = 0; round < (same ? 2 : 1); round++) expect_cut<T>(check(panel + 1, 2100, 17, round), 5, 1);
  if (same) expect_cut<T>(check(3, 530, 515, 1), 2, 1);
}

}  // namespace
}  // namespace protomem

int main() {
  protomem::compare<float, float>(4);
  protomem::compare<double, double>(5);
  protomem::compare<float, protomem::PROTOMEM_ISA::bfloat16>(6);
  protomem::compare<double, float>(7);
  std::puts("negative_logsumexp, hardest_negatives, margin_softmax_logits: ok");
}
