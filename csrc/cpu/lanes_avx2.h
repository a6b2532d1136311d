// Eight blocks side by side, for AVX2 with FMA and F16C. See lanes_avx512.h for the idea.
#pragma once

#include <immintrin.h>

#include "adamezo/rounding.h"

namespace adamezo {
namespace {

struct Avx2Lanes {
  static constexpr int kWidth = 8;
  struct Words {
    __m256i even, odd;
  };
  using Product = Words;
  using I = __m256i;
  using F = __m256;

  static ADAMEZO_HD __m256i i(uint32_t value) { return _mm256_set1_epi32(int(value)); }

  static ADAMEZO_HD Words words(uint32_t value) { return {i(value), i(value)}; }
  // Lane 4q + t works on block 2t + q, so that `natural` stays within 128-bit lanes.
  static ADAMEZO_HD Words group_blocks(uint32_t first) {
    return {_mm256_add_epi32(i(first), _mm256_setr_epi64x(0, 4, 1, 5)),
            _mm256_add_epi32(i(first), _mm256_setr_epi64x(2, 6, 3, 7))};
  }
  static ADAMEZO_HD Product multiply(Words a, uint32_t b) {
    return {_mm256_mul_epu32(a.even, i(b)), _mm256_mul_epu32(a.odd, i(b))};
  }
  static ADAMEZO_HD Words hi(Product product) {
    return {_mm256_srli_epi64(product.even, 32), _mm256_srli_epi64(product.odd, 32)};
  }
  static ADAMEZO_HD Words lo(Product product) { return product; }
  static ADAMEZO_HD Words exclusive_or(Words a, Words b) {
    return {_mm256_xor_si256(a.even, b.even), _mm256_xor_si256(a.odd, b.odd)};
  }
  static ADAMEZO_HD Words exclusive_or(Words a, Words b, Words c) {
    return exclusive_or(a, exclusive_or(b, c));
  }
  static ADAMEZO_HD I integers(Words a) {
    return _mm256_blend_epi32(a.even, _mm256_slli_epi64(a.odd, 32), 0xaa);
  }

  static ADAMEZO_HD I bits(F a) { return _mm256_castps_si256(a); }
  static ADAMEZO_HD F from_bits(I a) { return _mm256_castsi256_ps(a); }
  static ADAMEZO_HD F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static ADAMEZO_HD I subtract(I a, I b) { return _mm256_sub_epi32(a, b); }
  static ADAMEZO_HD I subtract(I a, uint32_t b) { return _mm256_sub_epi32(a, i(b)); }
  static ADAMEZO_HD I bit_and(I a, uint32_t b) { return _mm256_and_si256(a, i(b)); }
  static ADAMEZO_HD I and_or(I a, uint32_t mask, uint32_t ones) {
    return _mm256_or_si256(_mm256_and_si256(a, i(mask)), i(ones));
  }

  static ADAMEZO_HD F f(float value) { return _mm256_set1_ps(value); }
  static ADAMEZO_HD F flip_sign(F a, I sign) {
    return from_bits(_mm256_xor_si256(bits(a), _mm256_and_si256(sign, i(0x80000000u))));
  }
  static ADAMEZO_HD F flip_signs(F a, uint32_t bits) {
    return flip_sign(a,
                     _mm256_sllv_epi32(i(bits), _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24)));
  }
  static ADAMEZO_HD F add(F a, F b) { return _mm256_add_ps(a, b); }
  static ADAMEZO_HD F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static ADAMEZO_HD F div(F a, F b) { return _mm256_div_ps(a, b); }
  static ADAMEZO_HD F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static ADAMEZO_HD F max(F a, F b) { return _mm256_max_ps(a, b); }
  static ADAMEZO_HD F min(F a, F b) { return _mm256_min_ps(a, b); }
  static ADAMEZO_HD F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static ADAMEZO_HD F fms(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
  static ADAMEZO_HD F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }

