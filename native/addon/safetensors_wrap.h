// NativeSafetensors: an open safetensors file.
#pragma once

#include <napi.h>

#include <memory>
#include <string>

#include "addon/convert.h"
#include "core/safetensors.h"

namespace dn::addon {

class SafetensorsWrap : public Napi::ObjectWrap<SafetensorsWrap> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(
        env, "NativeSafetensors",
        {property<SafetensorsWrap, &SafetensorsWrap::path, kFileTag>("path"),
         property<SafetensorsWrap, &SafetensorsWrap::tensors, kFileTag>("tensors"),
         property<SafetensorsWrap, &SafetensorsWrap::metadata, kFileTag>("metadata"),
         InstanceMethod<&SafetensorsWrap::read>("read"), InstanceMethod<&SafetensorsWrap::close>("close")});
  }

  explicit SafetensorsWrap(const Napi::CallbackInfo& info) : Napi::ObjectWrap<SafetensorsWrap>(info) {
    info.This().As<Napi::Object>().TypeTag(&kFileTag);
    expect(info.Env(), info.Length() == 1 && info[0].IsString(), "openSafetensors takes a path");
    path_ = info[0].As<Napi::String>().Utf8Value();
    file_ = guarded(info.Env(), [&] { return std::make_shared<SafetensorsFile>(path_); });
  }

  // Throws when closed.
  std::shared_ptr<SafetensorsFile> file(Napi::Env env) const {
    if (!file_) throw coded_error(env, "ERR_DN_INTERNAL", path_ + ": the file was closed");
    return file_;
  }

  static const TensorEntry& entry(const SafetensorsFile& file, const std::string& name) {
    const TensorEntry* found = file.find(name);
    if (!found) throw Error(Code::kCheckpoint, file.path() + ": there is no tensor \"" + name + "\"");
    return *found;
  }

 private:
  Napi::Value path(const Napi::CallbackInfo& info) { return Napi::String::New(info.Env(), path_); }

  Napi::Value tensors(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    const auto opened = file(env);
    Napi::Array list = Napi::Array::New(env, opened->tensors().size());
    uint32_t i = 0;
    for (const TensorEntry& tensor : opened->tensors()) {
      Napi::Object item = Napi::Object::New(env);
      Napi::Array shape = Napi::Array::New(env, tensor.shape.size());
      for (size_t d = 0; d < tensor.shape.size(); ++d) {
        shape.Set(static_cast<uint32_t>(d), Napi::Number::New(env, static_cast<double>(tensor.shape[d])));
      }
      item.Set("name", tensor.name);
      item.Set("dtype", tensor.dtype);
      item.Set("shape", shape);
      item.Set("count", Napi::Number::New(env, static_cast<double>(tensor.count())));
      list.Set(i++, item);
    }
    return list;
  }

  Napi::Value metadata(const Napi::CallbackInfo& info) {
    Napi::Object result = Napi::Object::New(info.Env());
    for (const auto& [key, value] : file(info.Env())->metadata()) result.Set(key, value);
    return result;
  }

  Napi::Value read(const Napi::CallbackInfo& info) {
    const Napi::Env env = info.Env();
    const auto opened = file(env);
    expect(env, info.Length() == 1 && info[0].IsString(), "read takes a tensor name");
    return guarded(env, [&]() -> Napi::Value {
      const TensorEntry& tensor = entry(*opened, info[0].As<Napi::String>().Utf8Value());
      Napi::Float32Array values = Napi::Float32Array::New(env, static_cast<size_t>(tensor.count()));
      opened->read(tensor, values.Data());
      return values;
    });
  }

  void close(const Napi::CallbackInfo&) { file_.reset(); }

  std::string path_;
  std::shared_ptr<SafetensorsFile> file_;
};

}  // namespace dn::addon
