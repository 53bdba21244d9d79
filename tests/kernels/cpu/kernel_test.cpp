// Every kernel of every instruction set that this machine can run, against a plain loop. Needs no
// Python: also built by a cross compiler and run in an emulator (deploy/aarch64_test.sh).
//
// Beside the loops: results are the same bits with one thread and with three, wherever threads come
// from (OpenMP, or pool.cpp), and on every instruction set and from every compiler, but for x86
// without a fused multiply-add (simd.h). A line per instruction set ends with a hash of all of them.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "instruction_sets.h"
#include "operations.h"

#define HEADSTART_ISA test
#include "parallel.h"

using namespace headstart;

namespace {

int failures = 0;
uint64_t hash = 0;
// Of all results. It changes where the arithmetic of an operation does, and then everywhere.
constexpr uint64_t kResults = 0xd3cbd4d5816c741b;

struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 33);
  }
  int below(int n) { return int(next() % uint32_t(n)); }
  float value() { return float(next()) / float(1u << 30) - 1.0f; }  // [-1, 1)
  std::vector<float> values(size_t n) {
    std::vector<float> v(n);
    for (float& x : v) x = value();
    return v;
  }
};

uint16_t to_bf16(float v) {
  uint32_t b;
  std::memcpy(&b, &v, 4);
  return uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
float from_bf16(uint16_t v) {
  const uint32_t b = uint32_t(v) << 16;
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}

// A tensor of one of the three types, as kernels take it and as a loop reads it.
struct Rows {
  Type type;
  int size;
  std::vector<unsigned char> data;
  std::vector<float> scales;

  Rows(Type type, int rows, int size) : type(type), size(size), data(size_t(rows) * size * bytes()), scales(rows) {}
  Rows(Type type, const std::vector<float>& values, int size) : Rows(type, int(values.size()) / size, size) {
    for (size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  int bytes() const { return type == Type::kF32 ? 4 : type == Type::kBF16 ? 2 : 1; }
  void set(size_t i, float v) {
    const uint16_t b = to_bf16(v);
    if (type == Type::kF32) std::memcpy(&data[i * 4], &v, 4);
    if (type == Type::kBF16) std::memcpy(&data[i * 2], &b, 2);
  }
  float at(size_t i) const {
    float v;
    uint16_t b;
    if (type == Type::kU8) return (float(data[i]) - 128.0f) * scales[i / size];
    if (type == Type::kF32) return std::memcpy(&v, &data[i * 4], 4), v;
    return std::memcpy(&b, &data[i * 2], 2), from_bf16(b);
  }
  float at(int row, int i) const { return at(size_t(row) * size + i); }
  // What a value may be off by, after rounding to this type.
  double rounding(int row, double value) const {
    if (type == Type::kU8) return 0.51 * scales[row] + 1e-6;
    return (type == Type::kBF16 ? 0.005 : 2e-5) * std::fabs(value) + 1e-5;
  }
  RowsOut out() { return {type, data.data(), scales.data()}; }
  RowsIn in() const { return {type, data.data(), scales.data()}; }
};

void add_to_hash(const void* data, size_t bytes) {
  const unsigned char* p = static_cast<const unsigned char*>(data);
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ p[i]) * 1099511628211u;
}

void expect(bool holds, const std::string& what) {
  if (holds) return;
  if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

void expect_near(double found, double wanted, double tolerance, const std::string& what) {
  expect(std::fabs(found - wanted) <= tolerance,
         what + ": " + std::to_string(found) + ", expected " + std::to_string(wanted));
}

void expect_rows(const Rows& found, const std::vector<double>& wanted, double slack, const std::string& what) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    const int row = int(i) / found.size;
    expect_near(found.at(i), wanted[i], found.rounding(row, wanted[i]) + slack,
                what + " row " + std::to_string(row) + " column " + std::to_string(i % found.size));
  }
  add_to_hash(found.data.data(), found.data.size());
}

// work(threads, out) with one thread and with three.
void expect_same(const std::string& what, Rows& out, const std::function<void(int, Rows&)>& work) {
  Rows others = out;
  work(1, out);
  work(3, others);
  expect(out.data == others.data && out.scales == others.scales, what + ": three threads, other bits");
}

const char* name(Type type) { return type == Type::kF32 ? "f32" : type == Type::kBF16 ? "bf16" : "u8"; }
constexpr Type kTypes[] = {Type::kF32, Type::kBF16, Type::kU8};
constexpr Type kFloats[] = {Type::kF32, Type::kBF16};

void test_norm(const Kernels& k) {
  for (const Type delta_type : kFloats) {
    for (const Type out_type : kTypes) {
      for (const int size : {64, 83}) {
        const int rows = 257;  // enough for a parallel region
        Random random{7};
        const std::vector<float> x = random.values(size_t(rows) * size), weight = random.values(size);
        const Rows delta(delta_type, random.values(x.size()), size);
        std::vector<double> wanted(x.size());
        for (int r = 0; r < rows; ++r) {
          double squares = 0;
          for (int i = 0; i < size; ++i) {
            wanted[r * size + i] = double(x[r * size + i]) + delta.at(r, i);
            squares += wanted[r * size + i] * wanted[r * size + i];
          }
          for (int i = 0; i < size; ++i) wanted[r * size + i] *= weight[i] / std::sqrt(squares / size + 1e-5);
        }
        const std::string what = std::string("norm ") + name(delta_type) + " " + name(out_type);
        Rows out(out_type, rows, size);
        expect_same(what, out, [&](int threads, Rows& to) {
          std::vector<float> residual = x;
          norm(k, {rows, size, residual.data(), delta.data.data(), delta_type, weight.data(), 1e-5f, to.out()}, threads);
          expect_near(residual[size + 1], double(x[size + 1]) + delta.at(1, 1), 1e-6, what + " residual");
        });
        expect_rows(out, wanted, 0, what);
      }
    }
  }
}

void test_silu(const Kernels& k) {
  for (const Type in_type : kFloats) {
    for (const Type out_type : kTypes) {
      for (const int size : {96, 37}) {
        const int rows = 150;
        Random random{11};
        std::vector<float> values = random.values(size_t(rows) * 2 * size);
        for (float& v : values) v *= 8;
        values[0] = -200;  // its exponential overflows
        const Rows in(in_type, values, 2 * size);
        std::vector<double> wanted(size_t(rows) * size);
        for (int r = 0; r < rows; ++r) {
          for (int i = 0; i < size; ++i) {
            const double gate = in.at(r, i);
            wanted[size_t(r) * size + i] = gate / (1 + std::exp(-gate)) * in.at(r, size + i);
          }
        }
        const std::string what = std::string("silu ") + name(in_type) + " " + name(out_type);
        Rows out(out_type, rows, size);
        expect_same(what, out, [&](int threads, Rows& to) {
          silu(k, {rows, size, in.data.data(), in_type, to.out()}, threads);
        });
        expect_rows(out, wanted, 0, what);
      }
    }
  }
}

void test_linear(const Kernels& k) {
  for (const int rows : {1, 5, 9, 12, 30, 200}) {
    const int in = 1540, out_features = 70, padded = 96;  // deeper than the wide way goes at a time
    Random random{uint64_t(rows)};
    std::vector<uint8_t> x(size_t(rows) * in);
    for (uint8_t& v : x) v = uint8_t(random.below(256));
    std::vector<int> weight(size_t(padded) * in, 0);
    for (int i = 0; i < out_features * in; ++i) weight[i] = random.below(255) - 127;
    std::vector<int8_t> packed(weight.size());
    std::vector<int32_t> sums(padded, 0);
    for (int o = 0; o < padded; ++o) {
      for (int i = 0; i < in; ++i) {
        packed[((size_t(o / 32) * (in / 4) + i / 4) * 32 + o % 32) * 4 + i % 4] = int8_t(weight[o * in + i]);
        sums[o] += 128 * weight[o * in + i];
      }
    }
    std::vector<float> x_scales = random.values(rows), scales = random.values(padded), bias = random.values(out_features);
    std::vector<double> wanted(size_t(rows) * out_features);
    for (int r = 0; r < rows; ++r) {
      for (int o = 0; o < out_features; ++o) {
        int64_t sum = 0;
        for (int i = 0; i < in; ++i) sum += (int(x[r * in + i]) - 128) * weight[o * in + i];
        wanted[size_t(r) * out_features + o] = double(sum) * x_scales[r] * scales[o] + bias[o];
      }
    }
    Rows out(Type::kF32, rows, out_features);
    expect_same("linear", out, [&](int threads, Rows& to) {
      linear(k, {rows, in, out_features, x.data(), x_scales.data(), packed.data(), scales.data(), sums.data(),
                bias.data(), reinterpret_cast<float*>(to.data.data()), nullptr},
               threads);
    });
    expect_rows(out, wanted, 0.02, "linear int8, " + std::to_string(rows) + " rows");
    // Every instruction set has the same bits.
    static std::map<int, std::vector<unsigned char>> first;
    const bool same = first.try_emplace(rows, out.data).first->second == out.data;
    expect(same, "linear int8, " + std::to_string(rows) + " rows: other bits than the first instruction set's");
  }
}

// Where the pool has element i of key (or value) `token` of a head: the layout of attention.h.
struct Pool {
  Type type;
  int kv_heads, head_dim, page_size;
  Rows data;

  Pool(Type type, int pages, int kv_heads, int head_dim, int page_size)
      : type(type), kv_heads(kv_heads), head_dim(head_dim), page_size(page_size),
        data(type, pages, 2 * kv_heads * head_dim * page_size) {}
  float at(int slot, int head, int i, bool value) const {
    const int per_word = type == Type::kBF16 ? 2 : 1, page = slot / page_size, offset = slot % page_size;
    const size_t tile = size_t(head_dim) * page_size, base = 2 * tile * (size_t(kv_heads) * page + head) + (value ? tile : 0);
    const size_t at = value ? (size_t(offset / per_word) * head_dim + i) * per_word + offset % per_word
                            : (size_t(i / per_word) * page_size + offset) * per_word + i % per_word;
    return data.at(base + at);
  }
};

struct Shape {
  int heads, kv_heads, head_dim;
};

// Rotates one head as a loop; weight may be null.
std::vector<double> rotated(const Rows& qkv, int row, int first, int head_dim, const float* weight, const float* cos,
                            const float* sin) {
  std::vector<double> x(head_dim), y(head_dim);
  double squares = 0;
  for (int i = 0; i < head_dim; ++i) x[i] = qkv.at(row, first + i), squares += x[i] * x[i];
  if (weight) {
    for (int i = 0; i < head_dim; ++i) x[i] *= weight[i] / std::sqrt(squares / head_dim + 1e-5);
  }
  for (int i = 0; i < head_dim / 2; ++i) {
    y[i] = x[i] * cos[i] - x[i + head_dim / 2] * sin[i];
    y[i + head_dim / 2] = x[i + head_dim / 2] * cos[i] + x[i] * sin[i];
  }
  return y;
}

void test_rope(const Kernels& k) {
  const Shape s{6, 2, 32};
  const int page_size = 32, rows = 70, half = s.head_dim / 2, width = (s.heads + 2 * s.kv_heads) * s.head_dim;
  for (const Type in_type : kFloats) {
    for (const Type kv_type : kFloats) {
      for (const bool normed : {false, true}) {
        Random random{3};
        const Rows qkv(in_type, random.values(size_t(rows) * width), width);
        const std::vector<float> weight = random.values(s.head_dim), cos = random.values(100 * half), sin = random.values(100 * half);
        std::vector<int32_t> positions(rows), slots(rows);
        for (int r = 0; r < rows; ++r) positions[r] = random.below(100), slots[r] = (r * 37) % 96;
        const float* norm_weight = normed ? weight.data() : nullptr;
        const std::string what = std::string("rope ") + name(in_type) + " " + name(kv_type);
        Pool pool(kv_type, 3, s.kv_heads, s.head_dim, page_size);
        Rows q(kv_type, rows, s.heads * s.head_dim);
        expect_same(what, q, [&](int threads, Rows& to) {
          rope(k, {rows, s.heads, s.kv_heads, s.head_dim, page_size, qkv.data.data(), in_type, norm_weight, norm_weight,
                  1e-5f, cos.data(), sin.data(), positions.data(), slots.data(), 0.5f, kv_type, to.data.data(),
                  pool.data.data.data()},
                 threads);
        });
        for (int r = 0; r < rows; ++r) {
          for (int h = 0; h < s.heads + s.kv_heads; ++h) {
            const size_t at = size_t(positions[r]) * half;
            const std::vector<double> y = rotated(qkv, r, h * s.head_dim, s.head_dim, norm_weight, &cos[at], &sin[at]);
            for (int i = 0; i < s.head_dim; ++i) {
              const bool query = h < s.heads;
              const double wanted = query ? 0.5 * y[i] : y[i];
              const double found = query ? q.at(r, h * s.head_dim + i) : pool.at(slots[r], h - s.heads, i, false);
              expect_near(found, wanted, q.rounding(0, wanted), what + (query ? " q" : " k"));
            }
          }
          for (int i = 0; i < s.kv_heads * s.head_dim; ++i) {
            const double wanted = qkv.at(r, (s.heads + s.kv_heads) * s.head_dim + i);
            expect_near(pool.at(slots[r], i / s.head_dim, i % s.head_dim, true), wanted, q.rounding(0, wanted), what + " v");
          }
        }
        add_to_hash(pool.data.data.data(), pool.data.data.size());
        add_to_hash(q.data.data(), q.data.size());
      }
    }
  }
}

// Rows 0 .. 3 share a range of 1,100 keys that ends inside a split; each goes on in one of its own,
// where later rows see more. Row 4 sees nothing.
void test_attention(const Kernels& k) {
  for (const Shape s : {Shape{6, 2, 32}, Shape{14, 1, 80}}) {
    for (const Type kv_type : kFloats) {
      const int page_size = 32, shared_keys = 1152, own = 64, rows = 5, pages = shared_keys / page_size + 4 * 2;
      Random random{5};
      Pool pool(kv_type, pages, s.kv_heads, s.head_dim, page_size);
      for (size_t i = 0; i < size_t(pages) * pool.data.size; ++i) pool.data.set(i, random.value());
      Rows q(kv_type, random.values(size_t(rows) * s.heads * s.head_dim), s.heads * s.head_dim);
      std::vector<int32_t> page_start{0}, page_ids, first_key, row_start{0}, entries, visible;
      const auto range = [&](int key, std::vector<int> of, std::vector<int> sees, int first_page, int count) {
        for (int p = 0; p < count; ++p) page_ids.push_back((first_page + p) * 7 % pages);  // in no order
        page_start.push_back(int(page_ids.size()));
        first_key.push_back(key);
        entries.insert(entries.end(), of.begin(), of.end());
        visible.insert(visible.end(), sees.begin(), sees.end());
        row_start.push_back(int(entries.size()));
      };
      range(0, {0, 1, 2, 3}, {shared_keys, shared_keys, shared_keys, 1100}, 0, shared_keys / page_size);
      for (int r = 0; r < 4; ++r) range(shared_keys, {r}, {r == 3 ? 0 : 1 + 20 * r}, shared_keys / page_size + 2 * r, own / page_size);
      const AttentionPlan plan(rows, s.heads, s.kv_heads, s.head_dim, page_size, int(first_key.size()), page_start.data(),
                               page_ids.data(), first_key.data(), row_start.data(), entries.data(), visible.data());

      const std::string what = std::string("attention ") + name(kv_type);
      std::vector<float> partial(size_t(plan.num_partials) * s.heads * s.head_dim), partial_lse(size_t(plan.num_partials) * s.heads),
          partial_sum(size_t(plan.num_partials) * s.heads * kSumLanes), lse(size_t(rows) * s.heads);
      Rows out(Type::kF32, rows, s.heads * s.head_dim);
      expect_same(what, out, [&](int threads, Rows& to) {
        attend(k, {&plan, kv_type, q.data.data(), pool.data.data.data(), partial.data(), partial_lse.data(),
                  partial_sum.data(), to.out(), lse.data(), 0},
                 threads);
      });

      std::vector<double> wanted(size_t(rows) * s.heads * s.head_dim, 0.0);
      for (int r = 0; r < rows; ++r) {
        for (int h = 0; h < s.heads; ++h) {
          const int kv_head = h / (s.heads / s.kv_heads);
          double sum = 0;
          double* to = &wanted[(size_t(r) * s.heads + h) * s.head_dim];
          for (size_t range_id = 0; range_id + 1 < row_start.size(); ++range_id) {
            for (int e = row_start[range_id]; e < row_start[range_id + 1]; ++e) {
              if (entries[e] != r) continue;
              for (int key = 0; key < visible[e]; ++key) {
                const int slot = page_ids[page_start[range_id] + key / page_size] * page_size + key % page_size;
                double score = 0;
                for (int i = 0; i < s.head_dim; ++i) score += double(q.at(r, h * s.head_dim + i)) * pool.at(slot, kv_head, i, false);
                const double p = std::exp2(score);  // q is scaled to powers of two
                sum += p;
                for (int i = 0; i < s.head_dim; ++i) to[i] += p * pool.at(slot, kv_head, i, true);
              }
            }
          }
          for (int i = 0; i < s.head_dim; ++i) to[i] = sum > 0 ? to[i] / sum : 0.0;
          const double found = lse[size_t(r) * s.heads + h];
          if (sum > 0) {
            expect_near(found, std::log(sum), kv_type == Type::kBF16 ? 0.02 : 1e-4, what + " lse");
          } else {
            expect(found == -std::numeric_limits<double>::infinity(), what + " lse of a row that sees nothing");
          }
        }
      }
      expect_rows(out, wanted, kv_type == Type::kBF16 ? 2e-3 : 1e-5, what);
      add_to_hash(lse.data(), lse.size() * 4);
    }
  }
}

// A random packed matrix and what it points into.
struct OwnedMatrix {
  std::vector<int8_t> weight;
  std::vector<float> scales, bias;
  std::vector<int32_t> sums;
  Matrix matrix;

  OwnedMatrix(Random& random, int in, int out) : scales(random.values((out + 31) / 32 * 32)), bias(random.values(out)) {
    const int padded = int(scales.size());
    weight.resize(size_t(padded) * in);
    for (int8_t& w : weight) w = int8_t(random.below(255) - 127);
    sums.assign(padded, 0);
    for (size_t i = 0; i < weight.size(); ++i) sums[i / (size_t(in) * 32) * 32 + i / 4 % 32] += 128 * weight[i];
    for (float& s : scales) s /= 8 * float(in);
    matrix = {in, out, weight.data(), scales.data(), sums.data(), bias.data()};
  }
};

// Layers in one region give what their operations give one by one; one row and many.
void test_layers(const Kernels& k) {
  const Shape s{4, 2, 32};
  const int hidden = 64, inner = 96, page_size = 32, q_size = s.heads * s.head_dim, qkv_size = q_size + 2 * s.kv_heads * s.head_dim, count = 3;
  for (const int rows : {1, 5, 40}) {
    for (const Type kv_type : kFloats) {
      Random random{uint64_t(rows)};
      const std::vector<float> norms = random.values(hidden), cos = random.values(64 * s.head_dim / 2), sin = random.values(cos.size());
      std::vector<OwnedMatrix> owned;
      for (int i = 0; i < count; ++i) {
        owned.emplace_back(random, hidden, qkv_size);
        owned.emplace_back(random, q_size, hidden);
        owned.emplace_back(random, hidden, 2 * inner);
        owned.emplace_back(random, inner, hidden);
      }
      Layers model{s.heads, s.kv_heads, s.head_dim, page_size, 1e-5f, 0.25f, kv_type, cos.data(), sin.data(), {}};
      for (int i = 0; i < count; ++i) {
        const OwnedMatrix* m = &owned[4 * i];
        model.layers.push_back({norms.data(), m[0].matrix, i ? norms.data() : nullptr, i ? norms.data() : nullptr, m[1].matrix,
                                norms.data(), m[2].matrix, m[3].matrix});
      }
      // Each row sees the keys up to its own.
      const int pages = 2;
      std::vector<int32_t> slots(rows), visible(rows), page_ids(pages), entries(rows);
      std::iota(slots.begin(), slots.end(), 0);
      std::iota(visible.begin(), visible.end(), 1);
      std::iota(page_ids.begin(), page_ids.end(), 0);
      std::iota(entries.begin(), entries.end(), 0);
      const std::vector<int32_t> page_start{0, (rows + page_size - 1) / page_size}, first_key{0}, row_start{0, rows};
      const AttentionPlan plan(rows, s.heads, s.kv_heads, s.head_dim, page_size, 1, page_start.data(), page_ids.data(), first_key.data(),
                               row_start.data(), entries.data(), visible.data());
      std::vector<float> partial(size_t(plan.num_partials) * q_size), partial_lse(size_t(plan.num_partials) * s.heads),
          partial_sum(size_t(plan.num_partials) * s.heads * kSumLanes), qkv(size_t(rows) * qkv_size), gate_up(size_t(rows) * 2 * inner);
      Rows normed(Type::kU8, rows, hidden), attended(Type::kU8, rows, q_size), activated(Type::kU8, rows, inner), q(kv_type, rows, q_size);
      const std::vector<float> x = random.values(size_t(rows) * hidden);
      const size_t layer_bytes = size_t(pages) * 2 * s.kv_heads * s.head_dim * page_size * q.bytes();

      // The residual, then what is still to be added to it.
      Rows wanted(Type::kF32, 2 * rows, hidden);
      float* residual = reinterpret_cast<float*>(wanted.data.data());
      float* delta = residual + x.size();
      std::copy(x.begin(), x.end(), residual);
      std::vector<char> pool(count * layer_bytes);
      const auto product = [&](Rows& in, const Matrix& m, float* out) {
        linear(k, {rows, m.in_features, m.out_features, in.data.data(), in.scales.data(), m.weight, m.scales, m.sums, m.bias, out, nullptr}, 2);
      };
      for (int i = 0; i < count; ++i) {
        const Layer& layer = model.layers[i];
        norm(k, {rows, hidden, residual, i ? delta : nullptr, Type::kF32, layer.input_norm, model.eps, normed.out()}, 2);
        product(normed, layer.qkv, qkv.data());
        rope(k, {rows, s.heads, s.kv_heads, s.head_dim, page_size, qkv.data(), Type::kF32, layer.q_norm, layer.k_norm, model.eps, cos.data(),
                 sin.data(), slots.data(), slots.data(), model.q_scale, kv_type, q.data.data(), pool.data() + i * layer_bytes}, 2);
        attend(k, {&plan, kv_type, q.data.data(), pool.data() + i * layer_bytes, partial.data(), partial_lse.data(), partial_sum.data(),
                   attended.out(), nullptr, 0}, 2);
        product(attended, layer.o, delta);
        norm(k, {rows, hidden, residual, delta, Type::kF32, layer.post_norm, model.eps, normed.out()}, 2);
        product(normed, layer.gate_up, gate_up.data());
        silu(k, {rows, inner, gate_up.data(), Type::kF32, activated.out()}, 2);
        product(activated, layer.down, delta);
      }

      const std::string what = std::string("layers of ") + std::to_string(rows) + " rows, " + name(kv_type);
      Rows found(Type::kF32, 2 * rows, hidden);
      expect_same(what, found, [&](int threads, Rows& to) {
        float* left = reinterpret_cast<float*>(to.data.data());
        std::copy(x.begin(), x.end(), left);
        std::vector<char> other(pool.size());
        run_layers(k, {&model, count, rows, left, slots.data(), slots.data(), other.data(), int64_t(layer_bytes), &plan, normed.out(),
                       attended.out(), activated.out(), q.data.data(), qkv.data(), gate_up.data(), partial.data(), partial_lse.data(),
                       partial_sum.data(), left + x.size()},
                   threads);
        expect(other == pool, what + ": other keys or values than one by one");
      });
      expect(found.data == wanted.data, what + ": other bits than one by one");
      bool finite = true;
      for (size_t i = 0; i < 2 * x.size(); ++i) finite &= std::isfinite(found.at(i));
      expect(finite && found.at(0) != x[0], what + ": no numbers");
      add_to_hash(found.data.data(), found.data.size());
    }
  }
}

// [outputs, inputs] to panels (lora_plan.h).
Rows packed_panels(Type type, const std::vector<float>& weight, int outputs, int inputs, int panel) {
  const int per_word = type == Type::kBF16 ? 2 : 1, words = (inputs + per_word - 1) / per_word;
  Rows packed(type, (outputs + panel - 1) / panel, words * panel * per_word);
  for (int o = 0; o < outputs; ++o) {
    for (int i = 0; i < inputs; ++i) {
      packed.set(((size_t(o / panel) * words + i / per_word) * panel + o % panel) * per_word + i % per_word, weight[o * inputs + i]);
    }
  }
  return packed;
}

void test_lora(const Kernels& k) {
  const int rows = 40, inputs = 67, outputs = 52, rank = 9, first = 5;
  for (const Type weight_type : kFloats) {
    for (const Type x_type : kTypes) {
      Random random{13};
      std::vector<float> down = random.values(rank * inputs), up = random.values(size_t(outputs) * rank);
      if (weight_type == Type::kBF16) {
        for (std::vector<float>* w : {&down, &up}) {
          for (float& v : *w) v = from_bf16(to_bf16(v));
        }
      }
      const Rows packed_down = packed_panels(weight_type, down, rank, inputs, kDownPanel);
      const Rows packed_up = packed_panels(weight_type, up, outputs, rank, kUpPanel);
      Rows x(x_type, rows, inputs);
      for (size_t i = 0; i < size_t(rows) * inputs; ++i) x_type == Type::kU8 ? void(x.data[i] = uint8_t(random.below(256))) : x.set(i, random.value());
      for (float& scale : x.scales) scale = 0.01f;
      LoraAdapter adapter;
      adapter.layers.push_back({{first, outputs, rank, packed_down.data.data(), packed_up.data.data()}});
      LoraPlan plan;
      plan.adapters.push_back(&adapter);
      for (int r = 0; r < rows; r += 2) plan.rows.push_back(r);
      plan.row_start = {0, int32_t(plan.rows.size())};
      const int width = first + outputs + 3;
      std::vector<double> wanted(size_t(rows) * width, 0.25);
      for (int r = 0; r < rows; r += 2) {
        for (int j = 0; j < rank; ++j) {
          double t = 0;
          for (int i = 0; i < inputs; ++i) t += double(x.at(r, i)) * down[j * inputs + i];
          for (int o = 0; o < outputs; ++o) wanted[size_t(r) * width + first + o] += t * up[o * rank + j];
        }
      }
      const std::string what = std::string("lora ") + name(weight_type) + " " + name(x_type);
      Rows y(Type::kF32, std::vector<float>(size_t(rows) * width, 0.25f), width);
      expect_same(what, y, [&](int threads, Rows& to) {
        k.lora({&plan, 0, weight_type, inputs, outputs + first + 3, x.in(), Type::kF32, to.data.data()}, threads);
      });
      expect_rows(y, wanted, weight_type == Type::kBF16 ? 0.15 : 1e-4, what);
    }
  }
}

void test_argmax(const Kernels& k) {
  const int rows = 20, size = 1003;
  Random random{17};
  std::vector<float> logits = random.values(size_t(rows) * size);
  std::vector<int32_t> wanted(rows), found(rows);
  for (int r = 0; r < rows; ++r) {
    wanted[r] = random.below(size - 1);
    logits[r * size + wanted[r]] = logits[r * size + size - 1] = 2.0f;  // the first of equals
  }
  logits[3 * size + 40] = std::numeric_limits<float>::quiet_NaN();
  wanted[3] = 40;
  for (const int threads : {1, 3}) {
    k.argmax(logits.data(), rows, size, found.data(), threads);
    expect(found == wanted, "argmax");
  }
}

// The token that a loop over sorted weights draws, in double.
int32_t drawn(const float* x, int size, double temperature, double min_p, int top_k, double top_p, double uniform) {
  const double top = *std::max_element(x, x + size);
  std::vector<double> weights(size);
  for (int i = 0; i < size; ++i) weights[i] = std::exp((x[i] - top) / temperature);
  std::vector<double> sorted = weights;
  std::sort(sorted.rbegin(), sorted.rend());
  double least = std::max(min_p, top_k < size ? sorted[top_k - 1] : 0.0), total = 0, sum = 0;
  for (double w : sorted) total += w >= least ? w : 0.0;
  for (double w : sorted) {
    sum += w;
    if (sum >= top_p * total) {
      if (top_p < 1) least = std::max(least, w);
      break;
    }
  }
  total = sum = 0;
  for (double w : weights) total += w >= least ? w : 0.0;
  for (int i = 0; i < size; ++i) {
    sum += weights[i] >= least ? weights[i] : 0.0;
    if (sum > uniform * total) return i;
  }
  return size - 1;
}

void test_sample(const Kernels& k) {
  const int rows = 12;
  const struct { float temperature, min_p; int top_k; double top_p; } kinds[] = {
      {1, 0, 5000, 1}, {0.7f, 0, 5000, 0.9}, {1, 0, 3, 1}, {1, 0, 40, 0.8}, {1.5f, 0.05f, 5000, 1}, {1, 0.01f, 200, 0.95}};
  for (const int size : {5, 256, 1003}) {
    Random random{uint64_t(size)};
    std::vector<float> logits = random.values(size_t(rows) * size);
    for (float& x : logits) x *= 8;
    logits[3 * size + 4] = std::numeric_limits<float>::quiet_NaN();
    for (const auto& kind : kinds) {
      std::vector<int32_t> row(rows), top_k(rows, kind.top_k), wanted(rows), found(rows);
      std::vector<float> temperature(rows, kind.temperature), min_p(rows, kind.min_p);
      std::vector<double> top_p(rows, kind.top_p), uniform(rows);
      for (int r = 0; r < rows; ++r) {
        row[r] = rows - 1 - r;
        uniform[r] = double(random.next()) / double(1u << 31);
        wanted[r] = row[r] == 3 ? -1
                                : drawn(&logits[row[r] * size], size, kind.temperature, kind.min_p, kind.top_k, kind.top_p, uniform[r]);
      }
      for (const int threads : {1, 3}) {
        k.sample({rows, size, logits.data(), row.data(), temperature.data(), min_p.data(), top_k.data(), top_p.data(),
                  uniform.data(), found.data()},
                 threads);
        expect(found == wanted, "sample of " + std::to_string(size) + ", top_k " + std::to_string(kind.top_k));
      }
    }
    const int count = std::min(size, 4);
    std::vector<int32_t> row = {5, 0}, ids(2 * count);
    std::vector<float> values(2 * count), total(2);
    k.top({2, size, count, logits.data(), row.data(), ids.data(), values.data(), total.data()}, 2);
    for (int r = 0; r < 2; ++r) {
      std::vector<float> sorted(&logits[row[r] * size], &logits[row[r] * size] + size);
      std::sort(sorted.rbegin(), sorted.rend());
      double sum = 0;
      for (float x : sorted) sum += std::exp(double(x));
      expect_near(total[r], std::log(sum), 1e-5, "top: log sum exp");
      for (int i = 0; i < count; ++i) {
        expect(values[r * count + i] == sorted[i] && logits[row[r] * size + ids[r * count + i]] == sorted[i], "top: order");
      }
    }
  }
}

// Regions one after the other: all of a team's threads meet at the barrier, and all work is done.
void test_threads() {
  for (int run = 0; run < 300; ++run) {
    const int threads = 1 + run % 5, items = 64;
    std::atomic<int> next{0}, second{0}, before{0}, after{0}, late{0};
    headstart::test::parallel(threads, [&] {
      headstart::test::turns(next, items, 3, [&](int i) { before += i; });
      headstart::test::barrier();
      if (before != items * (items - 1) / 2) ++late;
      headstart::test::turns(second, items, 1, [&](int i) { after += i; });
    });
    expect(late == 0, "a thread passed the barrier before the others came");
    expect(after == items * (items - 1) / 2, "work was left undone");
  }
}

}  // namespace

int main() {
  test_threads();
  for (const InstructionSet& set : instruction_sets()) {
    if (!set.usable) continue;
    hash = 14695981039346656037u;
    const int before = failures;
    test_norm(set.kernels);
    test_silu(set.kernels);
    test_linear(set.kernels);
    test_rope(set.kernels);
    test_attention(set.kernels);
    test_layers(set.kernels);
    test_lora(set.kernels);
    test_argmax(set.kernels);
    test_sample(set.kernels);
#if defined(__x86_64__)
    const bool fused = std::strcmp(set.kernels.name, "portable") != 0;
#else
    const bool fused = true;
#endif
    expect(!fused || hash == kResults, "other bits than on other instruction sets");
    std::printf("%s: %d failures, results %016llx\n", set.kernels.name, failures - before, static_cast<unsigned long long>(hash));
  }
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
