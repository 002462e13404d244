#include "conv2d_cutlass.cuh"

template int alexnet_ext::conv2d_forward_cutlass<alexnet_ext::f16>(const Conv2d&, const void*, const void*, const void*,
                                                                   bool, void*, void*);
