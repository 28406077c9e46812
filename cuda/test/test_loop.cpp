// The denoising loop on the device: several steps in one call give, to the bit, what single steps give, for
// every sampler and whatever else is in the batch; graphs are captured once a shape and replayed; estimates,
// errors, and that nothing is left behind.

#include <algorithm>
#include <limits>

#include "cuda/test/loop_case.h"

namespace dn::cuda_test {
namespace {

void check_steps(Dtype dtype, const std::vector<int32_t>& calls) {
  Model model(make_cuda_backend(0, dtype), kConfig);
  fill(model);
  LoopCase c = mixed_loop();
  int32_t call = 0;
  for (const int32_t steps : calls) {
    const std::string difference = c.compare(model, steps);
    CHECK_MSG(difference.empty(), std::string(dtype_name(dtype)) + ", call " + std::to_string(call) + " of " +
                                      std::to_string(steps) + " steps: " + difference);
    if (!difference.empty()) return;
    ++call;
  }
}

DN_TEST(cuda_loop_gives_what_single_steps_give) {
  check_steps(Dtype::kBF16, {8, 3, 3, 16});
  check_steps(Dtype::kF32, {1, 5, 20});
}

DN_TEST(cuda_loop_without_graphs) {
  Model model(make_cuda_backend(0, Dtype::kBF16), kConfig);
  fill(model);
  model.use_graphs(false);
  LoopCase c = mixed_loop();
  CHECK(c.compare(model, 4).empty());
}

// To the end and beyond: every position that a window covers is filled, and steps that are left over do
// nothing.
DN_TEST(cuda_loop_ends) {
  Model model(make_cuda_backend(0, Dtype::kF32), kConfig);
  fill(model);
  LoopCase c;
  c.add(6, 2, 6, 3);
  c.add(4, 4, 4, 2);  // nothing is open
  c.request.steps = 5;
  LoopLog log;
  model.denoise_steps(c.request, &log);
  CHECK(log.events.size() == 10);
  int32_t committed = 0;
  for (const LoopRow& row : log.rows) committed += row.committed;
  CHECK(committed == 4);
  for (size_t e = 0; e < log.events.size(); ++e) {
    const bool works = e % 2 == 0 && e < 6;
    CHECK((log.events[e].end > log.events[e].begin) == works);
  }
}

// A stale copy of the weights, or a graph of activations that have moved, would show here.
DN_TEST(cuda_loop_follows_the_model) {
  Model model(make_cuda_backend(0, Dtype::kBF16), kConfig);
  fill(model);
  LoopCase first = mixed_loop();
  CHECK(first.compare(model, 2).empty());
  for (size_t i = 0; i < model.parameters().size(); ++i) {
    std::vector<float> values = parameter(model, i);
    for (float& x : values) x *= 0.5f;
    model.set_parameter(i, values.data());
  }
  LoopCase second = mixed_loop();
  CHECK(second.compare(model, 2).empty());
  model.forward(make_batch({80, 80, 80, 80, 80, 80}), {});  // the activations move
  LoopCase third = mixed_loop();
  CHECK(third.compare(model, 2).empty());
}

DN_TEST(cuda_loop_reports_logits_that_are_not_finite) {
  Model model(make_cuda_backend(0, Dtype::kF32), kConfig);
  fill(model);
  LoopCase c;
  c.add(6, 2, 6, 3);
  c.request.steps = 2;
  LoopLog log;
  const size_t index = model.find_parameter("ln_f.bias");
  const std::vector<float> good = parameter(model, index),
                           broken(good.size(), std::numeric_limits<float>::infinity());
  model.set_parameter(index, broken.data());
  CHECK_THROWS(model.denoise_steps(c.request, &log), Code::kDiverged, "logits of sequence 0 are not finite");
  model.set_parameter(index, good.data());
  CHECK(c.compare(model, 3).empty());
}

DN_TEST(cuda_loop_refuses_bad_requests) {
  Model model(make_cuda_backend(0, Dtype::kF32), kConfig), cpu(make_cpu_backend(1), kConfig);
  LoopLog log;
  const auto refused = [&](const char* part, const auto& spoil) {
    LoopCase c;
    c.add(6, 2, 6, 3);
    spoil(&c.request);
    CHECK_THROWS(model.denoise_steps(c.request, &log), Code::kArgument, part);
  };
  refused("0 steps, expected 1 to 64", [](LoopRequest* r) { r->steps = 0; });
  refused("id 97 of row 1 is outside the vocabulary", [](LoopRequest* r) { r->ids[1] = 97; });
  refused("6 ids but 5 open flags", [](LoopRequest* r) { r->open.pop_back(); });
  refused("rows [0, 7) of 6", [](LoopRequest* r) { r->sequences[0].end = 7; });
  refused("neither full nor causal by blocks",
          [](LoopRequest* r) { r->sequences[0].mask.kind = MaskKind::kCausal; });
  refused("position 0 is open", [](LoopRequest* r) { r->sequences[0].shift = r->open[0] = 1; });
  refused("has 3 steps, of which 3 are spent", [](LoopRequest* r) { r->sequences[0].block_step = 3; });
  refused("window 0 is [2, 8) of 6 positions", [](LoopRequest* r) { r->windows[0].end = 8; });
  refused("sequence 0: top_p is 0", [](LoopRequest* r) { r->sequences[0].top_p = 0; });
  refused("parameter is nan", [](LoopRequest* r) { r->sequences[0].parameter = std::nan(""); });
  refused("-1 steps are spent", [](LoopRequest* r) { r->sequences[0].block_step = -1; });
  refused("cover 6 of 7 rows", [](LoopRequest* r) {
    r->ids.push_back(0);
    r->open.push_back(0);
  });
  Model single(make_cuda_backend(0, Dtype::kF32), {1, 1, 8, 16, 1});
  LoopCase nothing_left;
  nothing_left.add(6, 2, 6, 3).banned = 0;
  std::fill(nothing_left.request.ids.begin(), nothing_left.request.ids.end(), 0);
  nothing_left.request.steps = 1;
  CHECK_THROWS(single.denoise_steps(nothing_left.request, &log), Code::kArgument, "no id that is not banned");
  CHECK(!cpu.has_device_loop());
  LoopCase c;
  c.add(6, 2, 6, 3);
  CHECK_THROWS(cpu.denoise_steps(c.request, &log), Code::kArgument, "takes one step at a time");
}

#ifdef DN_CUDA_EMULATOR

const ModelConfig kTiny{1, 1, 8, 64, 97};

// One graph a shape, however many calls; the least recently used one goes when there are more than eight.
DN_TEST(cuda_loop_captures_once_a_shape) {
  Model model(make_cuda_backend(0), kTiny);
  model.initialise(1);
  const int handles = emulator::memory().handles;
  emulator::GraphCounts& counts = emulator::graph_counts();
  const auto run = [&](int32_t sequences, int32_t steps) {
    LoopCase c;
    for (int32_t s = 0; s < sequences; ++s) c.add(64, 60, 64, 40);
    c.request.steps = steps;
    LoopLog log;
    model.denoise_steps(c.request, &log);
  };
  run(10, 2);  // the largest first: memory that grows later forgets what was captured
  emulator::GraphCounts before = counts;
  run(1, 4);
  CHECK(counts.captures == before.captures + 1);
  CHECK(counts.launches == before.launches + 3);  // the first step of a shape is issued
  run(1, 4);
  run(1, 2);
  CHECK(counts.captures == before.captures + 1);
  CHECK(counts.launches == before.launches + 9);
  for (int32_t sequences = 2; sequences <= 9; ++sequences) run(sequences, 2);
  CHECK(emulator::memory().handles == handles + 8);
  before = counts;
  run(4, 2);
  CHECK(counts.captures == before.captures);
  run(1, 2);
  CHECK(counts.captures == before.captures + 1);
  CHECK(emulator::memory().handles == handles + 8);
}

// Work is left out for rows that are not there: a step of one row, and one after the end.
DN_TEST(cuda_loop_leaves_out_what_is_not_there) {
  Model model(make_cuda_backend(0), kTiny);
  model.initialise(1);
  const auto work = [&](int32_t begin) {
    LoopCase c;
    c.add(64, begin, 64, 40);
    LoopLog log;
    model.denoise_steps(c.request, &log);
    const int64_t before = emulator::collectives();
    model.denoise_steps(c.request, &log);
    return emulator::collectives() - before;
  };
  const int64_t many = work(0), one = work(63), none = work(64);
  CHECK_MSG(one * 4 < many,
            "one row takes " + std::to_string(one) + " collectives, all take " + std::to_string(many));
  CHECK_MSG(none * 4 < one, "a step after the end takes " + std::to_string(none) +
                                " collectives, one row takes " + std::to_string(one));
}

DN_TEST(cuda_loop_memory_is_estimated_and_given_back) {
  emulator::MemoryState& memory = emulator::memory();
  const size_t outside = memory.used;
  const int handles = memory.handles;
  {
    LoopCase small, large;
    small.add(5, 2, 5, 3);
    for (int s = 0; s < 4; ++s) large.add(64, 1, 64, 40);
    large.request.steps = 10;
    small.request.steps = 2;
    LoopLog log;
    size_t grown = 0;
    {
      Model model(make_cuda_backend(0), kConfig);
      fill(model);
      model.denoise_steps(small.request, &log);
      const size_t before = memory.used;
      model.denoise_steps(large.request, &log);
      model.backend().synchronize();
      grown = memory.used - before;
    }
    Model model(make_cuda_backend(0), kConfig);
    fill(model);
    model.denoise_steps(small.request, &log);
    model.backend().synchronize();
    const size_t before = memory.used, limit = memory.limit;
    memory.limit = before + grown / 2;
    CHECK_THROWS(model.denoise_steps(large.request, &log), Code::kOutOfMemory,
                 "a call of 10 denoising steps over 256 tokens in 4 sequences needs about");
    CHECK(memory.used == before);
    model.denoise_steps(small.request, &log);
    memory.limit = before + grown + grown / 10;
    model.denoise_steps(large.request, &log);
    memory.limit = limit;
  }
  CHECK(memory.used == outside);
  CHECK(memory.handles == handles);
  CHECK(memory.overruns == 0);
}

#endif

}  // namespace
}  // namespace dn::cuda_test
