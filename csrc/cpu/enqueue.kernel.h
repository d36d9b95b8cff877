#pragma once

#include "base/buffer.h"
#include "base/rows.h"
#include "enqueue.h"

namespace protomem::PROTOMEM_ISA {

// A vector of int64, as it lies in memory.
class Integers {
 public:
  explicit Integers(const Vector& v) : Integers(static_cast<int64_t*>(v.data), v.stride) {}
  int64_t& operator[](int64_t i) const { return data_[i * stride_]; }
  Integers from(int64_t first) const { return Integers(data_ + first * stride_, stride_); }

 private:
  Integers(int64_t* data, int64_t stride) : data_(data), stride_(stride) {}

  int64_t* data_;
  int64_t stride_;
};

// The batch's identities, each represented by the first row that was inserted with it.
class BatchTable {
 public:
  explicit BatchTable(const Vector& identities) : identities_(identities.size) {
    for (int64_t i = 0; i < identities.size; i++) identities_[i] = integer_at(identities, i);
    int table_bits = 1;
    while (int64_t{1} << table_bits < 2 * identities.size) table_bits++;
    // 32 bytes a row or more, as long as that is some 100 KB.
    const int filter_bits = std::max(table_bits, std::min(table_bits + 5, 17));
    table_shift_ = 64 - table_bits;
    filter_shift_ = 64 - filter_bits;
    table_ = Buffer<int64_t>(int64_t{1} << table_bits);
    fill(table_.get(), int64_t{-1}, int64_t{1} << table_bits);
    filter_ = Buffer<uint8_t>(int64_t{1} << filter_bits);
    fill(filter_.get(), uint8_t{0}, int64_t{1} << filter_bits);
  }

  int64_t identity(int64_t row) const { return identities_[row]; }

  // Returns the row that stands for this one's identity, itself if it is the first.
  int64_t insert(int64_t row) {
    int64_t& place = table_[place_of(identities_[row])];
    if (place < 0) {
      place = row;
      filter_[hash(identities_[row]) >> filter_shift_] = 1;
    }
    return place;
  }

  // Returns the row that stands for the identity, or -1.
  int64_t find(int64_t identity) const { return table_[place_of(identity)]; }

  // Returns 0 for most identities that are not in the table, and 1 for all that are.
  uint8_t may_hold(int64_t identity) const { return filter_[hash(identity) >> filter_shift_]; }

 private:
  // The upper bits of the product with 2^64 / golden ratio spread even consecutive identities.
  static uint64_t hash(int64_t identity) { return static_cast<uint64_t>(identity) * 0x9e3779b97f4a7c15u; }

  // Where the identity is, or would go: half of the table is free, so the search ends.
  int64_t place_of(int64_t identity) const {
    const int64_t mask = static_cast<int64_t>(~uint64_t{0} >> table_shift_);
    int64_t place = static_cast<int64_t>(hash(identity) >> table_shift_);
    while (table_[place] >= 0 && identities_[table_[place]] != identity) place = (place + 1) & mask;
    return place;
  }

