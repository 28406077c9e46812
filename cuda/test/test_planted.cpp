// Tests of the tests: each of these mistakes is planted in a kernel (DN_PLANTED) and must be caught, by the
// emulator or by a wrong result. Only under the emulator.

#ifdef DN_CUDA_EMULATOR

#include <functional>

#include "cuda/test/attention_case.h"
#include "cuda/test/denoise_case.h"
#include "cuda/test/loop_case.h"

namespace dn::cuda_test {
namespace {

// Whether a run ends well: no fault, right results.
using Run = std::function<bool()>;

bool attention_is_right() {
  AttentionCase c(Dtype::kBF16, 1, 32, {150}, {MaskKind::kFull});
  const AttentionCase::Reference r = c.reference();
  c.forward();
  return relative_error(c.out->get(), r.out) <= tolerance(Dtype::kBF16);
}

bool product_is_right() {
  Backend& device = backend(Dtype::kBF16);
  const int64_t n = 136;
  std::vector<float> values = random_values(n * n, 1);
  for (float& x : values) x = bf16_to_f32(f32_to_bf16(x));
  Array w(device, Dtype::kF32, n, n, values), inp(device, Dtype::kBF16, n, n, random_values(n * n, 2)),
      out(device, Dtype::kBF16, n, n);
  Weight weight;
  weight.data = w.data();
  weight.K = weight.N = n;
  device.matmul_forward(out.tensor(), inp.tensor(), weight, Tensor(), Epilogue::kNone, Tensor(),
                        MatmulPrecision::kBF16);
  Doubles expected(idx(n * n), 0);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < n; ++k) {
      for (int64_t j = 0; j < n; ++j)
        expected[idx(i * n + j)] +=
            static_cast<double>(inp.host()[idx(i * n + k)]) * static_cast<double>(values[idx(k * n + j)]);
    }
  }
  return relative_error(out.get(), expected) <= tolerance(Dtype::kBF16);
}

// wte is the identity: logits are the listed rows themselves.
bool listed_rows_are_right() {
  Backend& device = backend(Dtype::kF32);
  const int64_t C = 8, N = 5;
  std::vector<float> identity(idx(C * C), 0);
  for (int64_t c = 0; c < C; ++c) identity[idx(c * C + c)] = 1;
  Array wte(device, Dtype::kF32, C, C, identity), hidden(device, Dtype::kF32, N, C, random_values(N * C, 2));
  Array out(device, Dtype::kF32, 3, C);
  Weight head;
  head.data = wte.data();
  head.order = WeightOrder::kOutIn;
  head.K = head.N = C;
  const int64_t rows[] = {4, 0, 2};
  device.head_logits(out.tensor(), hidden.tensor(), rows, 3, head);
  Doubles expected;
  for (const int64_t row : rows) {
    for (int64_t c = 0; c < C; ++c) expected.push_back(static_cast<double>(hidden.host()[idx(row * C + c)]));
  }
  return relative_error(out.get(), expected) <= 1e-6;
}

bool denoise_is_right() {
  const DenoiseCase c(300, 136, 70);
  try {
    return c.mistake(c.run()).empty();
  } catch (const Error&) {  // logits that are not finite
    return false;
  }
}

// Five steps in one call, most of them replayed from a graph.
bool loop_is_right() {
  Model model(make_cuda_backend(0), kConfig);
  fill(model);
  LoopCase c;
  c.add(12, 2, 12, 6).sampler = LoopSampler::kAncestral;
  c.add(10, 1, 10, 5).shift = 1;
  return c.compare(model, 5).empty();
}

void check_planted(const char* what, int number, const Run& run) {
  emulator::set_seed(1);
  CHECK_MSG(run(), std::string(what) + ": the kernel without the mistake is not right");
  bool caught = false;
  for (uint64_t seed = 1; seed <= 3 && !caught; ++seed) {
    emulator::set_seed(seed);
    emulator::planted = number;
    try {
      caught = !run();
    } catch (const emulator::Fault&) {
      caught = true;
    }
    emulator::planted = 0;
  }
  CHECK_MSG(caught, std::string(what) + ": not caught");
}

DN_TEST(cuda_planted_mistakes_are_caught) {
  check_planted("copies are read without waiting for them", 1, attention_is_right);
  check_planted("no barrier between the wait and the first read", 2, attention_is_right);
  check_planted("a fragment is read from the wrong lanes' rows", 3, attention_is_right);
  check_planted("keys beyond the end are not masked", 4, attention_is_right);
  check_planted("one lane leaves out a shuffle", 5, attention_is_right);
  check_planted("a row list is read one entry late", 6, listed_rows_are_right);
  check_planted("no barrier before a buffer is filled again", 7, attention_is_right);
  check_planted("the ring waits for one group too few", 8, product_is_right);
  check_planted("a fragment is read from the wrong lanes' rows, in a product's transposed operand", 9,
                product_is_right);
  check_planted("sums of a block are read before all warps have written theirs", 10, [] {
    Backend& device = backend(Dtype::kF32);
    Array x(device, Dtype::kF32, 1, 3000, std::vector<float>(3000, 1));
    return device.sum_of_squares(x.data(), 3000) == 3000;
  });
  check_planted("ids beyond the vocabulary are not masked", 11, denoise_is_right);
  check_planted("the fused head's ring waits for one group too few", 12, denoise_is_right);
  check_planted("the fused head reads its row list one entry late", 13, denoise_is_right);
  check_planted("merging two parts of a row forgets the loser, which may be the second best", 14,
                denoise_is_right);
  check_planted("merging two parts of a row gives a tie to whoever comes first", 15, denoise_is_right);
  check_planted("a replayed step draws with the numbers of the step that was captured", 16, loop_is_right);
  check_planted("the rows of a step are listed one late", 17, loop_is_right);
  check_planted("a sequence decides on rows beyond its own", 18, loop_is_right);
}

}  // namespace
}  // namespace dn::cuda_test

#endif
