// The emulator itself: what it must refuse, and that its collectives do what PTX says.

#ifdef DN_CUDA_EMULATOR

#include "cuda/emulator/device.h"
#include "cuda/test/support.h"

namespace dn::cuda_test {
namespace {

using namespace dn::cuda;

#define CHECK_FAULT(grid, threads, shared, body, part)                       \
  do {                                                                       \
    std::string dn_message = "no fault";                                     \
    try {                                                                    \
      emulator::run_grid(grid, threads, shared, body);                       \
    } catch (const emulator::Fault& fault) {                                 \
      dn_message = fault.what();                                             \
    }                                                                        \
    CHECK_MSG(dn_message.find(part) != std::string::npos,                    \
              std::string("expected '") + (part) + "', got: " + dn_message); \
  } while (0)

// Bodies that meet at two calls need two lines, which a macro's argument does not have.
void two_shuffles() {
  if (thread_index() < 16) {
    shuffle_xor(1.0f, 1);
  } else {
    shuffle_xor(2.0f, 1);
  }
}
void two_barriers() {
  if (thread_index() < 32) {
    sync_block();
  } else {
    sync_block();
  }
}
void one_lane_stays_away() {
  if (thread_index() != 5) shuffle_xor(1.0f, 1);
}
void one_warp_leaves() {
  if (thread_index() >= 32) sync_block();
}
const float* aligned_numbers() {
  alignas(16) static const float numbers[4] = {1, 2, 3, 4};
  return numbers;
}
void copy_own(bool commit) {
  copy_async16(shared_memory<float>() + 4 * thread_index(), aligned_numbers(), true);
  if (commit) commit_copies();
}

DN_TEST(cuda_emulator_refuses) {
  const emulator::Grid one;
  CHECK_FAULT(
      one, 33, 0, [] {}, "whole warps");
  CHECK_FAULT(one, 32, 0, one_lane_stays_away, "deadlock");
  CHECK_FAULT(one, 32, 0, two_shuffles, "divergent warp");
  CHECK_FAULT(one, 64, 0, one_warp_leaves, "deadlock");
  CHECK_FAULT(one, 64, 0, two_barriers, "divergent barrier");
  CHECK_FAULT(
      one, 32, 512, [] { copy_own(false); }, "never committed");
  CHECK_FAULT(
      one, 32, 512, [] { copy_own(true); }, "never waited for");
  CHECK_FAULT(
      one, 32, 16, [] { copy_async16(shared_memory<float>() + 4, aligned_numbers(), true); },
      "outside of shared memory");
  CHECK_FAULT(
      one, 32, 512, [] { copy_async16(shared_memory<float>() + 1, aligned_numbers(), true); }, "not aligned");
  CHECK_FAULT(
      one, 32, 128, [] { shared_memory<float>()[thread_index() + 1] = 1; }, "beyond the end");
  CHECK_FAULT(
      one, 32, 128,
      [] {
        uint32_t f[4];
        ldmatrix(f, shared_memory<uint16_t>() + 1);
      },
      "not aligned");
}

DN_TEST(cuda_emulator_copies_arrive_when_waited_for) {
  static const float* const source = aligned_numbers();
  static float seen[3];
  emulator::run_grid({}, 32, 32 * 16, [] {
    float* const own = shared_memory<float>() + 4 * thread_index();
    if (thread_index() == 0) seen[0] = own[0];
    own[0] = 7;
    copy_async16(own, source, true);
    commit_copies();
    if (thread_index() == 0) seen[1] = own[0];
    copy_async16(own, source, false);
    commit_copies();
    wait_copies<1>();
    wait_copies<0>();
    if (thread_index() == 0) seen[2] = own[3];
  });
  CHECK(std::isnan(seen[0]));  // shared memory starts as NaN
  CHECK(std::isnan(seen[1]));  // a copy under way is NaN
  CHECK(seen[2] == 0);         // and zeros when it is not valid
}

// ldmatrix and mma together multiply matrices as PTX defines their fragments: A and B through both kinds of
// ldmatrix.
DN_TEST(cuda_emulator_multiplies) {
  static float a[16][16], b[16][8], d[16][8];
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) a[i][j] = static_cast<float>((i * 5 + j * 3) % 11 - 5);
    for (int j = 0; j < 8; ++j) b[i][j] = static_cast<float>((i * 7 + j * 2) % 9 - 4);
  }
  emulator::run_grid({}, 32, 2048, [] {
    uint16_t* const sa = shared_memory<uint16_t>();  // (m, k)
    uint16_t* const sb = sa + 256;                   // (k, n), 16 columns of which 8 are used
    const int lane = thread_index();
    for (int i = lane; i < 256; i += 32) {
      sa[i] = f32_to_bf16(a[i / 16][i % 16]);
      sb[i] = i % 16 < 8 ? f32_to_bf16(b[i / 16][i % 16]) : f32_to_bf16(0);
    }
    sync_warp();
    uint32_t fa[4], fb[4];
    float c[4] = {1, 1, 1, 1};
    ldmatrix(fa, sa + (lane & 15) * 16 + (lane >> 4) * 8);
    ldmatrix_trans(fb, sb + (lane & 15) * 16 + (lane >> 4) * 8);
    mma_bf16(c, fa, fb[0], fb[1]);
    for (int i = 0; i < 4; ++i) d[lane / 4 + (i >> 1) * 8][lane % 4 * 2 + (i & 1)] = c[i];
  });
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float sum = 1;
      for (int k = 0; k < 16; ++k) sum += a[i][k] * b[k][j];
      CHECK(d[i][j] == sum);
    }
  }
}

// Warps run in every order: over many runs each of two gets to write last.
DN_TEST(cuda_emulator_mixes_the_order_of_warps) {
  bool first_last = false, second_last = false;
  for (uint64_t seed = 1; seed < 20; ++seed) {
    emulator::set_seed(seed);
    static int last;
    emulator::run_grid({}, 64, 0, [] { last = thread_index() / 32; });
    (last == 0 ? first_last : second_last) = true;
  }
  CHECK(first_last && second_last);
}

}  // namespace
}  // namespace dn::cuda_test

#endif
