// The one exception type of the native code. The addon turns it into a JavaScript error that carries `code`;
// nothing below the addon prints or exits.
#pragma once

#include <stdexcept>
#include <string>

namespace dn {

enum class Code { kArgument, kCheckpoint, kDevice, kOutOfMemory, kDiverged, kInternal };

// The stable string users switch on, for example "ERR_DN_ARGUMENT".
inline const char* code_name(Code code) {
  switch (code) {
    case Code::kArgument: return "ERR_DN_ARGUMENT";
    case Code::kCheckpoint: return "ERR_DN_CHECKPOINT";
    case Code::kDevice: return "ERR_DN_DEVICE";
    case Code::kOutOfMemory: return "ERR_DN_OUT_OF_MEMORY";
    case Code::kDiverged: return "ERR_DN_DIVERGED";
    case Code::kInternal: return "ERR_DN_INTERNAL";
  }
  return "ERR_DN_INTERNAL";
}

class Error : public std::runtime_error {
 public:
  Error(Code code, const std::string& message) : std::runtime_error(message), code_(code) {}
  Code code() const { return code_; }

 private:
  Code code_;
};

}  // namespace dn
