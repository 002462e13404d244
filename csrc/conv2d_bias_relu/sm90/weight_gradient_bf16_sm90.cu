#include "weight_gradient_sm90.cuh"

template int alexnet_ext::conv2d_weight_gradient_sm90<alexnet_ext::bf16>(const Conv2d&, const void*, const void*, void*,
                                                                         void*, void*);
