"""What `benchmarks/decode.py` measures beside the megakernel, on the same weights and as many threads."""

import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decode_ours import Cell
from megakernel.model.weights import Weights

_LLAMA_BATCH = 512


class LlamaCpp:
    """llama.cpp's decode call, with as little of Python around it as there can be."""

    def __init__(self, model: Path, threads: int, max_context: int, max_rows: int, tokens: Any) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept: C calls it until the end
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(model).encode(), llama_cpp.llama_model_default_params()
        )
        assert self.model, f"llama.cpp cannot load {model}"
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = max_context + 2 * max_rows + 64
        parameters.n_batch = parameters.n_ubatch = _LLAMA_BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.n_seq_max = max_rows
        parameters.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        assert self.context, "llama.cpp makes no context"
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(_LLAMA_BATCH, 0, max_rows)
        self.tokens = tokens
        self.max_rows = max_rows
        self.filled = 0

    def prepare(self, cell: Cell) -> None:
        """The first `cell.context` tokens in every sequence; contexts only grow."""
        assert cell.context >= self.filled
        self._fill(self.tokens, self.filled, cell.context)
        for sequence in range(1, self.max_rows):
            self.api.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)
        self.filled = cell.context

    def step(self, cell: Cell) -> None:
        self._decode(
            [(int(self.tokens[row]), cell.context, row) for row in range(cell.rows)], wants_logits=True
        )
        for row in range(cell.rows):
            self.api.llama_memory_seq_rm(self.memory, row, cell.context, -1)

    def prompt(self, token_ids: Any) -> None:
        """Into an empty memory: nothing may be prepared before."""
        assert self.filled == 0, "a prompt would go behind the prepared context"
        self._fill(token_ids, 0, len(token_ids))
        self.api.llama_memory_clear(self.memory, True)

    def close(self) -> None:
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def _fill(self, tokens: Any, start: int, end: int) -> None:
        for first in range(start, end, _LLAMA_BATCH):
            last = min(first + _LLAMA_BATCH, end)
            self._decode([(int(tokens[at]), at, 0) for at in range(first, last)], wants_logits=False)

    def _decode(self, entries: list[tuple[int, int, int]], wants_logits: bool) -> None:
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wants_logits
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = self.api.llama_decode(self.context, batch)
        assert status == 0, f"llama_decode says {status}"
        self.api.llama_synchronize(self.context)


class OpenVino:
    """OpenVINO GenAI's pipeline on the same GGUF; its own clock between tokens, greedy choice included."""

    def __init__(self, model: Path, threads: int, tokens: Any) -> None:
        import openvino
        import openvino_genai

        self.api, self.openvino, self.tokens = openvino_genai, openvino, tokens
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.pipeline = openvino_genai.LLMPipeline(str(model), "CPU", INFERENCE_NUM_THREADS=threads)

    def mean_ms(self, cell: Cell, steps: int) -> float:
        """Of the gaps after the first token."""
        settings = self.api.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos, settings.do_sample = steps + 1, True, False
        ids = self.openvino.Tensor(self.tokens[None, : cell.context].astype(np.int64))
        mask = self.openvino.Tensor(np.ones((1, cell.context), np.int64))
        result = self.pipeline.generate(self.api.TokenizedInputs(ids, mask), settings)
        return float(result.perf_metrics.get_tpot().mean)


class Transformers:
    """Hugging Face transformers with the same values as dense weights, in the given type."""

    def __init__(self, weights: Weights, threads: int, tokens: Any, dtype: str) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = weights.shape
        assert shape.architecture == "llama", "only Llama's weights have names here"
        torch.set_num_threads(threads)
        self.torch = torch
        config = LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.max_context_tokens,
            rms_norm_eps=shape.rms_norm_eps,
            rope_theta=shape.rope_theta,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            tie_word_embeddings=shape.has_tied_head,
        )
        self.model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
        missing, unexpected = self.model.load_state_dict(_hugging_face_names(weights), strict=False)
        assert not unexpected, f"unknown to transformers: {unexpected}"
        assert set(missing) <= {"lm_head.weight"}, f"not given to transformers: {missing}"
        self.tokens = torch.from_numpy(tokens.astype(np.int64))[None]
        self.cache: Any = None

    def prepare(self, cell: Cell) -> None:
        with self.torch.inference_mode():
            self.cache = self.model(self.tokens[:, : cell.context], use_cache=True).past_key_values

    def step(self, cell: Cell) -> None:
        with self.torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            token = self.tokens[:, cell.context - 1 : cell.context]
            self.model(token, past_key_values=self.cache, use_cache=True)
            self.cache.crop(-1)


def _hugging_face_names(weights: Weights) -> Mapping[str, Any]:
    import torch

    layer_names = {
        "attn_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    names = {
        "embed": "model.embed_tokens.weight",
        "final_norm": "model.norm.weight",
        "head": "lm_head.weight",
    }
    for layer in range(weights.shape.num_layers):
        for ours, theirs in layer_names.items():
            names[f"layers.{layer}.{ours}"] = f"model.layers.{layer}.{theirs}.weight"
    return {names[name]: torch.from_numpy(np.array(weights.dense(name))) for name in weights.names}


def open_if_installed(what: str, make: Any, *arguments: Any) -> Any:
    """None where its package is not there."""
    started_s = time.perf_counter()
    try:
        peer = make(*arguments)
    except ImportError:
        print(f"{what} is not installed (pip install 'headrace[bench]'): left out", flush=True)
        return None
    print(f"{what} loaded in {time.perf_counter() - started_s:.1f} s", flush=True)
    return peer
