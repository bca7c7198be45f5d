"""The gates that the kernels compute, in float32, and their derivatives; their names are those of `reference.py`.

`clamp` passes its gradient at the limit itself, as torch's does.
"""

import triton
import triton.language as tl


@triton.jit
def _gelu_tanh(x):
    """gelu by tanh, its derivative: 0.5 (1 + tanh z) = sigmoid(2 z), z = sqrt(2/pi) (x + 0.044715 x^3)."""
    s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x * s, s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)


@triton.jit
def _gelu(x):
    """gelu by erf, its derivative."""
    cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _swish(x, alpha):
    """x sigmoid(alpha x), its derivative."""
    s = tl.sigmoid(alpha * x)
    return x * s, s + alpha * x * s * (1 - s)


@triton.jit
def gate(g, u, alpha, limit, ACTIVATION: tl.constexpr):
    """Of gate g and up u, any shape, float32: h = act(g) * u, dh/dg, dh/du."""
    g_passes = 1.0
    u_passes = 1.0
    if ACTIVATION == "clamped_swiglu" or ACTIVATION == "clamped_silu":
        g_passes = (g <= limit).to(tl.float32)
        u_passes = ((u >= -limit) & (u <= limit)).to(tl.float32)
        g = tl.minimum(g, limit)
        u = tl.minimum(tl.maximum(u, -limit), limit)
    if ACTIVATION == "clamped_swiglu":
        a, da = _swish(g, alpha)
        u = u + 1.0
    elif ACTIVATION == "silu" or ACTIVATION == "clamped_silu":
        a, da = _swish(g, 1.0)
    elif ACTIVATION == "gelu":
        a, da = _gelu(g)
    elif ACTIVATION == "gelu_pytorch_tanh":
        a, da = _gelu_tanh(g)
    else:
        tl.static_assert(ACTIVATION == "relu", "unknown activation")
        a = tl.maximum(g, 0.0)
        da = (g > 0).to(tl.float32)
    return a * u, da * u * g_passes, a * u_passes
