// The trial's loops on a CPU, for stream_2_trial.py. One library is compiled for each instruction
// set, by the compiler's flags. All arrays are whole windows that begin at a parameter's first
// element, so heads and tails are left out, of every version alike.

// gcc 12's own avx512fintrin.h passes an uninitialised operand behind an all-ones mask, and warns.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "stream_2.h"

#include "adamezo/rule.h"

namespace adamezo {
namespace trial {
namespace {

#if defined(__AVX512F__)
using Lanes = Avx512Lanes;
#elif defined(__AVX2__)
using Lanes = Avx2Lanes;
#else
using Lanes = ScalarLanes;
#endif
using F = Lanes::F;
using I = Lanes::I;
constexpr int kGroup = 4 * Lanes::kWidth;
constexpr int kMaxHorizon = 64;

// The elements that a call of every lane serves: fours of a group at `first`, and with two fours of
// a call those of the group half a window further.
struct Place {
  int64_t first;
  uint32_t block;
};

template <class V>
constexpr int64_t kPlaces = kWindowOfCalls / kGroup / V::kQuads;  // in a window

// The next place after one.
template <class V>
ADAMEZO_HD Place place_at(int64_t n) {
  const int64_t first = n / kPlaces<V> * kWindowOfCalls + n % kPlaces<V> * kGroup;
  return {first, uint32_t(n * Lanes::kWidth)};
}

ADAMEZO_HD PhiloxGroup<Lanes> blocks_at(const Place& place, PhiloxKey key, uint32_t parameter) {
  return philox_group<Lanes>(key, Lanes::group_blocks(place.block), parameter);
}

struct Job {
  PhiloxKey key;
  uint32_t parameter;
  int64_t windows;
};

struct Update {
  const uint32_t* directions;  // newest first
  int64_t horizon;
  const float *first, *second;
  float restore, minus_lr, decay, eps;
};

template <class V>
void sample(const Job& job, uint32_t direction, float* out) {
  const PhiloxStream stream = philox_stream(job.key, direction, 0);
  const auto begin = [&](int64_t n) ADAMEZO_INLINE_LAMBDA {
    return philox_begin<Lanes>(blocks_at(place_at<V>(n), job.key, job.parameter), stream);
  };
  auto call = begin(0);
  finish<Lanes, V>(call, job.key);
  for (int64_t n = 0; n < job.windows * kPlaces<V>; ++n) {
    I x[4];
    call_words<Lanes>(call, x);
    call = begin(n + 1);
    float* const to = out + place_at<V>(n).first;
    normals_beside<Lanes, V>(call, job.key, x, [&](int quad, F z[4]) ADAMEZO_INLINE_LAMBDA {
      Lanes::natural(z);
      for (int t = 0; t < 4; ++t) Lanes::store(z[t], to + quad * kHalfWindow + t * Lanes::kWidth);
    });
  }
}

template <class V>
void update(const Job& job, const Update& u, bfloat16* theta) {
  PhiloxStream streams[kMaxHorizon + 1];
  for (int64_t k = 0; k <= u.horizon; ++k)
    streams[k] = philox_stream(job.key, u.directions[k % u.horizon], 0);
  for (int64_t n = 0; n < job.windows * kPlaces<V>; ++n) {
    const Place place = place_at<V>(n);
    const auto blocks = blocks_at(place, job.key, job.parameter);
    bfloat16* const weights = theta + place.first;
    float restored[V::kQuads][kGroup];
    Moments<Lanes> moments[V::kQuads];
    for (auto& some : moments) some = zero_moments<Lanes>();
    auto call = philox_begin<Lanes>(blocks, streams[0]);
    finish<Lanes, V>(call, job.key);
    const auto add_direction = [&](int64_t k, auto&& newest) ADAMEZO_INLINE_LAMBDA {
      I x[4];
      call_words<Lanes>(call, x);
      call = philox_begin<Lanes>(blocks, streams[k + 1]);  // after the last: unused
      normals_beside<Lanes, V>(call, job.key, x, [&](int quad, F z[4]) ADAMEZO_INLINE_LAMBDA {
        accumulate<Lanes, true>(moments[quad], z, u.first[k], u.second[k]);
        newest(quad, z);
      });
    };
    add_direction(0, [&](int quad, F z[4]) ADAMEZO_INLINE_LAMBDA {
      Lanes::natural(z);
      for (int t = 0; t < 4; ++t) {
        const F value = Lanes::load(weights + quad * kHalfWindow + t * Lanes::kWidth);
        Lanes::store(Lanes::fma(Lanes::f(u.restore), z[t], value),
                     restored[quad] + t * Lanes::kWidth);
      }
    });
    for (int64_t k = 1; k < u.horizon; ++k) add_direction(k, [](int, F*) {});
    for (int quad = 0; quad < V::kQuads; ++quad) {
      F step[4];
      for (int j = 0; j < 4; ++j)
        step[j] = preconditioned<Lanes, true>(moments[quad].s1[j], moments[quad].s2[j], u.eps);
      Lanes::natural(step);
      for (int t = 0; t < 4; ++t) {
        const F value = Lanes::load(restored[quad] + t * Lanes::kWidth);
        Lanes::store(descend<Lanes>(value, step[t], u.minus_lr, u.decay),
                     weights + quad * kHalfWindow + t * Lanes::kWidth);
      }
    }
  }
}

// The pairs (z0, z1) that the words first, first + 1, ... stand for.
template <class V>
void pairs(uint32_t first, int64_t count, float* z0, float* z1) {
  uint32_t words[2][Lanes::kWidth];
  for (int64_t at = 0; at < count; at += 2 * Lanes::kWidth) {
    for (int i = 0; i < 2 * Lanes::kWidth; ++i) (&words[0][0])[i] = first + uint32_t(at + i);
    I x[2];
    std::memcpy(x, words, sizeof x);
    F z[4];
    normals_of_words<Lanes, V>(x, z, [](int) {});
    for (int i = 0; i < 2; ++i) {
      Lanes::store(z[2 * i], z0 + at + i * Lanes::kWidth);
      Lanes::store(z[2 * i + 1], z1 + at + i * Lanes::kWidth);
    }
  }
}

// What pairs add up to, besides counts of z0 in `bins` of 2^-8 from -8 on, and bits in `seen` for
// each |z0|, which is below 8.
struct Sums {
  double moments[7];  // of z0: first to sixth; at 0 the largest |z|
  double joint[4];    // of z0 z1, z0^2 z1^2, z0^3 z1, z0^4 z1^2
};
constexpr int kBins = 4096;

void add(int64_t count, const float* z0, const float* z1, Sums& sums, int64_t* bins,
         uint64_t* seen) {
  constexpr int kStep = 16;  // sums side by side, which a compiler makes vectors of
  double m[7][kStep] = {}, joint[4][kStep] = {};
  for (int64_t at = 0; at < count; at += kStep) {
    for (int i = 0; i < kStep; ++i) {
      const double a = z0[at + i], b = z1[at + i], aa = a * a, bb = b * b, ab = a * b;
      const double larger = std::fabs(a) > std::fabs(b) ? std::fabs(a) : std::fabs(b);
      m[0][i] = larger > m[0][i] ? larger : m[0][i];
      m[1][i] += a, m[2][i] += aa, m[3][i] += aa * a;
      m[4][i] += aa * aa, m[5][i] += aa * aa * a, m[6][i] += aa * aa * aa;
      joint[0][i] += ab, joint[1][i] += aa * bb, joint[2][i] += aa * ab;
      joint[3][i] += aa * aa * bb;
    }
  }
  for (int i = 0; i < kStep; ++i) {
    sums.moments[0] = m[0][i] > sums.moments[0] ? m[0][i] : sums.moments[0];
    for (int k = 1; k < 7; ++k) sums.moments[k] += m[k][i];
    for (int k = 0; k < 4; ++k) sums.joint[k] += joint[k][i];
  }
  for (int64_t at = 0; at < count; ++at) ++bins[int(z0[at] * 256.0f + 2048.0f)];
  if (seen)
    for (int64_t at = 0; at < count; ++at) {
      const uint32_t bits = float_to_bits(z0[at]) & 0x7fffffffu;
      seen[bits / 64] |= uint64_t(1) << (bits % 64);
    }
}

template <class V>
void add_words(uint32_t first, int64_t count, Sums& sums, int64_t* bins, uint64_t* seen) {
  constexpr int kPiece = 4096;
  float z0[kPiece], z1[kPiece];
  for (int64_t at = 0; at < count; at += kPiece) {
    const int64_t some = count - at < kPiece ? count - at : kPiece;
    pairs<V>(first + uint32_t(at), some, z0, z1);
    add(some, z0, z1, sums, bins, seen);
  }
}

// The versions by their number, which stream_2_trial.py names.
template <class Use>
bool with_version(int version, Use use) {
  switch (version) {
    case 0:
      return use(Stream<10, Form::kWords, false>()), true;
    case 1:
      return use(Stream<7, Form::kWords, false>()), true;
    case 2:
      return use(Stream<7, Form::kHalves, false>()), true;
    case 3:
      return use(Stream<7, Form::kHalves, true>()), true;
    case 4:
      return use(Stream<7, Form::kLattice, false>()), true;
    case 5:
      return use(Stream<7, Form::kLattice, true>()), true;
    case 6:
      return use(Stream<10, Form::kLattice, false>()), true;
  }
  return false;
}

}  // namespace
}  // namespace trial
}  // namespace adamezo

