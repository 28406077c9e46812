// NativeModel: a dn::Model with its asynchronous calls. At most one call is in flight at a time
// (lib/engine.ts queues); a second one is an error here, never a race. Properties do not change and may be
// read at any time.
#pragma once

#include <napi.h>

#include <functional>
#include <memory>

#include "addon/async.h"
#include "addon/state.h"
#include "core/model.h"
#include "core/page_pool.h"

namespace dn::addon {

class ModelWrap : public Napi::ObjectWrap<ModelWrap> {
 public:
  static Napi::Function define(Napi::Env env);
  // Arguments: config, { device, threads, dtype }.
  explicit ModelWrap(const Napi::CallbackInfo& info);
  ~ModelWrap() override;

  // Throws ERR_DN_DISPOSED after dispose.
  Model& model(Napi::Env env) const;
  // Throws unless the model is idle.
  Model& idle(Napi::Env env) const;
  // Marks the model busy for a call that is not one of its own methods (writing a file from its parameters).
  void hold() { busy_ = true; }
  void release_hold() { busy_ = false; }

 private:
  Napi::Value backend(const Napi::CallbackInfo& info);
  Napi::Value device_loop(const Napi::CallbackInfo& info);
  Napi::Value parameters(const Napi::CallbackInfo& info);
  Napi::Value memory(const Napi::CallbackInfo& info);
  Napi::Value initialise(const Napi::CallbackInfo& info);
  Napi::Value get_parameter(const Napi::CallbackInfo& info);
  void set_parameter(const Napi::CallbackInfo& info);
  Napi::Value load_parameter(const Napi::CallbackInfo& info);
  Napi::Value load_moment(const Napi::CallbackInfo& info);
  Napi::Value create_cache(const Napi::CallbackInfo& info);
  Napi::Value denoise(const Napi::CallbackInfo& info);
  Napi::Value denoise_steps(const Napi::CallbackInfo& info);
  Napi::Value forward(const Napi::CallbackInfo& info);
  Napi::Value begin_training(const Napi::CallbackInfo& info);
  Napi::Value end_training(const Napi::CallbackInfo& info);
  Napi::Value train_batch(const Napi::CallbackInfo& info);
  Napi::Value zero_gradients(const Napi::CallbackInfo& info);
  Napi::Value gradient_sum_of_squares(const Napi::CallbackInfo& info);
  Napi::Value adamw(const Napi::CallbackInfo& info);
  Napi::Value get_gradient(const Napi::CallbackInfo& info);
  Napi::Value get_moment(const Napi::CallbackInfo& info);
  void dispose(const Napi::CallbackInfo& info);

  // A method as JavaScript calls it.
  template <auto kMethod>
  auto coded(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return (this->*kMethod)(info); });
  }
  // Starts work on the model; `keep` are further objects that must stay alive. Sets busy until the work is
  // done.
  Napi::Promise start(const Napi::CallbackInfo& info, std::vector<Napi::ObjectReference> keep,
                      Task::Work work, Task::Result result);
  // Copies a parameter-sized array out of the model, synchronously.
  Napi::Value copy_out(const Napi::CallbackInfo& info,
                       const std::function<void(Model&, size_t, float*)>& read);
  void account(Napi::Env env);
  void release(Napi::Env env);

  SharedState state_;
  std::shared_ptr<Model> model_;
  const std::shared_ptr<PagePool> results_ = std::make_shared<PagePool>();
  bool has_device_loop_ = false;  // asked for once: a backend may make its loop then
  bool busy_ = false;
  int64_t reported_ = 0;  // bytes told to V8
};

}  // namespace dn::addon
