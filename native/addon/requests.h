// The plain data of a native call, copied out of JavaScript objects on the JavaScript thread and read on a
// pool thread. Shapes: lib/native-types.ts.
#pragma once

#include <napi.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "core/model.h"
#include "core/noise.h"

namespace dn::addon {

struct BatchRequest {
  Batch batch;
  std::vector<int64_t> rows;                     // empty: all
  std::vector<std::shared_ptr<KvCache>> caches;  // keeps them alive during the call
  std::vector<std::vector<uint8_t>> matrices;    // owns the explicit masks
  int64_t row_count() const {
    return rows.empty() ? static_cast<int64_t>(batch.ids.size()) : static_cast<int64_t>(rows.size());
  }
};

struct DenoiseRequest {
  std::vector<DenoiseRow> rows;  // keep and before are typed arrays that the caller keeps alive
  std::vector<int32_t> watch;
  std::vector<int64_t> logit_rows;  // rows kept by the forward whose raw logits are returned too
  Model::DecodeLimits ahead;        // most 1: the one step
};

struct TrainRequest {
  std::vector<int32_t> ids;
  std::vector<int64_t> offsets;
  std::vector<uint8_t> maskable, mask;  // empty: absent
  std::vector<double> t;                // empty: absent
  CleanBatch clean;                     // points into the vectors above
  NoiseOptions noise;
  std::vector<uint8_t> matrix;  // owns noise.mask.matrix
  TrainingOptions options;
  bool backward = false;
};

AttentionMask to_mask(const Napi::Object& object, std::vector<uint8_t>* matrix);
std::shared_ptr<BatchRequest> to_batch(const Napi::Object& object, const Model& model);
std::shared_ptr<DenoiseRequest> to_denoise(const Napi::Object& object, int64_t row_count, int64_t V);
std::shared_ptr<LoopRequest> to_loop(const Napi::Object& object);
std::shared_ptr<TrainRequest> to_train(const Napi::Object& batch, const Napi::Object& noise,
                                       const Napi::Object& options);

}  // namespace dn::addon
