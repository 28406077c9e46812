// Reading fields of plain JavaScript objects. TypeScript has validated values; here only what would crash is
// checked, and a wrong type is ERR_DN_INTERNAL because it is a bug of the façade.
#pragma once

#include <napi.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "addon/async.h"
#include "addon/state.h"
#include "core/page_pool.h"

namespace dn::addon {

inline constexpr char kBug[] = "a bug in diffusion-native, please report it: ";

inline Napi::Error type_error(Napi::Env env, const std::string& field, const char* expected) {
  return coded_error(env, "ERR_DN_INTERNAL", kBug + field + " is not " + expected);
}

inline Napi::Object object_field(const Napi::Object& object, const char* field) {
  const Napi::Value value = object.Get(field);
  if (!value.IsObject()) throw type_error(object.Env(), field, "an object");
  return value.As<Napi::Object>();
}

inline double number_field(const Napi::Object& object, const char* field) {
  const Napi::Value value = object.Get(field);
  if (!value.IsNumber()) throw type_error(object.Env(), field, "a number");
  return value.As<Napi::Number>().DoubleValue();
}

inline int64_t int_field(const Napi::Object& object, const char* field) {
  const Napi::Value value = object.Get(field);
  if (!value.IsNumber()) throw type_error(object.Env(), field, "a number");
  return value.As<Napi::Number>().Int64Value();
}

inline bool bool_field(const Napi::Object& object, const char* field) {
  const Napi::Value value = object.Get(field);
  if (!value.IsBoolean()) throw type_error(object.Env(), field, "a boolean");
  return value.As<Napi::Boolean>().Value();
}

inline std::string string_field(const Napi::Object& object, const char* field) {
  const Napi::Value value = object.Get(field);
  if (!value.IsString()) throw type_error(object.Env(), field, "a string");
  return value.As<Napi::String>().Utf8Value();
}

inline uint64_t bigint_value(const Napi::Value& value, const char* field) {
  if (!value.IsBigInt()) throw type_error(value.Env(), field, "a bigint");
  bool lossless = false;
  return value.As<Napi::BigInt>().Uint64Value(&lossless);
}

inline uint64_t bigint_field(const Napi::Object& object, const char* field) {
  return bigint_value(object.Get(field), field);
}

// The typed array of a value, checked for its element type.
template <typename Array>
Array typed_array(const Napi::Value& value, napi_typedarray_type type, const char* field) {
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != type) {
    throw type_error(value.Env(), field, "the expected typed array");
  }
  return value.As<Array>();
}

template <typename T, typename Array>
std::vector<T> copy_array(const Napi::Object& object, const char* field, napi_typedarray_type type) {
  const Array array = typed_array<Array>(object.Get(field), type, field);
  return std::vector<T>(array.Data(), array.Data() + array.ElementLength());
}

inline std::vector<int32_t> int32_field(const Napi::Object& object, const char* field) {
  return copy_array<int32_t, Napi::Int32Array>(object, field, napi_int32_array);
}
inline std::vector<uint32_t> uint32_field(const Napi::Object& object, const char* field) {
  return copy_array<uint32_t, Napi::Uint32Array>(object, field, napi_uint32_array);
}
inline std::vector<float> float32_field(const Napi::Object& object, const char* field) {
  return copy_array<float, Napi::Float32Array>(object, field, napi_float32_array);
}
inline std::vector<uint64_t> uint64_field(const Napi::Object& object, const char* field) {
  return copy_array<uint64_t, Napi::BigUint64Array>(object, field, napi_biguint64_array);
}

// Null or undefined gives an empty vector.
inline bool absent(const Napi::Object& object, const char* field) {
  const Napi::Value value = object.Get(field);
  return value.IsNull() || value.IsUndefined();
}

inline std::string string_argument(const Napi::CallbackInfo& info, size_t index, const char* what) {
  if (!info[index].IsString()) throw type_error(info.Env(), what, "a string");
  return info[index].As<Napi::String>().Utf8Value();
}

