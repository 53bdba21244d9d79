// Vectors, and the four multiply-accumulate units every kernel is written in.
//
// This header is compiled once per instruction set (see isa.cpp). It uses GCC's vector
// extensions, so the same source is SSE2, NEON, AVX2 or AVX-512; only what they cannot say
// (vdpbf16ps, vpdpbusd) is written with intrinsics.
//
// Every instruction set gives the same bits: sums are made in an order of their own (Sum), and what
// is rounded once is said (fused). But not x86 before AVX2, which has no fused multiply-add.
//
//   word   4 bytes of the reduction axis: 1 float, 2 bf16, 2 int16 or 4 int8
//   unit   the instruction that multiplies a broadcast word with a vector of words and adds:
//
//            F32   acc[l] += a * b[l]
//            BF16  acc[l] += a.1 * b[l].1, then acc[l] += a.0 * b[l].0, as vdpbf16ps does
//            I8    acc[l] += a.0 * b[l].0 + ... + a.3 * b[l].3     (a unsigned, b signed)
//            I16   acc[l] += a.0 * b[l].0 + a.1 * b[l].1
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "kernels.h"

namespace headstart::HEADSTART_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kScoreRows = 12;  // rows x 2 vectors of accumulators: 24 of 32 registers
inline constexpr int kValueRows = 6;   // rows x kValueColumns vectors
inline constexpr int kValueColumns = 4;
inline constexpr int kWideRows = 12;   // rows x 2 vectors, of int16 products
inline constexpr int kFewRows = 0;     // up to so many, rows x 4 vectors: a page of 32 keys has not as many
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kScoreRows = 6;  // 12 of 16 registers
inline constexpr int kValueRows = 6;
inline constexpr int kValueColumns = 2;
inline constexpr int kWideRows = 6;
inline constexpr int kFewRows = 2;  // rows x 4 vectors
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kScoreRows = 4;
inline constexpr int kValueRows = 2;
inline constexpr int kValueColumns = 4;
inline constexpr int kWideRows = 6;
inline constexpr int kFewRows = 2;
#endif
inline constexpr int kLanes = kVectorBytes / 4;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));

#define HEADSTART_INLINE inline __attribute__((always_inline))
// Of what many instances call: a copy in each of them is most of the time that compiling takes.
#define HEADSTART_CALLED __attribute__((noinline))

template <class V, class T>
static HEADSTART_INLINE V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
static HEADSTART_INLINE void store_as(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
template <class To, class From>
static HEADSTART_INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof to);
  return to;
}

static HEADSTART_INLINE Floats load(const float* p) { return load_as<Floats>(p); }
static HEADSTART_INLINE Floats load(const uint16_t* p) {  // bf16
  return bits<Floats>(__builtin_convertvector(load_as<Halves>(p), Ints) << 16);
}
static HEADSTART_INLINE void store(float* p, Floats v) { store_as(p, v); }
static HEADSTART_INLINE void store(uint16_t* p, Floats v) {  // bf16, to nearest even
#if defined(__AVX512BF16__)
  store_as(p, (__m256bh)_mm512_cvtneps_pbh((__m512)v));
#else
  Ints b = bits<Ints>(v);
  b = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  store_as(p, __builtin_convertvector(b, Halves));
#endif
}
static HEADSTART_INLINE float to_float(float v) { return v; }
static HEADSTART_INLINE float to_float(uint16_t v) { return bits<float>(uint32_t(v) << 16); }
static HEADSTART_INLINE void from_float(float v, float* p) { *p = v; }
static HEADSTART_INLINE void from_float(float v, uint16_t* p) {
  uint32_t b = bits<uint32_t>(v);
  *p = uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}

// x - 0 is x, and compilers know it; 0 + x is not, where x is -0, and would be an addition.
static HEADSTART_INLINE Floats broadcast(float x) { return x - Floats{}; }
static HEADSTART_INLINE Ints broadcast(int32_t x) { return Ints{} + x; }
// a * b + c, rounded once where there is an instruction for it. The compiler makes none of its own
// (-ffp-contract=off).
static HEADSTART_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
static HEADSTART_INLINE float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
static HEADSTART_INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
static HEADSTART_INLINE Floats minimum(Floats a, Floats b) { return a < b ? a : b; }
static HEADSTART_INLINE Floats magnitude(Floats v) { return bits<Floats>(bits<Ints>(v) & 0x7fffffff); }

