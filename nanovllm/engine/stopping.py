"""Decides whether a sequence's newest token ends it. No torch here."""

from nanovllm.engine.sequence import Sequence


def stop_reason(seq: Sequence, token_id: int) -> tuple[str, int | str | None] | None:
    """Show `token_id`, the newest of `seq`, to its detokenizer and token filter.

    Returns:
        (finish_reason, stop_reason) as in `CompletionOutput` if the sequence ends here, else None.
    """
    params = seq.params
    num_generated = len(seq.token_ids) - len(seq.prompt_ids)
    can_stop = num_generated > params.min_tokens
    is_end_id = can_stop and token_id in seq.end_ids
    stop_string = None
    if seq.detokenizer and (not is_end_id or params.include_stop_str_in_output):
        stop_string = seq.detokenizer.add(token_id, can_stop)
    if seq.token_filter:
        seq.token_filter.accept(token_id)
        if error := seq.mask_error or seq.token_filter.error:
            return "abort", error
    if is_end_id:
        return "stop", token_id if token_id in params.stop_token_ids else None
    if stop_string is not None:
        return "stop", stop_string
    if seq.token_filter and seq.token_filter.is_complete:
        return "stop", None
    if num_generated >= params.max_tokens:
        return "length", None
    return None