inline Napi::Object object_argument(const Napi::CallbackInfo& info, size_t index, const char* what) {
  if (!info[index].IsObject()) throw type_error(info.Env(), what, "an object");
  return info[index].As<Napi::Object>();
}

template <typename Array, typename T>
Array to_array(Napi::Env env, const std::vector<T>& values) {
  Array array = Array::New(env, values.size());
  for (size_t i = 0; i < values.size(); ++i) array[i] = values[i];
  return array;
}

// A (n) result that a pool thread writes, all of it: nothing is said of its contents before. A large one lies
// in huge pages, which return to `pool` when JavaScript is done with it. A runtime that forbids memory of
// ours in its arrays (V8 with a sandbox) gives its own, and is asked once.
inline Napi::Float32Array result_array(Napi::Env env, size_t n, const std::shared_ptr<PagePool>& pool) {
  constexpr size_t kLarge = 4 << 20;  // bytes
  const size_t bytes = n * sizeof(float);
  const SharedState state = state_of(env);
  if (bytes < kLarge || !state->takes_memory) return Napi::Float32Array::New(env, n);
  struct Lent {
    std::shared_ptr<Pages> pages;
    std::shared_ptr<PagePool> pool;
  };
  auto lent = std::make_unique<Lent>();
  lent->pages = pool->take(bytes);
  lent->pool = pool;
  const auto give_back = [](napi_env, void*, void* hint) {
    const std::unique_ptr<Lent> done(static_cast<Lent*>(hint));
    done->pool->give(std::move(done->pages));
  };
  napi_value buffer;
  const napi_status status =
      napi_create_external_arraybuffer(env, lent->pages->data(), bytes, give_back, lent.get(), &buffer);
  if (status == napi_no_external_buffers_allowed) {
    state->takes_memory = false;
    return Napi::Float32Array::New(env, n);
  }
  lent.release();  // what the runtime refuses for another reason it gives back itself
  if (status != napi_ok) throw Napi::Error::New(env);
  return Napi::Float32Array::New(env, n, Napi::ArrayBuffer(env, buffer), 0);
}

inline void expect(Napi::Env env, bool condition, const char* message) {
  if (!condition) throw coded_error(env, "ERR_DN_INTERNAL", std::string(kBug) + message);
}

// Type tags tell the wrapped classes apart, where the runtime only knows that an object wraps something.
inline constexpr napi_type_tag kModelTag = {0x6f1d1a2b3c4d5e01ull, 0x91a2b3c4d5e6f701ull};
inline constexpr napi_type_tag kCacheTag = {0x6f1d1a2b3c4d5e02ull, 0x91a2b3c4d5e6f702ull};
inline constexpr napi_type_tag kFileTag = {0x6f1d1a2b3c4d5e03ull, 0x91a2b3c4d5e6f703ull};

template <typename Wrapped>
Wrapped* unwrap(const Napi::Value& value, const napi_type_tag& tag, const char* what) {
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&tag))
    throw type_error(value.Env(), what, "a native object of the right kind");
  return Wrapped::Unwrap(value.As<Napi::Object>());
}

template <typename Wrapped, Napi::Value (Wrapped::*kGet)(const Napi::CallbackInfo&),
          const napi_type_tag& kTag>
Napi::Value get_property(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] { return (unwrap<Wrapped>(info.This(), kTag, "this")->*kGet)(info); });
}

// A read-only property of a wrapped class. The runtime refuses a method a `this` of another class; a getter
// it calls with any, which the tag makes an error.
template <typename Wrapped, Napi::Value (Wrapped::*kGet)(const Napi::CallbackInfo&),
          const napi_type_tag& kTag>
Napi::ClassPropertyDescriptor<Wrapped> property(const char* name) {
  const auto descriptor = Napi::PropertyDescriptor::Accessor<get_property<Wrapped, kGet, kTag>>(name);
  return static_cast<const napi_property_descriptor&>(descriptor);
}

}  // namespace dn::addon
