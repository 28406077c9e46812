// What a model's parameters are and where they lie: the table of names, shapes and offsets, the
// configurations it can be made of, the memory of a model with the room that packing needs, and views of it.
// Their values: params.cpp.

#include <algorithm>
#include <cstdio>

#include "core/error.h"
#include "core/model.h"
#include "core/workspace.h"

namespace dn {
namespace {

// Far above any GPT-2, and low enough that no product of sizes leaves int64.
constexpr int32_t kMaxLayers = 1024;
constexpr int32_t kMaxChannels = 1 << 16;
constexpr int32_t kMaxContext = 1 << 20;
constexpr int32_t kMaxVocab = 3 << 20;  // of a row, 8 bytes per 256 ids fit a GPU block's shared memory

constexpr int64_t kOffsetStep = 16;  // elements: every parameter starts on a 64-byte line

void check_field(const char* name, int32_t value, int32_t most) {
  if (value < 1 || value > most) {
    throw Error(Code::kArgument, std::string("model config: ") + name + " is " + std::to_string(value) +
                                     ", expected 1 to " + std::to_string(most));
  }
}

int64_t round_up(int64_t n) { return (n + kOffsetStep - 1) / kOffsetStep * kOffsetStep; }

}  // namespace

void check_config(const ModelConfig& config) {
  check_field("layers", config.layers, kMaxLayers);
  check_field("channels", config.channels, kMaxChannels);
  check_field("heads", config.heads, kMaxChannels);
  check_field("context", config.context, kMaxContext);
  check_field("vocab", config.vocab, kMaxVocab);
  if (config.channels % config.heads != 0) {
    throw Error(Code::kArgument, "model config: channels is " + std::to_string(config.channels) +
                                     ", expected a multiple of heads = " + std::to_string(config.heads));
  }
}

std::unique_ptr<Buffer> alloc_for(Backend& backend, size_t bytes, const std::string& what) {
  try {
    return backend.alloc(bytes);
  } catch (const Error& e) {
    if (e.code() != Code::kOutOfMemory) throw;
    throw Error(Code::kOutOfMemory,
                "out of memory: " + std::to_string(bytes) + " bytes for " + what + " (" + e.what() + ")");
  }
}

void require_memory(Backend& backend, size_t bytes, const std::string& what, const std::string& advice) {
  if (bytes == 0) return;
  const size_t free = backend.free_bytes();
  if (bytes <= free) return;
  const auto amount = [](size_t n) {
    char text[32];
    if (n < size_t{10} << 20) return std::to_string(n) + " bytes";
    std::snprintf(text, sizeof text, "%.1f MiB", static_cast<double>(n) / 1048576.0);
    return std::string(text);
  };
  throw Error(Code::kOutOfMemory, "out of memory: " + what + " needs about " + amount(bytes) + " more on " +
                                      backend.name() + ", which has " + amount(free) + " free; " + advice);
}

const Parameter& parameter_at(const std::vector<Parameter>& table, size_t index) {
  if (index >= table.size()) {
    throw Error(Code::kArgument, "parameter " + std::to_string(index) + " is outside the model's " +
                                     std::to_string(table.size()) + " parameters");
  }
  return table[index];
}

std::vector<Parameter> make_parameter_table(const ModelConfig& config) {
  check_config(config);
  std::vector<Parameter> table;
  int64_t offset = 0;
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    Parameter p;
    p.name = name;
    p.count = 1;
    for (const int64_t size : shape) p.count *= size;
    p.is_matrix = shape.size() == 2;
    p.shape = std::move(shape);
    p.offset = offset;
    offset += round_up(p.count);
    table.push_back(std::move(p));
  };
  const int64_t C = config.channels;
  add("wte.weight", {config.vocab, C});
  add("wpe.weight", {config.context, C});
  for (int32_t layer = 0; layer < config.layers; ++layer) {
    const std::string h = "h." + std::to_string(layer) + ".";
    add(h + "ln_1.weight", {C});
    add(h + "ln_1.bias", {C});
    add(h + "attn.c_attn.weight", {C, 3 * C});
    add(h + "attn.c_attn.bias", {3 * C});
    add(h + "attn.c_proj.weight", {C, C});
    add(h + "attn.c_proj.bias", {C});
    add(h + "ln_2.weight", {C});
    add(h + "ln_2.bias", {C});
    add(h + "mlp.c_fc.weight", {C, 4 * C});
    add(h + "mlp.c_fc.bias", {4 * C});
    add(h + "mlp.c_proj.weight", {4 * C, C});
    add(h + "mlp.c_proj.bias", {C});
  }
  add("ln_f.weight", {C});
  add("ln_f.bias", {C});
  return table;
}

