"""What an exported file must keep to, by its type."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Limits:
    """What a file must keep to; None leaves a figure unjudged.

    KL in nats. `ppl`: share above the reference's perplexity. `logit`: largest difference (or 1e-4
    of the largest logit, where that is more). `greedy_margin`: the reference's lead, in logits,
    over the file's token where two answers part.
    """

    kl_mean: float
    kl_p99: float
    ppl: float
    logit: float | None = None
    greedy_margin: float | None = None


# Mean KL measured on trained models of 2M and 5M: f32 2e-12, f16 4e-8, bf16 2e-6, Q8_0 2e-5, Q6_K
# 1e-4, Q5_K_M 3e-4, Q4_K_M 1e-3, of which the limits leave a factor of 30 or more; on the worst of eight
# families (bench/verify.py) Q8_0 2e-4 and Q4_K_M 1e-2, of which it is 3. Beside Q4_K_M, measured on
# another one: Q4_K_S and IQ4_XS 1.1 and 1.2 times its KL, Q3_K_M 3, Q2_K 12. With a bf16 file llama.cpp
# rounds the activations too: logits differ by up to 0.04 (2M model), and so may a margin.
LIMITS = {
    "f32": Limits(1e-8, 1e-7, 0.0001, logit=1e-3, greedy_margin=1e-2),
    "f16": Limits(1e-5, 1e-4, 0.001, greedy_margin=1e-2),
    "bf16": Limits(1e-4, 1e-3, 0.002, greedy_margin=1e-1),
    "q8_0": Limits(1e-3, 1e-2, 0.01),
    "q6_k": Limits(3e-3, 3e-2, 0.015),
    "q5_k_m": Limits(1e-2, 1e-1, 0.02),
    "q5_k_s": Limits(1e-2, 1e-1, 0.02),
    "q4_k_m": Limits(3e-2, 3e-1, 0.03),
    "q4_k_s": Limits(4e-2, 4e-1, 0.04),
    "iq4_xs": Limits(4e-2, 4e-1, 0.04),
    "q3_k_m": Limits(1.5e-1, 1.5, 0.15),
    "q2_k": Limits(6e-1, 6.0, 0.6),
    "mxfp4": Limits(3e-2, 3e-1, 0.03),  # of mixtures, below Q4_K_M in two trained ones
}
# llama.cpp's GELU is a table of float16 values, so the logits of Gemma differ more: largest difference
# 2e-3 in tiny random models, 5.7e-3 of logits up to 16 in a trained one of 2.6M (mean KL 1.3e-8). With
# the same table in our decoder it is 2.9e-4: nothing else differs.
_GELU_TABLE = {"f32": Limits(1e-6, 1e-5, 0.0001, logit=2e-2, greedy_margin=2e-2)}
_WITH_GELU = frozenset({"gemma3"})

# Where a router chooses among experts, a rounding error can choose another one: under f16 single
# logits differ by 0.4 to 2.2 while KL stays at 1e-5 to 3e-3 (tiny random models). A mixture of experts
# is judged by its distributions alone, with this much room.
_ROUTED_KL = 10.0


def limits_of(type_name: str, architecture: str, *, routed: bool = False) -> Limits | None:
    """The limits of a file of this type and architecture; None for an unknown type.

    `routed`: a mixture of experts.
    """
    limits = LIMITS.get(type_name)
    if architecture in _WITH_GELU:
        limits = _GELU_TABLE.get(type_name, limits)
    if limits is None or not routed:
        return limits
    return replace(
        limits,
        kl_mean=_ROUTED_KL * limits.kl_mean,
        kl_p99=_ROUTED_KL * limits.kl_p99,
        logit=None,
        greedy_margin=None,
    )


def wider(limits: Limits, other: Limits) -> Limits:
    """What both allow: for a file that was rounded to two types on its way."""

    def most(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else max(a, b)

    return Limits(
        kl_mean=max(limits.kl_mean, other.kl_mean),
        kl_p99=max(limits.kl_p99, other.kl_p99),
        ppl=max(limits.ppl, other.ppl),
        logit=most(limits.logit, other.logit),
        greedy_margin=most(limits.greedy_margin, other.greedy_margin),
    )