// Lane numbers 0, 1, 2, ...
static HEADSTART_INLINE Ints lane_index() {
  Ints v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// A sum in the same order whatever a vector holds: element i of a row is added to lane i % 16, and in
// the end each half of the lanes to the other one.
struct Sum {
  static constexpr int kParts = kSumLanes / kLanes;
  static_assert(kParts >= 1);
  Floats parts[kParts];

  HEADSTART_INLINE float total() const {
    float lanes[kSumLanes];
    std::memcpy(lanes, parts, sizeof lanes);
#pragma GCC unroll 4
    for (int n = kSumLanes / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
    }
    return lanes[0];
  }
};
// Vectors that are gone through at a time: all lanes of a Sum, and two at least.
inline constexpr int kTurn = Sum::kParts > 2 ? Sum::kParts : 2;
static HEADSTART_INLINE float horizontal_max(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

static HEADSTART_INLINE int32_t horizontal_max(Ints v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

// The largest integers that are not above x.
static HEADSTART_INLINE Floats floor(Floats x) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // what is wider has exp2's two instructions
  return (Floats)_mm256_floor_ps((__m256)x);
#elif defined(__aarch64__)
  return (Floats)vrndmq_f32((float32x4_t)x);
#else
  const Floats magic = broadcast(12582912.0f), near = (x + magic) - magic;
  return near > x ? near - broadcast(1.0f) : near;
#endif
}

// 2^x for x <= 127; below -126 it is 2^-126. Cephes-style: 2^x = 2^n * p(f), n an integer. Degree 6,
// for |f| <= 1/2, is exact to a float's last bits; degree 4, for f in [0, 1), has an error of 4e-6,
// which is ample where the result is rounded to bf16 anyway.
template <bool kExact>
static HEADSTART_INLINE Floats exp2(Floats x) {
  x = maximum(x, broadcast(-126.0f));
  if constexpr (!kExact) {
#if defined(__AVX512F__)  // one instruction for f, and one for p * 2^n
    const Floats f = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
#else
    const Floats n = floor(x), f = x - n;
#endif
    Floats p = broadcast(1.342668653e-02f);
    p = fused(p, f, broadcast(5.224247058e-02f));
    p = fused(p, f, broadcast(2.412802065e-01f));
    p = fused(p, f, broadcast(6.930448447e-01f));
    p = fused(p, f, broadcast(1.0f));
#if defined(__AVX512F__)
    return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    return bits<Floats>(bits<Ints>(p) + (__builtin_convertvector(n, Ints) << 23));
#endif
  }
  const Floats magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats t = x + magic, f = x - (t - magic);
  Floats p = broadcast(1.535336188319500e-4f);
  p = fused(p, f, broadcast(1.339887440266574e-3f));
  p = fused(p, f, broadcast(9.618437357674640e-3f));
  p = fused(p, f, broadcast(5.550332471162809e-2f));
  p = fused(p, f, broadcast(2.402264791363012e-1f));
  p = fused(p, f, broadcast(6.931472028550421e-1f));
  p = fused(p, f, broadcast(1.0f));
  return bits<Floats>(bits<Ints>(p) + (bits<Ints>(t) << 23));
}

// Of a unit: `element` is what b is made of, `left` what a is, and a word of either is kPerWord of
// them. Where bf16 has no instruction and registers are few, a is float32 (of bf16 values): its
// words are broadcast from memory as they are, and b is taken apart in two parts, one after the
// other. (With 32 registers that is 10% slower than taking words of both apart.)
struct F32 {
  using word = float;
  using element = float;
  using left = float;
  using left_word = float;
  using accumulator = Floats;
  static constexpr int kPerWord = 1;
  static constexpr int kParts = 1;
  static constexpr bool kExactExp = true;
  static HEADSTART_INLINE void multiply_add(Floats& acc, float a, Floats b) { acc = fused(broadcast(a), b, acc); }
  static HEADSTART_INLINE Floats load_part(const float* p, int) { return load(p); }
  static HEADSTART_INLINE float part(float a, int) { return a; }
  static HEADSTART_INLINE void store_left(float* p, Floats v) { store(p, v); }
  static HEADSTART_INLINE void store_left(float* p, float v) { *p = v; }
  // Store vectors of probabilities, and add what was stored to a sum.
  static HEADSTART_INLINE void keep(float* p, const Floats (&x)[kTurn], Sum& sum) {
#pragma GCC unroll 4
    for (int i = 0; i < kTurn; ++i) {
      store(p + i * kLanes, x[i]);
      sum.parts[i % Sum::kParts] += x[i];
    }
  }
};

// Of a unit that multiplies words of several elements as they are.
struct WholeWords {
  using word = int32_t;
  using left_word = int32_t;
  static constexpr int kParts = 1;
  static HEADSTART_INLINE Ints load_part(const int32_t* p, int) { return load_as<Ints>(p); }
  static HEADSTART_INLINE int32_t part(int32_t a, int) { return a; }
};

#if defined(__AVX512F__)
struct BF16 : WholeWords {
  using element = uint16_t;
  using left = uint16_t;
  using accumulator = Floats;
  static constexpr int kPerWord = 2;
  static constexpr bool kExactExp = false;
  static HEADSTART_INLINE void multiply_add(Floats& acc, int32_t a, Ints b) {
#if defined(__AVX512BF16__)
    acc = (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)broadcast(a), (__m512bh)b);
#else
    const int32_t high = int32_t(0xffff0000);
    acc = fused(bits<Floats>(broadcast(a & high)), bits<Floats>(b & high), acc);
    acc = fused(bits<Floats>(broadcast(a << 16)), bits<Floats>(b << 16), acc);
#endif
  }
  static HEADSTART_INLINE void store_left(uint16_t* p, Floats v) { store(p, v); }
  static HEADSTART_INLINE void store_left(uint16_t* p, float v) { from_float(v, p); }
  static HEADSTART_INLINE void keep(uint16_t* p, const Floats (&x)[kTurn], Sum& sum) {
    static_assert(kTurn == 2 && Sum::kParts == 1);
    for (int i = 0; i < kTurn; ++i) {
      store(p + i * kLanes, x[i]);
      sum.parts[0] += load(p + i * kLanes);  // as rounded: what is multiplied with is added up
    }
  }
};
#else
struct BF16 {
  struct left_word {
    float parts[2];
  };
  using word = int32_t;
  using element = uint16_t;
  using left = float;
  using accumulator = Floats;
  static constexpr int kPerWord = 2;
  static constexpr int kParts = 2;
  static constexpr bool kExactExp = false;
  static HEADSTART_INLINE void multiply_add(Floats& acc, float a, Floats b) { acc = fused(broadcast(a), b, acc); }
  static HEADSTART_INLINE Floats load_part(const int32_t* p, int part) {
    const Ints words = load_as<Ints>(p);
    return bits<Floats>(part == 0 ? words & int32_t(0xffff0000) : words << 16);
  }
  static HEADSTART_INLINE float part(const left_word& a, int part) { return a.parts[1 - part]; }
  static HEADSTART_INLINE void store_left(float* p, Floats v) { store(p, rounded(v)); }
  static HEADSTART_INLINE void store_left(float* p, float v) {
    uint16_t half;
    from_float(v, &half);
    *p = to_float(half);
  }
  static HEADSTART_INLINE void keep(float* p, const Floats (&x)[kTurn], Sum& sum) {
#pragma GCC unroll 4
    for (int i = 0; i < kTurn; ++i) {
      const Floats v = rounded(x[i]);
      store(p + i * kLanes, v);
      sum.parts[i % Sum::kParts] += v;  // as rounded
    }
  }

 private:
  static HEADSTART_INLINE Floats rounded(Floats v) {  // as bf16, to nearest even
    const Ints b = bits<Ints>(v);
    return bits<Floats>((b + 0x7fff + ((b >> 16) & 1)) & int32_t(0xffff0000));
  }
};
#endif

// Both int8 units give the same integers on every instruction set: none of them saturates.
//
//   I8    4 products a word, where an instruction has them or can be made to: for few rows
//   I16   2 products a word, of values widened before: for many rows, where I8 takes more
//
// kSigned: the accumulator gets (a - 128) * b instead of a * b. b is never -128.
struct I8 : WholeWords {
  using element = int8_t;
  using accumulator = Ints;
  static constexpr int kPerWord = 4;
#if defined(__AVX512VNNI__)
  static constexpr bool kThere = true, kSigned = false, kOneInstruction = true;
  static HEADSTART_INLINE void multiply_add(Ints& acc, int32_t a, Ints b) {
    acc = (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)broadcast(a), (__m512i)b);
  }
#elif defined(__AVXVNNI__)
  static constexpr bool kThere = true, kSigned = false, kOneInstruction = true;
  static HEADSTART_INLINE void multiply_add(Ints& acc, int32_t a, Ints b) {
    acc = (Ints)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)broadcast(a), (__m256i)b);
  }
