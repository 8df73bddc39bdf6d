"""Failure modes: which one a set of signs means, and what to do about it.

The advice comes from papers and from projects' own documents, named with it; none of it was measured here unless it
says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """A signal that has left its past.

    Args:
        onset_step: first step at which it had.
        baseline: its median before, on the signal's own scale of judgement turned back where that is possible.
        score: cumulative sum of its robust z.
    """

    signal: str
    family: str
    label: str
    onset_step: int
    value: float
    baseline: float
    score: float


@dataclass(frozen=True)
class Mode:
    """One way in which RL of a language model breaks.

    Args:
        title: as people say it.
        cause: what usually is behind it.
        advice: what to do, the most promising first, each with its source.
    """

    title: str
    cause: str
    advice: tuple[str, ...]


_ROLL_BACK = (
    "Roll back to a checkpoint from before the first sign and change the cause: resuming from within"
    " a collapse failed for GRPO (GSPO paper)."
)

MODES: dict[str, Mode] = {
    "engine-mismatch": Mode(
        "sampler and trainer disagree",
        "the inference engine assigns other probabilities than the trainer to the same tokens, and the gap compounds",
        (
            (
                "Turn on sequence-level masked importance sampling; token-level truncation only delays it (When "
                "Speed Kills Stability)."
            ),
            (
                "Anchor the trust region to the rollout policy, not to recomputed log-probabilities (DPPO, arXiv"
                " 2602.04879)."
            ),
            (
                "Train and sample in FP16 instead of BF16 (arXiv 2510.26788), or compute the LM head in FP32 "
                "(MiniMax-M1)."
            ),
            (
                "Check that the sampler has the newest weights, LoRA included, and the same template; for "
                "mixtures of experts replay the routing (arXiv 2507.18071)."
            ),
            (
                "MHPO and dual-clip survived 2 % of outlying log-probabilities that broke GRPO here (preset "
                "mismatch, small model)."
            ),
        ),
    ),
    "learning-rate": Mode(
        "the learning rate is too high",
        "updates are larger than the trust region can hold; the ratios of one batch spread at once",
        (
            (
                "Lower the learning rate, or lengthen its warm-up; scale it with the effective sample size "
                "(VCPO, arXiv 2602.17616)."
            ),
            "Lower max_grad_norm; take fewer optimizer steps per batch.",
            (
                "MHPO and no clip at all broke sooner than GRPO at a learning rate five times too high (preset "
                "lr-spike, small model)."
            ),
        ),
    ),
    "stale-batch": Mode(
        "importance ratios have a heavy tail",
        "too many updates per batch, rollouts of an old policy, or log-probabilities that the sampler misreports: a "
        "few tokens dominate the gradient",
        (
            "Use fewer epochs or minibatches per batch, or allow less policy lag.",
            (
                "Mask or truncate sequences by their ratio (TRM, MIS), or take an objective with a sequence-"
                "level ratio (GSPO, VESPO)."
            ),
            "Scale the learning rate with the effective sample size (VCPO, arXiv 2602.17616).",
        ),
    ),
    "policy-erosion": Mode(
        "tokens of failed samples are pushed down without bound",
        (
            "negative advantages contract tokens that are unlikely already, and the likelihood of correct "
            "answers falls with them"
        ),
        (
            "Bound the ratio for A < 0 from above too: dual-clip, a two-sided delta of 4 (INTELLECT-2; TRL `delta`).",
            "Penalise negative shifts more than positive ones (MHPO's lambda_neg, k_neg; SAPO's tau_neg).",
            "Mask off-policy sequences with negative advantage (DeepSeek-V3.2), or lower the learning rate.",
        ),
    ),
    "mode-collapse": Mode(
        "entropy is spent",
        "likely tokens with a positive advantage are reinforced until nothing is explored, and groups become alike",
        (
            "Raise the upper clip bound to 0.28 (DAPO), or use Clip-Cov / KL-Cov (arXiv 2505.22617).",
            (
                "Sample at a higher temperature; filter prompts by the variance of their rewards (RAGEN-2, arXiv"
                " 2604.06268)."
            ),
            "Add a small entropy bonus or KL penalty; lower the learning rate.",
        ),
    ),
    "entropy-explosion": Mode(
        "the policy turns to noise",
        "unlikely tokens are reinforced; text becomes gibberish within a few steps",
        (
            "Lower the learning rate; drop the entropy bonus or the raised upper clip bound.",
            "Add an importance-sampling mask; filter rollouts of gibberish; add a KL penalty to the reference.",
        ),
    ),
    "gradient-explosion": Mode(
        "the gradient explodes",
        "single batches or tokens hold gradients orders of magnitude above the rest",
        (
            "Lower max_grad_norm, or skip steps whose norm is an outlier; check the scale of rewards and advantages.",
            "AdamW with beta2 = 0.95 and eps = 1e-15 (MiniMax-M1); FP32 LM head.",
        ),
    ),
    "non-finite": Mode(
        "numbers overflow",
        "a NaN or infinity in the loss, the gradient or the log-probabilities",
        (
            "Skip the step and keep the weights; a single one is often harmless in fp16.",
            (
                "Look at the first step that has one: its tokens are kept. Check log-probabilities of −Inf, "
                "advantages of groups with equal rewards, and the loss scale."
            ),
        ),
    ),
    "kl-runaway": Mode(
        "the policy runs away from the reference",
        "the KL penalty is too weak for the learning rate, or its estimator overflows on single tokens",
        (
            "Raise beta or lower the learning rate; move the reference on purpose.",
            "Compare k1, k2 and k3: one token can make k3 explode (NeMo-RL; TRL issue 3015).",
        ),
    ),
    "length-blow-up": Mode(
        "responses grow until they are cut off",
        "length is rewarded, or the end token is never trained, so that rewards cannot be earned any more",
        (
            "Filter or softly punish overlong responses (DAPO); raise the limit in stages.",
            "Aggregate the loss by tokens, not by sequence means; check that the end token is in the loss mask.",
        ),
    ),
    "length-collapse": Mode(
        "responses shrink to nothing",
        "short answers are punished least",
        ("Check the reward of empty and short answers, and the normalisation of the loss by length.",),
    ),
    "no-signal": Mode(
        "no group teaches anything",
        "all rewards of nearly every group are equal: the prompts are too hard, too easy, or the policy is dead",
        ("Sample prompts dynamically (DAPO), filter those without variance, enlarge the groups.",),
    ),
    "reward-hacking": Mode(
        "the reward rises and the task does not get better",
        "the policy has found a gap between the reward that trains and what is wanted",
        (
            "Look at the completions with the highest reward; fix the reward, or add a verifier.",
            "Stop at the peak of the held-out reward; add a KL penalty.",
        ),
    ),
    "reward-collapse": Mode(
        "the reward falls",
        "no recorded signal explains it; the reward may also have changed",
        ("Check the reward server and the prompts; record log-probabilities of the sampler and of both policies.",),
    ),
    "wrong-kernel": Mode(
        "log-probabilities are impossible",
        "a fused kernel computes them wrongly (verl issue 2656)",
        ("Compute log-probabilities with the plain torch path and compare; turn the fused kernel off.",),
    ),
}

_ONE_FAMILY = {
    "divergence": "kl-runaway",
    "gradient": "gradient-explosion",
    "groups": "no-signal",
    "reward": "reward-collapse",
}


def mode_of(signs: Sequence[Sign], lr_jumped: bool) -> str:
    """The failure mode that the signs mean.

    Args:
        signs: in order of their onsets.
        lr_jumped: the learning rate was raised within the window.
    """
    names, families = {s.signal for s in signs}, {s.family for s in signs}
    if "mismatch" in families:
        return "engine-mismatch"
    if "true_reward_fall" in names and "reward_fall" not in names:
        return "reward-hacking"
    if lr_jumped and families & {"ratio", "concentration", "gradient", "divergence"}:
        return "learning-rate"
    if names & {"truncation", "length_growth", "repetition"}:
        return "length-blow-up"
    if "entropy_fall" in names:
        return "mode-collapse"
    if "contraction" in names and "entropy_rise" in names:
        return "policy-erosion"
    if families & {"ratio", "concentration"}:
        return "stale-batch"
    if "entropy_rise" in names:
        return "entropy-explosion"
    if "length_shrinkage" in names:
        return "length-collapse"
    return next((_ONE_FAMILY[s.family] for s in signs if s.family in _ONE_FAMILY), "reward-collapse")


def advice_for(mode: str) -> list[str]:
    """What to do, the most promising first."""
    return [*MODES[mode].advice, _ROLL_BACK]
