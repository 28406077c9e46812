// A place for the files that a test writes.
#pragma once

#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <iterator>
#include <string>

#include "core/error.h"

namespace dn {

// A fresh directory, removed with all it holds.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "dn-test-XXXXXX").string();
    if (mkdtemp(&name[0]) == nullptr) throw Error(Code::kInternal, "no temporary directory");
    path_ = name;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  size_t files() const {
    return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(path_), {}));
  }

 private:
  std::filesystem::path path_;
};

}  // namespace dn
