// The bodies of the rules of adamezo/buffered.h, with the arithmetic of csrc/cpu/loops.h. All other
// bodies are in bodies.cuh.
//
// Most rules have buffers and are bound by memory, or nearly so. So the types of weights and
// buffers and the rounding of stores are branches, which a whole launch takes the same way, and not
// instances; and a thread takes its elements four at a time, in as many registers as the other
// kernels have. Four elements share a Philox call, and are one access of every array: 16 or 8
// bytes, which lane by lane are one stretch of memory. (Eight of a 16-bit array would be 32 bytes
// of a float32 buffer, and so two accesses of half of each sector.)
#pragma once

#include "cuda/bodies.cuh"

namespace adamezo {
namespace cuda {

constexpr int kQuad = 4;
static_assert(kChunk<float> == kQuad, "a window's quads are the chunks of float32");

// Four elements of one array, of which the run holds [low, high).
struct Array {
  unsigned char* address;  // of the first one, even if outside the run
  ElementType type;
  int low, high;

  // The raw bits, not converted yet, so that nothing waits for them before they are needed. A word
  // holds two 16-bit elements. Elements outside the run are 0.
  ADAMEZO_HD void load(uint32_t words[kQuad]) const {
    type == ElementType::kFloat32 ? load_bits<uint32_t>(words) : load_bits<uint16_t>(words);
  }
  ADAMEZO_HD void store(const uint32_t words[kQuad]) const {
    type == ElementType::kFloat32 ? store_bits<uint32_t>(words) : store_bits<uint16_t>(words);
  }

 private:
  template <class Bits>
  struct alignas(kQuad * sizeof(Bits)) Access {
    Bits elements[kQuad];
  };

  // Whether the four elements can be one access.
  template <class Bits>
  ADAMEZO_HD bool whole() const {
    return low <= 0 && high >= kQuad &&
           reinterpret_cast<uint64_t>(address) % sizeof(Access<Bits>) == 0;
  }
  template <class Bits>
  ADAMEZO_HD void load_bits(uint32_t words[kQuad]) const {
    Access<Bits> access = {};
    if (whole<Bits>()) {
      access = *reinterpret_cast<const Access<Bits>*>(address);
    } else {
      ADAMEZO_UNROLL
      for (int i = 0; i < kQuad; ++i)
        if (i >= low && i < high) access.elements[i] = reinterpret_cast<const Bits*>(address)[i];
    }
    std::memcpy(words, &access, sizeof access);
  }
  template <class Bits>
  ADAMEZO_HD void store_bits(const uint32_t words[kQuad]) const {
    Access<Bits> access;
    std::memcpy(&access, words, sizeof access);
    if (whole<Bits>()) {
      *reinterpret_cast<Access<Bits>*>(address) = access;
    } else {
      ADAMEZO_UNROLL
      for (int i = 0; i < kQuad; ++i)
        if (i >= low && i < high) reinterpret_cast<Bits*>(address)[i] = access.elements[i];
    }
  }
};

template <class T>
ADAMEZO_HD void widen(const uint32_t words[kQuad], float values[kQuad]) {
  T elements[kQuad];
  std::memcpy(elements, words, sizeof elements);
  ADAMEZO_UNROLL
  for (int i = 0; i < kQuad; ++i) values[i] = to_float32(elements[i]);
}

ADAMEZO_HD void widen(ElementType type, const uint32_t words[kQuad], float values[kQuad]) {
  switch (type) {
    case ElementType::kFloat32:
      return widen<float>(words, values);
    case ElementType::kBFloat16:
      return widen<bfloat16>(words, values);
    case ElementType::kFloat16:
      return widen<float16>(words, values);
  }
}

template <class T>
ADAMEZO_HD void narrow(const float values[kQuad], uint32_t words[kQuad]) {
  T elements[kQuad];
  ADAMEZO_UNROLL
  for (int i = 0; i < kQuad; ++i) from_float32(values[i], elements[i]);
  std::memcpy(words, elements, sizeof elements);
}

template <class T>
ADAMEZO_HD void narrow(const float values[kQuad], const uint32_t random[kQuad],
                       uint32_t words[kQuad]) {
  T elements[kQuad];
  round_stochastically(values, random, elements);
  std::memcpy(words, elements, sizeof elements);
}

// Where four elements of a window are, of which a row may hold some.
struct QuadInWindow {
  const Window& window;
  int first;  // the place of its first element in the window

