// Registration of the addon and the calls that belong to no object. The JavaScript side of this file is
// lib/native-types.ts.

#include <napi.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "addon/cache_wrap.h"
#include "addon/model_wrap.h"
#include "addon/safetensors_wrap.h"
#include "addon/state.h"
#include "core/rng.h"
#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace dn::addon {
namespace {

template <auto kCall>
auto coded(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] { return kCall(info); });
}

Napi::Value create_model(const Napi::CallbackInfo& info) {
  return state_of(info.Env())->model_class.New({info[0], info[1]});
}

Napi::Value open_safetensors(const Napi::CallbackInfo& info) {
  return state_of(info.Env())->file_class.New({info[0]});
}

// One tensor to write: values of its own, or a parameter (or moment) of a model, read on the pool thread.
struct Source {
  SafetensorsWriter::Declaration declaration;
  std::vector<float> values;
  ModelWrap* wrap = nullptr;
  Model* model = nullptr;
  size_t parameter = 0;
  std::string kind;
};

Source to_source(const Napi::Object& item, std::vector<Napi::ObjectReference>* keep) {
  const Napi::Env env = item.Env();
  Source source;
  source.declaration.name = string_field(item, "name");
  const std::string dtype = string_field(item, "dtype");
  expect(env, dtype == "F32" || dtype == "F16" || dtype == "BF16" || dtype == "I8",
         "dtype is not F32, F16, BF16 or I8");
  source.declaration.dtype = dtype == "F32"   ? Dtype::kF32
                             : dtype == "F16" ? Dtype::kF16
                             : dtype == "I8"  ? Dtype::kI8
                                              : Dtype::kBF16;
  const Napi::Value shape = item.Get("shape");
  expect(env, shape.IsArray(), "shape is not an array");
  int64_t count = 1;
  for (uint32_t d = 0; d < shape.As<Napi::Array>().Length(); ++d) {
    source.declaration.shape.push_back(shape.As<Napi::Array>().Get(d).As<Napi::Number>().Int64Value());
    count *= source.declaration.shape.back();
  }
  const Napi::Object from = object_field(item, "source");
  if (from.Has("values")) {
    source.values = float32_field(from, "values");
    expect(env, static_cast<int64_t>(source.values.size()) == count, "values do not fill the shape");
    return source;
  }
  const Napi::Object model = object_field(from, "model");
  source.wrap = unwrap<ModelWrap>(model, kModelTag, "model");
  source.model = &source.wrap->idle(env);
  source.parameter = source.model->find_parameter(string_field(from, "parameter"));
  source.kind = string_field(from, "kind");
  expect(env, (source.kind == "int8") == (dtype == "I8"), "kind int8 goes with dtype I8");
  const int64_t expected = source.kind == "scale" ? source.model->int8_columns(source.parameter)
                                                  : source.model->parameters()[source.parameter].count;
  expect(env, expected == count, "the shape is not the parameter's");
  keep->push_back(Napi::Persistent(model));
  return source;
}

void read_source(const Source& source, std::vector<float>* values) {
  values->resize(static_cast<size_t>(source.model->parameters()[source.parameter].count));
  if (source.kind == "value") {
    source.model->get_parameter(source.parameter, values->data());
  } else {
    const auto which = source.kind == "moment1" ? Model::Moment::kFirst : Model::Moment::kSecond;
    source.model->get_moment(source.parameter, which, values->data());
  }
}

// Writes a model's tensors one after the other. The scales of an int8 tensor come right after its values,
// from the same quantisation.
class SourceWriter {
 public:
  explicit SourceWriter(SafetensorsWriter& writer) : writer_(writer) {}
  void write(const Source& source) {
    if (!source.model) return write(source.values);
    if (source.kind == "int8") {
      const size_t columns = static_cast<size_t>(source.model->int8_columns(source.parameter));
      quantised_.resize(static_cast<size_t>(source.model->parameters()[source.parameter].count));
      scales_.resize(columns);
      source.model->get_int8(source.parameter, quantised_.data(), scales_.data());
      last_ = &source;
      return writer_.write_int8(quantised_.data(), static_cast<int64_t>(quantised_.size()));
    }
    if (source.kind == "scale") {
      if (!last_ || last_->model != source.model || last_->parameter != source.parameter) {
        throw Error(Code::kInternal,
                    "the scales of " + source.declaration.name + " do not follow its values");
      }
      return write(scales_);
    }
    read_source(source, &buffer_);
    write(buffer_);
  }

 private:
  void write(const std::vector<float>& values) {
    writer_.write(values.data(), static_cast<int64_t>(values.size()));
  }

  SafetensorsWriter& writer_;
  std::vector<float> buffer_, scales_;
  std::vector<int8_t> quantised_;
  const Source* last_ = nullptr;  // the int8 tensor written last
};