#elif defined(__AVX512BW__)
  // |a| * (b with a's sign): two of these are at most 128 * 127 * 2, which int16 holds.
  static constexpr bool kThere = true, kSigned = true, kOneInstruction = false;
  static HEADSTART_INLINE void multiply_add(Ints& acc, int32_t a, Ints b) {
    const __m512i x = (__m512i)broadcast(a ^ int32_t(0x80808080));
    const __m512i y = _mm512_mask_sub_epi8((__m512i)b, _mm512_movepi8_mask(x), _mm512_setzero_si512(), (__m512i)b);
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(x), y);
    acc += (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
  }
#elif defined(__AVX2__)
  static constexpr bool kThere = true, kSigned = true, kOneInstruction = false;
  static HEADSTART_INLINE void multiply_add(Ints& acc, int32_t a, Ints b) {
    const __m256i x = (__m256i)broadcast(a ^ int32_t(0x80808080));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8((__m256i)b, x));
    acc += (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  static constexpr bool kThere = true, kSigned = false, kOneInstruction = true;
  static HEADSTART_INLINE void multiply_add(Ints& acc, int32_t a, Ints b) {
    acc = (Ints)vusdotq_s32((int32x4_t)acc, (uint8x16_t)broadcast(a), (int8x16_t)b);
  }
#elif defined(__ARM_FEATURE_DOTPROD)
  static constexpr bool kThere = true, kSigned = true, kOneInstruction = true;
  static HEADSTART_INLINE void multiply_add(Ints& acc, int32_t a, Ints b) {
    acc = (Ints)vdotq_s32((int32x4_t)acc, (int8x16_t)broadcast(a ^ int32_t(0x80808080)), (int8x16_t)b);
  }
#else
  static constexpr bool kThere = false, kSigned = false, kOneInstruction = false;
  static HEADSTART_INLINE void multiply_add(Ints&, int32_t, Ints) {}
#endif
};