  // A 4 x 4 transpose in every 128-bit lane.
  static ADAMEZO_HD void natural(F z[4]) {
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(z[0], z[1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(z[0], z[1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(z[2], z[3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(z[2], z[3]));
    z[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    z[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    z[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    z[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }

  static ADAMEZO_HD __m128i load16(const void* from) {
    return _mm_loadu_si128(static_cast<const __m128i*>(from));
  }
  static ADAMEZO_HD void store16(__m128i value, void* to) {
    _mm_storeu_si128(static_cast<__m128i*>(to), value);
  }
  // The low 16 bits of each lane; the high ones are 0.
  static ADAMEZO_HD void store_halves(I halves, void* to) {
    const I packed = _mm256_packus_epi32(halves, halves);
    store16(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)), to);
  }
  static ADAMEZO_HD F load(const float* from) { return _mm256_loadu_ps(from); }
  static ADAMEZO_HD F load(const bfloat16* from) {
    return from_bits(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(from)), 16));
  }
  static ADAMEZO_HD F load(const float16* from) { return _mm256_cvtph_ps(load16(from)); }
  static ADAMEZO_HD void store(F value, float* to) { _mm256_storeu_ps(to, value); }
  static ADAMEZO_HD void store(F value, bfloat16* to) {
    const I b = bits(value);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), i(1));
    const I rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(b, i(0x7fff)), odd), 16);
    const I is_nan = bits(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    store_halves(_mm256_blendv_epi8(rounded, i(0x7fc0), is_nan), to);
  }
  static ADAMEZO_HD void store(F value, float16* to) {
    store16(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), to);
  }

  // Stochastic, as from_float32 of rounding.h.
  static ADAMEZO_HD void store(F value, I, float* to) { store(value, to); }
  static ADAMEZO_HD void store(F value, I random, bfloat16* to) {
    const I raised = _mm256_add_epi32(bits(value), _mm256_srli_epi32(random, 16));
    const I is_nan = bits(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    store_halves(_mm256_blendv_epi8(_mm256_srli_epi32(raised, 16), i(0x7fc0), is_nan), to);
  }
  static ADAMEZO_HD void store(F value, I random, float16* to) {
    const I magnitude = bit_and(bits(value), 0x7fffffffu);
    const I is_normal = _mm256_cmpgt_epi32(magnitude, i(0x387fffffu));
    // Subnormal: digits beyond 31 are shifted out first, which leaves 0 of values below 2^-126.
    const I digits = _mm256_sub_epi32(i(126), _mm256_srli_epi32(magnitude, 23));
    const I at_most_31 = _mm256_min_epu32(digits, i(31));
    const I significand = and_or(magnitude, 0x7fffffu, 0x800000u);
    const I subnormal = _mm256_srlv_epi32(significand, _mm256_sub_epi32(digits, at_most_31));
    const I kept = _mm256_blendv_epi8(subnormal, subtract(magnitude, 112u << 23), is_normal);
    const I shift = _mm256_blendv_epi8(at_most_31, i(13), is_normal);
    const I addend = _mm256_srlv_epi32(random, _mm256_sub_epi32(i(32), shift));
    I half = _mm256_srlv_epi32(_mm256_add_epi32(kept, addend), shift);
    half = _mm256_min_epu32(half, i(0x7bff));
    const I is_large = _mm256_cmpgt_epi32(magnitude, i(0x477fffffu));
    half = _mm256_blendv_epi8(half, i(0x7c00), is_large);
    half = _mm256_blendv_epi8(half, i(0x7e00), bits(_mm256_cmp_ps(value, value, _CMP_UNORD_Q)));
    const I sign = bit_and(_mm256_srli_epi32(bits(value), 16), 0x8000u);
    store_halves(_mm256_or_si256(half, sign), to);
  }
  static ADAMEZO_HD void store_words(I value, uint32_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
  }
};

}  // namespace
}  // namespace adamezo
