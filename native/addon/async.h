// The one way work leaves the JavaScript thread, and the way errors come back to it.
#pragma once

#include <napi.h>

#include <exception>
#include <functional>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"

namespace dn::addon {

inline Napi::Error coded_error(Napi::Env env, const char* code, const std::string& message) {
  Napi::Error error = Napi::Error::New(env, message);
  error.Set("code", Napi::String::New(env, code));
  return error;
}

// Runs a synchronous call on the JavaScript thread; what C++ throws becomes a JavaScript error with a code,
// because nothing but Napi::Error may leave a callback of Node-API.
template <typename F>
auto guarded(Napi::Env env, F&& f) {
  try {
    return f();
  } catch (const Napi::Error&) {
    throw;
  } catch (const Error& e) {
    throw coded_error(env, code_name(e.code()), e.what());
  } catch (const std::bad_alloc&) {
    throw coded_error(env, "ERR_DN_OUT_OF_MEMORY", "host memory ran out");
  } catch (const std::exception& e) {
    throw coded_error(env, "ERR_DN_INTERNAL", e.what());
  }
}

// A promise for work done on a libuv pool thread.
// - work: pool thread. Touches no Napi; may throw.
// - done: JavaScript thread, after work, whatever its outcome (releases the model, accounts for memory).
// - result: JavaScript thread, only after success: the promise's value.
// keep: objects that must not be collected while the work runs. Deletes itself.
class Task : public Napi::AsyncWorker {
 public:
  using Work = std::function<void()>;
  using Done = std::function<void(Napi::Env)>;
  using Result = std::function<Napi::Value(Napi::Env)>;

  static Napi::Promise start(Napi::Env env, std::vector<Napi::ObjectReference> keep, Work work, Done done,
                             Result result) {
    Task* task = new Task(env, std::move(keep), std::move(work), std::move(done), std::move(result));
    Napi::Promise promise = task->deferred_.Promise();
    task->Queue();
    return promise;
  }

  void Execute() override {
    try {
      work_();
    } catch (const Error& e) {
      fail(code_name(e.code()), e.what());
    } catch (const std::bad_alloc&) {
      fail("ERR_DN_OUT_OF_MEMORY", "host memory ran out");
    } catch (const std::exception& e) {
      fail("ERR_DN_INTERNAL", e.what());
    } catch (...) {
      fail("ERR_DN_INTERNAL", "an unknown exception was thrown in native code");
    }
  }

  void OnOK() override {
    Napi::HandleScope scope(Env());
    done_(Env());
    try {
      deferred_.Resolve(guarded(Env(), [&] { return result_(Env()); }));
    } catch (const Napi::Error& e) {
      deferred_.Reject(e.Value());
    }
  }

  void OnError(const Napi::Error&) override {
    Napi::HandleScope scope(Env());
    done_(Env());
    deferred_.Reject(coded_error(Env(), code_, message_).Value());
  }

 private:
  Task(Napi::Env env, std::vector<Napi::ObjectReference> keep, Work work, Done done, Result result)
      : Napi::AsyncWorker(env, "diffusion-native"),
        deferred_(Napi::Promise::Deferred::New(env)),
        keep_(std::move(keep)),
        work_(std::move(work)),
        done_(std::move(done)),
        result_(std::move(result)) {}

  void fail(const char* code, const std::string& message) {
    code_ = code;
    message_ = message;
    SetError(message);
  }

  Napi::Promise::Deferred deferred_;
  std::vector<Napi::ObjectReference> keep_;
  Work work_;
  Done done_;
  Result result_;
  const char* code_ = "ERR_DN_INTERNAL";
  std::string message_;
};

}  // namespace dn::addon
