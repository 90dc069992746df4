"""The mathematics of learning from rewards: advantages, clipped losses, KL estimators. Pure functions of tensors.

Probabilities are logarithms in nats. Axes: G prompts, S answers to each, B answers, T tokens of the longest answer (a
mask says which are one), N tokens of all answers in a row, V vocabulary.
"""

from __future__ import annotations

import torch

CHUNK = 512  # tokens whose whole distributions are looked at together
FAR = 20.0  # log of a ratio that is as good as infinite; exp of a whole answer's would overflow
STEADY = 0.2  # relative error of the KL divergence that the controller sees at most
GAIN = 0.1


def group_advantages(rewards_GS: torch.Tensor, *, scale: bool) -> torch.Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-4) inside each group (arXiv 2402.03300, section 4.1.2); std with S - 1.

    Not scaled, easy and hard prompts weigh alike (Dr. GRPO, arXiv 2503.20783). Equal rewards teach nothing.
    """
    centred_GS = rewards_GS - rewards_GS.mean(-1, keepdim=True)
    return centred_GS / (rewards_GS.std(-1, keepdim=True) + 1e-4) if scale else centred_GS


def leave_one_out(rewards_GS: torch.Tensor) -> torch.Tensor:
    """A_i = r_i - mean of the other answers' (arXiv 2402.14740, equation 8)."""
    others_GS = (rewards_GS.sum(-1, keepdim=True) - rewards_GS) / (rewards_GS.shape[-1] - 1)
    return rewards_GS - others_GS


def token_rewards(scores_B: torch.Tensor, kl_BT: torch.Tensor, mask_BT: torch.Tensor, *, beta: float) -> torch.Tensor:
    """R_t = -beta log(pi(a_t) / pi_ref(a_t)), and the score at the last token (arXiv 1909.08593, equation 2)."""
    rewards_BT = -beta * kl_BT * mask_BT
    last_B = (mask_BT.sum(-1).long() - 1).clamp(min=0)
    return rewards_BT.scatter_add(-1, last_B[:, None], scores_B[:, None].to(rewards_BT.dtype))


def gae(rewards_BT: torch.Tensor, values_BT: torch.Tensor, mask_BT: torch.Tensor, *, gamma: float, lam: float):
    """Advantages [B, T] (arXiv 1506.02438, equation 16), 0 where the mask is; what a value should have been is
    advantage + value.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}; after the last token both are 0.
    """
    values_BT = values_BT * mask_BT
    advantages_BT = torch.zeros_like(values_BT)
    later_B, next_B = torch.zeros_like(values_BT[:, 0]), torch.zeros_like(values_BT[:, 0])
    for t in range(values_BT.shape[1] - 1, -1, -1):
        here_B = mask_BT[:, t]
        later_B = (rewards_BT[:, t] + gamma * next_B - values_BT[:, t] + gamma * lam * later_B) * here_B
        advantages_BT[:, t], next_B = later_B, values_BT[:, t]
    return advantages_BT


def whiten(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 over all tokens that are one: give it those of all workers."""
    count = mask_BT.sum()
    mean = (values_BT * mask_BT).sum() / count
    variance = ((values_BT - mean) ** 2 * mask_BT).sum() / count
    return (values_BT - mean) * torch.rsqrt(variance + 1e-8) * mask_BT


def clipped_policy_loss(log_ratio: torch.Tensor, advantages: torch.Tensor, *, low: float, high: float) -> torch.Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) (arXiv 1707.06347, equation 7), entry by entry; log_ratio = log rho.

    `high` above `low` lets unlikely tokens rise further (DAPO, arXiv 2503.14476, equation 10).
    """
    ratio = log_ratio.clamp(-FAR, FAR).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def is_clipped(log_ratio: torch.Tensor, advantages: torch.Tensor, *, low: float, high: float) -> torch.Tensor:
    """Where the clipped branch holds, so that nothing is learnt."""
    ratio = log_ratio.clamp(-FAR, FAR).exp()
    return ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))


def clipped_value_loss(values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, *, clip: float) -> torch.Tensor:
    """max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2, entry by entry (OpenAI baselines, ppo2)."""
    held = torch.minimum(torch.maximum(values, old - clip), old + clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (held - returns) ** 2)


def k1(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """log pi(a) - log pi_ref(a): unbiased for KL(pi || pi_ref) where a ~ pi, and negative for some a."""
    return logprobs - reference


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """r - log r - 1 with r = pi_ref(a) / pi(a): unbiased as k1, never negative, of less variance (Schulman 2020,
    "Approximating KL divergence"; GRPO's equation 4)."""
    log_r = (reference - logprobs).clamp(-FAR, FAR)
    return log_r.exp() - log_r - 1


@torch.no_grad()
def full_kl(logits_NV: torch.Tensor, reference_NV: torch.Tensor) -> torch.Tensor:
    """KL(pi || pi_ref) of each token's whole distribution, [N], fp32: sum_v pi_v (log pi_v - log pi_ref_v)."""
    parts = [logits_NV.new_zeros(0, dtype=torch.float32)]
    for here, there in zip(logits_NV.split(CHUNK), reference_NV.split(CHUNK), strict=True):
        here, there = here.float().log_softmax(-1), there.float().log_softmax(-1)
        parts.append((here.exp() * (here - there)).sum(-1))
    return torch.cat(parts)


@torch.no_grad()
def entropy(logits_NV: torch.Tensor) -> torch.Tensor:
    """-sum_v pi_v log pi_v of each token, [N], fp32."""
    parts = [logits_NV.new_zeros(0, dtype=torch.float32)]
    for here in logits_NV.split(CHUNK):
        here = here.float().log_softmax(-1)
        parts.append(-(here.exp() * here).sum(-1))
    return torch.cat(parts)


def adapted(beta: float, *, kl: float, target: float) -> float:
    """The next KL coefficient (arXiv 1909.08593, section 2.2): beta (1 + 0.1 clip(kl / target - 1, -0.2, 0.2)).

    `kl` and `target` in nats per answer.
    """
    return beta * (1 + GAIN * max(-STEADY, min(STEADY, kl / target - 1)))
