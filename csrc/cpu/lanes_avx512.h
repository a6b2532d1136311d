// Sixteen blocks side by side, for AVX-512 (F, BW, DQ, VL).
//
// A Philox word lives in the low half of a 64-bit lane, where vpmuludq reads it and leaves the
// whole product: hi is one shift, lo is free, and the upper halves may hold anything. The sixteen
// words are two such vectors that go through the rounds in lockstep, since one chain of ten
// rounds waits for its own multiplies. One masked shuffle at the end makes sixteen 32-bit lanes.
#pragma once

#include <immintrin.h>

#include "adamezo/rounding.h"

namespace adamezo {
namespace {

struct Avx512Lanes {
  static constexpr int kWidth = 16;
  struct Words {
    __m512i even, odd;
  };
  using Product = Words;
  using I = __m512i;
  using F = __m512;

  static ADAMEZO_HD __m512i i(uint32_t value) { return _mm512_set1_epi32(int(value)); }

  static ADAMEZO_HD Words words(uint32_t value) { return {i(value), i(value)}; }
  // Lane 4q + t works on block 4t + q, so that `natural` stays within 128-bit lanes.
  static ADAMEZO_HD Words group_blocks(uint32_t first) {
    return {_mm512_add_epi32(i(first), _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11)),
            _mm512_add_epi32(i(first), _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15))};
  }
  static ADAMEZO_HD Product multiply(Words a, uint32_t b) {
    return {_mm512_mul_epu32(a.even, i(b)), _mm512_mul_epu32(a.odd, i(b))};
  }
  static ADAMEZO_HD Words hi(Product product) {
    return {_mm512_srli_epi64(product.even, 32), _mm512_srli_epi64(product.odd, 32)};
  }
  static ADAMEZO_HD Words lo(Product product) { return product; }
  static ADAMEZO_HD Words exclusive_or(Words a, Words b) {
    return {_mm512_xor_si512(a.even, b.even), _mm512_xor_si512(a.odd, b.odd)};
  }
  static ADAMEZO_HD Words exclusive_or(Words a, Words b, Words c) {
    return {_mm512_ternarylogic_epi64(a.even, b.even, c.even, 0x96),
            _mm512_ternarylogic_epi64(a.odd, b.odd, c.odd, 0x96)};
  }
  static ADAMEZO_HD I integers(Words a) {
    return _mm512_mask_shuffle_epi32(a.even, 0xaaaa, a.odd, _MM_PERM_CDAB);
  }

  static ADAMEZO_HD I bits(F a) { return _mm512_castps_si512(a); }
  static ADAMEZO_HD F from_bits(I a) { return _mm512_castsi512_ps(a); }
  static ADAMEZO_HD F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static ADAMEZO_HD I subtract(I a, I b) { return _mm512_sub_epi32(a, b); }
  static ADAMEZO_HD I subtract(I a, uint32_t b) { return _mm512_sub_epi32(a, i(b)); }
  static ADAMEZO_HD I bit_and(I a, uint32_t b) { return _mm512_and_si512(a, i(b)); }
  static ADAMEZO_HD I and_or(I a, uint32_t mask, uint32_t ones) {
    return _mm512_ternarylogic_epi32(a, i(mask), i(ones), 0xea);
  }

