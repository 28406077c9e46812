// The values of a model's parameters: GPT-2's initialisation, and access whether they are stored plainly or
// packed for inference, as fp32, bf16 or int8. There is one copy of the weights at any time; packing and
// unpacking work in place, with a temporary of the size of the largest matrix.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "core/error.h"
#include "core/half.h"
#include "core/model.h"
#include "core/rng.h"
#include "core/workspace.h"

namespace dn {
namespace {

// Four standard normal numbers of a counter: Box-Muller on (0, 1] x [0, 1), in double so that a seed gives
// the same floats whatever the mathematics library.
void normal4(uint64_t seed, uint32_t parameter, uint64_t index, double out[4]) {
  constexpr double kTwoPi = 6.283185307179586476925;
  constexpr double kScale = 1.0 / 4294967296.0;
  const Philox4 r = philox(seed, Stream::kInit, parameter, index);
  for (int pair = 0; pair < 2; ++pair) {
    const double radius = std::sqrt(-2.0 * std::log((r.v[2 * pair] + 1.0) * kScale));
    const double angle = kTwoPi * (r.v[2 * pair + 1] * kScale);
    out[2 * pair] = radius * std::cos(angle);
    out[2 * pair + 1] = radius * std::sin(angle);
  }
}

bool ends_with(const std::string& s, const char* end) {
  const size_t n = std::strlen(end);
  return s.size() >= n && s.compare(s.size() - n, n, end) == 0;
}

}  // namespace

void Model::initialise(uint64_t seed) {
  hidden_ = Tensor();
  if (weights_ == Dtype::kF32) {
    // Everything is overwritten, so a packed model simply becomes a plain one.
    backend_->zero(storage_->data(), storage_->bytes());
    packed_ = false;
  }
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const Parameter& p = parameters_[i];
    const bool is_residual = ends_with(p.name, "c_proj.weight");
    const double std_dev = is_residual ? 0.02 / std::sqrt(2.0 * config_.layers) : 0.02;
    const float constant = ends_with(p.name, "bias") ? 0.0f : 1.0f;
    set_parameter(i, [&](int64_t begin, int64_t count, float* out) {
      if (!p.is_matrix) {
        std::fill(out, out + count, constant);
        return;
      }
      double z[4];
      for (int64_t e = 0; e < count; ++e) {
        const int64_t at = begin + e;
        if (e == 0 || at % 4 == 0) {
          normal4(seed, static_cast<uint32_t>(i), static_cast<uint64_t>(at / 4), z);
        }
        out[e] = static_cast<float>(z[at % 4] * std_dev);
      }
    });
  }
}

void Model::get_parameter(size_t index, float* out) {
  const Parameter& p = parameter_at(parameters_, index);
  const size_t bytes = static_cast<size_t>(p.count) * sizeof(float);
  if (is_int8(index)) {
    HostTemporary values(*backend_, static_cast<size_t>(p.count), "unpacking " + p.name);
    std::vector<float> scales(static_cast<size_t>(weight_n(index, p)));
    const Int8Matrix matrix = int8_matrix(index, values.as<int8_t>(), scales.data());
    backend_->unpack_int8(matrix, tensor(index).data);
    dequantise(out, matrix);
  } else if (!packed_ || !is_packable(index, p)) {
    backend_->download(out, tensor(index).data, bytes);
  } else if (backend_->host_memory()) {
    backend_->unpack_weight(out, weight(index));
  } else {
    const auto plain = alloc_for(*backend_, bytes, "unpacking " + p.name);
    backend_->unpack_weight(plain->data(), weight(index));
    backend_->download(out, plain->data(), bytes);
  }
}

void Model::set_parameter(size_t index, const float* values) {
  const Parameter& p = parameter_at(parameters_, index);
  forget_first_block();
  const size_t bytes = static_cast<size_t>(p.count) * sizeof(float);
  if (is_int8(index)) {
    set_int8_columns(index, 0, weight_n(index, p), values);
  } else if (!packed_ || !is_packable(index, p)) {
    backend_->upload(tensor(index).data, values, bytes);
  } else if (backend_->host_memory()) {
    require_held(index, 0, p.count, values);
    backend_->pack_weight(tensor(index).data, plain_weight(index, values), packed_type(index));
  } else {
    const auto plain = alloc_for(*backend_, bytes, "packing " + p.name);
    backend_->upload(plain->data(), values, bytes);
    backend_->pack_weight(tensor(index).data, plain_weight(index, plain->data()), Dtype::kF32);
  }
}

// In pieces that stay in a cache and need little memory of their own, wherever the stored form allows: a
// matrix is packed by rows, and quantised by those of wte, which are columns of the head's weight. Other
// matrices that are quantised, or packed on a device, need all of themselves.
void Model::set_parameter(size_t index, const ReadValues& read) {
  const Parameter& p = parameter_at(parameters_, index);
  forget_first_block();
  constexpr int64_t kChunk = int64_t{1} << 18;  // elements at a time
  const bool quantised = is_int8(index) && index == kWte;
  const bool packed = packed_ && is_packable(index, p) && !is_int8(index);
  const bool plain = !is_int8(index) && !packed;
  const bool by_rows = quantised || (packed && backend_->host_memory());
  const int64_t row = by_rows ? p.shape.back() : 1;
  const int64_t step = by_rows ? std::max(kPackRows, kChunk / row / kPackRows * kPackRows) * row
                       : plain ? kChunk
                               : p.count;
  HostTemporary memory(*backend_, static_cast<size_t>(std::min(step, p.count)) * sizeof(float),
                       "reading " + p.name);
  float* const values = memory.as<float>();
  for (int64_t begin = 0; begin < p.count; begin += step) {
    const int64_t count = std::min(step, p.count - begin);
    read(begin, count, values);
    if (quantised) {
      set_int8_columns(index, begin / row, count / row, values);
    } else if (by_rows) {
      require_held(index, begin, count, values);
      backend_->pack_rows(tensor(index).data, plain_weight(index, nullptr), values, begin / row, count / row,
                          packed_type(index));
    } else if (plain) {
      backend_->upload(static_cast<float*>(tensor(index).data) + begin, values,
                       static_cast<size_t>(count) * sizeof(float));
    } else {
      set_parameter(index, values);
    }
  }
}

