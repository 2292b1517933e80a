"""Takes in a sequence's newest token, and decides whether the token ends it. No torch here."""

from nanovllm.engine.sequence import Sequence


def accept_token(seq: Sequence, token_id: int) -> tuple[str, int | str | None] | None:
    """Advance the detokenizer and the token filter of `seq` by its newest token, `token_id`.

    Returns:
        (finish_reason, stop_reason) as in `CompletionOutput` if the token ends the sequence, else None.
    """
    params = seq.params
    num_generated = len(seq.token_ids) - len(seq.prompt_ids)
    can_stop = num_generated > params.min_tokens
    is_stop_id = can_stop and token_id in seq.stop_ids
    stop_string = None
    if seq.detokenizer and (not is_stop_id or params.include_stop_str_in_output):
        stop_string = seq.detokenizer.add(token_id, can_stop)
    if seq.token_filter:
        seq.token_filter.accept(token_id)
        if error := seq.token_filter.error:
            return "abort", error
    if is_stop_id:
        return "stop", token_id if token_id in params.stop_token_ids else None
    if stop_string is not None:
        return "stop", stop_string
    if seq.token_filter and seq.token_filter.is_complete:
        return "stop", None
    if num_generated >= seq.max_tokens:
        return "length", None
    if seq.mask_error:  # another mask would take too long
        return "abort", seq.mask_error
    return None
