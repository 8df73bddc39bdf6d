"""Several sources of one training, step by step."""

from __future__ import annotations

from collections.abc import Iterator

from collectors.importers.steps import ImportedStep


def merged(streams: list[Iterator[ImportedStep]]) -> Iterator[ImportedStep]:
    """Steps of several sources in rising order, those of the same number as one."""
    heads = [(stream, head) for stream in streams if (head := next(stream, None)) is not None]
    while heads:
        step = min(head.step for _, head in heads)
        result: ImportedStep | None = None
        for index, (stream, head) in reversed(list(enumerate(heads))):
            if head.step == step:
                result = head if result is None else _both(head, result)
                following = next(stream, None)
                if following is None:
                    del heads[index]
                else:
                    heads[index] = (stream, following)
        assert result is not None
        yield result


def _both(first: ImportedStep, second: ImportedStep) -> ImportedStep:
    tokens = first if first.batch is not None or second.batch is None else second
    texts = first if first.sequences is not None else second
    # texts of one source belong to the tokens of another only if both have as many
    sequences = tokens.sequences if tokens.sequences is not None else texts.sequences
    if tokens.batch is not None and sequences is not None and sequences.count() != tokens.batch.n_sequences:
        sequences = None
    return ImportedStep(
        first.step, {**second.metrics, **first.metrics}, tokens.batch, tokens.ratio_known, sequences,
        {**second.gradient_norms, **first.gradient_norms},
        first.wall_time if first.wall_time is not None else second.wall_time,
    )  # fmt: skip
