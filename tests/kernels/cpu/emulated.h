// The instructions of AVX-512 and AVX-VNNI that the kernels name, for a machine with AVX2 alone:
// included before everything else where HEADSTART_EMULATED is set (CMakeLists.txt), so that the
// kernels of every x86 instruction set can be run anywhere. It says what is computed, not how fast.
//
// Most come from SIMDe (Debian: libsimde-dev), which is held to real machines. What it lacks, or
// rounds in another order, is here as Intel's manual has it (Software Developer's Manual, volume 2).
#pragma once

#if defined(__AVX512F__)
#error "emulated on a compiler's own AVX-512"
#endif
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

template <class To, class From>
inline To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof to);
  return to;
}
struct Floats {
  float lane[16];
};
struct Words {
  int32_t lane[16];
};
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

// VDPBF16PS: the odd products first, each sum rounded to nearest even. Operands of these tests are
// normal numbers: the instruction takes others for zero.
inline simde__m512 dpbf16(simde__m512 sum, simde__m512bh a, simde__m512bh b) {
  const Ints x = bits<Ints>(a), y = bits<Ints>(b), odd = Ints{} + int32_t(0xffff0000);
  sum = simde_mm512_fmadd_ps(bits<simde__m512>(x & odd), bits<simde__m512>(y & odd), sum);
  return simde_mm512_fmadd_ps(bits<simde__m512>(x << 16), bits<simde__m512>(y << 16), sum);
}

// VCVTNEPS2BF16, to nearest even.
inline simde__m256bh cvtneps(simde__m512 v) {
  const Ints x = bits<Ints>(v);
  return bits<simde__m256bh>(__builtin_convertvector((x + 0x7fff + (x >> 16 & 1)) >> 16, Halves));
}

// VREDUCEPS with no bits of fraction kept, rounding down: what is above the next lower integer.
inline simde__m512 reduce_down(simde__m512 v) {
  Floats x = bits<Floats>(v);
  for (float& lane : x.lane) lane -= std::floor(lane);
  return bits<simde__m512>(x);
}

inline float reduce_max(simde__m512 v) {
  const Floats x = bits<Floats>(v);
  return *std::max_element(x.lane, x.lane + 16);
}
inline int32_t reduce_max(simde__m512i v) {
  const Words x = bits<Words>(v);
  return *std::max_element(x.lane, x.lane + 16);
}

// VPDPBUSD of 256 bits.
inline simde__m256i dpbusd(simde__m256i sum, simde__m256i a, simde__m256i b) {
  struct {
    int32_t lane[8];
  } s;
  struct {
    uint8_t lane[32];
  } x;
  struct {
    int8_t lane[32];
  } y;
  std::memcpy(&s, &sum, sizeof s);
  std::memcpy(&x, &a, sizeof x);
  std::memcpy(&y, &b, sizeof y);
  for (int i = 0; i < 32; ++i) s.lane[i / 4] += x.lane[i] * y.lane[i];
  std::memcpy(&sum, &s, sizeof s);
  return sum;
}

}  // namespace emulated

#undef _mm512_madd_epi16  // SIMDe 0.7.4's has the masked one's operands
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps(sum, a, b) emulated::dpbf16(sum, a, b)
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh(v) emulated::cvtneps(v)
#undef _mm512_reduce_ps
#define _mm512_reduce_ps(v, rounding) emulated::reduce_down(v)
#undef _mm512_reduce_max_ps
#define _mm512_reduce_max_ps(v) emulated::reduce_max(v)
#undef _mm512_reduce_max_epi32
#define _mm512_reduce_max_epi32(v) emulated::reduce_max(v)
#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32(sum, a, b) emulated::dpbusd(sum, a, b)

// What the compiler would say of a machine that has them: HEADSTART_EMULATED is 1 for AVX-VNNI, and
// for AVX-512 2 alone, 3 with VNNI, 4 with BF16 too.
#if HEADSTART_EMULATED == 1
#define __AVXVNNI__ 1
#else
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#if HEADSTART_EMULATED >= 3
#define __AVX512VNNI__ 1
#endif
#if HEADSTART_EMULATED >= 4
#define __AVX512BF16__ 1
#endif
#endif
