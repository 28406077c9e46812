// NativeModel's methods for single parameters, their gradients and moments; see model_wrap.h and
// lib/native-types.ts.

#include "addon/convert.h"
#include "addon/model_wrap.h"
#include "addon/safetensors_wrap.h"
#include "core/parameter_file.h"

namespace dn::addon {
namespace {

Model::Moment to_moment(Napi::Env env, const std::string& which) {
  expect(env, which == "moment1" || which == "moment2", "a moment is moment1 or moment2");
  return which == "moment1" ? Model::Moment::kFirst : Model::Moment::kSecond;
}

}  // namespace

Napi::Value ModelWrap::parameters(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const std::vector<Parameter>& table = model(env).parameters();
  Napi::Array list = Napi::Array::New(env, table.size());
  for (size_t i = 0; i < table.size(); ++i) {
    Napi::Object item = Napi::Object::New(env);
    Napi::Array shape = Napi::Array::New(env, table[i].shape.size());
    for (size_t d = 0; d < table[i].shape.size(); ++d) {
      shape.Set(static_cast<uint32_t>(d), Napi::Number::New(env, static_cast<double>(table[i].shape[d])));
    }
    item.Set("name", table[i].name);
    item.Set("shape", shape);
    item.Set("count", Napi::Number::New(env, static_cast<double>(table[i].count)));
    list.Set(static_cast<uint32_t>(i), item);
  }
  return list;
}

Napi::Value ModelWrap::copy_out(const Napi::CallbackInfo& info,
                                const std::function<void(Model&, size_t, float*)>& read) {
  const Napi::Env env = info.Env();
  Model& m = idle(env);
  const size_t index = m.find_parameter(string_argument(info, 0, "name"));
  Napi::Float32Array values = Napi::Float32Array::New(env, static_cast<size_t>(m.parameters()[index].count));
  read(m, index, values.Data());
  return values;
}

Napi::Value ModelWrap::get_parameter(const Napi::CallbackInfo& info) {
  return copy_out(info, [](Model& m, size_t index, float* out) { m.get_parameter(index, out); });
}

Napi::Value ModelWrap::get_gradient(const Napi::CallbackInfo& info) {
  return copy_out(info, [](Model& m, size_t index, float* out) { m.get_gradient(index, out); });
}

Napi::Value ModelWrap::get_moment(const Napi::CallbackInfo& info) {
  const Model::Moment which = to_moment(info.Env(), string_argument(info, 1, "moment"));
  return copy_out(info, [which](Model& m, size_t index, float* out) { m.get_moment(index, which, out); });
}

void ModelWrap::set_parameter(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Model& m = idle(env);
  const size_t index = m.find_parameter(string_argument(info, 0, "name"));
  const auto values = typed_array<Napi::Float32Array>(info[1], napi_float32_array, "values");
  expect(env, static_cast<int64_t>(values.ElementLength()) == m.parameters()[index].count,
         "setParameter: wrong count");
  m.set_parameter(index, values.Data());
}

Napi::Value ModelWrap::load_parameter(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Model& m = idle(env);
  const auto name = string_argument(info, 0, "name"), tensor = string_argument(info, 2, "tensor");
  const std::string scales = info.Length() > 3 ? string_argument(info, 3, "scales") : "";
  auto file = unwrap<SafetensorsWrap>(info[1], kFileTag, "file")->file(env);
  return start(
      info, {},
      [&m, name, tensor, scales, file] {
        dn::load_parameter(m, m.find_parameter(name), *file, SafetensorsWrap::entry(*file, tensor),
                           scales.empty() ? nullptr : &SafetensorsWrap::entry(*file, scales));
      },
      [](Napi::Env e) { return e.Undefined(); });
}

Napi::Value ModelWrap::load_moment(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Model& m = idle(env);
  const auto name = string_argument(info, 0, "name"), tensor = string_argument(info, 3, "tensor");
  const Model::Moment which = to_moment(env, string_argument(info, 1, "moment"));
  auto file = unwrap<SafetensorsWrap>(info[2], kFileTag, "file")->file(env);
  return start(
      info, {},
      [&m, name, which, tensor, file] {
        const size_t index = m.find_parameter(name);
        const TensorEntry& entry = SafetensorsWrap::entry(*file, tensor);
        if (entry.count() != m.parameters()[index].count) {
          throw Error(Code::kCheckpoint,
                      file->path() + ": tensor \"" + tensor + "\" has the wrong number of values");
        }
        std::vector<float> values(static_cast<size_t>(entry.count()));
        file->read(entry, values.data());
        m.set_moment(index, which, values.data());
      },
      [](Napi::Env e) { return e.Undefined(); });
}

}  // namespace dn::addon
