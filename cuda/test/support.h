// What the CUDA tests share: a backend per mode, arrays on the device, and references in double. The tests
// run on the emulator (dn_cuda_emulator) and, unchanged, on a GPU (dn_cuda_check).
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/error.h"
#include "core/half.h"
#include "core/rng.h"
#include "test/check.h"

#ifdef DN_CUDA_EMULATOR
#include "cuda/emulator/emulator.h"
#include "cuda/emulator/memory.h"
#endif

namespace dn::cuda_test {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
using Doubles = std::vector<double>;

inline size_t idx(int64_t i) { return static_cast<size_t>(i); }

inline void emulate_seed(uint64_t seed) {
#ifdef DN_CUDA_EMULATOR
  emulator::set_seed(seed);
#else
  (void)seed;
#endif
}

// Made once each: creating one on a GPU takes a second.
inline Backend& backend(Dtype dtype) {
  static const std::unique_ptr<Backend> f32 = make_cuda_backend(0, Dtype::kF32),
                                        bf16 = make_cuda_backend(0, Dtype::kBF16);
  return dtype == Dtype::kF32 ? *f32 : *bf16;
}

// Roughly normal, mean 0, standard deviation `scale`.
inline std::vector<float> random_values(int64_t n, uint64_t seed, float scale = 1) {
  std::vector<float> x(idx(n));
  for (int64_t i = 0; i < n; ++i) {
    const Philox4 r = philox(seed, Stream::kInit, 0, static_cast<uint64_t>(i));
    double sum = -2;
    for (const uint32_t word : r.v) sum += word * (1.0 / 4294967296.0);
    x[idx(i)] = static_cast<float>(sum * 1.7320508 * static_cast<double>(scale));
  }
  return x;
}

inline Doubles to_doubles(const std::vector<float>& x) { return Doubles(x.begin(), x.end()); }

// A matrix on the device. Values that are handed in are rounded to its type, so that references start from
// what the device has; without values it is NaN, so that an element that is not written is a failure.
class Array {
 public:
  Array(Backend& backend, Dtype dtype, int64_t rows, int64_t cols, const std::vector<float>& values = {})
      : backend_(&backend), dtype_(dtype), rows_(rows), cols_(cols) {
    buffer_ = backend.alloc(idx(rows * cols) * dtype_bytes(dtype));
    set(values.empty() ? std::vector<float>(idx(rows * cols), kNan) : values);
  }
  void set(const std::vector<float>& values) {
    if (dtype_ == Dtype::kF32) {
      host_ = values;
      backend_->upload(buffer_->data(), values.data(), values.size() * sizeof(float));
      return;
    }
    std::vector<uint16_t> bits(values.size());
    host_.resize(values.size());
    for (size_t i = 0; i < values.size(); ++i) {
      bits[i] = f32_to_bf16(values[i]);
      host_[i] = bf16_to_f32(bits[i]);
    }
    backend_->upload(buffer_->data(), bits.data(), bits.size() * sizeof(uint16_t));
  }
  std::vector<float> get() const {
    std::vector<float> values(idx(rows_ * cols_));
    if (dtype_ == Dtype::kF32) {
      backend_->download(values.data(), buffer_->data(), values.size() * sizeof(float));
      return values;
    }
    std::vector<uint16_t> bits(values.size());
    backend_->download(bits.data(), buffer_->data(), bits.size() * sizeof(uint16_t));
    for (size_t i = 0; i < values.size(); ++i) values[i] = bf16_to_f32(bits[i]);
    return values;
  }
  // What was handed in, as the device has it.
  const std::vector<float>& host() const { return host_; }
  Tensor tensor() const { return Tensor(buffer_->data(), dtype_, rows_, cols_); }
  void* data() const { return buffer_->data(); }

 private:
  Backend* backend_;
  Dtype dtype_;
  int64_t rows_, cols_;
  std::unique_ptr<Buffer> buffer_;
  std::vector<float> host_;
};

// ||got - expected|| / ||expected||; infinite when something is not a number.
inline double relative_error(const std::vector<float>& got, const Doubles& expected) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double d = static_cast<double>(got[i]) - expected[i];
    if (!std::isfinite(d)) return std::numeric_limits<double>::infinity();
    difference += d * d;
    size += expected[i] * expected[i];
  }
  return size > 0 ? std::sqrt(difference / size) : std::sqrt(difference);
}

// bf16 keeps 8 bits: a rounding is at most 2^-9 of a number, and a few of them add up.
inline double tolerance(Dtype dtype) { return dtype == Dtype::kBF16 ? 8e-3 : 1e-5; }

// Whether a row of a product has the same bits in any batch. A library may choose another algorithm for
// another number of rows.
inline bool rows_are_exact() {
#ifdef DN_CUDA_EMULATOR
  return true;
#else
  return cuda_products().rfind("own kernels", 0) == 0;
#endif
}

inline const char* dtype_name(Dtype dtype) { return dtype == Dtype::kBF16 ? "bf16" : "fp32"; }

inline void check_error(const char* file, int line, const std::vector<float>& got, const Doubles& expected,
                        double allowed, const std::string& what) {
  const double error = relative_error(got, expected);
  if (!(error <= allowed))
    dn::test::fail(
        file, line,
        what + ": relative error " + std::to_string(error) + ", allowed " + std::to_string(allowed));
}
#define CHECK_ERROR(got, expected, allowed, what) \
  check_error(__FILE__, __LINE__, got, expected, allowed, what)

}  // namespace dn::cuda_test
