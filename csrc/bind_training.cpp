// The kernels of training as methods of Native. Numbers are float32, or bfloat16 as uint16; which, the arrays say.
#include "bind.hpp"

namespace puna {
namespace {

template <class Number>
using Rows = Array<Number, 2>;
using Floats = Array<const float, 1>;

template <class Number>
const TrainingKernels<Number>& kernels(const Native& native) {
  if constexpr (sizeof(Number) == sizeof(float))
    return *native.kernels->float32_training();
  else
    return *native.kernels->bfloat16_training();
}

template <class A, class B>
bool same_shape(const A& a, const B& b) {
  return a.shape(0) == b.shape(0) && a.shape(1) == b.shape(1);
}

// x [T, K], weight [K] -> out [T, K], inverse [T]
template <class Number>
void norm(Native& native, const Rows<const Number>& x, const Floats& weight, float eps, const Rows<Number>& out,
          const Array<float, 1>& inverse) {
  check(x.shape(1) > 0 && same_shape(x, out) && weight.shape(0) == x.shape(1) && inverse.shape(0) == x.shape(0),
        "norm: shapes don't agree");
  kernels<Number>(native).norm(native.pool, x.data(), weight.data(), eps, int64_t(x.shape(0)), int64_t(x.shape(1)), out.data(),
                               inverse.data());
}

// x, gradient [T, K], weight [K], inverse [T] -> x_gradient [T, K]
template <class Number>
void norm_backward(Native& native, const Rows<const Number>& x, const Floats& weight, const Floats& inverse,
                   const Rows<const Number>& gradient, const Rows<Number>& x_gradient) {
  check(x.shape(1) > 0 && same_shape(x, gradient) && same_shape(x, x_gradient) && weight.shape(0) == x.shape(1) &&
            inverse.shape(0) == x.shape(0),
        "norm_backward: shapes don't agree");
  kernels<Number>(native).norm_backward(native.pool, x.data(), weight.data(), inverse.data(), gradient.data(),
                                        int64_t(x.shape(0)), int64_t(x.shape(1)), x_gradient.data());
}

// x [T, heads * d], cosines and sines [T, d / 2] -> out [T, heads * d]
template <class Number>
void rotate(Native& native, const Rows<const Number>& x, const Array<const float, 2>& cosines, const Array<const float, 2>& sines,
            bool back, const Rows<Number>& out) {
  const size_t half = cosines.shape(1);
  check(half > 0 && x.shape(1) > 0 && x.shape(1) % (2 * half) == 0 && cosines.shape(0) == x.shape(0) &&
            same_shape(cosines, sines) && same_shape(x, out),
        "rotate: shapes don't agree");
  kernels<Number>(native).rotate(native.pool, x.data(), cosines.data(), sines.data(), back, int64_t(x.shape(0)),
                                 int64_t(x.shape(1) / (2 * half)), int64_t(half), out.data());
}

// gate, up [T, n] -> out [T, n]
template <class Number>
void gate(Native& native, const Rows<const Number>& gate, const Rows<const Number>& up, const Rows<Number>& out) {
  check(same_shape(gate, up) && same_shape(gate, out), "gate: shapes don't agree");
  kernels<Number>(native).gate(native.pool, gate.data(), up.data(), int64_t(gate.size()), out.data());
}

// gate, up, gradient [T, n] -> gate_gradient, up_gradient [T, n]
template <class Number>
void gate_backward(Native& native, const Rows<const Number>& gate, const Rows<const Number>& up, const Rows<const Number>& gradient,
                   const Rows<Number>& gate_gradient, const Rows<Number>& up_gradient) {
  check(same_shape(gate, up) && same_shape(gate, gradient) && same_shape(gate, gate_gradient) && same_shape(gate, up_gradient),
        "gate_backward: shapes don't agree");
  kernels<Number>(native).gate_backward(native.pool, gate.data(), up.data(), gradient.data(), int64_t(gate.size()),
                                        gate_gradient.data(), up_gradient.data());
}

// logits [R, V], in place, targets int64[R], weights [R] -> losses [R]
template <class Number>
void cross_entropy(Native& native, const Rows<Number>& logits, const Array<const int64_t, 1>& targets, const Floats& weights,
                   bool gradients, const Array<float, 1>& losses) {
  const size_t rows = logits.shape(0), vocabulary = logits.shape(1);
  check(targets.shape(0) == rows && weights.shape(0) == rows && losses.shape(0) == rows, "cross_entropy: shapes don't agree");
  for (size_t i = 0; i < rows; ++i)
    check(targets.data()[i] >= 0 && targets.data()[i] < int64_t(vocabulary), "cross_entropy: a target is out of range");
  kernels<Number>(native).cross_entropy(native.pool, logits.data(), targets.data(), weights.data(), int64_t(rows),
                                        int64_t(vocabulary), gradients, losses.data());
}

// scores [n, queries, heads, keys], overwritten -> weights, the same
template <class Number>
void causal_softmax(Native& native, const Array<float, 4>& scores, float scale, const Array<Number, 4>& weights) {
  bool agree = scores.shape(1) <= scores.shape(3) && scores.shape(1) > 0;
  for (size_t i = 0; i < 4; ++i) agree = agree && scores.shape(i) == weights.shape(i);
  check(agree, "causal_softmax: shapes don't agree");
  kernels<Number>(native).causal_softmax(native.pool, scores.data(), scale, int64_t(scores.shape(0)), int64_t(scores.shape(1)),
                                         int64_t(scores.shape(2)), int64_t(scores.shape(3)), weights.data());
}

// weights [rows, keys], gradients [rows, keys] in place
template <class Number>
void softmax_backward(Native& native, const Rows<const Number>& weights, float scale, const Rows<Number>& gradients) {
  check(weights.shape(1) > 0 && same_shape(weights, gradients), "softmax_backward: shapes don't agree");
  kernels<Number>(native).softmax_backward(native.pool, weights.data(), scale, int64_t(weights.shape(0)),
                                           int64_t(weights.shape(1)), gradients.data());
}

template <class Number>
void bind(nb::class_<Native>& native) {
  const nb::call_guard<nb::gil_scoped_release> unlocked;
  native.def("norm", &norm<Number>, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("out").noconvert(), nb::arg("inverse").noconvert(), unlocked)
      .def("norm_backward", &norm_backward<Number>, nb::arg("x"), nb::arg("weight"), nb::arg("inverse"), nb::arg("gradient"),
           nb::arg("x_gradient").noconvert(), unlocked)
      .def("rotate", &rotate<Number>, nb::arg("x"), nb::arg("cosines"), nb::arg("sines"), nb::arg("back"), nb::arg("out").noconvert(), unlocked)
      .def("gate", &gate<Number>, nb::arg("gate"), nb::arg("up"), nb::arg("out").noconvert(), unlocked)
      .def("gate_backward", &gate_backward<Number>, nb::arg("gate"), nb::arg("up"), nb::arg("gradient"),
           nb::arg("gate_gradient").noconvert(), nb::arg("up_gradient").noconvert(), unlocked)
      .def("cross_entropy", &cross_entropy<Number>, nb::arg("logits").noconvert(), nb::arg("targets"), nb::arg("weights"),
           nb::arg("gradients"), nb::arg("losses").noconvert(), unlocked)
      .def("causal_softmax", &causal_softmax<Number>, nb::arg("scores").noconvert(), nb::arg("scale"), nb::arg("weights").noconvert(), unlocked)
      .def("softmax_backward", &softmax_backward<Number>, nb::arg("weights"), nb::arg("scale"), nb::arg("gradients").noconvert(), unlocked);
}

}  // namespace

void bind_training(nb::class_<Native>& native) {
  bind<float>(native);
  bind<uint16_t>(native);
}

}  // namespace puna
