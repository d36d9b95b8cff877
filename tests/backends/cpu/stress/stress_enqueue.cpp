// enqueue_ against a memory of plain maps, and with one thread against four; meant to be built with sanitizers:
// c++ -std=c++20 -O1 -DPROTOMEM_ISA=stress -fsanitize=thread -pthread stress_enqueue.cpp
#include <cmath>
#include <limits>
#include <set>
#include <tuple>

#include "../../../../csrc/cpu/enqueue.kernel.h"
#include "expect.h"
#include "threads.h"

namespace protomem {
namespace {

// One memory and what a call brings out of it.
struct Memory {
  int64_t capacity, dim;
  std::vector<float> rows;
  std::vector<int64_t> identities, stamps, slots, evicted;
  std::vector<char> known;
  std::vector<float> previous;
  int64_t cursor = 0, clock = 0;

  Memory(int64_t capacity_, int64_t dim_)
      : capacity(capacity_), dim(dim_), rows(capacity * dim), identities(capacity, -1), stamps(capacity) {}

  void enqueue(std::vector<double>& prototypes, std::vector<int32_t>& batch, double ratio, bool lru, int64_t threads) {
    const int64_t count = static_cast<int64_t>(batch.size());
    slots.resize(count);
    evicted.resize(count);
    known.resize(count);
    previous.resize(count * dim);
    PROTOMEM_ISA::enqueue({matrix_of(rows, capacity, dim),
                           vector_of(identities),
                           vector_of(stamps),
                           &cursor,
                           &clock,
                           matrix_of(prototypes, count, dim),
                           vector_of(batch),
                           ratio,
                           lru,
                           {slots.data(), count},
                           {evicted.data(), count},
                           {reinterpret_cast<bool*>(known.data()), count},
                           matrix_of(previous, count, dim)},
                          std_threads(threads));
  }

  auto everything() const { return std::tie(rows, identities, stamps, slots, evicted, known, previous, cursor, clock); }
};

// Which slots the contract gives to the rows: one identity after the other, and no rows of numbers.
struct Model {
  std::vector<int64_t> identities, stamps;
  int64_t cursor = 0, clock = 0;

  explicit Model(int64_t capacity) : identities(capacity, -1), stamps(capacity) {}

  int64_t find(int64_t identity) const {
    for (size_t s = 0; s < identities.size(); s++)
      if (identities[s] == identity) return static_cast<int64_t>(s);
    return -1;
  }

  int64_t victim(const std::set<int64_t>& batch, bool lru) {
    const int64_t capacity = static_cast<int64_t>(identities.size());
    int64_t best = -1;
    if (!lru) {
      for (best = cursor; batch.count(identities[best]); best = (best + 1) % capacity) {
      }
      cursor = (best + 1) % capacity;
      return best;
    }
    const auto age = [&](int64_t s) { return std::tuple(identities[s] >= 0, identities[s] >= 0 ? stamps[s] : 0, s); };
    for (int64_t s = 0; s < capacity; s++)
      if (!batch.count(identities[s]) && (best < 0 || age(s) < age(best))) best = s;
    return best;
  }

  std::vector<int64_t> enqueue(const std::vector<bool>& usable, const std::vector<int32_t>& labels, bool lru) {
    std::set<int64_t> batch;
    for (int32_t label : labels)
      if (label >= 0) batch.insert(label);
    clock++;
    std::vector<int64_t> slots;
    for (size_t i = 0; i < labels.size(); i++) {
      int64_t slot = usable[i] ? find(labels[i]) : -1;
      if (usable[i] && slot < 0) slot = victim(batch, lru);
      if (usable[i]) identities[slot] = labels[i], stamps[slot] = clock;
      slots.push_back(slot);
    }
    return slots;
  }
};

void check_rows(const Memory& memory, const std::string& name) {
  for (int64_t s = 0; s < memory.capacity; s++) {
    double squares = 0;
    for (int64_t d = 0; d < memory.dim; d++) squares += std::pow(memory.rows[s * memory.dim + d], 2);
    expect(std::abs(squares - (memory.identities[s] >= 0)) < 1e-5, name + ": length of a row");
  }
}

void compare(uint64_t seed) {
  Random random(seed);
  for (int round = 0; round < 24; round++) {
    const bool lru = round % 2;
    // The last is more than two ranges of the memory's stream.
    const int64_t capacity = round < 2 ? 150000 : random.one_of<int64_t>({1, 3, 60, 1500});
    const int64_t dim = round < 2 ? 2 : random.one_of<int64_t>({1, 5, 64, 515});
    Memory one(capacity, dim), four = one;
    Model model(capacity);
    for (int step = 0; step < 6; step++) {
      const std::string name = "round " + std::to_string(round) + ", step " + std::to_string(step);
      const int64_t count = random.below(std::min<int64_t>(capacity, 300) + 1);
      std::vector<double> prototypes(count * dim);
      std::vector<int32_t> batch(count);
      std::vector<bool> usable(count);
      for (int64_t i = 0; i < count; i++) {
        batch[i] = random.below(2 * std::min<int64_t>(capacity, 1000) + 2) - 2;
        const int64_t kind = random.below(12);
        for (int64_t d = 0; d < dim; d++) prototypes[i * dim + d] = kind == 0 ? 0 : random.number() + 1.5;
        if (kind == 1) prototypes[i * dim] = std::numeric_limits<double>::quiet_NaN();
        if (kind == 2) prototypes[i * dim] = 1e30;   // its square is too large for float
        if (kind == 3) prototypes[i * dim] = 1e300;  // itself too large
        usable[i] = batch[i] >= 0 && kind != 0 && kind != 1 && kind != 3;
      }
      const double ratio = random.one_of({0.0, 0.2, 1.0});
      one.enqueue(prototypes, batch, ratio, lru, 1);
      four.enqueue(prototypes, batch, ratio, lru, 4);
      expect(one.everything() == four.everything(), name + ": four threads differ from one");
      expect(model.enqueue(usable, batch, lru) == one.slots, name + ": slots");
      expect(model.identities == one.identities && model.stamps == one.stamps, name + ": identities or stamps");
      expect(model.cursor == one.cursor && model.clock == one.clock, name + ": cursor or clock");
      check_rows(one, name);
    }
  }
}

// A memory that breaks its invariants must not hang, nor lead outside of it.
void survives_a_broken_memory() {
  for (bool lru : {false, true}) {
    Memory memory(3, 2);
    memory.identities = {5, 5, 5};
    memory.cursor = -7;
    memory.stamps.assign(3, std::numeric_limits<int64_t>::max());
    std::vector<double> prototypes(6, 1.0);
    std::vector<int32_t> batch{5, 6, 7};
    memory.enqueue(prototypes, batch, 0.5, lru, 1);
    for (int64_t slot : memory.slots) expect(slot >= 0 && slot < 3, "broken memory: slots");
  }
}

}  // namespace
}  // namespace protomem

int main() {
  protomem::compare(3);
  protomem::survives_a_broken_memory();
  std::puts("enqueue_: ok");
}