  ADAMEZO_HD const Segment& segment() const { return window.segment; }
  ADAMEZO_HD uint64_t index() const { return window.index + uint64_t(first); }
  ADAMEZO_HD int low() const { return window.low - first; }
  ADAMEZO_HD int high() const { return window.high - first; }
  ADAMEZO_HD int64_t memory() const { return window.memory + first; }
  ADAMEZO_HD int64_t source() const { return window.source + first; }
  ADAMEZO_HD int64_t position() const { return window.position + first; }
  // The words of stochastic rounding: those of store_stochastic in bodies.cuh.
  ADAMEZO_HD void random_words(const DeviceJob& job, const Words& words, uint32_t parameter,
                               uint32_t x[kQuad]) const {
    const PhiloxStream stream = philox_stream(job.round_keys, words.directions[0], job.high);
    Exact::quad_words(job.round_keys, index(), parameter, stream, x);
  }
};

// Four elements: their weights, directions and the buffers of rule R.
template <class R, class Where>
struct Quad {
  const DeviceJob& job;
  const Words& words;
  Where at;
  float theta[kQuad], z[R::kDirections][kQuad], buffers[kBufferCapacity<R>][kQuad];

  // direction(k, z) makes the values of direction k.
  template <class Direction>
  ADAMEZO_HD void load(const Array& from, Direction direction) {
    uint32_t weights[kQuad], kept[kBufferCapacity<R>][kQuad];
    from.load(weights);
    ADAMEZO_UNROLL
    for (int i = 0; i < R::kBuffers; ++i) buffer(i).load(kept[i]);
    ADAMEZO_UNROLL
    for (int k = 0; k < R::kDirections; ++k) direction(k, z[k]);
    widen(job.type, weights, theta);
    ADAMEZO_UNROLL
    for (int i = 0; i < R::kBuffers; ++i) widen(job.buffer_type, kept[i], buffers[i]);
  }

  ADAMEZO_HD Array source() const { return array(at.segment().source, at.source(), job.type); }
  ADAMEZO_HD Array weights() const { return array(at.segment().address, at.memory(), job.type); }
  ADAMEZO_HD void store_theta() const { store(weights(), Purpose::kRounding, theta); }
  ADAMEZO_HD void store_buffers() const {
    ADAMEZO_UNROLL
    for (int i = 0; i < R::kBuffers; ++i)
      store(buffer(i), Purpose(uint32_t(Purpose::kBuffer) + uint32_t(i)), buffers[i]);
  }

  // All values of one element.
  ADAMEZO_HD void get(int element, float of_z[R::kDirections],
                      float of_buffers[kBufferCapacity<R>]) const {
    ADAMEZO_UNROLL
    for (int k = 0; k < R::kDirections; ++k) of_z[k] = z[k][element];
    ADAMEZO_UNROLL
    for (int i = 0; i < R::kBuffers; ++i) of_buffers[i] = buffers[i][element];
  }
  ADAMEZO_HD void set(int element, const float of_buffers[kBufferCapacity<R>]) {
    ADAMEZO_UNROLL
    for (int i = 0; i < R::kBuffers; ++i) buffers[i][element] = of_buffers[i];
  }

 private:
  // `distance` is that of the first element from the address, in elements.
  ADAMEZO_HD Array array(uint64_t base, int64_t distance, ElementType type) const {
    const int64_t size = type == ElementType::kFloat32 ? 4 : 2;
    auto* const address = reinterpret_cast<unsigned char*>(base) + distance * size;
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(address));
#endif
    return {address, type, at.low(), at.high()};
  }
  ADAMEZO_HD Array buffer(int i) const {
    return array(at.segment().buffers[i], at.position(), job.buffer_type);
  }

