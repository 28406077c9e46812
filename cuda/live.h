// How many rows of a launch count, where only the device knows. A captured launch is for as many rows as its
// shape has room for; blocks of rows beyond the device's count return at once, and rows that share a block
// with one that counts are computed from whatever lies there and read by nobody.
#pragma once

#include <cstdint>

namespace dn::cuda {

struct LiveRows {
  const int32_t* count = nullptr;  // on the device; null: every row counts
  int64_t first = 0;               // rows counted before the launch's first one
};

}  // namespace dn::cuda