// Each returns whether there is such a version.
using namespace adamezo;

extern "C" {

bool trial_sample(int version, uint64_t key, uint32_t parameter, int64_t windows,
                  uint32_t direction, float* out) {
  const trial::Job job{{uint32_t(key), uint32_t(key >> 32)}, parameter, windows};
  return trial::with_version(version,
                             [&](auto v) { trial::sample<decltype(v)>(job, direction, out); });
}

bool trial_update(int version, uint64_t key, uint32_t parameter, int64_t windows,
                  const uint32_t* directions, int64_t horizon, const float* first,
                  const float* second, float restore, float minus_lr, float decay, float eps,
                  bfloat16* theta) {
  if (horizon < 1 || horizon > trial::kMaxHorizon) return false;
  const trial::Job job{{uint32_t(key), uint32_t(key >> 32)}, parameter, windows};
  const trial::Update u{directions, horizon, first, second, restore, minus_lr, decay, eps};
  return trial::with_version(version, [&](auto v) { trial::update<decltype(v)>(job, u, theta); });
}

// `count` is a multiple of 64 in this one and the next.
bool trial_pairs(int version, uint32_t first, int64_t count, float* z0, float* z1) {
  bool one_word = false;
  trial::with_version(version, [&](auto v) {
    using V = decltype(v);
    if constexpr (V::kForm != trial::Form::kWords) {
      trial::pairs<V>(first, count, z0, z1);
      one_word = true;
    }
  });
  return one_word;
}

bool trial_add_words(int version, uint32_t first, int64_t count, double* sums, int64_t* bins,
                     uint64_t* seen) {
  bool one_word = false;
  trial::with_version(version, [&](auto v) {
    using V = decltype(v);
    if constexpr (V::kForm != trial::Form::kWords) {
      trial::add_words<V>(first, count, *reinterpret_cast<trial::Sums*>(sums), bins, seen);
      one_word = true;
    }
  });
  return one_word;
}

void trial_add(int64_t count, const float* z0, const float* z1, double* sums, int64_t* bins) {
  trial::add(count, z0, z1, *reinterpret_cast<trial::Sums*>(sums), bins, nullptr);
}
}
