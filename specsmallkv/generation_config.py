"""What transformers' `GenerationConfig` asks for, in our terms; what we do not do is refused."""

from typing import Any

import torch

from .errors import UserError
from .sampling import Sampler

WARPERS = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper")  # `sampling.py` does what they do


def refuse_unsupported(generation_config: Any, input_ids: torch.Tensor, logits_processor: Any) -> None:
    """What this generator would silently ignore is refused."""
    neutral = {
        "num_beams": (None, 1),
        "num_return_sequences": (None, 1),
        "repetition_penalty": (None, 1.0),
        "no_repeat_ngram_size": (None, 0),
        "min_new_tokens": (None, 0),
        "min_p": (None, 0.0),
        "typical_p": (None, 1.0),
        "bad_words_ids": (None,),
        "suppress_tokens": (None,),
        "min_length": (None, 0),
        "guidance_scale": (None, 1.0),
        "return_dict_in_generate": (None, False),
    }
    for key, values in neutral.items():
        if getattr(generation_config, key, None) not in values:
            raise UserError(
                f"{key}={getattr(generation_config, key)} is not supported by this generator; pass {key}={values[-1]}."
            )
    for processor in logits_processor or ():
        if type(processor).__name__ not in WARPERS:
            raise UserError(f"{type(processor).__name__} is not supported by this generator; leave it out.")
    if input_ids.shape[0] != 1:
        raise UserError(f"custom_generate got a batch of {input_ids.shape[0]}; give one sequence at a time.")


def refuse_other_inputs(model_kwargs: dict[str, Any]) -> None:
    """Masks that hide tokens and embeddings in the place of ids; transformers leaves out a mask that hides none."""
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise UserError("attention_mask hides tokens, which this generator does not do; leave the padding out.")
    if model_kwargs.get("inputs_embeds") is not None:
        raise UserError("inputs_embeds is not supported by this generator; give input_ids.")


def sampler_of(generation_config: Any) -> Sampler:
    if not generation_config.do_sample:
        return Sampler()
    return Sampler(
        1.0 if generation_config.temperature is None else generation_config.temperature,
        1.0 if generation_config.top_p is None else generation_config.top_p,
        generation_config.top_k or 0,
    )


def eos_ids(generation_config: Any) -> set[int]:
    ids = generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