  Buffer<int64_t> identities_;
  Buffer<int64_t> table_;
  Buffer<uint8_t> filter_;
  int table_shift_, filter_shift_;
};

// Calls visit(i) for every i in [0, n) that passes. Meant for filters that let few pass: no branch depends on them.
constexpr int64_t filter_block = 1024;  // the largest n
template <class Passes, class Visit>
inline void filter(int64_t n, const Passes& passes, const Visit& visit) {
  int32_t passed[filter_block];
  int64_t count = 0;
  for (int32_t i = 0; i < n; i++) {
    passed[count] = i;
    count += passes(i);
  }
  for (int64_t i = 0; i < count; i++) visit(passed[i]);
}

// Streams the slots [begin, end) past the table: found[row] becomes the slot where that row's identity stands.
inline void find_in_range(const BatchTable& table, const Integers& memory, int64_t begin, int64_t end, int64_t* found) {
  for (; begin < end; begin += filter_block) {
    const Integers block = memory.from(begin);
    const auto may_match = [&](int32_t i) { return table.may_hold(block[i]); };
    filter(std::min(filter_block, end - begin), may_match, [&](int32_t i) {
      const int64_t row = table.find(block[i]);
      if (row < 0) return;
      // Only in a broken memory does an identity stand in two slots, perhaps in two threads' ranges.
      const int64_t slot = begin + i;
      int64_t seen = __atomic_load_n(&found[row], __ATOMIC_RELAXED);
      while (seen < slot &&
             !__atomic_compare_exchange_n(&found[row], &seen, slot, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      }
    });
  }
}

struct Aged {
  int64_t age;
  int64_t slot;
};

inline bool older(const Aged& a, const Aged& b) { return a.age != b.age ? a.age < b.age : a.slot < b.slot; }

constexpr int64_t before_all = std::numeric_limits<int64_t>::min(), after_all = std::numeric_limits<int64_t>::max();

// Keeps the `size` oldest of all that it is offered, as a heap with the youngest of them on top. The heap comes filled
// with what is younger than any slot: {after_all, after_all}.
class Oldest {
 public:
  Oldest(Aged* heap, int64_t size) : heap_(heap), size_(size) {}

  int64_t limit() const { return heap_[0].age; }  // nothing with a higher age is wanted
  bool wants(const Aged& candidate) const { return older(candidate, heap_[0]); }

  void offer(const Aged& candidate) {
    if (wants(candidate)) replace_top(candidate, size_);
  }

  // Orders the heap itself: the oldest first.
  void sort() {
    for (int64_t left = size_ - 1; left > 0; left--) {
      const Aged last = heap_[left];
      heap_[left] = heap_[0];
      replace_top(last, left);
    }
  }

 private:
  void replace_top(const Aged& value, int64_t size) {
    int64_t at = 0;
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
      if (child + 1 < size && older(heap_[child], heap_[child + 1])) child++;
      if (!older(value, heap_[child])) break;
      heap_[at] = heap_[child];
    }
    heap_[at] = value;
  }

  Aged* heap_;
  int64_t size_;
};

constexpr int64_t slots_per_range = 65536;  // some 30 microseconds of streaming: enough to wake a thread for

// victims[0 .. count): the slots from the cursor upwards whose identities are not in the batch. One round is always
// enough, unless the memory is broken: then the walk goes on over any slot.
inline void victims_of_ring(const BatchTable& table, const Integers& memory, int64_t capacity, int64_t cursor,
                            int64_t* victims, int64_t count) {
  int64_t at = (cursor % capacity + capacity) % capacity;
  for (int64_t taken = 0, seen = 0; taken < count; seen++) {
    if (seen >= capacity || table.find(memory[at]) < 0) victims[taken++] = at;
    at = at + 1 == capacity ? 0 : at + 1;
  }
}

// victims[0 .. count): the oldest slots whose identities are not in the batch, empty ones first.
inline void least_recent_victims(const BatchTable& table, const Integers& memory, const Integers& stamps,
                                 int64_t capacity, int64_t* victims, int64_t count, const Parallel& parallel) {
  if (count == 0) return;
  const Buffer<Aged> heaps(parallel.threads() * count);
  fill(heaps.get(), Aged{after_all, after_all}, parallel.threads() * count);
  std::atomic<int64_t> next_heap{0};
  parallel.each((capacity + slots_per_range - 1) / slots_per_range,
                [&] { return Oldest(heaps.get() + count * next_heap.fetch_add(1), count); },
                [&](Oldest& oldest, int64_t range) {
                  const int64_t end = std::min(capacity, (range + 1) * slots_per_range);
                  for (int64_t begin = range * slots_per_range; begin < end; begin += filter_block) {
                    if (!oldest.wants({before_all, begin})) continue;  // it has its fill of empty slots
                    const Integers identities = memory.from(begin), ages = stamps.from(begin);
                    const int64_t limit = oldest.limit();
                    const auto age = [&](int32_t i) { return identities[i] < 0 ? before_all : ages[i]; };
                    const auto old_enough = [&](int32_t i) { return age(i) <= limit; };
                    filter(std::min(filter_block, end - begin), old_enough, [&](int32_t i) {
                      Aged candidate{age(i), begin + i};
                      if (!oldest.wants(candidate)) return;
                      if (table.find(identities[i]) >= 0)
                        candidate.age = after_all;  // taken only if the memory is broken
                      oldest.offer(candidate);
                    });
                  }
                });
  Oldest oldest(heaps.get(), count);
  for (int64_t i = count; i < parallel.threads() * count; i++) oldest.offer(heaps[i]);
  oldest.sort();
  for (int64_t i = 0; i < count; i++) victims[i] = heaps[i].slot;
}

inline void copy_row(const Matrix& from, int64_t row, const Matrix& to, int64_t to_row) {
  with_floating(from.dtype, from.data, [&](auto* data) {
    auto* target = static_cast<decltype(data)>(to.data) + to_row * to.row_stride;
    data += row * from.row_stride;
    for (int64_t d = 0; d < from.cols; d++) target[d * to.col_stride] = data[d * from.col_stride];
  });
}

// The memory's row `slot` becomes the direction of p, or of its blend with the old row. `buffer` has room for two rows.
template <class T>
inline void write_row(const EnqueueArgs& a, int64_t row, int64_t slot, bool refresh, T* buffer) {
  constexpr T vanished = static_cast<T>(1e-6);  // a blend this short has no direction: the new prototype takes over
  const int64_t dim = a.memory.cols;
  const T ratio = static_cast<T>(a.refresh_ratio), rest = static_cast<T>(1 - a.refresh_ratio);
  T *const second = buffer + dim, *const in_place = row_in_place<T>(a.memory, slot);
  Direction<T> direction = direction_of(row_as(a.prototypes, row, buffer), dim, buffer);
  if (refresh) {
    combine(second, rest, row_as(a.memory, slot, second), ratio * direction.scale, direction.values, dim);
    const Direction<T> blend = direction_of(second, dim, second);
    if (blend.length > vanished) direction = blend;
  }
  T* const to = in_place != nullptr ? in_place : second;
  scale_into(to, direction.scale, direction.values, dim);
  if (to != in_place) store_row(a.memory, slot, to);
}

template <class T>
inline void enqueue_in(const EnqueueArgs& a, const Parallel& parallel) {
  const int64_t rows = a.identities.size, capacity = a.memory.rows, dim = a.memory.cols;
  if (rows == 0) {
    ++*a.clock;
    return;
  }
  const int64_t step = rows_per_item(dim), items = (rows + step - 1) / step;
  const Integers memory(a.memory_identities), stamps(a.stamps);

  // Each thread takes two rows of this; nothing is allocated once writing has begun.
  const Buffer<T> buffers(2 * dim * parallel.threads());
  const auto each_row = [&](const auto& work) {
    std::atomic<int64_t> next_thread{0};
    parallel.each(
        items, [&] { return buffers.get() + 2 * dim * next_thread.fetch_add(1); },
        [&](T* buffer, int64_t item) {
          const int64_t end = std::min(rows, (item + 1) * step);
          for (int64_t row = item * step; row < end; row++) work(row, buffer);
        });
  };

  BatchTable table(a.identities);
  const Buffer<int64_t> leader(rows), found(rows), victims(rows);
  const Buffer<bool> usable(rows);
  each_row([&](int64_t row, T* buffer) {
    usable[row] = table.identity(row) >= 0 && direction_of(row_as(a.prototypes, row, buffer), dim, buffer).scale > 0;
  });
  for (int64_t row = 0; row < rows; row++) {
    found[row] = -1;
    if (usable[row]) leader[row] = table.insert(row);
  }
  // The identities of unusable rows protect their slots, but they never lead.
  for (int64_t row = 0; row < rows; row++)
    if (!usable[row] && table.identity(row) >= 0) table.insert(row);

  parallel.each((capacity + slots_per_range - 1) / slots_per_range, [&](int64_t r) {
    find_in_range(table, memory, r * slots_per_range, std::min(capacity, (r + 1) * slots_per_range), found.get());
  });

  for (int64_t row = 0; row < rows; row++) a.known[row] = usable[row] && found[leader[row]] >= 0;
  const auto leads = [&](int64_t row) { return usable[row] && leader[row] == row; };
  int64_t new_ones = 0;
  for (int64_t row = 0; row < rows; row++) new_ones += leads(row) && !a.known[row];
  if (a.lru) {
    least_recent_victims(table, memory, stamps, capacity, victims.get(), new_ones, parallel);
  } else {
    victims_of_ring(table, memory, capacity, *a.cursor, victims.get(), new_ones);
  }
  const int64_t* victim = victims.get();
  for (int64_t row = 0; row < rows; row++) {
    const bool is_new = leads(row) && !a.known[row];
    if (is_new) found[row] = *victim++;
    a.slots[row] = usable[row] ? found[leader[row]] : -1;
    a.evicted[row] = is_new ? memory[found[row]] : -1;
  }
  if (a.previous)
    each_row([&](int64_t row, T*) { copy_row(a.memory, std::max<int64_t>(a.slots[row], 0), a.previous, row); });

  // From here on the memory changes, and nothing can fail.
  const int64_t now = ++*a.clock;
  each_row([&](int64_t row, T* buffer) {
    if (!leads(row)) return;
    const int64_t slot = a.slots[row];
    if (!a.known[row] || a.refresh_ratio > 0) write_row(a, row, slot, a.known[row], buffer);
    memory[slot] = table.identity(row);
    stamps[slot] = now;
  });
  if (!a.lru && new_ones > 0) *a.cursor = (victims[new_ones - 1] + 1) % capacity;
}

inline void enqueue(const EnqueueArgs& a, const Parallel& parallel) {
  a.memory.dtype == Dtype::float64 ? enqueue_in<double>(a, parallel) : enqueue_in<float>(a, parallel);
}

}  // namespace protomem::PROTOMEM_ISA