bool Model::is_int8(size_t index) const { return packed_type(index) == Dtype::kI8; }

void Model::require_held(size_t index, int64_t begin, int64_t count, const float* values) const {
  if (packed_type(index) != Dtype::kBF16) return;
  int lost = 0;
  for (int64_t i = 0; i < count; ++i) lost |= !is_finite_bf16(f32_to_bf16(values[i]));
  for (int64_t i = 0; lost && i < count; ++i) {
    if (is_finite_bf16(f32_to_bf16(values[i]))) continue;
    char value[32];
    std::snprintf(value, sizeof value, "%g", static_cast<double>(values[i]));
    throw Error(Code::kArgument, "parameter " + parameters_[index].name + ": the value " + value +
                                     " at index " + std::to_string(begin + i) +
                                     " is not finite in bf16 and cannot be held so");
  }
}

Int8Matrix Model::int8_matrix(size_t index, int8_t* values, float* scales) const {
  const Weight w = plain_weight(index, nullptr);
  return {values, scales, w.order, w.K, w.N};
}

void Model::set_int8_columns(size_t index, int64_t n_begin, int64_t N, const float* values) {
  const int64_t K = weight_k(index, parameters_[index]);
  HostTemporary quantised(*backend_, static_cast<size_t>(K * N), "quantising " + parameters_[index].name);
  std::vector<float> scales(static_cast<size_t>(N));
  Int8Matrix matrix = int8_matrix(index, quantised.as<int8_t>(), scales.data());
  matrix.N = N;
  if (!quantise(matrix, values)) {
    throw Error(Code::kArgument, "parameter " + parameters_[index].name +
                                     ": a value is not finite and cannot be held as int8");
  }
  backend_->pack_int8(tensor(index).data, matrix, n_begin);
}

int64_t Model::int8_columns(size_t index) const {
  const Parameter& p = parameter_at(parameters_, index);
  if (!is_packable(index, p)) {
    throw Error(Code::kArgument, "parameter " + p.name + " is never held as int8");
  }
  return weight_n(index, p);
}

void Model::get_int8(size_t index, int8_t* values, float* scales) {
  int8_columns(index);
  const Int8Matrix matrix = int8_matrix(index, values, scales);
  if (is_int8(index)) return backend_->unpack_int8(matrix, tensor(index).data);
  const Parameter& p = parameters_[index];
  HostTemporary plain(*backend_, static_cast<size_t>(p.count) * sizeof(float), "quantising " + p.name);
  get_parameter(index, plain.as<float>());
  if (!quantise(matrix, plain.as<float>())) {
    throw Error(Code::kArgument, "parameter " + parameters_[index].name +
                                     ": a value is not finite and cannot be held as int8");
  }
}

void Model::set_int8(size_t index, const int8_t* values, const float* scales) {
  int8_columns(index);
  forget_first_block();
  // Only read: the matrix type serves both directions.
  const Int8Matrix matrix = int8_matrix(index, const_cast<int8_t*>(values), const_cast<float*>(scales));
  if (is_int8(index)) return backend_->pack_int8(tensor(index).data, matrix, 0);
  const Parameter& p = parameters_[index];
  HostTemporary plain(*backend_, static_cast<size_t>(p.count) * sizeof(float), "widening " + p.name);
  dequantise(plain.as<float>(), matrix);
  set_parameter(index, plain.as<float>());
}

void Model::prepare_inference() {
  if (packed_ || training_) return;
  int64_t most = 0;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    if (is_packable(i, parameters_[i])) most = std::max(most, parameters_[i].count);
  }
  const auto plain = alloc_for(*backend_, static_cast<size_t>(most) * sizeof(float), "packing the weights");
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const Parameter& p = parameters_[i];
    if (!is_packable(i, p)) continue;
    void* place = tensor(i).data;
    backend_->copy(Tensor(plain->data(), Dtype::kF32, 1, p.count), Tensor(place, Dtype::kF32, 1, p.count));
    backend_->pack_weight(place, plain_weight(i, plain->data()), Dtype::kF32);
  }
  packed_ = true;
  backend_->synchronize();  // `plain` is about to be freed
}

// Back to plain storage. What packing used beyond a parameter's own elements is zeroed: gradients, moments
// and the optimiser treat the gaps between parameters as parameters that are always zero.
void Model::unpack() {
  if (!packed_) return;
  const auto packed =
      alloc_for(*backend_, static_cast<size_t>(largest_room()) * sizeof(float), "unpacking the weights");
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const Parameter& p = parameters_[i];
    if (!is_packable(i, p)) continue;
    float* place = static_cast<float*>(tensor(i).data);
    backend_->copy(Tensor(packed->data(), Dtype::kF32, 1, room(i)), Tensor(place, Dtype::kF32, 1, room(i)));
    Weight w = plain_weight(i, packed->data());
    w.packed = true;
    backend_->unpack_weight(place, w);
    backend_->zero(place + p.count, static_cast<size_t>(room(i) - p.count) * sizeof(float));
  }
  packed_ = false;
  backend_->synchronize();
}

}  // namespace dn
