// Python's view of the kernels: addresses and sizes in, nothing out. Tensors cross as integers
// because a DLPack conversion per argument costs more than the small kernels do.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "instruction_sets.h"
#include "kernels.h"
#include "operations.h"

namespace nb = nanobind;

namespace headstart {

namespace {

std::vector<std::string> supported() {
  std::vector<std::string> names;
  for (const InstructionSet& set : instruction_sets()) {
    if (set.usable) names.emplace_back(set.kernels.name);
  }
  return names;
}

template <class T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The kernels of one instruction set on a fixed number of threads.
class Bound {
 public:
  Bound(const std::string& name, int threads) : threads_(threads) {
    for (const InstructionSet& set : instruction_sets()) {
      if (name == set.kernels.name && set.usable) kernels_ = &set.kernels;
    }
    if (!kernels_) throw std::invalid_argument("this machine has no '" + name + "' kernels");
    if (threads < 1) throw std::invalid_argument("threads must be at least 1");
  }

  void norm(int rows, int size, uintptr_t residual, uintptr_t delta, int delta_type, uintptr_t weight,
            float eps, int out_type, uintptr_t out, uintptr_t scales) const {
    headstart::norm(*kernels_, {rows, size, at<float>(residual), at(delta), Type(delta_type), at<float>(weight), eps,
                    {Type(out_type), at(out), at<float>(scales)}},
                   threads_);
  }
  void silu(int rows, int size, uintptr_t gate_up, int in_type, int out_type, uintptr_t out, uintptr_t scales) const {
    headstart::silu(*kernels_, {rows, size, at(gate_up), Type(in_type), {Type(out_type), at(out), at<float>(scales)}}, threads_);
  }
  void rope(int rows, int heads, int kv_heads, int head_dim, int page_size, uintptr_t qkv, int in_type,
            uintptr_t q_norm, uintptr_t k_norm, float eps, uintptr_t cos, uintptr_t sin, uintptr_t positions,
            uintptr_t slots, float q_scale, int kv_type, uintptr_t q, uintptr_t pool) const {
    headstart::rope(*kernels_, {rows, heads, kv_heads, head_dim, page_size, at(qkv), Type(in_type), at<float>(q_norm),
                    at<float>(k_norm), eps, at<float>(cos), at<float>(sin), at<int32_t>(positions),
                    at<int32_t>(slots), q_scale, Type(kv_type), at(q), at(pool)},
                   threads_);
  }
  void attend(const AttentionPlan& plan, int kv_type, uintptr_t q, uintptr_t pool, uintptr_t partial,
              uintptr_t partial_lse, uintptr_t partial_sum, int out_type, uintptr_t out, uintptr_t scales, uintptr_t lse) const {
    headstart::attend(*kernels_, {&plan, Type(kv_type), at(q), at(pool), at<float>(partial), at<float>(partial_lse),
                      at<float>(partial_sum), {Type(out_type), at(out), at<float>(scales)}, at<float>(lse), 0},
                     threads_);
  }
  void linear(int rows, int in_features, int out_features, uintptr_t x, uintptr_t x_scales, uintptr_t weight,
              uintptr_t weight_scales, uintptr_t weight_sums, uintptr_t bias, uintptr_t out) const {
    headstart::linear(*kernels_, {rows, in_features, out_features, at<uint8_t>(x), at<float>(x_scales), at<int8_t>(weight),
                      at<float>(weight_scales), at<int32_t>(weight_sums), at<float>(bias), at<float>(out), nullptr},
                     threads_);
  }
  void lora(const LoraPlan& plan, int layer, int weight_type, int in_features, int out_features, int x_type, uintptr_t x,
            uintptr_t x_scales, int y_type, uintptr_t y) const {
    kernels_->lora({&plan, layer, Type(weight_type), in_features, out_features, {Type(x_type), at(x), at<float>(x_scales)},
                    Type(y_type), at(y)},
                   threads_);
  }
  void argmax(uintptr_t logits, int rows, int size, uintptr_t out) const {
    kernels_->argmax(at<float>(logits), rows, size, at<int32_t>(out), threads_);
  }
  void sample(int rows, int size, uintptr_t logits, uintptr_t row, uintptr_t temperature, uintptr_t min_p, uintptr_t top_k,
              uintptr_t top_p, uintptr_t uniform, uintptr_t out) const {
    kernels_->sample({rows, size, at<float>(logits), at<int32_t>(row), at<float>(temperature), at<float>(min_p),
                      at<int32_t>(top_k), at<double>(top_p), at<double>(uniform), at<int32_t>(out)},
                     threads_);
  }
  void top(int rows, int size, int count, uintptr_t logits, uintptr_t row, uintptr_t ids, uintptr_t values, uintptr_t total) const {
    kernels_->top({rows, size, count, at<float>(logits), at<int32_t>(row), at<int32_t>(ids), at<float>(values), at<float>(total)},
                  threads_);
  }
  // scratch: addresses of data and scales of each, normed, attended, activated; partials: those of AttendArgs.
  double layers(const Layers& model, int count, int rows, uintptr_t residual, uintptr_t positions, uintptr_t slots,
                uintptr_t pool, int64_t layer_bytes, const AttentionPlan& plan, const std::array<uintptr_t, 6>& scratch,
                uintptr_t q, uintptr_t qkv, uintptr_t gate_up, const std::array<uintptr_t, 3>& partials, uintptr_t delta) const {
    const auto out = [&](int i) { return RowsOut{Type::kU8, at(scratch[2 * i]), at<float>(scratch[2 * i + 1])}; };
    return run_layers(*kernels_,
                      {&model, count, rows, at<float>(residual), at<int32_t>(positions), at<int32_t>(slots), at<char>(pool),
                       layer_bytes, &plan, out(0), out(1), out(2), at(q), at<float>(qkv), at<float>(gate_up),
                       at<float>(partials[0]), at<float>(partials[1]), at<float>(partials[2]), at<float>(delta)},
                      threads_);
  }
  std::string name() const { return kernels_->name; }

