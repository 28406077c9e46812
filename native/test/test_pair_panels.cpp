// Weights that lie scaled for products in pairs: they come back bit for bit, however they were written, and
// every kernel multiplies with them as with the numbers themselves.

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/ops.h"
#include "test/check.h"
#include "test/product_reference.h"
#include "test/same_bits.h"

namespace dn::test {
namespace {

using namespace dn::cpu;
using namespace dn::test::products;

const Cpu kPacker = {2, Isa::kAvx512};

bool scales_weights() { return detected_isa() >= Isa::kAvx512 && packs_for_pairs(Isa::kAvx512, 768); }

// Of the (panels, blocks) of a weight, those that lie scaled.
int64_t scaled_blocks(const std::vector<float>& panels, int64_t K, int64_t N) {
  const PairPanel* const pairs = pair_panels(panels.data(), K, N, 0);
  return std::count_if(pairs, pairs + (N + 31) / 32 * ((K + kPairBlock - 1) / kPairBlock), is_scaled);
}

std::vector<float> packed(const std::vector<float>& plain, WeightOrder order, int64_t K, int64_t N,
                          Isa isa = Isa::kAvx512) {
  std::vector<float> panels(static_cast<size_t>(packed_elements(K, N)));
  pack_weight({2, isa}, panels.data(), weight(plain, order, K, N));
  return panels;
}

std::vector<float> unpacked(std::vector<float> panels, WeightOrder order, int64_t K, int64_t N) {
  std::vector<float> plain(static_cast<size_t>(K * N));
  unpack_weight(kPacker, plain.data(), weight(panels, order, K, N, true));
  return plain;
}

// a times the weight, plus a bias and a residual; and after GELU, with what was before it.
std::vector<float> product(std::vector<float> a, std::vector<float> panels, int64_t M, int64_t K, int64_t N,
                           const Cpu& cpu, MatmulPrecision precision = MatmulPrecision::kFP32) {
  Numbers numbers(85);
  std::vector<float> out(static_cast<size_t>(M * N), 7.0f), after(out), before(out),
      bias = numbers.vector(N), residual = numbers.vector(M * N);
  const Weight w = weight(panels, WeightOrder::kInOut, K, N, true);
  matmul_forward(cpu, matrix(out, M, N), matrix(a, M, K), w, matrix(bias, 1, N), Epilogue::kResidual,
                 matrix(residual, M, N), precision);
  matmul_forward(cpu, matrix(after, M, N), matrix(a, M, K), w, matrix(bias, 1, N), Epilogue::kGelu,
                 matrix(before, M, N), precision);
  out.insert(out.end(), after.begin(), after.end());
  out.insert(out.end(), before.begin(), before.end());
  return out;
}

}  // namespace

// Numbers of every size, columns of every scale.
DN_TEST(pair_panels_come_back) {
  if (!scales_weights()) return;
  Numbers numbers(81);
  for (const int64_t K : {96, 768, 800, 1541}) {
    const int64_t N = 75, blocks = (K + kPairBlock - 1) / kPairBlock;
    for (const WeightOrder order : {WeightOrder::kInOut, WeightOrder::kOutIn}) {
      std::vector<float> plain = numbers.vector(K * N);
      for (int64_t k = 0; k < K; ++k) {
        for (int64_t n = 0; n < N; ++n) {
          float& x = plain[static_cast<size_t>(order == WeightOrder::kInOut ? k * N + n : n * K + k)];
          x = k % 11 == 5 ? 0.0f : std::ldexp(x, static_cast<int>(n * 37 % 200) - 90);
        }
      }
      const std::vector<float> panels = packed(plain, order, K, N);
      CHECK(scaled_blocks(panels, K, N) == 3 * blocks);
      CHECK(same_bits(unpacked(panels, order, K, N), plain));
      if (order != WeightOrder::kOutIn) continue;
      std::vector<float> lying = panels, row(static_cast<size_t>(K));
      for (int64_t n = 0; n < N; ++n) {
        weight_row(weight(lying, order, K, N, true), n, row.data());
        CHECK(std::equal(row.begin(), row.end(), plain.begin() + n * K));
      }
    }
  }
}

// Where a scaled number would lose digits, and where there is no scale, the block stays as it is; its
// neighbours do not.
DN_TEST(pair_panels_that_cannot_come_back_are_not_scaled) {
  if (!scales_weights()) return;
  const int64_t K = 900, N = 70;
  Numbers numbers(82);
  const std::vector<float> plain = numbers.vector(K * N);
  for (const float odd :
       {0x1.234567p-126f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    std::vector<float> changed = plain;
    for (int64_t k = 0; k < K; ++k) changed[static_cast<size_t>(k * N + 40)] *= 1024;
    changed[static_cast<size_t>(800 * N + 40)] = odd;
    const std::vector<float> panels = packed(changed, WeightOrder::kInOut, K, N);
    CHECK(scaled_blocks(panels, K, N) == 5);
    CHECK(!is_scaled(pair_panels(panels.data(), K, N, 32)[1]));
    CHECK(same_bits(unpacked(panels, WeightOrder::kInOut, K, N), changed));
    const std::vector<float> a = numbers.vector(30 * K);
    const std::vector<float> as_it_lies = packed(changed, WeightOrder::kInOut, K, N, Isa::kPortable);
    CHECK(same_bits(product(a, panels, 30, K, N, kPacker), product(a, as_it_lies, 30, K, N, kPacker)));
  }
}

// A weight is written again, whole, by pieces in any order, and in part; what a piece leaves alone stays.
DN_TEST(pair_panels_can_be_written_again) {
  if (!scales_weights()) return;
  const int64_t K = 1600, N = 70;
  Numbers numbers(83);
  std::vector<float> first = numbers.vector(K * N), second = numbers.vector(K * N);
  for (float& x : second) x *= 64;
  std::vector<float> panels = packed(first, WeightOrder::kInOut, K, N);
  const std::vector<float> expected = packed(second, WeightOrder::kInOut, K, N);
  Weight whole = weight(second, WeightOrder::kInOut, K, N);
  const auto write = [&](int64_t begin, int64_t end) {
    pack_rows(kPacker, panels.data(), whole, second.data() + begin * N, begin, end - begin);
  };
  pack_weight(kPacker, panels.data(), whole);
  CHECK(same_bits(panels, expected));

  panels = packed(first, WeightOrder::kInOut, K, N);
  write(640, 864);  // over the end of a block
  std::vector<float> mixed = first;
  std::copy(second.begin() + 640 * N, second.begin() + 864 * N, mixed.begin() + 640 * N);
  CHECK(same_bits(unpacked(panels, WeightOrder::kInOut, K, N), mixed));
  write(0, 640);
  write(864, K);
  CHECK(same_bits(unpacked(panels, WeightOrder::kInOut, K, N), second));

  panels = packed(first, WeightOrder::kInOut, K, N);
  for (int64_t begin = 0; begin < K; begin += 96) write(begin, std::min(K, begin + 96));
  CHECK(same_bits(panels, expected));
  for (int64_t begin = (K - 1) / 96 * 96; begin >= 0; begin -= 96) write(begin, std::min(K, begin + 96));
  CHECK(same_bits(unpacked(panels, WeightOrder::kInOut, K, N), second));
  const std::vector<float> a = numbers.vector(30 * K);
  CHECK(same_bits(product(a, panels, 30, K, N, kPacker), product(a, expected, 30, K, N, kPacker)));
}

// The kernels of other instruction sets, and those of bf16, on a weight that was packed for pairs: columns
// beyond what is handled at a time, too.
DN_TEST(pair_panels_serve_all_kernels) {
  if (!scales_weights()) return;
  Numbers numbers(84);
  for (const auto& [K, N] : {std::pair<int64_t, int64_t>{100, 4230}, {900, 70}}) {
    const std::vector<float> plain = numbers.vector(K * N);
    const std::vector<float> scaled = packed(plain, WeightOrder::kInOut, K, N);
    CHECK(scaled_blocks(scaled, K, N) > 0);
    const std::vector<float> lying = packed(plain, WeightOrder::kInOut, K, N, Isa::kPortable);
    CHECK(scaled_blocks(lying, K, N) == 0);
    for (const int64_t M : {1, 17, 40}) {
      const std::vector<float> a = numbers.vector(M * K);
      for (const Isa isa : isas()) {
        for (const MatmulPrecision precision : {MatmulPrecision::kFP32, MatmulPrecision::kBF16}) {
          CHECK_MSG(same_bits(product(a, scaled, M, K, N, {2, isa}, precision),
                              product(a, lying, M, K, N, {2, isa}, precision)),
                    std::string(isa_name(isa)) + " M " + std::to_string(M));
        }
      }
    }
  }
}

}  // namespace dn::test
