// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), twice:
// as published, and split into the words that a tensor's streams share and each stream's own.
//
// A counter is (block lo, block hi, direction, parameter | purpose << 24). The H streams of an
// update differ in `direction` alone, and within one group of blocks only `block lo` varies. With
// M(c) the 64-bit product and k the round keys, the first rounds therefore separate:
//
//   round 0   x0 = hi(M1 direction) ^ block_hi ^ k0      a number per stream
//             x1 = lo(M1 direction)                      a number per stream
//             x2 = hi(M0 block_lo) ^ parameter ^ k1      shared by all streams
//             x3 = lo(M0 block_lo)                       shared
//   round 1   y0 = hi(M1 x2) ^ x1 ^ k0'                  shared ^ number
//             y1 = lo(M1 x2)                             shared
//             y2 = hi(M0 x0) ^ x3 ^ k1'                  number ^ shared
//             y3 = lo(M0 x0)                             a number per stream
//
// so a call costs 16 wide multiplies instead of 20, and round 1 two exclusive-ors.
#pragma once

#include "adamezo/config.h"

namespace adamezo {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// The use of a call's words: the top byte of the last counter word. Stochastic rounding of buffers
// (buffered.h) has two purposes, one for each buffer; low-rank directions (low_rank.h) have two,
// and flipout ones (flipout.h).
enum class Purpose : uint32_t {
  kDirection = 0,
  kRounding = 1,
  kBuffer = 2,
  kRow = 4,
  kColumn = 5,
  kRowSign = 6,
  kColumnSign = 7
};

struct PhiloxKey {
  uint32_t lo, hi;

  ADAMEZO_HD uint32_t lo_of_round(int round) const { return lo + uint32_t(round) * kPhiloxW0; }
  ADAMEZO_HD uint32_t hi_of_round(int round) const { return hi + uint32_t(round) * kPhiloxW1; }
};

// The same keys, computed once: a GPU reads them as operands from its constant memory.
struct PhiloxRoundKeys {
  uint32_t lo[kPhiloxRounds], hi[kPhiloxRounds];

  ADAMEZO_HD explicit PhiloxRoundKeys(PhiloxKey key) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
      lo[round] = key.lo_of_round(round);
      hi[round] = key.hi_of_round(round);
    }
  }
  ADAMEZO_HD uint32_t lo_of_round(int round) const { return lo[round]; }
  ADAMEZO_HD uint32_t hi_of_round(int round) const { return hi[round]; }
};

// In the functions below Key is either of these two.

ADAMEZO_HD uint32_t mul_hi(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }

// The generator as published: `counter` becomes the output.
ADAMEZO_HD void philox4x32(uint32_t counter[4], PhiloxKey key, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const uint32_t hi0 = mul_hi(kPhiloxM0, counter[0]), lo0 = kPhiloxM0 * counter[0];
    const uint32_t hi1 = mul_hi(kPhiloxM1, counter[2]), lo1 = kPhiloxM1 * counter[2];
    counter[0] = hi1 ^ counter[1] ^ key.lo_of_round(round);
    counter[1] = lo1;
    counter[2] = hi0 ^ counter[3] ^ key.hi_of_round(round);
    counter[3] = lo0;
  }
}

// A stream's own numbers: everything of the first two rounds that depends on the direction.
struct PhiloxStream {
  uint32_t y0, y2, y3;  // to be combined with the group's shared words; round keys included
};

template <class Key>
ADAMEZO_HD PhiloxStream philox_stream(Key key, uint32_t direction, uint32_t block_hi) {
  const uint32_t x0 = mul_hi(kPhiloxM1, direction) ^ block_hi ^ key.lo_of_round(0);
  const uint32_t x1 = kPhiloxM1 * direction;
  return {x1 ^ key.lo_of_round(1), mul_hi(kPhiloxM0, x0) ^ key.hi_of_round(1),
          (kPhiloxM0 * x0) ^ key.hi_of_round(2)};
}

// A group's shared words: everything of the first two rounds that depends on the blocks.
// L is a set of lanes (see lanes_scalar.h); Words holds L::kWidth 32-bit words, one per block.
template <class L>
struct PhiloxGroup {
  typename L::Words y0, y1, y2;
};

template <class L, class Key>
ADAMEZO_HD PhiloxGroup<L> philox_group(Key key, typename L::Words block_lo,
                                       uint32_t parameter_and_purpose) {
  const auto product = L::multiply(block_lo, kPhiloxM0);
  const auto x2 = L::exclusive_or(L::hi(product), L::words(parameter_and_purpose),
                                  L::words(key.hi_of_round(0)));
  const auto next = L::multiply(x2, kPhiloxM1);
  return {L::hi(next), L::exclusive_or(L::lo(next), L::words(key.lo_of_round(2))), L::lo(product)};
}

// A call in progress: the words of every block of the group after some of the rounds.
template <class L>
struct PhiloxCall {
  typename L::Words c0, c1, c2, c3;
};

constexpr int kPhiloxFirstRound = 3;  // the first round after philox_begin

template <class L>
ADAMEZO_HD PhiloxCall<L> philox_begin(const PhiloxGroup<L>& group, const PhiloxStream& stream) {
  const auto product0 = L::multiply(L::exclusive_or(group.y0, L::words(stream.y0)), kPhiloxM0);
  const auto product1 = L::multiply(L::exclusive_or(group.y2, L::words(stream.y2)), kPhiloxM1);
  return {L::exclusive_or(L::hi(product1), group.y1), L::lo(product1),
          L::exclusive_or(L::hi(product0), L::words(stream.y3)), L::lo(product0)};
}

template <class L, class Key>
ADAMEZO_HD void philox_round(PhiloxCall<L>& call, Key key, int round) {
  const auto product0 = L::multiply(call.c0, kPhiloxM0);
  const auto product1 = L::multiply(call.c2, kPhiloxM1);
  call.c0 = L::exclusive_or(L::hi(product1), call.c1, L::words(key.lo_of_round(round)));
  call.c1 = L::lo(product1);
  call.c2 = L::exclusive_or(L::hi(product0), call.c3, L::words(key.hi_of_round(round)));
  call.c3 = L::lo(product0);
}

template <class L, class Key>
ADAMEZO_HD void philox_finish(PhiloxCall<L>& call, Key key) {
  ADAMEZO_UNROLL
  for (int round = kPhiloxFirstRound; round < kPhiloxRounds; ++round)
    philox_round<L>(call, key, round);
}

// The four output words of every block.
template <class L>
ADAMEZO_HD void call_words(const PhiloxCall<L>& call, typename L::I x[4]) {
  x[0] = L::integers(call.c0);
  x[1] = L::integers(call.c1);
  x[2] = L::integers(call.c2);
  x[3] = L::integers(call.c3);
}

}  // namespace adamezo
