// Whether two lists of numbers are the same bit for bit: signs of zero and payloads of NaN count.
#pragma once

#include <cstring>
#include <vector>

namespace dn::test {

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

}  // namespace dn::test
