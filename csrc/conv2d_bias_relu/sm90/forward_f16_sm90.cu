#include "conv2d_sm90.cuh"

template int alexnet_ext::conv2d_forward_sm90<alexnet_ext::f16>(const Conv2d&, const void*, const void*, const void*,
                                                                bool, void*, void*);