  static ADAMEZO_HD F f(float value) { return _mm512_set1_ps(value); }
  static ADAMEZO_HD F flip_sign(F a, I sign) {
    return from_bits(_mm512_ternarylogic_epi32(bits(a), sign, i(0x80000000u), 0x78));
  }
  static ADAMEZO_HD F flip_signs(F a, uint32_t bits) {
    return _mm512_mask_xor_ps(a, __mmask16(bits), a, f(-0.0f));
  }
  static ADAMEZO_HD F add(F a, F b) { return _mm512_add_ps(a, b); }
  static ADAMEZO_HD F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static ADAMEZO_HD F div(F a, F b) { return _mm512_div_ps(a, b); }
  static ADAMEZO_HD F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static ADAMEZO_HD F max(F a, F b) { return _mm512_max_ps(a, b); }
  static ADAMEZO_HD F min(F a, F b) { return _mm512_min_ps(a, b); }
  static ADAMEZO_HD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static ADAMEZO_HD F fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
  static ADAMEZO_HD F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }

  // A 4 x 4 transpose in every 128-bit lane.
  static ADAMEZO_HD void natural(F z[4]) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(z[0], z[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(z[0], z[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(z[2], z[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(z[2], z[3]));
    z[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    z[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    z[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    z[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }

  static ADAMEZO_HD __m256i load16(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  static ADAMEZO_HD void store16(__m256i value, void* to) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), value);
  }
  static ADAMEZO_HD F load(const float* from) { return _mm512_loadu_ps(from); }
  static ADAMEZO_HD F load(const bfloat16* from) {
    return from_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(from)), 16));
  }
  static ADAMEZO_HD F load(const float16* from) { return _mm512_cvtph_ps(load16(from)); }
  static ADAMEZO_HD void store(F value, float* to) { _mm512_storeu_ps(to, value); }
  // Not by vcvtneps2bf16, which treats subnormals as zero.
  static ADAMEZO_HD void store(F value, bfloat16* to) {
    const I b = bits(value);
    // To nearest even: half a unit less one bit, or half a unit where the last bit kept is odd.
    const __mmask16 is_odd = _mm512_test_epi32_mask(b, i(0x10000));
    const I half = _mm512_mask_blend_epi32(is_odd, i(0x7fff), i(0x8000));
    const __mmask16 is_number = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
    const I rounded = _mm512_mask_srli_epi32(i(0x7fc0), is_number, _mm512_add_epi32(b, half), 16);
    store16(_mm512_cvtepi32_epi16(rounded), to);
  }
  static ADAMEZO_HD void store(F value, float16* to) {
    store16(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), to);
  }

  // Stochastic, as from_float32 of rounding.h.
  static ADAMEZO_HD void store(F value, I, float* to) { store(value, to); }
  static ADAMEZO_HD void store(F value, I random, bfloat16* to) {
    const I raised = _mm512_add_epi32(bits(value), _mm512_srli_epi32(random, 16));
    const __mmask16 is_number = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
    store16(_mm512_cvtepi32_epi16(_mm512_mask_srli_epi32(i(0x7fc0), is_number, raised, 16)), to);
  }
  static ADAMEZO_HD void store(F value, I random, float16* to) {
    const I magnitude = bit_and(bits(value), 0x7fffffffu);
    const __mmask16 is_normal = _mm512_cmpge_epu32_mask(magnitude, i(0x38800000u));
    // Subnormal: digits beyond 31 are shifted out first, which leaves 0 of values below 2^-126.
    const I digits = _mm512_sub_epi32(i(126), _mm512_srli_epi32(magnitude, 23));
    const I at_most_31 = _mm512_min_epu32(digits, i(31));
    const I significand = and_or(magnitude, 0x7fffffu, 0x800000u);
    const I subnormal = _mm512_srlv_epi32(significand, _mm512_sub_epi32(digits, at_most_31));
    const I kept = _mm512_mask_sub_epi32(subnormal, is_normal, magnitude, i(112u << 23));
    const I shift = _mm512_mask_mov_epi32(at_most_31, is_normal, i(13));
    const I addend = _mm512_srlv_epi32(random, _mm512_sub_epi32(i(32), shift));
    I half = _mm512_srlv_epi32(_mm512_add_epi32(kept, addend), shift);
    half = _mm512_min_epu32(half, i(0x7bff));
    const __mmask16 is_large = _mm512_cmpge_epu32_mask(magnitude, i(0x47800000u));
    half = _mm512_mask_mov_epi32(half, is_large, i(0x7c00));
    half = _mm512_mask_mov_epi32(half, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), i(0x7e00));
    const I sign = bit_and(_mm512_srli_epi32(bits(value), 16), 0x8000u);
    store16(_mm512_cvtepi32_epi16(_mm512_or_si512(half, sign)), to);
  }
  static ADAMEZO_HD void store_words(I value, uint32_t* to) { _mm512_storeu_si512(to, value); }
};

}  // namespace
}  // namespace adamezo
