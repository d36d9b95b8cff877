// Aligned scratch memory that frees itself; contents undefined. Included once per instruction set (see simd.h).
#pragma once

#include <cstdint>
#include <new>
#include <utility>

#include "huge_pages.h"

namespace protomem::PROTOMEM_ISA {

template <class T>
class Buffer {
 public:
  static constexpr std::align_val_t alignment{64};

  Buffer() = default;
  explicit Buffer(int64_t size) {
    const std::size_t bytes = static_cast<std::size_t>(size > 0 ? size : 1) * sizeof(T);
    data_ = static_cast<T*>(::operator new(bytes, alignment));
    prefer_huge_pages(data_, bytes);
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) ::operator delete(data_, alignment);
  }

  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
};

}  // namespace protomem::PROTOMEM_ISA
