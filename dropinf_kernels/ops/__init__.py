"""The ops as Python functions: plain PyTorch, or Triton kernels on a GPU that they support.

No function is differentiable; none depends on autocast; all take non-contiguous and empty inputs. An `index` is
int32 [fan_in, k] and a `weight` float32 [fan_in, k] throughout: (S x)[j] = sum_f weight[f, j] * x[index[f, j]],
without a weight 1. `group` > 1 promises that each row of an index consists of runs start, ..., start + group - 1
with `start` a multiple of `group`; `group` must divide the axis and k. A wrong dtype raises TypeError, a wrong
shape ValueError, an index or id outside its axis IndexError or torch's RuntimeError. Plain bodies gather before
they multiply, and accumulate in float32 (float64 for float64 inputs).
"""
