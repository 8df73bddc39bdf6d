"""The output head of a causal LM in chunks of rows, where its logits as a whole would be large.

Shape letters: B sequences, S tokens of prompt and completion, T response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from mhpo_core.chunked_logprobs import chunked_token_stats
from mhpo_core.logprobs import VIOLATIONS, TokenStats
from mhpo_core.spot_check import spot_check

# float32 logits of one chunk on the CPU: below, nothing is saved
LARGE_LOGITS_BYTES = 64 * 2**20
SPOT_CHECK_EVERY = 20
SPOT_CHECK_TOLERANCE = 1e-3
# what the head is compared on: the last positions of one sequence, hidden states scaled so that the largest raw logit
# is well into the bend of a soft cap such as Gemma 2's 30, where those of an untrained model are not
_POSITIONS, _LARGEST_LOGIT = 4, 50.0

_LOG = logging.getLogger(__name__)


class ChunkedHead:
    """Token statistics from the hidden states of a model whose head is one linear map, with or without a soft cap.

    Whether it is, is not read from the class of the model but measured, once: its own logits of a few positions
    against hidden·weightᵀ. Some models scale or mask their logits after the head (Cohere, Granite); they keep the path
    over whole logits, and a log line says why.

    Args:
        model: a transformers causal LM.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._softcap: float | None = None
        self._agrees: bool | None = None
        self._passes = 0

    def applies(self, n_tokens: int, inputs: dict[str, Tensor]) -> bool:
        """Whether to take this path: the logits are large, or were once, and the head is what this class computes.

        From the first large batch on it stays with this path. In bfloat16 the other one rounds its logits, and
        logp_new and logp_old of one update must not differ by that.

        Args:
            n_tokens: B·T.
            inputs: of the model's forward pass, (B, S); the comparison uses the first sequence.
        """
        if self._agrees is None:
            weight = getattr(self._head(), "weight", None)
            if weight is not None and 4 * n_tokens * weight.shape[0] > LARGE_LOGITS_BYTES:
                self._agrees = self._compare(inputs)
        return self._agrees is True

    def hidden(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, S, H), what the head is applied to."""
        states: Tensor = self._model.base_model(**inputs, use_cache=False).last_hidden_state
        return states

    def token_stats(
        self, hidden: Tensor, token_id: Tensor, *, temperature: float, dtype: torch.dtype = torch.float32
    ) -> TokenStats:
        """log p, H and Σp² of token_id, (B, T); the first call and every 20th after it is followed by a spot check.

        A spot check waits for the device once. Above 1e-3 nats it logs a warning; it never stops the run.

        Args:
            hidden: (B, T, H), at the position before each token.
            dtype: that hidden and weight are rounded to before they are multiplied.
        """
        head = self._head()
        arguments = {"temperature": temperature, "softcap": self._softcap, "bias": head.bias}
        hidden, weight = hidden.to(dtype), head.weight.to(dtype)
        stats = chunked_token_stats(hidden, weight, token_id, **arguments)
        if self._passes % SPOT_CHECK_EVERY == 0:
            every = torch.ones_like(token_id, dtype=torch.bool)
            _report(spot_check(hidden, weight, token_id, stats.logp, every, **arguments).item())
            _report_violations(stats.violations(every).tolist())
        self._passes += 1
        return stats

    def _head(self) -> Any:
        find = getattr(self._model, "get_output_embeddings", None)
        return find() if find else None

    def _compare(self, inputs: dict[str, Tensor]) -> bool:
        head = self._head()
        # a subclass or an adapter may add a term that is still zero now
        if type(head) is not nn.Linear:
            return _refuse(f"its output head is of class {type(head).__name__}, not torch.nn.Linear")
        try:
            self._softcap = getattr(self._model.config.get_text_config(), "final_logit_softcapping", None)
            difference, allowed = self._difference(head, {name: ids[:1] for name, ids in inputs.items()})
        except Exception as error:  # base_model and forward are each model's own, and raise what they like
            return _refuse(f"the comparison failed with {type(error).__name__}: {error}")
        if difference <= allowed:
            return True
        return _refuse(
            f"its logits differ from hidden·weightᵀ by {difference:.1e} of the largest, allowed {allowed:.0e}"
        )

    @torch.no_grad()
    def _difference(self, head: nn.Linear, inputs: dict[str, Tensor]) -> tuple[float, float]:
        """max |the model's logits − hidden·weightᵀ| / max |the model's logits|, and what rounding explains of it."""
        with torch.autocast(head.weight.device.type, enabled=False):
            hidden = self.hidden(inputs)[:, -_POSITIONS:]
            scale = _LARGEST_LOGIT / head(hidden).abs().max()
            scaled = head.register_forward_pre_hook(lambda _, arguments: (arguments[0] * scale,))
            try:
                own = self._model(**inputs, use_cache=False, logits_to_keep=_POSITIONS).logits
            finally:
                scaled.remove()
            expected = head(hidden * scale)
            if self._softcap is not None:
                expected = self._softcap * torch.tanh(expected / self._softcap)
        return ((own - expected).abs().max() / own.abs().max()).item(), max(1e-4, 2 * torch.finfo(own.dtype).eps)


def _refuse(reason: str) -> bool:
    _LOG.warning("model: the log-probabilities are computed from whole logits, which needs more memory: %s.", reason)
    return False


def _report(largest: float) -> None:
    # NaN is not within the tolerance either
    if not largest <= SPOT_CHECK_TOLERANCE:
        _LOG.warning(
            "spot check: max |Δlogp| = %.3g nats between the chunked log-probabilities and a float64 recomputation, "
            "allowed is %.0e. Do not trust this run's ratios, and report it with the model and the device.",
            largest,
            SPOT_CHECK_TOLERANCE,
        )


def _report_violations(counts: list[int]) -> None:
    found = [f"{count} × {name}" for name, count in zip(VIOLATIONS, counts, strict=True) if count]
    if found:
        _LOG.warning(
            "spot check: token statistics that no distribution has: %s. Do not trust this run's ratios, and report it "
            "with the model and the device.",
            ", ".join(found),
        )
