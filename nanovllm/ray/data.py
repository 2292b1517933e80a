"""Batch inference with Ray Data: a class for `map_batches`."""

import asyncio
from typing import Any

import pyarrow as pa  # pyright: ignore[reportMissingImports]  # comes with ray[data]

from nanovllm import AsyncLLM, RequestOutputKind, SamplingParams
from nanovllm.checks import shown
from nanovllm.ray.actor import end_with_raylet

_INPUTS = ("prompt_token_ids", "messages", "prompt", "seed")


class AnswerRows:
    """Answers the rows of a dataset, each by its `prompt_token_ids`, its `messages` or its `prompt`.

        dataset.map_batches(
            AnswerRows,
            fn_constructor_kwargs={"model": "Qwen/Qwen3-8B", "sampling_params": SamplingParams(max_tokens=64)},
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=8),
            num_gpus=1,
        )

    Adds the columns `generated_text`, `generated_token_ids` and `finish_reason`, lists of them if `n` is above 1, and
    `error`, which says why a row has none. They replace columns of the same names. Ray gives the rows of an actor that
    is lost to another one.

    Args:
        model: see `Config`.
        sampling_params: for all rows; a column `seed` has a seed for each.
        template: options of `LLM.chat_prompts`.
        **options: the other fields of `Config`.
    """

    def __init__(
        self,
        model: str | None = None,
        sampling_params: SamplingParams | None = None,
        template: Any = None,
        **options: Any,
    ):
        end_with_raylet()
        if not isinstance(sampling_params, SamplingParams | None):
            raise TypeError(f"sampling_params must be SamplingParams, got {shown(sampling_params)}")
        self._llm = AsyncLLM(model, **options)
        params = sampling_params or self._llm.get_default_sampling_params()
        self._params = params.clone(output_kind=RequestOutputKind.FINAL_ONLY)
        self._template = template or {}
        text = pa.string()
        ids = pa.list_(pa.int32())
        column_types = {"generated_text": text, "generated_token_ids": ids, "finish_reason": text}
        if params.n > 1:
            column_types = {name: pa.list_(column_type) for name, column_type in column_types.items()}
        self._column_types = column_types | {"error": text}

    async def __call__(self, batch: pa.Table) -> pa.Table:
        if not isinstance(batch, pa.Table):
            raise TypeError(f'map_batches must have batch_format="pyarrow", got a batch of type {type(batch).__name__}')
        # Other columns may have values that Python cannot have, such as times in the far future.
        rows = batch.select([name for name in _INPUTS if name in batch.column_names]).to_pylist()
        answers = await asyncio.gather(*map(self._answer, rows))
        batch = batch.drop_columns([name for name in self._column_types if name in batch.column_names])
        for name, column_type in self._column_types.items():
            batch = batch.append_column(name, pa.array([answer.get(name) for answer in answers], column_type))
        return batch

    async def _answer(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the values of the new columns."""
        try:
            row = _without_nulls(row)
            prompt = row.get("prompt_token_ids", row.get("prompt"))
            if "messages" in row and "prompt_token_ids" not in row:
                prompt = await self._llm.chat_prompt(row["messages"], **self._template)
            if prompt is None:
                raise ValueError("a row must have prompt_token_ids, messages or prompt, and has none of them")
            params = self._params.clone(seed=row.get("seed", self._params.seed))
            (output,) = [output async for output in self._llm.generate(prompt, params)]
        except Exception as error:
            await self._llm.check_health()  # raises if the engine is the reason, so that Ray starts another one
            return {"error": f"{type(error).__name__}: {error}"}
        columns = {
            "generated_text": [sample.text for sample in output.outputs],
            "generated_token_ids": [sample.token_ids for sample in output.outputs],
            "finish_reason": [sample.finish_reason for sample in output.outputs],
        }
        if self._params.n == 1:
            return {name: value for name, (value,) in columns.items()}
        return columns


def _without_nulls(value: Any) -> Any:
    """Return a row without null fields, also in its messages, which a column has where other rows have values."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
