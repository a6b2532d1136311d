// A trial of a second version of the stream, measured and not part of the package: fewer rounds of
// Philox, one word in place of two for a pair of normals, shorter polynomials. docs/stream_2.md has
// what came of it. Over the lanes of csrc, so for the CPU (stream_2.cpp) and CUDA (stream_2.cuh).
#pragma once

#include "adamezo/lanes_scalar.h"
#include "adamezo/normal.h"
#include "adamezo/philox.h"
#if defined(__AVX512F__)
#include "cpu/lanes_avx512.h"
#elif defined(__AVX2__)
#include "cpu/lanes_avx2.h"
#endif

namespace adamezo {
namespace trial {

// Which words a pair of normals is made of.
enum class Form {
  kWords,   // two words, as in version 1
  kHalves,  // the high half of a word for the radius and the low half for the angle
  // A word for the radius, and for the angle the low half of its product with a constant: all words
  // together are the points of a lattice in (radius, angle), so that both have all their bits.
  kLattice
};

template <int kRounds_, Form kForm_, bool kShort_>
struct Stream {
  static constexpr int kRounds = kRounds_;
  static constexpr Form kForm = kForm_;
  static constexpr bool kShort = kShort_;
  static constexpr int kRoundsLeft = kRounds - kPhiloxFirstRound;
  static constexpr int kQuads = kForm == Form::kWords ? 1 : 2;  // fours of normals from a call
};

// In windows of 512 elements a call serves a four of the first 256 and the same four of the others,
// so that neither a group of lanes nor a GPU's thread has to move values to its neighbours.
constexpr int kHalfWindow = 256, kWindowOfCalls = 512;

// The odd number whose products follow each other by the golden ratio, both in all 32 bits and in
// the low 23 ones, which are the angle: neighbouring radii have angles far apart.
constexpr uint32_t kGolden = 0x9E4F1BBDu;

ADAMEZO_HD uint32_t multiply_low(uint32_t a, uint32_t b) { return a * b; }
ADAMEZO_HD uint32_t low_bit_to_sign(uint32_t a) { return a << 31; }
#if defined(__AVX512F__)
ADAMEZO_HD __m512i multiply_low(__m512i a, uint32_t b) {
  return _mm512_mullo_epi32(a, _mm512_set1_epi32(int(b)));
}
ADAMEZO_HD __m512i low_bit_to_sign(__m512i a) { return _mm512_slli_epi32(a, 31); }
#elif defined(__AVX2__)
ADAMEZO_HD __m256i multiply_low(__m256i a, uint32_t b) {
  return _mm256_mullo_epi32(a, _mm256_set1_epi32(int(b)));
}
ADAMEZO_HD __m256i low_bit_to_sign(__m256i a) { return _mm256_slli_epi32(a, 31); }
#endif

// Four normals of two words, as `normals` of version 1 makes them of four. Of halves, the radius is
// of the middle of one of 2^15 equal parts of (0, 1), and the angle that of one of a quarter turn;
// the signs are the first bit and the last.
template <class L, class V, class Between>
ADAMEZO_HD void normals_of_words(const typename L::I x[2], typename L::F z[4], Between&& between) {
  using F = typename L::F;
  constexpr bool kHalves = V::kForm == Form::kHalves, kShort = V::kShort;
  typename L::I y[2];  // bit 31 is the sign of the second normal of a pair
  for (int i = 0; i < 2; ++i) y[i] = kHalves ? low_bit_to_sign(x[i]) : multiply_low(x[i], kGolden);
  F u[2], f[2], g[2], exponent[2];
  for (int i = 0; i < 2; ++i)
    u[i] = L::to_float(kHalves ? L::and_or(x[i], 0x7fff0000u, 0x8000u)
                               : L::and_or(x[i], 0x7ffffffeu, 1u));
  between(0);
  for (int i = 0; i < 2; ++i) {
    const auto bits = L::bits(u[i]);
    const auto e = L::bit_and(L::subtract(bits, 0x4eaaaaabu), 0xff800000u);
    g[i] = L::fma(L::from_bits(L::subtract(bits, e)), L::f(0x1p-31f), L::f(-1.0f));
    exponent[i] = L::to_float(e);
  }
  between(1);
  F p[2], gg[2], ff[2];
  for (int i = 0; i < 2; ++i) {
    gg[i] = L::mul(g[i], g[i]);
    if (kShort) {
      p[i] = L::fma(g[i], L::f(0.191964253783226f), L::f(-0.22446709871292114f));
    } else {
      p[i] = L::fma(g[i], L::f(-0.14020569622516632f), L::f(0.15383614599704742f));
      p[i] = L::fma(p[i], g[i], L::f(-0.13997136056423187f));
    }
    // The half is in the last bits of a float in [2, 2 + 2^-6), which is stretched to [-1, 1).
    f[i] = kHalves ? L::fma(L::from_bits(L::and_or(x[i], 0xfffeu, 0x40000001u)), L::f(128.0f),
                            L::f(-257.0f))
                   : L::add(L::from_bits(L::and_or(y[i], 0x007fffffu, 0x40000000u)), L::f(-3.0f));
  }
  between(2);
  for (int i = 0; i < 2; ++i) {
    if (!kShort) {
      p[i] = L::fma(p[i], g[i], L::f(0.1641702800989151f));
      p[i] = L::fma(p[i], g[i], L::f(-0.20011073350906372f));
    }
    ff[i] = L::mul(f[i], f[i]);
  }
  between(3);
  F sine[2], cosine[2];
  for (int i = 0; i < 2; ++i) {
    p[i] = L::fma(p[i], g[i], L::f(kShort ? 0.24872766435146332f : 0.250077486038208f));
    p[i] = L::fma(p[i], g[i], L::f(kShort ? -0.33246365189552307f : -0.33333200216293335f));
    if (kShort) {
      sine[i] = L::f(0.002427106024697423f);
      cosine[i] = L::f(0.015406211838126183f);
    } else {
      sine[i] = L::fma(ff[i], L::f(-3.5579418181441724e-05f), L::f(0.002489370759576559f));
      cosine[i] = L::fma(ff[i], L::f(-0.00031918685999698937f), L::f(0.015850437805056572f));
    }
  }
  between(4);
  F r[2];
  for (int i = 0; i < 2; ++i) {
    p[i] = L::fma(p[i], g[i], L::f(kShort ? 0.5000126361846924f : 0.49999937415122986f));
    r[i] = L::sqrt(L::fma(exponent[i], L::f(-8.262958405176314e-08f), L::fms(p[i], gg[i], g[i])));
    sine[i] = L::fma(sine[i], ff[i], L::f(kShort ? -0.08071400225162506f : -0.08074513077735901f));
    cosine[i] =
        L::fma(cosine[i], ff[i], L::f(kShort ? -0.3082871437072754f : -0.3084245026111603f));
  }
  between(5);
  for (int i = 0; i < 2; ++i) {
    sine[i] = L::mul(
        L::fma(sine[i], ff[i], L::f(kShort ? 0.7853942513465881f : 0.7853981256484985f)), f[i]);
    cosine[i] = L::fma(cosine[i], ff[i], L::f(1.0f));
  }
  between(6);
  for (int i = 0; i < 2; ++i) {
    const F r_cosine = L::mul(r[i], cosine[i]);
    z[2 * i] = L::flip_sign(L::fma(r[i], sine[i], r_cosine), x[i]);
    z[2 * i + 1] = L::flip_sign(L::fnma(r[i], sine[i], r_cosine), y[i]);
  }
}

// The fours of normals that a finished call's words x make: calls use(quad, z). The rounds of
// `next`, a call that was begun, are spread over the stages of all of them.
template <class L, class V, class Key, class Use>
ADAMEZO_HD void normals_beside(PhiloxCall<L>& next, Key key, const typename L::I x[4], Use&& use) {
  constexpr int kStages = kNormalStages * V::kQuads;
  ADAMEZO_UNROLL
  for (int quad = 0; quad < V::kQuads; ++quad) {
    const auto between = [&](int stage) ADAMEZO_INLINE_LAMBDA {
      for (int round = 0; round < V::kRoundsLeft; ++round)
        if (round * kStages / V::kRoundsLeft == quad * kNormalStages + stage)
          philox_round<L>(next, key, kPhiloxFirstRound + round);
    };
    typename L::F z[4];
    if constexpr (V::kForm == Form::kWords)
      normals<L>(x, z, between);
    else
      normals_of_words<L, V>(x + 2 * quad, z, between);
    use(quad, z);
  }
}

template <class L, class V, class Key>
ADAMEZO_HD void finish(PhiloxCall<L>& call, Key key) {
  ADAMEZO_UNROLL
  for (int round = kPhiloxFirstRound; round < V::kRounds; ++round)
    philox_round<L>(call, key, round);
}

}  // namespace trial
}  // namespace adamezo
