// NativeCache: the keys and values of one sequence.
#pragma once

#include <napi.h>

#include <memory>

#include "addon/convert.h"
#include "addon/state.h"
#include "core/model.h"

namespace dn::addon {

class CacheWrap : public Napi::ObjectWrap<CacheWrap> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "NativeCache",
                       {property<CacheWrap, &CacheWrap::capacity, kCacheTag>("capacity"),
                        property<CacheWrap, &CacheWrap::bytes, kCacheTag>("bytes"),
                        InstanceMethod<&CacheWrap::dispose>("dispose")});
  }

  // Arguments: an external std::shared_ptr<Model>*, capacity. Only NativeModel.createCache constructs one.
  explicit CacheWrap(const Napi::CallbackInfo& info)
      : Napi::ObjectWrap<CacheWrap>(info), env_(info.Env()), state_(state_of(info.Env())) {
    info.This().As<Napi::Object>().TypeTag(&kCacheTag);
    expect(env_, info.Length() == 2 && info[0].IsExternal(), "NativeCache is made by createCache");
    model_ = *info[0].As<Napi::External<std::shared_ptr<Model>>>().Data();
    const int32_t capacity = info[1].As<Napi::Number>().Int32Value();
    cache_ = guarded(
        env_, [&] { return std::make_shared<KvCache>(model_->backend(), model_->config(), capacity); });
    bytes_ = static_cast<int64_t>(cache_->bytes());
    state_->adjust(env_, bytes_);
  }

  ~CacheWrap() override { release(); }

  // Null after dispose.
  std::shared_ptr<KvCache> cache() const { return cache_; }
  const Model* model() const { return model_.get(); }

 private:
  Napi::Value capacity(const Napi::CallbackInfo& info) {
    return Napi::Number::New(info.Env(), cache_ ? cache_->capacity() : 0);
  }
  Napi::Value bytes(const Napi::CallbackInfo& info) {
    return Napi::Number::New(info.Env(), static_cast<double>(cache_ ? bytes_ : 0));
  }
  void dispose(const Napi::CallbackInfo&) { release(); }

  void release() {
    if (!cache_) return;
    cache_.reset();
    model_.reset();
    state_->adjust(env_, -bytes_);
  }

  Napi::Env env_;
  SharedState state_;
  std::shared_ptr<Model> model_;
  std::shared_ptr<KvCache> cache_;  // a batch in flight keeps its own reference
  int64_t bytes_ = 0;
};

}  // namespace dn::addon
