"""The recursion of the prior, r_t = a1 r_{t-1} + a2 r_{t-2} + e_t, on a GPU."""


def by_doubling(e, a1, a2, before, before2):
    """`talkingflow.frame_by_frame` in log2(T) rounds: T small launches would take longer than all else. With
    q the lag, (1 - a1 q - a2 q^2)(1 + a1 q - a2 q^2) = 1 - (a1^2 + 2 a2) q^2 - (-a2^2) q^4: filter e by
    the second factor, and what is left is a recursion of the same form with twice the lag (Graeffe). In
    float64: squaring coefficients that lie near the unit circle costs 1e-4 in float32 over 250 frames."""
    dtype, e, a1, a2 = e.dtype, e.double().clone(), a1.double(), a2.double()
    e[:, 0] += a1 * before + a2 * before2
    if e.shape[1] > 1:
        e[:, 1] += a2 * before
    lag = 1
    while lag < e.shape[1]:
        r = e.clone()
        r[:, lag:].addcmul_(a1, e[:, :-lag])
        r[:, 2 * lag :].addcmul_(a2, e[:, : -2 * lag], value=-1)  # nothing, where that is beyond the end
        e, a1, a2, lag = r, a1**2 + 2 * a2, -(a2**2), 2 * lag
    return e.to(dtype)
