// The host's part of the denoising loop: rounding shapes, laying out and sending the state, capturing a step
// and replaying it, and reading the log.

#include <algorithm>
#include <cstring>
#include <string>

#include "core/error.h"
#include "cuda/backend_loop.h"
#include "cuda/gemm.h"
#include "cuda/rows.h"

namespace dn::cuda {
namespace {

constexpr int64_t kSmallestBucket = 64;
constexpr size_t kMostGraphs = 8;
constexpr int64_t kUsualSteps =
    8;  // the log has room for so many at least, so that its memory stays in place

// Four sizes to an octave.
int64_t round_tokens(int64_t n) {
  int64_t power = kSmallestBucket;
  while (2 * power <= n) power *= 2;
  const int64_t granule = std::max(kSmallestBucket, power / 4);
  return (n + granule - 1) / granule * granule;
}

int64_t round_to_power(int64_t n, int64_t least) {
  int64_t power = least;
  while (power < n) power *= 2;
  return power;
}

// Query tiles of any sequences of that many tokens; those of listed rows are fewer.
int64_t most_tiles(const StepShape& shape) { return shape.N / kQueryTile + shape.S; }

template <typename T>
void put(std::vector<char>* bytes, size_t at, const T* values, size_t count) {
  if (count > 0) std::memcpy(bytes->data() + at, static_cast<const void*>(values), count * sizeof(T));
}

}  // namespace

CudaLoop::Layout::Layout(const StepShape& s) {
  size_t used = 0;
  const auto take = [&](int64_t count, size_t element) {
    const size_t begin = used;
    used += (static_cast<size_t>(count) * element + 63) / 64 * 64;
    return begin;
  };
  const int64_t tile_count = most_tiles(s);
  chosen = take(s.N, sizeof(int32_t));
  keys = take(s.N, sizeof(double));
  rows = take(s.R, sizeof(int64_t));
  query_positions = take(s.R, sizeof(int32_t));
  draws = take(s.R, sizeof(DenoiseRow));
  results = take(s.R, sizeof(DenoiseResult));
  scores = take(s.R, sizeof(float));
  order = take(s.R, sizeof(int32_t));
  spans = take(tile_count, sizeof(Spans));
  listed_spans = take(tile_count, sizeof(Spans));
  sent = counters = take(1, sizeof(LoopCounters));
  items = take(s.S, sizeof(LoopItem));
  all_items = take(s.S, sizeof(AttentionItem));
  listed_items = take(s.S, sizeof(AttentionItem));
  tiles = take(tile_count, sizeof(AttentionTile));
  positions = take(s.N, sizeof(int32_t));
  ids = take(s.N, sizeof(int32_t));
  open = take(s.N, sizeof(uint8_t));
  windows = take(s.N + s.S, sizeof(LoopWindow));
  failures = take(s.S, sizeof(LoopFailure));
  events = take(kMostLoopSteps * s.S, sizeof(LoopEvent));
  log = take(std::max(s.loop_steps, kUsualSteps) * s.R, sizeof(LoopRow));
  bytes = used;
}

size_t CudaLoop::memory_bytes(const StepShape& rounded) { return Layout(rounded).bytes; }

StepShape CudaLoop::rounded(const StepShape& shape) const {
  StepShape r = shape;
  r.N = round_tokens(shape.N);
  r.S = round_to_power(shape.S, 1);
  r.R = std::min(r.N, round_to_power(shape.R, kSmallestBucket));
  return r;
}

// The part of the memory that a call sends, [sent, events).
std::vector<char> CudaLoop::message(const LoopRequest& request, const Layout& layout) const {
  std::vector<char> bytes(layout.events - layout.sent, 0);
  const size_t S = static_cast<size_t>(shape_.S);
  std::vector<LoopItem> items(S);
  std::vector<AttentionItem> queries(S);
  std::vector<AttentionTile> tiles;
  std::vector<int32_t> positions;
  for (size_t s = 0; s < request.sequences.size(); ++s) {
    const LoopSequence& q = request.sequences[s];
    items[s].sequence = q;
    AttentionItem& item = queries[s];
    item.q_begin = item.kv_begin = q.begin;
    item.q_end = q.end;
    item.k_len = static_cast<int32_t>(q.end - q.begin);
    item.first_tile = static_cast<int32_t>(tiles.size());
    item.mask = q.mask;
    for (int32_t first = 0; first < item.k_len; first += kQueryTile)
      tiles.push_back({static_cast<int32_t>(s), first});
    for (int32_t i = 0; i < item.k_len; ++i) positions.push_back(i);
  }
  // Tiles that are left over lie behind the end of a sequence.
  tiles.resize(static_cast<size_t>(tiles_), AttentionTile{0, 1 << 30});
  LoopCounters counters;
  counters.N = static_cast<int32_t>(request.ids.size());
  counters.log_rows = static_cast<int32_t>(
      std::count_if(request.open.begin(), request.open.end(), [](uint8_t open) { return open != 0; }));
  const std::vector<LoopFailure> failures(S);
  put(&bytes, layout.counters - layout.sent, &counters, 1);
  put(&bytes, layout.items - layout.sent, items.data(), S);
  put(&bytes, layout.all_items - layout.sent, queries.data(), S);
  put(&bytes, layout.listed_items - layout.sent, queries.data(), S);
  put(&bytes, layout.tiles - layout.sent, tiles.data(), tiles.size());
  put(&bytes, layout.positions - layout.sent, positions.data(), positions.size());
  put(&bytes, layout.ids - layout.sent, request.ids.data(), request.ids.size());
  put(&bytes, layout.open - layout.sent, request.open.data(), request.open.size());
  put(&bytes, layout.windows - layout.sent, request.windows.data(), request.windows.size());
  put(&bytes, layout.failures - layout.sent, failures.data(), S);
  return bytes;
}

void CudaLoop::begin(const LoopRequest& request, const StepShape& rounded, const void* activations) {
  const Stream stream = backend_.begin();
  if (static_cast<int64_t>(request.windows.size()) > rounded.N + rounded.S)
    throw Error(Code::kArgument, "denoising steps: " + std::to_string(request.windows.size()) +
                                     " windows, more than tokens and sequences");
  if (rounded.C / rounded.NH > kLargestAnyHead)
    throw Error(Code::kArgument, "denoising steps: head size " + std::to_string(rounded.C / rounded.NH) +
                                     ", on CUDA at most " + std::to_string(kLargestAnyHead));
  shape_ = rounded;
  const Layout layout(shape_);
  char* const memory = static_cast<char*>(backend_.loop_memory_.reserve(layout.bytes));
  if (memory != memory_) {
    cuda::synchronize(stream);
    forget_graphs();
  }
  memory_ = memory;
  // Rows without filters take the fused head where it fits, as Backend::head_denoise has it; the others need
  // their logits.
  const bool fits = backend_.dtype_ == Dtype::kBF16 && shape_.C % kFusedMultiple == 0;
  const bool filtered = shape_.logit_rows > 0;
  const bool plain = std::any_of(request.sequences.begin(), request.sequences.end(),
                                 [&](const LoopSequence& q) { return !q.draw().needs_logits(shape_.V); });
  key_ = Key();
  key_.N = shape_.N;
  key_.S = shape_.S;
  key_.R = shape_.R;
  key_.activations = activations;
  key_.memory = memory_;
  if (plain && fits)
    key_.parts = backend_.head_parts_.take<TilePart>(std::min(shape_.R, kFusedRows) * head_tiles(shape_.V));
  if (filtered || !fits) {
    head_rows_ = std::min(shape_.R, backend_.head_chunk_rows(shape_.V, false));
    key_.logits = backend_.logits_.take<float>(head_rows_ * logits_stride(shape_.V));
    key_.tile_mass = backend_.tile_mass_.take<double>(head_rows_ * head_tiles(shape_.V));
  }

  call_ = LoopCall();
  call_.S = shape_.S;
  call_.items = at<LoopItem>(layout.items);
  call_.counters = at<LoopCounters>(layout.counters);
  call_.windows = at<LoopWindow>(layout.windows);
  call_.ids = at<int32_t>(layout.ids);
  call_.open = at<uint8_t>(layout.open);
  call_.chosen = at<int32_t>(layout.chosen);
  call_.keys = at<double>(layout.keys);
  call_.rows = at<int64_t>(layout.rows);
  call_.query_positions = at<int32_t>(layout.query_positions);
  call_.draws = at<DenoiseRow>(layout.draws);
  call_.listed = at<AttentionItem>(layout.listed_items);
  call_.results = at<DenoiseResult>(layout.results);
  call_.scores = at<float>(layout.scores);
  call_.order = at<int32_t>(layout.order);
  call_.failures = at<LoopFailure>(layout.failures);
  call_.events = at<LoopEvent>(layout.events);
  call_.log = at<LoopRow>(layout.log);

  tiles_ = most_tiles(shape_);
  AttentionCall a;
  a.items = at<AttentionItem>(layout.all_items);
  a.query_tiles = at<AttentionTile>(layout.tiles);
  a.positions = at<int32_t>(layout.positions);
  a.tile_spans = at<Spans>(layout.spans);
  a.query_tile_count = tiles_;
  a.query_rows = shape_.N;
  a.NH = static_cast<int32_t>(shape_.NH);
  a.HS = static_cast<int32_t>(shape_.C / shape_.NH);
  all_queries_ = a;
  a.items = call_.listed;
  a.positions = call_.query_positions;
  a.tile_spans = at<Spans>(layout.listed_spans);
  a.query_rows = shape_.R;
  listed_queries_ = a;

  const std::vector<char> bytes = message(request, layout);
  backend_.staging_.send(bytes.data(), bytes.size(), memory_ + layout.sent);
  steps_ = request.steps;
  sequences_ = static_cast<int32_t>(request.sequences.size());
  begins_.clear();
  for (const LoopSequence& q : request.sequences) begins_.push_back(q.begin);
  const size_t open = static_cast<size_t>(
      std::count_if(request.open.begin(), request.open.end(), [](uint8_t each) { return each != 0; }));
  failures_at_ = layout.failures;
  result_bytes_ = layout.log - layout.failures + static_cast<size_t>(steps_) * open * sizeof(LoopRow);
}

// The first step of a new shape is issued, not captured: it takes what the ops take at their first call (the
// bf16 copy of the weights, the library's choices).
void CudaLoop::run(int32_t steps, const std::function<void()>& issue) {
  struct Reset {
    LiveRows* live;
    ~Reset() { *live = {}; }
  } const reset{&backend_.live_};
  int32_t done = 0;
  Captured* captured = graphs_on_ ? find(key_) : nullptr;
  if (captured) {
    backend_.operand(captured->wte);  // the copy may be stale
  } else {
    issue();
    done = 1;
    if (graphs_on_ && done < steps) captured = capture(key_, issue);
  }
  for (; done < steps; ++done) captured ? launch_graph(captured->graph, backend_.state_->stream()) : issue();
}

CudaLoop::Captured* CudaLoop::find(const Key& key) {
  for (auto each = graphs_.begin(); each != graphs_.end(); ++each) {
    if (!(each->key == key)) continue;
    graphs_.splice(graphs_.begin(), graphs_, each);
    return &graphs_.front();
  }
  return nullptr;
}

CudaLoop::Captured* CudaLoop::capture(const Key& key, const std::function<void()>& issue) {
  const Stream stream = backend_.state_->stream();
  begin_capture(stream);
  backend_.capturing_ = true;
  try {
    issue();
  } catch (...) {
    backend_.capturing_ = false;
    cancel_capture(stream);
    throw;
  }
  backend_.capturing_ = false;
  Captured captured;
  captured.key = key;
  captured.graph = end_capture(stream);
  captured.wte = wte_;
  graphs_.push_front(captured);
  if (graphs_.size() > kMostGraphs) {
    destroy_graph(graphs_.back().graph);
    graphs_.pop_back();
  }
  return &graphs_.front();
}

void CudaLoop::forget_graphs() {
  for (const Captured& each : graphs_) destroy_graph(each.graph);
  graphs_.clear();
}

void CudaLoop::finish(LoopLog* log) {
  const Stream stream = backend_.begin();
  std::vector<char> bytes(result_bytes_);
  copy_to_host(bytes.data(), memory_ + failures_at_, bytes.size(), stream);
  cuda::synchronize(stream);
  const auto read = [&](auto* value, size_t offset) {
    std::memcpy(static_cast<void*>(value), bytes.data() + offset - failures_at_, sizeof *value);
  };
  const Layout layout(shape_);
  for (int32_t s = 0; s < sequences_; ++s) {
    LoopFailure failure;
    read(&failure, layout.failures + static_cast<size_t>(s) * sizeof failure);
    if (failure.id < 0) continue;
    throw Error(Code::kDiverged, "denoising steps: logits of sequence " + std::to_string(s) +
                                     " are not finite: id " + std::to_string(failure.id) + " has " +
                                     std::to_string(failure.value) + " at position " +
                                     std::to_string(failure.position));
  }
  log->events.clear();
  log->rows.clear();
  for (int32_t t = 0; t < steps_; ++t) {
    for (int32_t s = 0; s < sequences_; ++s) {
      LoopEvent event;
      read(&event, layout.events + static_cast<size_t>(t * shape_.S + s) * sizeof event);
      const int32_t begin = static_cast<int32_t>(log->rows.size());
      for (int32_t r = event.begin; r < event.end; ++r) {
        log->rows.emplace_back();
        read(&log->rows.back(), layout.log + static_cast<size_t>(r) * sizeof(LoopRow));
      }
      log->events.push_back({event.step, begin, static_cast<int32_t>(log->rows.size())});
    }
  }
}

void CudaLoop::embed(Tensor out, const Weight& wte, Tensor wpe) {
  const Stream stream = backend_.begin();
  wte_ = wte;
  all_queries_.spans_known = false;
  choose_rows(call_, stream);
  backend_.live_ = {&call_.counters->tokens, 0};
  embedding_forward(out, call_.ids, all_queries_.positions, static_cast<const float*>(wte.data), wpe, stream,
                    backend_.live_);
}

void CudaLoop::gather(Tensor dst, Tensor src) {
  const Stream stream = backend_.begin();
  backend_.live_ = {&call_.counters->rows, 0};
  gather_rows(dst, src, call_.rows, stream, backend_.live_);
}

void CudaLoop::attention(Tensor out, Tensor q, Tensor kv, bool listed, int64_t) {
  const Stream stream = backend_.begin();
  AttentionCall call = listed ? listed_queries_ : all_queries_;
  call.k = kv.data;
  call.v = kv.columns(shape_.C, shape_.C).data;
  call.kv_stride = kv.stride;
  call.live = backend_.live_;
  attention_forward(call, out, Tensor(), q,
                    attention_on_tensor_cores(call, backend_.dtype_, q.stride, kv.stride), stream);
  if (!listed) all_queries_.spans_known = true;
}

void CudaLoop::decide(Tensor hidden, const Weight& wte) {
  const Stream stream = backend_.begin();
  if (key_.parts) {
    backend_.head_denoise_listed(call_.results, hidden, call_.draws, shape_.R, &call_.counters->rows, wte);
  }
  // After the fused head, whose results of filtered rows are overwritten.
  if (key_.logits) denoise_stored(hidden, wte, key_.parts != nullptr);
  decide_rows(call_, stream);
  backend_.live_ = {};
}

void CudaLoop::denoise_stored(Tensor hidden, const Weight& wte, bool filtered_only) {
  const Stream stream = backend_.state_->stream();
  const int64_t V = wte.N, stride = logits_stride(V);
  const Operand head = backend_.operand(wte);
  float* const logits = backend_.logits_.take<float>(head_rows_ * stride);
  for (int64_t begin = 0; begin < shape_.R; begin += head_rows_) {
    const int64_t count = std::min(head_rows_, shape_.R - begin);
    const LiveRows live{&call_.counters->rows, begin};
    const Tensor inp = hidden.slice(begin, count);
    Product p;  // logits (count, V) fp32 = inp * wte^T
    p.M = count;
    p.N = V;
    p.K = inp.cols;
    p.input = inp.dtype;
    p.output = Dtype::kF32;
    p.a = {inp.data, inp.stride, false};
    p.b = head;
    p.c = logits;
    p.c_stride = stride;
    p.live = live;
    backend_.multiply(p);
    DenoiseCall d;
    d.logits = logits;
    d.stride = stride;
    d.V = V;
    d.rows = call_.draws + begin;
    d.first_row = begin;
    d.R = count;
    d.live = live;
    d.filtered_only = filtered_only;
    d.tile_mass = backend_.tile_mass_.take<double>(head_rows_ * head_tiles(V));
    d.results = call_.results + begin;
    denoise(d, stream);
  }
}

}  // namespace dn::cuda
