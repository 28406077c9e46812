// Denoising steps that stay on the device: checks a request and drives the network through the backend's
// DeviceLoop, with the memory and the blocks of an ordinary forward pass.

#include <algorithm>
#include <cmath>
#include <string>

#include "core/error.h"
#include "core/model.h"
#include "core/workspace.h"

namespace dn {
namespace {

[[noreturn]] void refuse(const std::string& what) { bad("denoising steps: " + what); }

bool is_planned(LoopSampler sampler) {
  return sampler == LoopSampler::kAncestral || sampler == LoopSampler::kConfidence;
}

void check_windows(const LoopRequest& request, const LoopSequence& sequence, const std::string& where) {
  if (sequence.window_begin < 0 || sequence.window_end < sequence.window_begin ||
      sequence.window_end > static_cast<int64_t>(request.windows.size())) {
    refuse(where + " has windows [" + str(sequence.window_begin) + ", " + str(sequence.window_end) + ") of " +
           std::to_string(request.windows.size()));
  }
  int32_t filled = 0;
  for (int32_t w = sequence.window_begin; w < sequence.window_end; ++w) {
    const LoopWindow& window = request.windows[static_cast<size_t>(w)];
    if (window.begin < filled || window.end < window.begin || window.end > sequence.end - sequence.begin) {
      refuse(where + ": window " + str(w) + " is [" + str(window.begin) + ", " + str(window.end) + ") of " +
             str(sequence.end - sequence.begin) + " positions, after one that ends at " + str(filled));
    }
    filled = window.end;
    const int32_t spent = w == sequence.window_begin ? sequence.block_step : 0;
    const auto open = request.open.begin() + sequence.begin;
    const bool is_filled =
        std::all_of(open + window.begin, open + window.end, [](uint8_t each) { return each == 0; });
    if (window.steps < 0 || (is_planned(sequence.sampler) && window.steps <= spent && !is_filled)) {
      refuse(where + ": window " + str(w) + " has " + str(window.steps) + " steps, of which " + str(spent) +
             " are spent");
    }
  }
}

}  // namespace

void Model::check_loop(const LoopRequest& request) const {
  const int64_t N = static_cast<int64_t>(request.ids.size());
  if (N == 0) refuse("there are no tokens");
  if (request.open.size() != request.ids.size())
    refuse(str(N) + " ids but " + std::to_string(request.open.size()) + " open flags");
  if (request.steps < 1 || request.steps > kMostLoopSteps)
    refuse(str(request.steps) + " steps, expected 1 to " + str(kMostLoopSteps));
  for (int64_t n = 0; n < N; ++n) {
    const int32_t id = request.ids[static_cast<size_t>(n)];
    if (id < 0 || id >= config_.vocab)
      refuse("id " + str(id) + " of row " + str(n) + " is outside the vocabulary of " + str(config_.vocab));
  }
  int64_t covered = 0;
  for (size_t s = 0; s < request.sequences.size(); ++s) {
    const LoopSequence& q = request.sequences[s];
    const std::string where = "sequence " + std::to_string(s);
    if (q.begin != covered || q.end <= q.begin || q.end > N || q.end - q.begin > config_.context) {
      refuse(where + " has rows [" + str(q.begin) + ", " + str(q.end) + ") of " + str(N) +
             ", expected a non-empty range that starts at " + str(covered) + ", of at most the context, " +
             str(config_.context));
    }
    covered = q.end;
    if ((q.mask.kind != MaskKind::kFull && q.mask.kind != MaskKind::kBlockCausal) || q.mask.block < 1)
      refuse(where + ": attention is neither full nor causal by blocks of at least 1");
    if (q.shift < 0 || q.shift > 1 ||
        (q.shift == 1 && request.open[static_cast<size_t>(q.begin)] != 0 && q.window_begin < q.window_end)) {
      refuse(where + ": position 0 is open, which no row predicts at a shift of " + str(q.shift));
    }
    const std::string fault = denoise_fault(q.draw(), config_.vocab);
    if (!fault.empty()) refuse(where + ": " + fault);
    if (!std::isfinite(q.parameter)) {
      refuse(where + ": the sampler's parameter is " + std::to_string(q.parameter) +
             ", expected a finite number");
    }
    if (q.block_step < 0) refuse(where + ": " + str(q.block_step) + " steps are spent, expected 0 or more");
    check_windows(request, q, where);
  }
  if (covered != N) refuse("the sequences cover " + str(covered) + " of " + str(N) + " rows");
}

void Model::denoise_steps(const LoopRequest& request, LoopLog* log) {
  DeviceLoop* const loop = backend_->device_loop();
  if (!loop) refuse("the backend " + backend_->name() + " takes one step at a time");
  check_loop(request);
  hidden_ = Tensor();
  prepare_inference();

  StepShape shape = step_shape(
      std::count_if(request.open.begin(), request.open.end(), [](uint8_t open) { return open != 0; }), false);
  shape.N = static_cast<int64_t>(request.ids.size());
  shape.S = static_cast<int64_t>(request.sequences.size());
  shape.loop_steps = request.steps;
  shape = loop->rounded(shape);
  const bool filtered = std::any_of(request.sequences.begin(), request.sequences.end(),
                                    [&](const LoopSequence& q) { return q.draw().needs_logits(shape.V); });
  if (filtered) shape.logit_rows = shape.R;
  const int64_t rows_held = std::max(shape.N, shape.R);
  InferenceActivations t;
  const size_t bytes = lay_out_inference(Carver(nullptr), shape.N, rows_held, &t);
  require_memory(*backend_, workspace_->arena.growth(bytes) + backend_->step_bytes(shape),
                 "a call of " + str(request.steps) + " denoising steps over " +
                     std::to_string(request.ids.size()) + " tokens in " +
                     std::to_string(request.sequences.size()) + " sequences",
                 "lower the batch size or the sequence length");
  workspace_->arena.reserve(*backend_, bytes, "the activations of a forward pass");
  lay_out_inference(Carver(workspace_->arena.data()), shape.N, rows_held, &t);

  BatchPlan& plan = workspace_->plan;
  plan.clear();
  plan.N = shape.N;
  plan.R = shape.R;
  plan.listed = true;
  plan.loop = loop;
  loop->begin(request, shape, workspace_->arena.data());
  loop->run(request.steps, [&] {
    loop->embed(t.h, weight(kWte), tensor(kWpe));
    loop->decide(run_blocks(t, shape.R, MatmulPrecision::kFP32, Tensor()), weight(kWte));
  });
  loop->finish(log);
}

void Model::use_graphs(bool on) {
  if (DeviceLoop* const loop = backend_->device_loop()) loop->use_graphs(on);
}

}  // namespace dn
