// Conversion of JavaScript batches to core structures; see requests.h.

#include "addon/requests.h"

#include "addon/cache_wrap.h"
#include "addon/convert.h"

namespace dn::addon {

AttentionMask to_mask(const Napi::Object& object, std::vector<uint8_t>* matrix) {
  const Napi::Env env = object.Env();
  const std::string kind = string_field(object, "kind");
  AttentionMask mask;
  if (kind == "full") {
    mask.kind = MaskKind::kFull;
  } else if (kind == "causal") {
    mask.kind = MaskKind::kCausal;
  } else if (kind == "annealed") {
    const double ratio = number_field(object, "ratio");
    mask.kind = ratio >= 1 ? MaskKind::kFull : MaskKind::kAnnealed;
    mask.threshold = annealing_threshold(ratio);
    mask.seed = bigint_field(object, "seed");
    mask.step = static_cast<uint32_t>(int_field(object, "step"));
  } else if (kind == "block-causal" || kind == "block-diffusion") {
    mask.kind = kind == "block-causal" ? MaskKind::kBlockCausal : MaskKind::kBlockDiffusion;
    mask.block = static_cast<int32_t>(int_field(object, "block"));
    expect(env, mask.block > 0, "mask.block is not positive");
    if (mask.kind == MaskKind::kBlockDiffusion) mask.half = static_cast<int32_t>(int_field(object, "half"));
  } else if (kind == "matrix") {
    mask.kind = MaskKind::kMatrix;
    mask.matrix_width = static_cast<int32_t>(int_field(object, "width"));
    *matrix = copy_array<uint8_t, Napi::Uint8Array>(object, "matrix", napi_uint8_array);
    expect(env, static_cast<int64_t>(matrix->size()) == int64_t{mask.matrix_width} * mask.matrix_width,
           "mask.matrix is not width x width");
    mask.matrix = matrix->data();
  } else {
    throw type_error(env, "mask.kind", "a known mask");
  }
  return mask;
}

std::shared_ptr<BatchRequest> to_batch(const Napi::Object& object, const Model& model) {
  const Napi::Env env = object.Env();
  auto request = std::make_shared<BatchRequest>();
  request->batch.ids = int32_field(object, "ids");
  request->batch.positions = int32_field(object, "positions");
  expect(env, request->batch.ids.size() == request->batch.positions.size(),
         "ids and positions differ in length");
  const std::vector<int32_t> offsets = int32_field(object, "offsets");
  const std::vector<int32_t> key_lengths = int32_field(object, "keyLengths");
  const Napi::Value caches_value = object.Get("caches"), masks_value = object.Get("masks");
  expect(env, caches_value.IsArray() && masks_value.IsArray(), "caches and masks are arrays");
  const Napi::Array caches = caches_value.As<Napi::Array>(), masks = masks_value.As<Napi::Array>();
  const size_t S = key_lengths.size();
  expect(env, offsets.size() == S + 1 && caches.Length() == S && masks.Length() == S,
         "offsets, keyLengths, caches and masks disagree on the number of sequences");
  request->matrices.resize(S);
  for (size_t s = 0; s < S; ++s) {
    Sequence sequence;
    sequence.begin = offsets[s];
    sequence.end = offsets[s + 1];
    sequence.k_len = key_lengths[s];
    const Napi::Value cache = caches.Get(static_cast<uint32_t>(s));
    if (!cache.IsNull() && !cache.IsUndefined()) {
      const CacheWrap* wrap = unwrap<CacheWrap>(cache, kCacheTag, "cache");
      expect(env, wrap->cache() != nullptr, "a cache of the batch was disposed");
      expect(env, wrap->model() == &model, "a cache of the batch belongs to another model");
      request->caches.push_back(wrap->cache());
      sequence.cache = request->caches.back().get();
    }
    const Napi::Value mask = masks.Get(static_cast<uint32_t>(s));
    expect(env, mask.IsObject(), "a mask is not an object");
    sequence.mask = to_mask(mask.As<Napi::Object>(), &request->matrices[s]);
    request->batch.sequences.push_back(sequence);
  }
  if (!absent(object, "rows")) {
    for (const int32_t row : int32_field(object, "rows")) request->rows.push_back(row);
    expect(env, !request->rows.empty(), "rows is empty");
  }
  return request;
}

namespace {

// The typed array (V) at index i of a list with an entry for every row, or null.
float* listed_row(const Napi::Object& object, const char* field, size_t i, size_t rows, int64_t V) {
  const Napi::Env env = object.Env();
  const Napi::Value list = object.Get(field);
  expect(env, list.IsArray() && list.As<Napi::Array>().Length() == rows, "a list has no entry for every row");
  const Napi::Value values = list.As<Napi::Array>().Get(static_cast<uint32_t>(i));
  if (values.IsNull()) return nullptr;
  auto array = typed_array<Napi::Float32Array>(values, napi_float32_array, field);
  expect(env, static_cast<int64_t>(array.ElementLength()) == V, "a row to keep has not V numbers");
  return array.Data();
}

}  // namespace

std::shared_ptr<DenoiseRequest> to_denoise(const Napi::Object& object, int64_t row_count, int64_t V) {
  const Napi::Env env = object.Env();
  auto request = std::make_shared<DenoiseRequest>();
  const std::vector<int32_t> row = int32_field(object, "row");
  const std::vector<int32_t> guide_row = int32_field(object, "guideRow");
  const std::vector<float> scales = float32_field(object, "scales");
  const std::vector<int32_t> limits = int32_field(object, "limits");
  const std::vector<uint64_t> seeds = uint64_field(object, "seeds");
  const std::vector<uint32_t> counters = uint32_field(object, "counters");
  request->watch = int32_field(object, "watch");
  const size_t D = row.size();
  expect(env,
         guide_row.size() == D && scales.size() == 3 * D && limits.size() == 3 * D && seeds.size() == D &&
             counters.size() == 2 * D,
         "the arrays of a denoise request disagree on the number of rows");
  request->rows.resize(D);
  for (size_t i = 0; i < D; ++i) {
    DenoiseRow& r = request->rows[i];
    expect(env, row[i] >= 0 && row[i] < row_count && guide_row[i] >= -1 && guide_row[i] < row_count,
           "a denoise row is outside the batch");
    r.row = row[i];
    r.guide_row = guide_row[i];
    r.guidance = scales[3 * i];
    r.temperature = scales[3 * i + 1];
    r.top_p = scales[3 * i + 2];
    r.top_k = limits[3 * i];
    r.banned = limits[3 * i + 1];
    r.banned_end = limits[3 * i + 2];
    r.seed = seeds[i];
    r.step = counters[2 * i];
    r.position = counters[2 * i + 1];
  }
  const bool keeps = !absent(object, "keep");
  for (size_t i = 0; i < D && keeps; ++i) {
    request->rows[i].keep = listed_row(object, "keep", i, D, V);
    request->rows[i].before = listed_row(object, "before", i, D, V);
    expect(env, request->rows[i].keep != nullptr || request->rows[i].before == nullptr,
           "before without keep");
  }
  if (!absent(object, "logitRows")) {
    for (const int32_t listed : int32_field(object, "logitRows")) {
      expect(env, listed >= 0 && listed < row_count, "a row of logitRows is outside the batch");
      request->logit_rows.push_back(listed);
    }
  }
  if (!absent(object, "ahead")) {
    const Napi::Object ahead = object_field(object, "ahead");
    request->ahead.most = int_field(ahead, "most");
    request->ahead.stops = int32_field(ahead, "stops");
  }
  return request;
}

namespace {

LoopSequence to_loop_sequence(const Napi::Object& object) {
  const Napi::Env env = object.Env();
  LoopSequence q;
  std::vector<uint8_t> matrix;
  q.mask = to_mask(object_field(object, "mask"), &matrix);
  expect(env, matrix.empty(), "a mask of the loop is a matrix");
  const std::string sampler = string_field(object, "sampler"), score = string_field(object, "score");
  const std::string plan = string_field(object, "plan");
  if (sampler == "ancestral") {
    q.sampler = LoopSampler::kAncestral;
  } else if (sampler == "confidence") {
    q.sampler = LoopSampler::kConfidence;
  } else if (sampler == "threshold") {
    q.sampler = LoopSampler::kThreshold;
  } else if (sampler == "factor") {
    q.sampler = LoopSampler::kFactor;
  } else if (sampler == "entropy-bound") {
    q.sampler = LoopSampler::kEntropyBound;
  } else {
    throw type_error(env, "sampler", "one that the device runs");
  }
  q.score = score == "margin"    ? LoopScore::kMargin
            : score == "entropy" ? LoopScore::kEntropy
            : score == "random"  ? LoopScore::kRandom
                                 : LoopScore::kProbability;
  q.plan = plan == "linear" ? LoopPlan::kLinear : LoopPlan::kEven;
  q.parameter = number_field(object, "parameter");
  q.temperature = static_cast<float>(number_field(object, "temperature"));
  q.top_p = static_cast<float>(number_field(object, "topP"));
  q.top_k = static_cast<int32_t>(int_field(object, "topK"));
  q.banned = static_cast<int32_t>(int_field(object, "banned"));
  q.banned_end = static_cast<int32_t>(int_field(object, "bannedEnd"));
  q.seed = bigint_field(object, "seed");
  q.shift = static_cast<int32_t>(int_field(object, "shift"));
  q.step = static_cast<uint32_t>(int_field(object, "step"));
  q.block_step = static_cast<int32_t>(int_field(object, "blockStep"));
  q.initial_open = static_cast<int32_t>(int_field(object, "initialOpen"));
  q.window_begin = static_cast<int32_t>(int_field(object, "windowBegin"));
  q.window_end = static_cast<int32_t>(int_field(object, "windowEnd"));
  return q;
}

}  // namespace

std::shared_ptr<LoopRequest> to_loop(const Napi::Object& object) {
  const Napi::Env env = object.Env();
  auto request = std::make_shared<LoopRequest>();
  request->ids = int32_field(object, "ids");
  request->open = copy_array<uint8_t, Napi::Uint8Array>(object, "open", napi_uint8_array);
  request->steps = static_cast<int32_t>(int_field(object, "steps"));
  const std::vector<int32_t> offsets = int32_field(object, "offsets"),
                             windows = int32_field(object, "windows");
  expect(env, windows.size() % 3 == 0, "windows are not triples");
  for (size_t w = 0; w < windows.size(); w += 3)
    request->windows.push_back({windows[w], windows[w + 1], windows[w + 2]});
  const Napi::Value sequences_value = object.Get("sequences");
  expect(env, sequences_value.IsArray(), "sequences is an array");
  const Napi::Array sequences = sequences_value.As<Napi::Array>();
  expect(env, offsets.size() == size_t{sequences.Length()} + 1,
         "offsets and sequences disagree on the number of sequences");
  for (uint32_t s = 0; s < sequences.Length(); ++s) {
    const Napi::Value sequence = sequences.Get(s);
    expect(env, sequence.IsObject(), "a sequence is not an object");
    request->sequences.push_back(to_loop_sequence(sequence.As<Napi::Object>()));
    request->sequences.back().begin = offsets[s];
    request->sequences.back().end = offsets[s + 1];
  }
  return request;
}

namespace {

NoiseOptions to_noise(const Napi::Object& object, std::vector<uint8_t>* matrix) {
  const Napi::Env env = object.Env();
  NoiseOptions noise;
  const std::string objective = string_field(object, "objective");
  noise.objective = objective == "autoregressive"    ? Objective::kAutoregressive
                    : objective == "block-diffusion" ? Objective::kBlockDiffusion
                                                     : Objective::kDiffusion;
  const std::string sampler = string_field(object, "timeSampler");
  noise.time_sampler = sampler == "stratified"    ? TimeSampler::kStratified
                       : sampler == "exact-count" ? TimeSampler::kExactCount
                                                  : TimeSampler::kUniform;
  const std::string normalise = string_field(object, "normalise");
  noise.normalise = normalise == "masked"   ? Normalise::kMasked
                    : normalise == "answer" ? Normalise::kAnswer
                                            : Normalise::kTokens;
  noise.weighted = bool_field(object, "weighted");
  noise.shift = bool_field(object, "shift");
  noise.mask_id = static_cast<int32_t>(int_field(object, "maskId"));
  noise.t_min = number_field(object, "tMin");
  noise.t_max = number_field(object, "tMax");
  noise.block = static_cast<int32_t>(int_field(object, "block"));
  noise.seed = bigint_field(object, "seed");
  noise.step = static_cast<uint32_t>(int_field(object, "step"));
  noise.mask = to_mask(object_field(object, "attention"), matrix);
  if (!absent(object, "spindleInformation"))
    noise.spindle_information = float32_field(object, "spindleInformation");
  noise.spindle_lambda = number_field(object, "spindleLambda");
  expect(env, noise.block >= 0, "noise.block is negative");
  return noise;
}

}  // namespace

std::shared_ptr<TrainRequest> to_train(const Napi::Object& batch, const Napi::Object& noise,
                                       const Napi::Object& options) {
  const Napi::Env env = batch.Env();
  auto request = std::make_shared<TrainRequest>();
  request->ids = int32_field(batch, "ids");
  for (const int32_t offset : int32_field(batch, "offsets")) request->offsets.push_back(offset);
  const auto N = request->ids.size();
  expect(env,
         !request->offsets.empty() && request->offsets.front() == 0 &&
             request->offsets.back() == static_cast<int64_t>(N),
         "offsets do not cover ids");
  for (size_t s = 1; s < request->offsets.size(); ++s) {
    expect(env, request->offsets[s] >= request->offsets[s - 1], "offsets decrease");
  }
  const auto S = request->offsets.size() - 1;
  if (!absent(batch, "maskable"))
    request->maskable = copy_array<uint8_t, Napi::Uint8Array>(batch, "maskable", napi_uint8_array);
  if (!absent(batch, "mask"))
    request->mask = copy_array<uint8_t, Napi::Uint8Array>(batch, "mask", napi_uint8_array);
  if (!absent(batch, "t"))
    request->t = copy_array<double, Napi::Float64Array>(batch, "t", napi_float64_array);
  expect(env,
         (request->maskable.empty() || request->maskable.size() == N) &&
             (request->mask.empty() || request->mask.size() == N),
         "maskable or mask differs from ids in length");
  expect(env, request->t.empty() || request->t.size() == S, "t does not hold one time per sequence");
  CleanBatch& clean = request->clean;
  clean.ids = request->ids.data();
  clean.offsets = request->offsets.data();
  clean.S = static_cast<int64_t>(S);
  clean.maskable = request->maskable.empty() ? nullptr : request->maskable.data();
  clean.mask = request->mask.empty() ? nullptr : request->mask.data();
  clean.t = request->t.empty() ? nullptr : request->t.data();
  clean.first_sequence = int_field(batch, "firstSequence");
  clean.step_sequences = int_field(batch, "stepSequences");
  request->noise = to_noise(noise, &request->matrix);
  request->options.recompute = bool_field(options, "recompute");
  request->options.precision =
      string_field(options, "precision") == "bf16" ? MatmulPrecision::kBF16 : MatmulPrecision::kFP32;
  request->backward = bool_field(options, "backward");
  return request;
}

}  // namespace dn::addon
