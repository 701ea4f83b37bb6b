"""From an opened model to what the cluster knows of it."""

import time

from cluster.model_card import ModelCard, ServedModel
from cluster.text import Tokenizer, UnsupportedTokenizerError
from megakernel.model.load import OpenedModel, open_model
from megakernel.model.weights import ModelFormatError


def served_model(source: str, name: str | None = None, max_context_tokens: int | None = None) -> ServedModel:
    """Opens `source` (see `open_model`) and describes it; `max_context_tokens` None: as it was trained.

    Raises ModelFormatError, handled by the command line.
    """
    opened = open_model(source)
    served = ServedModel(
        card=_card(opened, name, max_context_tokens), tokenizer_json=opened.tokenizer.tokenizer_json
    )
    try:
        Tokenizer.of(served)
    except UnsupportedTokenizerError as error:
        raise ModelFormatError(f"{source}: {error}") from None
    return served


def _card(opened: OpenedModel, name: str | None, max_context_tokens: int | None) -> ModelCard:
    trained = opened.weights.shape.max_context_tokens
    context = trained if max_context_tokens is None else max_context_tokens
    if not 1 <= context <= trained:
        raise ModelFormatError(
            f"max_context_tokens is {context}; `{opened.name}` was trained for {trained}: "
            f"choose 1 to {trained}"
        )
    tokenizer = opened.tokenizer
    return ModelCard(
        name=name or opened.name,
        architecture=opened.weights.shape.architecture,
        fingerprint=opened.fingerprint,
        vocab_size=opened.weights.shape.vocab_size,
        max_context_tokens=context,
        bos_token_id=tokenizer.bos_token_id,
        add_bos_token=tokenizer.add_bos,
        eos_token_ids=tokenizer.eos_token_ids,
        chat_template=tokenizer.chat_template,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        created_unix_s=int(time.time()),
        num_parameters=opened.num_parameters,
        quantization=opened.quantization,
    )
