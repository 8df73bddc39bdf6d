"""What one loss call of verl knows: a micro-batch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from collectors.adapters.optimizer_steps import MicroBatch
from collectors.adapters.verl_settings import number_of, setting
from mhpo_core.batch import TokenBatch

_FIELDS = {
    "response_mask": "mask", "old_log_probs": "logp_old", "advantages": "advantage", "ref_log_prob": "logp_ref",
    "rollout_log_probs": "logp_rollout", "responses": "token_id",
}  # fmt: skip
_OUTPUTS = {"log_probs": "logp_new", "entropy": "entropy", "sum_pi_squared": "sum_p_squared"}


def policy_loss_call(name: str, given: Mapping[str, Any], value: Tensor, metrics: Mapping[str, Any]) -> MicroBatch:
    """From the arguments of a policy loss, by name, and what it returned.

    Args:
        name: of the policy loss.
        given: its arguments.
        value: its loss; the loss that is differentiated unless verl adds an entropy or a KL term to it.
        metrics: its metrics.
    """
    config = given.get("config")
    old = given["old_log_prob"].detach()
    whole = not setting(config, "use_kl_loss") and not setting(config, "entropy_coeff")
    tokens = {
        "logp_new": given["log_prob"].detach(), "logp_old": old, "advantage": given["advantages"].detach(),
        "mask": given["response_mask"].bool(),
    }  # fmt: skip
    if name == "bypass_mode":
        tokens["logp_rollout"] = old
    part = _micro_batch(config, tokens, given.get("rollout_is_weights"), {})
    part.metrics, part.loss = _logged(metrics) | {"actor/pg_loss": ("sum", [value])}, value if whole else None
    return part


def whole_loss_call(config: Any, model_output: Any, data: Any, value: Tensor, metrics: Mapping[str, Any]) -> MicroBatch:
    """From the arguments of verl's `ppo_loss` and what it returned."""
    names = [name for name in (*_FIELDS, "rollout_is_weights", "rm_scores") if name in data]
    padded = data.select(*names).to_padded_tensor()
    tokens = {_FIELDS[name]: padded[name] for name in names if name in _FIELDS}
    tokens["mask"] = tokens["mask"].bool()
    responses_of = importlib.import_module("verl.workers.utils.padding").no_padding_2_padding
    for name, column in _OUTPUTS.items():
        if model_output.get(name) is not None:
            tokens[column] = responses_of(model_output[name], data).detach()
    sequences = _rows(data, len(tokens["mask"]))
    if "rm_scores" in names:
        scores = padded["rm_scores"]
        sequences["reward"] = (scores if scores.dim() == 1 else scores.sum(dim=1)).float().tolist()
    part = _micro_batch(config, tokens, padded.get("rollout_is_weights", None), sequences)
    part.metrics, part.loss = _logged(metrics), value
    return part


def _micro_batch(
    config: Any, tokens: dict[str, Tensor], weights: Tensor | None, sequences: dict[str, list[Any]]
) -> MicroBatch:
    mask = tokens["mask"]
    info = setting(config, "global_batch_info", {})
    expected = info.get("batch_num_tokens")
    found = MicroBatch(
        None, expected=None if expected is None else int(expected), n_ranks=int(info.get("dp_size") or 1)
    )
    if not bool(mask.any()):
        return found
    if weights is not None:
        found.weights = weights.detach().float()[mask]
        means = torch.where(mask, weights.detach().float(), 0.0).sum(dim=1) / mask.sum(dim=1)
        sequences["extra"] = [{"rollout_is_weight": m} if m == m else None for m in means.tolist()]
    found.batch, found.sequences = TokenBatch(**tokens), sequences
    return found


def _logged(metrics: Mapping[str, Any]) -> dict[str, tuple[str, list[float | Tensor]]]:
    """Plain numbers and `Metric`s of verl under the names that verl logs."""
    found: dict[str, tuple[str, list[float | Tensor]]] = {}
    for name, metric in metrics.items():
        values = [float(v) for v in getattr(metric, "values", [metric]) if isinstance(v, int | float)]
        rule = getattr(getattr(metric, "aggregation", None), "value", "mean")
        found[name if name.startswith("actor/") else f"actor/{name}"] = (rule, [*values])
    return found


def _rows(data: Any, n_rows: int) -> dict[str, list[Any]]:
    """Group and completion of each row: `uid` is a prompt's, with `session_id` one completion's."""
    get = importlib.import_module("verl.utils.tensordict_utils").get
    known: dict[str, list[Any]] = {}
    for name in ("uid", "session_id"):
        values = get(data, name, None)
        values = values.tolist() if hasattr(values, "tolist") else values
        if isinstance(values, list) and len(values) == n_rows:
            known[name] = values
    rows: dict[str, list[Any]] = {}
    if "uid" in known:
        rows["group_id"] = [number_of(uid) for uid in known["uid"]]
    if len(known) == 2:
        rows["sequence_id"] = [number_of(*both) for both in zip(known["uid"], known["session_id"], strict=True)]
    return rows