  ADAMEZO_HD void store(const Array& to, Purpose purpose, const float values[kQuad]) const {
    uint32_t bits[kQuad];
    if (to.type == ElementType::kFloat32) {
      narrow<float>(values, bits);
    } else if (job.rounding == Rounding::kNearest) {
      to.type == ElementType::kBFloat16 ? narrow<bfloat16>(values, bits)
                                        : narrow<float16>(values, bits);
    } else {
      uint32_t random[kQuad];
      const uint32_t parameter = uint32_t(at.segment().parameter) | uint32_t(purpose) << 24;
      at.random_words(job, words, parameter, random);
      to.type == ElementType::kBFloat16 ? narrow<bfloat16>(values, random, bits)
                                        : narrow<float16>(values, random, bits);
    }
    to.store(bits);
  }
};

// The quads of a worker's share that hold elements of a run: calls use(where) for each.
template <class Use>
ADAMEZO_HD void for_each_quad(const DeviceJob& job, int64_t worker, int64_t workers, Use use) {
  walk_windows(job, worker, workers, [&](const Window& window) {
    ADAMEZO_NO_UNROLL
    for (int c = 0; c < kThreadElements / kQuad; ++c) {
      const int first = chunk_in_window<float>(window.lane, c);
      if (first + kQuad <= window.low || first >= window.high) continue;
      use(QuadInWindow{window, first});
    }
  });
}

// Four elements by rule R: theta = theta + scale d, read where the source is, where d is the rule's
// direction; and in an update, where that restores if scale is not 0, its step in the same pass, so
// that weights and buffers are read once and written once. The numbers of the step are read for
// each quad, out of shared memory: held from one to the next they would take too many registers.
template <class R, bool kUpdate, class Where, class Direction>
ADAMEZO_HD void quad_by_rule(const DeviceJob& job, const Words& words, const Where& where,
                             Direction direction) {
  Quad<R, Where> quad{job, words, where, {}, {}, {}};
  float n[kRuleNumbers];
  ADAMEZO_UNROLL
  for (int i = 0; i < kRuleNumbers; ++i) n[i] = words.numbers[i];
  quad.load(kUpdate ? quad.weights() : quad.source(), direction);
  ADAMEZO_UNROLL
  for (int i = 0; i < kQuad; ++i) {
    float z[R::kDirections], b[kBufferCapacity<R>];
    quad.get(i, z, b);
    float& value = quad.theta[i];
    if (!kUpdate || job.scale != 0.0f)
      value = ScalarLanes::fma(job.scale, rule_direction<R, ScalarLanes>(z, b, n), value);
    if constexpr (kUpdate) {
      const float step = R::template step<ScalarLanes>(z, b, n, job.eps);
      quad.set(i, b);
      value = descend<ScalarLanes>(value, step, words.step[0], words.step[1]);
    }
  }
  if constexpr (kUpdate) quad.store_buffers();
  quad.store_theta();
}

template <class D, class R, bool kUpdate>
struct ByRule {
  using Directions = D;

  static ADAMEZO_HD void run(const DeviceJob& job, const Workspace& space, int64_t worker,
                             int64_t workers) {
    for_each_quad(job, worker, workers, [&](const QuadInWindow& where) {
      const uint32_t parameter = uint32_t(where.segment().parameter) | uint32_t(Purpose::kDirection)
                                                                           << 24;
      quad_by_rule<R, kUpdate>(job, space.words, where, [&](int k, float z[kQuad]) {
        D::quad(job.round_keys, where.index(), parameter, space.table[k], z);
      });
    });
  }
};

// Calls use(body) with the body that runs the job. Returns whether this file has one.
template <class D, class Use>
bool select_rule(const Job& job, Use use) {
  bool found = false;
  with_rule(job.rule, [&](auto rule) {
    using R = decltype(rule);
    if constexpr (R::kUpdates)
      if (job.operation == Operation::kUpdate) found = true, use(ByRule<D, R, true>());
    if constexpr (R::kHasDirection)
      if (job.operation == Operation::kPerturb) found = true, use(ByRule<D, R, false>());
  });
  return found;
}

}  // namespace cuda
}  // namespace adamezo