Model::Model(std::unique_ptr<Backend> backend, const ModelConfig& config, Dtype weights)
    : config_(config),
      weights_(weights),
      backend_(std::move(backend)),
      parameters_(make_parameter_table(config)),
      workspace_(std::make_unique<Workspace>()) {
  if (weights != Dtype::kF32 && weights != Dtype::kBF16 && weights != Dtype::kI8) {
    throw Error(Code::kArgument, "weights can be held as fp32, bf16 or int8 only");
  }
  if (weights == Dtype::kBF16 && !backend_->host_memory()) {
    throw Error(Code::kArgument, "weights are fp32 on " + backend_->name() + ", bf16 ones are for the CPU");
  }
  // The table's offsets know nothing of the backend; here they get the room that its packed layout needs.
  int64_t total = 0, count = 0;  // fp32 words, numbers
  for (size_t i = 0; i < parameters_.size(); ++i) {
    parameters_[i].offset = total;
    total += round_up(room(i));
    count += parameters_[i].count;
  }
  const size_t bytes = static_cast<size_t>(total) * sizeof(float);
  require_memory(*backend_, bytes + backend_->parameter_bytes(bytes),
                 "a model of " + std::to_string(count) + " parameters",
                 "use a smaller model, or dispose of others");
  storage_ = alloc_for(*backend_, bytes, "the parameters");
  // Zeros are the packed form of zeros. Starting packed, a loader's set_parameter packs straight from its
  // file, with no plain copy in between.
  packed_ = true;
}

Model::~Model() = default;

size_t Model::find_parameter(const std::string& name) const {
  for (size_t i = 0; i < parameters_.size(); ++i) {
    if (parameters_[i].name == name) return i;
  }
  throw Error(Code::kArgument, "the model has no parameter named '" + name + "'; names look like '" +
                                   parameters_[block_parameter(0, kAttnWeight)].name + "'");
}

int64_t Model::room(size_t index) const {
  const Parameter& p = parameters_[index];
  if (!is_packable(index, p)) return p.count;
  if (is_int8(index)) {
    return static_cast<int64_t>(backend_->int8_bytes(weight_k(index, p), weight_n(index, p)) / sizeof(float));
  }
  const int64_t elements =
      backend_->packed_elements(weight_k(index, p), weight_n(index, p), packed_type(index));
  if (weights_ == Dtype::kBF16) return (elements + 1) / 2;
  return std::max(p.count, elements);
}

int64_t Model::largest_room() const {
  int64_t most = 0;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    if (is_packable(i, parameters_[i])) most = std::max(most, room(i));
  }
  return most;
}

Tensor Model::tensor(size_t index) const {
  const Parameter& p = parameters_[index];
  return Tensor(static_cast<float*>(storage_->data()) + p.offset, Dtype::kF32, p.is_matrix ? p.shape[0] : 1,
                p.shape.back());
}

Weight Model::plain_weight(size_t index, const void* data) const {
  const Parameter& p = parameters_[index];
  Weight w;
  w.data = data;
  w.order = index == kWte ? WeightOrder::kOutIn : WeightOrder::kInOut;
  w.K = weight_k(index, p);
  w.N = weight_n(index, p);
  return w;
}

Weight Model::weight(size_t index) const {
  Weight w = plain_weight(index, tensor(index).data);
  w.packed = packed_;
  w.dtype = packed_type(index);
  return w;
}

Dtype Model::packed_type(size_t index) const {
  return is_packable(index, parameters_[index]) ? weights_ : Dtype::kF32;
}

Model::Memory Model::memory() const {
  Memory memory;
  memory.parameters = storage_->bytes();
  if (training_) {
    memory.training = training_->gradients->bytes() + training_->m->bytes() + training_->v->bytes();
  }
  memory.workspace =
      workspace_->arena.bytes() + workspace_->logits.bytes() + workspace_->first.memory.bytes();
  return memory;
}

}  // namespace dn
