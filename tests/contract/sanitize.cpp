// Every kernel over odd sizes, alignments, strides and shares, for a build with sanitizers
// (ADAMEZO_SANITIZE in CMakeLists.txt). Each tensor has a heap block of its own and of exactly its
// size, so that one element read or written beside it is seen. All instruction sets, and the CUDA
// bodies on the host, have to give the same bits.
//
//   kernels_sanitized            runs them all, prints how many calls that were
//   kernels_sanitized overrun    runs one kernel over one element too many, which must be caught
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cuda/launch.h"

using namespace adamezo;

namespace {

struct Shape {
  int64_t rows, row_length, gap, misaligned;
};

// Elements in a block of their own, `misaligned` elements behind its start.
struct Elements {
  Elements(const Shape& s, int size, unsigned seed, bool special)
      : stride(s.row_length + s.gap), misaligned(s.misaligned), size(size) {
    const int64_t extent = s.rows && s.row_length ? (s.rows - 1) * stride + s.row_length : 0;
    bytes = size_t((misaligned + extent) * size);
    block.reset(static_cast<unsigned char*>(std::malloc(bytes ? bytes : 1)));
    for (size_t i = 0; i < bytes; ++i) block[i] = (seed = seed * 1664525 + 1013904223) >> 24;
    // Ordinary numbers: exponents far from overflow. Special ones may be anything, NaN too.
    if (!special)
      for (size_t i = size_t(size) - 1; i < bytes; i += size_t(size))
        block[i] = static_cast<unsigned char>((block[i] & 0x80) | 0x3b);
  }
  uint64_t address() const {
    return reinterpret_cast<uint64_t>(block.get()) + uint64_t(misaligned * size);
  }

  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  int64_t stride, misaligned;
  int size;
  size_t bytes;
  std::unique_ptr<unsigned char[], Free> block;
};

const std::vector<Shape> kShapes = {
    {1, 0, 0, 0},   {1, 1, 0, 1},  {1, 2, 0, 3},   {1, 3, 0, 2},     {1, 4, 0, 0},  {1, 5, 0, 1},
    {1, 15, 0, 3},  {1, 16, 0, 1}, {1, 17, 0, 7},  {1, 31, 0, 5},    {1, 63, 0, 1}, {1, 64, 0, 0},
    {1, 65, 0, 9},  {1, 67, 0, 2}, {1, 129, 0, 1}, {1, 257, 0, 3},   {5, 1, 2, 1},  {3, 7, 1, 3},
    {4, 16, 16, 0}, {2, 65, 3, 1}, {7, 33, 1, 5},  {1, 17000, 0, 1},
};
constexpr int kSizes[] = {4, 2, 2};  // of the three element types
constexpr int64_t kColumns[] = {7, 200, 1, 64, 1000};
constexpr int64_t kColumnCount = sizeof kColumns / sizeof *kColumns;

struct Call {
  Operation operation;
  Rounding rounding;
  bool second, elsewhere;
  int64_t horizon;
  int rule = kMoments;
  ElementType buffers = ElementType::kFloat32;
};

const std::vector<Call> kCalls = {
    {Operation::kSample, Rounding::kNearest, false, false, 1},
    {Operation::kPerturb, Rounding::kNearest, false, false, 1},
    {Operation::kPerturb, Rounding::kStochastic, false, false, 1},
    {Operation::kPerturb, Rounding::kNearest, false, true, 1},
    {Operation::kPerturb, Rounding::kStochastic, false, true, 1},
    {Operation::kUpdate, Rounding::kNearest, true, false, 1},
    {Operation::kUpdate, Rounding::kStochastic, true, false, 3},
    {Operation::kUpdate, Rounding::kNearest, false, false, 2},
    {Operation::kUpdate, Rounding::kStochastic, false, false, 1},
    {Operation::kMoment, Rounding::kNearest, false, false, 3},
    {Operation::kMoment, Rounding::kNearest, true, false, 3},
};

// Those of all rules: each perturbs somewhere else and makes two updates, with buffers of each
// type in turn.
std::vector<Call> with_rules(std::vector<Call> calls) {
  int rule = kMoments + 1, type = 0;
  const auto add = [&](auto of) {
    using R = decltype(of);
    const auto call = [&](Operation operation, Rounding rounding, bool elsewhere) {
      calls.push_back({operation, rounding, false, elsewhere, R::kDirections, rule,
                       ElementType(R::kBuffers ? type++ % 3 : 0)});
    };
    if (R::kHasDirection) call(Operation::kPerturb, Rounding::kStochastic, true);
    if (R::kUpdates) call(Operation::kUpdate, Rounding::kNearest, false);
    if (R::kUpdates) call(Operation::kUpdate, Rounding::kStochastic, false);
  };
  while (with_rule(rule, add)) ++rule;
  return calls;
}

long calls_made = 0;

// The bytes of all tensors and buffers after one call on one runner: an instruction set, or "cuda".
std::vector<unsigned char> after(const std::string& runner, Distribution distribution, int type,
                                 const Call& call, const std::vector<Shape>& shapes, int threads,
                                 uint64_t offset, bool special) {
  std::vector<Elements> tensors, sources, buffers;
  std::vector<Segment> table;
  int64_t elements = 0;
  const bool tiles = distribution == Distribution::kLowRank;
  const bool by_rows = tiles || distribution == Distribution::kFlipout;
  for (const Shape& shape : shapes) {
    const int64_t parameter = int64_t(table.size());
    Shape out = shape;
    if (call.elsewhere) out.gap = 0, out.misaligned += 1;
    tensors.emplace_back(out, kSizes[type], unsigned(parameter + 1), special);
    sources.emplace_back(shape, kSizes[type], unsigned(parameter + 7), special);
    const Elements& from = call.elsewhere ? sources.back() : tensors.back();
    Segment segment{tensors.back().address(),
                    from.address(),
                    shape.rows,
                    shape.row_length,
                    tensors.back().stride,
                    from.stride,
                    int64_t(offset % 5),
                    shape.row_length + 2,
                    parameter,
                    {0, 0},
                    elements,
                    by_rows ? kColumns[parameter % kColumnCount] : 0};
    // Rows of a piece of a wider matrix, or narrow or wide ones that the elements run on over.
    if (by_rows && shape.rows > 1) segment.columns = segment.index_stride;
    for (int i = 0; i < kMaxBuffers && call.rule != kMoments; ++i) {
      // Row after row; numbers as curvatures are, above 0.
      const Shape kept{1, shape.rows * shape.row_length, 0, (shape.misaligned + 3 * i) % 8};
      const int size = kSizes[int(call.buffers)];
      buffers.emplace_back(kept, size, unsigned(parameter + 13 + i), special);
      for (size_t at = size_t(size) - 1; !special && at < buffers.back().bytes; at += size_t(size))
        buffers.back().block[at] &= 0x7f;
      segment.buffers[i] = buffers.back().address();
    }
    table.push_back(segment);
    elements += shape.rows * shape.row_length;
  }
  const std::vector<uint32_t> directions = {9, 4, 0xffffffffu};
  const std::vector<float> first = {0.5f, -0.25f, 0.125f}, second = {0.5f, 0.25f, 0.0f};
  // Copies of just the length that the kernel may read.
  const std::vector<uint32_t> d(directions.begin(), directions.begin() + call.horizon);
  std::vector<float> f(first.begin(), first.begin() + call.horizon);
  const std::vector<float> s(second.begin(), second.begin() + call.horizon);
  if (runner == "cuda") f.insert(f.end(), s.begin(), s.end());
  Job job{};
  job.operation = call.operation;
  job.distribution = distribution;
  job.rank = 3;
  job.segments = table.data();
  job.segment_count = int64_t(table.size());
  job.elements = elements;
  job.type = ElementType(type);
  job.key = {0x85a308d3u, 0x243f6a88u};
  job.offset = offset;
  job.directions = d.data();
  job.horizon = call.horizon;
  job.first = f.data();
  job.second = call.second ? s.data() : nullptr;
  job.scale = 1e-3f;
  const std::vector<float> step = {-1e-2f, 0.999f};
  job.step = step.data();
  job.eps = 1e-8f;
  job.rounding = call.rounding;
  job.rule = call.rule;
  job.buffer_type = call.buffers;
  const std::vector<float> numbers = {0.5f, 0.25f, 0.75f, 0.125f, 1.5f, 0.25f, -1.25f, 0.0f};
  job.numbers = call.rule == kMoments ? nullptr : numbers.data();
  const DefaultFloatingPoint guard;
  if (runner == "cuda") {
    HighWords highs = {uint32_t(offset >> 34)};
    if (!tiles && (offset + 60000) >> 34 != offset >> 34) highs.push_back(highs[0] + 1);
    job.elements = (tiles ? count_tiles : count_windows)(table.data(), job.segment_count, offset);
    cuda_on_host(job, highs, 2, 32);
  } else {
    run(job, runner, threads);
  }
  ++calls_made;
  std::vector<unsigned char> bytes;
  for (const auto* all : {&tensors, &buffers})
    for (const Elements& t : *all) bytes.insert(bytes.end(), &t.block[0], &t.block[0] + t.bytes);
  return bytes;
}

[[noreturn]] void differ(const std::string& runner, int type, const Call& call) {
  std::fprintf(stderr, "%s has other bits: operation %d, rule %d, type %d\n", runner.c_str(),
               int(call.operation), call.rule, type);
  std::exit(1);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::string(arguments[1]) == "overrun") {
    Elements tensor({1, 64, 0, 0}, 4, 1, false);
    const Segment segment{
        tensor.address(), tensor.address(), 1, 65, 65, 65, 0, 65, 0, {0, 0}, 0, 0};
    const uint32_t direction = 0;
    Job job{};
    job.operation = Operation::kPerturb;
    job.segments = &segment;
    job.segment_count = 1;
    job.elements = 65;
    job.directions = &direction;
    job.horizon = 1;
    job.scale = 1.0f;
    run(job, "portable", 1);
    std::puts("not caught");
    return 0;
  }
  std::vector<std::string> runners = instruction_sets();
  for (const Distribution distribution : {Distribution::kExact, Distribution::kRademacher,
                                          Distribution::kLowRank, Distribution::kFlipout})
    for (int type = 0; type < 3; ++type)
      for (const Call& call : with_rules(kCalls)) {
        if (call.operation == Operation::kMoment && type != 0) continue;
        for (const uint64_t offset : {uint64_t(0), uint64_t(3), (uint64_t(1) << 34) - 70}) {
          // Directions of rows and columns take long: one place, and it is the hardest.
          if (distribution > Distribution::kRademacher && offset < 5) continue;
          for (const bool special : {false, true}) {
            // One tensor at a time, but for the last and largest; then all at once on several
            // threads.
            for (size_t i = 0; i <= kShapes.size(); ++i) {
              if (i + 1 == kShapes.size()) continue;
              const bool all = i == kShapes.size();
              const std::vector<Shape> shapes = all ? kShapes : std::vector<Shape>{kShapes[i]};
              if (special && !all) continue;
              const int threads = all ? 3 : 1;
              const auto expected =
                  after("portable", distribution, type, call, shapes, threads, offset, special);
              for (const std::string& runner : runners) {
                if (runner == "portable") continue;
                const auto got =
                    after(runner, distribution, type, call, shapes, threads, offset, special);
                if (!special && got != expected) differ(runner, type, call);
              }
              if (all && distribution != Distribution::kFlipout) {
                const auto got =
                    after("cuda", distribution, type, call, shapes, 1, offset, special);
                if (!special && got != expected) differ("cuda", type, call);
              }
            }
          }
        }
      }
  std::printf("%ld calls\n", calls_made);
  return 0;
}
