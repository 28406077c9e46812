// Per-environment state of the addon: class references and the memory reported to V8. One instance per worker
// thread; no mutable globals.
#pragma once

#include <napi.h>

#include <cstdint>
#include <memory>

namespace dn::addon {

struct State {
  Napi::FunctionReference model_class;
  Napi::FunctionReference cache_class;
  Napi::FunctionReference file_class;
  bool takes_memory = true;     // whether arrays may lie in memory of ours; false once the runtime refused
  int64_t external_memory = 0;  // bytes reported with AdjustExternalMemory and not yet taken back

  // Reports a change of native memory to V8, in steps of at most 512 MiB (larger ones are ignored by some
  // versions).
  void adjust(Napi::Env env, int64_t delta) {
    external_memory += delta;
    constexpr int64_t kStep = int64_t{512} << 20;
    while (delta != 0) {
      const int64_t part = delta > kStep ? kStep : delta < -kStep ? -kStep : delta;
      Napi::MemoryManagement::AdjustExternalMemory(env, part);
      delta -= part;
    }
  }
};

// The environment's instance data; wrapped objects keep their own reference, because their finalizers may run
// after it.
using SharedState = std::shared_ptr<State>;

inline SharedState state_of(Napi::Env env) { return *env.GetInstanceData<SharedState>(); }

}  // namespace dn::addon
