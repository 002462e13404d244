#include "conv2d_cutlass.cuh"

template int alexnet_ext::conv2d_input_gradient_cutlass<float>(const Conv2d&, const void*, const void*, void*, void*);