Napi::Value write_safetensors(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  expect(env, info.Length() == 3 && info[0].IsString() && info[1].IsArray() && info[2].IsObject(),
         "writeSafetensors takes a path, tensors and metadata");
  const std::string path = info[0].As<Napi::String>().Utf8Value();
  auto sources = std::make_shared<std::vector<Source>>();
  auto metadata = std::make_shared<std::map<std::string, std::string>>();
  std::vector<Napi::ObjectReference> keep;
  const Napi::Array list = info[1].As<Napi::Array>();
  for (uint32_t i = 0; i < list.Length(); ++i) {
    expect(env, list.Get(i).IsObject(), "a tensor to write is not an object");
    sources->push_back(to_source(list.Get(i).As<Napi::Object>(), &keep));
  }
  const Napi::Object extra = info[2].As<Napi::Object>();
  const Napi::Array keys = extra.GetPropertyNames();
  for (uint32_t i = 0; i < keys.Length(); ++i) {
    const std::string key = keys.Get(i).As<Napi::String>().Utf8Value();
    (*metadata)[key] = string_field(extra, key.c_str());
  }
  const Napi::Promise promise = Task::start(
      env, std::move(keep),
      [path, sources, metadata] {
        std::vector<SafetensorsWriter::Declaration> declarations;
        for (const Source& source : *sources) declarations.push_back(source.declaration);
        SafetensorsWriter writer(path, std::move(declarations), *metadata);
        SourceWriter tensors(writer);
        for (const Source& source : *sources) tensors.write(source);
        writer.commit();
      },
      [sources](Napi::Env) {
        for (const Source& source : *sources) {
          if (source.wrap) source.wrap->release_hold();
        }
      },
      [](Napi::Env e) { return e.Undefined(); });
  for (const Source& source : *sources) {
    if (source.wrap) source.wrap->hold();
  }
  return promise;
}

Napi::Value philox_words(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  expect(env, info.Length() == 4 && info[1].IsNumber() && info[2].IsNumber(),
         "philox takes seed, stream, step and index");
  const Philox4 words =
      philox(bigint_value(info[0], "seed"), static_cast<Stream>(info[1].As<Napi::Number>().Uint32Value()),
             info[2].As<Napi::Number>().Uint32Value(), bigint_value(info[3], "index"));
  return to_array<Napi::Uint32Array>(env, std::vector<uint32_t>(words.v, words.v + 4));
}

Napi::Value cpu_info(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Napi::Object result = Napi::Object::New(env);
  result.Set("isa", cpu::isa_name(cpu::active_isa()));
  result.Set("detected", cpu::isa_name(cpu::detected_isa()));
  result.Set("fp32", cpu::active_fp32());
  result.Set("bf16", cpu::active_bf16());
  result.Set("int8", cpu::active_int8());
  result.Set("threads", cpu::available_threads());
  return result;
}

Napi::Value cuda_info(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Napi::Object result = Napi::Object::New(env);
#ifdef DN_WITH_CUDA
  result.Set("compiled", true);
#else
  result.Set("compiled", false);
#endif
  std::string reason;
  const std::vector<CudaDevice> devices = cuda_devices(&reason);
  const Napi::Array list = Napi::Array::New(env, devices.size());
  for (size_t i = 0; i < devices.size(); ++i) {
    Napi::Object device = Napi::Object::New(env);
    device.Set("name", devices[i].name);
    device.Set("memory", static_cast<double>(devices[i].memory));
    device.Set("capability", devices[i].capability);
    list.Set(static_cast<uint32_t>(i), device);
  }
  result.Set("devices", list);
  if (const std::string products = cuda_products(); !products.empty()) result.Set("products", products);
  if (devices.empty()) result.Set("reason", reason);
  return result;
}

Napi::Value external_memory(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), static_cast<double>(state_of(info.Env())->external_memory));
}

void detach(const Napi::CallbackInfo& info) {
  expect(info.Env(), info.Length() == 1 && info[0].IsArrayBuffer(), "detach takes an ArrayBuffer");
  Napi::ArrayBuffer buffer = info[0].As<Napi::ArrayBuffer>();
  if (!buffer.IsDetached()) buffer.Detach();
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
  auto* state = new SharedState(std::make_shared<State>());
  (*state)->model_class = Napi::Persistent(ModelWrap::define(env));
  (*state)->cache_class = Napi::Persistent(CacheWrap::define(env));
  (*state)->file_class = Napi::Persistent(SafetensorsWrap::define(env));
  // The references die with the environment; a state kept alive by a late finalizer must not delete them
  // again.
  (*state)->model_class.SuppressDestruct();
  (*state)->cache_class.SuppressDestruct();
  (*state)->file_class.SuppressDestruct();
  env.SetInstanceData<SharedState>(state);
  exports.Set("createModel", Napi::Function::New<coded<create_model>>(env));
  exports.Set("openSafetensors", Napi::Function::New<coded<open_safetensors>>(env));
  exports.Set("writeSafetensors", Napi::Function::New<coded<write_safetensors>>(env));
  exports.Set("philox", Napi::Function::New<coded<philox_words>>(env));
  exports.Set("cpuInfo", Napi::Function::New<coded<cpu_info>>(env));
  exports.Set("cudaInfo", Napi::Function::New<coded<cuda_info>>(env));
  exports.Set("detach", Napi::Function::New<coded<detach>>(env));
  exports.Set("externalMemory", Napi::Function::New<coded<external_memory>>(env));
  return exports;
}

}  // namespace
}  // namespace dn::addon

static Napi::Object register_addon(Napi::Env env, Napi::Object exports) {
  return dn::addon::init(env, exports);
}

NODE_API_MODULE(diffusion_native, register_addon)
