#include "conv2d_cutlass.cuh"

template int alexnet_ext::conv2d_forward_cutlass<float>(const Conv2d&, const void*, const void*, const void*, bool,
                                                        void*, void*);