 private:
  const Kernels* kernels_ = nullptr;
  int threads_;
};

using Addresses = std::array<uintptr_t, 4>;  // weight, scales, sums, bias

Matrix matrix(int in_features, int out_features, const Addresses& parts) {
  return {in_features, out_features, at<int8_t>(parts[0]), at<float>(parts[1]), at<int32_t>(parts[2]), at<float>(parts[3])};
}

using Indices = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

}  // namespace
}  // namespace headstart

NB_MODULE(_cpu, m) {
  using namespace headstart;
  m.attr("BLOCK_PAGES") = kBlockPages;
  m.attr("DOWN_PANEL") = kDownPanel;
  m.attr("UP_PANEL") = kUpPanel;
  m.attr("SUM_LANES") = kSumLanes;
  m.def("supported", &supported, "Instruction sets this machine can run, best first.");
  m.def("missing", &missing_sets, "Instruction sets this machine has and this build has no kernels for.");
  nb::class_<AttentionPlan>(m, "AttentionPlan")
      .def(
          "__init__",
          [](AttentionPlan* self, int num_rows, int heads, int kv_heads, int head_dim, int page_size,
             Indices page_start, Indices pages, Indices first_key, Indices row_start, Indices rows, Indices visible) {
            const int ranges = int(page_start.size()) - 1;
            if (ranges < 0 || page_start.size() != row_start.size() || first_key.size() != size_t(ranges) || size_t(page_start.data()[ranges]) != pages.size() ||
                size_t(row_start.data()[ranges]) != rows.size() || rows.size() != visible.size()) {
              throw std::invalid_argument("KV range arrays do not fit together");
            }
            new (self) AttentionPlan(num_rows, heads, kv_heads, head_dim, page_size, ranges, page_start.data(),
                                     pages.data(), first_key.data(), row_start.data(), rows.data(), visible.data());
          })
      .def_ro("num_rows", &AttentionPlan::num_rows)
      .def_ro("num_partials", &AttentionPlan::num_partials)
      .def_prop_ro("num_items", [](const AttentionPlan& p) { return p.items.size(); });
  nb::class_<LoraAdapter>(m, "LoraAdapter")
      .def(nb::init<>())
      .def("add_layer", [](LoraAdapter& self) { self.layers.emplace_back(); }, "The next dense layer; parts added now are its.")
      .def("add_part", [](LoraAdapter& self, int first, int outputs, int rank, uintptr_t down, uintptr_t up) {
        self.layers.back().push_back({first, outputs, rank, at(down), at(up)});
      });
  nb::class_<LoraPlan>(m, "LoraPlan")
      .def(nb::init<>())
      .def(
          "add",
          [](LoraPlan& self, const LoraAdapter& adapter, Indices rows) {
            if (self.row_start.empty()) self.row_start.push_back(0);
            self.adapters.push_back(&adapter);
            self.rows.insert(self.rows.end(), rows.data(), rows.data() + rows.size());
            self.row_start.push_back(int32_t(self.rows.size()));
          },
          nb::keep_alive<1, 2>(), "These rows get the terms of this adapter; a row is in one group only.");
  nb::class_<Layers>(m, "Layers")
      .def("__init__",
           [](Layers* self, int heads, int kv_heads, int head_dim, int page_size, float eps, float q_scale, int kv_type,
              uintptr_t cos, uintptr_t sin) {
             new (self) Layers{heads, kv_heads, head_dim, page_size, eps, q_scale, Type(kv_type), at<float>(cos), at<float>(sin), {}};
           })
      .def(
          "add",
          [](Layers& self, int hidden, int inner, uintptr_t input_norm, const Addresses& qkv, uintptr_t q_norm,
             uintptr_t k_norm, const Addresses& o, uintptr_t post_norm, const Addresses& gate_up, const Addresses& down) {
            const int q_size = self.heads * self.head_dim, kv_size = self.kv_heads * self.head_dim;
            self.layers.push_back({at<float>(input_norm), matrix(hidden, q_size + 2 * kv_size, qkv), at<float>(q_norm),
                                   at<float>(k_norm), matrix(q_size, hidden, o), at<float>(post_norm),
                                   matrix(hidden, 2 * inner, gate_up), matrix(inner, hidden, down)});
          },
          "The next layer. Of a matrix: the addresses of its weight, scales, sums and bias.");
  nb::class_<Bound>(m, "Kernels")
      .def(nb::init<const std::string&, int>())
      .def_prop_ro("name", &Bound::name)
      .def("norm", &Bound::norm)
      .def("silu", &Bound::silu)
      .def("rope", &Bound::rope)
      .def("attend", &Bound::attend)
      .def("linear", &Bound::linear)
      .def("layers", &Bound::layers, nb::call_guard<nb::gil_scoped_release>(),
           "The first `count` layers; returns the seconds spent in attention.")
      .def("lora", &Bound::lora)
      .def("argmax", &Bound::argmax)
      .def("sample", &Bound::sample)
      .def("top", &Bound::top);
}
