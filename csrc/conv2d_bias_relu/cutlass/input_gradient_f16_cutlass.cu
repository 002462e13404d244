#include "conv2d_cutlass.cuh"

template int alexnet_ext::conv2d_input_gradient_cutlass<alexnet_ext::f16>(const Conv2d&, const void*, const void*,
                                                                          void*, void*);
