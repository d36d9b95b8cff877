// aggregate_prototypes forward and backward against plain loops, and with one thread against four; meant to be built
// with sanitizers: c++ -std=c++20 -O1 -DPROTOMEM_ISA=stress -fsanitize=thread -pthread stress_aggregate_prototypes.cpp
#include <cmath>
#include <limits>
#include <map>

#include "../../../../csrc/cpu/aggregate_prototypes.kernel.h"
#include "expect.h"
#include "threads.h"

namespace protomem {
namespace {

struct Case {
  int64_t batch, dim, people;
  bool normalize, weighted, broken;
};

template <class T>
struct Outputs {
  std::vector<T> prototypes, mass, norm, grad_embeddings, grad_weights;
  std::vector<int64_t> identities, index;
};

template <class T>
struct Inputs {
  std::vector<T> embeddings, weights, grad_prototypes, grad_mass;
  std::vector<int32_t> labels;

  Inputs(const Case& c, Random& random)
      : embeddings(c.batch * c.dim),
        weights(c.weighted ? c.batch : 0),
        grad_prototypes(c.batch * c.dim),
        grad_mass(c.batch),
        labels(c.batch) {
    for (T& x : embeddings) x = random.number();
    for (T& x : weights) x = random.below(3) ? random.number() + 1 : 0;
    for (T& x : grad_prototypes) x = random.number();
    for (T& x : grad_mass) x = random.number();
    for (int32_t& label : labels) label = random.below(c.people + 1) - 1;
    for (int64_t k = 0; c.broken && k < c.batch / 4; k++) {
      const T worst = random.one_of<T>({std::numeric_limits<T>::infinity(), std::numeric_limits<T>::quiet_NaN(),
                                        std::numeric_limits<T>::max(), std::numeric_limits<T>::denorm_min(), 0});
      const int64_t row = random.below(c.batch), all = random.below(2);
      for (int64_t d = 0; d < (all ? c.dim : 1); d++) embeddings[row * c.dim + d] = worst;
    }
  }

  Outputs<T> run(const Case& c, int64_t threads) {
    const Parallel parallel = std_threads(threads);
    std::vector<int64_t> scratch(Groups::scratch_size(c.batch));
    Groups groups(scratch.data(), c.batch);
    PROTOMEM_ISA::group_samples(vector_of(labels), groups);
    const int64_t rows = groups.count;
    Outputs<T> out{std::vector<T>(rows * c.dim),    std::vector<T>(rows),    std::vector<T>(rows),
                   std::vector<T>(c.batch * c.dim), std::vector<T>(c.batch), std::vector<int64_t>(rows),
                   std::vector<int64_t>(c.batch)};
    const Matrix e = matrix_of(embeddings, c.batch, c.dim), p = matrix_of(out.prototypes, rows, c.dim);
    const Vector q = c.weighted ? vector_of(weights) : Vector{}, mass = vector_of(out.mass), norm = vector_of(out.norm);
    PROTOMEM_ISA::aggregate_prototypes(
        {e, q, c.normalize, groups, p, {out.identities.data(), rows}, {out.index.data(), c.batch}, mass, norm},
        parallel);
    PROTOMEM_ISA::aggregate_prototypes_backward(
        {matrix_of(grad_prototypes, rows, c.dim), vector_of(grad_mass), e, q, vector_of(out.index), p, mass, norm,
         c.normalize, matrix_of(out.grad_embeddings, c.batch, c.dim), vector_of(out.grad_weights)},
        parallel);
    return out;
  }
};

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class T>
void check_forward(const Case& c, const Inputs<T>& in, const Outputs<T>& out, const std::string& name) {
  std::map<int64_t, std::vector<int64_t>> people;
  for (int64_t i = 0; i < c.batch; i++)
    if (in.labels[i] >= 0) people[in.labels[i]].push_back(i);
  expect(people.size() == out.identities.size(), name + ": number of identities");
  int64_t row = 0;
  for (const auto& [label, samples] : people) {
    expect(out.identities[row] == label, name + ": identities");
    std::vector<long double> sum(c.dim);
    long double mass = 0, squares = 0;
    for (int64_t i : samples) mass += c.weighted ? in.weights[i] : 1;
    for (int64_t i : samples) {
      expect(out.index[i] == row, name + ": index");
      long double length = 0;
      const T* e = &in.embeddings[i * c.dim];
      for (int64_t d = 0; d < c.dim; d++) length += static_cast<long double>(e[d]) * e[d];
      length = c.normalize && length > 0 ? std::sqrt(length) : 1;
      const long double q = c.weighted && mass > 0 ? in.weights[i] : 1;
      for (int64_t d = 0; d < c.dim; d++) sum[d] += q * e[d] / length;
    }
    for (long double x : sum) squares += x * x;
    const T* p = &out.prototypes[row * c.dim];
    const bool exists = out.norm[row] > 0;
    expect(exists || c.broken || c.dim == 1, name + ": a prototype is missing");  // numbers alone cancel
    for (int64_t d = 0; d < c.dim; d++)
      expect(exists ? std::abs(p[d] - sum[d] / std::sqrt(squares)) < 1e-4 : p[d] == 0, name + ": prototype");
    row++;
  }
}

template <class T>
void compare(uint64_t seed) {
  Random random(seed);
  for (int round = 0; round < 40; round++) {
    const Case c{random.one_of<int64_t>({0, 1, 5, 300}),
                 random.one_of<int64_t>({1, 3, 16, 77, 515}),
                 random.one_of<int64_t>({1, 4, 90, 100000}),
                 random.below(2) == 0,
                 random.below(2) == 0,
                 random.below(2) == 0};
    const std::string name = "round " + std::to_string(round) + ", " + std::to_string(sizeof(T)) + " bytes";
    Inputs<T> in(c, random);
    const Outputs<T> out = in.run(c, 1), again = in.run(c, 4);
    check_forward(c, in, out, name);
    for (T g : out.grad_embeddings) expect(c.broken || std::isfinite(g), name + ": finite gradient");
    expect(same_bits(out.prototypes, again.prototypes) && same_bits(out.mass, again.mass) &&
               same_bits(out.norm, again.norm) && same_bits(out.identities, again.identities) &&
               same_bits(out.index, again.index) && same_bits(out.grad_embeddings, again.grad_embeddings) &&
               same_bits(out.grad_weights, again.grad_weights),
           name + ": four threads differ from one");
  }
}

}  // namespace
}  // namespace protomem

int main() {
  protomem::compare<float>(1);
  protomem::compare<double>(2);
  std::puts("aggregate_prototypes: ok");
}