struct I16 : WholeWords {
  using element = int16_t;
  using accumulator = Ints;
  static constexpr int kPerWord = 2;
  static HEADSTART_INLINE void multiply_add(Ints& acc, int32_t a, Ints b) {
#if defined(__AVX512BW__)
    acc += (Ints)_mm512_madd_epi16((__m512i)broadcast(a), (__m512i)b);
#elif defined(__AVX2__)
    acc += (Ints)_mm256_madd_epi16((__m256i)broadcast(a), (__m256i)b);
#elif defined(__SSE2__)
    acc += (Ints)_mm_madd_epi16((__m128i)broadcast(a), (__m128i)b);
#else
    acc += broadcast((a << 16) >> 16) * ((b << 16) >> 16) + broadcast(a >> 16) * (b >> 16);
#endif
  }
  // A vector of words of 4 int8 as two of words of 2 int16: of each word 0 and 2, and 1 and 3.
  static HEADSTART_INLINE void widen(Ints words, Ints (&pairs)[2]) {
    typedef int16_t Shorts __attribute__((vector_size(kVectorBytes)));
    const Shorts both = bits<Shorts>(words);
    pairs[0] = bits<Ints>(Shorts((both << 8) >> 8));
    pairs[1] = bits<Ints>(Shorts(both >> 8));
  }
};

// The one inner loop of attention scores, attention values and int8 linear layers:
//
//   acc[r][c] += sum_w a[r][w] (x) b[w][c]        w < n words, c < C vectors
//
//            b: n words deep
//              [ w0: c0 | c1 ]
//              [ w1: c0 | c1 ]     one load serves R rows
//   a: R rows  [ ............ ]
//   [w0 w1 ..] [ acc R x C    ]    stays in registers
//
// `each(w)` is called beside word w: a place to ask for memory that is needed later.
struct Nothing {
  HEADSTART_INLINE void operator()(int) const {}
};
template <class Unit, int R, int C, class Each = Nothing>
static HEADSTART_INLINE void dot_tile(typename Unit::accumulator (&acc)[R][C],
                                      const typename Unit::left_word* a, ptrdiff_t a_stride,
                                      const typename Unit::word* b, ptrdiff_t b_stride, int n,
                                      Each&& each = {}) {
  for (int w = 0; w < n; ++w) {
    each(w);
#pragma GCC unroll 2
    for (int part = 0; part < Unit::kParts; ++part) {
      decltype(Unit::load_part(b, 0)) column[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) column[c] = Unit::load_part(b + w * b_stride + c * kLanes, part);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const auto word = Unit::part(a[r * a_stride + w], part);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) Unit::multiply_add(acc[r][c], word, column[c]);
      }
    }
  }
}

// Calls f(std::integral_constant<int, n>) for a run-time n in [1, Max].
template <int Max, class F>
static HEADSTART_INLINE void with_constant(int n, F&& f) {
  if constexpr (Max == 1) {
    f(std::integral_constant<int, 1>{});
  } else {
    if (n == Max) {
      f(std::integral_constant<int, Max>{});
    } else {
      with_constant<Max - 1>(n, f);
    }
  }
}

}  // namespace headstart::HEADSTART_ISA
